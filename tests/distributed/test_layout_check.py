"""A whole model under a layout of several processes is refused, and one that the layout does not fit."""

from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from ted_cases import messages_of, write_models
from torch import nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from hf_moe_ted import TedConfig, TedPlugin, TedSeq2SeqTrainer, TedTrainer, ZCodeM3ForConditionalGeneration
from hf_moe_ted.distributed.layout_check import check_is_sharded, check_model
from hf_moe_ted.testing import run_distributed_test, tiny_config

LAYOUTS = ("tensor_parallel_size", "expert_parallel_size")
DATA = [{"input_ids": [5, 6, 2], "labels": [7, 2]}] * 4


def plugin_of(**sizes: int) -> Any:
    config = TedConfig(**sizes)
    return SimpleNamespace(distributed_config=config, total_size=config.tp_size * config.fsdp_size)


def sharded(**sizes: int) -> nn.Module:
    model: Any = nn.Linear(2, 2)
    model.is_distributed_loading_by_transformers = True
    model.config = SimpleNamespace(distributed_config=TedConfig(**sizes))
    return model


@pytest.mark.parametrize("config", [None, ParallelismConfig(), plugin_of(tp_size=1, fsdp_size=1)])
def test_whole_models_are_right_without_a_layout(config: Any) -> None:
    check_is_sharded(nn.Linear(2, 2), config)


def test_whole_models_that_are_not_trained_are_right() -> None:
    check_is_sharded(nn.Linear(2, 2).requires_grad_(False), plugin_of(tp_size=2, fsdp_size=1))


def test_another_layout_is_named() -> None:
    plugin = plugin_of(tp_size=2, fsdp_size=2, ep_size=2)
    check_is_sharded(sharded(tp_size=2, fsdp_size=2, ep_size=2), plugin)
    with pytest.raises(ValueError, match="loaded with ep_size 4, but the TedPlugin has 2"):
        check_is_sharded(sharded(tp_size=2, fsdp_size=2, ep_size=4), plugin)
    with pytest.raises(ValueError, match="loaded with dp_replicate_size 2, but the TedPlugin has 1"):
        check_is_sharded(sharded(tp_size=2, fsdp_size=2, dp_replicate_size=2, ep_size=2), plugin)
    with pytest.raises(ValueError, match="loaded with zero_stage 3, but the TedPlugin has 1"):
        check_is_sharded(sharded(tp_size=2, fsdp_size=2, ep_size=2, zero_stage=3), plugin)


@pytest.mark.parametrize(
    ("sizes", "layout", "message"),
    [
        ({"vocab_size": 95}, (2, 1, 2), "vocab_size (95) must be divisible by tensor_parallel_size (2); model.resize"),
        ({"encoder_attention_heads": 2}, (4, 1, 4), "encoder_attention_heads (2) must be divisible by tensor_para"),
        ({"decoder_attention_heads": 2}, (4, 1, 4), "decoder_attention_heads (2) must be divisible by tensor_para"),
        ({"decoder_ffn_dim": 62}, (4, 4, 1), "decoder_ffn_dim (62) must be divisible by tensor_parallel_size (4)"),
        (
            {"num_experts": [4, 2, 4]},
            (1, 4, 1),
            "num_experts of encoder layer 3 (2) must be divisible by expert_parallel_size (4)",
        ),
        ({"num_experts": 3}, (2, 2, 2), "num_experts of encoder layer 1 (3) must be divisible by expert_parallel"),
    ],
)
def test_models_that_cannot_be_divided(sizes: dict[str, Any], layout: tuple[int, int, int], message: str) -> None:
    tp, ep, etp = layout
    ted = TedConfig(tp_size=tp, fsdp_size=8 // tp, ep_size=ep * etp, expert_tensor_parallel_size=etp)
    with pytest.raises(ValueError) as error:
        check_model(tiny_config(**sizes), ted.layout)
    assert message in str(error.value)
    check_model(tiny_config(), ted.layout)


def test_padding_to_a_capacity_needs_one() -> None:
    ted = TedConfig(tp_size=1, fsdp_size=2, ep_size=2, pad_expert_input_to_capacity=True)
    message = r"pad_expert_input_to_capacity \(True\) needs a capacity to pad to, but capacity_factor is None: set a"
    with pytest.raises(ValueError, match=message):
        check_model(tiny_config(capacity_factor=None), ted.layout)
    check_model(tiny_config(capacity_factor=1.0), ted.layout)


def refusals(folder: str, layout: dict[str, int]) -> dict[str, str]:
    plugin = TedPlugin(**layout)
    options: Any = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "max_steps": 1, "save_strategy": "no"}

    def whole() -> Any:
        return ZCodeM3ForConditionalGeneration.from_pretrained(f"{folder}/top1")

    def arguments() -> Any:
        return Seq2SeqTrainingArguments(f"{folder}/run", parallelism_config=plugin, **options)

    attempts = {
        "TedSeq2SeqTrainer": lambda: TedSeq2SeqTrainer(whole(), arguments(), train_dataset=DATA),
        "model_init": lambda: TedTrainer(model_init=whole, args=arguments(), train_dataset=DATA),
        "Seq2SeqTrainer": lambda: Seq2SeqTrainer(whole(), arguments(), train_dataset=DATA).train(),
        "Accelerator": lambda: Accelerator(cpu=True, parallelism_config=plugin).prepare(whole()),
    }
    found = messages_of(attempts)
    sharded_init = TedTrainer(
        model_init=lambda: ZCodeM3ForConditionalGeneration.from_pretrained(
            f"{folder}/top1", distributed_config=plugin.distributed_config
        ),
        args=arguments(),
        train_dataset=DATA,
    )
    sharded_init.train()
    found["steps of a sharded model_init"] = str(sharded_init.state.global_step)
    return found


def refusals_of_layouts(folder: str) -> dict[str, dict[str, str]]:
    return {name: refusals(folder, {name: 2}) for name in LAYOUTS}


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, str]]]:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, {"top1"})
    return run_distributed_test(refusals_of_layouts, 2, str(folder))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_models_are_refused(refused: list[dict[str, dict[str, str]]], layout: str) -> None:
    for by_layout in refused:
        found = by_layout[layout]
        assert found.pop("steps of a sharded model_init") == "1"
        assert {*found} == {"TedSeq2SeqTrainer", "model_init", "Seq2SeqTrainer", "Accelerator"}
        for message in found.values():
            assert "is not sharded, but the TedPlugin is for 2 processes" in message
            assert "distributed_config=plugin.distributed_config" in message
