"""Trainers that teach a tiny model to write words backwards."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from hf_moe_ted import ZCodeM3ForConditionalGeneration, ZCodeM3Tokenizer
from hf_moe_ted.testing import tiny_config

Model = ZCodeM3ForConditionalGeneration
Rows = list[dict[str, list[int]]]

# Sources of 2 or 4 letters. A translation is the source backwards in capitals: its length differs between the batches.
SOURCES = [f"{a}{b}{'ce' * (i % 2)}" for i, a in enumerate("abcdefgh") for b in "hifd"]
TARGETS = [source.upper()[::-1] for source in SOURCES]

# Everything in the model that draws random numbers or couples the tokens of a batch.
NOISY = {
    "dropout": 0.1,
    "activation_dropout": 0.1,
    "min_capacity": 0,
    "router_noise_policy": "jitter",
    "router_jitter_noise": 0.1,
}
# Nothing of that, so that a batch is the sum of its parts.
ADDITIVE = {"capacity_factor": None, "router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}


@pytest.fixture(scope="module")
def tokenizer() -> ZCodeM3Tokenizer:
    return ZCodeM3Tokenizer(languages=["en", "de"], src_lang="en", tgt_lang="de")


@pytest.fixture(scope="module")
def rows(tokenizer: ZCodeM3Tokenizer) -> Rows:
    return [dict(tokenizer(source, text_target=target)) for source, target in zip(SOURCES, TARGETS, strict=True)]


class Trainers:
    """Makes trainers that differ in what a test is about and in nothing else."""

    def __init__(self, tokenizer: ZCodeM3Tokenizer, rows: Rows, folder: Path):
        self.tokenizer = tokenizer
        self.rows = rows
        self.folder = folder

    def model(self, seed: int = 0, **config: Any) -> Model:
        torch.manual_seed(seed)
        return Model(tiny_config(**{"vocab_size": len(self.tokenizer), "init_std": 0.1, **config}))

    def __call__(
        self,
        config: dict[str, Any],
        seed: int = 0,
        trainer_class: type[Trainer] = Seq2SeqTrainer,
        parts: dict[str, Any] | None = None,
        **arguments: Any,
    ) -> Any:
        """A trainer of a new model with weights of a seed; `parts` go to it, `arguments` to its arguments."""
        parts = parts or {}
        model = parts["model"] if "model" in parts else self.model(seed, **config)
        defaults = {
            "output_dir": str(self.folder),
            "per_device_train_batch_size": 16,
            "per_device_eval_batch_size": 8,
            "max_steps": 6,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
        }
        arguments_class = Seq2SeqTrainingArguments if issubclass(trainer_class, Seq2SeqTrainer) else TrainingArguments
        default_parts = {
            "model": model,
            "args": arguments_class(**{**defaults, **arguments}),
            "train_dataset": self.rows,
            "eval_dataset": self.rows,
            "processing_class": self.tokenizer,
            "data_collator": DataCollatorForSeq2Seq(self.tokenizer, model=model),
        }
        return trainer_class(**{**default_parts, **parts})


@pytest.fixture
def trainers(tokenizer: ZCodeM3Tokenizer, rows: Rows, tmp_path: Path) -> Trainers:
    return Trainers(tokenizer, rows, tmp_path)


def logged(trainer: Trainer, name: str) -> list[float]:
    """What the trainer logged under a name, one number per step."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def trained(trainer: Any, **kwargs: Any) -> Any:
    trainer.train(**kwargs)
    return trainer
