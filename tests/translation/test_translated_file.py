"""Files: one row for each, in order; an interrupted run goes on and ends as one that was not interrupted."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from translation_cases import MakeModel

from hf_moe_ted import Glossary, ZCodeM3Tokenizer
from hf_moe_ted.testing import run_distributed_test
from hf_moe_ted.translation import translated_file
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


@pytest.mark.parametrize("end", ["jsonl", "csv", "tsv", "parquet"])
def test_tables(translator: TextTranslator, source: Path, end: str) -> None:
    table = source.with_name(f"out.{end}")
    translate_file(translator, source, table, **PAIR)
    again = source.with_name("again.jsonl")
    translate_file(translator, table, again, **PAIR, column="source")
    rows = [json.loads(line) for line in again.read_text(encoding="utf-8").splitlines()]
    assert [row["translation"] for row in rows] == translations(translator)
    assert [row["source"] for row in rows] == LINES


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


def test_another_call_does_not_go_on(translator: TextTranslator, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = source.with_name("out.txt")
    monkeypatch.setattr(translated_file._Run, "_written", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        translate_file(translator, source, output, **PAIR)
    monkeypatch.undo()
    record = {"settings": {}, "num_rows": 2, "num_bytes": 0, "errors": {}, "problems": {}}
    source.with_name("out.txt.partial.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"out.txt.partial was begun with another source and model and languages"):
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
    with pytest.raises(ValueError, match="was begun with another glossary; give the same again"):
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
