"""Compressing a model, its statistics and its report."""

import json
from pathlib import Path

import pytest
from cli_runs import initialized, message_of, run_here
from typer.testing import CliRunner

from hf_moe_ted import TranslationQuality, ZCodeM3ForConditionalGeneration
from hf_moe_ted.cli import app

DEMO = Path(__file__).parents[2] / "examples" / "checkpoints" / "zcode_m3_demo"


def num_experts(folder: Path) -> int:
    return ZCodeM3ForConditionalGeneration.from_pretrained(folder).config.num_experts


def test_statistics_and_pruning(tmp_path: Path) -> None:
    rows = [{"source": "Close", "target": "Schlie\u00dfen", "src_lang": "en", "tgt_lang": "de"}] * 3
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    statistics = tmp_path / "statistics"
    printed = run_here("expert-statistics", DEMO, tmp_path / "rows.jsonl", statistics, "--languages", "en,de")
    assert "3 sentences in 1 directions" in printed

    options = ["--statistics", statistics, "--languages", "en:de", "--keep", "0.5"]
    run_here("prune", DEMO, "--output", tmp_path / "half", *options)
    experts = ZCodeM3ForConditionalGeneration.from_pretrained(DEMO).config.num_experts
    assert ZCodeM3ForConditionalGeneration.from_pretrained(tmp_path / "half").config.num_experts == experts // 2

    assert "statistics" in message_of("prune", DEMO, "--output", tmp_path / "none", "--keep", "0.5")


def test_compression_and_its_report(model_and_text: tuple[Path, Path], tmp_path: Path) -> None:
    full, text = model_and_text
    half, statistics = tmp_path / "half", tmp_path / "statistics"
    evaluate = ["--batch-size", "2", "--max-new-tokens", "4", "--output"]
    printed = run_here("evaluate", full, text, *evaluate, tmp_path / "before.json")
    assert "all directions: chrF" in printed and "4 sentences in 2 directions" in printed
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
    assert "with the largest loss of chrF" in (half / "README.md").read_text()
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
    run_here("quantize", full, "--output", tmp_path / "int4", "--overwrite", "--dtype", "bfloat16")
    rounded = ZCodeM3ForConditionalGeneration.from_pretrained(tmp_path / "int4", dtype="auto")
    assert str(rounded.dtype) == "torch.bfloat16"


def test_trim(tmp_path: Path) -> None:
    rows = [
        {"translation": {"en": "Close", "de": "Schlie\u00dfen"}},
        {"translation": {"en": "Save", "fr": "Enregistrer"}},
    ]
    text = tmp_path / "rows.jsonl"
    text.write_text("\n".join(map(json.dumps, rows)))
    small = tmp_path / "small"
    printed = run_here("trim", DEMO, text, "--output", small, "--languages", "EN, deu_Latn", "--max-shard-size", "9MB")
    assert "of 12,000 tokens kept" in printed and "de: 1 texts" in printed and "fr" not in printed
    assert ZCodeM3ForConditionalGeneration.from_pretrained(small).config.vocab_size < 400
    assert len([*small.glob("*.safetensors")]) > 1
    assert "output_dir" in message_of("trim", DEMO, text, "--output", small)
    message = message_of("trim", DEMO, text, "--output", small, "--overwrite", "--languages", "en,ja")
    assert "no text in ja" in message
    run_here("trim", DEMO, text, "--output", small, "--overwrite", "--min-count", "2")


def test_overwriting_deletes_nothing_else(tmp_path: Path) -> None:
    """A folder that holds the source, and more."""
    model = initialized(tmp_path / "runs" / "model")
    (tmp_path / "runs" / "thesis.txt").write_text("thesis")
    options = ["--keep", "0.5", "--criterion", "random", "--min-experts", "1", "--overwrite"]
    before = sorted(tmp_path.rglob("*"))
    for target, message in ((tmp_path / "runs", "contains the input"), (model, "contains the input")):
        done = CliRunner().invoke(app, ["prune", str(model), "--output", str(target), *options])
        assert message in str(done.exception) and isinstance(done.exception, ValueError)
    other = tmp_path / "runs"
    export = ["export", "deepspeed", str(model), str(other / "thesis.txt"), "--rules", "zcode_m3", "--overwrite"]
    assert "is a file" in str(CliRunner().invoke(app, export).exception)
    assert sorted(tmp_path.rglob("*")) == before


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
