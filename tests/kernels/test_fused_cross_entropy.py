"""The cross-entropy kernels against PyTorch's in float64, on the GPU or in Triton's interpreter."""

import math

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from hf_moe_ted.kernels.fused_cross_entropy import cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("vocab_size", [7, 4096, 9001])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_plain_function(vocab_size, label_smoothing, dtype):
    logits = (torch.randn(5, vocab_size, device=DEVICE) * 4).to(dtype).requires_grad_()
    labels = torch.randint(vocab_size, (5,), device=DEVICE)
    labels[2] = -100
    cotangent = torch.randn(5, device=DEVICE)
    losses, _ = cross_entropy(logits, labels, label_smoothing)
    (gradient,) = torch.autograd.grad(losses, logits, cotangent)

    plain = logits.detach().double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(plain, labels, reduction="none", label_smoothing=label_smoothing)
    (expected_gradient,) = torch.autograd.grad(expected, plain, cotangent.double())
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    # One unit in the last place of what is stored, as Triton's interpreter truncates. With many words a gradient is as
    # small as one word's share of the smoothing.
    rtol = 1e-5 if dtype == torch.float32 else 2.0**-7
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=rtol, atol=1e-5 / vocab_size)


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]], device=DEVICE)
    losses, _ = cross_entropy(logits, torch.tensor([0, 1], device=DEVICE), 0.0)
    torch.testing.assert_close(losses, torch.tensor([0.0, math.log(3)], device=DEVICE), rtol=0.0, atol=1e-3)


def test_no_positions():
    losses, _ = cross_entropy(torch.zeros(0, 9, device=DEVICE), torch.zeros(0, device=DEVICE).long(), 0.0)
    assert losses.shape == (0,)


def test_operator_is_what_torch_compile_needs():
    logits = torch.randn(3, 11, device=DEVICE, requires_grad=True)
    labels = torch.tensor([1, -100, 10], device=DEVICE)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(cross_entropy, (logits, labels, 0.1), test_utils=checks)
