"""Running commands, in a process of their own or in this one."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hf_moe_ted import ZCodeM3ForConditionalGeneration
from hf_moe_ted.cli import app
from hf_moe_ted.testing import tiny_config

COMMAND = Path(sys.executable).with_name("hf-moe-ted")


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, *map(str, arguments)], check=False, capture_output=True, text=True)


def run_here(*arguments: str | Path) -> str:
    """What a command prints; faster than `run`, for those that follow each other."""
    result = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def message_of(*arguments: Any) -> str:
    """The error that a command ends with, in one line."""
    with pytest.raises(ValueError) as error:  # what it says is asserted
        run_here(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def initialized(folder: Path) -> Path:
    """A folder of a tiny model."""
    ZCodeM3ForConditionalGeneration(tiny_config()).save_pretrained(folder)
    return folder
