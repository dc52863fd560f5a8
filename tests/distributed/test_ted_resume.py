"""A resumed run goes on as the saved one: random numbers, batches, optimizer; or an error says what is missing."""

import dataclasses
import hashlib
import itertools
import json
import os
import pickle
import random
import re
import shutil
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ted_cases import in_new_groups, write_models
from torch import Tensor
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback

from hf_moe_ted import TedPlugin, TedSeq2SeqTrainer, ZCodeM3ForConditionalGeneration
from hf_moe_ted.files import writing
from hf_moe_ted.testing import run_distributed_test

DP2, TP2 = {"expert_parallel_size": 2}, {"tensor_parallel_size": 2}
NUM_SAMPLES, BATCH_SIZE, NUM_STEPS, SAVED_STEP = 24, 8, 5, 4  # three steps per epoch


@dataclass(frozen=True)
class Run:
    """
    Attributes:
        layout: arguments of TedPlugin, `None` without one.
        resumes: the run whose checkpoint of step 4 is the start.
        arguments: of training.
        plain: whether the Trainer is that of transformers.
    """

    layout: dict[str, Any] | None = None
    resumes: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    plain: bool = False


LENGTHS = {"train_sampling_strategy": "group_by_length"}
COSTS = {"train_sampling_strategy": "batch_rebalance"}
ON_ONE = {
    "ted": Run(),
    "plain": Run(plain=True),
    "plain from ted": Run(resumes="ted", plain=True),
    "ted from plain": Run(resumes="plain"),
}
ON_TWO = {
    "dp2": Run(DP2),
    "dp2 from dp2": Run(DP2, "dp2"),
    "tp2 from dp2": Run(TP2, "dp2"),
    "tp2": Run(TP2),
    "dp2 from tp2": Run(DP2, "tp2"),
    "dp2 from ted": Run(DP2, "ted"),
    "tp2 from plain": Run(TP2, "plain"),
    "dp2 by length": Run(DP2, arguments=LENGTHS),
    "tp2 by length from dp2": Run(TP2, "dp2 by length", LENGTHS),
    "tp2 by cost": Run(TP2, arguments=COSTS),
}
FROM_BEFORE = {"dp2 from before": Run(DP2, "before"), "tp2 from before": Run(TP2, "before")}
BACK_ON_ONE = {"one from dp2": Run({}, "dp2"), "one by length from dp2": Run({}, "dp2 by length", LENGTHS)}


@dataclass(frozen=True)
class Outcome:
    """
    Attributes:
        saved, started: of the generators when step 4 was saved, and when the first step began.
        batches: samples of each batch, and the words that the collator drew for them.
        logs: loss and learning rate by step.
        num_updates: of the optimizer, those of the checkpoint included.
        rank_of_workers: what the seeds of the loader's workers depend on.
    """

    saved: str | None
    started: str | None
    batches: list[tuple[tuple[int, ...], int]]
    logs: dict[int, tuple[float, float]]
    num_updates: set[int]
    rank_of_workers: int


class Watch(TrainerCallback):
    saved: str | None = None
    started: str | None = None

    def on_save(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step == SAVED_STEP:
            self.saved = generators()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = self.started or generators()


def generators() -> str:
    """A digest of Python's, NumPy's and torch's."""
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    return hashlib.sha256(pickle.dumps(states)).hexdigest()


class Draw:
    """A collator that draws as many numbers as a batch has words, of all generators. It does not change the batch."""

    def __init__(self) -> None:
        self.batches: list[tuple[tuple[int, ...], int]] = []

    def __call__(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        num_words = sum(len(row["input_ids"]) for row in rows)
        drawn = int(torch.randint(1000, (num_words,)).sum())
        drawn += int(np.random.randint(1000, size=num_words).sum()) + random.choice(range(1000))
        self.batches.append((tuple(int(row["labels"][0]) for row in rows), drawn))
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad([row["input_ids"] for row in rows], batch_first=True, padding_value=1)
        labels = pad([row["labels"] for row in rows], batch_first=True, padding_value=-100)
        return {"input_ids": ids, "attention_mask": (ids != 1).long(), "labels": labels}


def rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(4, 10, (NUM_SAMPLES,), generator=generator).tolist()
    return [
        {
            "input_ids": torch.randint(5, 96, (length,), generator=generator),
            "labels": torch.tensor([5 + sample, *torch.randint(5, 96, (6,), generator=generator).tolist()]),
        }
        for sample, length in enumerate(lengths)
    ]


def run(folder: str, name: str, case: Run) -> Outcome:
    plugin = TedPlugin(**(case.layout or {}))
    is_distributed = plugin.total_size > 1
    model = ZCodeM3ForConditionalGeneration.from_pretrained(
        f"{folder}/additive", **({"distributed_config": plugin.distributed_config} if is_distributed else {})
    )
    arguments: dict[str, Any] = {
        "max_steps": NUM_STEPS,
        "save_steps": SAVED_STEP,
        "per_device_train_batch_size": BATCH_SIZE // plugin.dp_shard_size,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        **case.arguments,
        **({} if case.layout is None else {"parallelism_config": plugin}),
    }
    watch, collator = Watch(), Draw()
    trainer = (Seq2SeqTrainer if case.plain else TedSeq2SeqTrainer)(
        model,
        Seq2SeqTrainingArguments(f"{folder}/{name}", **arguments),
        train_dataset=rows(),
        data_collator=collator,
        callbacks=[watch],
    )
    trainer.train(resume_from_checkpoint=case.resumes and f"{folder}/{case.resumes}/checkpoint-{SAVED_STEP}")
    logs = {log["step"]: (log["loss"], log["learning_rate"]) for log in trainer.state.log_history if "loss" in log}
    num_updates = {int(state["step"]) for state in trainer.optimizer.state.values()}
    init: Any = trainer.get_train_dataloader().base_dataloader.worker_init_fn
    return Outcome(watch.saved, watch.started, collator.batches, logs, num_updates, init.keywords["rank"])


def run_all(folder: str, cases: dict[str, Run]) -> dict[str, Outcome]:
    return {name: run(folder, name, case) for name, case in in_new_groups(cases.items())}


def write_as_before(source: Path, target: Path) -> None:
    """A run as earlier versions wrote it: generators in the Trainer's file of each process."""
    shutil.copytree(source, target)
    checkpoint = target / f"checkpoint-{SAVED_STEP}"
    path = checkpoint / "training_state" / "training_state.pt"
    state = torch.load(path, weights_only=True)
    for process, generators in enumerate(state["extra"].pop("generators")):
        algorithm, keys, *rest = generators["numpy"]
        numpy_state = (algorithm, keys.numpy().astype(np.uint32), *rest)
        own = {"python": generators["python"], "numpy": numpy_state, "cpu": generators["cpu"]}
        torch.save(own, checkpoint / f"rng_state_{process}.pth")
    torch.save(state, path)


@dataclass(frozen=True)
class Launched:
    folder: Path
    outcomes: dict[str, list[Outcome]]  # by rank


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    folder = tmp_path_factory.mktemp("resume")
    write_models(folder, {"additive"})
    outcomes = {name: [outcome] for name, outcome in run_all(str(folder), ON_ONE).items()}
    two = run_distributed_test(run_all, 2, str(folder), ON_TWO)
    outcomes |= {name: [outcome[name] for outcome in two] for name in ON_TWO}
    outcomes |= {name: [outcome] for name, outcome in run_all(str(folder), BACK_ON_ONE).items()}
    write_as_before(folder / "dp2", folder / "before")
    before = run_distributed_test(run_all, 2, str(folder), FROM_BEFORE)
    outcomes |= {name: [outcome[name] for outcome in before] for name in FROM_BEFORE}
    return Launched(folder, outcomes)


@pytest.mark.parametrize(
    ("name", "saved_by"),
    [
        ("dp2 from dp2", [("dp2", 0), ("dp2", 1)]),
        ("tp2 from dp2", [("dp2", 0), ("dp2", 0)]),
        ("dp2 from tp2", [("tp2", 0), ("tp2", 0)]),
        ("dp2 from before", [("dp2", 0), ("dp2", 1)]),
        ("tp2 from before", [("dp2", 0), ("dp2", 0)]),
        ("dp2 from ted", [("ted", 0), ("ted", 0)]),
        ("tp2 from plain", [("plain", 0), ("plain", 0)]),
        ("one from dp2", [("dp2", 0)]),
        ("plain from ted", [("ted", 0)]),
        ("ted from plain", [("plain", 0)]),
    ],
)
def test_random_states_are_those_of_the_data_parallel_rank(
    launched: Launched, name: str, saved_by: list[tuple[str, int]]
) -> None:
    first, second = (outcome.saved for outcome in launched.outcomes["dp2"])
    assert first != second  # the batches have other numbers of words
    assert [outcome.rank_of_workers for outcome in launched.outcomes["dp2"]] == [0, 1]
    started = [outcome.started for outcome in launched.outcomes[name]]
    assert started == [launched.outcomes[source][rank].saved for source, rank in saved_by]


@pytest.mark.parametrize("name", [name for name in ON_TWO if name.startswith("tp2")])
def test_ranks_that_share_a_batch_make_it_alike(launched: Launched, name: str) -> None:
    first, second = launched.outcomes[name]
    assert first.batches == second.batches and first.batches
    assert (first.rank_of_workers, second.rank_of_workers) == (0, 0)


@pytest.mark.parametrize("name", ["tp2 by length from dp2", "one by length from dp2"])
def test_samples_of_a_resumed_epoch_are_those_of_the_saved_one(launched: Launched, name: str) -> None:
    """Step 5 is in the second epoch, of whose three steps the first was done."""
    whole = [outcome.batches for outcome in launched.outcomes["dp2 by length"]]
    expected = [first + second for (first, _), (second, _) in zip(*whole, strict=True)]
    assert sorted(expected[0] + expected[1] + expected[2]) == [*range(5, 5 + NUM_SAMPLES)]
    assert sorted(launched.outcomes[name][0].batches[0][0]) == sorted(expected[4])


def test_samples_of_equal_cost_are_spread_over_data_parallel_ranks(launched: Launched) -> None:
    batches = [samples for samples, _ in launched.outcomes["tp2 by cost"][0].batches]
    assert sorted(itertools.chain(*batches[:3])) == [*range(5, 5 + NUM_SAMPLES)]


@pytest.mark.parametrize("name", ["plain from ted", "ted from plain", "dp2 from ted", "tp2 from plain", "one from dp2"])
def test_other_trainers_and_layouts_go_on_with_optimizer_and_schedule(launched: Launched, name: str) -> None:
    expected = launched.outcomes["plain"][0].logs
    for outcome in launched.outcomes[name]:
        assert outcome.num_updates == {NUM_STEPS}
        assert outcome.logs.keys() == expected.keys()
        for step, values in outcome.logs.items():
            assert values == pytest.approx(expected[step], rel=1e-3), step


@pytest.mark.parametrize(
    ("source", "missing", "named"),
    [
        *((source, name, name) for source in ("ted", "plain") for name in ("optimizer.pt", "scheduler.pt")),
        *((source, "rng_state.pth", "rng_state.pth") for source in ("ted", "plain")),
        ("ted", "training_state", "training_state"),
        ("dp2", "training_state", "training_state"),
        ("dp2", "training_state/training_state.pt", "training_state"),
        ("dp2", "training_state/.metadata", "training_state"),
    ],
)
def test_what_is_missing_is_named(launched: Launched, tmp_path: Path, source: str, missing: str, named: str) -> None:
    checkpoint = tmp_path / f"checkpoint-{SAVED_STEP}"
    shutil.copytree(launched.folder / source / f"checkpoint-{SAVED_STEP}", checkpoint)
    path = checkpoint / missing
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    os.symlink(launched.folder / "additive", tmp_path / "additive")
    os.makedirs(tmp_path / "damaged")
    checkpoint.rename(tmp_path / "damaged" / checkpoint.name)
    layout: Any = {} if source == "dp2" else None
    with pytest.raises(ValueError, match=named):
        run(str(tmp_path), "again", Run(layout, "damaged"))


def test_a_description_that_is_damaged_is_named(launched: Launched, tmp_path: Path) -> None:
    os.symlink(launched.folder / "additive", tmp_path / "additive")
    shutil.copytree(launched.folder / "ted", tmp_path / "damaged")
    path = tmp_path / "damaged" / f"checkpoint-{SAVED_STEP}" / "training_state" / "whole_state.json"
    for content in ("{", "[]", json.dumps({"files": [3], "parameters": []}), json.dumps({"files": []})):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"whole_state\.json"):
            run(str(tmp_path), "again", Run(resumes="damaged"))


def test_adafactor_goes_on(launched: Launched, tmp_path: Path) -> None:
    os.symlink(launched.folder / "additive", tmp_path / "additive")
    options = Run(arguments={"optim": "adafactor"})
    whole = run(str(tmp_path), "first", options)
    resumed = run(str(tmp_path), "second", dataclasses.replace(options, resumes="first"))
    assert resumed.logs == whole.logs and resumed.num_updates == {NUM_STEPS}


def test_old_checkpoints_are_whole_or_gone(launched: Launched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.symlink(launched.folder / "additive", tmp_path / "additive")
    options = Run(arguments={"save_steps": 1, "save_total_limit": 2})

    def stop(path: Path) -> None:
        if path.exists():  # a checkpoint, of which a part is gone
            (path / "trainer_state.json").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(writing, "remove", stop)
        with pytest.raises(KeyboardInterrupt):
            run(str(tmp_path), "run", options)
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert [name for name in names if not name.startswith(".")] == ["checkpoint-2", "checkpoint-3"]
    assert any(name.startswith(".checkpoint-1.") for name in names)
    run(str(tmp_path), "run", options)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint-4", "checkpoint-5"]


def test_an_optimizer_with_parameters_of_something_else_is_saved_and_goes_on(
    launched: Launched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as those of a loss; the model is not sharded."""
    os.symlink(launched.folder / "additive", tmp_path / "additive")

    def create_optimizer(self: TedSeq2SeqTrainer, *_: Any) -> Any:
        other = torch.nn.Parameter(torch.ones(3))
        self.optimizer = torch.optim.AdamW([*self.model.parameters(), other], lr=1e-2)
        return self.optimizer

    monkeypatch.setattr(TedSeq2SeqTrainer, "create_optimizer", create_optimizer)
    whole = run(str(tmp_path), "first", Run())
    assert run(str(tmp_path), "second", Run(resumes="first")).logs == whole.logs


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_what_could_unfold_to_gigabytes_is_refused(launched: Launched, tmp_path: Path, name: str) -> None:
    os.symlink(launched.folder / "additive", tmp_path / "additive")
    shutil.copytree(launched.folder / "plain", tmp_path / "damaged")
    path = tmp_path / "damaged" / f"checkpoint-{SAVED_STEP}" / name
    with zipfile.ZipFile(path) as archive:
        entries = {entry: archive.read(entry) for entry in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)
    with pytest.raises(ValueError, match=rf"{re.escape(name)} has compressed content"):
        run(str(tmp_path), "again", Run(resumes="damaged"))
