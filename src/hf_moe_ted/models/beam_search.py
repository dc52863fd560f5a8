"""Beam search for translations, with the same tokens and scores as `GenerationMixin._beam_search` of transformers.

It takes less time. The decoder runs once per source, with the beams of a sentence as its positions, on keys and values
that are never copied (`BeamCache`). There is no softmax over the vocabulary if its largest numbers are enough.
Sentences that are done leave the batch.

Shape letters: B sentences that are not done, N beams of each, C candidates of each, R = B * N rows, V words.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation import (
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    GenerateBeamEncoderDecoderOutput,
    GenerationMixin,
    LogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
)

from .beam_cache import BeamCache
from .beam_hypotheses import Candidates, Hypotheses, Ranking, together
from .field_of_config import are_set_on

# with these options the result for a sentence depends on other sentences or on chance
OPTIONS_OF_BATCHES = ("eval_capacity_factor", "second_expert_policy")
_WORDS_PER_BLOCK = 128  # number of blocks in which `best_of_rows` searches the largest first

# logits processors that act at some lengths only, and treat all rows alike
ACTIVE_AT: dict[type, Callable[[Any, int], bool]] = {
    ForcedBOSTokenLogitsProcessor: lambda processor, length: length == 1,
    ForcedEOSTokenLogitsProcessor: lambda processor, length: length == processor.max_length - 1,
    MinLengthLogitsProcessor: lambda processor, length: length < processor.min_length,
    MinNewTokensLengthLogitsProcessor: lambda processor, length: (
        length - processor.prompt_length_to_skip < processor.min_new_tokens
    ),
}
_THAT_FORBID_THE_END = (MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor)
_KNOWN_ARGUMENTS = {"encoder_outputs", "attention_mask", "past_key_values", "cache", "use_cache"}
_PASSED_BY = {  # methods of the model and its parts that transformers' search calls but this one does not
    "": ("forward", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation"),
    "model": ("forward",),
}


class SometimesActive(LogitsProcessor):
    """A processor that says at which lengths it changes scores, and treats rows alike when some have left.

    Attributes:
        forced: the token of each sentence that it forces when it is active; `()` if it is never active; `None` for
            other processors.
    """

    forced: Sequence[int] | None = None

    def is_active(self, length: int) -> bool:
        """Whether it changes scores after so many tokens."""
        raise NotImplementedError


def why_not(model: Any, generation_config: Any, synced_gpus: bool, model_kwargs: dict[str, Any]) -> str | None:
    """The reason why this search cannot do a generation; `None` if it can."""
    config = model.config
    others = {name for name, value in model_kwargs.items() if value is not None} - _KNOWN_ARGUMENTS
    reasons = {
        "sampling": generation_config.do_sample,
        "training mode": any(module.training for module in (model, *model.model.decoder.modules())),
        "gradients": torch.is_grad_enabled(),
        "processes that wait for each other": synced_gpus,
        f"{', '.join(sorted(others))}": bool(others),
        "use_cache=False": not model_kwargs.get("use_cache"),
        "cache_implementation": generation_config.cache_implementation not in (None, "dynamic"),
        "prefill_chunk_size": generation_config.prefill_chunk_size is not None,
        "low_memory": generation_config.low_memory,
        "output_logits": generation_config.output_logits,
        "output_attentions": generation_config.output_attentions or config.output_attentions,
        "output_hidden_states": generation_config.output_hidden_states or config.output_hidden_states,
        "attention other than sdpa and eager": config._attn_implementation not in ("sdpa", "eager"),
        "untied positions": config.position_embedding_type == "tupe",
        "a capacity of experts": config.eval_capacity_factor is not None,
        "second experts by chance": config.second_expert_policy != "all",
        "options of one layer": are_set_on(model.model.decoder.modules(), *OPTIONS_OF_BATCHES),
        "hooks of the model": any(
            has_hooks(module) or hasattr(module, "_hf_hook")
            for module in (*model.model.decoder.modules(), model.lm_head, model.model, model)
        ),
        "methods that are not this package's": any(
            not _is_of_the_package(model.get_submodule(path), name)
            for path, names in _PASSED_BY.items()
            for name in names
        ),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def has_hooks(module: Any) -> bool:
    """Whether a module has hooks that matter without gradients.

    That of `enable_input_require_grads`, which training with gradient checkpointing leaves on the embedding, does not.
    """
    return any(
        (getattr(hook, "__module__", None), getattr(hook, "__name__", None))
        != ("transformers.modeling_utils", "make_inputs_require_grads")
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )


def _is_of_the_package(module: Any, name: str) -> bool:
    """Whether a method is neither overridden in a subclass nor replaced in the object, as PEFT does."""
    of_class, own = getattr(type(module), name), getattr(getattr(module, name), "__func__", None)
    if own is not of_class and not (_is_only_autocast(own, of_class) and _has_one_dtype(module)):
        return False
    owner = next(kind for kind in type(module).__mro__ if name in vars(kind))  # `functools.wraps` copies `__module__`
    return owner.__module__.rpartition(".")[0] in (__package__, GenerationMixin.__module__.rpartition(".")[0])


def _is_only_autocast(method: Any, of_class: Any) -> bool:
    """Whether a Trainer with `bf16`, or Accelerate's mixed precision, has put autocast around a method, nothing else.

    Without it a search computes in the dtype of the weights. transformers' search does so in the encoder, too, which it
    calls by itself; its decoder would cast all weights again for each token.
    """
    while method is not of_class:  # twice around it, if a model was prepared twice
        converting = getattr(method, "__wrapped__", None)
        kind = f"{type(converting).__module__}.{type(converting).__name__}"
        if kind != "accelerate.utils.operations.ConvertOutputsToFp32":
            return False
        in_autocast = getattr(converting, "__wrapped__", None)
        method = getattr(in_autocast, "__wrapped__", None)
    return True


def _has_one_dtype(module: Any) -> bool:
    """Whether all weights have one dtype: with several, layers may need autocast."""
    return len({parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}) == 1


@dataclass(frozen=True)
class _Search:
    """The parts of a search that do not change between steps.

    Attributes:
        processors: logits processors.
        watch: gets log-sums float[R] of all logits; NaN in the logits gives NaN here.
        keeps_all: whether sentences that are done stay, for processors and outputs that use row numbers.
        with_scores: whether to keep the scores of all words.
    """

    model: Any
    processors: Any
    watch: Callable[[Tensor], None]
    criteria: Any
    ranking: Ranking
    num_beams: int
    num_candidates: int
    eos: Tensor | None
    keeps_all: bool
    with_scores: bool


@dataclass
class _Batch:
    """The parts that change: sentences that are not done.

    Attributes:
        source, source_mask: hidden states float[B, S, D] of the encoder, and their mask in the decoder's form.
        candidates: int64[all, C, L], the last candidates of all sentences, for criteria that use row numbers.
    """

    cache: BeamCache
    source: Tensor
    source_mask: Tensor | None
    hypotheses: Hypotheses
    candidates: Tensor

    def keep(self, index: Tensor) -> None:
        self.cache.keep(index)
        self.source = self.source.index_select(0, index)
        self.source_mask = None if self.source_mask is None else self.source_mask.index_select(0, index)
        self.hypotheses = self.hypotheses.kept(index)


def beam_search(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    watch: Callable[[Tensor], None],
    **model_kwargs: Any,
) -> Any:
    """Like `GenerationMixin._beam_search`, if `why_not` gives no reason against it. The cache is not returned.

    Args:
        watch: gets the log-sum of each row of logits, float[R], in each step.
    """
    options = generation_config
    num_beams, prompts_BL = options.num_beams, input_ids[:: options.num_beams]
    eos = options._eos_token_tensor
    with_scores = bool(options.return_dict_in_generate and options.output_scores)
    search = _Search(
        model=model,
        processors=logits_processor,
        watch=watch,
        criteria=stopping_criteria,
        ranking=Ranking(options.length_penalty, options.early_stopping, input_ids.shape[1], options.max_length),
        num_beams=num_beams,
        num_candidates=number_of_candidates(num_beams, 0 if eos is None else len(eos)),
        eos=eos,
        keeps_all=with_scores or any(not _treats_rows_alike(processor) for processor in logits_processor),
        with_scores=with_scores,
    )
    fill = -1 if eos is None else int(options._pad_token_tensor or eos[0])
    batch = _first_batch(search, prompts_BL, fill, model_kwargs)
    done, scores = _run(search, batch, prompts_BL)
    found = together([*done, batch.hypotheses])
    return output_of(options, found, search.ranking.prompt_length, tuple(scores) if with_scores else None)


def number_of_candidates(num_beams: int, num_ends: int) -> int:
    """Candidates per sentence, enough that N can continue whatever number ends."""
    return max(2, 1 + num_ends) * num_beams


def _treats_rows_alike(processor: Any) -> bool:
    return type(processor) in ACTIVE_AT or isinstance(processor, SometimesActive)


def _first_batch(search: _Search, prompts_BL: Tensor, fill: int, model_kwargs: dict[str, Any]) -> _Batch:
    num_beams, device = search.num_beams, prompts_BL.device
    num_sentences, length = prompts_BL.shape
    source = model_kwargs["encoder_outputs"][0][::num_beams].contiguous()
    mask = model_kwargs.get("attention_mask")
    mask = None if mask is None else mask[::num_beams].to(source.device)
    hypotheses = Hypotheses.start(prompts_BL, num_beams, search.ranking.max_length, fill)
    candidates = hypotheses.running_BNL[:, :1].expand(-1, search.num_candidates, -1).clone()
    cache = BeamCache(num_sentences, num_beams, length, device)
    return _Batch(cache, source, mask, hypotheses, candidates)


def _run(search: _Search, batch: _Batch, prompts_BL: Tensor) -> tuple[list[Hypotheses], list[Tensor]]:
    """Run until all are done; return the parts that left the batch, and the scores of all words in each step."""
    left: list[Hypotheses] = []
    scores: list[Tensor] = []
    length = prompts_BL.shape[1]
    logits = _logits_of_prompts(search, batch, prompts_BL)
    while True:
        candidates = _candidates(search, batch.hypotheses, logits, length, scores)
        place_1 = torch.tensor([length], device=prompts_BL.device)
        continued = batch.hypotheses.continued(candidates, place_1, place_1 - search.ranking.prompt_length)
        batch.candidates[batch.hypotheses.sentences_B] = continued[0]
        of_all = search.criteria(batch.candidates.flatten(0, 1)[:, : length + 1], tuple(scores) or None)
        ends_BC = of_all.view(len(batch.candidates), -1)[batch.hypotheses.sentences_B]
        parents_BN = batch.hypotheses.advance(candidates, continued, ends_BC, length, search.ranking)
        length += 1
        is_done_B = batch.hypotheses.is_done_B1(search.ranking).flatten()
        if bool(ends_BC.all()) or bool(is_done_B.all()):
            return left, scores
        if not search.keeps_all and bool(is_done_B.any()):
            left.append(batch.hypotheses.kept(is_done_B.nonzero().flatten()))
            going_on = (~is_done_B).nonzero().flatten()
            batch.keep(going_on)
            parents_BN = parents_BN.index_select(0, going_on)
        batch.cache.continue_from(parents_BN)
        logits = _logits_of_beams(search, batch, length)


def _logits_of_prompts(search: _Search, batch: _Batch, prompts_BL: Tensor) -> Tensor:
    """float32[R, V]; the beams of a sentence are still equal."""
    hidden = _decoded(search, batch, prompts_BL, None)
    return search.model.lm_head(hidden[:, -1]).float().repeat_interleave(search.num_beams, dim=0)


def _logits_of_beams(search: _Search, batch: _Batch, length: int) -> Tensor:
    """float32[R, V]."""
    tokens_BN = batch.hypotheses.running_BNL[:, :, length - 1]
    attends_BNK = batch.cache.attends_BNK
    mask_BNK = torch.zeros(attends_BNK.shape, dtype=batch.source.dtype, device=attends_BNK.device)
    mask_BNK = mask_BNK.masked_fill(~attends_BNK, torch.finfo(mask_BNK.dtype).min)
    hidden = _decoded(search, batch, tokens_BN, mask_BNK.unsqueeze(1))
    return search.model.lm_head(hidden.flatten(0, 1)).float()


def _decoded(search: _Search, batch: _Batch, tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Hidden states [B, N, D] of beams, each at the position that its mask gives; or [B, L, D] of prompts."""
    return search.model.model.decoder(
        input_ids=tokens,
        attention_mask=mask,
        encoder_hidden_states=batch.source,
        encoder_attention_mask=batch.source_mask,
        cache=batch.cache,
        use_cache=True,
        return_dict=True,
    ).last_hidden_state


def _candidates(
    search: _Search, hypotheses: Hypotheses, logits_RV: Tensor, length: int, scores: list[Tensor]
) -> Candidates:
    """The best continuations; if wanted, the scores of all words are appended to `scores`."""
    active = [p for p in search.processors if type(p) not in ACTIVE_AT or ACTIVE_AT[type(p)](p, length)]
    active = [p for p in active if not isinstance(p, SometimesActive) or p.is_active(length)]
    log_sum_R = row_logsumexp(logits_RV)
    search.watch(log_sum_R)
    if search.with_scores or any(type(processor) not in _THAT_FORBID_THE_END for processor in active):
        log_probs_RV = logits_RV.sub_(log_sum_R.unsqueeze(-1))
        tokens_RL = hypotheses.running_BNL[:, :, :length].flatten(0, 1)
        for processor in search.processors:
            log_probs_RV = processor(tokens_RL, log_probs_RV)
        if search.with_scores:
            scores.append(log_probs_RV.clone())
        best_RC, tokens_RC = log_probs_RV.topk(min(search.num_candidates, log_probs_RV.shape[-1]))
    else:
        for processor in active:
            logits_RV[:, processor.eos_token_id] = -torch.inf
        best_RC, tokens_RC = best_of_rows(logits_RV, search.num_candidates)
        best_RC = best_RC - log_sum_R.unsqueeze(-1)
    return best_of_sentences(hypotheses, best_RC, tokens_RC, search.num_candidates)


def best_of_sentences(hypotheses: Hypotheses, best_RC: Tensor, tokens_RC: Tensor, num_candidates: int) -> Candidates:
    """The best candidates of each sentence, from the best of its beams, with log-probabilities float32[R, C]."""
    num_sentences, num_beams = hypotheses.running_scores_BN.shape
    of_beams = best_RC.view(num_sentences, num_beams, -1) + hypotheses.running_scores_BN.unsqueeze(-1)
    scores_BC, index_BC = of_beams.flatten(1).topk(num_candidates)
    tokens_BC = tokens_RC.view(num_sentences, -1).gather(1, index_BC)
    return Candidates(scores_BC, index_BC // best_RC.shape[-1], tokens_BC)


def row_logsumexp(logits_RV: Tensor) -> Tensor:
    """float32[R], row by row, so that intermediate numbers stay in the processor's cache."""
    if logits_RV.device.type != "cpu":
        return logits_RV.logsumexp(dim=-1)
    return torch.cat([row.logsumexp(dim=-1, keepdim=True) for row in logits_RV])


def best_of_rows(values_RV: Tensor, num_best: int) -> tuple[Tensor, Tensor]:
    """Like `topk`, but faster: the largest numbers are in the blocks with the largest maxima."""
    num_rows, num_words = values_RV.shape
    num_blocks = num_words // _WORDS_PER_BLOCK
    if num_blocks < 2 * num_best:
        return values_RV.topk(min(num_best, num_words))
    in_blocks = values_RV[:, : num_blocks * _WORDS_PER_BLOCK].unflatten(1, (num_blocks, _WORDS_PER_BLOCK))
    block_RC = in_blocks.amax(dim=-1).topk(num_best).indices
    found = in_blocks.gather(1, block_RC.unsqueeze(-1).expand(-1, -1, _WORDS_PER_BLOCK)).flatten(1)
    of_block = torch.arange(_WORDS_PER_BLOCK, device=values_RV.device)
    words = (block_RC.unsqueeze(-1) * _WORDS_PER_BLOCK + of_block).flatten(1)
    if num_words > num_blocks * _WORDS_PER_BLOCK:
        rest = torch.arange(num_blocks * _WORDS_PER_BLOCK, num_words, device=values_RV.device)
        found = torch.cat([found, values_RV[:, num_blocks * _WORDS_PER_BLOCK :]], dim=1)
        words = torch.cat([words, rest.expand(num_rows, -1)], dim=1)
    best_RC, index_RC = found.topk(num_best)
    return best_RC, words.gather(1, index_RC)


def output_of(
    options: Any, hypotheses: Hypotheses, prompt_length: int, scores: tuple[Tensor, ...] | None = None
) -> Any:
    """The output of `generate`, with scores if the scores of all words in each step were kept."""
    wanted = slice(0, options.num_return_sequences)
    sequences = hypotheses.ended_BNL[:, wanted].flatten(0, 1)
    rows = hypotheses.ended_rows_BNL[:, wanted].flatten(0, 1)
    num_new = int((rows >= 0).sum(dim=1).max())
    sequences, rows = sequences[:, : prompt_length + num_new], rows[:, :num_new]
    if not options.return_dict_in_generate:
        return sequences
    output: Any = GenerateBeamEncoderDecoderOutput  # its annotations are narrower than the values that it accepts
    return output(
        sequences=sequences,
        sequences_scores=None if scores is None else hypotheses.ended_scores_BN[:, wanted].flatten(),
        scores=scores,
        beam_indices=rows,
    )


__all__ = [
    "ACTIVE_AT",
    "SometimesActive",
    "beam_search",
    "best_of_rows",
    "best_of_sentences",
    "has_hooks",
    "number_of_candidates",
    "output_of",
    "row_logsumexp",
    "why_not",
]
