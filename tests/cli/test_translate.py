"""The command that translates: files, standard input, errors in a line."""

import json
import subprocess
from pathlib import Path

from cli_runs import COMMAND, message_of, run_here

OPTIONS = ("--src", "en", "--tgt", "de", "--beams", "1", "--max-new-tokens", "6", "--device", "cpu")


def test_lines(model_and_text: tuple[Path, Path]) -> None:
    model, _ = model_and_text
    source, output, table = (model.parent / name for name in ("in.txt", "out.txt", "out.jsonl"))
    source.write_text("Save. Close it!\n\nThe file %s\n", encoding="utf-8")
    printed = run_here("translate", model, source, output, *OPTIONS, "--no-keep-placeholders")
    run_here("translate", model, source, table, *OPTIONS, "--src", "auto")
    assert output.read_bytes().count(b"\n") == 3
    rows = [json.loads(line) for line in table.read_text(encoding="utf-8").split("\n")[:-1]]
    assert [row["source"] for row in rows] == ["Save. Close it!", "", "The file %s"]
    assert "row 3 should be looked at: 'The file %s': not as often as in the source: %s" in printed
    assert message_of("translate", model, source, output, *OPTIONS).startswith(f"output ({output}) exists")


def test_texts_taken_for_the_target_language(model_and_text: tuple[Path, Path]) -> None:
    model, _ = model_and_text
    source, output, given = (model.parent / name for name in ("auto-in.tsv", "auto-out.jsonl", "given-out.jsonl"))
    source.write_text("source\nAbbrechen\n", encoding="utf-8")
    printed = run_here("translate", model, source, output, *OPTIONS, "--src", "auto")
    message = "'Abbrechen': taken for de, the target language: unchanged"
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [(row["translation"], row["problems"]) for row in rows] == [("Abbrechen", [message])]
    assert f"row 2 should be looked at: {message}" in printed
    assert "taken for" not in run_here("translate", model, source, given, *OPTIONS, "--src", "de")


def test_glossary(model_and_text: tuple[Path, Path]) -> None:
    model, _ = model_and_text
    source, output, terms = (model.parent / name for name in ("terms-in.txt", "terms-out.txt", "terms.tsv"))
    source.write_text("The disk is full\nA much longer term\n", encoding="utf-8")
    terms.write_text("disk\tHDD\nterm\tWort mit mehr als sechs Tokens\n", encoding="utf-8")
    printed = run_here("translate", model, source, output, *OPTIONS, "--glossary", terms)
    assert "HDD" in output.read_text(encoding="utf-8")
    assert "not as in the glossary: term -> Wort mit mehr als sechs Tokens" in printed
    terms.write_text("a\tb\tc\n", encoding="utf-8")
    assert f"glossary {terms}, line 1 has 3 columns" in message_of(
        "translate", model, source, output, *OPTIONS, "--glossary", terms
    )


def test_expert_memory(model_and_text: tuple[Path, Path]) -> None:
    model, _ = model_and_text
    source, whole, part = (model.parent / name for name in ("memory-in.txt", "memory-whole.txt", "memory-part.txt"))
    source.write_text("Save. Close it!\nThe file\n", encoding="utf-8")
    run_here("translate", model, source, whole, *OPTIONS)
    run_here("translate", model, source, part, *OPTIONS, "--expert-memory", "60KB")
    assert part.read_text() == whole.read_text()
    for options, message in (
        (("--expert-memory", "1KB"), "expert_memory (1,000 bytes) is too small"),
        (("--expert-memory", "much"), "size of expert_memory ('much') must be a number of bytes"),
        (("--expert-languages", "en"), "--expert-statistics and --expert-languages need --expert-memory"),
        (("--experts-in", "files"), "--experts-in (files) needs --expert-memory"),
        (("--expert-memory", "60KB", "--experts-in", "disk"), "experts_in ('disk') must be one of auto, memory, files"),
    ):
        assert message in message_of("translate", model, source, part, *OPTIONS, *options)


def test_standard_input(model_and_text: tuple[Path, Path]) -> None:
    model, _ = model_and_text
    done = subprocess.run(
        [COMMAND, "translate", str(model), *OPTIONS], input=b"Save.\nbad \xff\nYes.\n", capture_output=True, check=False
    )
    assert done.returncode == 1
    assert done.stdout.count(b"\n") == 3
    assert b"row 2 was not translated: it is not UTF-8" in done.stderr
    assert b"1 of 3 rows were not translated; the others were" in done.stderr
    assert b"Traceback" not in done.stderr


def test_wrong_arguments(model_and_text: tuple[Path, Path]) -> None:
    model, text = model_and_text
    assert "nowhere" in message_of("translate", model.parent / "nowhere", text, *OPTIONS)
    assert "unknown tgt_lang 'xx'" in message_of("translate", model, text, *OPTIONS, "--tgt", "xx")
    assert "did you mean de" in message_of("translate", model, text, *OPTIONS, "--tgt", "germn")
    evaluated = ("--output", model.parent / "quality.json", "--languages", "en,germn", "--device", "cpu")
    assert "did you mean de" in message_of("evaluate", model, text, *evaluated)
    assert "num_alternatives (1) must be less than num_beams (1)" in message_of(
        "translate", model, text, *OPTIONS, "--alternatives", "1"
    )
    table, output = model.parent / "pairs.tsv", model.parent / "pairs-out.tsv"
    table.write_text("source\tsrc_lang\ttgt_lang\nSave\ten\tde\nSave\ten\tfr\n")
    message = message_of("translate", model, table, output, *OPTIONS)
    assert message.startswith(f"tgt_lang of row 3 of {table} is 'fr', but all rows are translated with tgt_lang 'de'")
    assert not [*model.parent.glob("pairs-out*")]
    (model.parent / "table.csv").write_text("a,b\n1,2\n")
    assert "there is no column source or text or sentence; the header has a, b" in message_of(
        "translate", model, model.parent / "table.csv", *OPTIONS
    )
