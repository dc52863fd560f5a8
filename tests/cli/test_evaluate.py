"""Commands that run text through a model, and what they refuse first."""

import contextvars
import json
import os
from pathlib import Path

from cli_runs import message_of, run_here
from safetensors.torch import load_file, save_file

from hf_moe_ted import ExpertStatistics, TranslationQuality


def test_evaluate_prints_a_table(model_and_text: tuple[Path, Path], tmp_path: Path) -> None:
    full, text = model_and_text
    other, output = tmp_path / "other.jsonl", tmp_path / "a.json"
    other.write_text(json.dumps({"translation": {"en": "Tab 7 of WebKit", "de": "Tab 7 von WebKit"}}))
    options = ["--also", other, "--max-new-tokens", "3", "--output", output]
    lines = run_here("evaluate", full, text, *options).splitlines()
    tables = [number for number, line in enumerate(lines) if "direction  " in line]
    scores = ["direction", "sentences", "BLEU", "chrF", "length", "off", "target"]
    headers = [lines[start][lines[start].index("direction") :].split() for start in tables]
    assert headers == [[*scores, "repeating"], [*scores, "numbers", "names", "repeating"]]
    for start, num_sentences in zip(tables, "21", strict=True):
        rows = [line.split() for line in lines[start + 1 : start + 3]]
        assert [row[:2] for row in rows] == [["de-en", num_sentences], ["en-de", num_sentences]]
    assert lines[tables[1] - 1] == str(other)
    also = TranslationQuality.load(output).also
    assert also is not None and also.num_sentences == 2 and also.directions["en", "de"].copied["numbers"][0] == 1


def test_numbers_that_short_texts_do_not_have(model_and_text: tuple[Path, Path], tmp_path: Path) -> None:
    """A dash in the table, null in the file."""
    full, _ = model_and_text
    text, output = tmp_path / "short.jsonl", tmp_path / "a.json"
    text.write_text(json.dumps({"source": "Save", "target": "Sichern", "src_lang": "en", "tgt_lang": "de"}))
    lines = run_here("evaluate", full, text, "--max-new-tokens", "3", "--output", output).splitlines()
    [row] = [line.split() for line in lines if line.startswith("en-de")]
    assert row[:3] == ["en-de", "1", "-"] and row[5] == "-"
    means = next(line for line in lines if line.startswith("all directions"))
    assert "BLEU" not in means and "off target" not in means
    [found] = json.loads(output.read_text())["directions"]
    assert found["bleu"] is found["off_target"] is found["reference_off_target"] is None


def test_paths_that_are_not_there_are_named_and_not_looked_up(
    model_and_text: tuple[Path, Path], tmp_path: Path
) -> None:
    full, text = model_and_text
    none, out = tmp_path / "none", tmp_path / "out"
    both = {"evaluate": ["--output", out], "expert-statistics": [out]}
    for command, options in both.items():
        assert f"MODEL ({none}) must be a folder with config.json" in message_of(command, none, text, *options)
        assert "MODEL (gpt2) must be a folder" in message_of(command, "gpt2", text, *options)
        assert f"DATA ({none}) does not exist" in message_of(command, full, none, *options)
        if command == "evaluate":
            message = message_of(command, full, text, "--also", none, *options)
            assert f"--also ({none}) does not exist" in message
        assert "dtype ('float99') must be one of" in message_of(command, full, text, *options, "--dtype", "float99")
        for device in ("tpu9", "meta"):
            assert f"device ('{device}') cannot be used" in message_of(
                command, full, text, *options, "--device", device
            )
    for command in ("prune", "merge"):
        options = ["--keep", "0.5", "--output", out, "--statistics"]
        assert message_of(command, full, *options, none).startswith(f"--statistics: {none}")
    assert f"{none}" in message_of("prune", none, "--keep", "0.5", "--criterion", "random", "--output", out)
    assert f"{none}" in message_of("quantize", none, "--output", out)
    assert message_of("report", full, "--before", none).startswith(f"--before: {none}")
    assert not out.exists()


def test_a_model_that_is_not_whole_is_not_evaluated(model_and_text: tuple[Path, Path], tmp_path: Path) -> None:
    full, text = model_and_text
    weights = load_file(full / "model.safetensors")
    lacking = {name: weight for name, weight in weights.items() if not name.endswith("encoder.layer_norm.weight")}
    save_file(lacking, full / "model.safetensors", metadata={"format": "pt"})
    message = message_of("evaluate", full, text, "--output", tmp_path / "out.json")
    assert "does not hold the weights of its config" in message and "encoder.layer_norm.weight" in message
    (full / "model.safetensors").write_bytes(b"\0" * 100)
    assert "cannot be loaded" in message_of("expert-statistics", full, text, tmp_path / "out")


def test_files_that_are_no_weights_are_not_opened(model_and_text: tuple[Path, Path], tmp_path: Path) -> None:
    full, text = model_and_text
    weights, index = full / "model.safetensors", full / "model.safetensors.index.json"
    weights.rename(tmp_path / "elsewhere.safetensors")
    files = dict.fromkeys(load_file(tmp_path / "elsewhere.safetensors"), "../elsewhere.safetensors")
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    options = {"evaluate": ["--output", tmp_path / "out"], "expert-statistics": [tmp_path / "out"]}
    for command, output in options.items():
        assert "is outside of the folder; files there are not read" in message_of(command, full, text, *output)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(files, "pipe.safetensors")}))
    os.mkfifo(full / "pipe.safetensors")
    for command, output in options.items():
        assert "pipe.safetensors cannot be read: it is a pipe" in message_of(command, full, text, *output)
    assert not (tmp_path / "out").exists()


def test_the_second_of_two_runs_is_refused_before_its_work(tmp_path: Path) -> None:
    """Before it looks for the model, which is not there."""
    none, scores, statistics = tmp_path / "none", tmp_path / "scores.json", tmp_path / "statistics"
    elsewhere = contextvars.Context().run  # as in another process
    with TranslationQuality.keeping_path(scores), ExpertStatistics.keeping_folder(statistics):
        for arguments in (["evaluate", none, none, "--output", scores], ["expert-statistics", none, none, statistics]):
            assert "another process is writing to" in elsewhere(message_of, *arguments)
        assert f"DATA ({none}) does not exist" in message_of("evaluate", none, none, "--output", scores)
    assert list(tmp_path.iterdir()) == []
