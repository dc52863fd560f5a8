"""Files of parallel text: every format gives the same rows, and what is wrong is an error that names file and line."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
from pathlib import Path
from typing import Any

import datasets
import pytest

from hf_moe_ted import open_parallel_text
from hf_moe_ted.evaluation import text_file
from hf_moe_ted.evaluation.text_file import MAX_LINE_BYTES

COLUMNS = ("source", "target", "src_lang", "tgt_lang")
ROWS = [
    {"source": 'close "all" tabs, please', "target": "schließen", "src_lang": "en", "tgt_lang": "de"},
    {"source": "123", "target": "NA", "src_lang": "en", "tgt_lang": "de"},
    {"source": "", "target": " None ", "src_lang": "en", "tgt_lang": "de"},
]


def jsonl() -> str:
    return "".join(json.dumps(row) + "\n" for row in ROWS)


def tsv() -> str:
    return "".join("\t".join(cells) + "\n" for cells in [COLUMNS, *(row.values() for row in ROWS)])


def csv_text() -> str:
    file = io.StringIO()
    csv.writer(file).writerows([COLUMNS, *(row.values() for row in ROWS)])
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", jsonl()),
        ("a.JSONL", jsonl().replace("\n", "\r\n")),
        ("no_suffix", "\n" + jsonl() + "\n \n"),
        ("a.en-de.tsv", tsv()),
        ("a.csv", csv_text()),
    ],
)
def test_formats_and_compressions(name: str, content: str, tmp_path: Path) -> None:
    for number, (suffix, compress) in enumerate(
        [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress), (".bz2", bz2.compress)]
    ):
        path = tmp_path / f"{number}{name}{suffix}"
        path.write_bytes(compress(content.encode("utf-8-sig")))  # with a byte order mark
        rows = open_parallel_text(str(path))
        assert list(rows) == ROWS and list(rows) == ROWS


def test_a_quoted_cell_with_a_line_end(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",".join(COLUMNS) + '\n"two\nlines, ""quoted""",x,en,de\n')
    assert [row["source"] for row in open_parallel_text(str(tmp_path / "a.csv"))] == ['two\nlines, "quoted"']


def test_parquet_and_translation_rows(tmp_path: Path) -> None:
    rows = [{"translation": {"en": "save", "de": "speichern"}}] * 3
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    assert list(open_parallel_text(str(tmp_path / "a.parquet"))) == rows


GOOD = jsonl().encode()
WRONG: list[tuple[str, bytes, str]] = [
    ("a.jsonl", b"null\n", r"line 1 of .*a\.jsonl must be a JSON object"),
    ("a.jsonl", GOOD + b"[1, 2]\n", r"line 4 of .*a\.jsonl must be a JSON object"),
    ("a.jsonl", GOOD + b'{"source": 5, "target": "x", "src_lang": "en", "tgt_lang": "de"}', "line 4 of .* the strings"),
    ("a.jsonl", b'{"translation": {"en": "x", "de": null}}', "line 1 of .* a string for each language"),
    ("a.jsonl", GOOD + b'{"source": "x', r"line 4 of .*a\.jsonl is not JSON"),
    ("a.jsonl", b"[" * 100_000, r"line 1 of .*a\.jsonl is not JSON"),
    ("a.jsonl", b'{"translation": {"en": "\\ud800", "de": "x"}}', "line 1 of .* half of a surrogate pair"),
    ("a.jsonl", GOOD + b'{"source": "\xff"}\n', r"line 4 of .*a\.jsonl is not UTF-8"),
    ("a.jsonl", jsonl().encode("utf-16"), "line 1 of .* is not UTF-8"),
    ("a.jsonl", GOOD[:9] + b"\0" + GOOD[9:], "line 1 of .* has a NUL byte"),
    ("a.jsonl", b"x" * (MAX_LINE_BYTES + 1), f"line 1 of .* has more than {MAX_LINE_BYTES:,} bytes"),
    ("a.jsonl.gz", gzip.compress(b"x" * 50_000_000), f"line 1 of .* has more than {MAX_LINE_BYTES:,} bytes"),
    ("a.jsonl", gzip.compress(GOOD), r"line 1 of .*a\.jsonl is not UTF-8 .*; convert the file, or decompress it"),
    ("a.jsonl.gz", gzip.compress(GOOD)[:-12], r"DATA \(.*a\.jsonl\.gz\) cannot be read"),
    ("a.jsonl.gz", GOOD, r"DATA \(.*a\.jsonl\.gz\) cannot be read: Not a gzipped file"),
    ("a.jsonl.xz", lzma.compress(GOOD)[:-12], r"DATA \(.*a\.jsonl\.xz\) cannot be read"),
    ("a.jsonl.xz", GOOD, r"DATA \(.*a\.jsonl\.xz\) cannot be read"),
    ("a.jsonl.bz2", bz2.compress(GOOD)[:-12], r"DATA \(.*a\.jsonl\.bz2\) cannot be read"),
    ("a.tsv", tsv().encode() + b"only one\n", "line 5 of .* has 1 columns, but the first line has 4"),
    ("a.tsv", b"source\tsource\n", "line 1 of .* names a column twice"),
    ("a.tsv", b"english\tgerman\na\tb\n", "line 2 of .* must have the strings source, target"),
    ("a.csv", csv_text().encode() + b'"never closed,x,en,de\n', "line 5 of .* is not valid csv"),
    ("a.csv", csv_text().encode() + b'"closed" too early,x,en,de\n', "line 5 of .* is not valid csv"),
    ("a.parquet", b"PAR1 and no more", r"DATA \(.*a\.parquet\) cannot be read as parquet"),
]


@pytest.mark.parametrize(("name", "content", "message"), WRONG)
def test_damaged_files(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        list(open_parallel_text(str(tmp_path / name)))
    assert "\n" not in str(error.value) and len(str(error.value)) < 800


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{}/none.jsonl", r"DATA \(.*none\.jsonl\) does not exist; give a jsonl, csv, tsv or parquet file"),
        ("none.tsv.xz", r"DATA \(none\.tsv\.xz\) does not exist"),
        ("./opus100", r"DATA \(\./opus100\) does not exist"),
        ("{}/a.txt", r"DATA \(.*a\.txt\) ends in '\.txt'; give a jsonl, csv, tsv or parquet file"),
        ("{}/a.parquet.gz", r"DATA \(.*a\.parquet\.gz\) ends in '\.gz'"),
        ("{}/pipe.jsonl", r"DATA \(.*pipe\.jsonl\) is not a file, but a folder, a pipe or a device"),
        ("{}/dangling.jsonl", r"DATA \(.*dangling\.jsonl\) is not a file"),
        ("/dev/zero", r"DATA \(/dev/zero\) is not a file"),
        ("surely/no-such-dataset", r"DATA \(surely/no-such-dataset\) is not a file, and cannot be loaded as a dataset"),
        ("{}/folder", r"DATA \(.*folder\) .* cannot be loaded as a dataset"),
    ],
)
def test_what_is_no_file(data: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # where there is no network, asking the Hub again and again takes half a minute
    for module in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    for name in ("a.txt", "a.parquet.gz"):
        (tmp_path / name).write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "dangling.jsonl").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=message):
        list(open_parallel_text(data.format(tmp_path)))


def test_options_of_datasets(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(jsonl())
    with pytest.raises(ValueError, match=r"--subset \(de-en\) is for datasets of the Hub"):
        open_parallel_text(str(tmp_path / "a.jsonl"), subset="de-en")


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.tsv", "a.csv"):
        (tmp_path / name).write_text("")
        rows: list[Any] = list(open_parallel_text(str(tmp_path / name)))
        assert rows == []


@pytest.mark.parametrize("line", [b"\n", b'{"source": "a", "target": "b", "src_lang": "en", "tgt_lang": "de"}\n'])
def test_nothing_unfolds_without_end(line: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_file, "MIN_UNFOLDED_BYTES", 1000)
    path = tmp_path / "text.jsonl.gz"
    path.write_bytes(gzip.compress(line * 50_000))
    with pytest.raises(ValueError, match=r"text\.jsonl\.gz\) expands to more than .* bytes, 100 times its size"):
        list(open_parallel_text(str(path)))
    path.write_bytes(gzip.compress(line * 2))
    list(open_parallel_text(str(path)))
