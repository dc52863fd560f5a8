"""Plans: what is enumerated, that nothing is planned that does not fit, and errors."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hf_moe_ted import Gpu, ZCodeM3Config, plan_training
from hf_moe_ted.planning import training_plan
from hf_moe_ted.planning.gpus import GPUS, gpu_of, usable_bytes
from hf_moe_ted.planning.memory import memory_of_rank
from hf_moe_ted.planning.training_plan import TrainingPlan
from hf_moe_ted.testing import tiny_config

SMALL = Gpu("small", memory_gib=0.15, tflops=1, memory_gbs=10, nvlink_gbs=10, network_gbs=1, power_w=100)


def plan(**options: Any) -> TrainingPlan:
    given: dict[str, Any] = {
        "num_gpus": 4, "gpu": SMALL, "gpus_per_node": 2, "batch_tokens": 2 * 16 * 8, "sequence_length": 16,
        "total_tokens": 10_000,
    }  # fmt: skip
    return plan_training(tiny_config(), **given | options)


@pytest.fixture(scope="module")
def tiny_plan() -> TrainingPlan:
    return plan()


def test_layouts_are_ranked_and_consistent(tiny_plan: TrainingPlan) -> None:
    assert tiny_plan.num_parameters == 101_152
    speeds = [layout.tokens_per_s for layout in tiny_plan.layouts]
    assert speeds == sorted(speeds, reverse=True) and len(speeds) > 10
    for planned in tiny_plan.layouts:
        layout, workload = planned.layout, planned.workload
        assert workload.batch_size * workload.accumulation * layout.data_parallel_size == 8
        assert planned.memory == memory_of_rank(tiny_config(), layout, workload)
        assert planned.memory.peak <= usable_bytes(SMALL)
        assert layout.tensor_parallel_size <= 2
        assert planned.tokens_per_s == pytest.approx(256 / planned.step.total)
        assert planned.hours == pytest.approx(10_000 / planned.tokens_per_s / 3600)
    kinds = {(p.layout.zero_stage, p.layout.offload, p.workload.checkpointing) for p in tiny_plan.layouts}
    assert {(1, None, None), (3, None, "full"), (1, "cpu", "communication-aware")} <= kinds


def test_plugin_line_makes_the_layout(tiny_plan: TrainingPlan) -> None:
    by_line = {planned.plugin: planned.layout for planned in tiny_plan.layouts}
    line = "TedPlugin(tensor_parallel_size=2, expert_parallel_size=2, zero_stage=3, duplicate_token_dropping=False)"
    layout = by_line[line]
    assert (layout.tensor_parallel_size, layout.expert_parallel_size, layout.expert_tensor_parallel_size) == (2, 2, 2)
    assert (layout.zero_stage, layout.offload, layout.duplicate_token_dropping) == (3, None, False)
    assert "TedPlugin()" in by_line
    assert by_line["TedPlugin(dp_replicate_size=2)"].dp_replicate_size == 2  # one per machine
    assert not any(layout.dp_replicate_size > 1 and layout.data_parallel_size == 2 for layout in by_line.values())


def test_impossible_layouts_have_reasons() -> None:
    found = plan_training(
        tiny_config(encoder_attention_heads=2), num_gpus=4, gpu=SMALL, batch_tokens=32 * 2, sequence_length=16
    )
    reasons = {layout.sizes: layout.reason for layout in found.impossible}
    assert "encoder_attention_heads (2) must be divisible by tensor_parallel_size (4)" in reasons["tp 4 x ep 1 x etp 4"]
    assert "2 sentence pairs of a step must be divisible by data_parallel_size (4)" in reasons["tp 1 x ep 1 x etp 1"]
    assert all(layout.layout.data_parallel_size == 2 for layout in found.layouts)


def test_too_small() -> None:
    found = plan(gpu=replace(SMALL, memory_gib=0.00001))
    assert found.layouts == ()
    assert "it takes at least" in found.impossible[0].reason
    with pytest.raises(ValueError, match=r"no layout of 4 x small trains 101,152 parameters with 256 tokens per step"):
        _ = found.best


def test_less_memory_takes_smaller_batches() -> None:
    """With vocabulary enough that logits decide."""
    config = tiny_config(vocab_size=96_000)
    options: dict[str, Any] = {"num_gpus": 1, "batch_tokens": 2 * 16 * 64, "sequence_length": 16}
    roomy = plan_training(config, gpu=replace(SMALL, memory_gib=4), **options).best
    tight = plan_training(config, gpu=replace(SMALL, memory_gib=0.25), **options).best
    assert roomy.workload.accumulation == 1 < tight.workload.accumulation
    assert tight.workload.batch_size * tight.workload.accumulation == roomy.workload.batch_size == 64


def test_gpus_of_data_sheets() -> None:
    assert set(GPUS) == {"v100-32gb", "a100-40gb", "a100-80gb", "h100-80gb", "h200-141gb"}
    assert gpu_of("H100-80GB") is GPUS["h100-80gb"]


def test_gpu_of_a_file(tmp_path: Path) -> None:
    fields = {"memory_gib": 48, "tflops": 360, "memory_gbs": 860, "nvlink_gbs": 32, "network_gbs": 12.5, "power_w": 350}
    path = tmp_path / "l40s.yaml"
    path.write_text("\n".join(f"{name}: {value}" for name, value in fields.items()))
    assert gpu_of(str(path)) == Gpu("l40s", **fields)
    path.write_text("memory_gib: 48")
    with pytest.raises(ValueError, match=r"gpu \(.*l40s.yaml\): it lacks memory_gbs"):
        gpu_of(str(path))
    path.write_text("- 48")
    with pytest.raises(ValueError, match="must have a field per line"):
        gpu_of(str(path))
    for line, message in {
        "memory_gib: 48 GB": r"memory_gib \(48 GB\) must be float",
        "memory_gib: .nan": r"memory_gib \(nan\) must be float",
        "memory_gb: 48": r"it lacks memory_gib",
    }.items():
        path.write_text("\n".join([line, *(f"{name}: 1" for name in fields if name != "memory_gib")]))
        with pytest.raises(ValueError, match=message):
            gpu_of(str(path))
    with pytest.raises(ValueError, match=r"power_w \(inf\) of the GPU l40s must be a positive number"):
        Gpu("l40s", **fields | {"power_w": float("inf")})
    with pytest.raises(ValueError, match=r"tflops \(0\) of the GPU l40s must be a positive number"):
        Gpu("l40s", **fields | {"tflops": 0})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_tokens": 0}, r"total_tokens \(0\) must be at least 1"),
        ({"num_gpus": 0}, r"num_gpus \(0\) must be at least 1"),
        ({"batch_tokens": -1}, r"batch_tokens \(-1\) must be at least 1"),
        ({"num_gpus": 12, "gpus_per_node": 8}, r"num_gpus \(12\) must be a multiple of gpus_per_node \(8\)"),
        ({"batch_tokens": 100}, r"batch_tokens \(100\) must be a multiple of 32"),
        ({"sequence_length": 65}, r"sequence_length \(65\) must be at most the model's max_position_embeddings \(64\)"),
        ({"gpu": "b300"}, r"gpu \('b300'\) must be one of v100-32gb, .*, or a YAML file"),
        ({"gpu": "none.yaml"}, r"gpu: none.yaml does not exist"),
        ({"dtype": "float8"}, r"dtype \('float8'\) must be one of"),
        ({"num_gpus": float("nan")}, r"num_gpus \(nan\) must be a whole number"),
        ({"sequence_length": 16.0}, r"sequence_length \(16.0\) must be a whole number"),
        ({"host_gib_per_gpu": -1}, r"host_gib_per_gpu \(-1\) must be 0 or a positive number"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(**options)


def test_the_default_sequence_is_one_that_the_positions_allow() -> None:
    assert plan(sequence_length=None).sequence_length == 64


def test_nllb_sized_model_on_machines() -> None:
    """The default model of 10 billion parameters: not on one GPU of 40 GB, and on eight."""
    options: dict[str, Any] = {"gpu": "a100-40gb", "batch_tokens": 2**14, "sequence_length": 512}
    config = ZCodeM3Config()
    assert plan_training(config, num_gpus=1, **options).layouts == ()
    best = plan_training(config, num_gpus=8, **options).best
    assert best.memory.peak <= 0.92 * 40 * 2**30
    assert best.parameters.total * 8 >= 10e9  # of which each GPU holds its part


def test_a_small_host_offloads_nothing() -> None:
    options: dict[str, Any] = {"num_gpus": 8, "gpu": "a100-40gb", "batch_tokens": 2**14, "sequence_length": 512}
    config = ZCodeM3Config(num_experts=256)  # 39 billion parameters
    assert {p.layout.offload for p in plan_training(config, **options).layouts} == {"cpu"}
    found = plan_training(config, host_gib_per_gpu=32, **options)
    assert found.layouts == ()
    with pytest.raises(ValueError, match=r"offload takes 73.0 GiB of the host per GPU, which has 32"):
        _ = found.best


def test_a_quantized_model_is_not_trained() -> None:
    config = tiny_config(quantization_config={"quant_method": "zcode_experts", "bits": 4, "group_size": 16})
    with pytest.raises(ValueError, match=r"the model is quantized \(4 bits\) and cannot be trained"):
        plan_training(config, num_gpus=1, gpu=SMALL, sequence_length=16)


def test_training_arguments(tiny_plan: TrainingPlan) -> None:
    checkpointed = next(p for p in tiny_plan.layouts if p.workload.checkpointing is not None)
    workload = checkpointed.workload
    assert f"per_device_train_batch_size={workload.batch_size}" in checkpointed.arguments
    assert "activation_checkpointing=True" in checkpointed.arguments
    whole = next(p for p in tiny_plan.layouts if p.workload.checkpointing is None and p.workload.accumulation == 1)
    assert whole.arguments == f"per_device_train_batch_size={whole.workload.batch_size}"


def test_one_gpu_has_one_layout() -> None:
    """Expert parallelism of one process is none, and no layout stands there twice."""
    plan = plan_training(tiny_config(), num_gpus=1, gpu="h100-80gb", batch_tokens=2**14, sequence_length=16)
    assert {layout.layout for layout in plan.layouts} == {plan.best.layout}
    assert len({(layout.layout, layout.workload) for layout in plan.layouts}) == len(plan.layouts)
    assert not plan.impossible


def test_divisors() -> None:
    for number in (*range(1, 40), 360):
        assert training_plan._divisors(number) == [size for size in range(1, number + 1) if number % size == 0]
    assert len(training_plan._divisors(2**40)) == 41  # in no time
