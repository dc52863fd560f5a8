"""A Trainer whose training steps are replayed as CUDA graphs."""

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import DistributedType, patch_environment
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import Seq2SeqTrainingArguments, Trainer, TrainerCallback

from ..optim.clipped_adamw import ClippedAdamW
from .recorded_step import RecordedStep
from .recorder import CudaRecorder, Recorder
from .refusals import check_can_capture
from .step_store import Signature, StepStore, signature_of

# what Accelerate reads
_COMPILE_LAYERS = ("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "ACCELERATE_DYNAMO_USE_DYNAMIC")


@dataclass
class CudaGraphArguments:
    """Arguments of a Trainer for [`CudaGraphsTrainerMixin`].

    Args:
        cuda_graphs: whether to capture forward and backward as CUDA graphs and replay them for batches of the same
            shape. Then the host no longer limits the speed of a step. With `torch_compile` each layer is compiled by
            itself, for all shapes at once, unless the environment (`ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION`,
            `ACCELERATE_DYNAMO_USE_DYNAMIC`) says otherwise.
        max_cuda_graphs: largest number of graphs; the least recently used is dropped. Set it above the number of batch
            shapes.
        expert_load_bound: rows that a rank may send to another rank in a captured step, as a multiple of the balanced
            load. It is only for expert parallelism without a capacity. A step that needs more rows is run again from
            Python, and counted as `cuda_graphs/overflowed_steps`.
    """

    cuda_graphs: bool = field(
        default=False,
        metadata={"help": "Replay forward and backward as CUDA graphs, one per batch shape. Needs a CUDA GPU."},
    )
    max_cuda_graphs: int = field(default=32, metadata={"help": "Largest number of CUDA graphs that are kept."})

    expert_load_bound: float = field(
        default=1.5,
        metadata={
            "help": "Rows that a rank may send to another in a captured step, as a multiple of the balanced load; for "
            "expert parallelism without a capacity."
        },
    )

    def __post_init__(self) -> None:
        parent: Any = super()  # arguments of a Trainer
        parent.__post_init__()
        arguments: Any = self
        if self.cuda_graphs and arguments.dataloader_pin_memory:
            # a blocking copy to the device waits for all earlier work
            arguments.accelerator_config.non_blocking = True


@dataclass
class CudaGraphSeq2SeqTrainingArguments(CudaGraphArguments, Seq2SeqTrainingArguments):
    """[`Seq2SeqTrainingArguments`] with `cuda_graphs` and `max_cuda_graphs`."""


class CudaGraphsTrainerMixin(Trainer):
    """Captures forward, loss and backward of a [`Trainer`] once per shape of a batch, and replays them.

    Everything else runs as usual: optimizer, schedule, callbacks, logging, evaluation, saving. The first three steps of
    a shape run from Python, and the fourth is captured. Steps of rare shapes run from Python, and so do steps with
    inputs other than tensors, numbers, strings or `None`. To get batches of few shapes, use `length_buckets` of
    [`MultitaskTrainingArguments`], or pad to `max_length`.

    For `optim="adamw_torch_fused"`, the default, the optimizer is [`ClippedAdamW`]. It clips while it steps, so
    gradients in memory stay unclipped. If a callback reads them before the optimizer (`on_pre_optimizer_step`), they
    are clipped as usual.

    ```python
    class GraphedTrainer(CudaGraphsTrainerMixin, Seq2SeqTrainer):
        pass

    args = CudaGraphSeq2SeqTrainingArguments("runs/graphed", cuda_graphs=True)
    ```

    Training logs, also the last one, have `cuda_graphs/replayed_steps`, `cuda_graphs/eager_steps` and
    `cuda_graphs/captured`, counted by micro-batch. Losses that are not finite are left out of the logged mean, as with
    `logging_nan_inf_filter`, but without waiting for the device.

    With gradient accumulation, a model that is sharded by FSDP2 reduces its gradients after each micro-batch.

    Raises:
        ValueError: with `cuda_graphs`, something cannot be captured; the message names it.
    """

    args: Any
    _step_store: StepStore | None = None
    _filters_losses = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not getattr(self.args, "cuda_graphs", False):
            return
        if self.args.max_cuda_graphs < 1:
            raise ValueError(f"max_cuda_graphs ({self.args.max_cuda_graphs}) must be at least 1")
        self._check_can_capture()
        self._step_store = StepStore(self._make_recorder(), self.args.max_cuda_graphs)

    def create_accelerator_and_postprocess(self) -> None:
        """Like [`Trainer.create_accelerator_and_postprocess`]; layers that go into graphs are compiled one by one."""
        names = _COMPILE_LAYERS if getattr(self.args, "cuda_graphs", False) and self.args.torch_compile else ()
        # else Accelerate would compile the whole model as one program, and again for other shapes
        with patch_environment(**{name: "true" for name in names if name not in os.environ}):
            super().create_accelerator_and_postprocess()

    # ---- what a subclass may replace ----

    def _check_can_capture(self) -> None:
        check_can_capture(self)

    def _make_recorder(self) -> Recorder:
        return CudaRecorder()

    def _step_to_record(self, model: nn.Module, inputs: dict[str, Any], num_items: Any) -> tuple[Tensor, Tensor | None]:
        """Loss of a recorded step, and a flag on the device that is set if the step is invalid."""
        return super().training_step(model, inputs, num_items), None

    @contextlib.contextmanager
    def _replaying(self, model: nn.Module) -> Iterator[None]:
        """Context for each replay: random numbers are as for a step from Python."""
        yield

    def _is_valid(self, step: RecordedStep) -> bool:
        """Whether the last replay is valid; if not, random numbers are restored and the step runs from Python."""
        return True

    # ---- the optimizer ----

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if getattr(args, "cuda_graphs", False) and kind is AdamW and kwargs.get("fused"):
            kind = ClippedAdamW
        return kind, kwargs

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = self._clip_in_step(model, self.args.max_grad_norm)
        return super()._clip_grad_norm(model) if norm is None else norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None:
            grad_norm = self._clip_in_step(model, math.inf)
        return super()._get_grad_norm(model, grad_norm)

    def _clip_in_step(self, model: nn.Module, max_norm: float) -> Tensor | None:
        """The norm of all gradients if the optimizer clips in its step; `None` if they must be clipped now."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # Accelerate wraps it
        if not isinstance(optimizer, ClippedAdamW) or self._shows_gradients():
            return None
        own = {param for group in optimizer.param_groups for param in group["params"] if param.grad is not None}
        if own != {param for param in model.parameters() if param.grad is not None}:
            return None
        return self._norm_in_step(optimizer, max_norm)

    def _norm_in_step(self, optimizer: ClippedAdamW, max_norm: float) -> Tensor | None:
        has_whole_gradients = self.accelerator.distributed_type in (
            DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU
        )  # fmt: skip
        if not has_whole_gradients or self.accelerator.scaler is not None:
            return None
        return optimizer.clip_in_step(max_norm)

    def _shows_gradients(self) -> bool:
        """Whether a callback may read or change gradients between clipping and the optimizer."""
        kinds: list[Any] = [type(callback) for callback in self.callback_handler.callbacks]
        return any(kind.on_pre_optimizer_step is not TrainerCallback.on_pre_optimizer_step for kind in kinds)

    # ---- a step ----

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        own: Any = self.model
        if not own.training:  # `model` may be a copy, if Accelerate compiles layer by layer
            own.train()
        store = self._step_store
        if store is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        inputs = self._prepare_inputs(inputs)
        step = store.find(
            self._signature(model, inputs, num_items_in_batch),
            lambda: self._record(model, inputs, num_items_in_batch),
        )
        if step is not None:
            with self._replaying(model):
                step.replay(inputs, num_items_in_batch)
            if self._is_valid(step):
                store.counts["replayed"] += 1
                step.hand_over(is_last=self.accelerator.sync_gradients)
                return self._filtered(step.loss.clone())
            store.counts["overflowed"] += 1
        store.counts["eager"] += 1
        with store.recorder.eager():
            loss = super().training_step(model, dict(inputs), num_items_in_batch)
        return self._filtered(loss)

    def _record(self, model: nn.Module, inputs: dict[str, Any], num_items: Any) -> RecordedStep:
        assert self._step_store is not None
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return RecordedStep(
            self._step_store.recorder,
            lambda inputs, num_items: self._step_to_record(model, inputs, num_items),
            parameters,
            inputs,
            num_items,
        )

    def _signature(self, model: nn.Module, inputs: dict[str, Any], num_items: Any) -> Signature | None:
        """Everything on which a step depends besides the contents of tensors."""
        of_inputs = signature_of(inputs)
        if of_inputs is None:
            return None
        config = vars(getattr(self.model, "config", object)).items()
        options = {name: value for name, value in config if isinstance(value, bool | int | float | str)}
        is_trained = hash(tuple(parameter.requires_grad for parameter in model.parameters()))
        # else the Trainer divides the loss by the number of accumulated steps, which is smaller at the end of an epoch
        is_scaled = torch.is_tensor(num_items) and getattr(self, "loss_is_scaled_for_ga", None) is not False
        of_num_items = None if torch.is_tensor(num_items) else num_items
        divisors = None if is_scaled else (of_num_items, self.current_gradient_accumulation_steps)
        return of_inputs, divisors, is_trained, tuple(sorted(options.items()))

    def _filtered(self, loss: Tensor) -> Tensor:
        """Like the parent, log the mean of losses since the last log instead of a loss that is not finite."""
        if not self._filters_losses:
            return loss
        num_logged = 1 + self.state.global_step - self._globalstep_last_logged
        return torch.where(loss.isfinite(), loss, self._tr_loss / num_logged)

    @contextlib.contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Reduce after each micro-batch: whole gradients in FSDP's memory would have new addresses for replays."""
        if self._step_store is not None:
            yield
            return
        with super()._defer_fsdp_gradient_reduction():
            yield

    # ---- a training ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self._step_store is None:
            return super().train(*args, **kwargs)
        self._step_store.clear()  # each training has other hooks of callbacks
        self._step_store.counts.clear()
        self._filters_losses = self.args.logging_nan_inf_filter
        self.args.logging_nan_inf_filter = False  # the parent's filter waits for the device in each step
        try:
            return super().train(*args, **kwargs)
        finally:
            self.args.logging_nan_inf_filter, self._filters_losses = self._filters_losses, False
            self._step_store.clear()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._step_store is not None and ("loss" in logs or "train_runtime" in logs):
            logs |= self._graph_counts()
        super().log(logs, *args, **kwargs)

    def _graph_counts(self) -> dict[str, float]:
        assert self._step_store is not None
        counts = self._step_store.counts
        numbers: dict[str, float] = {f"cuda_graphs/{kind}_steps": counts[kind] for kind in ("replayed", "eager")}
        numbers["cuda_graphs/captured"] = counts["captured"]
        if counts["overflowed"]:
            numbers["cuda_graphs/overflowed_steps"] = counts["overflowed"]
        return numbers


__all__ = ["CudaGraphArguments", "CudaGraphSeq2SeqTrainingArguments", "CudaGraphsTrainerMixin"]
