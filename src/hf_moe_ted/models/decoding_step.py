"""A step of decoding on the memory of a search: everything between two tokens, without waiting for the device.

Shape letters as in search_memory.py; R = B * N rows, V words.
"""

import functools
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from .beam_hypotheses import Candidates, Hypotheses
from .beam_search import best_of_rows, best_of_sentences, row_logsumexp
from .search_memory import FixedCache, SearchMemory

try:
    from hf_moe_ted.kernels import beam_attention, beam_step
except ImportError:  # without Triton, which comes with PyTorch for GPUs, or remote code without the package
    beam_attention = beam_step = None  # type: ignore[assignment]

KERNEL_DEVICES: tuple[str, ...] = (
    "cuda",
)  # devices on which Triton kernels compute attention and the work after the logits


def read_prompts(model: Any, memory: SearchMemory, length: int) -> None:
    """Write the keys of prompts except their last tokens; all beams of a sentence attend to them.

    They are in the places of the first beam's keys.
    """
    num_beams = memory.num_beams
    places_L = num_beams * torch.arange(length, device=memory.counters.device)
    memory.mask_B1NK.index_fill_(3, places_L, 0.0)
    mask_B1LK = torch.full_like(memory.mask_B1NK[:, :, :1], torch.finfo(memory.mask_B1NK.dtype).min)
    mask_B1LK = mask_B1LK.repeat(1, 1, length, 1)
    for place in range(length):
        mask_B1LK[:, :, place:, num_beams * place] = 0.0
    tokens_BL = memory.hypotheses.running_BNL[:, 0, :length]
    source_mask_B1LS = memory.source_mask_B1NS[:, :, :1].repeat(1, 1, length, 1)
    _decoded(model, memory, tokens_BL, mask_B1LK, source_mask_B1LS, FixedCache(memory, places_L, None))


def _decoded(
    model: Any, memory: SearchMemory, tokens_BL: Tensor, mask: Tensor, source_mask: Tensor, cache: FixedCache
) -> Tensor:
    """Hidden states float[B, L, D]. Both masks are additive, so transformers does not convert them."""
    # the keys of the source are in the cache; its hidden states are only checked for presence
    nothing = memory.source_mask_B1NS.new_empty(1, 1, 1).expand(len(tokens_BL), source_mask.shape[-1], 1)
    return model.model.decoder(
        input_ids=tokens_BL,
        attention_mask=mask,
        encoder_hidden_states=nothing,
        encoder_attention_mask=source_mask,
        cache=cache,
        use_cache=True,
        return_dict=True,
    ).last_hidden_state


def decoding_step(model: Any, memory: SearchMemory, num_candidates: int) -> None:
    """Add one token to all beams of all sentences. It reads and writes the memory, and waits for nothing."""
    settings = memory.settings
    has_kernels = _has_kernels(memory, len(model.lm_head.weight), num_candidates)
    if not has_kernels:  # let each beam attend to the key that it writes next
        own_B1N1 = memory.keys_N.view(1, 1, -1, 1).expand(len(memory.last_BN), -1, -1, -1)
        memory.mask_B1NK.scatter_(3, own_B1N1, 0.0)
    masks = (memory.mask_B1NK, memory.source_mask_B1NS)
    cache = FixedCache(memory, memory.keys_N, None)
    if _has_attention(memory, model.config._attn_implementation):
        cache.attend = functools.partial(_attend, memory)
    hidden = _decoded(model, memory, memory.last_BN, *masks, cache)
    logits_RV = model.lm_head(hidden.flatten(0, 1))
    if has_kernels:
        ends = (settings.ends_E, settings.forbids_ends_1)
        best = beam_step.best_words(logits_RV, num_candidates, *ends, memory.forced_B, memory.has_nan_1)
        beam_step.advance_beams(*best, memory)
    else:
        advance(memory, _candidates(memory, logits_RV, num_candidates))
    memory.counters.add_(memory.steps)


def _has_kernels(memory: SearchMemory, num_words: int, num_candidates: int) -> bool:
    if beam_step is None or memory.counters.device.type not in KERNEL_DEVICES:
        return False
    return beam_step.can_take(num_words, num_candidates, len(memory.settings.ends_E))


def _has_attention(memory: SearchMemory, implementation: str) -> bool:
    keys, _ = memory.own[0]
    if beam_attention is None or keys.device.type not in KERNEL_DEVICES or implementation != "sdpa":
        return False
    return beam_attention.can_attend(memory.num_beams, keys.shape[-1], keys.dtype)


def _attend(
    memory: SearchMemory, layer_idx: int, mask: Tensor, scaling: float, query: Tensor, *new_keys_and_values: Tensor
) -> Tensor:
    """Attention of a layer to past and new keys and values; without new ones, to the source."""
    if not new_keys_and_values:
        return beam_attention.beam_attention(query, *memory.of_source[layer_idx], mask, scaling)
    new_keys, new_values = new_keys_and_values
    keys, values = memory.own[layer_idx]
    return beam_attention.beam_attention(query, keys, values, mask, scaling, new_keys, new_values, memory.keys_N)


def _candidates(memory: SearchMemory, logits_RV: Tensor, num_candidates: int) -> Candidates:
    settings, num_beams = memory.settings, memory.num_beams
    log_sum_R1 = row_logsumexp(logits_RV.float()).unsqueeze(-1)
    memory.has_nan_1.logical_or_(log_sum_R1.isnan().any())
    of_ends_RE = logits_RV.index_select(1, settings.ends_E.clamp(min=0))
    logits_RV.index_copy_(1, settings.ends_E.clamp(min=0), of_ends_RE.masked_fill(settings.forbids_ends_1, -torch.inf))
    best_RC, tokens_RC = best_of_rows(logits_RV, num_candidates)
    best_RC = best_RC.float() - log_sum_R1
    forced_R1 = memory.forced_B.unsqueeze(-1).expand(-1, num_beams).reshape(-1, 1)
    is_free_R1 = forced_R1 < 0
    best_RC = torch.where(is_free_R1, best_RC, settings.first_C[: best_RC.shape[1]])
    tokens_RC = torch.where(is_free_R1, tokens_RC, forced_R1)
    return best_of_sentences(memory.hypotheses, best_RC, tokens_RC, num_candidates)


def advance(memory: SearchMemory, candidates: Candidates) -> None:
    """Update the memory with the candidates."""
    settings = memory.settings
    ends_BC = (candidates.tokens_BC.unsqueeze(-1) == settings.ends_E).any(dim=-1)
    ends_BC = ends_BC | (memory.place_1 == settings.last_place_1)
    after = replace(memory.hypotheses)
    continued = after.continued(candidates, memory.place_1, memory.row_place_1)
    parents_BN = after.advance(candidates, continued, ends_BC, memory.place_1, settings)
    # if nothing can continue, all sentences are done
    stops = (ends_BC | memory.is_done_B.unsqueeze(-1)).all()
    after.may_improve_B1 = after.may_improve_B1 & ~stops
    for field in fields(Hypotheses):
        getattr(memory.hypotheses, field.name).copy_(getattr(after, field.name))
    memory.is_done_B.copy_(after.is_done_B1(settings).squeeze(-1))
    memory.last_BN.copy_(after.running_BNL.index_select(2, memory.place_1).squeeze(-1))
    mask_B1NK = memory.mask_B1NK
    mask_B1NK.copy_(mask_B1NK.gather(2, parents_BN[:, None, :, None].expand(-1, -1, -1, mask_B1NK.shape[-1])))


__all__ = ["KERNEL_DEVICES", "advance", "decoding_step", "read_prompts"]
