"""Track which experts each language uses during training: numbers in the Trainer's logs, and pictures.

Shape letters: B sentences, L tokens of a sentence, T = B * L, K experts per token, E experts, G languages.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..files.output import write_file
from ..models.language_codes import language_ids
from ..models.layer_names import SIDES
from ..models.router import Routing
from .pictures import draw_expert_shares, has_matplotlib
from .router_callback import RouterCallback, sparse_routers

logger = logging.get_logger(__name__)


@dataclass
class _Counts:
    """Slots that each expert computed for each language, float64[G, E].

    Attributes:
        since_log: counts of this process since the last log.
        since_picture: counts of all processes since the last picture, up to the last log.
    """

    since_log: Tensor
    since_picture: Tensor

    def collect(self) -> Tensor:
        """Add what all processes counted since the last log to the counts for the picture."""
        counts_GE = reduce(self.since_log, reduction="sum")
        self.since_picture += counts_GE
        self.since_log.zero_()  # in place, because counting may be part of a CUDA graph
        return counts_GE


class LanguageRoutingCallback(RouterCallback):
    """Counts, during training, which experts compute the tokens of each language, by the sentences' language tags.

    ```python
    trainer = MultitaskSeq2SeqTrainer(model, args, ...)
    LanguageRoutingCallback(tokenizer).add_to(trainer)
    ```

    `callbacks=[LanguageRoutingCallback(tokenizer)]` works, too, but then the reporters of `report_to` get logs without
    its numbers; `add_to` puts it before them. A token of the encoder has the language of the source, a token of the
    decoder that of the target. Training logs get these numbers, over all processes:

    | key | |
    |---|---|
    | `routing/encoder.3/language_bits` | bits that the expert of a token tells about its language, 0 if none |
    | `routing/encoder/de` | share of the tokens that would have to change experts for the language to use them as all \
languages together do, 0 to 1, mean over the layers of a side |

    and at every evaluation and the end of training `routing/step_<step>.json` in `output_dir` gets the share of each
    language's tokens by expert and layer since the last one, and `routing/step_<step>.png` a heat map of it if
    matplotlib is installed.

    Args:
        tokenizer: one for translation: [`ZCodeM3Tokenizer`], `NllbTokenizer`, `M2M100Tokenizer`.

    Raises:
        ValueError: the tokenizer has no languages.
    """

    def __init__(self, tokenizer: Any):
        super().__init__()
        ids = language_ids(tokenizer)
        self.languages = list(ids)
        # int64[vocab_size], the number of the language that a token is the tag of, G for other tokens
        self._language_of_token = torch.full((max(len(tokenizer), *ids.values()) + 1,), len(ids))
        self._language_of_token[list(ids.values())] = torch.arange(len(ids))
        self._counts: dict[str, _Counts] = {}
        self._languages_of_batch: dict[str, Tensor] = {}

    def watch(self, model: nn.Module, args: TrainingArguments) -> list[Any]:
        self._counts = {}
        handles = [model.register_forward_pre_hook(self._read_languages, with_kwargs=True)]
        for layer, router in sparse_routers(model).items():
            zeros_GE = torch.zeros(len(self.languages), router.num_experts, dtype=torch.float64, device=args.device)
            self._counts[layer] = _Counts(zeros_GE, zeros_GE.clone())
            handles.append(router.module.register_forward_hook(self._hook(layer)))
        return handles

    def _read_languages(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Before the model runs, find the language of each sentence by its first tag."""
        targets = kwargs.get("labels") if kwargs.get("labels") is not None else kwargs.get("decoder_input_ids")
        self._languages_of_batch = {
            side: self._languages_of(ids)
            for side, ids in (("encoder", kwargs.get("input_ids")), ("decoder", targets))
            if model.training and ids is not None
        }

    def _languages_of(self, ids_BL: Tensor) -> Tensor:
        """int64[B], G for a sentence without a tag."""
        self._language_of_token = self._language_of_token.to(ids_BL.device)
        languages_BL = self._language_of_token[ids_BL.clamp(0, len(self._language_of_token) - 1)]
        first_B1 = (languages_BL < len(self.languages)).int().argmax(dim=1, keepdim=True)
        return languages_BL.gather(1, first_B1).squeeze(1)

    def _hook(self, layer: str) -> Any:
        side = layer.split(".")[0]

        @torch.compiler.disable  # otherwise there would be a graph for each layer
        @torch.no_grad()
        def count(router: nn.Module, args: Any, output: tuple[Tensor, Routing]) -> None:
            if not router.training or side not in self._languages_of_batch:
                return
            counts, expert_ids_TK = self._counts[layer], output[1].expert_ids
            num_languages, num_experts = counts.since_log.shape
            language_B = self._languages_of_batch[side]
            language_T = language_B.repeat_interleave(expert_ids_TK.shape[0] // language_B.shape[0])
            # one more place in both: for sentences without a tag, and for slots that no expert computes
            cell_TK = language_T[:, None] * (num_experts + 1) + expert_ids_TK
            cells = counts.since_log.new_zeros((num_languages + 1) * (num_experts + 1))
            cells.scatter_add_(0, cell_TK.flatten(), torch.ones_like(cell_TK, dtype=cells.dtype).flatten())
            counts.since_log += cells.view(num_languages + 1, num_experts + 1)[:num_languages, :num_experts]

        return count

    def numbers(self) -> dict[str, Any]:
        numbers, distances = {}, {}
        for layer, counts in self._counts.items():
            counts_GE = counts.collect().cpu()
            numbers[f"routing/{layer}/language_bits"] = mutual_information_bits(counts_GE)
            distances[layer] = distance_from_all(counts_GE)
        for side in SIDES:
            of_side = [distance_G for layer, distance_G in distances.items() if layer.startswith(side)]
            if of_side:
                mean_G = torch.stack(of_side).mean(dim=0).tolist()
                in_use = zip(self.languages, mean_G, strict=True)
                # a language without sentences has no number
                numbers |= {f"routing/{side}/{language}": mean for language, mean in in_use if mean == mean}
        return numbers

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._write_picture(args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._write_picture(args, state)
        super().on_train_end(args, state, control, **kwargs)

    def _write_picture(self, args: TrainingArguments, state: TrainerState) -> None:
        for counts in self._counts.values():
            counts.collect()
        pictured = {layer: counts.since_picture.cpu() for layer, counts in self._counts.items()}
        if not any(counts_GE.sum() for counts_GE in pictured.values()):
            return  # an evaluation before or after training, or one at its end, which was written already
        for counts in self._counts.values():
            counts.since_picture = torch.zeros_like(counts.since_picture)
        if not state.is_world_process_zero:
            return
        is_used_G = torch.stack([counts_GE.sum(dim=1) for counts_GE in pictured.values()]).sum(dim=0) > 0
        languages = [language for language, is_used in zip(self.languages, is_used_G.tolist(), strict=True) if is_used]
        shares = {layer: expert_shares(counts_GE[is_used_G]) for layer, counts_GE in pictured.items()}
        folder = Path(args.output_dir or ".") / "routing"
        numbers = {layer: shares_GE.tolist() for layer, shares_GE in shares.items()}
        text = json.dumps({"step": state.global_step, "languages": languages, "expert_shares": numbers})
        write_file(folder / f"step_{state.global_step}.json", text + "\n")
        if has_matplotlib():
            write_file(folder / f"step_{state.global_step}.png", draw_expert_shares(shares, languages))
        else:
            logger.warning_once("no routing pictures without matplotlib: pip install hf-moe-ted[viz]")


def expert_shares(counts_GE: Tensor) -> Tensor:
    """float64[G, E], the share of each language's tokens by expert; 0 for a language without tokens."""
    return counts_GE / counts_GE.sum(dim=1, keepdim=True).clamp(min=1.0)


def distance_from_all(counts_GE: Tensor) -> Tensor:
    """float64[G], total variation between a language's experts and those of all; NaN for a language without tokens."""
    shares_GE = counts_GE / counts_GE.sum(dim=1, keepdim=True)
    share_of_all_E = counts_GE.sum(dim=0) / counts_GE.sum()
    return (shares_GE - share_of_all_E).abs().sum(dim=1) / 2


def mutual_information_bits(counts_GE: Tensor) -> float:
    """Mutual information of language and expert, in bits; 0 if no token was counted."""
    joint_GE = counts_GE / counts_GE.sum().clamp(min=1.0)
    independent_GE = joint_GE.sum(dim=1, keepdim=True) * joint_GE.sum(dim=0, keepdim=True)
    ratio_GE = torch.where(joint_GE > 0, joint_GE / independent_GE, torch.ones_like(joint_GE))
    return (joint_GE * ratio_GE.log2()).sum().clamp(min=0.0).item()


__all__ = [
    "LanguageRoutingCallback",
    "distance_from_all",
    "expert_shares",
    "mutual_information_bits",
]
