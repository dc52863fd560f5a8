import contextvars
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hf_moe_ted import (
    ExpertStatistics,
    TranslationQuality,
    ZCodeM3ForConditionalGeneration,
    ZCodeM3Tokenizer,
    read_deepspeed_state_dict,
)
from hf_moe_ted.cli import app
from hf_moe_ted.cli import run as cli_run
from hf_moe_ted.testing import tiny_config

NLLB_MOE = Path(__file__).parent / "fixtures" / "nllb_moe" / "tiny_a"
COMMAND = Path(sys.executable).with_name("hf-moe-ted")


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, *map(str, arguments)], check=False, capture_output=True, text=True)


def run_here(*arguments: str | Path) -> str:
    """What a command prints; faster than `run`, for those that follow each other."""
    result = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_convert_nllb_moe(tmp_path: Path) -> None:
    done = run("convert", "nllb-moe", NLLB_MOE, tmp_path / "ours", "--dtype", "bfloat16", "--max-shard-size", "200KB")
    assert done.returncode == 0, done.stderr
    assert "tensors of bfloat16" in done.stdout
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    ZCodeM3ForConditionalGeneration.from_pretrained(tmp_path / "ours")

    again = run("convert", "nllb-moe", NLLB_MOE, tmp_path / "ours")
    assert again.returncode == 1
    assert again.stderr.strip().splitlines()[-1].startswith("Error: output_dir")
    assert "Traceback" not in again.stderr
    run_here("convert", "nllb-moe", NLLB_MOE, tmp_path / "ours", "--overwrite")


def test_init(tmp_path: Path) -> None:
    tiny_config(vocab_size=300).save_pretrained(tmp_path / "config")
    ZCodeM3Tokenizer(languages=["en", "de"]).save_pretrained(tmp_path / "tokenizer")
    options = ["--config", tmp_path / "config", "--seed", "3", "--dtype", "bfloat16", "--max-shard-size", "100KB"]
    printed = run_here("init", tmp_path / "ours", *options, "--tokenizer", tmp_path / "tokenizer")
    assert "tensors of bfloat16" in printed
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    assert ZCodeM3ForConditionalGeneration.from_pretrained(tmp_path / "ours").dtype == torch.bfloat16
    assert ZCodeM3Tokenizer.from_pretrained(tmp_path / "ours").languages == ["en", "de"]

    again = run("init", tmp_path / "ours", *options)
    assert again.returncode == 1
    assert again.stderr.strip().splitlines()[-1].startswith("Error: output_dir")
    run_here("init", tmp_path / "ours", *options, "--overwrite")


def test_statistics_and_pruning(tmp_path: Path) -> None:
    demo = Path(__file__).parents[1] / "examples" / "checkpoints" / "zcode_m3_demo"
    rows = [{"source": "Close", "target": "Schlie\u00dfen", "src_lang": "en", "tgt_lang": "de"}] * 3
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    statistics = tmp_path / "statistics"
    printed = run_here("expert-statistics", demo, tmp_path / "rows.jsonl", statistics, "--languages", "en,de")
    assert "3 sentences in 1 directions" in printed

    options = ["--statistics", statistics, "--languages", "en:de", "--keep", "0.5"]
    run_here("prune", demo, "--output", tmp_path / "half", *options)
    experts = ZCodeM3ForConditionalGeneration.from_pretrained(demo).config.num_experts
    assert ZCodeM3ForConditionalGeneration.from_pretrained(tmp_path / "half").config.num_experts == experts // 2

    wrong = run("prune", demo, "--output", tmp_path / "none", "--keep", "0.5")
    assert wrong.returncode == 1
    assert "statistics" in wrong.stderr.strip().splitlines()[-1]


@pytest.fixture
def model_and_text(tmp_path: Path) -> tuple[Path, Path]:
    torch.manual_seed(0)
    folder, text = tmp_path / "full", tmp_path / "text.jsonl"
    ZCodeM3ForConditionalGeneration(tiny_config(vocab_size=272)).save_pretrained(folder)
    ZCodeM3Tokenizer(languages=["en", "de"]).save_pretrained(folder)
    rows = [{"translation": {"en": "save", "de": "speichern"}}, {"translation": {"en": "yes, close", "de": "ja"}}]
    text.write_text("\n".join(map(json.dumps, rows)))
    return folder, text


def num_experts(folder: Path) -> int:
    return ZCodeM3ForConditionalGeneration.from_pretrained(folder).config.num_experts


def test_compression_and_its_report(model_and_text: tuple[Path, Path], tmp_path: Path) -> None:
    full, text = model_and_text
    half, statistics = tmp_path / "half", tmp_path / "statistics"
    evaluate = ["--batch-size", "2", "--max-new-tokens", "4", "--output"]
    printed = run_here("evaluate", full, text, *evaluate, tmp_path / "before.json")
    assert "all directions: BLEU" in printed and "4 sentences in 2 directions" in printed
    run_here("expert-statistics", full, text, statistics)

    printed = run_here(
        "merge", full, "--keep", "0.5", "--statistics", statistics, "--output", half, "--method", "frequency"
    )
    assert "experts merged to" in printed and num_experts(half) == num_experts(full) // 2
    one_way = ["--languages", "en,de", "--max-sentences", "1", "--num-beams", "2"]
    run_here("evaluate", half, text, *evaluate, tmp_path / "beams.json", *one_way)
    beams = TranslationQuality.load(tmp_path / "beams.json")
    assert (beams.num_sentences, beams.num_beams, beams.batch_size, beams.max_new_tokens) == (2, 2, 2, 4)
    with pytest.raises(ValueError, match=r"beams\.json exists"):
        run_here("evaluate", half, text, *evaluate, tmp_path / "beams.json")
    run_here("evaluate", half, text, *evaluate, tmp_path / "beams.json", "--overwrite")

    (half / "report.md").unlink()
    qualities = ["--before", tmp_path / "before.json", "--after", tmp_path / "beams.json"]
    assert "report.md" in run_here("report", half, *qualities, "--trained", tmp_path / "before.json")
    assert "|  | before | after | after training |" in (half / "report.md").read_text()
    assert "lost most, by chrF" in (half / "README.md").read_text()
    run_here("report", half, "--statistics", statistics)
    with pytest.raises(ValueError, match=r"before\.json does not exist"):
        run_here("report", half, "--before", tmp_path / "none" / "before.json")


def test_aggregate_and_quantize(model_and_text: tuple[Path, Path], tmp_path: Path) -> None:
    full, _ = model_and_text
    assert "2 checkpoints -> one" in run_here("aggregate", full, full, "--output", tmp_path / "both")
    assert num_experts(tmp_path / "both") == 2 * num_experts(full)
    options = ["--bits", "4", "--group-size", "8", "--max-shard-size", "60KB"]
    assert "experts in 4 bits, in groups of 8" in run_here("quantize", full, "--output", tmp_path / "int4", *options)
    assert len([*(tmp_path / "int4").glob("*.safetensors")]) > 1
    config = ZCodeM3ForConditionalGeneration.from_pretrained(tmp_path / "int4").config.quantization_config
    assert (config.bits, config.group_size) == (4, 8)
    with pytest.raises(ValueError, match=r"output_dir .* is not empty"):
        run_here("quantize", full, "--output", tmp_path / "int4")
    run_here("quantize", full, "--output", tmp_path / "int4", "--overwrite")


def test_deepspeed_there_and_back(tmp_path: Path) -> None:
    source = Path(__file__).parent / "fixtures" / "deepspeed" / "m2m_ep2_zero1_top2_fp32"
    golden = torch.load(source / "expected.pt", weights_only=True)
    (tmp_path / "config.json").write_text(json.dumps({**golden["base_config"], "model_type": "m2m_100"}))
    assert "model.encoder.layers.3.fc1" in run_here("inspect", source)

    options = ["--base-config", tmp_path / "config.json", "--config-overrides", '{"num_experts_per_tok": 2}']
    run_here("convert", "deepspeed", source, tmp_path / "ours", *options, "--weights", "master")
    model = ZCodeM3ForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    inputs = {name: golden[name] for name in ("input_ids", "attention_mask", "decoder_input_ids")}
    torch.testing.assert_close(model(**inputs).logits, golden["logits"], rtol=0.0, atol=1e-5)

    run_here("export", "deepspeed", tmp_path / "ours", tmp_path / "back", "--expert-parallel-size", "2")
    back = read_deepspeed_state_dict(tmp_path / "back")
    assert all(torch.equal(back[name], tensor) for name, tensor in golden["weights"].items())

    shutil.copytree(source, tmp_path / "broken")
    next((tmp_path / "broken").glob("*/layer_0_expert_3_*")).unlink()
    inspected = run("inspect", tmp_path / "broken")
    assert inspected.returncode == 1
    assert "problem: " in inspected.stdout


@pytest.mark.parametrize("arguments", [(), ("convert",)])
def test_help(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert "convert" in done.stdout + done.stderr


def test_full_disk_behind_the_output() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([COMMAND, "--help"], check=False, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: [Errno 28]") and len(done.stderr.strip().splitlines()) == 1


def test_overwriting_deletes_nothing_else(tmp_path: Path) -> None:
    """A folder that holds the source, and more."""
    model = initialized(tmp_path / "runs" / "model")
    (tmp_path / "runs" / "thesis.txt").write_text("thesis")
    options = ["--keep", "0.5", "--criterion", "random", "--min-experts", "1", "--overwrite"]
    before = sorted(tmp_path.rglob("*"))
    for target, message in ((tmp_path / "runs", "holds what is read"), (model, "holds what is read")):
        done = CliRunner().invoke(app, ["prune", str(model), "--output", str(target), *options])
        assert message in str(done.exception) and isinstance(done.exception, ValueError)
    other = tmp_path / "runs"
    export = ["export", "deepspeed", str(model), str(other / "thesis.txt"), "--rules", "zcode_m3", "--overwrite"]
    assert "is a file" in str(CliRunner().invoke(app, export).exception)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_limit_is_one_line(tmp_path: Path) -> None:
    model = initialized(tmp_path / "model")
    limit = "trap '' XFSZ; ulimit -f 20; exec \"$@\""
    for command in (
        ["export", "deepspeed", model, tmp_path / "new", "--rules", "zcode_m3"],
        ["quantize", model, "--output", tmp_path / "new"],
    ):
        done = subprocess.run(
            ["bash", "-c", limit, "bash", COMMAND, *map(str, command)], check=False, capture_output=True, text=True
        )
        assert done.returncode == 1
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("Error: [Errno 27]") and "new cannot be written: File too large; the system" in last
        assert "Traceback" not in done.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


def initialized(folder: Path) -> Path:
    ZCodeM3ForConditionalGeneration(tiny_config()).save_pretrained(folder)
    return folder


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, hf_moe_ted.cli; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout.strip() == b"False"


def message_of(*arguments: Any) -> str:
    """The error that a command ends with, in one line."""
    with pytest.raises(ValueError) as error:  # what it says is asserted
        run_here(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


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
        assert "leaves the folder; nothing there is read" in message_of(command, full, text, *output)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(files, "pipe.safetensors")}))
    os.mkfifo(full / "pipe.safetensors")
    for command, output in options.items():
        assert "pipe.safetensors cannot be read: it is a pipe" in message_of(command, full, text, *output)
    assert not (tmp_path / "out").exists()


def test_languages_as_people_type_them(model_and_text: tuple[Path, Path], tmp_path: Path) -> None:
    full, text = model_and_text
    statistics, half = tmp_path / "statistics", tmp_path / "half"
    run_here("expert-statistics", full, text, statistics, "--languages", "EN, de-DE")
    options = ["--keep", "0.5", "--statistics", statistics, "--overwrite", "--output", half]
    for languages in ("en, de", "en-US,DE", "en:de", "eng_Latn:de, de : en"):
        run_here("prune", full, *options, "--languages", languages)
    for languages in ("en,xx", "en:xx", "en:de:fr", "en,", "en:de,fr"):
        for criterion in ("utilization", "random"):
            message = message_of("prune", full, *options, "--languages", languages, "--criterion", criterion)
            assert any(word in message for word in ("in xx", "'xx'", "languages", "as the target"))
    assert "scope ('none')" in message_of("prune", full, *options, "--scope", "none", "--criterion", "random")

    without_statistics = ["--keep", "0.5", "--criterion", "random", "--overwrite", "--output", half]
    run_here("prune", full, *without_statistics, "--languages", "en, de")
    assert "'qq'" in message_of("prune", full, *without_statistics, "--languages", "en,qq")
    (full / "tokenizer_config.json").unlink()
    (full / "tokenizer.json").unlink(missing_ok=True)
    assert "has no tokenizer" in message_of("prune", full, *without_statistics, "--languages", "en")


def test_config_overrides_are_a_json_object(tmp_path: Path) -> None:
    base = ["convert", "deepspeed", tmp_path / "in", tmp_path / "out", "--base-config", tmp_path, "--config-overrides"]
    assert "config_overrides is not JSON" in message_of(*base, "{a}")
    assert "config_overrides must be a JSON object, fields by name, but is [1]" in message_of(*base, "[1]")
    assert "config_overrides is not JSON" in message_of(*base, "[" * 100_000)


def test_evaluate_prints_a_table(model_and_text: tuple[Path, Path], tmp_path: Path) -> None:
    full, text = model_and_text
    lines = run_here("evaluate", full, text, "--max-new-tokens", "3", "--output", tmp_path / "a.json").splitlines()
    start = next(number for number, line in enumerate(lines) if "direction  " in line)
    assert lines[start].split()[-6:] == ["sentences", "BLEU", "chrF", "length", "off", "target"]
    assert [line.split()[:2] for line in lines[start + 1 : start + 3]] == [["de-en", "2"], ["en-de", "2"]]


def test_the_second_of_two_runs_is_refused_before_its_work(tmp_path: Path) -> None:
    """Before it looks for the model, which is not there."""
    none, scores, statistics = tmp_path / "none", tmp_path / "scores.json", tmp_path / "statistics"
    elsewhere = contextvars.Context().run  # as in another process
    with TranslationQuality.keeping_path(scores), ExpertStatistics.keeping_folder(statistics):
        for arguments in (["evaluate", none, none, "--output", scores], ["expert-statistics", none, none, statistics]):
            assert "another process is writing to" in elsewhere(message_of, *arguments)
        assert f"DATA ({none}) does not exist" in message_of("evaluate", none, none, "--output", scores)
    assert list(tmp_path.iterdir()) == []


def test_errors_are_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that list what is wrong, and what a file calls its tensors."""
    folder = initialized(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    named = {f"\x1b[2J\n{name}" if name.endswith("embed_tokens.weight") else name: w for name, w in weights.items()}
    named = {name: weight for name, weight in named.items() if "final_layer_norm" not in name} | {
        "a\x1b[2J": torch.ones(1)
    }
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(sys, "argv", ["hf-moe-ted", "export", "deepspeed", str(folder), str(tmp_path / "new")])
    monkeypatch.setattr(os, "dup2", lambda *_: 0)
    with pytest.raises(SystemExit) as end:
        cli_run()
    printed = capfd.readouterr().err.splitlines()
    assert end.value.code == 1
    (error,) = [line for line in printed if "Error: " in line]
    assert error == printed[-1] and "\x1b[2J" not in error
    assert "final_layer_norm" in error


def test_inspect_prints_no_control_characters(tmp_path: Path) -> None:
    source = Path(__file__).parent / "fixtures" / "deepspeed" / "m2m_ep2_zero1_top2_fp32"
    shutil.copytree(source, tmp_path / "copy")
    for path in (tmp_path / "copy").glob("*/mp_rank_*_model_states.pt"):
        content = torch.load(path, weights_only=True)
        content["ds_version"] = "0.1\x1b[2J\r0.2"
        torch.save(content, path)
    printed = CliRunner().invoke(app, ["inspect", str(tmp_path / "copy")]).output
    assert "0.1 [2J 0.2" in printed and "\x1b" not in printed and "\r" not in printed


def test_a_file_that_is_no_config_or_a_folder_without_tokenizer(tmp_path: Path) -> None:
    source = Path(__file__).parent / "fixtures" / "deepspeed" / "m2m_ep2_zero1_top2_fp32"
    golden = torch.load(source / "expected.pt", weights_only=True)
    base = golden["base_config"] | {"model_type": "m2m_100"}
    (tmp_path / "base.json").write_text(json.dumps(base))
    (tmp_path / "none.json").write_text(json.dumps({"decoder": {"type": "ByteLevel"}}))
    (tmp_path / "empty").mkdir()
    command = ["convert", "deepspeed", source, tmp_path / "new", "--config-overrides", '{"num_experts_per_tok": 2}']
    message = message_of(*command, "--base-config", tmp_path / "none.json")
    assert "none.json" in message or "the config describes no model" in message
    message = message_of(*command, "--base-config", tmp_path / "base.json", "--tokenizer", tmp_path / "empty")
    assert "must be a tokenizer or a folder with one: it has no tokenizer.json and no tokenizer_config.json" in message
    assert not (tmp_path / "new").exists()
