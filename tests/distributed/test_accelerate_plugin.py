"""A training loop with a bare Accelerator and nothing but the plugin, on ranks and on one process."""

import contextlib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import ProjectConfiguration
from ted_cases import (
    ADAMW,
    MAX_NORM,
    CollectiveCounter,
    Parts,
    in_new_groups,
    messages_of,
    parts_of,
    relative_errors,
    write_models,
)
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset

from hf_moe_ted import TedPlugin, ZCodeM3ForConditionalGeneration
from hf_moe_ted.distributed.accelerate_plugin import TedAcceleratorMixin
from hf_moe_ted.testing import run_distributed_test

NUM_STEPS, SAVED_STEP, BATCH_SIZE, NUM_PARTS = 3, 2, 8, 4
TP2_EP2 = {"tensor_parallel_size": 2, "expert_parallel_size": 2}


@dataclass(frozen=True)
class Run:
    """Three steps of four micro-batches, which data-parallel ranks divide.

    Attributes:
        layout: arguments of TedPlugin.
        loads: the run whose state after the second step is the start.
        mixed_precision: of the Accelerator.
    """

    layout: dict[str, Any] = field(default_factory=dict)
    loads: str | None = None
    mixed_precision: str = "no"


TRAINED = {
    "ep4": Run({"expert_parallel_size": 4}),
    "tp2 x ep2": Run(TP2_EP2),
    "tp2 x ep2, zero 2": Run(TP2_EP2 | {"zero_stage": 2}),
    "tp2 x ep2, zero 3": Run(TP2_EP2 | {"zero_stage": 3}),
    "tp4": Run({"tensor_parallel_size": 4}),
    "bfloat16": Run(TP2_EP2, mixed_precision="bf16"),
}
LOADED = {
    "zero 3 on zero 3": Run(TP2_EP2 | {"zero_stage": 3}, loads="tp2 x ep2, zero 3"),
    "zero 3 on ep4": Run({"expert_parallel_size": 4}, loads="tp2 x ep2, zero 3"),
    "ep4 on tp4": Run({"tensor_parallel_size": 4}, loads="ep4"),
    "one process on tp2 x ep2": Run(TP2_EP2, loads="one process"),
}
RUNS = TRAINED | LOADED
RUNS_OF_ONE = {"zero 3 on one process": Run(TP2_EP2, loads="tp2 x ep2, zero 3")}


@dataclass(frozen=True)
class Outcome:
    """What a rank has after a run.

    Attributes:
        losses: of each step, the mean over the micro-batches of all ranks.
        norms: before clipping.
        parameters: after the last step.
        num_reductions: calls of FSDP2's reduce-scatter in the last step.
        learning_rate: behind the last step.
    """

    losses: list[float]
    norms: list[float]
    parameters: Parts
    num_reductions: int
    learning_rate: float


def samples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 96, (NUM_STEPS * BATCH_SIZE, 9), generator=generator)
    return [{"input_ids": row, "labels": row[:6]} for row in ids]


def accelerator_of(plugin: TedPlugin, **options: Any) -> Accelerator:
    """A new one: what an earlier one has left is forgotten."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    return Accelerator(cpu=True, parallelism_config=plugin, **options)


def train(models: str, states: str, name: str, run: Run) -> Outcome:
    plugin = TedPlugin(**run.layout)
    accumulation = NUM_PARTS // plugin.dp_shard_size
    accelerator = accelerator_of(
        plugin,
        gradient_accumulation_steps=accumulation,
        mixed_precision=run.mixed_precision,
        step_scheduler_with_optimizer=False,  # it would step once per process
    )
    load = ZCodeM3ForConditionalGeneration.from_pretrained
    model: Any = load(f"{models}/top2", distributed_config=plugin.distributed_config)
    optimizer_class, options = plugin.tiled_adamw(**ADAMW)
    optimizer = optimizer_class(model.parameters(), **options)
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    loader = DataLoader(samples(), batch_size=BATCH_SIZE // NUM_PARTS)
    model, optimizer, scheduler, loader = accelerator.prepare(model.train(), optimizer, scheduler, loader)
    first_step = 0
    if run.loads is not None:
        accelerator.load_state(f"{states}/{run.loads}")
        first_step = SAVED_STEP
        loader = accelerator.skip_first_batches(loader, first_step * accumulation)

    losses, norms, step_losses = [], [], []
    counter = CollectiveCounter()
    for batch in loader:
        is_last_step = first_step + len(losses) == NUM_STEPS - 1
        with accelerator.accumulate(model), counter if is_last_step else contextlib.nullcontext():
            loss = model(**batch).loss
            accelerator.backward(loss)
            step_losses.append(loss.detach())
            if accelerator.sync_gradients:
                norms.append(float(accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)))
            optimizer.step()
            if accelerator.sync_gradients:
                scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            losses.append(float(accelerator.gather(torch.stack(step_losses)).mean()))
            step_losses = []
            if first_step + len(losses) == SAVED_STEP and run.loads is None:
                accelerator.save_state(f"{states}/{name}")
    num_reductions = sum(n for (name, _), n in counter.log.items() if name == "c10d._reduce_scatter_base_")
    return Outcome(losses, norms, parts_of(dict(model.named_parameters())), num_reductions, scheduler.get_last_lr()[0])


def train_all(models: str, states: str, runs: dict[str, Run]) -> dict[str, Outcome]:
    return {name: train(models, states, name, run) for name, run in in_new_groups(runs.items())}


class Numbers(IterableDataset):
    def __iter__(self) -> Any:
        return iter(torch.arange(16.0))


@dataclass(frozen=True)
class Others:
    """What a rank has besides.

    Attributes:
        iterated: batches of an IterableDataset.
        norms: of the gradients, by their p.
        checkpoints: folders that Accelerate has named.
        errors: messages of what was refused.
    """

    iterated: list[list[float]]
    norms: dict[float, float]
    checkpoints: list[str]
    errors: dict[str, str]


def do_others(models: str, states: str) -> Others:
    plugin = TedPlugin(**TP2_EP2)
    project = ProjectConfiguration(project_dir=f"{states}/project", automatic_checkpoint_naming=True)
    accelerator = accelerator_of(plugin, project_config=project)
    load = ZCodeM3ForConditionalGeneration.from_pretrained
    model: Any = load(f"{models}/top2", distributed_config=plugin.distributed_config)
    optimizer_class, options = plugin.tiled_adamw(**ADAMW)
    model, _, loader = accelerator.prepare(
        model, optimizer_class(model.parameters(), **options), DataLoader(Numbers(), batch_size=4)
    )
    iterated = [batch.tolist() for batch in loader]

    ids = samples()[0]["input_ids"][None]
    accelerator.backward(model(input_ids=ids, labels=ids).loss)
    # the largest float is a norm that nothing exceeds
    largest = torch.finfo(torch.float32).max
    norms = {p: float(accelerator.clip_grad_norm_(model.parameters(), largest, norm_type=p)) for p in (1, 2, math.inf)}

    for _ in range(2):
        accelerator.save_state()
    again = load(f"{models}/top2", distributed_config=plugin.distributed_config)
    smaller = TedPlugin(**TP2_EP2)
    smaller.dp_shard_size = 1
    checkpoints = sorted(path.name for path in Path(states, "project", "checkpoints").iterdir())
    attempts = {
        "load without a folder": lambda: accelerator_of(plugin).load_state(),
        "load what is not there": lambda: accelerator.load_state(f"{states}/nothing"),
        "two models": lambda: (accelerator.prepare(again), accelerator.save_state(f"{states}/two")),
        "fewer processes": lambda: accelerator_of(smaller),
        "float16": lambda: accelerator_of(plugin, mixed_precision="fp16"),
    }
    return Others(iterated, norms, checkpoints, messages_of(attempts))


@dataclass(frozen=True)
class Launched:
    expected: Outcome
    by_rank: dict[str, list[Outcome]]
    others: list[Others]
    folder: Path


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    models, states = (str(tmp_path_factory.mktemp(name)) for name in ("models", "states"))
    write_models(Path(models), {"top2"})
    expected = train(models, states, "one process", Run())
    by_rank: dict[str, list[Outcome]] = {}
    for runs in (TRAINED, LOADED):
        results = run_distributed_test(train_all, 4, models, states, runs)
        by_rank |= {name: [outcomes[name] for outcomes in results] for name in runs}
    by_rank |= {name: [outcome] for name, outcome in train_all(models, states, RUNS_OF_ONE).items()}
    return Launched(expected, by_rank, run_distributed_test(do_others, 4, models, states), Path(models))


def test_one_process_is_a_plain_loop(launched: Launched) -> None:
    model: Any = ZCodeM3ForConditionalGeneration.from_pretrained(launched.folder / "top2").train()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW, foreach=False)
    parts = torch.utils.data.default_collate
    rows = samples()
    for step in range(NUM_STEPS):
        optimizer.param_groups[0]["lr"] = ADAMW["lr"] * 0.5**step
        losses = []
        for part in range(NUM_PARTS):
            first = step * BATCH_SIZE + part * BATCH_SIZE // NUM_PARTS
            loss = model(**parts(rows[first : first + BATCH_SIZE // NUM_PARTS])).loss
            (loss / NUM_PARTS).backward()
            losses.append(loss.item())
        assert sum(losses) / NUM_PARTS == pytest.approx(launched.expected.losses[step], rel=1e-6)
        norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        assert float(norm) == pytest.approx(launched.expected.norms[step], rel=1e-6)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", [name for name in RUNS | RUNS_OF_ONE if name != "bfloat16"])
def test_as_one_process(launched: Launched, name: str) -> None:
    expected = launched.expected
    first_step = 0 if (RUNS | RUNS_OF_ONE)[name].loads is None else SAVED_STEP
    whole = {key: parts[0][1] for key, parts in expected.parameters.items()}
    for outcome in launched.by_rank[name]:
        assert outcome.losses == pytest.approx(expected.losses[first_step:], rel=1e-5)
        assert outcome.norms == pytest.approx(expected.norms[first_step:], rel=1e-5)
        assert outcome.learning_rate == expected.learning_rate
    errors = relative_errors([outcome.parameters for outcome in launched.by_rank[name]], whole)
    assert {key: error for key, error in errors.items() if error > 1e-5} == {}


def test_bfloat16(launched: Launched) -> None:
    for outcome in launched.by_rank["bfloat16"]:
        assert outcome.losses == pytest.approx(launched.expected.losses, rel=0.02)
        assert outcome.losses != pytest.approx(launched.expected.losses, rel=1e-5)


def test_only_zero_2_reduces_after_each_micro_batch(launched: Launched) -> None:
    numbers = {name: launched.by_rank[name][0].num_reductions for name in RUNS}
    assert numbers["tp2 x ep2"] > 0
    assert numbers["tp2 x ep2, zero 2"] == 2 * numbers["tp2 x ep2"]  # of two micro-batches per rank
    assert numbers["tp4"] == 0


def test_data_ranks_iterate_over_other_batches(launched: Launched) -> None:
    by_rank = [others.iterated for others in launched.others]
    assert by_rank[0] == by_rank[1] == [[0, 1, 2, 3], [8, 9, 10, 11]]
    assert by_rank[2] == by_rank[3] == [[4, 5, 6, 7], [12, 13, 14, 15]]


def test_norms(launched: Launched) -> None:
    model: Any = ZCodeM3ForConditionalGeneration.from_pretrained(launched.folder / "top2")
    ids = samples()[0]["input_ids"][None]
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    expected = {p: float(nn.utils.get_total_norm(gradients, p)) for p in (1, 2, math.inf)}
    for others in launched.others:
        assert others.norms == pytest.approx(expected, rel=1e-5)


def test_named_checkpoints(launched: Launched) -> None:
    assert launched.others[0].checkpoints == ["checkpoint_0", "checkpoint_1"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("load without a folder", "input_dir is None: give the folder that save_state wrote"),
        ("load what is not there", "(input_dir) is no folder; give one that save_state wrote"),
        ("two models", "2 models and 1 optimizers are prepared"),
        (
            "fewer processes",
            "TedPlugin is for 2 processes (tensor_parallel_size 2 x data_parallel_size 1), but the Acc",
        ),
        ("float16", r"mixed_precision ('fp16') must be 'no' or 'bf16'"),
    ],
)
def test_refused(launched: Launched, name: str, message: str) -> None:
    for others in launched.others:
        assert message in others.errors[name]


def test_one_process_takes_all_sizes_as_one() -> None:
    plugin = TedPlugin(tensor_parallel_size=2, expert_parallel_size=4, offload="cpu")
    assert plugin.total_size == 1
    assert plugin.distributed_config.ep_size == 1
    assert not plugin.distributed_config.fsdp_cpu_offload
    assert isinstance(accelerator_of(plugin), TedAcceleratorMixin)
