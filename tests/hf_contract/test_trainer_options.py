"""The options of the Trainer, and accelerate, none of it subclassed. test_trainer.py is about the training."""

import copy
import functools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from trainer_cases import ADDITIVE, NOISY, SOURCES, Model, Trainers, logged, trained
from transformers import (
    DataCollatorForSeq2Seq,
    EarlyStoppingCallback,
    EvalPrediction,
    GenerationConfig,
    Seq2SeqTrainer,
    Trainer,
    TrainerCallback,
)

from hf_moe_ted import ZCodeM3Tokenizer
from hf_moe_ted.testing import tiny_config

Metrics = dict[str, float]


def unequal(a: torch.nn.Module, b: torch.nn.Module) -> list[str]:
    states = a.state_dict(), b.state_dict()
    assert states[0].keys() == states[1].keys()
    return [name for name, tensor in states[0].items() if not torch.equal(tensor, states[1][name])]


def scripted(values: Iterable[float]) -> Callable[[EvalPrediction], Metrics]:
    """A metric with given values, whatever the predictions."""
    remaining = iter(values)
    return lambda prediction: {"score": next(remaining)}


def smoothed_loss(trainer: Any, epsilon: float) -> float:
    """Cross-entropy of all rows with label smoothing; the model of an additive config, in evaluation."""
    batch = trainer.data_collator(trainer.train_dataset)
    with torch.no_grad():
        logits = trainer.model.eval()(**batch).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), label_smoothing=epsilon)
    return loss.item()


@pytest.mark.parametrize("router_loss_coef", [0.0, 1.0])
def test_label_smoothing_of_the_trainer(trainers: Trainers, router_loss_coef: float) -> None:
    """It takes the labels away from the model: the loss is a cross-entropy without router losses."""
    coefs = {"router_aux_loss_coef": router_loss_coef, "router_z_loss_coef": router_loss_coef}
    config = {**ADDITIVE, **coefs, "init_std": 0.5}
    options = {"max_steps": 1, "label_smoothing_factor": 0.3, "learning_rate": 0.0}
    trainer = trainers(config, per_device_train_batch_size=32, **options)
    expected = smoothed_loss(trainer, 0.3)
    assert expected != pytest.approx(smoothed_loss(trainer, 0.0), rel=1e-3)
    assert logged(trained(trainer), "loss") == [pytest.approx(expected, rel=1e-5)]
    parts = trained(trainers(config, per_device_train_batch_size=8, gradient_accumulation_steps=4, **options))
    assert logged(parts, "loss") == [pytest.approx(expected, rel=1e-5)]
    assert logged(parts, "grad_norm") == pytest.approx(logged(trainer, "grad_norm"), rel=1e-4)


@pytest.mark.parametrize("predict_with_generate", [False, True])
def test_label_smoothing_in_evaluation(trainers: Trainers, predict_with_generate: bool) -> None:
    """That of the Trainer smooths the loss of an evaluation; that of the config does not."""
    options = {"per_device_eval_batch_size": 32, "predict_with_generate": predict_with_generate}
    trainer = trainers(ADDITIVE, label_smoothing_factor=0.3, generation_max_length=4, **options)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(smoothed_loss(trainer, 0.3), rel=1e-5)
    trainer = trainers({**ADDITIVE, "label_smoothing": 0.3}, generation_max_length=4, **options)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(smoothed_loss(trainer, 0.0), rel=1e-5)


def test_label_smoothing_of_the_config_has_router_losses(trainers: Trainers) -> None:
    options = {"max_steps": 1, "per_device_train_batch_size": 32, "learning_rate": 0.0}
    plain = trained(trainers({**ADDITIVE, "label_smoothing": 0.3}, **options))
    assert logged(plain, "loss") == [pytest.approx(smoothed_loss(plain, 0.3), rel=1e-5)]
    config = {**ADDITIVE, "label_smoothing": 0.3, "router_aux_loss_coef": 1.0}
    assert logged(trained(trainers(config, **options)), "loss")[0] > logged(plain, "loss")[0] + 1.5


def num_mixed_batches(trainer: Any) -> int:
    """Batches of the first epoch in which sources are padded; checks that it goes once through the rows."""
    batches: list[dict[str, torch.Tensor]] = []
    trainer.model.register_forward_pre_hook(lambda _, args, kwargs: batches.append(kwargs), with_kwargs=True)
    trainer.train()
    seen = [
        ids[mask.bool()].tolist()
        for b in batches
        for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
    ]
    assert sorted(seen) == sorted(row["input_ids"] for row in trainer.train_dataset)
    return sum(not batch["attention_mask"].all() for batch in batches)


def test_train_sampling_strategy(trainers: Trainers) -> None:
    options = {"num_train_epochs": 1, "max_steps": -1, "per_device_train_batch_size": 2}
    num_mixed = {
        strategy: num_mixed_batches(trainers({}, train_sampling_strategy=strategy, **options))
        for strategy in ("random", "sequential", "group_by_length", "batch_rebalance")
    }
    # batches are made of 8 rows at a time, sorted: at most one of those 4 batches has both lengths
    assert num_mixed["group_by_length"] <= 4 < num_mixed["random"]
    assert num_mixed["sequential"] == 0


def test_group_by_length_of_a_dataset(trainers: Trainers) -> None:
    """A `datasets.Dataset` with a column of lengths and one that the model does not know, which is left out."""
    columns = [
        {**row, "size": len(row["input_ids"]), "text": source}
        for row, source in zip(trainers.rows, SOURCES, strict=True)
    ]
    options = {"num_train_epochs": 1, "max_steps": -1, "per_device_train_batch_size": 2}
    dataset = datasets.Dataset.from_list(columns)
    trainer = trainers(
        {},
        parts={"train_dataset": dataset},
        train_sampling_strategy="group_by_length",
        length_column_name="size",
        **options,
    )
    assert num_mixed_batches(trainer) <= 4


class Interrupt(TrainerCallback):
    """Stops a training after a step, as a time limit would."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = control.should_training_stop or state.global_step == self.step


@pytest.mark.parametrize("config", [{}, {"num_experts_per_tok": 2, "moe_token_dropout": 0.1}], ids=["top1", "top2"])
@pytest.mark.parametrize(
    ("step", "options"),
    [
        # in an epoch not: the sampler draws from the global generator when it starts, which no checkpoint has
        (2, {"save_strategy": "epoch", "train_sampling_strategy": "group_by_length"}),
        (3, {"save_strategy": "steps", "save_steps": 3, "optim": "adafactor"}),
        (
            5,
            {
                "save_strategy": "steps",
                "save_steps": 5,
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": 2,
                "eval_strategy": "steps",
                "eval_steps": 2,
                "predict_with_generate": True,
                "generation_max_length": 6,
            },
        ),
    ],
    ids=["end_of_epoch", "in_an_epoch", "accumulating_and_evaluating"],
)
def test_resume(trainers: Trainers, config: dict[str, Any], step: int, options: dict[str, Any]) -> None:
    """Bitwise: a training that was interrupted ends where one goes that was not."""
    config = {**NOISY, **config}
    whole = trained(trainers(config, **{**options, "save_strategy": "no"}))
    interrupted = trained(trainers(config, parts={"callbacks": [Interrupt(step)]}, **options))
    assert interrupted.state.global_step == step
    resumed = trained(trainers(config, seed=1, **options), resume_from_checkpoint=True)
    for name in ("loss", "grad_norm", "learning_rate", "eval_loss"):
        assert logged(resumed, name) == logged(whole, name)
    assert len(logged(resumed, "loss")) == resumed.state.global_step == 6
    assert unequal(resumed.model, whole.model) == []
    assert "model.encoder.layers.1.ffn.experts.up_proj" in unequal(interrupted.model, whole.model)


BEST_BY_SCORE = {
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "load_best_model_at_end": True,
    "metric_for_best_model": "score",
    "greater_is_better": True,
}


def test_load_best_model_at_end(trainers: Trainers) -> None:
    parts = {"compute_metrics": scripted([0.1, 0.9, 0.3])}
    trainer = trained(trainers({}, parts=parts, eval_steps=2, save_steps=2, **BEST_BY_SCORE))
    best = trainers.folder / "checkpoint-4"
    assert Path(trainer.state.best_model_checkpoint) == best
    assert unequal(trainer.model, Model.from_pretrained(best)) == []
    assert unequal(trainer.model, Model.from_pretrained(trainers.folder / "checkpoint-6")) != []
    assert trainer.model.lm_head.weight is trainer.model.model.shared.weight


def test_early_stopping(trainers: Trainers) -> None:
    parts = {
        "compute_metrics": scripted([0.5, 0.6, 0.4, 0.3, 0.2, 0.1]),
        "callbacks": [EarlyStoppingCallback(early_stopping_patience=2)],
    }
    trainer = trainers({}, parts=parts, eval_steps=1, save_steps=1, **BEST_BY_SCORE)
    assert trained(trainer).state.global_step == 4
    assert unequal(trainer.model, Model.from_pretrained(trainers.folder / "checkpoint-2")) == []


def test_auto_find_batch_size(trainers: Trainers, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    forward = Model.forward

    @functools.wraps(forward)
    def with_little_memory(self: Model, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        sizes.append(len(input_ids))
        if self.training and len(input_ids) > 12:
            raise RuntimeError("CUDA out of memory.")
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(Model, "forward", with_little_memory)
    trainer = trainers({}, auto_find_batch_size=True, num_train_epochs=1, max_steps=-1)
    trained(trainer)
    fitting = [size for size in sizes if size <= 12]
    assert sizes[0] == 16
    assert sorted(sizes, reverse=True)[: len(sizes) - len(fitting)] == sizes[: len(sizes) - len(fitting)]
    assert sum(fitting) == len(SOURCES)
    assert trainer.state.global_step == len(fitting) == math.ceil(len(SOURCES) / fitting[0])


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_options(trainers: Trainers, num_beams: int) -> None:
    options = {"generation_max_length": 9, "generation_num_beams": num_beams, "per_device_eval_batch_size": 32}
    trainer = trainers({}, predict_with_generate=True, **options)
    batch = trainer.data_collator(trainer.eval_dataset)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected = trainer.model.eval().generate(**inputs, max_length=9, num_beams=num_beams)
    predictions = trainer.predict(trainer.eval_dataset).predictions
    assert predictions[:, : expected.shape[1]].tolist() == expected.tolist()
    # and given in the call
    other = trainer.model.generate(**inputs, max_length=5, num_beams=2)
    predictions = trainer.predict(trainer.eval_dataset, max_length=5, num_beams=2).predictions
    assert predictions[:, :5].tolist() == other.tolist()
    assert (predictions[:, 5:] == trainer.processing_class.pad_token_id).all()


def test_generation_config(trainers: Trainers, tokenizer: ZCodeM3Tokenizer) -> None:
    generation_config = GenerationConfig(
        max_length=7,
        forced_bos_token_id=tokenizer.get_lang_id("de"),
        decoder_start_token_id=2,
        eos_token_id=2,
        pad_token_id=1,
    )
    trainer = trainers({}, predict_with_generate=True, generation_config=generation_config)
    predictions = trainer.predict(trainer.eval_dataset).predictions
    assert predictions.shape == (32, 7)
    assert (predictions[:, 1] == tokenizer.get_lang_id("de")).all()


@pytest.mark.parametrize("trainer_class", [Trainer, Seq2SeqTrainer])
@pytest.mark.parametrize("eval_accumulation_steps", [None, 1])
@pytest.mark.parametrize("output_router_logits", [False, True])
def test_compute_metrics(
    trainers: Trainers, trainer_class: type[Trainer], eval_accumulation_steps: int | None, output_router_logits: bool
) -> None:
    """On logits of four batches, the first and the last of which are not as long."""
    predictions: list[EvalPrediction] = []

    def accuracy(prediction: EvalPrediction) -> Metrics:
        predictions.append(prediction)
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        counts = prediction.label_ids != -100
        return {"accuracy": float((logits.argmax(-1) == prediction.label_ids)[counts].mean())}

    rows = trainers.rows[:16:2] + trainers.rows[4:8] + trainers.rows[:12]
    trainer = trainers(
        {"output_router_logits": output_router_logits},
        trainer_class=trainer_class,
        parts={"compute_metrics": accuracy, "eval_dataset": rows},
        eval_accumulation_steps=eval_accumulation_steps,
        include_for_metrics=["inputs", "loss"],
    )
    batch = trainer.data_collator(rows)
    with torch.no_grad():
        logits = trainer.model.eval()(**batch).logits
    counts = batch["labels"] != -100
    expected = (logits.argmax(dim=-1) == batch["labels"])[counts].float().mean().item()
    assert trainer.evaluate()["eval_accuracy"] == pytest.approx(expected)
    (prediction,) = predictions
    assert (prediction.label_ids != -100).sum() == counts.sum()
    assert prediction.inputs.shape == (len(rows), batch["input_ids"].shape[1])
    assert prediction.losses.shape == (len(rows),)


def test_gradient_clipping(trainers: Trainers) -> None:
    config = {"dropout": 0.0}
    initial = trainers.model(**config)
    options = {"max_steps": 1, "optim": "sgd", "weight_decay": 0.0, "learning_rate": 1.0}
    trainer = trained(trainers(config, max_grad_norm=1e-2, **options))
    assert logged(trainer, "grad_norm")[0] > 0.1
    before = dict(initial.named_parameters())
    updates = [(p - before[name]).norm() for name, p in trainer.model.named_parameters()]
    assert torch.stack(updates).norm().item() == pytest.approx(1e-2, rel=1e-3)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd"])
def test_optimizer(trainers: Trainers, optim: str) -> None:
    options = {"learning_rate": 0.5 if optim == "sgd" else 1e-2, "warmup_steps": 2, "max_steps": 25}
    losses = logged(trained(trainers({}, optim=optim, **options)), "loss")
    assert losses[-1] < 0.85 * losses[0]


def test_weight_decay_leaves_out_biases_and_norms(trainers: Trainers) -> None:
    trainer = trainers({"router_bias": True})
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    others = {name for name, _ in trainer.model.named_parameters()} - decayed
    assert all(name.endswith("bias") or "layer_norm" in name for name in others)
    assert not any(name.endswith("bias") or "layer_norm" in name for name in decayed)
    ffn = "model.encoder.layers.1.ffn"
    assert {f"{ffn}.experts.up_proj", f"{ffn}.experts.down_proj", f"{ffn}.router.weight"} <= decayed
    assert {f"{ffn}.experts.up_proj_bias", f"{ffn}.experts.down_proj_bias", f"{ffn}.router.bias"} <= others


def test_bf16(trainers: Trainers) -> None:
    plain = trained(trainers({}))
    mixed = trained(trainers({}, bf16=True))
    assert logged(mixed, "loss") != logged(plain, "loss")
    assert logged(mixed, "loss") == pytest.approx(logged(plain, "loss"), rel=0.02)
    assert {parameter.dtype for parameter in mixed.model.parameters()} == {torch.float32}
    evaluated = trainers({}, bf16_full_eval=True)
    assert evaluated.evaluate()["eval_loss"] == pytest.approx(trainers({}).evaluate()["eval_loss"], rel=0.02)


def test_plain_trainer(trainers: Trainers) -> None:
    seq2seq, plain = trained(trainers(NOISY)), trained(trainers(NOISY, trainer_class=Trainer))
    assert not plain.args.torch_compile
    assert logged(plain, "loss") == logged(seq2seq, "loss")
    assert unequal(plain.model, seq2seq.model) == []
    output = plain.predict(plain.eval_dataset)
    logits = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
    assert logits.shape == (32, output.label_ids.shape[1], len(plain.processing_class))
    plain.save_model(str(trainers.folder / "plain"))
    assert unequal(Model.from_pretrained(trainers.folder / "plain"), plain.model) == []


def test_model_init(trainers: Trainers) -> None:
    """The Trainer makes the model, from its own seed."""
    config = tiny_config(vocab_size=len(trainers.tokenizer))
    first = trained(trainers({}, parts={"model": None, "model_init": lambda: Model(config)}))
    second = trained(trainers({}, parts={"model": None, "model_init": lambda: Model(config)}))
    assert logged(first, "loss") == logged(second, "loss")
    assert unequal(first.model, second.model) == []


def test_accelerate(trainers: Trainers) -> None:
    """A loop of one's own with accelerate does what one without it does."""
    plain = trainers.model(**NOISY)
    collator = DataCollatorForSeq2Seq(trainers.tokenizer, model=plain)
    loader = DataLoader(trainers.rows, batch_size=12, collate_fn=collator)
    model = copy.deepcopy(plain)

    def fit(model: Any, optimizer: Any, loader: Any, backward: Callable[[torch.Tensor], None]) -> list[float]:
        torch.manual_seed(0)
        losses = []
        for batch in [*loader, *loader]:
            loss = model.train()(**batch).loss
            backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    expected = fit(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2), loader, torch.Tensor.backward)
    accelerator = Accelerator(cpu=True)
    parts = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2), loader)
    assert fit(*parts, accelerator.backward) == expected
    assert unequal(accelerator.unwrap_model(parts[0]), plain) == []
    with torch.no_grad():
        predictions = [parts[0].eval()(**batch).logits.argmax(dim=-1) for batch in parts[2]]
    assert sum(len(accelerator.gather_for_metrics(ids)) for ids in predictions) == len(SOURCES)
    accelerator.save_model(parts[0], str(trainers.folder / "accelerate"))
    assert (trainers.folder / "accelerate" / "model.safetensors").exists()
