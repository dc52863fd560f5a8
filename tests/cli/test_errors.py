"""How a command that fails ends."""

import contextlib
import io
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runs import COMMAND, initialized
from safetensors.torch import load_file, save_file

from hf_moe_ted.cli import run as cli_run
from hf_moe_ted.testing import run_distributed_test


def test_full_disk_behind_the_output() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([COMMAND, "--help"], check=False, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: [Errno 28]") and len(done.stderr.strip().splitlines()) == 1


def ends_within_a_file_limit(*commands: list[str]) -> list[tuple[Any, str]]:
    """Exit codes and what stands on stderr, in a process whose files may have 20 KiB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20 * 1024, 20 * 1024))
    ends = []
    for command in commands:
        sys.argv = ["hf-moe-ted", *command]
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()) as printed,
            pytest.raises(SystemExit) as end,
        ):
            cli_run()
        ends.append((end.value.code, printed.getvalue()))
    return ends


def test_a_file_limit_is_one_line(tmp_path: Path) -> None:
    model, new = str(initialized(tmp_path / "model")), str(tmp_path / "new")
    commands = ["export", "deepspeed", model, new, "--rules", "zcode_m3"], ["quantize", model, "--output", new]
    (ends,) = run_distributed_test(ends_within_a_file_limit, 1, *commands)
    for code, printed in ends:
        last = printed.strip().splitlines()[-1]
        assert code == 1
        assert last.startswith("Error: [Errno 27]") and "new cannot be written: File too large; the system" in last
        assert "Traceback" not in printed
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_errors_are_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that list what is wrong, and what a file calls its tensors."""
    folder = initialized(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    named = {f"\x1b[2J\n{name}" if name.endswith("embed_tokens.weight") else name: w for name, w in weights.items()}
    named = {name: weight for name, weight in named.items() if "final_layer_norm" not in name} | {
        "a\x1b[2J": torch.ones(1)
    }
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(sys, "argv", ["hf-moe-ted", "export", "deepspeed", str(folder), str(tmp_path / "new")])
    monkeypatch.setattr(os, "dup2", lambda *_: 0)
    with pytest.raises(SystemExit) as end:
        cli_run()
    printed = capfd.readouterr().err.splitlines()
    assert end.value.code == 1
    (error,) = [line for line in printed if "Error: " in line]
    assert error == printed[-1] and "\x1b[2J" not in error
    assert "final_layer_norm" in error
