"""Replicas (HSDP): training, resuming and collectives of eight ranks in replicas of four or two.

Losses, norms, gradients and parameters are those of one process, as in test_ted_exactness.py.
"""

import functools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ted_cases import (
    CONFIGS,
    Case,
    CollectiveCounter,
    Log,
    Run,
    Trained,
    assert_as_one_process,
    in_new_groups,
    load_sharded,
    messages_of,
    model_class,
    renew_groups,
    train,
    train_sharded,
    write_models,
)
from torch import Tensor
from transformers import Seq2SeqTrainingArguments

from hf_moe_ted import StepSnapshot, TedPlugin, TedSeq2SeqTrainer, ZCodeM3ForConditionalGeneration
from hf_moe_ted.distributed.layout import LAYERS_PER_UNIT
from hf_moe_ted.distributed.parallelize import deferred_reduction
from hf_moe_ted.testing import run_distributed_test

WORLD, FLOAT, NUM_EXPERTS = 8, 4, 4
TWO, FOUR = {"dp_replicate_size": 2}, {"dp_replicate_size": 4}
TP2, EP2, EP4 = {"tensor_parallel_size": 2}, {"expert_parallel_size": 2}, {"expert_parallel_size": 4}
CASES = {
    "ep2, twice in each replica, zero 3": Case(TWO | EP2 | {"zero_stage": 3}),
    "tp2 x ep2, once in each replica, zero 2": Case(TWO | TP2 | EP2 | {"zero_stage": 2}, model="top2", accumulation=2),
    "tp2, split experts, zero 1": Case(TWO | TP2, accumulation=2, checkpointing="communication-aware"),
    "ep4 over two replicas, zero 3": Case(FOUR | EP4 | {"zero_stage": 3}),
    "tp2 x ep4, each expert once": Case(TWO | TP2 | EP4, model="dropping"),
    "tp2 x ep2, offload": Case(TWO | TP2 | EP2 | {"offload": "cpu"}, model="random"),
    "mixtral, tp2 x ep2": Case(TWO | TP2 | EP2 | {"zero_stage": 2}, model="mixtral", accumulation=2),
}
STAGES = (1, 2, 3)
# layouts of a Trainer for the second and the third step; the first is of one process
STEPS: dict[int, dict[str, Any]] = {2: TWO | TP2 | {"zero_stage": 2}, 3: FOUR | EP4 | {"zero_stage": 3}}
BATCH_SIZE = 16


def run_again(model: Any, run: Run) -> float:
    """Each micro-batch is run, taken back and run, as where a bound on the load was not enough."""
    snapshot = StepSnapshot.take(model, keep_gradients=True)
    run()
    snapshot.restore()
    return run()


def train_with_snapshots(folder: str, case: Case) -> Trained:
    model, plugin = load_sharded(folder, case)
    return train(model, plugin, case, run_micro_batch=functools.partial(run_again, model))


def count_micro_batches(folder: str, stage: int) -> tuple[Log, Log, Log, Log]:
    """FSDP2's collectives in forward and backward of two micro-batches of one step, behind another such step."""
    plugin = TedPlugin(**TWO, **EP2, zero_stage=stage)  # type: ignore[arg-type]
    load: Any = ZCodeM3ForConditionalGeneration.from_pretrained
    model = load(folder, distributed_config=plugin.distributed_config).train()
    layout = plugin.distributed_config.layout
    ids = torch.randint(5, 96, (2, 7), generator=torch.Generator().manual_seed(0))
    logs: list[Log] = []

    def micro_batch() -> None:
        with CollectiveCounter() as forward:
            loss = model(input_ids=ids, labels=ids).loss
        with CollectiveCounter() as backward:
            loss.backward()
        logs.extend((forward.log, backward.log))

    for _ in range(2):
        with deferred_reduction(model, layout):
            micro_batch()
        micro_batch()
        model.zero_grad()
    first, second, third, fourth = (of_fsdp(log) for log in logs[4:])
    return first, second, third, fourth


def of_fsdp(log: Log) -> Log:
    return Counter({key: n for key, n in log.items() if key[0].startswith("c10d.")})


def rows(num_rows: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 96, (num_rows, 8), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row.flip(0)} for row in ids]


def run_trainer(
    folder: str, name: str, layout: dict[str, Any], num_steps: int, resumes: str | None = None
) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by step, each of which is saved."""
    plugin = TedPlugin(**layout)
    is_sharded = plugin.total_size > 1
    model = ZCodeM3ForConditionalGeneration.from_pretrained(
        f"{folder}/additive", **({"distributed_config": plugin.distributed_config} if is_sharded else {})
    )
    arguments = Seq2SeqTrainingArguments(
        f"{folder}/{name}", max_steps=num_steps, save_steps=1, logging_steps=1, lr_scheduler_type="constant",
        per_device_train_batch_size=BATCH_SIZE // plugin.data_parallel_size // 2, gradient_accumulation_steps=2,
        max_grad_norm=0.5, report_to=[], disable_tqdm=True, use_cpu=True, parallelism_config=plugin,
    )  # fmt: skip
    optimizer = plugin.tiled_adamw(lr=1e-2, eps=1e-3)
    trainer = TedSeq2SeqTrainer(model, arguments, train_dataset=rows(64), optimizer_cls_and_kwargs=optimizer)
    trainer.train(resume_from_checkpoint=resumes)
    return {log["step"]: (log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log}


def run_trainers(folder: str) -> dict[int, tuple[float, float]]:
    """Each goes on for a step from what the one before it has saved; the log of the last has all steps."""
    found, checkpoint = {}, f"{folder}/alone/checkpoint-1"
    for step, layout in in_new_groups(STEPS.items()):
        found = run_trainer(folder, f"until {step}", layout, step, checkpoint)
        checkpoint = f"{folder}/until {step}/checkpoint-{step}"
    return found


def refused(folder: str) -> dict[str, str]:
    config = TedPlugin(**FOUR, **EP4).distributed_config
    load = model_class(f"{folder}/mixtral").from_pretrained
    return messages_of(
        {
            "three replicas": lambda: TedPlugin(**TP2, dp_replicate_size=3),
            "mixtral": lambda: load(f"{folder}/mixtral", distributed_config=config),
        }
    )


def run_all(folder: str) -> dict[str, Any]:
    results: dict[str, Any] = {"trainers": run_trainers(folder)}
    renew_groups()
    results["collectives"] = {stage: count_micro_batches(f"{folder}/top1", stage) for stage in in_new_groups(STAGES)}
    for name, case in in_new_groups(CASES.items()):
        run = train_with_snapshots if case.accumulation > 1 and case.model == "top2" else train_sharded
        results[name] = run(f"{folder}/{case.model}", case)
    results["refused"] = refused(folder)
    return results


@dataclass(frozen=True)
class Launched:
    folder: Path
    alone: dict[int, tuple[float, float]]  # loss and gradient norm of a Trainer on one process
    by_rank: list[dict[str, Any]]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, {"top1", "additive", *(case.model for case in CASES.values())})
    alone = run_trainer(str(folder), "alone", {}, 3)
    return Launched(folder, alone, run_distributed_test(run_all, WORLD, str(folder)))


@pytest.mark.parametrize("name", CASES)
def test_as_one_process(launched: Launched, name: str) -> None:
    assert_as_one_process(launched.folder, CASES[name], [results[name] for results in launched.by_rank])


@pytest.mark.parametrize("stage", STAGES)
def test_collectives(launched: Launched, stage: int) -> None:
    """Parameters are gathered and gradients scattered over the ranks of a replica, four of dense layers and two of
    experts, in stages 1 and 2 once a step. Replicas sum shards, once a step: no whole parameter goes between them.
    """
    with torch.device("meta"):
        model: Any = ZCodeM3ForConditionalGeneration(CONFIGS["top1"]())
    stacks = [model.model.encoder.layers, model.model.decoder.layers]
    assert LAYERS_PER_UNIT >= 2
    units = [layer for stack in stacks for layer in stack] if stage == 3 else stacks
    numels = [(sum(p.numel() for n, p in unit.named_parameters() if ".experts." not in n), 4) for unit in units]
    numels.append((sum(p.numel() for name, p in model.named_parameters() if ".layers." not in name), 4))
    for stack in stacks:
        experts = sum(p.numel() for name, p in stack.named_parameters() if ".experts." in name)
        numels.append((experts // EP2["expert_parallel_size"], 2))
    gathered = Counter(("c10d._allgather_base_", numel * FLOAT // size) for numel, size in numels)
    scattered = Counter(("c10d._reduce_scatter_base_", numel * FLOAT) for numel, _ in numels)
    summed = Counter(("c10d.allreduce_", numel * FLOAT // size) for numel, size in numels)
    gathered_again = gathered if stage == 3 else Counter()
    nothing: Log = Counter()
    for results in (rank["collectives"][stage] for rank in launched.by_rank):
        first_forward, first_backward, last_forward, last_backward = results
        assert first_forward == gathered
        assert last_forward == (gathered if stage == 3 else nothing)  # nothing has changed since the first
        assert first_backward == gathered_again + (scattered if stage == 2 else nothing)
        assert last_backward == gathered_again + scattered + summed


def test_trainer_goes_on_in_other_layouts(launched: Launched) -> None:
    folder = str(launched.folder)
    resumed = run_trainer(folder, "alone from 2", {}, 3, f"{folder}/until 2/checkpoint-2")
    for logs in [resumed, *(results["trainers"] for results in launched.by_rank)]:
        assert [*logs] == [*launched.alone] == [1, 2, 3]  # those before the checkpoint are in its log
        for step, values in logs.items():
            assert values == pytest.approx(launched.alone[step], rel=1e-5), step


def test_what_cannot_be_is_refused_on_all_ranks(launched: Launched) -> None:
    for results in launched.by_rank:
        messages = results["refused"]
        assert "dp_replicate_size (3) must divide data_parallel_size (4)" in messages["three replicas"]
        assert "dp_replicate_size (4) with experts on more ranks (4) than a replica has (2)" in messages["mixtral"]
