"""Rows of parallel text on disk or on the Hub; they are checked when read, and errors name file and line.

Files are read line by line. A line may have at most `MAX_LINE_BYTES`, so a compressed file, or a file without line
ends, cannot fill the memory. A compressed file may expand to at most `MAX_UNFOLDING` times its size.
"""

import bz2
import csv
import gzip
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ..files.json_file import parse_json_object
from .parallel_text import sentences_of_row

MAX_LINE_BYTES = 2**20
MAX_UNFOLDING = 100  # times; text takes a third to a tenth when it is compressed
LINE_BYTES = 50  # that each line counts more, as empty ones take time, too
MIN_UNFOLDED_BYTES = 2**26  # less is no harm

Row = Mapping[str, Any]

_KINDS = {".jsonl": "json", ".json": "json", ".ndjson": "json", "": "json"}
_KINDS |= {".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
_OPENERS: dict[str, Callable[[Path, str], Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
_ON_HUB = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_FORMATS = "a jsonl, csv, tsv or parquet file (the text ones maybe with .gz, .xz or .bz2)"


class ParallelTextFile:
    """The rows of a file; each iteration reads it again.

    A row has the strings `source`, `target`, `src_lang` and `tgt_lang`, or in JSON `translation`, a string for each
    language. The first line of csv and tsv names the columns; in tsv, quotes are text.

    Args:
        path: path of the file; the end of its name gives the format.
        argument: its name in messages.

    Raises:
        ValueError: it is not a regular file, or of another format. During iteration: a line is not a valid row.
    """

    def __init__(self, path: Path, argument: str):
        if not path.is_file():
            raise ValueError(f"{argument} ({path}) is not a file, but a folder, a pipe or a device; give {_FORMATS}")
        suffixes = [suffix.lower() for suffix in path.suffixes]
        self.path, self.argument = path, argument
        self._opener: Callable[[Path, str], Any] = (
            _OPENERS[suffixes.pop()] if suffixes and suffixes[-1] in _OPENERS else open
        )
        suffix = suffixes[-1] if suffixes else ""
        if suffix not in _KINDS or (_KINDS[suffix] == "parquet" and self._opener is not open):
            raise ValueError(f"{argument} ({path}) ends in {path.suffix!r}; give {_FORMATS}")
        self.kind = _KINDS[suffix]

    def __iter__(self) -> Iterator[Row]:
        rows = {"json": self._json, "csv": self._csv, "tsv": self._tsv, "parquet": self._parquet}[self.kind]()
        for place, row in rows:
            where = f"{'row' if self.kind == 'parquet' else 'line'} {place} of {self.path}"
            for _, sentence in sentences_of_row(row, where):
                if not _is_text(sentence.source + sentence.target):
                    raise ValueError(
                        f"{where} has half of a surrogate pair, which is not a character; correct the line"
                    )
            yield row

    def _lines(self) -> Iterator[tuple[int, str]]:
        """Number (from 1) and text of each line, without line ends; blank lines are skipped."""
        try:
            with self._opener(self.path, "rb") as file:
                yield from self._decoded(file)
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            raise ValueError(f"{self.argument} ({self.path}) cannot be read: {error}; it may be truncated") from error

    def _decoded(self, file: BinaryIO) -> Iterator[tuple[int, str]]:
        number = num_bytes = 0
        max_bytes = max(MIN_UNFOLDED_BYTES, MAX_UNFOLDING * self.path.stat().st_size)
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"line {number} of {self.path}"
            num_bytes += len(line) + LINE_BYTES
            if num_bytes > max_bytes:
                raise ValueError(
                    f"{self.argument} ({self.path}) expands to more than {max_bytes:,} bytes, {MAX_UNFOLDING} times "
                    "its size, which is not normal for text; decompress it yourself if you trust it"
                )
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(f"{where} has more than {MAX_LINE_BYTES:,} bytes; a row is one sentence on one line")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{where} is not UTF-8 ({error.reason}); convert the file, or decompress it") from None
            if "\0" in text:
                raise ValueError(f"{where} has a NUL byte, so it is not text; give {_FORMATS}")
            if text := text.rstrip("\r\n"):
                yield number, text

    def _json(self) -> Iterator[tuple[int, Row]]:
        for number, line in self._lines():
            if line.strip():
                yield number, parse_json_object(line, f"line {number} of {self.path}")

    def _tsv(self) -> Iterator[tuple[int, Row]]:
        yield from self._with_header((number, line.split("\t")) for number, line in self._lines())

    def _csv(self) -> Iterator[tuple[int, Row]]:
        last = 0

        def lines() -> Iterator[str]:
            nonlocal last
            for last, line in self._lines():  # noqa: B007  # read below
                yield line + "\n"

        def cells() -> Iterator[tuple[int, list[str]]]:
            reader = csv.reader(lines(), strict=True)
            try:
                for row in reader:
                    yield last, row
            except csv.Error as error:
                raise ValueError(
                    f"line {last} of {self.path} is not valid csv: {error}; is a quote not closed?"
                ) from error

        yield from self._with_header(cells())

    def _with_header(self, rows: Iterator[tuple[int, list[str]]]) -> Iterator[tuple[int, Row]]:
        columns: list[str] | None = None
        for number, cells in rows:
            if columns is None:
                columns = cells
                if len({*columns}) < len(columns):
                    raise ValueError(f"line {number} of {self.path} names a column twice: {cells}"[:300])
            elif len(cells) != len(columns):
                raise ValueError(
                    f"line {number} of {self.path} has {len(cells)} columns, but the first line has {len(columns)}"
                )
            else:
                yield number, dict(zip(columns, cells, strict=True))

    def _parquet(self) -> Iterator[tuple[int, Row]]:
        import pyarrow
        from pyarrow import parquet

        try:
            with parquet.ParquetFile(self.path) as file:
                batches = file.iter_batches(batch_size=1000)
                yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{self.argument} ({self.path}) cannot be read as parquet: {error}") from error


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def open_parallel_text(data: str, subset: str | None = None, split: str = "validation", argument: str = "DATA") -> Any:
    """Open a file, or stream a dataset from the Hub or a folder.

    Args:
        data: path of a file or a folder, or the id of a dataset.
        subset, split: subset and split of a dataset.
        argument: name of `data` in messages.

    Raises:
        ValueError: the file does not exist and the name is no id, or the dataset cannot be loaded; see
            [`ParallelTextFile`].
    """
    path = Path(data)
    if path.is_dir():
        return _StreamedDataset(data, subset, split, argument)
    if path.exists() or path.is_symlink():
        if subset is not None:
            raise ValueError(f"--subset ({subset}) is for datasets of the Hub, but {argument} ({data}) is a file")
        return ParallelTextFile(path, argument)
    is_named_as_file = {suffix.lower() for suffix in path.suffixes} & {*_KINDS, *_OPENERS, ".txt", ".zip", ".zst"}
    if is_named_as_file or not _ON_HUB.fullmatch(data):
        raise ValueError(f"{argument} ({data}) does not exist; give {_FORMATS}, or the id of a dataset of the Hub")
    return _StreamedDataset(data, subset, split, argument)


class _StreamedDataset:
    """Rows of a dataset; every error of *datasets* becomes a `ValueError`."""

    def __init__(self, data: str, subset: str | None, split: str, argument: str):
        self._name = f"{argument} ({data})"
        from datasets import load_dataset

        self._rows = self._guarded(lambda: load_dataset(data, subset, split=split, streaming=True))

    def __iter__(self) -> Iterator[Row]:
        rows = self._guarded(lambda: iter(self._rows))
        end = object()
        while (row := self._guarded(lambda: next(rows, end))) is not end:
            yield row

    def _guarded(self, do: Callable[[], Any]) -> Any:
        try:
            return do()
        except Exception as error:  # errors of servers, formats and scripts have no common class
            message = " ".join(str(error).split())[:300] or type(error).__name__
            raise ValueError(
                f"{self._name} is not a file, and cannot be loaded as a dataset of the Hub: {message}"
            ) from error


__all__ = ["MAX_LINE_BYTES", "ParallelTextFile", "open_parallel_text"]
