"""Attention of beams to keys that they share, against that of PyTorch."""

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="needs Triton")

import triton

from hf_moe_ted.kernels.beam_attention import beam_attention, can_attend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not triton.knobs.runtime.interpret, reason="needs a GPU or Triton's interpreter"
)
# the interpreter has no products of bfloat16
DTYPES = [torch.float32, torch.bfloat16 if DEVICE == "cuda" else torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def projected(num_sentences: int, num_beams: int, dtype: torch.dtype) -> Tensor:
    """[B, H, N, D] as projections give it."""
    return torch.randn(num_sentences, num_beams, 2, 16, device=DEVICE).to(dtype).transpose(1, 2)


def memory_of(num_sentences: int, num_keys: int, dtype: torch.dtype) -> Tensor:
    """The first sentences, of more."""
    return torch.randn(num_sentences + 1, 2, num_keys + 16, 16, device=DEVICE).to(dtype)[:num_sentences]


def mask_of(num_sentences: int, num_beams: int, num_keys: int, dtype: torch.dtype) -> Tensor:
    """Half of the keys, the first one among them, with rows that are longer than they look."""
    attends = torch.rand(num_sentences, 1, num_beams, num_keys + 32, device=DEVICE) < 0.5
    attends[..., 0] = True
    least = torch.finfo(dtype).min
    return torch.zeros(attends.shape, dtype=dtype, device=DEVICE).masked_fill(~attends, least)[..., :num_keys]


@pytest.mark.usefixtures("poisoned_buffers")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_beams", "num_keys"), [(1, 16), (4, 160), (5, 48)])
def test_keys_that_are_there(num_beams: int, num_keys: int, dtype: torch.dtype) -> None:
    query = projected(3, num_beams, dtype)
    keys, values = (memory_of(3, num_keys, dtype)[:, :, :num_keys] for _ in range(2))
    mask = mask_of(3, num_beams, num_keys, dtype)
    output = beam_attention(query, keys, values, mask, 0.3)
    tensors = (x.float() for x in (query, keys, values))
    expected = nn.functional.scaled_dot_product_attention(*tensors, attn_mask=mask.float(), scale=0.3).transpose(1, 2)
    torch.testing.assert_close(output.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.usefixtures("poisoned_buffers")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_beams", "step"), [(1, 0), (4, 0), (4, 33), (5, 7)])
def test_keys_are_written_first(num_beams: int, step: int, dtype: torch.dtype) -> None:
    num_keys = 64 * num_beams
    query, new_keys, new_values = (projected(2, num_beams, dtype) for _ in range(3))
    keys, values = (memory_of(2, num_keys, dtype) for _ in range(2))
    before = keys.clone(), values.clone()
    keys[:, :, step * num_beams :] = values[:, :, step * num_beams :] = torch.nan  # nobody reads them
    places = torch.arange(step * num_beams, (step + 1) * num_beams, device=DEVICE)
    mask = mask_of(2, num_beams, num_keys, dtype)
    mask[..., (step + 1) * num_beams :] = torch.finfo(dtype).min
    mask[..., places] = torch.where(torch.eye(num_beams, device=DEVICE) > 0, 0.0, torch.finfo(dtype).min).to(dtype)
    output = beam_attention(query, keys, values, mask, 0.25, new_keys, new_values, places)
    for of_memory, old, new in ((keys, before[0], new_keys), (values, before[1], new_values)):
        old[:, :, places] = new
        assert torch.equal(of_memory[:, :, : (step + 1) * num_beams], old[:, :, : (step + 1) * num_beams])
    used = [x[:, :, :num_keys].float() for x in before]
    expected = nn.functional.scaled_dot_product_attention(query.float(), *used, attn_mask=mask.float(), scale=0.25)
    expected = expected.transpose(1, 2)
    torch.testing.assert_close(output.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_room() -> None:
    assert can_attend(4, 64, torch.bfloat16)
    assert not can_attend(17, 64, torch.bfloat16)
    assert not can_attend(4, 8, torch.bfloat16)
    assert not can_attend(4, 64, torch.float64)
