"""LoRA of sharded models: trained, saved, loaded, merged and resumed as in one process."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from ted_cases import Case, Trained, assert_as_one_process, load_alone, load_sharded, train, write_models

from hf_moe_ted import shard_adapters
from hf_moe_ted.testing import run_distributed_test

MODEL = "residual"
RANK = 3
LORA: dict[str, Any] = {
    "task_type": "SEQ_2_SEQ_LM",
    "r": RANK,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "target_parameters": ["ffn.experts.up_proj", "ffn.experts.down_proj"],
}
TP, EP = "tensor_parallel_size", "expert_parallel_size"
CASES = {
    "dp": Case({}, model=MODEL),
    "dp, accumulated": Case({"zero_stage": 2}, model=MODEL, accumulation=2),
    "tp": Case({TP: 4}, model=MODEL),
    "ep": Case({EP: 4}, model=MODEL, data="uneven"),
    "tp x ep": Case({TP: 2, EP: 2}, model=MODEL, checkpointing="communication-aware"),
    "ep x edp, stage 3": Case({EP: 2, "zero_stage": 3}, model=MODEL, checkpointing="full"),
    "etp x edp, stage 3": Case({TP: 2, "zero_stage": 3}, model=MODEL, data="idle"),
    "offload": Case({TP: 2, EP: 2, "offload": "cpu"}, model=MODEL),
}


def load_adapted_alone(folder: str) -> Any:
    return peft.PeftModel.from_pretrained(load_alone(folder), f"{folder}/adapter", is_trainable=True)


def train_adapter(folder: str, case: Case) -> Trained:
    model, plugin = load_sharded(f"{folder}/{case.model}", case)
    adapted = peft.PeftModel.from_pretrained(model, f"{folder}/{case.model}/adapter", is_trainable=True)
    return train(shard_adapters(adapted.train()), plugin, case)


def run_all(folder: str, names: list[str]) -> dict[str, Trained]:
    found = {}
    for name in names:
        try:
            found[name] = train_adapter(folder, CASES[name])
        except Exception as error:
            raise RuntimeError(f"case {name!r} failed") from error
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and an adapter of which both factors are random."""
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, {MODEL})
    torch.manual_seed(1)
    adapted = peft.get_peft_model(load_alone(str(folder / MODEL)), peft.LoraConfig(**LORA, init_lora_weights=False))
    adapted.save_pretrained(folder / MODEL / "adapter")
    return folder


@pytest.fixture(scope="module")
def launched(folder: Path) -> list[dict[str, Trained]]:
    return run_distributed_test(run_all, 4, str(folder), [*CASES])


@pytest.mark.parametrize("name", CASES)
def test_as_one_process(folder: Path, launched: list[dict[str, Trained]], name: str) -> None:
    by_rank = [results[name] for results in launched]
    assert all("lora_" in key for key in by_rank[0].gradients)
    assert_as_one_process(folder, CASES[name], by_rank, load_adapted_alone)
