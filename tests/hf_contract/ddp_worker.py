"""What each process of test_distributed.py trains."""

import functools
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments

from hf_moe_ted import ZCodeM3ForConditionalGeneration, ZCodeM3Tokenizer
from hf_moe_ted.models.router import ZCodeM3Router
from hf_moe_ted.testing import tiny_config

SOURCES = [f"{a}{b}{'ce' * (i % 2)}" for i, a in enumerate("abcdefgh") for b in "hifd"]
NUM_PER_STEP = 8
NUM_EVAL = 29

# Nothing that couples the tokens of a batch or draws random numbers: a batch is the sum of its parts.
ADDITIVE: dict[str, Any] = {"capacity_factor": None, "router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
# All of that.
NOISY: dict[str, Any] = {
    "dropout": 0.1,
    "min_capacity": 0,
    "router_noise_policy": "jitter",
    "router_aux_loss_coef": 1.0,
}

Result = dict[str, Any]


def new_model(config: dict[str, Any]) -> ZCodeM3ForConditionalGeneration:
    torch.manual_seed(0)
    return ZCodeM3ForConditionalGeneration(tiny_config(vocab_size=len(tokenizer()), init_std=0.1, **config))


@functools.cache
def tokenizer() -> ZCodeM3Tokenizer:
    return ZCodeM3Tokenizer(languages=["en", "de"], src_lang="en", tgt_lang="de")


def rows() -> list[dict[str, Any]]:
    encode = tokenizer()
    return [dict(encode(source, text_target=source.upper()[::-1])) for source in SOURCES]


def by_trainer(config: dict[str, Any], folder: Path, resume: str | None = None, **arguments: Any) -> Result:
    """Losses, gradient norms, evaluation and weights of the Seq2SeqTrainer."""
    model = new_model(config)
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": NUM_PER_STEP // int(os.environ.get("WORLD_SIZE", 1)),
        "per_device_eval_batch_size": NUM_PER_STEP // int(os.environ.get("WORLD_SIZE", 1)),
        "max_steps": 4,
        "optim": "sgd",
        "learning_rate": 0.2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "ddp_backend": "gloo" if "WORLD_SIZE" in os.environ else None,
        "predict_with_generate": True,
        "generation_max_length": 8,
    }
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(**{**defaults, **arguments}),
        train_dataset=rows(),
        eval_dataset=rows()[:NUM_EVAL],  # the ranks do not get equally many
        processing_class=tokenizer(),
        data_collator=DataCollatorForSeq2Seq(tokenizer(), model=model),
    )
    trainer.train(resume_from_checkpoint=resume)
    prediction = trainer.predict(trainer.eval_dataset)
    history = trainer.state.log_history
    return {
        "wrapped": isinstance(trainer.model_wrapped, DistributedDataParallel),
        "find_unused_parameters": getattr(trainer.model_wrapped, "find_unused_parameters", None),
        "loss": [entry["loss"] for entry in history if "loss" in entry],
        "grad_norm": [entry["grad_norm"] for entry in history if "grad_norm" in entry],
        # the rows that fill up the last batch of a rank come back as well
        "predictions": torch.as_tensor(prediction.predictions)[:NUM_EVAL],
        "weights": model.state_dict(),
    }


def by_accelerate(config: dict[str, Any], num_steps: int = 4) -> Result:
    """Losses and weights of a loop of one's own, and what DistributedDataParallel was given."""
    accelerator = Accelerator(cpu=True)
    model = new_model(config)
    collator = DataCollatorForSeq2Seq(tokenizer(), model=model)
    loader = DataLoader(rows(), batch_size=NUM_PER_STEP // accelerator.num_processes, collate_fn=collator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for _, batch in zip(range(num_steps), loader, strict=False):
        num_labels = accelerator.reduce((batch["labels"] != -100).sum())
        loss = model(**batch, num_items_in_batch=num_labels).loss * accelerator.num_processes
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    return {
        "wrapped": isinstance(model, DistributedDataParallel),
        "find_unused_parameters": getattr(model, "find_unused_parameters", None),
        "loss": losses,
        "weights": accelerator.unwrap_model(model).state_dict(),
    }


def with_idle_experts(experts_implementation: str) -> Result:
    """Two steps in which a rank sends all of its tokens to the expert of its number."""
    rank = torch.distributed.get_rank()
    model = new_model(ADDITIVE)
    model.set_experts_implementation(experts_implementation)
    for module in model.modules():
        if isinstance(module, ZCodeM3Router):
            module._choices = lambda logits, probs: torch.full_like(logits[:, :1], rank, dtype=torch.int64)
    parallel = DistributedDataParallel(model)
    batch = DataCollatorForSeq2Seq(tokenizer(), model=model)(rows()[rank::2])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(2):
        optimizer.zero_grad()
        parallel(**batch).loss.backward()
        optimizer.step()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"gradients": gradients, "weights": model.state_dict()}


# Name of a run -> the model's config and the trainer's arguments.
TRAINER_RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dense": ({**ADDITIVE, "encoder_sparse_step": 0, "decoder_sparse_step": 0}, {}),
    "top1": (ADDITIVE, {}),
    "top2": ({**ADDITIVE, "num_experts_per_tok": 2, "use_residual": True}, {"ddp_find_unused_parameters": False}),
    "accumulating": (ADDITIVE, {"gradient_accumulation_steps": 2, "max_steps": 2}),
    "checkpointing": (ADDITIVE, {"activation_checkpointing": True}),
}


def results_of(folder: Path) -> dict[str, Result]:
    results = {name: by_trainer(config, folder, **options) for name, (config, options) in TRAINER_RUNS.items()}
    results["noisy"] = by_trainer(NOISY, folder, save_strategy="steps", save_steps=2)
    results["resumed"] = by_trainer(NOISY, folder, resume=str(folder / "checkpoint-2"))
    results["accelerate"] = by_accelerate(ADDITIVE)
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        results[f"idle_{implementation}"] = with_idle_experts(implementation)
    return results
