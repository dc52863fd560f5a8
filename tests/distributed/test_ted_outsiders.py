"""Mixtral and Qwen3-MoE, sharded by transformers along their own plans, with TED's experts: as one process."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from ted_cases import Case, Launched, assert_as_one_process, messages_of, write_and_launch, write_models
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_moe_ted import TedPlugin
from hf_moe_ted.distributed.checkpoint import save_pretrained
from hf_moe_ted.testing import run_distributed_test

MODELS = ("mixtral", "qwen3_moe")
EP4 = {"expert_parallel_size": 4}
TP2_EP2 = {"tensor_parallel_size": 2, "expert_parallel_size": 2}
FOLDED = {"tensor_parallel_size": 4, "expert_parallel_size": 2, "expert_tensor_parallel_size": 2}
ALL_SENT = {"duplicate_token_dropping": False}
PADDED = {"pad_expert_input_to_capacity": True}

FOUR = {
    "mixtral, ep4": Case(EP4, "mixtral"),
    "mixtral, ep4, zero 3, uneven": Case(EP4 | {"zero_stage": 3}, "mixtral", data="uneven"),
    "mixtral, tp2 x ep2": Case(TP2_EP2, "mixtral", accumulation=2),
    "mixtral, tp2 x ep2, all sent": Case(TP2_EP2 | ALL_SENT, "mixtral", checkpointing="full"),
    "mixtral, tp2, ep1": Case({"tensor_parallel_size": 2}, "mixtral"),
    "mixtral, tp4": Case({"tensor_parallel_size": 4}, "mixtral", checkpointing="communication-aware"),
    "mixtral, tp4, etp2 x ep2": Case(FOLDED, "mixtral"),
    "qwen3_moe, ep4": Case(EP4 | {"overlap_chunks": 2}, "qwen3_moe"),
    "qwen3_moe, tp2 x ep2": Case(TP2_EP2, "qwen3_moe", checkpointing="communication-aware"),
    "qwen3_moe, tp2, etp1 x ep4": Case(
        {"tensor_parallel_size": 2, "expert_parallel_size": 4, "expert_tensor_parallel_size": 1}, "qwen3_moe"
    ),
}
EIGHT = {
    # gate and up projections in one parameter, split in two, over experts and over data: the hardest to shard
    "mixtral, tp2 x ep2 x edp2": Case(TP2_EP2, "mixtral"),
    "mixtral, tp2 x ep2 x edp2, zero 3": Case(TP2_EP2 | {"zero_stage": 3}, "mixtral"),
    "qwen3_moe, tp2 x ep2 x edp2": Case(TP2_EP2, "qwen3_moe"),
}
CASES = FOUR | EIGHT


def load(folder: str, layout: dict[str, Any]) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=TedPlugin(**layout).distributed_config)


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    return write_and_launch(tmp_path_factory.mktemp("models"), FOUR, EIGHT)


@pytest.mark.parametrize("name", CASES)
def test_as_one_process(launched: Launched, name: str) -> None:
    folder, results = launched
    assert_as_one_process(folder, CASES[name], results[name])


def generate_and_save(folder: str, saved: str) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: generated_by(f"{folder}/{name}", f"{saved}/{name}") for name in MODELS}


def generated_by(folder: str, saved: str) -> tuple[Tensor, Tensor]:
    """Sentences of a sharded model, and of the one that was saved from it."""
    ids = torch.arange(5, 17).view(3, 4)
    model: Any = load(folder, TP2_EP2)
    sentences = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, pad_token_id=1)
    save_pretrained(model, saved)
    again: Any = load(saved, EP4)
    return sentences, again.generate(input_ids=ids, max_new_tokens=6, do_sample=False, pad_token_id=1)


@pytest.fixture(scope="module")
def generated(
    launched: Launched, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, tuple[Tensor, Tensor]]]]:
    saved = tmp_path_factory.mktemp("saved")
    return saved, run_distributed_test(generate_and_save, 4, str(launched[0]), str(saved))


@pytest.mark.parametrize("name", MODELS)
def test_generate_and_save(launched: Launched, generated: tuple[Path, list], name: str) -> None:
    expected, model = (AutoModelForCausalLM.from_pretrained(folder / name) for folder in (launched[0], generated[0]))
    ids = torch.arange(5, 17).view(3, 4)
    sentences = expected.generate(input_ids=ids, max_new_tokens=6, do_sample=False, pad_token_id=1)
    assert len({*map(tuple, sentences.tolist())}) == 3
    for results in generated[1]:
        found = results[name]
        assert torch.equal(found[0], sentences)
        assert torch.equal(found[1], sentences)
    for parameter, other in zip(expected.parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter, other)


REFUSED = {
    "three experts": (EP4, "num_experts (3) must be divisible by expert_parallel_size (4)"),
    "width 50": ({"tensor_parallel_size": 4}, "the inner width of the experts (50, gate_up_proj) must be divisible"),
    "mixtral": (EP4 | PADDED, "pad_expert_input_to_capacity (True) needs experts with a capacity, but MixtralExperts"),
    "qwen3_moe": (EP4 | PADDED, "pad_expert_input_to_capacity (True) needs experts with a capacity, but Qwen3Moe"),
}


def messages(folder: str) -> dict[str, str]:
    attempts = {name: functools.partial(load, f"{folder}/{name}", layout) for name, (layout, _) in REFUSED.items()}
    return messages_of(attempts)


def test_refused(tmp_path: Path) -> None:
    write_models(tmp_path, {"mixtral", "qwen3_moe"})
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "mixtral").config
    for model, sizes in (("three experts", {"num_local_experts": 3}), ("width 50", {"intermediate_size": 50})):
        other = type(config)(**{**config.to_dict(), **sizes})
        AutoModelForCausalLM.from_config(other).save_pretrained(tmp_path / model)
    for found in run_distributed_test(messages, 4, str(tmp_path)):
        for model, (_, message) in REFUSED.items():
            assert message in found[model]
