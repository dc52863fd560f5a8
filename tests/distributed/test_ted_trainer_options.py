"""Options of the Trainer with a sharded model: as on one process, or refused by name."""

import functools
import os
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from ted_cases import in_new_groups, messages_of, model_class, renew_groups, write_models
from torch import Tensor, nn
from transformers import Seq2SeqTrainingArguments

from hf_moe_ted import TedPlugin, TedSeq2SeqTrainer
from hf_moe_ted.distributed.refusals import OPTIMIZERS
from hf_moe_ted.testing import run_distributed_test

NUM_STEPS, BATCH_SIZE = 2, 8
TP2_EP2 = {"tensor_parallel_size": 2, "expert_parallel_size": 2}
EP4 = {"expert_parallel_size": 4}

Options = dict[str, Any]  # arguments of training, and of the Trainer


def summed_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    logits = outputs.logits.flatten(0, 1)
    return nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum") / num_items_in_batch


def count(predicted: Any, compute_result: bool = True) -> dict[str, Any]:
    """Numbers of what arrives in the metrics, each sample once."""
    parts = {"predictions": predicted.predictions, "labels": predicted.label_ids, "inputs": predicted.inputs}
    return {f"{name}_sum": float(torch.as_tensor(part).sum()) for name, part in parts.items() if part is not None}


def best_words(logits: Any, labels: Tensor) -> Tensor:
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


METRICS = {"compute_metrics": count, "preprocess_logits_for_metrics": best_words}
WORKS: dict[str, Options] = {
    "label smoothing": {"label_smoothing_factor": 0.1},
    "a loss of one's own": {"compute_loss_func": summed_loss},
    "metrics": {**METRICS, "include_for_metrics": ["inputs"]},
    "metrics of each batch": {**METRICS, "batch_eval_metrics": True},
    "metrics, moved to the CPU": {**METRICS, "eval_accumulation_steps": 1},
    "reduce on plateau": {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1},
    **{name: {"optim": name} for name in OPTIMIZERS},
}
WORKS_OF_OTHERS = {name: WORKS[name] for name in ("label smoothing", "a loss of one's own")}
REFUSED: dict[str, tuple[Options, str]] = {
    "adafactor": ({"optim": "adafactor"}, "optim ('adafactor') does not work with a sharded model: give optimizer_cl"),
    "compiled": ({"torch_compile": True}, "leave torch_compile"),
    "float16": ({"fp16": True}, "mixed_precision ('fp16') must be 'no' or 'bf16' with a sharded model"),
    "evaluation in bfloat16": ({"bf16_full_eval": True}, "bf16_full_eval (True) does not work with a sharded model: "),
    "batch size": ({"auto_find_batch_size": True}, "auto_find_batch_size (True) does not work with a sharded model"),
    "JIT checkpoints": ({"enable_jit_checkpoint": True}, "enable_jit_checkpoint (True) does not work with a sharded"),
    "liger": ({"use_liger_kernel": True}, "use_liger_kernel (True) does not work with a sharded model"),
    "FSDP": ({"fsdp": "full_shard"}, "leave them, --use_fsdp"),
    "noisy embeddings": ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha (5.0) has no effect on ZCodeM3"),
    "uneven batches": ({"accelerator_config": {"even_batches": False}}, "must have even_batches True"),
    "dispatched batches": ({"accelerator_config": {"dispatch_batches": True}}, "and dispatch_batches None or False"),
}  # fmt: skip
METHODS = {
    "resize_token_embeddings": (128,),
    "set_input_embeddings": (nn.Embedding(96, 32),),
    "add_adapter": (None,),
    "push_to_hub": ("name",),
    "bfloat16": (),
}


def samples(num_samples: int, *, causal: bool) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(num_samples)
    ids = torch.randint(5, 96, (num_samples, 9), generator=generator)
    labels = ids if causal else torch.randint(5, 96, (num_samples, 7), generator=generator)
    return [{"input_ids": ids[sample], "labels": labels[sample]} for sample in range(num_samples)]


def trainer_of(folder: str, runs: str, layout: dict[str, int], options: Options) -> Any:
    plugin = TedPlugin(**layout)
    model = model_class(folder).from_pretrained(folder, distributed_config=plugin.distributed_config)
    causal = not model.config.is_encoder_decoder
    # ranks fill up their last batch with a sample of another, which metrics must not see; the loss of a batch has it
    num_evaluated = BATCH_SIZE - 1 if "compute_metrics" in options else BATCH_SIZE
    for_trainer = {k: v for k, v in options.items() if k.startswith(("compute_", "preprocess_"))}
    arguments = {
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": BATCH_SIZE // plugin.dp_shard_size,
        "per_device_eval_batch_size": BATCH_SIZE // plugin.dp_shard_size,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    } | {k: v for k, v in options.items() if k not in for_trainer}

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        shifted = {} if causal else {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(batch["labels"])}
        return {**batch, **shifted}

    return TedSeq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(runs, parallelism_config=plugin, **arguments),
        data_collator=collate,
        train_dataset=samples(NUM_STEPS * BATCH_SIZE, causal=causal),
        eval_dataset=samples(num_evaluated, causal=causal),
        optimizer_cls_and_kwargs=None if "optim" in options else plugin.tiled_adamw(lr=1e-2, eps=1e-3),
        **for_trainer,
    )


def numbers(folder: str, runs: str, layout: dict[str, int], options: Options) -> dict[str, float]:
    """All that is logged and evaluated."""
    trainer = trainer_of(folder, runs, layout, options)
    trainer.train()
    logged = [*trainer.state.log_history, trainer.evaluate()]
    return {
        f"{index} {name}": float(value)
        for index, log in enumerate(logged)
        for name, value in log.items()
        if name.endswith("_sum" if "compute_metrics" in options else ("loss", "norm", "_rate"))
    }


def run_all(folder: str, runs: str, mixtral: dict[str, int], zcode: dict[str, int]) -> dict[str, dict[str, float]]:
    found = {
        name: numbers(f"{folder}/additive", runs, zcode, options) for name, options in in_new_groups(WORKS.items())
    }
    for name, options in in_new_groups(WORKS_OF_OTHERS.items()):
        found[f"mixtral, {name}"] = numbers(f"{folder}/mixtral", runs, mixtral, options)
        found[f"mixtral, {name}, tp"] = numbers(f"{folder}/mixtral", runs, zcode, options)
    return found


def run_on_ranks(folder: str, runs: str) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """What works, and the messages of what does not."""
    works = run_all(folder, runs, EP4, TP2_EP2)
    messages = {}
    renew_groups()
    for name, (options, _) in in_new_groups(REFUSED.items()):
        attempt = functools.partial(trainer_of, f"{folder}/additive", runs, TP2_EP2, options)
        messages |= messages_of({name: attempt})
        os.environ.pop("ACCELERATE_USE_FSDP", None)  # which Accelerate leaves
    renew_groups()
    trainer = trainer_of(f"{folder}/additive", runs, TP2_EP2, {})
    attempts: dict[str, Any] = {
        name: lambda n=name, a=args: getattr(trainer.model, n)(*a) for name, args in METHODS.items()
    }
    attempts["hyperparameter_search"] = trainer.hyperparameter_search
    other = trainer_of(f"{folder}/mixtral", runs, TP2_EP2, {})
    adapted = peft.get_peft_model(other.model, peft.LoraConfig(target_modules=["q_proj"]))
    attempts["adapters"] = lambda: TedSeq2SeqTrainer(adapted, other.args)
    attempts["adapters, Accelerator"] = lambda: other.accelerator.prepare(adapted)
    return works, messages | messages_of(attempts)


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, dict[str, float]], list[Any]]:
    folder, runs = (str(tmp_path_factory.mktemp(name)) for name in ("models", "runs"))
    write_models(Path(folder), {"additive", "mixtral"})
    return run_all(folder, runs, {}, {}), run_distributed_test(run_on_ranks, 4, folder, runs)


@pytest.mark.parametrize("name", [*WORKS, *(f"mixtral, {name}{tp}" for name in WORKS_OF_OTHERS for tp in ("", ", tp"))])
def test_as_one_process(launched: tuple[dict[str, dict[str, float]], list[Any]], name: str) -> None:
    expected, by_rank = launched
    assert len(expected[name]) >= 2
    for works, _ in by_rank:
        assert works[name] == pytest.approx(expected[name], rel=1e-4)


def test_options_have_an_effect(launched: tuple[dict[str, dict[str, float]], list[Any]]) -> None:
    expected, _ = launched
    first_losses = {name: expected[name]["0 loss"] for name in ("label smoothing", "a loss of one's own")}
    assert first_losses["label smoothing"] != pytest.approx(first_losses["a loss of one's own"], rel=1e-4)
    assert [key.split(" ")[1] for key in expected["metrics"] if key.endswith("_sum")] == [
        "eval_predictions_sum",
        "eval_labels_sum",
        "eval_inputs_sum",
    ]


@pytest.mark.parametrize("name", REFUSED)
def test_refused_when_the_trainer_is_made(launched: tuple[Any, list[Any]], name: str) -> None:
    for _, messages in launched[1]:
        assert REFUSED[name][1] in messages[name]


@pytest.mark.parametrize("name", ["adapters", "adapters, Accelerator"])
def test_adapters_of_other_models_are_refused(launched: tuple[Any, list[Any]], name: str) -> None:
    for _, messages in launched[1]:
        assert "MixtralForCausalLM is sharded and has adapters, which only a sharded ZCodeM3 supports" in messages[name]


@pytest.mark.parametrize("name", [*METHODS, "hyperparameter_search"])
def test_refused_when_it_is_called(launched: tuple[Any, list[Any]], name: str) -> None:
    for _, messages in launched[1]:
        assert messages[name].startswith(f"{name} cannot be called ")
