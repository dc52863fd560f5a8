"""Training, checkpoints, resuming and evaluation with the Trainer, on every layout, as one process does it."""

import itertools
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ted_cases import ADAMW, Parts, in_new_groups, parts_of, relative_errors, write_models
from torch import Tensor
from transformers import Seq2SeqTrainingArguments

from hf_moe_ted import TedPlugin, TedSeq2SeqTrainer, TedTrainer, ZCodeM3ForConditionalGeneration
from hf_moe_ted.testing import run_distributed_test

NUM_STEPS, BATCH_SIZE = 3, 8
TP2_EP2 = {"tensor_parallel_size": 2, "expert_parallel_size": 2}


@dataclass(frozen=True)
class Run:
    """Training of three steps.

    Attributes:
        layout: arguments of TedPlugin.
        arguments: of training.
        resumes: the run whose checkpoint of step 2 is the start.
        is_tiled: whether the optimizer is TiledAdamW.
        generates: whether it is evaluated by what it generates, too.
        begins_with_evaluation: of the model before training, which leaves gathered parameters behind.
    """

    layout: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    resumes: str | None = None
    is_tiled: bool = True
    generates: bool = False
    begins_with_evaluation: bool = False


TRAINED = {
    "ep4": Run({"expert_parallel_size": 4}, generates=True),
    "tp2 x ep2, zero 2": Run(
        TP2_EP2 | {"zero_stage": 2},
        {"gradient_accumulation_steps": 2, "activation_checkpointing": True},
        begins_with_evaluation=True,
    ),
    "tp2 x ep2, zero 3": Run(TP2_EP2 | {"zero_stage": 3}, {"gradient_accumulation_steps": 2}, generates=True),
    "tp4": Run({"tensor_parallel_size": 4}, generates=True),
    "ep4, the Trainer's AdamW": Run({"expert_parallel_size": 4}, is_tiled=False, begins_with_evaluation=True),
}
RESUMED = {
    "tp2 x ep2, zero 3 on ep4": Run({"expert_parallel_size": 4}, resumes="tp2 x ep2, zero 3"),
    "tp2 x ep2, zero 3 on tp4, etp2": Run(
        {"tensor_parallel_size": 4, "expert_parallel_size": 2, "expert_tensor_parallel_size": 2},
        resumes="tp2 x ep2, zero 3",
    ),
    "ep4, the Trainer's AdamW on tp4": Run(
        {"tensor_parallel_size": 4}, resumes="ep4, the Trainer's AdamW", is_tiled=False
    ),
}
RESUMED_ON_EIGHT = {
    "tp2 x ep2, zero 3 on tp2 x ep4": Run(TP2_EP2 | {"expert_parallel_size": 4}, resumes="tp2 x ep2, zero 3")
}
RESUMED_ON_ONE = {
    "tp2 x ep2, zero 3 on one": Run(TP2_EP2, resumes="tp2 x ep2, zero 3"),
    "ep4, the Trainer's AdamW on one": Run(resumes="ep4, the Trainer's AdamW", is_tiled=False),
}


@dataclass(frozen=True)
class Outcome:
    """What a rank has after a run.

    Attributes:
        losses, norms: of each step, those from the checkpoint included.
        greedy, beams: sentences of each evaluated sample.
        eval_loss: of eight samples in one batch over all ranks.
    """

    losses: list[float]
    norms: list[float]
    greedy: list[list[int]]
    beams: list[list[int]]
    eval_loss: float


def samples(num_samples: int, seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 96, (num_samples, 9), generator=generator)
    labels = torch.randint(5, 96, (num_samples, 7), generator=generator)
    mask = torch.ones_like(ids)
    for sample in range(num_samples):
        mask[sample, 9 - sample % 4 :] = 0
        labels[sample, 7 - sample % 3 :] = -100
    ids[mask == 0] = 1
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return [{name: value[sample] for name, value in batch.items()} for sample in range(num_samples)]


def trainer_of(model_folder: str, folder: str, run: Run, trainer_class: Any = TedSeq2SeqTrainer) -> Any:
    plugin = TedPlugin(**run.layout)
    model = ZCodeM3ForConditionalGeneration.from_pretrained(model_folder, distributed_config=plugin.distributed_config)
    num_batches = plugin.dp_shard_size * run.arguments.get("gradient_accumulation_steps", 1)
    arguments: dict[str, Any] = {
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": BATCH_SIZE // num_batches,
        "per_device_eval_batch_size": 2,
        "learning_rate": ADAMW["lr"],
        "adam_epsilon": ADAMW["eps"],
        "weight_decay": ADAMW["weight_decay"],
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "save_steps": 2,
        "activation_checkpointing_kwargs": plugin.activation_checkpointing_kwargs,
        "predict_with_generate": True,
        "generation_max_length": 6,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    if not issubclass(trainer_class, TedSeq2SeqTrainer):
        arguments = {k: v for k, v in arguments.items() if k not in ("predict_with_generate", "generation_max_length")}
    arguments |= run.arguments
    return trainer_class(
        model=model,
        args=Seq2SeqTrainingArguments(folder, parallelism_config=plugin, **arguments),
        train_dataset=samples(NUM_STEPS * BATCH_SIZE, seed=5),
        eval_dataset=samples(BATCH_SIZE, seed=6),
        optimizer_cls_and_kwargs=plugin.tiled_adamw(**ADAMW) if run.is_tiled else None,
    )


def train(model_folder: str, runs_folder: str, name: str, run: Run) -> Outcome:
    trainer = trainer_of(model_folder, f"{runs_folder}/{name}", run)
    if run.begins_with_evaluation:
        trainer.evaluate()
    trainer.train(resume_from_checkpoint=run.resumes and f"{runs_folder}/{run.resumes}/checkpoint-2")
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    assert [log["step"] for log in logs] == [*range(1, NUM_STEPS + 1)]
    greedy, beams = [], []
    if run.generates:  # 5 samples in batches of 2: ranks get some twice to fill up their last batch
        greedy, beams = (trainer.predict(samples(5, seed=6), num_beams=n).predictions.tolist() for n in (1, 2))
    trainer.args.predict_with_generate = False
    trainer.args.per_device_eval_batch_size = BATCH_SIZE // trainer.args.parallelism_config.dp_shard_size
    eval_loss = trainer.evaluate()["eval_loss"]
    return Outcome([log["loss"] for log in logs], [log["grad_norm"] for log in logs], greedy, beams, eval_loss)


def train_all(model_folder: str, runs_folder: str, runs: dict[str, Run]) -> dict[str, Outcome]:
    return {name: train(model_folder, runs_folder, name, run) for name, run in in_new_groups(runs.items())}


@dataclass(frozen=True)
class Others:
    """What a rank has after other runs.

    Attributes:
        parameters: of the model that `save_model` wrote.
        best_loss, loaded_loss: in evaluation, at the best checkpoint and of the model that was loaded from it.
        bfloat16, plain: losses of steps in bfloat16, and of TedTrainer.
        plain_predictions: the shape of the logits that TedTrainer predicts.
    """

    parameters: Parts
    best_loss: float
    loaded_loss: float
    bfloat16: list[float]
    plain: list[float]
    plain_predictions: tuple[int, ...]


def run_others(model_folder: str, runs_folder: str) -> Others:
    best = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_earliness",
        "greater_is_better": True,
        "predict_with_generate": False,
    }
    trainer = trainer_of(model_folder, f"{runs_folder}/best", Run(TP2_EP2, best))
    num_evaluations = itertools.count()
    trainer.compute_metrics = lambda predicted: {"earliness": -next(num_evaluations)}
    trainer.train()
    best_loss = next(log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log)
    loaded_loss = trainer.evaluate()["eval_loss"]
    trainer.save_model(f"{runs_folder}/saved")
    parameters = parts_of(dict(trainer.model.named_parameters()))

    trainer = trainer_of(
        model_folder, f"{runs_folder}/bf16", Run(TP2_EP2, {"bf16": True, "save_strategy": "no", "max_steps": 2})
    )
    trainer.train()
    bfloat16 = [log["loss"] for log in trainer.state.log_history if "loss" in log]

    options = {"save_strategy": "no", "max_steps": 1}
    plain = trainer_of(model_folder, f"{runs_folder}/plain", Run(TP2_EP2, options), trainer_class=TedTrainer)
    plain.train()
    predictions = plain.predict(plain.eval_dataset).predictions
    return Others(
        parameters,
        best_loss,
        loaded_loss,
        bfloat16,
        [log["loss"] for log in plain.state.log_history if "loss" in log],
        predictions[0].shape,
    )


def on_four(model_folder: str, runs_folder: str) -> tuple[dict[str, Outcome], Others]:
    return train_all(model_folder, runs_folder, TRAINED | RESUMED), run_others(model_folder, runs_folder)


@dataclass(frozen=True)
class Launched:
    model: Path
    runs: Path
    expected: Outcome
    by_rank: dict[str, list[Outcome]]
    others: list[Others]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    folder = tmp_path_factory.mktemp("trainer")
    model, runs = folder / "additive", folder / "runs"
    write_models(folder, {"additive"})
    expected = train(str(model), str(runs), "one process", Run(generates=True))
    four = run_distributed_test(on_four, 4, str(model), str(runs))
    eight = run_distributed_test(train_all, 8, str(model), str(runs), RESUMED_ON_EIGHT)
    by_rank = {name: [outcomes[name] for outcomes, _ in four] for name in TRAINED | RESUMED}
    by_rank |= {name: [outcomes[name] for outcomes in eight] for name in RESUMED_ON_EIGHT}
    by_rank |= {name: [o] for name, o in train_all(str(model), str(runs), RESUMED_ON_ONE).items()}
    return Launched(model, runs, expected, by_rank, [others for _, others in four])


RUNS = TRAINED | RESUMED | RESUMED_ON_EIGHT | RESUMED_ON_ONE


@pytest.mark.parametrize("name", RUNS)
def test_as_one_process(launched: Launched, name: str) -> None:
    for outcome in launched.by_rank[name]:
        assert outcome.losses == pytest.approx(launched.expected.losses, rel=1e-5)
        assert outcome.norms == pytest.approx(launched.expected.norms, rel=1e-5)
        assert outcome.eval_loss == pytest.approx(launched.expected.eval_loss, rel=1e-5)


@pytest.mark.parametrize("name", [name for name, run in TRAINED.items() if run.generates])
def test_generated_sentences(launched: Launched, name: str) -> None:
    """Of each sample once, in order, on all ranks."""
    assert len(launched.expected.greedy) == 5
    assert len({*map(tuple, launched.expected.greedy)}) == 5
    assert launched.expected.greedy != launched.expected.beams
    for outcome in launched.by_rank[name]:
        assert outcome.greedy == launched.expected.greedy
        assert outcome.beams == launched.expected.beams


@pytest.mark.parametrize("name", TRAINED)
def test_checkpoint(launched: Launched, name: str) -> None:
    """Nothing is beside the two, and the last is an ordinary folder of one process."""
    assert sorted(os.listdir(launched.runs / name)) == ["checkpoint-2", "checkpoint-3"]
    checkpoints = [launched.runs / run / "checkpoint-3" for run in (name, "one process")]
    models = [ZCodeM3ForConditionalGeneration.from_pretrained(checkpoint) for checkpoint in checkpoints]
    parameters, expected = (dict(model.named_parameters()) for model in models)
    errors = relative_errors([parts_of(parameters)], {key: value.detach() for key, value in expected.items()})
    assert {key: error for key, error in errors.items() if error > 1e-5} == {}


def test_saved_model_is_that_of_the_ranks(launched: Launched) -> None:
    model, info = ZCodeM3ForConditionalGeneration.from_pretrained(launched.runs / "saved", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    expected = {name: parameter.detach() for name, parameter in model.named_parameters()}
    errors = relative_errors([others.parameters for others in launched.others], expected)
    assert {*errors.values()} == {0.0}


def test_best_model_is_loaded_and_old_checkpoints_go(launched: Launched) -> None:
    assert sorted(os.listdir(launched.runs / "best")) == ["checkpoint-1", "checkpoint-3"]
    for others in launched.others:
        assert others.loaded_loss == pytest.approx(others.best_loss, rel=1e-6)


def test_bfloat16(launched: Launched) -> None:
    for others in launched.others:
        assert others.bfloat16 == pytest.approx(launched.expected.losses[:2], rel=0.02)
        assert others.bfloat16 != launched.expected.losses[:2]


def test_plain_trainer(launched: Launched) -> None:
    for others in launched.others:
        assert others.plain == pytest.approx(launched.expected.losses[:1], rel=1e-5)
        assert others.plain_predictions == (BATCH_SIZE, 7, 96)


class KilledTrainer(TedSeq2SeqTrainer):
    """One rank is gone in the middle of the second checkpoint."""

    killed_in: tuple[str, int]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self._die("before the optimizer")
        super()._save_optimizer_and_scheduler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self._die("behind the optimizer")

    def _die(self, place: str) -> None:
        if self.state.global_step == 2 and self.killed_in == (place, dist.get_rank()):
            os._exit(1)


def train_killed(model_folder: str, folder: str, killed_in: tuple[str, int]) -> None:
    run = Run({"tensor_parallel_size": 2}, {"save_steps": 1})
    trainer = trainer_of(model_folder, folder, run, trainer_class=KilledTrainer)
    trainer.killed_in = killed_in
    trainer.train()


@pytest.mark.parametrize("killed_in", [("before the optimizer", 0), ("behind the optimizer", 1)])
def test_a_kill_leaves_the_previous_checkpoint(launched: Launched, tmp_path: Path, killed_in: tuple[str, int]) -> None:
    with pytest.raises(RuntimeError, match=r"died without a traceback|failed:"):
        run_distributed_test(train_killed, 2, str(launched.model), str(tmp_path), killed_in, timeout_s=60)
    assert [name for name in os.listdir(tmp_path) if not name.startswith(".")] == ["checkpoint-1"]
    trainer = trainer_of(str(launched.model), str(tmp_path), Run(arguments={"save_steps": 1}))
    trainer.train(resume_from_checkpoint=True)
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses == pytest.approx(launched.expected.losses, rel=1e-5)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]  # and nothing half-written


def test_two_optimizers_are_refused() -> None:
    with pytest.raises(ValueError, match="give only one of optimizers and optimizer_cls_and_kwargs"):
        TedTrainer(optimizers=(torch.optim.SGD([torch.ones(1)], lr=1.0), None), optimizer_cls_and_kwargs=(object, {}))
