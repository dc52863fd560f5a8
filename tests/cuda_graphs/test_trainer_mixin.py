"""Replayed steps in a Trainer: the numbers of steps from Python, what is recorded, and what is refused."""

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_cases import SHAPES, Graphed, GraphedInOrder, InOrder, assert_same_training, logged, new_model, trainer_of
from transformers import Seq2SeqTrainer, TrainerCallback

from hf_moe_ted import CudaGraphSeq2SeqTrainingArguments, CudaGraphsTrainerMixin
from hf_moe_ted.cuda_graphs.step_store import WARMUP_STEPS


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"gradient_accumulation_steps": 3},
        {"label_smoothing_factor": 0.1},
        {"max_grad_norm": 0.0},
        {"gradient_checkpointing": True},
        {"bf16": True},
    ],
)
def test_numbers_are_those_of_python(tmp_path: Path, options: dict[str, Any]) -> None:
    """With dropout: each replay draws the numbers that would have come."""
    expected = trainer_of(tmp_path, InOrder, **options)
    expected.train()
    actual = trainer_of(tmp_path, **options)
    metrics = actual.train().metrics
    assert_same_training(actual, expected)
    captured = len(SHAPES)
    assert metrics["cuda_graphs/captured"] == actual.recorder.num_recorded == captured
    assert metrics["cuda_graphs/eager_steps"] == captured * WARMUP_STEPS
    assert metrics["cuda_graphs/replayed_steps"] == 20 - captured * WARMUP_STEPS


def test_counts_are_logged(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert logs[0]["cuda_graphs/eager_steps"] == 1
    assert logs[0]["cuda_graphs/replayed_steps"] == 0
    assert logs[-1]["cuda_graphs/replayed_steps"] == 14


def test_without_the_option_nothing_is_recorded(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, cuda_graphs=False)
    trainer.train()
    assert not hasattr(trainer, "recorder")
    assert not any(key.startswith("cuda_graphs") for log in trainer.state.log_history for key in log)


def test_resume_goes_on_with_the_draws_that_would_have_come(tmp_path: Path) -> None:
    whole = trainer_of(tmp_path, save_strategy="steps", save_steps=13)
    whole.train()
    resumed = trainer_of(tmp_path, save_strategy="steps", save_steps=13)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-13"))
    assert logged(resumed) == logged(whole)
    for name, parameter in resumed.model.named_parameters():
        torch.testing.assert_close(parameter, whole.model.get_parameter(name), rtol=0, atol=0, msg=name)


def test_last_accumulation_of_an_epoch_is_another_signature(tmp_path: Path) -> None:
    """Where the Trainer itself divides the loss by the number of its micro-batches, which a graph would not see."""

    class Dividing(GraphedInOrder):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            self.loss_is_scaled_for_ga = False

    trainer = trainer_of(tmp_path, Dividing, num_batches=17, gradient_accumulation_steps=3)
    assert trainer.train().metrics["cuda_graphs/eager_steps"] == len(SHAPES) * WARMUP_STEPS + 2


def test_least_recently_used_goes(tmp_path: Path) -> None:
    expected = trainer_of(tmp_path, InOrder, num_batches=14)
    expected.train()
    trainer = trainer_of(tmp_path, max_cuda_graphs=1, num_batches=14)
    metrics = trainer.train().metrics
    assert_same_training(trainer, expected)
    assert metrics["cuda_graphs/captured"] >= 2
    assert metrics["cuda_graphs/eager_steps"] > 2 * WARMUP_STEPS


def test_rare_shapes_run_from_python(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, num_batches=2 * WARMUP_STEPS)
    assert trainer.train().metrics["cuda_graphs/captured"] == 0


def test_values_that_are_no_tensors(tmp_path: Path) -> None:
    """A number is part of the signature; anything else runs from Python."""
    trainer = trainer_of(tmp_path, num_batches=9)
    collate = trainer.data_collator
    trainer.data_collator = lambda batch: collate(batch) | {"output_router_logits": True}
    assert trainer.train().metrics["cuda_graphs/captured"] == len(SHAPES)
    trainer = trainer_of(tmp_path, num_batches=9)
    trainer.data_collator = lambda batch: collate(batch) | {"encoder_outputs": None, "inputs_embeds": None}
    assert trainer.train().metrics["cuda_graphs/captured"] == len(SHAPES)
    trainer = trainer_of(tmp_path, num_batches=9)
    trainer._signature = lambda *args: None  # such as of a list
    assert trainer.train().metrics["cuda_graphs/eager_steps"] == 9


class Unfreezing(TrainerCallback):
    """Trains the embedding from the tenth step on, with more dropout."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].model.shared.weight.requires_grad_(state.global_step >= 10)
        kwargs["model"].config.attention_dropout = 0.0 if state.global_step < 10 else 0.2


def test_what_changes_in_the_middle_is_recorded_anew(tmp_path: Path) -> None:
    trainers = []
    for kind in (GraphedInOrder, InOrder):
        trainer = trainer_of(tmp_path, kind, num_batches=24)
        trainer.add_callback(Unfreezing())
        trainers.append((trainer, trainer.train().metrics))
    assert_same_training(trainers[0][0], trainers[1][0])
    assert trainers[0][1]["cuda_graphs/captured"] == 2 * len(SHAPES)


def test_no_memory_to_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = trainer_of(tmp_path, InOrder)
    expected.train()
    trainer = trainer_of(tmp_path)
    trainer.recorder.errors = [None, torch.OutOfMemoryError("no")]
    metrics = trainer.train().metrics
    assert_same_training(trainer, expected)
    assert metrics["cuda_graphs/captured"] == 1
    assert "needs more memory" in caplog.text and "input_ids [2, 7]" in caplog.text


def test_step_that_cannot_be_recorded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = trainer_of(tmp_path, InOrder)
    expected.train()
    trainer = trainer_of(tmp_path)
    trainer.recorder.errors = [RuntimeError("operation not permitted when stream is capturing")]
    metrics = trainer.train().metrics
    assert_same_training(trainer, expected)
    assert metrics["cuda_graphs/eager_steps"] == 20
    assert "not permitted when stream is capturing" in caplog.text and "from Python" in caplog.text


def test_losses_that_are_not_finite_are_filtered_as_always(tmp_path: Path) -> None:
    class Broken(InOrder):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            return loss * torch.nan if self.state.global_step == 4 else loss

    class BrokenGraphed(Graphed, Broken):
        pass

    losses = []
    for kind in (BrokenGraphed, Broken):
        trainer = trainer_of(tmp_path, kind, num_batches=8, logging_steps=8)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
        assert trainer.args.logging_nan_inf_filter
    assert losses[0] == losses[1]


def test_second_training_records_anew(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    trainer.train()
    trainer.train()
    assert trainer.recorder.num_recorded == 2 * len(SHAPES)
    assert trainer.state.log_history[-1]["cuda_graphs/captured"] == len(SHAPES)


def test_refused_without_a_gpu(tmp_path: Path) -> None:
    class Plain(CudaGraphsTrainerMixin, Seq2SeqTrainer):
        pass

    args = CudaGraphSeq2SeqTrainingArguments(str(tmp_path), cuda_graphs=True, use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match=r"cuda_graphs \(True\) needs a CUDA GPU"):
        Plain(new_model(), args)


def test_refused_number_of_graphs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"max_cuda_graphs \(0\) must be at least 1"):
        trainer_of(tmp_path, max_cuda_graphs=0)


@pytest.mark.parametrize("given", [None, "false"])
def test_layers_are_compiled_one_by_one_unless_the_environment_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    names = ("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "ACCELERATE_DYNAMO_USE_DYNAMIC")
    for name in names:
        monkeypatch.delenv(name, raising=False)
        if given is not None:
            monkeypatch.setenv(name, given)
    for kind, by_layer in ((Graphed, given is None), (InOrder, False)):
        plugin = trainer_of(tmp_path, kind, torch_compile=True).accelerator.state.dynamo_plugin
        assert (plugin.use_regional_compilation, bool(plugin.dynamic)) == (by_layer, by_layer)
        assert [os.environ.get(name) for name in names] == [given, given]  # of other trainers, too


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_the_model_of_a_copy_is_in_training_mode_too(tmp_path: Path, cuda_graphs: bool) -> None:
    """Accelerate compiles layer by layer in a copy, which has the same layers but a mode of its own."""
    trainer = trainer_of(tmp_path, cuda_graphs=cuda_graphs)
    trainer.train()
    trainer.model.eval()
    trainer.training_step(copy.copy(trainer.model), trainer.data_collator(trainer.train_dataset[:2]))
    assert all(module.training for module in trainer.model.modules())
