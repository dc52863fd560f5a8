"""Noise of denoising on batches of token ids, on their device: what `DenoisingNoise` does to words of a text.

Shape letters: B rows, L positions, K positions before the first, where a span may begin, E = K + L.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenNoise:
    """Spans of tokens become one mask token each (text infilling of BART, https://huggingface.co/papers/1910.13461).

    Spans begin at random, everywhere with the same probability, so that each token is masked with that of `mask_ratio`;
    where they overlap or touch they are one. Words may be cut, as they are not known.

    Args:
        mask_ratio: mean share of the tokens that are masked, from 0 to below 1.
        poisson_lambda: of the length of a span in tokens, which is at least 1.
        mask_id: the mask token.

    Raises:
        ValueError: a number out of its range.
    """

    mask_ratio: float
    poisson_lambda: float
    mask_id: int

    def __post_init__(self) -> None:
        if not 0 <= self.mask_ratio < 1 or not 0 < self.poisson_lambda < math.inf:
            raise ValueError(
                f"mask_ratio ({self.mask_ratio}) must be from 0 to below 1, poisson_lambda ({self.poisson_lambda}) "
                "positive"
            )

    def __call__(self, ids_BL: Tensor, length_B1: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The texts with noise.

        Args:
            ids_BL: int[B, L], texts without tags, and anything behind them.
            length_B1: int[B, 1], tokens of each.
            generator: on their device.

        Returns:
            int[B, L] with 0 behind the texts, and int[B, 1], how long they are now: never longer.
        """
        num_rows, num_places = ids_BL.shape
        place_L = torch.arange(num_places, device=ids_BL.device)
        is_text_BL = place_L < length_B1
        is_masked_BL = self._masked((num_rows, num_places), generator)
        is_behind_masked_BL = torch.nn.functional.pad(is_masked_BL[:, :-1], (1, 0))
        is_span_BL = is_masked_BL & ~is_behind_masked_BL  # its first token
        is_kept_BL = is_text_BL & (is_span_BL | ~is_masked_BL)
        ids_BL = torch.where(is_span_BL, self.mask_id, ids_BL)
        target_BL = torch.where(is_kept_BL, is_kept_BL.cumsum(dim=1) - 1, num_places)  # the others behind the end
        noised = ids_BL.new_zeros(num_rows, num_places + 1).scatter_(1, target_BL, ids_BL)
        return noised[:, :num_places], is_kept_BL.sum(dim=1, keepdim=True).to(length_B1.dtype)

    def _masked(self, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
        """bool[B, L], independent of the texts."""
        num_rows, num_places = shape
        device = generator.device
        reach = longest_span(self.poisson_lambda)
        extended = (num_rows, reach + num_places)
        start = start_probability(self.mask_ratio, self.poisson_lambda)
        starts_BE = torch.rand(extended, generator=generator, device=device) < start
        rates = torch.full(extended, self.poisson_lambda, device=device)
        lengths_BE = torch.poisson(rates, generator=generator).clamp(min=1)
        place_E = torch.arange(extended[1], device=device)
        ends_BE = torch.where(starts_BE, place_E + lengths_BE, 0.0).cummax(dim=1).values
        return (place_E < ends_BE)[:, reach:]


def longest_span(poisson_lambda: float) -> int:
    """Tokens that a span has at most, but for one of some hundred million."""
    return math.ceil(poisson_lambda + 6 * math.sqrt(poisson_lambda) + 6)


@cache
def start_probability(mask_ratio: float, poisson_lambda: float) -> float:
    """Of a span at each position, so that a token is within none with `1 - mask_ratio`.

    That is the product, over the tokens k before it and itself, of `1 - start * P(length > k)`.
    """
    is_as_long = [1.0]  # as a span has at least one token
    at_most = term = math.exp(-poisson_lambda)
    for k in range(1, longest_span(poisson_lambda) + 1):
        term *= poisson_lambda / k
        at_most += term
        is_as_long.append(max(0.0, 1.0 - at_most))
    low, high = 0.0, 1.0
    for _ in range(60):
        start = (low + high) / 2
        is_too_often = math.prod(1 - start * share for share in is_as_long) < 1 - mask_ratio
        low, high = (low, start) if is_too_often else (start, high)
    return low
