"""The command as a whole."""

import subprocess
import sys

import pytest
from cli_runs import message_of, run


@pytest.mark.parametrize("arguments", [(), ("convert",)])
def test_help(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert "convert" in done.stdout + done.stderr


def test_options_with_underscores() -> None:
    """As the scripts in convert/ took them."""
    message = message_of("convert", "upcycle", "none", "new", "--num_experts", "4", "--noise_std=0.1")
    assert message.startswith("source (none) must be a folder")


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, hf_moe_ted.cli; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout.strip() == b"False"
