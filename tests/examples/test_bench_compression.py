"""The benchmark of compression from start to end, on a tiny model."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import bench_compression
import compression_curves
import pytest
from translation_batches import Translator, read_sentences
from translation_data import DATA_DIR, Direction
from translation_evaluation import translate

from hf_moe_ted import ZCodeM3ForConditionalGeneration, ZCodeM3Tokenizer, initialize_checkpoint
from hf_moe_ted.testing import tiny_config

CHECKPOINT = DATA_DIR.parent / "checkpoints" / "zcode_m3_demo"
SIZES = {"max_sentences": 2, "max_new_tokens": 4, "num_seeds": 2, "train_batch_size": 2, "steps": 1, "scratch_steps": 1}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench_compression")
    tokenizer = ZCodeM3Tokenizer(languages=["en", "de", "zh"], model_max_length=48)
    tokenizer.save_pretrained(folder / "tokenizer")
    config = tiny_config(vocab_size=len(tokenizer), d_model=128, encoder_ffn_dim=128, decoder_ffn_dim=128, init_std=0.1)
    initialize_checkpoint(config, folder / "model", tokenizer=folder / "tokenizer")
    return folder / "model"


def run_bench(monkeypatch: pytest.MonkeyPatch, model_dir: Path, output_dir: Path, *arguments: str) -> None:
    sizes = [text for name, value in SIZES.items() for text in (f"--{name}", str(value))]
    folders = ["--model", str(model_dir), "--output_dir", str(output_dir), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["bench_compression.py", *folders, *sizes, "--keep", "0.5", *arguments])
    bench_compression.main()


def test_all_parts_and_their_curves(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_bench(monkeypatch, model_dir, tmp_path, "--time_limit_s", "0")
    assert not list((tmp_path / "lines").iterdir())
    run_bench(monkeypatch, model_dir, tmp_path)
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "lines").iterdir()}
    run_bench(monkeypatch, model_dir, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "lines").iterdir()} == first

    monkeypatch.setattr(sys, "argv", ["compression_curves.py", str(tmp_path)])
    compression_curves.main()
    report = json.loads((tmp_path / "compression.json").read_text())
    counts = Counter(point["part"] for point in report["points"])
    assert counts == {
        "full": 1, "prune": 4, "scope": 4, "merge": 2, "quantize": 3, "train": 3,
        "half_1": 1, "half_2": 1, "longer": 1, "aggregate": 2,
    }  # fmt: skip
    points = {(point["part"], point["series"]): point for point in report["points"]}
    assert points["prune", "random"]["num_seeds"] == 2
    assert points["quantize", "int8 per channel"]["num_bytes"] < points["full", "full"]["num_bytes"]
    assert points["prune", "reap"]["num_bytes"] < points["full", "full"]["num_bytes"]
    assert points["aggregate", "after training"]["num_bytes"] > points["longer", "longer"]["num_bytes"]
    per_language = [line for line in report["lines"] if line["series"] == "languages=[en, X]"]
    assert [sorted(line["scores"]) for line in per_language] == [["de-en", "en-de"], ["en-zh", "zh-en"]]
    speeds = [line for line in report["lines"] if line["part"] == "speed"]
    assert len(speeds) == 6 and all(len(line["sentences_per_s"]) == 3 for line in speeds)
    text = (tmp_path / "compression.md").read_text()
    assert "| prune | random | 50.0% |" in text and "| int4 groups of 32 | 100.0% |" in text
    assert (tmp_path / "compression.png").stat().st_size > 20_000


def test_mixed_batches_translate_as_single_sentences() -> None:
    model = ZCodeM3ForConditionalGeneration.from_pretrained(CHECKPOINT).eval()
    tokenizer = ZCodeM3Tokenizer.from_pretrained(CHECKPOINT)
    sentences = read_sentences("test", DATA_DIR, ["de", "zh"], max_sentences=3)
    outputs = Translator(tokenizer, sentences, batch_size=5, max_new_tokens=8).translate(model)
    expected = [  # where the tag of the language is a new token
        translate(model, tokenizer, [s.source], Direction(s.src_lang, s.tgt_lang), max_new_tokens=9) for s in sentences
    ]
    assert [[output] for output in outputs] == expected
    assert len({*outputs}) > len(sentences) // 2 and all(outputs)


def test_points_are_means_over_directions_and_then_seeds() -> None:
    def line(seed: int, **chrf: float) -> dict[str, Any]:
        scores = {
            name.replace("_", "-"): {"bleu": 0.0, "chrf": value, "length_ratio": 1.0, "off_target": 0.0}
            for name, value in chrf.items()
        }
        return {"part": "prune", "series": "random", "keep": 0.5, "seed": seed, "num_bytes": 8, "scores": scores}

    lines = [line(0, en_de=10.0, de_en=20.0), line(0, en_fr=30.0, fr_en=40.0), line(1, en_de=31.0, de_en=29.0)]
    (point,) = compression_curves.points_of(lines)
    assert [point[name]["chrf"] for name in ("all", "from_english", "to_english")] == [27.5, 25.5, 29.5]
    assert point["all_stdev"]["chrf"] == pytest.approx(5 / 2**0.5)
    assert "27.5 ± 3.5" in compression_curves.table([point])
    lines[0]["scores"]["en-de"]["bleu"] = 8.0
    for of_line in lines:
        for scores in of_line["scores"].values():
            scores["bleu"] = scores["bleu"] or None  # texts without 4-grams
    (point,) = compression_curves.points_of(lines)
    assert [point[name]["bleu"] for name in ("all", "from_english", "to_english")] == [8.0, 8.0, None]
    assert "| 8.0 |" in compression_curves.table([point])


def test_bad_input(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown parts distill; there are full, prune"):
        run_bench(monkeypatch, model_dir, tmp_path, "--parts", "distill")
    with pytest.raises(ValueError, match=r"no text in xx .*; there is text in ar, de"):
        run_bench(monkeypatch, model_dir, tmp_path, "--parts", "full", "--languages", "xx")
    monkeypatch.setattr(sys, "argv", ["compression_curves.py", str(tmp_path)])
    with pytest.raises(ValueError, match=r"bench_compression\.py writes them"):
        compression_curves.main()
