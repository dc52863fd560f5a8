"""The README is short, and its measured numbers are those of the records that it names."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"(?<![\w.-])\d+(?:,\d{3})*(?:\.\d+)*(?![\w-])")


def measured_rows() -> list[str]:
    """Rows of the table of results, without its head."""
    section = README.split("\n## Measured\n")[1].split("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("|")][2:]


def missing_numbers(row: str) -> list[str]:
    """Numbers of a row that its record does not have."""
    *cells, link = row.strip("|").split("|")
    [path] = re.findall(r"\]\(([^)]+)\)", link)
    known = set(NUMBER.findall((ROOT / path).read_text(encoding="utf-8")))
    return [number for number in NUMBER.findall(" ".join(cells)) if number not in known]


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 120
    first_screen = README.splitlines()[:40]
    for word in ("pip install", "pipeline(", "!["):
        assert any(word in line for line in first_screen), word


@pytest.mark.parametrize("row", measured_rows(), ids=lambda row: row.strip("| ").split(",")[0])
def test_numbers_are_those_of_the_record(row: str) -> None:
    assert NUMBER.findall(row)
    assert missing_numbers(row) == []


def test_another_number_is_missed() -> None:
    row = "| clipping and AdamW | 0.756 | | [record](docs/benchmarks/optimizer_h200_2026-11-29.md) |"
    assert missing_numbers(row) == ["0.756"]
