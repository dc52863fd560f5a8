import csv
import io
import json
from pathlib import Path

import pytest
from pyarrow import parquet

from hf_moe_ted.translation import text_rows
from hf_moe_ted.translation.text_rows import (
    CSV,
    JSON_LINES,
    LINES,
    PARQUET,
    TSV,
    kind_of,
    read_rows,
    to_parquet,
    written,
)


def rows_of(content: str | bytes, kind: str, column: str | None = None) -> list[tuple[int, str | None, str | None]]:
    data = content.encode() if isinstance(content, str) else content
    return [(row.number, row.text, row.error) for row in read_rows(io.BytesIO(data), kind, column)]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.txt", LINES), ("a", LINES), ("a.TSV", TSV), ("a.csv", CSV), ("a.jsonl", JSON_LINES), ("a.parquet", PARQUET)],
)
def test_kinds(name: str, kind: str) -> None:
    assert kind_of(Path(name)) == kind
    assert kind_of(None) == LINES


def test_lines() -> None:
    rows = [*read_rows(io.BytesIO(b"\xef\xbb\xbfone\r\n\nbad \xff\nnul \0\nend"), LINES)]
    assert [(row.number, row.text, row.end) for row in rows] == [
        (1, "one", "\r\n"),
        (2, "", "\n"),
        (3, None, "\n"),
        (4, None, "\n"),
        (5, "end", ""),
    ]
    assert rows[2].error == "it is not UTF-8 (invalid start byte at byte 4)"
    assert rows[3].error == "it has a NUL character, so it is not text"


def test_a_line_without_end_is_read_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_moe_ted.translation.text_rows.MAX_LINE_BYTES", 10)
    assert rows_of("x" * 35 + "\nshort", LINES) == [
        (1, None, "it is longer than 10 bytes"),
        (2, "short", None),
    ]


def test_tables() -> None:
    assert rows_of("id\tsource\n1\tone\n2\n3\tthree\n", TSV) == [
        (2, "one", None),
        (3, None, "it has 1 cells, but the header has 2"),
        (4, "three", None),
    ]
    assert rows_of('text,n\n"one, two",1\n"a ""b""",2\n', CSV) == [(2, "one, two", None), (3, 'a "b"', None)]
    assert rows_of("a,b\nx,y\n", CSV, "b") == [(2, "y", None)]
    several_lines = b'id,text\n1,"a\nb"\n2,c\n3,\xff\n4,d\n'
    assert [row[:2] for row in rows_of(several_lines, CSV)] == [
        (2, "a\nb"),
        (3, "c"),
        (4, None),
        (5, "d"),
    ]
    assert rows_of(b"source\nok\n\xff\n", CSV)[1] == (3, None, "it is not UTF-8 (invalid start byte at byte 0)")
    with pytest.raises(ValueError, match="there is no column source or text or sentence; the header has a, b"):
        rows_of("a,b\nx,y\n", CSV)
    with pytest.raises(ValueError, match="there is no column c; the header has a, b"):
        rows_of("a,b\nx,y\n", CSV, "c")


def test_json_lines() -> None:
    lines = ['{"source": "one"}', "", "{", "[1]", '{"n": 1}', '{"source": 3}']
    found = rows_of("\n".join(lines), JSON_LINES)
    assert found[0] == (1, "one", None)
    assert [number for number, *_ in found] == [1, 3, 4, 5, 6]
    assert found[1][2].startswith("it is not JSON")  # type: ignore[union-attr]
    assert [error for *_, error in found[2:]] == [
        "it is not a JSON object",
        "it has no source or text or sentence, only n",
        "source is not text: 3",
    ]


def test_written() -> None:
    lines = [{"translation": "eins\nzwei", "end": "\r\n"}, {"translation": "", "end": ""}]
    assert written(LINES, lines, header=True) == "eins zwei\r\n"
    rows = [{"source": "a\tb", "translation": 'say "x"', "problems": ["one", "two"]}]
    assert written(TSV, rows, header=True) == 'source\ttranslation\tproblems\na b\tsay "x"\tone | two\n'
    assert [*csv.reader(io.StringIO(written(CSV, rows, header=False)))] == [["a\tb", 'say "x"', "one | two"]]
    assert json.loads(written(JSON_LINES, rows, header=True)) == rows[0]


def test_parquet_keeps_strings_and_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_rows, "PARQUET_ROWS", 2)
    rows = [
        {"text": "2024-01-01", "problems": []},
        {"text": "a", "problems": [], "note": None},
        {"text": "b", "problems": ["c"], "note": "2024-01-01T00:00:00"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    to_parquet(tmp_path / "rows.jsonl", tmp_path / "rows.parquet")
    table = parquet.read_table(tmp_path / "rows.parquet")
    assert table.to_pylist() == [{"note": None, **row} for row in rows]


def test_parquet_without_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    to_parquet(tmp_path / "rows.jsonl", tmp_path / "rows.parquet")
    assert parquet.read_table(tmp_path / "rows.parquet").num_rows == 0
