"""Tokens to rows and back: the plain functions against a loop, the Triton kernels against the plain functions."""

import pytest
import torch
from torch import Tensor

from hf_moe_ted.kernels.permutation import CombineRows, SpreadTokens, rows_of_tokens, sort_slots

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def example(top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Expert ids of 20 tokens with some slots without an expert, and the slots and rows of those with one."""
    ids = torch.randint(0, 5, (20, top_k), device=DEVICE)
    slots, rows, counts = sort_slots(ids, 4)
    return ids, slots[: int(counts.sum())], rows


@pytest.mark.parametrize("top_k", [1, 2])
def test_sort_slots(top_k):
    ids, slots, rows = example(top_k)
    _, _, counts = sort_slots(ids, 4)
    flat = ids.flatten().tolist()
    expected = [slot for expert in range(4) for slot in range(20 * top_k) if flat[slot] == expert]
    assert slots.tolist() == expected
    assert counts.tolist() == [flat.count(expert) for expert in range(4)]
    assert rows.flatten().tolist() == [expected.index(slot) if flat[slot] < 4 else -1 for slot in range(20 * top_k)]


@pytest.mark.parametrize("top_k", [1, 2])
def test_spread_and_combine_and_their_gradients(top_k):
    _, slots, rows = example(top_k)
    tokens = torch.randn(20, 24, device=DEVICE, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(20, top_k, device=DEVICE, dtype=torch.float64, requires_grad=True)
    spread = SpreadTokens.apply(tokens, slots, rows)
    torch.testing.assert_close(spread, tokens[(slots // top_k).long()])
    values = torch.randn(len(slots), 24, device=DEVICE, dtype=torch.float64, requires_grad=True)
    combined = CombineRows.apply(values, weights, slots, rows)
    # the kernel sums in float32, whatever the rows are
    tolerances = {"rtol": 1e-6, "atol": 1e-6} if DEVICE == "cuda" else {}
    torch.testing.assert_close(combined, (rows_of_tokens(values, rows) * weights[..., None]).sum(1), **tolerances)
    if DEVICE == "cpu":
        torch.autograd.gradcheck(lambda x: SpreadTokens.apply(x, slots, rows), (tokens,))
        torch.autograd.gradcheck(lambda x, w: CombineRows.apply(x, w, slots, rows), (values, weights))


@pytest.mark.parametrize("top_k", [1, 2])
def test_triton_kernels_equal_the_plain_functions(top_k):
    pytest.importorskip("triton", reason="needs Triton")
    from hf_moe_ted.kernels import triton_permutation as kernels

    ids, slots, rows = example(top_k)
    tokens, weights = torch.randn(20, 600, device=DEVICE), torch.rand(20, top_k, device=DEVICE)
    values, cotangent = torch.randn(len(slots), 600, device=DEVICE), torch.randn(20, 600, device=DEVICE)
    token_of_row = (slots // top_k).long()
    torch.testing.assert_close(kernels.spread(tokens, slots, top_k), tokens[token_of_row])
    torch.testing.assert_close(kernels.combine(values, rows), rows_of_tokens(values, rows).sum(1))
    weighted = (rows_of_tokens(values, rows) * weights[..., None]).sum(1)
    torch.testing.assert_close(kernels.combine(values, rows, weights), weighted)
    grad_rows, grad_weights = kernels.spread_weighted(cotangent, slots, rows, weights, values)
    torch.testing.assert_close(grad_rows, cotangent[token_of_row] * weights.flatten()[slots.long(), None])
    expected = (rows_of_tokens(values, rows) * cotangent[:, None]).sum(-1)
    torch.testing.assert_close(grad_weights, expected, rtol=1e-5, atol=1e-5)
    all_slots, _, counts = sort_slots(ids, 4)
    unwritten = values.new_full((len(all_slots) - len(slots), 600), float("nan"))
    args = cotangent, all_slots, rows, weights, torch.cat([values, unwritten])
    of_rows, of_weights = kernels.spread_weighted(*args)
    torch.testing.assert_close(of_weights, grad_weights)
    torch.testing.assert_close(of_rows[: int(counts.sum())], grad_rows)
    assert not of_rows[int(counts.sum()) :].any()
    assert kernels.spread(tokens, slots[:0], top_k).shape == (0, 600)
    assert kernels.combine(values, rows[:0]).shape == (0, 600)
