"""Which tests were skipped, and why: printed at the end of a run, and part of its result in CI.

What is skipped must follow from the machine: without a GPU, all tests that need one. A missing package, a test that
skips itself for another reason, or more tests than are known to, fail the run where the variable `CI` is set. Nobody
would see it otherwise.
"""

import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

ANY = sys.maxsize


def any_if(lacks: bool) -> int:
    return ANY if lacks else 0


# Reasons by which tests may be skipped, and how many at most: any number where this machine lacks what they need.
REASONS = {
    "needs a CUDA device": any_if(not torch.cuda.is_available()),
    "a GPU has one way to read blocks|needs Triton's interpreter|.* is not available: .*": any_if(
        torch.cuda.is_available()
    ),
    "needs Triton.*|could not import 'triton.*|reads the peak from /proc|no fork on this system": any_if(
        sys.platform != "linux"
    ),
    "root may write everywhere": any_if(hasattr(os, "geteuid") and os.geteuid() == 0),
    "there is no /usr/bin/chromium": any_if(not Path("/usr/bin/chromium").exists()),
    # of the processor, whose kind PyTorch tells by no public name
    "needs a processor with integer products|needs FBGEMM, which is for x86 with AVX2": ANY,
    # an extra that is large, and needs a compiler
    "needs the extra deepspeed": 3,
    # of versions: what docs/upstream reports
    r"not in (torch|transformers|accelerate|peft) \d.*": 5,
    "add_adapter .*asks for peft .*": 8,
    # of one case of a table of cases
    "a dense model has neither experts nor routers": 2,
    "fewer blocks than candidates": 2,
    "a product of float32 may round .*": 1,
}


def most_expected(reason: str) -> int:
    """How many tests may be skipped for a reason on this machine."""
    return max((most for pattern, most in REASONS.items() if re.fullmatch(pattern, reason)), default=0)


def reasons_of_skips(reporter: Any) -> Counter[str]:
    """How many tests were skipped for each reason; a file that is skipped as a whole counts once."""
    # workers of pytest-xdist each report such a file
    skipped = {
        (report.nodeid, report.longrepr[2].removeprefix("Skipped: ")) for report in reporter.stats.get("skipped", [])
    }
    return Counter(reason for _, reason in skipped)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(session.config, "workerinput"):
        return
    is_unexpected = any(count > most_expected(reason) for reason, count in reasons_of_skips(reporter).items())
    if is_unexpected and "CI" in os.environ and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    counts = reasons_of_skips(terminalreporter)
    if not counts:
        return
    terminalreporter.section(f"{counts.total()} skipped")
    for reason, count in counts.most_common():
        most = most_expected(reason)
        note = f" (at most {most} expected on this machine: an error in CI; see tests/skips.py)" if count > most else ""
        terminalreporter.write_line(f"{count:5} {reason}{note}", red=bool(note))
