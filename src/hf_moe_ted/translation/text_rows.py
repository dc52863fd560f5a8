"""Texts in files, read and written row by row: lines, or a column of TSV, CSV, JSON Lines or parquet."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any, BinaryIO

from ..models.language_codes import has_spaces_between_sentences

LINES, TSV, CSV, JSON_LINES, PARQUET = "lines", "tsv", "csv", "json lines", "parquet"
_KINDS = {".tsv": TSV, ".csv": CSV, ".jsonl": JSON_LINES, ".ndjson": JSON_LINES, ".parquet": PARQUET}
COLUMNS = ("source", "text", "sentence")  # columns that are tried if none is given
MAX_LINE_BYTES = 2**24
PARQUET_ROWS = 1024


@dataclass(frozen=True)
class TextRow:
    """
    Attributes:
        number: number of the line, from 1; in parquet of the row.
        text: text to translate; `None` if there is an error.
        fields: the columns of the row; empty for lines.
        end: the line end: a new line, possibly after a carriage return, or nothing.
        error: why the row cannot be read.
    """

    number: int
    text: str | None
    fields: Mapping[str, Any] = field(default_factory=dict)
    end: str = "\n"
    error: str | None = None


def kind_of(path: Path | None) -> str:
    """The kind of a file, by the end of its name. Other files, standard input and standard output are lines."""
    return LINES if path is None else _KINDS.get(path.suffix.lower(), LINES)


def read_rows(file: BinaryIO, kind: str, column: str | None = None) -> Iterator[TextRow]:
    """The rows of a file, including invalid ones.

    Args:
        file: a file opened for reading.
        kind: its kind, from `kind_of`.
        column: column with the texts; by default the first of `COLUMNS` that exists.

    Raises:
        ValueError: the header has no such column, or the file is not a parquet file.
    """
    if kind == LINES:
        yield from _lines(file)
    elif kind == PARQUET:
        yield from _parquet(file, column)
    elif kind == JSON_LINES:
        for row in _lines(file):
            if row.error is not None or row.text.strip():  # type: ignore[union-attr]
                yield _of_json(row, column)
    else:
        yield from _table(file, "\t" if kind == TSV else ",", column)


def paragraphs(rows: Iterable[TextRow], src_lang: str) -> Iterator[TextRow]:
    """Join wrapped lines: a row for each paragraph, and one for each blank line.

    Args:
        rows: lines; a line that cannot be read stays separate.
        src_lang: their language; Chinese and Japanese lines are joined without a space.
    """
    space = " " if has_spaces_between_sentences(src_lang) else ""
    together: list[TextRow] = []
    for row in chain(rows, [None]):
        if row is not None and row.text is not None and row.text.strip():
            together.append(row)
            continue
        if together:
            text = space.join(line.text.strip() for line in together)  # type: ignore[union-attr]
            yield TextRow(together[0].number, text, end=together[-1].end)
            together = []
        if row is not None:
            yield row


def num_parquet_rows(path: Path) -> int | None:
    """Number of rows in the file's metadata; `None` if it is not a parquet file."""
    from pyarrow import ArrowException
    from pyarrow.parquet import read_metadata

    try:
        return read_metadata(path).num_rows
    except ArrowException:
        return None  # reading it will raise the error


def _lines(file: BinaryIO) -> Iterator[TextRow]:
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES)
            yield TextRow(number, None, error=f"it is longer than {MAX_LINE_BYTES:,} bytes")
            continue
        content = line.removesuffix(b"\n").removesuffix(b"\r")
        end = line[len(content) :].decode()
        try:
            text = content.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            yield TextRow(number, None, end=end, error=f"it is not UTF-8 ({error.reason} at byte {error.start})")
            continue
        if "\0" in text:
            yield TextRow(number, None, end=end, error="it has a NUL character, so it is not text")
            continue
        yield TextRow(number, text, end=end)


def _of_json(row: TextRow, column: str | None) -> TextRow:
    if row.error is not None:
        return row
    try:
        fields = json.loads(row.text)  # type: ignore[arg-type]
    except (ValueError, RecursionError) as error:
        return TextRow(row.number, None, error=f"it is not JSON: {error}")
    if not isinstance(fields, dict):
        return TextRow(row.number, None, error="it is not a JSON object")
    return _of_fields(row.number, fields, column)


def _of_fields(number: int, fields: Mapping[str, Any], column: str | None) -> TextRow:
    name = column if column is not None else next((name for name in COLUMNS if name in fields), None)
    if name is None or name not in fields:
        wanted = repr(column) if column is not None else " or ".join(COLUMNS)
        return TextRow(number, None, fields, error=f"it has no {wanted}, only {', '.join(fields) or 'nothing'}")
    if not isinstance(fields[name], str):
        return TextRow(number, None, fields, error=f"{name} is not text: {fields[name]!r:.80}")
    return TextRow(number, fields[name], fields)


def _table(file: BinaryIO, delimiter: str, column: str | None) -> Iterator[TextRow]:
    """Rows below a header; a line that is not UTF-8 is an invalid row."""
    errors: dict[int, str] = {}

    def decoded() -> Iterator[str]:
        for row in _lines(file):
            if row.error is not None:
                errors[row.number] = row.error
            yield (row.text or "") + (row.end or "\n")

    lines = decoded()
    if delimiter == "\t":
        numbered: Iterator[tuple[int, list[str]]] = enumerate((line.rstrip("\r\n").split("\t") for line in lines), 1)
    else:
        reader = csv.reader(lines, strict=True)
        numbered = ((reader.line_num, cells) for cells in reader)
    last_line, header = next(numbered, (0, []))
    wanted = [column] if column is not None else list(COLUMNS)
    if not any(name in header for name in wanted):
        raise ValueError(
            f"there is no column {' or '.join(wanted)}; the header has {', '.join(header) or 'none'}: name one of them "
            "with column"
        )
    number = 1
    while True:
        first_line = last_line + 1
        try:
            last_line, cells = next(numbered)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"row {number + 1} is not a row of the table: {error}") from error
        number += 1
        fields = dict(zip_longest(header, cells[: len(header)], fillvalue=""))
        wrong = [errors.pop(line) for line in range(first_line, last_line + 1) if line in errors]
        if wrong:  # if cells have line ends, it may be any line of the row
            yield TextRow(number, None, fields, error=wrong[0])
        elif len(cells) == len(header):
            yield _of_fields(number, fields, column)
        elif cells and any(cells):
            yield TextRow(number, None, fields, error=f"it has {len(cells)} cells, but the header has {len(header)}")


def _parquet(file: BinaryIO, column: str | None) -> Iterator[TextRow]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        batches = ParquetFile(file).iter_batches(PARQUET_ROWS)
        number = 0
        for batch in batches:
            for fields in batch.to_pylist():
                number += 1
                yield _of_fields(number, fields, column)
    except ArrowException as error:
        raise ValueError(f"it is not a parquet file: {error}") from error


def written(kind: str, rows: Sequence[Mapping[str, Any]], *, header: bool) -> str:
    """Rows as text for a kind of file; parquet files are made from JSON Lines at the end.

    Args:
        kind: its kind, from `kind_of`.
        rows: columns by name, equal in all rows; for lines `translation` and `end`.
        header: whether to write the names of the columns first.
    """
    if kind == LINES:
        return "".join(" ".join(row["translation"].splitlines()) + row["end"] for row in rows)
    if kind in (JSON_LINES, PARQUET):
        return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    cells = [[_cell(value) for value in row.values()] for row in rows]
    table = [list(rows[0]), *cells] if header and rows else cells
    if kind == TSV:
        return "".join("\t".join(" ".join(cell.split("\t")) for cell in map(_one_line, row)) + "\n" for row in table)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(table)
    return text.getvalue()


def to_parquet(json_lines: Path, path: Path) -> None:
    """Make a parquet file from a JSON Lines file; strings stay strings, whatever they look like."""
    import pyarrow
    from pyarrow import parquet

    empty = pyarrow.schema([("translation", pyarrow.string()), ("problems", pyarrow.list_(pyarrow.string()))])
    schemas = [table.schema for table in _tables(json_lines)] or [empty]
    schema = pyarrow.unify_schemas(schemas, promote_options="permissive")
    with parquet.ParquetWriter(path, schema) as writer:
        for table in _tables(json_lines, schema):
            writer.write_table(table)


def _tables(json_lines: Path, schema: Any = None) -> Iterator[Any]:
    """The rows, some thousand at a time."""
    import pyarrow

    with json_lines.open(encoding="utf-8", errors="replace") as file:
        while rows := [json.loads(line) for line in islice(file, PARQUET_ROWS)]:
            yield pyarrow.Table.from_pylist(rows, schema or _schema(rows))


def _schema(rows: list[dict[str, Any]]) -> Any:
    """A schema with all columns; `from_pylist` would take only those of the first row."""
    import pyarrow

    return pyarrow.Table.from_pylist([dict.fromkeys(name for row in rows for name in row), *rows]).schema


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return " | ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _one_line(cell: str) -> str:
    return " ".join(cell.splitlines())


__all__ = [
    "CSV",
    "LINES",
    "PARQUET",
    "TSV",
    "TextRow",
    "kind_of",
    "num_parquet_rows",
    "paragraphs",
    "read_rows",
    "to_parquet",
    "written",
]
