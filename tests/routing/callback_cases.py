"""Trainers that learn nothing, under callbacks that watch what their routers do."""

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_moe_ted import ZCodeM3ForConditionalGeneration
from hf_moe_ted.testing import tiny_config

LAYERS = ("encoder.1", "encoder.3", "decoder.1")
# Nothing random, so that a second forward of the same batch has the same routings; no learning, so of any step.
SETTLED = {"num_experts_per_tok": 2, "token_drop_policy": "position", "capacity_factor": 0.6, "min_capacity": 0}


class Reporter(TrainerCallback):
    """Keeps what a reporter such as TensorBoard gets."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.logs.append(dict(logs))


def settled_trainer(
    folder: Path, rows: list[dict[str, Any]], config: dict[str, Any], reporter: Reporter | None, **arguments: Any
) -> Trainer:
    """A trainer and evaluator of a new model on the rows, all of them a batch."""
    torch.manual_seed(0)
    model = ZCodeM3ForConditionalGeneration(tiny_config(init_std=0.2, **config))
    defaults: dict[str, Any] = {"per_device_train_batch_size": len(rows), "learning_rate": 0.0, "max_steps": 1}
    defaults |= {"train_sampling_strategy": "sequential"}  # who is dropped depends on the order in the batch
    defaults |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False}
    args = TrainingArguments(str(folder), **{**defaults, "logging_steps": 1, **arguments})
    callbacks = None if reporter is None else [reporter]
    return Trainer(model, args, train_dataset=rows, eval_dataset=rows, callbacks=callbacks)
