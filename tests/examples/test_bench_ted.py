"""The benchmark of layouts: its machines, emulated or of a launcher, and the cases across them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import bench_ted
import machines
import pytest
import ted_launches
import torch
from machines import Machines, emulate, machines_of
from ted_suites import PADDED, Case, across_cases, memory_cases, node_cases

from hf_moe_ted.distributed.layout import Layout, sizes_of_axes
from hf_moe_ted.testing import run_distributed_test


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a launcher's; what a test sets goes away."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NCCL_HOSTID", *machines._SOCKETS):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def set_launcher(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int, per_node: int) -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": per_node}.items():
        monkeypatch.setenv(name, str(value))


def test_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machines_of(None) == machines_of(1) == Machines()
    assert machines_of(2) == Machines(2, is_emulated=True)
    assert "emulated on one host" in str(machines_of(2)) and "emulated" not in str(machines_of(1))
    set_launcher(monkeypatch, 3, 16, 4)
    assert machines_of(None) == machines_of(4) == Machines(4, world_size=16)
    assert str(machines_of(4)) == "4 machines of the launcher"
    with pytest.raises(ValueError, match=r"--nodes \(2\) must be the 4 of the launcher: leave it out"):
        machines_of(2)
    with pytest.raises(ValueError, match=r"--nodes \(0\) must be at least 1"):
        machines_of(0)


@pytest.mark.parametrize(("rank", "node"), [(0, "node0"), (1, "node0"), (2, "node1"), (3, "node1")])
def test_a_worker_is_on_an_emulated_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rank: int, node: str
) -> None:
    set_launcher(monkeypatch, rank, 4, 4)
    monkeypatch.setenv("NCCL_NSOCKS_PERTHREAD", "2")
    job = tmp_path / "job.json"
    job.write_text(
        json.dumps({"cases": [], "output": "", "error": "", "num_steps": 1, "energy_s": 0, "emulated_nodes": 2})
    )
    bench_ted.worker(job)
    assert os.environ["NCCL_HOSTID"] == node
    assert os.environ["NCCL_SOCKET_IFNAME"] == "lo"
    assert os.environ["NCCL_NSOCKS_PERTHREAD"] == "2"


def test_ranks_fill_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    set_launcher(monkeypatch, 0, 4, 4)
    with pytest.raises(ValueError, match=r"4 GPUs cannot be divided between --nodes \(3\)"):
        emulate(3)
    assert "NCCL_HOSTID" not in os.environ


@pytest.mark.parametrize(("num_gpus", "num_nodes"), [(4, 2), (8, 2), (16, 2), (16, 4), (4, 1), (2, 2)])
def test_cases_across_machines(num_gpus: int, num_nodes: int) -> None:
    cases = node_cases(num_gpus, num_nodes)
    assert len({case.name for case in cases}) == len(cases)
    inside = num_gpus // num_nodes if num_nodes > 1 else 2
    ways = {
        (case.layout["duplicate_token_dropping"], case.checkpointing)
        for case in cases
        if case.layout.get("tensor_parallel_size") == inside and "duplicate_token_dropping" in case.layout
    }
    assert ways == {(drops, kept) for drops in (False, True) for kept in ("full", "communication-aware")}
    layouts = [case.layout for case in cases]
    assert {"tensor_parallel_size": num_gpus} in layouts and {"expert_parallel_size": num_gpus} | PADDED in layouts
    assert any(case.system == "deepspeed" and case.layout == {"tp": inside, "ep": num_gpus // inside} for case in cases)
    replicas = {case.layout.get("zero_stage") for case in cases if "dp_replicate_size" in case.layout}
    assert replicas == ({1, 3} if inside > 1 and num_nodes > 1 else set())
    for case in cases:
        if case.system == "ours":
            check_layout(case)


def check_layout(case: Case) -> None:
    layout = dict(case.layout)
    sizes = [layout.pop(f"{axis}_parallel_size", 1) for axis in ("tensor", "expert")]
    tp, ep, etp, dp = sizes_of_axes(case.num_gpus, *sizes, None, None)
    assert not case.num_experts % ep
    Layout(tp, dp, ep, etp, **layout)


@pytest.mark.parametrize("has_graphs", [False, True])
def test_cases_of_two_gpus(monkeypatch: pytest.MonkeyPatch, has_graphs: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_graphs)
    across, memory = across_cases(["0.6Bx16", "1.3Bx8"]), memory_cases()
    assert all(len({case.name for case in cases}) == len(cases) for cases in (across, memory))
    for case in across + memory:
        assert case.num_gpus == 2
        check_layout(case)
        reads_sizes = case.layout.get("expert_parallel_size", 1) > 1 and not (
            case.load_bound or case.layout.get("pad_expert_input_to_capacity")
        )
        assert not (case.graph and reads_sizes)
    assert any(case.graph for case in across) == has_graphs


def test_shapes() -> None:
    cases = node_cases(4, 2, ["1.3Bx8", "6.7Bx8"])
    assert {(case.base, case.num_experts) for case in cases} == {("1.3B", 8), ("6.7B", 8)}
    assert len(cases) == 2 * len(node_cases(4, 2))
    for wrong in ("1.3B", "2Bx8", "1.3Bxx"):
        with pytest.raises(ValueError, match=f"--shapes {wrong} must be one of 0.6B, "):
            node_cases(4, 2, [wrong])


def run_in_launcher(output: str) -> None:
    sys.argv = [bench_ted.__file__, "--suite", "across", "--shapes", "tinyx4", "--steps", "1"]
    sys.argv += ["--only", "pad_expert_input", "accumulation", "--output", output]
    bench_ted.main()


def test_in_a_launcher(tmp_path: Path) -> None:
    """Two processes that are there already run cases for two."""
    output = tmp_path / "ted.json"
    run_distributed_test(run_in_launcher, 2, str(output))
    record: dict[str, Any] = json.loads(output.read_text())
    assert record["machines"] == {"number": 1, "is_emulated": False, "world_size": 2}
    padded, again, once = record["results"]
    for result, accumulation in ((padded, 1), (again, 4), (once, 4)):
        assert result["num_gpus"] == 2 and result["system"] == "ours" and result["loss"] > 0
        assert result["tokens_per_s"] == pytest.approx(2 * 2 * 16 * 2 * accumulation / result["step_ms"] * 1e3)
    row_mb = 2 * 64 * 2 / 1e6  # of bfloat16, to both ranks; 32 tokens to 4 experts
    sizes_mb = 8 * (4 + 2) / 1e6
    # one sparse layer on each side; in forward and backward there and back
    assert padded["collective_mb"]["all_to_all"] == pytest.approx(2 * (4 * 4 * 10 * row_mb / 2 + sizes_mb))
    assert once["collective_mb"]["all_to_all"] == pytest.approx(4 * 2 * (4 * 18 * row_mb + sizes_mb))
    assert once["load"] == pytest.approx(16 / 18) and once["loss"] == pytest.approx(again["loss"], rel=1e-2)
    gathered, gathered_again = (result["collective_mb"]["all_gather"] for result in (once, again))
    assert gathered_again == pytest.approx(4 * gathered)
    assert once["collective_mb"]["reduce_scatter"] == again["collective_mb"]["reduce_scatter"]


@pytest.mark.parametrize(("names", "exit_code"), [(["first", "second"], 0), (["first"], None)])
def test_a_case_that_takes_too_long(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str], names: list, exit_code: Any
) -> None:
    """Results are printed as they come; a process without one for too long is ended."""
    monkeypatch.setattr(ted_launches, "START_S", 60.0)
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"name": "before"}\n')
    write = [f'file.write(json.dumps({{"name": "{name}", "step_ms": 1.0, "peak_gib": 2.0}}) + "\\n")' for name in names]
    code = f"import json, time\nwith open({str(lines)!r}, 'a') as file:\n    " + "\n    ".join(write)
    code += "\n" if exit_code == 0 else "\ntime.sleep(600)\n"
    process = subprocess.Popen([sys.executable, "-c", code])
    assert ted_launches.wait_for(process, lines, time.monotonic() + 300, case_s=2.0) == exit_code
    assert process.poll() is not None
    printed = capfd.readouterr().out.splitlines()
    assert printed == [f"{name}: 1.0 ms, 2.0 GiB" for name in names]
    late = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    assert ted_launches.wait_for(late, lines, time.monotonic() + 1, case_s=100.0) is None
    assert late.poll() is not None


def test_what_cannot_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def main(*arguments: str) -> None:
        command = [bench_ted.__file__, "--output", str(tmp_path / "out.json"), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        bench_ted.main()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=r"--nodes \(2\) needs GPUs"):
        main("--nodes", "2")
    with pytest.raises(ValueError, match="--suite nodes needs GPUs"):
        main("--suite", "nodes")
    with pytest.raises(ValueError, match="has no such case"):
        main("--suite", "tiny", "--systems", "megatron")
    set_launcher(monkeypatch, 0, 4, 2)
    with pytest.raises(ValueError, match="one launch runs either one case of DeepSpeed or cases without it"):
        main("--suite", "nodes")
