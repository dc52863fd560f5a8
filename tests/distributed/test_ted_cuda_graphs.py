"""Replayed steps of sharded models on gloo: the numbers of steps from Python, and decisions that all ranks share."""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fake_recorder import FakeRecorder, RecordsWithoutGpu
from ted_cases import ADAMW, in_new_groups, write_models
from torch import Tensor
from torch.utils.data import SequentialSampler

from hf_moe_ted import (
    ClippedAdamW,
    CudaGraphSeq2SeqTrainingArguments,
    TedPlugin,
    TedSeq2SeqTrainer,
    ZCodeM3ForConditionalGeneration,
)
from hf_moe_ted.cuda_graphs.step_store import WARMUP_STEPS
from hf_moe_ted.testing import run_distributed_test, tiny_config

NUM_STEPS = 8
# With the model. Sums over rows that fill up to a bound, or to a capacity where tensor-parallel ranks divide their
# tokens, may round otherwise: bits are equal if steps from Python have the same rows.
LAYOUTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ep4, no capacity": ("jittered", {"expert_parallel_size": 4}, {"expert_load_bound": 1.3}),
    "ep4, padded, two replicas": (
        "random",
        {"expert_parallel_size": 4, "dp_replicate_size": 2, "pad_expert_input_to_capacity": True},
        {"max_grad_norm": 0.5},
    ),
    "tp2 x ep2": (
        "random",
        {"tensor_parallel_size": 2, "expert_parallel_size": 2, "pad_expert_input_to_capacity": True},
        {"gradient_accumulation_steps": 2, "activation_checkpointing": True},
    ),
    "ep2, zero 3, no capacity": (
        "jittered",
        {"expert_parallel_size": 2, "zero_stage": 3},
        {"gradient_accumulation_steps": 2},
    ),
}


class Ordered(TedSeq2SeqTrainer):
    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(self.train_dataset)

    @contextlib.contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        yield  # as with CUDA graphs: to compare bit by bit


class Graphed(RecordsWithoutGpu, Ordered):
    """Replays on a CPU."""


@dataclass(frozen=True)
class Trained:
    """What a rank has: logs of each step, its shards, and counts of steps."""

    logs: list[tuple[float, float]]
    parameters: dict[str, Tensor]
    counts: dict[str, float]


def rows(num_micro_batches: int, batch_size: int, seed: int) -> list[dict[str, Tensor]]:
    """Micro-batches of two shapes in turn."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(num_micro_batches * batch_size):
        source, target = ((6, 4), (9, 7))[number // batch_size % 2]
        ids = torch.randint(5, 96, (source,), generator=generator)
        labels = torch.randint(5, 96, (target,), generator=generator)
        labels[target - number % 3 :] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


def trainer_of(folder: str, kind: Any, layout: dict[str, Any], options: dict[str, Any], optimizer: Any = None) -> Any:
    plugin = TedPlugin(**layout)
    model = ZCodeM3ForConditionalGeneration.from_pretrained(folder, distributed_config=plugin.distributed_config)
    num_micro_batches = NUM_STEPS * options.get("gradient_accumulation_steps", 1)
    args = CudaGraphSeq2SeqTrainingArguments(
        tempfile.mkdtemp(),
        **{
            "parallelism_config": plugin,
            "max_steps": NUM_STEPS,
            "per_device_train_batch_size": 2,
            "learning_rate": ADAMW["lr"],
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "cuda_graphs": kind is Graphed,
            "activation_checkpointing_kwargs": plugin.activation_checkpointing_kwargs,
            **options,
        },
    )
    optimizer = plugin.tiled_adamw(**ADAMW) if optimizer is None else (optimizer, ADAMW | {"fused": True})
    dataset = rows(num_micro_batches, 2 * plugin.dp_shard_size, seed=3)
    return kind(model=model, args=args, train_dataset=dataset, optimizer_cls_and_kwargs=optimizer)


def trained(trainer: Any) -> Trained:
    counts = trainer.train().metrics
    logs = [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "grad_norm" in log]
    parameters = {name: _local(parameter).detach() for name, parameter in trainer.model.named_parameters()}
    return Trained(logs, parameters, {name: n for name, n in counts.items() if name.startswith("cuda_graphs/")})


def _local(parameter: Any) -> Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def run_layouts(folder: str) -> dict[str, tuple[Trained, Trained]]:
    results = {}
    for name, (model, layout, options) in in_new_groups(LAYOUTS.items()):
        torch.manual_seed(dist.get_rank())  # ranks that share a batch must draw the same nevertheless
        results[name] = tuple(
            trained(trainer_of(f"{folder}/{model}", kind, layout, options)) for kind in (Ordered, Graphed)
        )
    return results


class Uneven(Graphed):
    """Rank 1 has other shapes in the odd steps."""

    def _prepare_inputs(self, inputs: Any) -> Any:
        inputs = super()._prepare_inputs(inputs)
        if dist.get_rank() == 1 and self.state.global_step % 2:
            inputs = inputs | {"input_ids": inputs["input_ids"][:, :-1]}
        return inputs


class FailsOnOneRank(Graphed):
    def _make_recorder(self) -> FakeRecorder:
        recorder = super()._make_recorder()
        recorder.errors = [RuntimeError("not permitted")] if dist.get_rank() == 2 else []
        return recorder


class MemoryEndsOnOneRank(Graphed):
    def _make_recorder(self) -> FakeRecorder:
        recorder = super()._make_recorder()
        recorder.errors = [torch.OutOfMemoryError("no")] if dist.get_rank() == 2 else []
        return recorder


def run_decisions(folder: str) -> dict[str, Any]:
    layout = {"expert_parallel_size": 4}
    found: dict[str, Any] = {}
    for kind in (Uneven, MemoryEndsOnOneRank):
        trainer = trainer_of(folder, kind, layout, {"cuda_graphs": True})
        found[kind.__name__] = trained(trainer).counts
    trainer = trainer_of(folder, FailsOnOneRank, layout, {"cuda_graphs": True})
    with pytest.raises(RuntimeError, match="could not be captured") as error:
        trainer.train()
    return found | {"error": str(error.value)}


class ClipsOnly(ClippedAdamW):
    """Has norms from the kernels, in Triton's interpreter, which would need too long for steps."""

    _device_types = ("cuda", "cpu")

    def _step_at_once(self, factor: Tensor | None) -> bool:
        self.factors = [*getattr(self, "factors", []), factor]
        return False


def run_clipping(folder: str) -> tuple[Trained, Trained, list[float | None]]:
    layout = {"tensor_parallel_size": 2, "expert_parallel_size": 2, "expert_tensor_parallel_size": 1}
    options = {"max_steps": 2, "max_grad_norm": 0.3}
    trainers = [
        trainer_of(folder, kind, layout | {"pad_expert_input_to_capacity": True}, options, optimizer)
        for kind, optimizer in ((Ordered, torch.optim.AdamW), (Graphed, ClipsOnly))
    ]
    expected, actual = map(trained, trainers)
    factors = trainers[1].optimizer.optimizer.factors
    return expected, actual, [None if factor is None else float(factor) for factor in factors]


def test_clipping_in_the_step(tmp_path_factory: pytest.TempPathFactory) -> None:
    pytest.importorskip("triton", reason="needs Triton")
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, {"random"})
    for expected, actual, factors in run_distributed_test(run_clipping, 2, str(folder / "random")):
        assert actual.logs == [pytest.approx(log, rel=1e-5) for log in expected.logs]
        assert factors == pytest.approx([0.3 / (norm + 1e-6) for _, norm in actual.logs], rel=1e-5)
        for parameter, value in actual.parameters.items():
            torch.testing.assert_close(value, expected.parameters[parameter], rtol=1e-4, atol=1e-5)


def test_replayed_steps_are_those_of_python(tmp_path_factory: pytest.TempPathFactory) -> None:
    """With dropout and jitter; random tokens of an expert over its capacity, or steps that need more rows again."""
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, {"random"})
    torch.manual_seed(0)
    config = tiny_config(
        encoder_layers=2, decoder_layers=2, capacity_factor=None, dropout=0.1, router_noise_policy="jitter",
        router_jitter_noise=0.1,
    )  # fmt: skip
    ZCodeM3ForConditionalGeneration(config).save_pretrained(folder / "jittered")
    by_rank = run_distributed_test(run_layouts, 4, str(folder))
    overflowed = 0.0
    for rank, results in enumerate(by_rank):
        for name, (expected, actual) in results.items():
            where = f"{name}, rank {rank}"
            is_padded = LAYOUTS[name][1].get("pad_expert_input_to_capacity", False)
            tolerance = {"rtol": 0.0, "atol": 0.0} if is_padded else {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(torch.tensor(actual.logs), torch.tensor(expected.logs), **tolerance, msg=where)
            assert actual.counts["cuda_graphs/captured"] == 2, where
            reruns = actual.counts.get("cuda_graphs/overflowed_steps", 0)
            assert actual.counts["cuda_graphs/eager_steps"] == 2 * WARMUP_STEPS + reruns, where
            assert "no capacity" in name or not reruns, where
            overflowed += reruns
            for parameter, value in actual.parameters.items():
                torch.testing.assert_close(value, expected.parameters[parameter], **tolerance, msg=where)
    assert overflowed > 0


def test_ranks_decide_alike(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, {"random"})
    by_rank = run_distributed_test(run_decisions, 4, str(folder / "random"))
    for rank, found in enumerate(by_rank):
        assert found["Uneven"]["cuda_graphs/replayed_steps"] == NUM_STEPS // 2 - WARMUP_STEPS
        assert found["Uneven"]["cuda_graphs/captured"] == 1
        assert found["MemoryEndsOnOneRank"]["cuda_graphs/eager_steps"] == NUM_STEPS
        assert ("not permitted" if rank == 2 else "on another process") in found["error"]
