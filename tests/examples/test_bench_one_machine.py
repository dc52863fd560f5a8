"""The benchmark of experts that are not all on the device runs, on a tiny model."""

import json
import sys
from pathlib import Path

import bench_one_machine
import pytest

SIZES = (
    *("--device", "cpu", "--layers", "2", "--sparse_step", "2", "--d_model", "64", "--ffn_dim", "128"),
    *("--num_experts", "8", "--vocab_size", "120", "--source_length", "9", "--new_tokens", "5", "--rounds", "2"),
    *("--batch_sizes", "1", "3", "--shares", "0.5", "--threads", "1", "--no-isolate"),
)


@pytest.mark.parametrize("bits", [("--bits", "4", "--group_size", "32"), ("--bits", "8")])
def test_rows(
    bits: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", [bench_one_machine.__file__, "--output", str(output), *SIZES, *bits])
    bench_one_machine.main()
    written = json.loads(output.read_text())
    results = {(result["row"], result["batch_size"]): result for result in written["results"]}
    assert [*results] == [(row, size) for row in ("dense", "resident", "memory 0.5") for size in (1, 3)]
    for (row, _), result in results.items():
        assert len(result["seconds"]["1"]) == len(result["seconds"]["5"]) == 2
        assert (result["hit_rate"] is None) == (row != "memory 0.5")
    assert results["memory 0.5", 3]["bytes_copied_per_prefill"] > 0
    assert "MB copied/step" in capsys.readouterr().out
