"""Steps captured as CUDA graphs, on a CUDA device, against the same steps from Python."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_cases import SHAPES, InOrder, assert_same_training, logged, new_model, trainer_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import AdamW
from transformers import Trainer

from hf_moe_ted import ClippedAdamW, CudaGraphsTrainerMixin, RouterStatisticsCallback
from hf_moe_ted.cuda_graphs.recorder import CudaRecorder
from hf_moe_ted.cuda_graphs.step_store import WARMUP_STEPS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def poisoned_buffers() -> Iterator[None]:
    """New tensors are full of NaN: what a replay leaves unwritten must not reach anything.

    Attention with atomic additions is not the same in two runs, however they run.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    with sdpa_kernel(SDPBackend.MATH):
        yield
    torch.use_deterministic_algorithms(False)


class Captured(CudaGraphsTrainerMixin, InOrder):
    pass


class FromPython(InOrder):
    """With the optimizer that goes with CUDA graphs, to compare bit by bit."""

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        return ClippedAdamW if kind is AdamW and kwargs.get("fused") else kind, kwargs


class ClippedFromPython(CudaGraphsTrainerMixin, FromPython):
    """Clips in the step, too."""

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        return FromPython.get_optimizer_cls_and_kwargs(args, model)


def train(
    tmp_path: Path,
    kind: Any,
    config: dict[str, Any],
    statistics: bool = False,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Any:
    model = new_model(**config).to("cuda", dtype)
    trainer = trainer_of(tmp_path, kind, model=model, use_cpu=False, cuda_graphs=kind is Captured, **options)
    if statistics:
        RouterStatisticsCallback().add_to(trainer)
    trainer.metrics = trainer.train().metrics
    return trainer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 3},
        {"bf16": True, "max_grad_norm": 0.1},
        {"gradient_checkpointing": True},
        {"label_smoothing_factor": 0.1, "optim": "adamw_torch"},
        {"torch_compile": True},
    ],
)
def test_numbers_are_those_of_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    # graphs compile layer by layer by default; other programs would have other random numbers
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_DYNAMIC", "true")
    config = {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "router_jitter_noise": 0.1}
    config |= {"router_noise_policy": "jitter", "experts_implementation": "zcode_fused"}
    expected = train(tmp_path, FromPython, config, **options)
    actual = train(tmp_path, Captured, config, **options)
    assert actual.metrics["cuda_graphs/captured"] == len(SHAPES)
    assert actual.metrics["cuda_graphs/replayed_steps"] == 20 - len(SHAPES) * WARMUP_STEPS
    assert_same_training(actual, expected)


def test_grouped_mm_is_captured_in_bfloat16(tmp_path: Path) -> None:
    """Not in float32, where transformers computes expert by expert, with sizes that it reads from the device."""
    config = {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "experts_implementation": "grouped_mm"}
    expected = train(tmp_path, FromPython, config, dtype=torch.bfloat16)
    actual = train(tmp_path, Captured, config, dtype=torch.bfloat16)
    assert actual.metrics["cuda_graphs/captured"] == len(SHAPES)
    assert_same_training(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clipping_in_the_step(tmp_path: Path, dtype: torch.dtype) -> None:
    """Gradients of graphs are in other memory in each signature."""
    trainers = []
    for kind in (Captured, ClippedFromPython):
        model = new_model(d_model=64, router_jitter_noise=0.1, router_noise_policy="jitter").to("cuda", dtype)
        options = {"use_cpu": False, "cuda_graphs": kind is Captured, "max_grad_norm": 0.1}
        trainer = trainer_of(tmp_path, kind, model=model, **options)
        trainer.remove_callback(trainer.norms)  # it looks at gradients, for which they are clipped before
        trainer.train()
        optimizer = trainer.optimizer.optimizer
        for tables in (optimizer._step_tables, optimizer._norm_tables):
            assert tables and None not in tables.values()
        trainers.append(trainer)
    assert_same_training(*trainers)
    assert min(norm for _, norm in logged(trainers[0])) > 0.1


def test_router_statistics_count_replayed_steps(tmp_path: Path) -> None:
    expected = train(tmp_path, FromPython, {}, statistics=True)
    actual = train(tmp_path, Captured, {}, statistics=True)
    for log, wanted in zip(actual.state.log_history, expected.state.log_history, strict=True):
        for name in (name for name in wanted if name.startswith("router/")):
            assert log[name] == pytest.approx(wanted[name], rel=1e-6), name


def test_resume_goes_on_with_the_draws_that_would_have_come(tmp_path: Path) -> None:
    whole = train(tmp_path, Captured, {}, save_strategy="steps", save_steps=13)
    resumed = trainer_of(
        tmp_path, Captured, model=new_model().cuda(), use_cpu=False, cuda_graphs=True, save_strategy="steps",
        save_steps=13,
    )  # fmt: skip
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-13"))
    assert logged(resumed) == logged(whole)


def test_step_that_waits_for_the_device_runs_from_python(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Waiting(FromPython):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            return loss * (1.0 if loss.item() > 0 else 0.5)

    class WaitingCaptured(CudaGraphsTrainerMixin, Waiting):
        pass

    expected = train(tmp_path, Waiting, {})
    trainer = trainer_of(tmp_path, WaitingCaptured, model=new_model().cuda(), use_cpu=False, cuda_graphs=True)
    metrics = trainer.train().metrics
    assert metrics["cuda_graphs/replayed_steps"] == 0
    assert "could not be captured" in caplog.text
    assert_same_training(trainer, expected)
    # nothing of the failed capture is left
    captured = train(tmp_path, Captured, {})
    assert captured.metrics["cuda_graphs/captured"] == len(SHAPES)
    assert_same_training(captured, train(tmp_path, FromPython, {}))


def test_borrowed_memory_is_the_same_memory() -> None:
    for tensor in (
        torch.randn(3, 5, device="cuda"),
        torch.randn(6, 4, device="cuda", dtype=torch.bfloat16).t(),
        torch.randn(7, 9, device="cuda")[2:5, 1:8:2],
        torch.zeros(0, 3, device="cuda"),
    ):
        borrowed = CudaRecorder().borrow(tensor)
        assert borrowed.stride() == tensor.stride() and borrowed.dtype == tensor.dtype
        torch.testing.assert_close(borrowed, tensor, rtol=0, atol=0)
        borrowed.fill_(2.0)
        assert (tensor == 2.0).all()


def test_graphs_share_their_memory() -> None:
    recorder = CudaRecorder()
    weight = torch.randn(1024, 1024, device="cuda")
    sizes = []
    for rows in (4096, 4096, 2048, 1024):
        inputs = torch.randn(rows, 1024, device="cuda")
        for _ in range(2):
            with recorder.eager():
                (inputs @ weight).sum()
        recorder.record(lambda inputs=inputs: (inputs @ weight).sum())
        sizes.append(torch.cuda.memory_reserved() - torch.cuda.memory_allocated())
    assert sizes[-1] < sizes[0] + 64 * 2**20
