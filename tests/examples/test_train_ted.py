"""The TED example on two processes, and resumed on one."""

import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import pytest
import train_ted
from translation_data import DATA_DIR

from hf_moe_ted import ZCodeM3ForConditionalGeneration, initialize_checkpoint
from hf_moe_ted.testing import tiny_config

EXAMPLES = Path(__file__).parents[2] / "examples"
# without what a batch's loss has besides the sum over its tokens: the batches of ranks are others
ADDITIVE = {
    "capacity_factor": None,
    "router_noise_policy": None,
    "router_aux_loss_coef": 0.0,
    "router_z_loss_coef": 0.0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tiny model, and a few sentences of each split."""
    folder = tmp_path_factory.mktemp("train_ted")
    initialize_checkpoint(
        tiny_config(vocab_size=12_000, init_std=0.1, **ADDITIVE),
        folder / "model",
        tokenizer=EXAMPLES / "checkpoints" / "zcode_m3_demo",
    )
    for path in DATA_DIR.glob("*.xz"):
        lines = lzma.decompress(path.read_bytes()).decode().splitlines()
        german = [line for line in lines if line.startswith("de\t")][:20]
        with lzma.open(folder / path.name, "wt", encoding="utf-8") as file:
            file.write("\n".join([lines[0], *german]) + "\n")
    return folder


def arguments_of(folder: Path, output_dir: Path) -> list[str]:
    fields = {
        "data_dir": folder,
        "model_name_or_path": folder / "model",
        "output_dir": output_dir,
        "dtype": "float32",
        "max_steps": 4,
        "save_steps": 2,
        "batch_size": 8,
        "max_length": 16,
        "max_test_samples": 1,
    }
    return [argument for name, value in fields.items() for argument in (f"--{name}", str(value))]


def losses_of(output_dir: Path) -> list[float]:
    curve = json.loads((output_dir / "training_curve.json").read_text())
    return [entry["loss"] for entry in curve if "loss" in entry]


def test_two_processes_and_one_that_resumes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two, one = folder / "two", folder / "one"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = [str(EXAMPLES / "train_ted.py"), "--expert_parallel_size", "2", "--activation_checkpointing"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*torchrun, *script, *arguments_of(folder, two)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr

    resumed = ["--resume_from_checkpoint", str(two / "checkpoint-2")]
    monkeypatch.setattr(sys, "argv", ["train_ted.py", *arguments_of(folder, one), *resumed])
    train_ted.main()

    losses = losses_of(two)
    assert len(losses) == 4
    assert losses[3] < losses[0]
    assert losses_of(one) == pytest.approx(losses, rel=1e-4)
    for output_dir in (two, one):
        scores = json.loads((output_dir / "test_scores.json").read_text())
        assert {direction: score["num_sentences"] for direction, score in scores.items()} == {"en-de": 1, "de-en": 1}
        _, info = ZCodeM3ForConditionalGeneration.from_pretrained(output_dir, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
