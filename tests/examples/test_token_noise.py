"""Noise on token ids: spans become one mask, as many as asked for, and nothing else changes."""

import itertools

import pytest
import torch
from token_noise import TokenNoise

MASK = 999


def noised(noise: TokenNoise, lengths: list[int], width: int, seed: int = 0) -> list[list[int]]:
    """Texts 1, 2, 3, ... of these lengths with noise; behind them stands 7, which is no part of them."""
    length_B1 = torch.tensor(lengths, dtype=torch.int32)[:, None]
    ids_L = torch.arange(1, width + 1, dtype=torch.int32)
    ids_BL = torch.where(torch.arange(width) < length_B1, ids_L, 7)
    out_BL, out_B1 = noise(ids_BL, length_B1, torch.Generator().manual_seed(seed))
    assert out_BL.shape == ids_BL.shape and out_BL.dtype == torch.int32 and bool((out_B1 <= length_B1).all())
    assert not out_BL.masked_fill(torch.arange(width) < out_B1, 0).any()
    return [row[:length].tolist() for row, length in zip(out_BL, out_B1.flatten().tolist(), strict=True)]


def test_spans_become_one_mask_each() -> None:
    lengths = [20] * 200 + [1, 0]
    for row, length in zip(noised(TokenNoise(0.35, 3.0, MASK), lengths, 20), lengths, strict=True):
        kept = [token for token in row if token != MASK]
        assert kept == sorted({*kept} & {*range(1, length + 1)})  # each once, in its order, nothing of what is behind
        assert (MASK, MASK) not in itertools.pairwise(row)
        gaps = sum(after - before > 1 for before, after in itertools.pairwise([0, *kept, length + 1]))
        assert row.count(MASK) == gaps


@pytest.mark.parametrize("ratio", [0.15, 0.35, 0.6])
@pytest.mark.parametrize("mean", [1.0, 5.0])
def test_as_many_tokens_are_masked_as_asked_for(ratio: float, mean: float) -> None:
    rows = noised(TokenNoise(ratio, mean, MASK), [40] * 4000, 40)
    kept = torch.zeros(41)
    for row in rows:
        kept[[token for token in row if token != MASK]] += 1
    shares = 1 - kept[1:] / len(rows)
    # of 4,000 rows, a place has a standard deviation of up to 0.008, and the mean of 40 places one of a third of it
    assert shares.mean().item() == pytest.approx(ratio, abs=0.012)
    assert (shares - ratio).abs().max() < 0.035  # the same at all places


def test_equal_seeds_make_equal_noise() -> None:
    noise = TokenNoise(0.35, 3.0, MASK)
    assert noised(noise, [15] * 9, 16, seed=5) == noised(noise, [15] * 9, 16, seed=5)
    assert noised(noise, [15] * 9, 16, seed=5) != noised(noise, [15] * 9, 16, seed=6)
    assert noised(TokenNoise(0.0, 3.0, MASK), [3], 5) == [[1, 2, 3]]


@pytest.mark.parametrize("numbers", [(1.0, 3.0), (-0.1, 3.0), (0.3, 0.0), (0.3, float("inf"))])
def test_numbers_out_of_their_range(numbers: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="must be from 0 to below 1, poisson_lambda"):
        TokenNoise(*numbers, MASK)
