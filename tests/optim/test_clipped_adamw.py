"""ClippedAdamW in Triton's interpreter, or on the GPU, against torch's clipping and its fused AdamW."""

import math

import pytest
import torch
from clipped_adamw_cases import (
    DTYPES,
    InInterpreter,
    assert_close_to_torch,
    train,
)
from torch.optim import AdamW

pytest.importorskip("triton", reason="needs Triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# of the last place: each step may round otherwise, and Triton's interpreter cuts what torch rounds to bfloat16
UNITS = {torch.float32: 8, torch.bfloat16: 8}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "max_norms",
    [[None] * 4, [1.0] * 4, [1e9, 0.3, math.inf, None]],
    ids=["not clipped", "clipped", "in turn"],
)
def test_steps_are_those_of_torch(dtype: torch.dtype, max_norms: list[float | None]) -> None:
    actual, norms = train(InInterpreter, dtype, DEVICE, max_norms)
    expected, expected_norms = train(AdamW, dtype, DEVICE, max_norms)
    assert_close_to_torch(actual, expected, UNITS[dtype])
    torch.testing.assert_close(norms, expected_norms, rtol=1e-6, atol=0)
    assert all(table is not None for table in actual._step_tables.values())
