"""A Trainer with CUDA graphs clips inside the optimizer's step, with the numbers of one that clips before."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fake_recorder import RecordsWithoutGpu
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import Trainer, TrainerCallback

from hf_moe_ted import ClippedAdamW, CudaGraphSeq2SeqTrainingArguments, CudaGraphsTrainerMixin

pytest.importorskip("triton", reason="needs Triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MAX_NORM = 0.3
NUM_STEPS = 6


@pytest.fixture(autouse=True)
def kernels_on_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClippedAdamW, "_device_types", ("cuda", "cpu"))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.norm = nn.LayerNorm(3)
        self.unused = nn.Linear(2, 2)

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.norm(self.linear(inputs)) - labels).square().sum()}


class Eager(Trainer):
    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Graphed(RecordsWithoutGpu, CudaGraphsTrainerMixin, Eager):
    pass


class Watching(TrainerCallback):
    """Keeps the norms of gradients as callbacks see them, and changes them in the third step."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        grads = [param.grad for param in kwargs["model"].parameters() if param.grad is not None]
        self.norms.append(nn.utils.get_total_norm(grads).item())
        if state.global_step == 2:
            torch._foreach_add_(grads, 0.1)


def trainer_of(folder: Path, kind: type[Trainer], callback: Any = None, optimizers: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    model = Small()
    inputs, labels = torch.randn(NUM_STEPS * 4, 5), torch.randn(NUM_STEPS * 4, 3)
    args = CudaGraphSeq2SeqTrainingArguments(
        str(folder),
        **{
            "per_device_train_batch_size": 2,
            "max_steps": NUM_STEPS,
            "learning_rate": 0.05,
            "weight_decay": 0.1,
            "max_grad_norm": MAX_NORM,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": DEVICE == "cpu",
            "cuda_graphs": kind is Graphed,
            **options,
        },
    )
    dataset = [{"inputs": one, "labels": other} for one, other in zip(inputs, labels, strict=True)]
    more = {} if optimizers is None else {"optimizers": (optimizers(model), None)}
    return kind(model, args, train_dataset=dataset, callbacks=[callback] if callback else [], **more)


def plain_optimizer(trainer: Any) -> Any:
    return trainer.optimizer.optimizer


def clips_in_step(trainer: Any) -> bool:
    tables = plain_optimizer(trainer)._norm_tables.values()
    return bool(tables) and None not in tables


def assert_same_numbers(actual: Any, expected: Any) -> None:
    for key in ("loss", "grad_norm"):
        logs = [[log[key] for log in trainer.state.log_history if key in log] for trainer in (actual, expected)]
        assert logs[0] == pytest.approx(logs[1], rel=1e-5)
        assert len(logs[0]) == expected.state.global_step
    for name, param in actual.model.named_parameters():
        torch.testing.assert_close(param, expected.model.get_parameter(name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 2}, {"max_grad_norm": 0.0}, {"lr_scheduler_type": "constant", "bf16": True}],
)
def test_numbers_are_those_of_clipping_before(tmp_path: Path, options: dict[str, Any]) -> None:
    expected = trainer_of(tmp_path, Eager, **options)
    expected.train()
    actual = trainer_of(tmp_path, Graphed, **options)
    assert actual.train().metrics["cuda_graphs/replayed_steps"] > 0
    assert_same_numbers(actual, expected)
    assert min(log["grad_norm"] for log in actual.state.log_history if "loss" in log) > MAX_NORM
    assert type(plain_optimizer(actual)) is ClippedAdamW and type(plain_optimizer(expected)) is AdamW
    assert clips_in_step(actual)
    assert plain_optimizer(actual).param_groups[1]["weight_decay"] == 0.0


def test_callback_that_looks_at_gradients_sees_them_clipped(tmp_path: Path) -> None:
    callbacks = Watching(), Watching()
    kinds = Graphed, Eager
    trainers = [trainer_of(tmp_path, kind, callback) for kind, callback in zip(kinds, callbacks, strict=True)]
    for trainer in trainers:
        trainer.train()
    assert_same_numbers(*trainers)
    assert not plain_optimizer(trainers[0])._norm_tables
    for callback in callbacks:
        assert callback.norms == pytest.approx([MAX_NORM] * NUM_STEPS, rel=1e-4)


@pytest.mark.parametrize("kind", [Graphed, Eager])
def test_gradients_that_the_optimizer_does_not_have_count(tmp_path: Path, kind: type[Trainer]) -> None:
    def of_linear(model: Small) -> AdamW:
        return (ClippedAdamW if kind is Graphed else AdamW)(model.linear.parameters(), lr=0.05)

    expected = trainer_of(tmp_path, Eager, optimizers=lambda model: AdamW(model.linear.parameters(), lr=0.05))
    expected.train()
    actual = trainer_of(tmp_path, kind, optimizers=of_linear)
    actual.train()
    assert_same_numbers(actual, expected)
    assert not getattr(plain_optimizer(actual), "_norm_tables", None)


@pytest.mark.parametrize(
    ("options", "kind"),
    [({"optim": "adamw_torch"}, AdamW), ({"optim": "sgd"}, torch.optim.SGD), ({"cuda_graphs": False}, AdamW)],
)
def test_other_optimizers_stay(tmp_path: Path, options: dict[str, Any], kind: type) -> None:
    trainer = trainer_of(tmp_path, Graphed, **options)
    trainer.train()
    assert type(plain_optimizer(trainer)) is kind
    assert all(log["grad_norm"] > 0 for log in trainer.state.log_history if "loss" in log)


@pytest.mark.parametrize("first", [Graphed, Eager])
@pytest.mark.parametrize("second", [Graphed, Eager])
def test_either_resumes_the_other(tmp_path: Path, first: type[Trainer], second: type[Trainer]) -> None:
    whole = trainer_of(tmp_path / "whole", Eager)
    whole.train()
    options = {"save_strategy": "steps", "save_steps": 4}
    trainer_of(tmp_path, first, **options).train()
    resumed = trainer_of(tmp_path, second, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same_numbers(resumed, whole)
