"""Lines that arrive: read as a file would read them, and known to be there or not."""

import io
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from hf_moe_ted.translation import arriving_lines
from hf_moe_ted.translation.arriving_lines import ArrivingLines

CONTENT = b"one\ntwo two two\r\n\n" + b"x" * 50 + b"\nlast"


@pytest.fixture
def pipe() -> Iterator[tuple[BinaryIO, Any]]:
    """Both ends of a pipe, the second one for `os.write`."""
    reading, writing = os.pipe()
    with open(reading, "rb") as file, open(writing, "wb", buffering=0) as other:
        yield file, other


@pytest.mark.parametrize("limit", [-1, 1, 3, 4, 5, 1000])
@pytest.mark.parametrize("block", [1, 7, 2**16])
def test_lines_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, block: int) -> None:
    monkeypatch.setattr(arriving_lines, "_READ_BYTES", block)
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    expected = list(iter(partial(io.BytesIO(CONTENT).readline, limit), b""))
    for file in (path.open("rb"), io.BytesIO(CONTENT)):
        with file:
            lines = ArrivingLines(file)
            assert list(iter(partial(lines.readline, limit), b"")) == expected
            assert lines.has_line()


def test_what_is_there(pipe: tuple[BinaryIO, Any]) -> None:
    file, other = pipe
    lines = ArrivingLines(file)
    assert not lines.has_line()
    other.write(b"half of")
    assert not lines.has_line(0.001)
    other.write(b" one\ntwo\nthr")
    assert lines.has_line()
    assert [lines.readline(), lines.readline()] == [b"half of one\n", b"two\n"]
    assert not lines.has_line()
    other.close()
    assert lines.has_line()
    assert [lines.readline(), lines.readline()] == [b"thr", b""]


def test_a_line_without_end_is_not_collected(pipe: tuple[BinaryIO, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arriving_lines, "MAX_LINE_BYTES", 10)
    file, other = pipe
    other.write(b"x" * 11)
    assert ArrivingLines(file).has_line()


@pytest.mark.parametrize(("content", "number"), [(b"", 0), (b"a", 1), (b"a\n", 1), (b"a\n\nb", 3)])
def test_number_of_lines(tmp_path: Path, content: bytes, number: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"read before\n" + content)
    with path.open("rb", buffering=0) as file:
        file.readline()
        lines = ArrivingLines(file)
        assert lines.num_lines() == number
        assert len(list(iter(lines.readline, b""))) == number
    reading, writing = os.pipe()
    with open(reading, "rb") as file, open(writing, "wb"):
        assert ArrivingLines(file).num_lines() is None
    assert ArrivingLines(io.BytesIO(content)).num_lines() is None
