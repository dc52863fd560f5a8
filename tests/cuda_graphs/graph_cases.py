"""Trainings whose steps are replayed, and the same from Python."""

from pathlib import Path
from typing import Any

import torch
from fake_recorder import RecordsWithoutGpu
from torch import Tensor
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback

from hf_moe_ted import (
    CudaGraphSeq2SeqTrainingArguments,
    CudaGraphsTrainerMixin,
    ZCodeM3ForConditionalGeneration,
)
from hf_moe_ted.testing import tiny_config

SHAPES = [(5, 4), (7, 6)]  # source and target


class Graphed(RecordsWithoutGpu, CudaGraphsTrainerMixin, Seq2SeqTrainer):
    """Replays on a CPU."""


class Norms(TrainerCallback):
    """Keeps gradients as the optimizer gets them."""

    def __init__(self) -> None:
        self.of_step: list[list[Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.of_step.append([p.grad.clone() for p in kwargs["model"].parameters() if p.grad is not None])


def new_model(**config: Any) -> ZCodeM3ForConditionalGeneration:
    torch.manual_seed(0)
    return ZCodeM3ForConditionalGeneration(tiny_config(**{"dropout": 0.1, "capacity_factor": 1.0, **config}))


def rows(num_batches: int, batch_size: int = 2) -> list[dict[str, Tensor]]:
    """Batches of shapes in turn, each of rows of one shape, some with padding."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for number in range(num_batches * batch_size):
        source, target = SHAPES[number // batch_size % len(SHAPES)]
        ids = torch.randint(10, 60, (source,), generator=generator)
        labels = torch.randint(10, 60, (target,), generator=generator)
        labels[target - number % 3 :] = -100
        mask = torch.ones_like(ids)
        mask[source - number % 2 :] = 0
        decoder_ids = torch.cat([torch.tensor([2]), labels[:-1].clamp(min=1)])
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels, "decoder_input_ids": decoder_ids})
    return made


class InOrder(Seq2SeqTrainer):
    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


class GraphedInOrder(Graphed, InOrder):
    pass


def trainer_of(
    folder: Path, kind: type[Trainer] = GraphedInOrder, num_batches: int = 20, model: Any = None, **options: Any
) -> Any:
    defaults: dict[str, Any] = {"per_device_train_batch_size": 2, "num_train_epochs": 1, "logging_steps": 1}
    defaults |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False}
    defaults |= {"remove_unused_columns": False, "learning_rate": 1e-2, "cuda_graphs": issubclass(kind, Graphed)}
    args = CudaGraphSeq2SeqTrainingArguments(str(folder), **{**defaults, **options})
    norms = Norms()
    trainer = kind(
        new_model() if model is None else model, args, train_dataset=rows(num_batches), callbacks=[norms],
        data_collator=lambda batch: {name: torch.stack([row[name] for row in batch]) for name in batch[0]},
    )  # fmt: skip
    trainer.norms = norms
    return trainer


def logged(trainer: Any) -> list[tuple[float, float]]:
    return [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log]


def assert_same_training(actual: Any, expected: Any) -> None:
    assert logged(actual) == logged(expected)
    for name, parameter in actual.model.named_parameters():
        torch.testing.assert_close(parameter, expected.model.get_parameter(name), rtol=0, atol=0, msg=name)
    for got, wanted in zip(actual.norms.of_step, expected.norms.of_step, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
