"""Run real text through a model and collect statistics of its experts.

Shape letters: T tokens of a batch, K experts per token, S = T * K slots, E experts, D model width.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..evaluation.evaluation_mode import evaluation_mode
from ..evaluation.parallel_text import (
    EncodedSentence,
    batches,
    buckets,
    check_languages,
    choose_languages,
    encode,
    first_tokens,
    in_known_languages,
    progress_over,
    read_sentences,
)
from ..models.language_codes import LanguagePair
from ..models.layer_names import FFN_PATTERN, side_of
from ..models.moe_layer import ZCodeM3MoELayer
from ..models.pretrained_model import ZCodeM3PreTrainedModel
from ..models.router import Routing, modules_in_use
from .expert_statistics import ExpertStatistics, LayerStatistics, ModelFingerprint
from .teacher_forcing import TeacherForcedBatch

BATCHES_PER_BUCKET = 16

_MOE_LAYER = re.compile(rf"{FFN_PATTERN}$")


def collect_expert_statistics(
    model: ZCodeM3PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Iterable[Mapping[str, Any]],
    *,
    languages: Sequence[str] | None = None,
    batch_size: int = 32,
    max_tokens: int | None = None,
) -> ExpertStatistics:
    """Count which experts a model uses for which languages, and record router confidence and expert outputs.

    Sources go through the encoder and references through the decoder (teacher forcing); nothing is generated. A batch
    holds sentences of one language pair and of similar length. The dataset is streamed; sentences of a pair are
    buffered for some batches and sorted by length.

    The model runs as in evaluation, without dropout and router noise and with `eval_capacity_factor`; its mode is
    restored afterwards. Routing that is random in evaluation, too (`second_expert_policy`, see [`ZCodeM3Config`]),
    stays random.

    Statistics of several runs or processes can be added (see [`ExpertStatistics`]). With TED, all processes of the
    model take part in every batch, so give all of them the same dataset; each returns the statistics of the whole
    dataset.

    Args:
        model: a [`ZCodeM3ForConditionalGeneration`] with at least one MoE layer.
        tokenizer: its tokenizer, with `src_lang` and `tgt_lang`, which are restored.
        dataset: rows with the strings `source`, `target`, `src_lang` and `tgt_lang`, or the translation rows of
            *datasets*, `{"translation": {"en": "...", "de": "..."}}`, which count for every ordered pair of their
            languages. Texts longer than the model takes are truncated. Languages are codes in any form that means one
            of the tokenizer's (`zh-CN` for `zh`); the statistics have the tokenizer's.
        languages: skip sentences whose source or target language is not among these; by default none are skipped.
        batch_size: sentences per batch.
        max_tokens: stop counting a language pair once its sources and targets have this many tokens together.

    Raises:
        ValueError: the model has no MoE layer, or an `expert_map`; a row has another form; the tokenizer does not know
            a language of `languages` or of the dataset, or a language has no sentence; no sentence is left; a router or
            expert returns NaN or infinity.
    """
    layers = _named_moe_layers(model)
    _check_options(model, batch_size, max_tokens)
    known, languages = choose_languages(tokenizer, languages)

    recorders = {name: _LayerRecorder(layer) for name, layer in layers.items()}
    totals = _Totals()
    with (
        evaluation_mode(model),
        _recording(recorders.values()),
        progress_over(dataset, "Collecting expert statistics") as progress,
    ):
        all_sentences = in_known_languages(read_sentences(dataset, progress), known, languages, progress)
        for pair, sentences in buckets(all_sentences, batch_size * BATCHES_PER_BUCKET):
            progress.update(len(sentences))
            num_tokens = totals.num_tokens[pair]
            if max_tokens is not None and num_tokens >= max_tokens:
                continue
            encoded = encode(tokenizer, pair, sentences, model.config.max_position_embeddings)
            encoded = first_tokens(encoded, max_tokens, num_tokens)
            for batch in batches(encoded, batch_size):
                _run(model, recorders, batch)
            totals.add(pair, encoded, recorders)
    check_languages(totals.num_sentences, languages)
    return totals.statistics(fingerprint_of(model))


def fingerprint_of(model: ZCodeM3PreTrainedModel) -> ModelFingerprint:
    """The fingerprint of a loaded model.

    Raises:
        ValueError: the model has no MoE layer.
    """
    weights = {name: _whole(layer.router.weight) for name, layer in _named_moe_layers(model).items()}
    return ModelFingerprint.of(model.config, weights)


def _check_options(model: ZCodeM3PreTrainedModel, batch_size: int, max_tokens: int | None) -> None:
    if model.config.expert_map is not None:
        raise ValueError(
            "the model has an expert_map: its experts were merged, or pruned with renormalize=False; collect "
            "statistics of the model from which it was made"
        )
    if batch_size < 1 or (max_tokens is not None and max_tokens < 1):
        raise ValueError(f"batch_size ({batch_size}) and max_tokens ({max_tokens}) must be at least 1")


def _named_moe_layers(model: nn.Module) -> dict[str, ZCodeM3MoELayer]:
    layers = {
        f"model.{found[0]}": module
        for name, module in modules_in_use(model)
        if (found := _MOE_LAYER.search(name)) and isinstance(module, ZCodeM3MoELayer)
    }
    if not layers:
        raise ValueError(f"{type(model).__name__} has no MoE layer, so it has no experts to count")
    return layers


@contextmanager
def _recording(recorders: Iterable["_LayerRecorder"]) -> Iterator[None]:
    handles = [handle for recorder in recorders for handle in recorder.attach()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run(model: Any, recorders: Mapping[str, "_LayerRecorder"], sentences: Sequence[EncodedSentence]) -> None:
    batch = TeacherForcedBatch.of(sentences, model)
    for name, recorder in recorders.items():
        recorder.is_token_T = (batch.source_mask if side_of(name) == "encoder" else batch.target_mask).flatten()
    batch.run(model)


class _LayerRecorder:
    """Hooks on the router and the experts of a layer that add up statistics.

    The experts are called once, as in inference, but with one slot per row and weights of 1, so that each output is
    visible. The hook after them computes the weighted sum over a token's slots. The hooks are outside of other hooks,
    so expert parallelism works inside.

    Sums are float32 on the model's device, over at most a bucket of batches, so counts stay exact.

    Attributes:
        is_token_T: bool[T], False for padding; set it before each forward.
    """

    is_token_T: Tensor

    def __init__(self, layer: ZCodeM3MoELayer):
        self._layer = layer
        self._routing: Routing
        self._weights_TK: Tensor
        self._sums: dict[str, Tensor] = {}

    def attach(self) -> list[Any]:
        return [
            self._layer.router.register_forward_hook(self._keep_routing),
            self._layer.experts.register_forward_pre_hook(self._one_slot_per_row, prepend=True),
            self._layer.experts.register_forward_hook(self._record),
        ]

    def take(self) -> dict[str, Tensor]:
        """The sums since the last call, float64 on the CPU, by the names of [`LayerStatistics`]."""
        sums, self._sums = {name: tensor.cpu().double() for name, tensor in self._sums.items()}, {}
        return sums

    def _keep_routing(self, router: nn.Module, args: Any, output: tuple[Tensor, Routing]) -> None:
        self._routing = output[1]

    def _one_slot_per_row(self, experts: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        tokens_TD, expert_ids_TK, self._weights_TK = args
        top_k = expert_ids_TK.shape[1]
        rows_SD = tokens_TD if top_k == 1 else tokens_TD.repeat_interleave(top_k, dim=0)
        return rows_SD, expert_ids_TK.reshape(-1, 1), torch.ones_like(self._weights_TK).reshape(-1, 1)

    def _record(self, experts: nn.Module, args: Any, output_SD: Tensor) -> Tensor:
        routing, is_token_T = self._routing, self.is_token_T.to(output_SD.device)
        num_experts, (num_tokens, top_k) = routing.num_experts, routing.expert_ids.shape
        is_token_T1 = is_token_T.unsqueeze(-1)
        choices_TK = routing.choices.masked_fill(~is_token_T1, num_experts)
        computed_S = routing.expert_ids.masked_fill(~is_token_T1, num_experts).flatten()
        probs_TE = routing.logits.softmax(dim=-1)
        confidence_T1 = probs_TE.gather(1, routing.choices[:, :1])
        gated_norm_S = self._weights_TK.flatten() * torch.linalg.vector_norm(output_SD, dim=-1, dtype=torch.float32)
        one_hot_SE = torch.nn.functional.one_hot(computed_S, num_experts + 1)[:, :-1].float()

        num_routed_KE = torch.stack([_count(choices_T, num_experts) for choices_T in choices_TK.unbind(dim=1)])
        batch_sums = {
            "num_routed": num_routed_KE,
            "num_dropped": num_routed_KE.sum(dim=0) - one_hot_SE.sum(dim=0),
            "gate_mass": is_token_T.float() @ probs_TE,
            "confidence": _count(choices_TK[:, 0], num_experts, confidence_T1.squeeze(-1)),
            "gated_norm": gated_norm_S.float() @ one_hot_SE,
            "output_sum": one_hot_SE.T @ output_SD.float(),
        }
        _add(self._sums, batch_sums)
        if top_k == 1:
            return output_SD * self._weights_TK
        return (output_SD.view(num_tokens, top_k, -1) * self._weights_TK.unsqueeze(-1)).sum(dim=1)


def _count(expert_ids_T: Tensor, num_experts: int, values_T: Tensor | None = None) -> Tensor:
    """float32[E], for each expert the sum of values over its tokens, or their number; id `num_experts` is ignored."""
    values_T = torch.ones_like(expert_ids_T, dtype=torch.float32) if values_T is None else values_T
    sums = torch.zeros(num_experts + 1, device=expert_ids_T.device)
    return sums.scatter_add_(0, expert_ids_T, values_T)[:num_experts]


def _add(sums: dict[str, Tensor], others: Mapping[str, Tensor]) -> None:
    for name, tensor in others.items():
        sums[name] = sums[name] + tensor if name in sums else tensor


class _Totals:
    """Totals of all batches, per language pair except for the outputs of experts."""

    def __init__(self) -> None:
        self.num_sentences: Counter[LanguagePair] = Counter()
        self.num_tokens: Counter[LanguagePair] = Counter()
        self._sums: defaultdict[tuple[LanguagePair, str], dict[str, Tensor]] = defaultdict(dict)
        self._output_sums: dict[str, Tensor] = {}

    def add(
        self, pair: LanguagePair, sentences: Sequence[EncodedSentence], recorders: Mapping[str, _LayerRecorder]
    ) -> None:
        """Add the recorders' sums over these sentences."""
        self.num_sentences[pair] += len(sentences)
        self.num_tokens[pair] += sum(sentence.num_tokens for sentence in sentences)
        for layer, recorder in recorders.items():
            sums = recorder.take()
            if wrong := [name for name, tensor in sums.items() if not tensor.isfinite().all()]:
                raise ValueError(
                    f"{layer} of the model returned NaN or infinity for text from {pair[0]} to {pair[1]} (seen in "
                    f"{', '.join(wrong)}); its weights are damaged, or too large for their dtype: try float32"
                )
            _add(self._output_sums, {layer: sums.pop("output_sum")})
            _add(self._sums[pair, layer], sums)

    def statistics(self, fingerprint: ModelFingerprint) -> ExpertStatistics:
        pairs = sorted(self.num_sentences)
        layers = {}
        for layer, output_sum in self._output_sums.items():
            rows = [self._sums[pair, layer] for pair in pairs]
            stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
            counts = {name: stacked.pop(name).long() for name in ("num_routed", "num_dropped")}
            layers[layer] = LayerStatistics(**counts, **stacked, output_sum=output_sum)
        num_sentences = tuple(self.num_sentences[pair] for pair in pairs)
        statistics = ExpertStatistics(fingerprint, tuple(pairs), num_sentences, layers)
        statistics.check()
        return statistics


def _whole(weight: Any) -> Tensor:
    """The whole of a parameter that may be spread over processes."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


__all__ = ["collect_expert_statistics", "fingerprint_of"]
