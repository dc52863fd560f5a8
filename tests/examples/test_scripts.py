"""The scripts from start to end, on a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import train_translation
from tiny_sizes import SIZES

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPE = {
    "vocab_size": 400,
    "config": {**SIZES, "max_position_embeddings": 192, "init_std": 0.1},
    "languages": ["de"],
    "max_length": 64,
    "max_eval_samples": 8,
    "max_test_samples": 2,
    "max_steps": 2,
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "logging_steps": 1,
    "report_to": "none",
    "bf16": True,
}


def run(script: str, *arguments: str) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "recipe.json").write_text(json.dumps(RECIPE))
    with pytest.MonkeyPatch.context() as patch:  # here, as the imports of a script take longer than two steps
        patch.setattr(
            sys, "argv", ["train_translation.py", str(folder / "recipe.json"), "--output_dir", str(folder / "model")]
        )
        train_translation.main()
    return folder


def test_training_writes_model_curve_and_scores(trained: Path) -> None:
    scores = json.loads((trained / "model" / "test_scores.json").read_text())
    assert set(scores) == {"en-de", "de-en"}
    assert set(scores["en-de"]) == {"num_sentences", "bleu", "chrf", "length_ratio", "off_target", "copy_chrf"}
    curve = json.loads((trained / "model" / "training_curve.json").read_text())
    assert {"loss", "eval_loss"} <= {key for entry in curve for key in entry}
    assert (trained / "model" / "model.safetensors").is_file() and (trained / "model" / "tokenizer.json").is_file()


def test_training_resumes(trained: Path) -> None:
    recipe, folder = str(trained / "recipe.json"), trained / "model"
    run("train_translation.py", recipe, "--output_dir", str(folder), "--max_steps", "4")
    steps = [entry["step"] for entry in json.loads((folder / "training_curve.json").read_text()) if "loss" in entry]
    assert steps == [1, 2, 3, 4]


def test_demo(trained: Path) -> None:
    output_dir = trained / "demo_out"
    arguments = ("--max_test_samples", "1", "--fine_tune_steps", "2", "--output_dir", str(output_dir))
    printed = run("demo.py", "--checkpoint", str(trained / "model"), *arguments)
    assert "The demo in numbers" in printed and "half of the experts" in printed
    report = json.loads((output_dir / "report.json").read_text())
    assert report["pruned_model"]["parameters"] < report["full_model"]["parameters"]
    assert report["pruned_model"]["size_mb"] < report["full_model"]["size_mb"]
    assert {"new_language_before", "new_language_after", "kept_experts", "translations"} <= set(report)
    text = (output_dir / "pruned_model" / "report.md").read_text()
    assert "en-de" in text and "pruned in memory" in printed
    assert list((output_dir / "pruned_model").rglob("routing_by_language.png"))
    assert "| en-uk | 1 | " in (output_dir / "fine_tuned_model" / "README.md").read_text()
