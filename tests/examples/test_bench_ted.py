"""The benchmark of layouts: its machines, emulated or of a launcher, and the cases across them."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import bench_ted
import machines
import pytest
import torch
from machines import Machines, emulate, machines_of
from ted_suites import PADDED, node_cases

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
    job.write_text(json.dumps({"cases": [], "output": "", "error": "", "emulated_nodes": 2}))
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
            layout = dict(case.layout)
            sizes = [layout.pop(f"{axis}_parallel_size", 1) for axis in ("tensor", "expert")]
            tp, ep, etp, dp = sizes_of_axes(num_gpus, *sizes, None, None)
            assert not 16 % ep
            Layout(tp, dp, ep, etp, **layout)


def test_shapes() -> None:
    cases = node_cases(4, 2, ["1.3Bx8", "6.7Bx8"])
    assert {(case.base, case.num_experts) for case in cases} == {("1.3B", 8), ("6.7B", 8)}
    assert len(cases) == 2 * len(node_cases(4, 2))
    for wrong in ("1.3B", "2Bx8", "1.3Bxx"):
        with pytest.raises(ValueError, match=f"--shapes {wrong} must be one of 0.6B, "):
            node_cases(4, 2, [wrong])


def run_in_launcher(output: str) -> None:
    only = ["--suite", "tiny", "--systems", "ours", "--only", "pad_expert_input", "--output", output]
    sys.argv = [bench_ted.__file__, *only]
    bench_ted.main()


def test_in_a_launcher(tmp_path: Path) -> None:
    """Two processes that are there already run the case for two."""
    output = tmp_path / "ted.json"
    run_distributed_test(run_in_launcher, 2, str(output))
    record: dict[str, Any] = json.loads(output.read_text())
    assert record["machines"] == {"number": 1, "is_emulated": False, "world_size": 2}
    result = record["results"][0]
    assert result["num_gpus"] == 2 and result["system"] == "ours" and result["loss"] > 0
    assert result["tokens_per_s"] == pytest.approx(2 * 2 * 16 * 2 / result["step_ms"] * 1e3)
    assert result["graph"] or result["collective_mb"]["all_to_all"] > 0


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
