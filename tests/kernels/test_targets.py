"""The Triton kernels compiled for GPUs that need not be there: each fits into the shared memory of its GPU.

`compile_for_target.py 80 most` compiles more of them. On Hopper they run in the GPU tests.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton")
pytest.importorskip("triton.backends.nvidia", reason="needs Triton's compiler for NVIDIA's GPUs")

SCRIPT = Path(__file__).with_name("compile_for_target.py")
KIB_OF_A_PROGRAM = {80: 163, 89: 99}  # CUDA C++ Programming Guide, compute capabilities


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "cases"), [(80, "few"), (89, "few")])
def test_kernels_fit_into_shared_memory(capability: int, cases: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(capability), cases],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    expected = {"grouped_gemm_kernel", "grad_weight_kernel", "_expert_linear_kernel"}
    expected |= {"_quantized_linear_kernel", "_quantized_grouped_kernel"}
    assert expected <= {row["kernel"] for row in kernels}
    assert [row for row in kernels if row["shared"] > KIB_OF_A_PROGRAM[capability] * 1024] == []
    # else each product waits for its operands
    assert [row for row in kernels if "gemm" in row["kernel"] and row["copies"] == 0] == []
