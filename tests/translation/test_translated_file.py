"""Files: one row for each, in order; an interrupted run goes on and ends as one that was not interrupted."""

import csv
import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from translation_cases import MakeModel

from hf_moe_ted import Glossary, ZCodeM3Tokenizer
from hf_moe_ted.testing import run_distributed_test
from hf_moe_ted.translation import translated_file
from hf_moe_ted.translation.text_rows import paragraphs, read_rows
from hf_moe_ted.translation.text_translator import TextTranslator
from hf_moe_ted.translation.translated_file import translate_file

LINES = ["One. Two.", "", "three %s", "four", "Five, six.", "seven"]
PAIR = {"src_lang": "en", "tgt_lang": "de"}


@pytest.fixture
def translator(make_model: MakeModel, tokenizer: ZCodeM3Tokenizer, monkeypatch: pytest.MonkeyPatch) -> TextTranslator:
    monkeypatch.setattr(translated_file, "ROWS_AT_ONCE", 2)
    return TextTranslator(make_model(), tokenizer, num_beams=1, max_new_tokens=6, keep_placeholders=False)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.txt"
    path.write_text("\n".join(LINES), encoding="utf-8")
    return path


def translations(translator: TextTranslator) -> list[str]:
    return [text.text for text in translator.translate(LINES, **PAIR)]


def one_line(text: str) -> str:
    return " ".join(text.splitlines())


def test_lines(translator: TextTranslator, source: Path) -> None:
    output = source.with_name("out.txt")
    result = translate_file(translator, source, output, **PAIR)
    assert output.read_bytes().decode() == "\n".join(map(one_line, translations(translator)))
    assert (result.num_rows, result.num_resumed, result.errors) == (6, 0, {})
    assert "not as often as in the source: %s" in result.problems[3][0]
    assert {path.name for path in source.parent.iterdir()} == {"in.txt", "out.txt"}


def test_rows_of_json_lines_have_the_columns_of_the_header(
    translator: TextTranslator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(translated_file, "ROWS_AT_ONCE", 4)
    source, output = tmp_path / "in.jsonl", tmp_path / "out.csv"
    lines = ["no JSON", '{"text": "one", "a": 1}', '{"a": 2, "text": "two"}', '{"text": "three", "b": 3}']
    source.write_text("\n".join(lines))
    result = translate_file(translator, source, output, **PAIR)
    with output.open(newline="", encoding="utf-8") as file:
        rows = [*csv.DictReader(file, strict=True)]
    assert [*rows[0]] == ["text", "a", "b", "translation", "problems"]
    assert [(row["text"], row["a"], row["b"]) for row in rows] == [
        ("", "", ""),
        ("one", "1", ""),
        ("two", "2", ""),
        ("three", "", "3"),
    ]
    assert [*result.errors] == [1] and "no JSON" not in output.read_text(encoding="utf-8")


def test_a_column_that_comes_late_is_named(
    translator: TextTranslator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(translated_file, "ROWS_AT_ONCE", 1)
    source, output = tmp_path / "in.jsonl", tmp_path / "out.tsv"
    source.write_text('{"text": "one"}\n{"b": 3, "text": "two"}\n')
    result = translate_file(translator, source, output, **PAIR)
    assert "left out, because the first rows have no such column: b" in result.problems[2]
    assert [line.count("\t") for line in output.read_text(encoding="utf-8").splitlines()] == [2, 2, 2]
    assert "column: b" in output.read_text(encoding="utf-8")


@pytest.mark.parametrize("end", ["jsonl", "csv", "tsv", "parquet"])
def test_tables(translator: TextTranslator, source: Path, end: str) -> None:
    table = source.with_name(f"out.{end}")
    translate_file(translator, source, table, **PAIR)
    again = source.with_name("again.jsonl")
    translate_file(translator, table, again, **PAIR, column="source")
    rows = [json.loads(line) for line in again.read_text(encoding="utf-8").splitlines()]
    assert [row["translation"] for row in rows] == translations(translator)
    assert [row["source"] for row in rows] == LINES


@pytest.mark.parametrize("end", ["tsv", "csv", "jsonl", "parquet"])
def test_a_table_of_another_language_is_refused_before_any_work(
    translator: TextTranslator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """Also if the row comes late; codes in other forms and empty cells are no other language."""
    codes = {"a": "de", "b": "DE", "c": "", "d": "fr"}
    rows = [{"source": text, "src_lang": "eng_Latn", "tgt_lang": code} for text, code in codes.items()]

    def table(name: str, rows: list[dict[str, str]]) -> Path:
        dataset, path = datasets.Dataset.from_list(rows), tmp_path / f"{name}.{end}"
        if end == "parquet":
            dataset.to_parquet(path)
        elif end == "jsonl":
            dataset.to_json(path)
        else:
            dataset.to_csv(path, index=False, sep="\t" if end == "tsv" else ",")
        return path

    source, output = table("in", rows), tmp_path / "out.jsonl"
    number = 4 if end in ("jsonl", "parquet") else 5  # of the line
    translate = translator.translate
    monkeypatch.setattr(
        translator, "translate", lambda texts, *args: pytest.fail("translated") if texts else translate(texts, *args)
    )
    message = (
        rf"^tgt_lang of row {number} of .*in\.{end} is 'fr', but all rows are translated with tgt_lang 'de': give a "
        "table that has only these rows, or no column tgt_lang$"
    )
    with pytest.raises(ValueError, match=message):
        translate_file(translator, source, output, **PAIR)
    message = r"src_lang of row \d of .* is 'eng_Latn', but all rows are translated with src_lang 'fr'"
    with pytest.raises(ValueError, match=message):
        translate_file(translator, source, output, src_lang="fr", tgt_lang="de")
    assert [path.name for path in tmp_path.iterdir()] == [source.name]
    monkeypatch.undo()
    for src_lang in ("en", "auto"):
        translate_file(translator, table("some", rows[:3]), output, src_lang=src_lang, tgt_lang="de", overwrite=True)
        found = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
        assert [(row["source"], row["tgt_lang"] or "") for row in found] == [("a", "de"), ("b", "DE"), ("c", "")]


def test_a_language_column_that_may_mean_the_language(make_model: MakeModel, tmp_path: Path) -> None:
    tokenizer = ZCodeM3Tokenizer(languages=["eng_Latn", "zho_Hans", "zho_Hant"])
    translator = TextTranslator(make_model(), tokenizer, num_beams=1, max_new_tokens=2)
    source = tmp_path / "in.tsv"
    for code, is_other in (("zh", False), ("zh-CN", False), ("zho_Hant", True), ("xx", True)):
        source.write_text(f"source\ttgt_lang\na\t{code}\n")
        arguments: dict[str, Any] = {"src_lang": "en", "tgt_lang": "zho_Hans", "overwrite": True}
        if is_other:
            with pytest.raises(ValueError, match=f"is '{code}', but all rows are translated with tgt_lang 'zho_Hans'"):
                translate_file(translator, source, tmp_path / "out.txt", **arguments)
        else:
            assert translate_file(translator, source, tmp_path / "out.txt", **arguments).num_rows == 1


def test_a_bad_row_is_reported_and_the_rest_translated(translator: TextTranslator, tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    source.write_bytes(b"One.\nbad \xff\nTwo.\n")
    result = translate_file(translator, source, output, **PAIR)
    assert result.errors == {2: "it is not UTF-8 (invalid start byte at byte 4)"}
    texts = translator.translate(["One.", "", "Two."], **PAIR)
    assert output.read_bytes().decode() == "".join(one_line(text.text) + "\n" for text in texts)


@pytest.mark.parametrize("name", ["out.txt", "out.csv", "out.parquet"])
def test_interrupted(translator: TextTranslator, source: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    whole, output = source.with_name(f"whole-{name}"), source.with_name(name)
    expected = translate_file(translator, source, whole, **PAIR)

    translate = translator.translate
    calls: list[Any] = []

    def stop_at_third(texts: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(texts)
        if len(texts) and len([call for call in calls if call]) == 3:
            raise KeyboardInterrupt
        return translate(texts, *args, **kwargs)

    monkeypatch.setattr(translator, "translate", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        translate_file(translator, source, output, **PAIR)
    assert not output.exists()
    with source.with_name(f"{name}.partial").open("ab") as file:
        file.write(b"half a ro")  # killed while it wrote
    monkeypatch.setattr(translator, "translate", translate)
    result = translate_file(translator, source, output, **PAIR)
    assert result.num_resumed == 4
    assert (result.num_rows, result.problems) == (expected.num_rows, expected.problems)
    if name.endswith("parquet"):
        both = [datasets.Dataset.from_parquet(str(path), keep_in_memory=True)[:] for path in (whole, output)]
        assert both[0] == both[1]
    else:
        assert output.read_bytes() == whole.read_bytes()
    assert not [path for path in source.parent.iterdir() if "partial" in path.name]


def test_lines_have_no_place_for_alternatives(make_model: MakeModel, tokenizer: ZCodeM3Tokenizer, source: Path) -> None:
    translator = TextTranslator(make_model(), tokenizer, num_beams=3, num_alternatives=2, max_new_tokens=6)
    for output in (source.with_name("out.txt"), None):
        with pytest.raises(ValueError, match=r"alternatives \(2\) need an output with columns, such as output\.jsonl"):
            translate_file(translator, source, output, **PAIR)
    assert not [*source.parent.glob("out.txt*")]
    translate_file(translator, source, source.with_name("out.jsonl"), **PAIR)
    rows = [json.loads(line) for line in source.with_name("out.jsonl").read_text().splitlines()]
    assert any(row["alternatives"] for row in rows)


def test_another_call_does_not_go_on(translator: TextTranslator, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = source.with_name("out.txt")
    monkeypatch.setattr(translated_file._Run, "_written", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        translate_file(translator, source, output, **PAIR)
    monkeypatch.undo()
    record = {"settings": {}, "num_rows": 2, "num_bytes": 0, "errors": {}, "problems": {}}
    source.with_name("out.txt.partial.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"out.txt.partial was begun with other settings \(source, model, languages, "):
        translate_file(translator, source, output, **PAIR)
    translate_file(translator, source, output, **PAIR, overwrite=True)
    with pytest.raises(ValueError, match=r"output \(.*out.txt\) exists; choose another name, or overwrite it"):
        translate_file(translator, source, output, **PAIR)


def test_glossary(translator: TextTranslator, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its terms are in the output, and a run goes on only with the same."""
    output, glossary = source.with_name("out.txt"), Glossary([("seven", "7")])
    translate_file(translator, source, output, **PAIR, glossary=glossary)
    assert "7" in output.read_text(encoding="utf-8").split("\n")[5]
    translate = translator.translate

    def stop(texts: Any, *args: Any, **kwargs: Any) -> Any:
        if "four" in texts:
            raise KeyboardInterrupt
        return translate(texts, *args, **kwargs)

    monkeypatch.setattr(translator, "translate", stop)
    with pytest.raises(KeyboardInterrupt):
        translate_file(translator, source, output, **PAIR, glossary=glossary, overwrite=True)
    monkeypatch.undo()
    output.unlink()
    with pytest.raises(ValueError, match=r"was begun with other settings \(glossary\); give the same again"):
        translate_file(translator, source, output, **PAIR, glossary=Glossary([("seven", "8")]))


def test_bad_arguments(translator: TextTranslator, source: Path) -> None:
    with pytest.raises(ValueError, match=r"the folder .*nowhere does not exist"):
        translate_file(translator, source, source.parent / "nowhere" / "out.txt", **PAIR)
    with pytest.raises(ValueError, match="unknown tgt_lang 'xx'"):
        translate_file(translator, source, source.with_name("out.txt"), src_lang="en", tgt_lang="xx")
    with pytest.raises(ValueError, match="unknown src_lang 'xx'"):
        translate_file(translator, source, source.with_name("out.txt"), src_lang="xx", tgt_lang="de")
    assert [path.name for path in source.parent.iterdir()] == ["in.txt"]


def test_standard_input_and_output(
    translator: TextTranslator, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with source.open() as file:
        monkeypatch.setattr("sys.stdin", file)
        translate_file(translator, None, None, **PAIR)
    assert capsys.readouterr().out == "\n".join(map(one_line, translations(translator)))


def translate_on_ranks(source: Path, output: Path) -> Any:
    from translation_cases import TEXTS, tiny_model

    translated_file.ROWS_AT_ONCE = 2
    translator = TextTranslator(
        tiny_model(), ZCodeM3Tokenizer(languages=[*TEXTS]), num_beams=1, max_new_tokens=6, keep_placeholders=False
    )
    return translate_file(translator, source, output, **PAIR)


def test_processes_share_the_rows(translator: TextTranslator, source: Path) -> None:
    one, two = source.with_name("one.jsonl"), source.with_name("two.jsonl")
    expected = translate_file(translator, source, one, **PAIR)
    results = run_distributed_test(translate_on_ranks, 2, source, two)
    assert two.read_bytes() == one.read_bytes()
    assert results == [expected, expected]


def test_standard_input_is_translated_when_it_is_there(
    translator: TextTranslator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Whoever types a line gets its translation before the next one, and what comes at once is translated at once."""
    monkeypatch.setattr(translated_file, "ROWS_AT_ONCE", 100)
    monkeypatch.setattr(translated_file, "WAIT_S", 0.2)
    reading, writing = os.pipe()
    calls: list[list[str]] = []
    translate = translator.translate

    def typed(texts: list[str], *args: Any, **options: Any) -> Any:
        translated = translate(texts, *args, **options)
        if texts:
            calls.append(sorted(texts))
            if typing:
                os.write(writing, typing.pop(0))
                if not typing:
                    os.close(writing)
        return translated

    monkeypatch.setattr(translator, "translate", typed)
    typing = [b"Two.\nThree.\n", b"four"]
    os.write(writing, b"One.\n")
    with open(reading, "rb") as file:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=file))
        result = translate_file(translator, None, None, **PAIR)
    assert calls == [["One."], ["Three.", "Two."], ["four"]]
    assert result.num_rows == 4
    texts = [text.text for text in translate(["One.", "Two.", "Three.", "four"], **PAIR)]
    assert capsys.readouterr().out == "\n".join(map(one_line, texts))


WRAPPED = "The first\nparagraph.  It goes\r\n  on.\n\n\nThe second.\n"


def test_wrapped_lines(translator: TextTranslator, tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    source.write_text(WRAPPED, newline="")
    result = translate_file(translator, source, output, **PAIR, wrapped=True)
    texts = [text.text for text in translator.translate(["The first paragraph.  It goes on.", "The second."], **PAIR)]
    assert output.read_bytes().decode() == "{}\n\n\n{}\n".format(*map(one_line, texts))
    assert result.num_rows == 4
    with pytest.raises(ValueError, match=r"wrapped is for text, but in.csv is a table"):
        translate_file(translator, "in.csv", output, **PAIR, wrapped=True)


def test_paragraphs() -> None:
    def of(content: bytes, language: str = "en") -> list[tuple[int, str | None]]:
        rows = paragraphs(read_rows(io.BytesIO(content), "lines"), language)
        return [(row.number, row.text) for row in rows]

    assert of(WRAPPED.encode()) == [(1, "The first paragraph.  It goes on."), (4, ""), (5, ""), (6, "The second.")]
    assert of("一行\n二行\n".encode(), "zh_CN") == [(1, "一行二行")]
    assert of(b"a\nbad \xff\nb\nc") == [(1, "a"), (2, None), (3, "b c")]
    assert of(b"") == []


@pytest.mark.parametrize("name", ["in.txt", "in.csv", "in.parquet"])
def test_the_bar_knows_the_number_of_rows(
    translator: TextTranslator, source: Path, name: str, capsys: pytest.CaptureFixture
) -> None:
    table = source.with_name(name)
    if name != "in.txt":
        translate_file(translator, source, table, **PAIR)
        capsys.readouterr()
    translate_file(translator, table, source.with_name("out.txt"), **PAIR)
    bar = capsys.readouterr().err.split("\r")
    assert "0/6" in bar[1]
    assert "6/6" in bar[-1]
    assert "tokens/s" in bar[-1]


def test_standard_input_of_several_processes(translator: TextTranslator, monkeypatch: pytest.MonkeyPatch) -> None:
    state = SimpleNamespace(num_processes=2, is_main_process=True, process_index=0)
    monkeypatch.setattr(translated_file, "PartialState", lambda cpu: state)
    with pytest.raises(ValueError, match="standard input cannot be shared by 2 processes: give a file"):
        translate_file(translator, None, None, **PAIR)
