"""The part of a beam-search step after the logits, in three launches (Triton).

Shape letters as in triton_beams.py.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from . import triton_beams
from .device_guard import on_device_of_first

MAX_CANDIDATES = 32
MAX_ENDS = 4
_WORDS = 128  # of a block
_BLOCKS = 16  # of a program


def can_take(num_words: int, num_candidates: int, num_ends: int) -> bool:
    """Whether the kernels have room for a search."""
    is_small = num_candidates <= MAX_CANDIDATES and num_ends <= MAX_ENDS
    return is_small and num_candidates <= triton.cdiv(num_words, _WORDS)


@on_device_of_first
def best_words(
    logits: Tensor, num_candidates: int, ends: Tensor, forbids_ends: Tensor, forced: Tensor, has_nan: Tensor
) -> tuple[Tensor, Tensor]:
    """The best words of each row.

    Args:
        logits: float[R, V], contiguous.
        ends: int64[E], words that end a translation, or -1.
        forbids_ends: bool[1], whether these are left out; the probabilities of other words do not change.
        forced: int64[B], the only word of the rows of a sentence, with a log-probability of 0; -1 for none.
        has_nan: bool[1], set if a logit is NaN.

    Returns:
        Log-probabilities float32[R, C] and words int64[R, C], the best first.
    """
    num_rows, num_words = logits.shape
    num_blocks = triton.cdiv(num_words, _WORDS)
    maxima, allowed, sums = torch.empty(3, num_rows, num_blocks, dtype=torch.float32, device=logits.device)
    best = torch.empty(num_rows, num_candidates, dtype=torch.float32, device=logits.device)
    words = torch.empty(num_rows, num_candidates, dtype=torch.int64, device=logits.device)
    forbids = forbids_ends.view(torch.int8)
    triton_beams.block_maxima_kernel[(triton.cdiv(num_blocks, _BLOCKS), num_rows)](
        logits, ends, forbids, maxima, allowed, sums, num_words, num_blocks,
        E=len(ends), WORDS=_WORDS, BLOCKS=_BLOCKS, num_warps=4,
    )  # fmt: skip
    triton_beams.best_words_kernel[(num_rows,)](
        logits, ends, forbids, forced, maxima, allowed, sums, best, words, has_nan.view(torch.int8),
        num_words, num_blocks,
        N=num_rows // len(forced), C=num_candidates, E=len(ends), WORDS=_WORDS,
        BLOCK_C=triton.next_power_of_2(num_candidates), BLOCK_B=triton.next_power_of_2(num_blocks), num_warps=4,
    )  # fmt: skip
    return best, words


@on_device_of_first
def advance_beams(best: Tensor, words: Tensor, memory: Any) -> None:
    """Update beams with the best words of all rows, in place, like `Hypotheses.advance` of models/beam_hypotheses.py.

    Args:
        best, words: what `best_words` returned.
        memory: `SearchMemory` of models/search_memory.py, or a view of its first sentences. Its mask has the keys to
            which beams attend, with the key that each writes next.
    """
    settings, hypotheses, mask = memory.settings, memory.hypotheses, memory.mask_B1NK
    num_sentences, num_beams = hypotheses.running_scores_BN.shape
    num_candidates = best.shape[1]
    triton_beams.advance_kernel[(num_sentences,)](
        best, words, settings.ends_E, settings.divisors_L, settings.possible_divisors_L,
        settings.stops_when_full_1.view(torch.int8), settings.last_place_1,
        memory.place_1, memory.row_place_1, memory.goes_on_L,
        hypotheses.sentences_B,
        hypotheses.running_BNL, hypotheses.running_rows_BNL, hypotheses.running_scores_BN,
        hypotheses.ended_BNL, hypotheses.ended_rows_BNL, hypotheses.ended_scores_BN,
        hypotheses.has_ended_BN.view(torch.int8), hypotheses.may_improve_B1.view(torch.int8),
        memory.is_done_B.view(torch.int8), memory.last_BN, mask, hypotheses.running_BNL.stride(1), mask.stride(2),
        N=num_beams, C=num_candidates, E=len(settings.ends_E), BLOCK_N=triton.next_power_of_2(num_beams),
        BLOCK_F=triton.next_power_of_2(num_beams * num_candidates),
        BLOCK_P=triton.next_power_of_2(num_beams + num_candidates), COLUMNS=128, num_warps=1,
    )  # fmt: skip


__all__ = ["MAX_CANDIDATES", "MAX_ENDS", "advance_beams", "best_words", "can_take"]
