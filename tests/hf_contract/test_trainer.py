"""The models under the Seq2SeqTrainer and DataCollatorForSeq2Seq of transformers, none of it subclassed."""

from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_cases
from trainer_cases import ADDITIVE, SOURCES, TARGETS, Rows, Trainers, logged, trained
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    EvalPrediction,
    Seq2SeqTrainer,
)

from hf_moe_ted import ZCodeM3ForConditionalGeneration, ZCodeM3Tokenizer

# What draws random numbers and couples the tokens of a batch, with experts that are full.
NOISY = {**trainer_cases.NOISY, "capacity_factor": 1.0, "num_experts_per_tok": 2}


@pytest.fixture(scope="module")
def learned(tokenizer: ZCodeM3Tokenizer, rows: Rows, tmp_path_factory: pytest.TempPathFactory) -> Seq2SeqTrainer:
    """A trainer after 150 steps on the 32 pairs."""

    def share_right(prediction: EvalPrediction) -> dict[str, float]:
        translations = tokenizer.batch_decode(prediction.predictions, skip_special_tokens=True)
        return {"share_right": sum(a == b for a, b in zip(translations, TARGETS, strict=True)) / len(TARGETS)}

    trainers = Trainers(tokenizer, rows, tmp_path_factory.mktemp("learned"))
    options = {"max_steps": 150, "warmup_steps": 10, "logging_steps": 10}
    parts = {"compute_metrics": share_right}
    return trained(trainers({}, parts=parts, predict_with_generate=True, generation_max_length=12, **options))


def test_loss_falls(learned: Seq2SeqTrainer) -> None:
    losses = logged(learned, "loss")
    assert losses[0] > 3.0
    assert losses[-1] < 0.2


def test_every_weight_is_trained(learned: Seq2SeqTrainer) -> None:
    torch.manual_seed(0)
    initial = ZCodeM3ForConditionalGeneration(learned.model.config).state_dict()
    final = learned.model.state_dict()
    assert [name for name, tensor in initial.items() if torch.equal(tensor, final[name])] == []
    for name, tensor in initial.items():
        if ".experts." in name:  # no expert is left out
            assert [e for e in range(len(tensor)) if torch.equal(tensor[e], final[name][e])] == [], name


def test_predict_with_generate(learned: Seq2SeqTrainer, tokenizer: ZCodeM3Tokenizer) -> None:
    prediction = learned.predict(learned.eval_dataset)
    assert tokenizer.batch_decode(prediction.predictions, skip_special_tokens=True) == TARGETS
    assert (prediction.predictions[:, 0] == learned.model.config.decoder_start_token_id).all()
    assert (prediction.predictions[:, 1] == tokenizer.get_lang_id("de")).all()
    assert prediction.metrics["test_share_right"] == 1.0


def test_evaluate(learned: Seq2SeqTrainer) -> None:
    metrics = learned.evaluate()
    assert metrics["eval_share_right"] == 1.0
    batches = [learned.eval_dataset[start : start + 8] for start in range(0, len(SOURCES), 8)]
    with torch.no_grad():
        losses = [learned.model.eval()(**learned.data_collator(batch)).loss.item() for batch in batches]
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_save_model(learned: Seq2SeqTrainer, tmp_path: Path) -> None:
    learned.save_model(str(tmp_path))
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    inputs = tokenizer(SOURCES, padding=True, return_tensors="pt")
    output_ids = model.generate(**inputs, forced_bos_token_id=tokenizer.get_lang_id("de"), max_new_tokens=12)
    assert tokenizer.batch_decode(output_ids, skip_special_tokens=True) == TARGETS


def test_gradient_accumulation(trainers: Trainers) -> None:
    whole = trained(trainers(ADDITIVE))
    parts = trained(trainers(ADDITIVE, per_device_train_batch_size=4, gradient_accumulation_steps=4))
    assert len(logged(whole, "loss")) == 6
    assert logged(parts, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-4)
    assert logged(parts, "grad_norm") == pytest.approx(logged(whole, "grad_norm"), rel=1e-3)


def test_router_losses_under_gradient_accumulation(trainers: Trainers) -> None:
    """They are means over a batch, so they differ a little between a batch and its parts, but are not added up."""
    config = {"capacity_factor": None, "router_aux_loss_coef": 1.0, "router_z_loss_coef": 0.1}
    whole = trained(trainers(config, max_steps=2))
    parts = trained(trainers(config, max_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=4))
    plain = trained(trainers(ADDITIVE, max_steps=2))
    assert logged(whole, "loss")[0] > logged(plain, "loss")[0] + 2.0
    assert logged(parts, "loss") == pytest.approx(logged(whole, "loss"), rel=0.02)


def test_resume(trainers: Trainers) -> None:
    options = {"save_strategy": "steps", "save_steps": 3}
    uninterrupted = trained(trainers(NOISY, **options))
    checkpoint = trainers.folder / "checkpoint-3"
    resumed = trained(trainers(NOISY, seed=1, **options), resume_from_checkpoint=str(checkpoint))
    for name in ("loss", "grad_norm", "learning_rate"):
        assert len(logged(uninterrupted, name)) == 6
        assert logged(resumed, name) == logged(uninterrupted, name)
    weights, others = uninterrupted.model.state_dict(), resumed.model.state_dict()
    assert [name for name, tensor in weights.items() if not torch.equal(tensor, others[name])] == []


@pytest.mark.parametrize("options", [{}, {"every_n_layers": 2}], ids=str)
def test_activation_checkpointing(trainers: Trainers, options: dict[str, Any]) -> None:
    """Recomputing draws the same noise and drops the same tokens; the router losses reach the routers."""
    config = {**NOISY, "router_aux_loss_coef": 1.0, "router_z_loss_coef": 0.1}
    plain = trained(trainers(config))
    trainer = trainers(config, activation_checkpointing=True, activation_checkpointing_kwargs=options or None)
    num_calls = 0

    def count(module: torch.nn.Module, inputs: Any) -> None:
        nonlocal num_calls
        num_calls += 1

    layers = [*trainer.model.model.encoder.layers, *trainer.model.model.decoder.layers]
    for layer in layers:
        layer.self_attn.register_forward_pre_hook(count)
    trained(trainer)
    assert sum(layer.gradient_checkpointing for layer in layers) == (3 if "every_n_layers" in options else 6)
    assert num_calls == 6 * sum(1 + layer.gradient_checkpointing for layer in layers)
    for name in ("loss", "grad_norm"):
        assert logged(trainer, name) == pytest.approx(logged(plain, name), rel=1e-6)


@pytest.mark.parametrize("options", [{"use_reentrant": True}, {"preserve_rng_state": True}], ids=str)
def test_reentrant_activation_checkpointing(trainers: Trainers, options: dict[str, Any]) -> None:
    """Its first forward runs without gradients, and so would the router losses made of it."""
    config = {**ADDITIVE, "router_aux_loss_coef": 1.0}
    plain = trained(trainers(config, max_steps=1))
    trainer = trainers(config, max_steps=1, activation_checkpointing=True, activation_checkpointing_kwargs=options)
    if options.get("use_reentrant"):
        with pytest.raises(ValueError, match="use_reentrant"):
            trainer.train()
    else:  # the default of torch, which is True, must not come in by leaving it out
        assert logged(trained(trainer), "grad_norm") == pytest.approx(logged(plain, "grad_norm"), rel=1e-6)


def test_evaluation_leaves_no_trace(trainers: Trainers) -> None:
    """Training continues after an evaluation, which has other capacities, as without it."""
    config = {"token_drop_policy": "position", "capacity_factor": 1.0, "min_capacity": 0}
    plain = trained(trainers(config))
    evaluating = trained(trainers(config, eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=7))
    assert len(logged(evaluating, "eval_loss")) == 3
    assert logged(evaluating, "loss") == logged(plain, "loss")


def test_label_smoothing_of_the_config(trainers: Trainers) -> None:
    smooth = trained(trainers({**ADDITIVE, "label_smoothing": 0.5}, max_steps=1))
    plain = trained(trainers(ADDITIVE, max_steps=1))
    assert logged(smooth, "loss") != pytest.approx(logged(plain, "loss"), rel=1e-3)
    smooth.model.load_state_dict(plain.model.state_dict())
    assert smooth.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)
