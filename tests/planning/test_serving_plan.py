"""Plans of translation: what is tried, that nothing is planned that does not fit, command lines, and errors."""

from dataclasses import replace
from typing import Any

import pytest

from hf_moe_ted import Gpu, ServingPlan, ZCodeM3Config, plan_serving
from hf_moe_ted.planning.gpus import usable_bytes
from hf_moe_ted.planning.serving_memory import memory_of_serving
from hf_moe_ted.testing import tiny_config

NLLB_MOE = ZCodeM3Config(
    vocab_size=256_206, d_model=2048, encoder_layers=24, decoder_layers=24, encoder_ffn_dim=8192,
    decoder_ffn_dim=8192, encoder_attention_heads=16, decoder_attention_heads=16, num_experts=128,
    num_experts_per_tok=2, encoder_sparse_step=4, decoder_sparse_step=4, max_position_embeddings=1024,
)  # fmt: skip
TINY = Gpu("tiny", memory_gib=1, tflops=1, memory_gbs=10, nvlink_gbs=10, network_gbs=1, power_w=100)


def plan(config: ZCodeM3Config = NLLB_MOE, **options: Any) -> ServingPlan:
    return plan_serving(config, **{"gpu": "a100-40gb", "num_gpus": 8} | options)


@pytest.fixture(scope="module")
def on_a100() -> ServingPlan:
    return plan()


def test_ways_are_ranked_and_fit(on_a100: ServingPlan) -> None:
    speeds = [way.tokens_per_s for way in on_a100.ways]
    assert speeds == pytest.approx(sorted(speeds, reverse=True), rel=0.02)
    assert {way.weights for way in on_a100.ways} == {
        "floats", "int8 experts", "int8 all", "int4 experts", "int4 all",
    }  # fmt: skip
    for way in on_a100.ways:
        assert way.memory.peak <= usable_bytes(on_a100.gpu)
        assert way.num_gpus * way.num_copies == 8
        as_run = replace(on_a100.workload, cuda_graphs=way.token.is_captured)
        assert way.memory == memory_of_serving(
            NLLB_MOE, as_run, way.stored, expert_memory=way.expert_memory, experts_in_files=way.experts_in_files,
            num_shares=way.num_gpus,
        )  # fmt: skip
        seconds = way.source_s + 64 * way.token.total
        assert way.tokens_per_s == pytest.approx(way.num_copies * 16 * 64 / seconds)


def test_floats_of_54_billion_are_shared_or_partly_there(on_a100: ServingPlan) -> None:
    shared, partly = (way for way in on_a100.ways if way.weights == "floats")
    assert (shared.num_gpus, shared.num_copies, shared.options) == (4, 2, "--device auto")
    assert (partly.num_gpus, partly.num_copies, partly.options) == (1, 8, "--expert-memory 32GB")
    assert partly.memory.host == 1536 * 2 * (2 * 8192 * 2048 + 8192 + 2048)
    whole = [way for way in on_a100.ways if way.weights.startswith("int4")]
    assert all(way.num_gpus == 1 and way.expert_memory is None for way in whole)  # it fits: nothing else is tried


def test_a_small_host_leaves_experts_in_files() -> None:
    found = plan(num_gpus=1, host_gib_per_gpu=16)
    in_files = next(way for way in found.ways if way.weights == "floats")
    assert in_files.experts_in_files and in_files.memory.host == 0
    in_memory = next(way for way in plan(num_gpus=1).ways if way.weights == "floats")
    assert in_files.token.missing > in_memory.token.missing
    assert in_files.options == "--expert-memory 32GB --experts-in files"
    assert in_memory.options == "--expert-memory 32GB"


def test_a_model_that_fits_has_copies() -> None:
    found = plan(ZCodeM3Config(), gpu="h200-141gb", cuda_graphs=True)
    assert all(way.num_copies == 8 for way in found.ways)
    captured = {way.weights for way in found.ways if way.token.is_captured}
    assert captured == {"floats", "int8 experts", "int4 experts"}
    alone = plan(ZCodeM3Config(), gpu="h200-141gb", cuda_graphs=True, num_gpus=1)
    assert found.best.tokens_per_s == pytest.approx(8 * alone.best.tokens_per_s)
    assert found.best.kwh_per_million_tokens == pytest.approx(alone.best.kwh_per_million_tokens)


def test_commands(on_a100: ServingPlan) -> None:
    floats = next(way for way in on_a100.ways if way.weights == "floats")
    [line] = on_a100.commands("nllb", floats)
    assert line == (
        "CUDA_VISIBLE_DEVICES=0,1,2,3 hf-moe-ted serve nllb --dtype bfloat16 --beams 4 --batch-tokens 1024 "
        "--device auto"
    )
    int4 = next(way for way in on_a100.ways if way.weights == "int4 all")
    assert on_a100.commands("nllb", int4)[0] == (
        "hf-moe-ted quantize nllb --bits 4 --what all --dtype bfloat16 --output nllb-int4-all"
    )
    assert "serve nllb-int4-all" in on_a100.commands("nllb", int4)[1]
    of_file = on_a100.commands("my models/nllb/config.json", int4)
    assert of_file[0].startswith("hf-moe-ted quantize 'my models/nllb' ")
    assert "serve 'my models/nllb'-int4-all " in of_file[1]


def test_a_quantized_model_stays_as_it_is() -> None:
    quantization = {"quant_method": "zcode_experts", "bits": 8}
    found = plan(tiny_config(quantization_config=quantization), num_gpus=1)
    assert [way.weights for way in found.ways] == ["int8 experts"]
    assert found.commands("m")[0].startswith("hf-moe-ted serve m ")


def test_a_model_without_experts_has_one_way() -> None:
    dense = tiny_config(encoder_sparse_step=0, decoder_sparse_step=0)
    assert [way.weights for way in plan(dense, num_gpus=1).ways] == ["floats"]


def test_expert_memory_of_ones_own() -> None:
    found = plan(num_gpus=2, expert_memory=16 * 10**9)
    assert {way.expert_memory for way in found.ways} == {16 * 10**9}
    int4 = next(way for way in found.ways if way.weights == "int4 experts")
    assert int4.memory.experts == pytest.approx(16e9, rel=0.01)
    too_large = plan(num_gpus=1, expert_memory=60 * 10**9)
    assert "it takes" in next(way.reason for way in too_large.impossible if way.weights == "floats")


def test_nothing_fits() -> None:
    found = plan(gpu=TINY, num_gpus=1)
    assert found.ways == ()
    with pytest.raises(ValueError, match=r"54,500,569,088 parameters cannot translate .*\(floats: everything except"):
        _ = found.best


def test_equal_speed_is_rounded_least() -> None:
    """Where the host decides, all ways take as long."""
    found = plan(tiny_config(), num_gpus=1, cuda_graphs=False)
    assert len({round(way.tokens_per_s) for way in found.ways}) == 1
    assert [way.weights for way in found.ways] == ["floats", "int8 experts", "int8 all", "int4 experts", "int4 all"]


def test_old_gpus_have_no_kernels() -> None:
    on_v100, on_a100 = (plan(ZCodeM3Config(), gpu=gpu, num_gpus=1) for gpu in ("v100-32gb", "a100-40gb"))
    for found, captured in ((on_v100, set()), (on_a100, {"int8 experts", "int4 experts"})):
        assert {way.weights for way in found.ways if way.token.is_captured} - {"floats"} == captured


def test_as_dict(on_a100: ServingPlan) -> None:
    content = on_a100.as_dict(2)
    assert len(content["ways"]) == 2
    best = content["ways"][0]
    assert best["ms_per_token"] == pytest.approx(on_a100.best.token.total * 1e3)
    assert content["constants"]["captured_layer_s"]["origin"] == "fitted"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_gpus": 0}, r"num_gpus \(0\) must be at least 1"),
        ({"num_gpus": 12}, r"num_gpus \(12\) must be a multiple of gpus_per_node \(8\)"),
        ({"batch_size": -2}, r"batch_size \(-2\) must be at least 1"),
        ({"target_length": 65}, r"target_length \(65\) must be at most the model's max_position_embeddings \(64\)"),
        ({"gpu": "tpu"}, r"gpu \('tpu'\) must be one of"),
        ({"expert_memory": 0}, r"expert_memory \(0\) must be at least 1"),
        ({"host_gib_per_gpu": float("nan")}, r"host_gib_per_gpu \(nan\) must be 0 or a positive number"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(tiny_config(), **options)


def test_less_memory_is_slower() -> None:
    speeds = [
        plan(num_gpus=1, expert_memory=size * 10**9, zipf=zipf).best.tokens_per_s
        for size, zipf in ((8, 0), (16, 0), (16, 2))
    ]
    assert speeds == sorted(speeds) and speeds[0] < speeds[-1]


def test_gpus_of_ones_own() -> None:
    larger = replace(TINY, memory_gib=200)
    assert plan(gpu=larger, num_gpus=1).best.num_gpus == 1
