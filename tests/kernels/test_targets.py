"""The Triton kernels compiled for GPUs that need not be there: each fits into the shared memory of its GPU.

`compile_for_target.py 80 most` compiles more of them. On Hopper they run in the GPU tests.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs Triton")
pytest.importorskip("triton.backends.nvidia", reason="needs Triton's compiler for NVIDIA's GPUs")

SCRIPT = Path(__file__).with_name("compile_for_target.py")
KIB_OF_A_PROGRAM = {80: 163, 89: 99}  # CUDA C++ Programming Guide, compute capabilities


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "cases"), [(80, "few"), (89, "few")])
def test_kernels_fit_into_shared_memory(capability: int, cases: str, tmp_path: Path) -> None:
    kernels = compiled(capability, cases, tmp_path)
    expected = {"grouped_gemm_kernel", "grad_weight_kernel", "_expert_linear_kernel"}
    expected |= {"_quantized_linear_kernel", "_quantized_grouped_kernel"}
    assert expected <= {row["kernel"] for row in kernels}
    assert [row for row in kernels if row["shared"] > KIB_OF_A_PROGRAM[capability] * 1024] == []
    # else each product waits for its operands
    assert [row for row in kernels if "gemm" in row["kernel"] and row["copies"] == 0] == []


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_optimizer_reads_and_writes_16_bytes_at_once(capability: int, tmp_path: Path) -> None:
    """Four tensors in, three out; and the gradients for their norm."""
    kernels = compiled(capability, "optimizer", tmp_path)
    wide = {(row["kernel"], row["dtype"]): row["wide"] for row in kernels}
    for dtype in ("bfloat16", "float32"):
        loads, stores = wide["adamw_kernel", dtype]
        assert loads >= 4 and stores >= 3
        assert wide["squares_kernel", dtype][0] >= 4
    assert ("count_steps_kernel", "float32") in wide


@pytest.mark.slow
def test_no_product_of_quantized_weights_runs_on_into_the_next_step(tmp_path: Path) -> None:
    """It would read its weights from registers that hold those of the next step by then."""
    kernels = [row for row in compiled(90, "quantized", tmp_path) if row["kernel"] == "_quantized_grouped_kernel"]
    assert len(kernels) == 6
    assert {row["running"] for row in kernels} == {0}


def compiled(capability: int, cases: str, cache: Path) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(capability), cases],
        env=environment | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]
