"""Memory of a GPU that translates: bytes of weights and caches against models, whole, quantized and while they work."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_moe_ted import ExpertQuantizationConfig, ZCodeM3Config, ZCodeM3ForConditionalGeneration, quantize_experts
from hf_moe_ted.planning.model_config import StoredBits, read_planned_config, stored_bits
from hf_moe_ted.planning.serving_memory import (
    ServingWorkload,
    default_bits,
    memory_of_serving,
    resident_bytes,
    resident_experts,
    weight_bytes,
)
from hf_moe_ted.testing import tiny_config

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"tie_word_embeddings": False, "position_embedding_type": "tupe"},
    "residual": {"position_embedding_type": "learned", "use_residual": True, "router_bias": True},
    "pyramid": {"num_experts": [2, 4, 8]},
}
WAYS = [None, StoredBits(8), StoredBits(8, what="all"), StoredBits(4, 16), StoredBits(4, 8, "all")]


def parameter_bytes(model: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize("stored", WAYS, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_weights_are_those_of_models(name: str, stored: StoredBits | None) -> None:
    config = tiny_config(**CONFIGS[name])
    model: Any = ZCodeM3ForConditionalGeneration(config).to(torch.bfloat16)
    if stored is not None:
        model = quantize_experts(model, stored.bits, stored.group_size, what=stored.what)
    weights = weight_bytes(config, stored)
    assert weights.total == parameter_bytes(model)
    assert weights.experts == sum(p.nbytes for key, p in model.named_parameters() if ".experts." in key)
    layers = [*model.model.encoder.layers, *model.model.decoder.layers]
    assert weights.largest_layer == max(parameter_bytes(layer) for layer in layers)
    assert weights.head == parameter_bytes(model.lm_head)


def test_bits_of_a_folder(tmp_path: Path) -> None:
    quantize_experts(ZCodeM3ForConditionalGeneration(tiny_config()), 4, what="all", output_dir=tmp_path / "int4")
    config = read_planned_config(tmp_path / "int4")
    assert stored_bits(config) == default_bits(tiny_config(), 4, "all") == StoredBits(4, 32, "all")
    assert stored_bits(tiny_config()) is None
    assert default_bits(tiny_config(), 8, "experts") == StoredBits(8)


def test_keys_are_those_of_a_generation() -> None:
    """Greedy search, whose last token has no key."""
    config = tiny_config()
    model = ZCodeM3ForConditionalGeneration(config).eval()
    ids = torch.arange(5, 20).view(3, 5)
    output: Any = model.generate(
        ids, num_beams=1, min_new_tokens=8, max_new_tokens=8, return_dict_in_generate=True, do_sample=False
    )
    cache = output.past_key_values
    own, of_source = (
        sum(layer.keys.nbytes + layer.values.nbytes for layer in part.layers)
        for part in (cache.self_attention_cache, cache.cross_attention_cache)
    )
    memory = memory_of_serving(config, ServingWorkload(3, 1, 5, 8, "float32", cuda_graphs=False))
    assert (memory.own_keys, memory.source_keys) == (own, of_source)
    four_beams = memory_of_serving(config, ServingWorkload(3, 4, 5, 8, "float32", cuda_graphs=False))
    assert (four_beams.own_keys, four_beams.source_keys) == (4 * own, of_source)


def test_captured_searches_keep_shorter_memories() -> None:
    """As captured_search.py: powers of two from 32 tokens on, and sentences of its ladder."""
    eager = memory_of_serving(tiny_config(), ServingWorkload(5, 4, 16, 1, "float32", cuda_graphs=False)).own_keys // 5
    captured = memory_of_serving(tiny_config(), ServingWorkload(5, 4, 16, 100, "float32"))
    assert captured.own_keys == 6 * (32 + 64 + 128) * eager


def test_terms_by_hand() -> None:
    workload = ServingWorkload(batch_size=2, num_beams=3, source_length=5, target_length=7)
    memory = memory_of_serving(tiny_config(), workload)
    assert memory.logits == 2 * 3 * 96 * (2 + 4)
    assert memory.activations == 10 * (2 * 32 + 64 + 2 * 32) * 2
    assert memory.host == 0
    assert memory.peak == sum(value for value in vars(memory).values())
    rounded = memory_of_serving(tiny_config(), workload, StoredBits(8, what="all"))
    assert rounded.activations == max(memory.activations, 2 * 2 * 96 * 32)


def test_expert_memory_keeps_what_it_says() -> None:
    config = tiny_config()
    weights = weight_bytes(config, None)
    slot = next(iter(weights.layers.values())).slot_bytes
    size = weights.experts // 2
    plan = resident_experts(weights, size)
    assert size - 2 * slot < resident_bytes(weights, plan) <= size
    memory = memory_of_serving(config, ServingWorkload(), expert_memory=size)
    assert (memory.experts, memory.host) == (resident_bytes(weights, plan), weights.experts)
    assert memory_of_serving(config, ServingWorkload(), expert_memory=size, experts_in_files=True).host == 0
    everything = memory_of_serving(config, ServingWorkload(), expert_memory=weights.experts)
    assert (everything.experts, everything.host) == (weights.experts, 0)
    with pytest.raises(ValueError, match=r"expert_memory \(1 bytes\) is too small"):
        memory_of_serving(config, ServingWorkload(), expert_memory=1)


def test_shares_hold_the_model() -> None:
    """Of layers on two GPUs, one may have one more than its half."""
    config, workload = tiny_config(), ServingWorkload()
    whole, half = (memory_of_serving(config, workload, num_shares=shares) for shares in (1, 2))
    weights = weight_bytes(config, None)
    assert half.dense == -(-(whole.dense + whole.experts) // 2) + weights.largest_layer
    assert 2 * half.own_keys == whole.own_keys


def test_54_billion_parameters() -> None:
    """The table of docs/one_machine.md."""
    config = ZCodeM3Config(
        vocab_size=256_206, d_model=2048, encoder_layers=24, decoder_layers=24, encoder_ffn_dim=8192,
        decoder_ffn_dim=8192, encoder_attention_heads=16, decoder_attention_heads=16, num_experts=128,
        num_experts_per_tok=2, encoder_sparse_step=4, decoder_sparse_step=4, max_position_embeddings=1024,
    )  # fmt: skip
    found = [
        weight_bytes(config, stored) for stored in (None, *(default_bits(config, bits, "experts") for bits in (8, 4)))
    ]
    assert [round(weights.experts / 1e9, 1) for weights in found] == [103.1, 51.6, 26.6]
    assert [round((weights.dense + weights.embedding) / 1e9, 1) for weights in found] == [5.9, 5.9, 5.9]
    everything = weight_bytes(config, default_bits(config, 4, "all"))
    assert round(everything.total / 1e9, 1) == 29.6
    plan = resident_experts(found[2], 16 * 10**9)
    assert plan is not None
    assert sum(plan.num_slots.values()) + 2 * sum(plan.stage_slots.values()) == 923


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 0}, r"batch_size \(0\) must be at least 1"),
        ({"num_beams": 1.5}, r"num_beams \(1.5\) must be a whole number"),
        ({"target_length": float("nan")}, r"target_length \(nan\) must be a whole number"),
        ({"dtype": "float16"}, r"dtype \('float16'\) must be one of"),
        ({"zipf": -1.0}, r"zipf \(-1.0\) must be 0 or a positive number"),
        ({"zipf": float("nan")}, r"zipf \(nan\) must be 0 or a positive number"),
    ],
)
def test_bad_workload(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServingWorkload(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 2}, r"bits \(2\) must be 8 or 4"),
        ({"bits": 8, "what": "none"}, r"what \('none'\) must be 'experts' or 'all'"),
        ({"bits": 4, "group_size": 0}, r"group_size \(0\) must be a number of weights"),
    ],
)
def test_bad_bits(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StoredBits(**fields)


def test_other_quantizations_are_refused() -> None:
    config = tiny_config(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(ValueError, match="quant_method 'bitsandbytes', which the planner does not know"):
        stored_bits(config)
    ours = tiny_config(quantization_config=ExpertQuantizationConfig(4, 16).to_dict())
    assert stored_bits(ours) == StoredBits(4, 16)
