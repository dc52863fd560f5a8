"""Checkpoints with the names of the Hub, experts one by one, into models that have them in one tensor."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from ted_cases import Parts, parts_of, relative_errors, write_models
from transformers import AutoModelForCausalLM, TrainingArguments

from hf_moe_ted import TedPlugin, TedTrainer
from hf_moe_ted.distributed.checkpoint import load_weights
from hf_moe_ted.testing import run_distributed_test

MODELS = ("mixtral", "qwen3_moe")
TP2_EP2 = {"tensor_parallel_size": 2, "expert_parallel_size": 2}


def load(folder: Path | str, **layout: int) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=TedPlugin(**layout).distributed_config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and others of the same shapes, which have the names of the Hub, in several files."""
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, {*MODELS})
    for name in MODELS:
        model = AutoModelForCausalLM.from_pretrained(folder / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(-1)
        model.save_pretrained(folder / f"{name} of the Hub", max_shard_size="50KB")
        files = [*(folder / f"{name} of the Hub").glob("model-*.safetensors")]
        assert len(files) > 2
        assert any("experts.3" in key for file in files for key in load_file(file))
    return folder


def fill(folder: str) -> dict[str, Parts]:
    found = {}
    for name in MODELS:
        model = load(f"{folder}/{name}", **TP2_EP2)
        load_weights(model, f"{folder}/{name} of the Hub")
        found[name] = parts_of(dict(model.named_parameters()))
    return found


def test_every_rank_gets_its_part(folder: Path) -> None:
    by_rank = run_distributed_test(fill, 4, str(folder))
    for name in MODELS:
        expected = AutoModelForCausalLM.from_pretrained(folder / f"{name} of the Hub")
        errors = relative_errors([found[name] for found in by_rank], dict(expected.named_parameters()))
        assert {*errors.values()} == {0.0}


@pytest.mark.parametrize("name", MODELS)
def test_one_process(folder: Path, name: str) -> None:
    model, expected = load(folder / name), load(folder / f"{name} of the Hub")
    assert not all(torch.equal(*pair) for pair in zip(model.parameters(), expected.parameters(), strict=True))
    load_weights(model, folder / f"{name} of the Hub")
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), expected.parameters(), strict=True))


def test_a_key_mapping_of_the_user(folder: Path, tmp_path: Path) -> None:
    """Which is reversed where the model is saved by itself, as on one process."""
    tensors = load_file(write_whole(folder / "mixtral", tmp_path) / "model.safetensors")
    save_file(
        {name.replace("model.norm", "model.last_norm"): t for name, t in tensors.items()},
        tmp_path / "model.safetensors",
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path, key_mapping={r"model\.last_norm": "model.norm"})
    before = [parameter.clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_weights(model, tmp_path)
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


def write_whole(source: Path, folder: Path) -> Path:
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        ("model.layers.1.mlp.experts.3.w2.weight", r"layers.1.mlp.experts.down_proj has the shape \(3, 32, 48\), but "),
        ("model.layers.0.self_attn.q_proj.weight", "missing: model.layers.0.self_attn.q_proj.weight"),
    ],
)
def test_a_tensor_is_missing(folder: Path, tmp_path: Path, left_out: str, message: str) -> None:
    tensors: dict[str, Any] = {}
    for file in (folder / "mixtral of the Hub").glob("*.safetensors"):
        tensors |= load_file(file)
    names = [name for name in tensors if name.replace("block_sparse_moe", "mlp") == left_out]
    assert len(names) == 1
    del tensors[names[0]]
    save_file(tensors, tmp_path / "model.safetensors")
    model = load(folder / "mixtral")
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=message):
        load_weights(model, tmp_path)
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


def train(models: str, runs: str, name: str, resumes: str | None, **layout: int) -> list[float]:
    """Losses of three steps; behind them the best weights are loaded, which are not those of the last."""
    plugin = TedPlugin(**layout)
    ids = torch.randint(5, 96, (24, 9), generator=torch.Generator().manual_seed(3))
    args = TrainingArguments(
        f"{runs}/{name}",
        parallelism_config=plugin,
        per_device_train_batch_size=8 // plugin.dp_shard_size,
        max_steps=3,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="earliness",
        greater_is_better=True,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    samples = [{"input_ids": row, "labels": row} for row in ids]
    trainer = TedTrainer(
        load(f"{models}/mixtral of the Hub", **layout),
        args,
        train_dataset=samples,
        eval_dataset=samples[:8],
        optimizer_cls_and_kwargs=plugin.tiled_adamw(lr=1e-2),
        compute_metrics=lambda predicted: {"earliness": -trainer.state.global_step},
    )
    trainer.train(resume_from_checkpoint=resumes and f"{runs}/{resumes}/checkpoint-2")
    best, last = (log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log)
    assert best != pytest.approx(last, rel=1e-3)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-5)
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def test_a_run_goes_on(folder: Path, tmp_path: Path) -> None:
    """On one process, where transformers' Trainer would keep the experts of the first model, and on two."""
    expected = train(str(folder), str(tmp_path), "one", None)
    names = {key for file in (tmp_path / "one" / "checkpoint-2").glob("*.safetensors") for key in load_file(file)}
    assert any("experts.3" in name for name in names)
    assert train(str(folder), str(tmp_path), "again", "one") == pytest.approx(expected, rel=1e-5)
    for losses in run_distributed_test(train, 2, str(folder), str(tmp_path), "two", "one", expert_parallel_size=2):
        assert losses == pytest.approx(expected, rel=1e-5)
