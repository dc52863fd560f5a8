"""`hf-moe-ted plan`: its table, its JSON, and its errors."""

import json
from pathlib import Path

import pytest
from cli_runs import message_of, run_here

from hf_moe_ted.testing import tiny_config

OPTIONS = ("--gpus", 4, "--gpu", "h100-80gb", "--batch-tokens", 256, "--sequence", 16, "--tokens", "1.5M")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_config().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["", "config.json"])
def test_table(folder: Path, name: str) -> None:
    lines = run_here("plan", folder / name, *map(str, OPTIONS), "--layouts", "3").splitlines()
    assert lines[0].startswith("101,152 parameters on 4 x h100-80gb")
    assert lines[1].startswith("TedPlugin(")
    assert lines[2].split()[:6] == ["tp", "ep", "etp", "dp", "replicas", "ZeRO"]
    assert len(lines) == 7 and "cannot be" in lines[-1]


def test_json(folder: Path) -> None:
    content = json.loads(run_here("plan", folder, *map(str, OPTIONS), "--layouts", "2", "--json"))
    assert (content["num_gpus"], content["total_tokens"], len(content["layouts"])) == (4, 1_500_000, 2)
    best = content["layouts"][0]
    assert best["plugin"].startswith("TedPlugin(") and best["peak_bytes"] > 0 and best["step"]["matmul"] > 0
    assert all(layout["reason"] for layout in content["impossible"])


def test_errors(folder: Path) -> None:
    assert "--tokens ('many') must be a number" in message_of("plan", folder, *map(str, OPTIONS[:-1]), "many")
    assert "total_tokens (0)" in message_of("plan", folder, *map(str, OPTIONS[:-1]), "0")
    assert "gpu ('tpu') must be one of" in message_of("plan", folder, "--gpus", "4", "--gpu", "tpu")
    assert "does not exist" in message_of("plan", folder / "nowhere", *map(str, OPTIONS))
