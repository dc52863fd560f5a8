"""Launches of `bench_ted.py`: cases in processes of their own, whose failures and hangs cost no other case."""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from machines import Machines
from ted_suites import Case

SCRIPT = Path(__file__).with_name("bench_ted.py")
START_S = 60.0  # that the first case of a launch may take longer: imports, communicators, kernels
POLL_S = 0.5


@dataclass(frozen=True)
class Limits:
    """
    Attributes:
        launch_s: of the cases on the same number of GPUs, however often they are started anew.
        case_s: of a case; the first of a launch may take `START_S` longer.
        num_steps: that are timed.
        energy_s: of `run_case`. The counter goes on ten times a second.
    """

    launch_s: float = 600.0
    case_s: float = 300.0
    num_steps: int = 10
    energy_s: float = 2.0


def launch(cases: list[Case], lines: Path, limits: Limits, machines: Machines) -> None:
    """Run cases on the same number of GPUs in one torchrun, and those after one that fails in the next."""
    deadline = time.monotonic() + limits.launch_s
    while cases:
        error = torchrun(cases, lines, deadline, limits, machines)
        done = {(result["name"], result["num_gpus"]) for result in results_in(lines)}
        cases = [case for case in cases if (case.name, case.num_gpus) not in done]
        if error is None:
            return
        failed = cases[:1] if time.monotonic() < deadline else cases
        with open(lines, "a", encoding="utf-8") as output:
            for case in failed:
                print(f"{case.name}: {error}", flush=True)
                output.write(json.dumps({"name": case.name, **asdict(case), "error": error}) + "\n")
        cases = cases[len(failed) :]


def torchrun(cases: list[Case], lines: Path, deadline: float, limits: Limits, machines: Machines) -> str | None:
    """Run cases in processes of their own until one fails; what failed, or `None`."""
    with tempfile.TemporaryDirectory() as folder:
        job, error = Path(folder, "job.json"), Path(folder, "error")
        fields: dict[str, Any] = {"cases": [asdict(case) for case in cases], "output": str(lines), "error": str(error)}
        fields |= {"num_steps": limits.num_steps, "energy_s": limits.energy_s}
        fields["emulated_nodes"] = machines.number if machines.is_emulated else 1
        job.write_text(json.dumps(fields))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={cases[0].num_gpus}", str(SCRIPT), "--worker", str(job)]
        process = subprocess.Popen(command)
        exit_code = wait_for(process, lines, deadline, limits.case_s)
        if exit_code == 0:
            return None
        if exit_code is None:
            return "time limit"
        return error.read_text() if error.exists() else f"exit code {exit_code}"


def wait_for(process: subprocess.Popen[bytes], lines: Path, deadline: float, case_s: float) -> int | None:
    """Print results as they come; the exit code, or `None` if the deadline or the limit of a case has ended it."""
    num_done, case_deadline = len(results_in(lines)), time.monotonic() + START_S + case_s
    while time.monotonic() < min(deadline, case_deadline):
        try:
            exit_code = process.wait(POLL_S)
        except subprocess.TimeoutExpired:
            exit_code = None
        for result in results_in(lines)[num_done:]:
            print(f"{result['name']}: {result['step_ms']:.1f} ms, {result['peak_gib']:.1f} GiB", flush=True)
            num_done, case_deadline = num_done + 1, time.monotonic() + case_s
        if exit_code is not None:
            return exit_code
    process.terminate()  # and not kill, which would leave the workers on the GPUs
    process.wait()
    return None


def results_in(lines: Path) -> list[dict[str, Any]]:
    """Of lines that are whole: a process may be writing the last one."""
    whole = lines.read_text().rpartition("\n")[0] if lines.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


__all__ = ["Limits", "launch", "results_in"]
