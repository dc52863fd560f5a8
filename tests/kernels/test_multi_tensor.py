"""Many tensors in one launch: how they are cut, and the sum of their squares. Steps are in tests/optim."""

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from hf_moe_ted.kernels.multi_tensor import Part, addresses_of, cut_into_chunks, on_device, sum_of_squares

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_chunks_of_a_dtype_are_in_a_row():
    tensors = [
        torch.zeros(9), torch.zeros(4, dtype=torch.bfloat16), torch.zeros(0), torch.zeros(2, 4),
        torch.zeros(5, dtype=torch.bfloat16),
    ]  # fmt: skip
    chunks = cut_into_chunks(tensors, 4)
    assert chunks.parts == (Part(torch.float32, 0, 5), Part(torch.bfloat16, 5, 3))
    assert chunks.tensors.tolist() == [0, 0, 0, 3, 3, 1, 4, 4]
    assert chunks.places.tolist() == [0, 1, 2, 0, 1, 0, 0, 1]
    assert chunks.numels.tolist() == [9, 4, 0, 8, 5]


def test_sum_of_squares_with_weights():
    """Whole chunks and rests, aligned or not, of both dtypes."""
    memory = torch.randn(3, 1000, device=DEVICE)
    tensors = [memory[0], memory[1].bfloat16(), memory[2, 3:], torch.zeros(0, device=DEVICE), memory[0, :256]]
    weights = [1.0, 0.5, 0.25, 2.0, 3.0]
    chunks = cut_into_chunks(tensors, 256)
    found = sum_of_squares(addresses_of([tensors], DEVICE), on_device(weights, torch.float32, DEVICE), chunks)
    expected = sum(w * t.double().square().sum() for w, t in zip(weights, tensors, strict=True))
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


def test_sum_of_squares_misses_nothing_and_reads_nothing_else():
    memory = torch.full((1030,), torch.nan, device=DEVICE)
    tensor = memory[3:1027]
    for index in (0, 255, 256, 1023):
        tensor.zero_()[index] = 2.0
        chunks = cut_into_chunks([tensor[:1024]], 256)
        assert sum_of_squares(addresses_of([[tensor]], DEVICE), torch.ones(1, device=DEVICE), chunks) == 4.0
