"""TedPlugin: the one object that a user makes for tensor x expert x data parallelism."""

import contextlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import load
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.trainer_utils import unwrap_peft_model
from transformers.utils import logging

from ..files.output import remove_folder
from ..files.output_kinds import ACCELERATOR_STATE
from ..optim.tiled_adamw import TiledAdamW
from .activation_checkpoint import communication_aware_context_fn
from .adapters import check_optimizers, is_adapted, shard_adapters
from .checkpoint import atomic_folder, save_pretrained, together, whole_state_dict
from .gradient_norm import clip_grad_norm_
from .layout import Layout, layout_of, replicas_of, sizes_of_axes
from .layout_check import check_is_sharded
from .least_loaded import LEAST_LOADED, LEAST_LOADED_BOUND, LEAST_LOADED_MIN_TOKENS
from .parallelize import deferred_reduction, prepare_for_training, show_shards, step_shards
from .private_accelerate import models_with_optimizers, num_registered_objects, without_models
from .random_state import load_generators, load_random_state, saved_random_state
from .refusals import check_accelerator
from .shared_batches import SharedBatchesMixin
from .ted_config import TedConfig
from .training_state import load_training_state, save_training_state

logger = logging.get_logger(__name__)

TRAINING_STATE = "training_state"
_NAMED_STATES = "checkpoints"  # in the folder of the project, as in Accelerate
_STATE_FILE = re.compile(
    r"(random_states|custom_checkpoint)_\d+\.pkl|scaler\.pt|(scheduler|sampler|dl_state_dict)\S*\.bin"
)


class TedPlugin(ParallelismConfig):
    """Tensor x expert x data parallelism (TED, https://huggingface.co/papers/2303.06318).

    Pass its `distributed_config` to `from_pretrained`, which shards the model while it reads it. The plugin itself is
    the `parallelism_config` of [`Accelerator`] and `TrainingArguments`. Make it in every process of `torchrun` or
    `accelerate launch`; it starts `torch.distributed` if that has not started. On one process all sizes are 1, whatever
    values are given.

    Args:
        tensor_parallel_size: ranks that share a batch and split each dense layer.
        expert_parallel_size: ranks that hold different experts.
        expert_tensor_parallel_size: ranks that split each expert; by default `tensor_parallel_size`, which it must
            divide.
        data_parallel_size: ranks with different batches; by default `world / tensor_parallel_size`.
        dp_replicate_size: replicas of ZeRO's shards, such as one per machine (HSDP, hybrid sharding). Parameters and
            optimizer states are sharded over the ranks of a replica; gradients are summed over replicas. Experts are
            replicated in the same way, unless `expert_parallel_size` spreads them over several replicas: then ZeRO
            shards them over all their copies.
        zero_stage: 1, 2 or 3. Optimizer states are sharded over data-parallel ranks; those of experts over the ranks
            with the same experts. Stages 1 and 2 gather parameters once per step, stage 3 for each use. Stage 2
            reduces gradients after every micro-batch, stage 1 at the end of an accumulation.
        offload: `"cpu"` keeps parameters, gradients and optimizer states of data-parallel shards on the CPU, where the
            optimizer steps.
        duplicate_token_dropping: whether each of the ranks that share a batch sends only its part of it to the experts.
        communication_aware_checkpointing: whether activation checkpointing keeps the results of collectives.
        tile_numel: elements that [`TiledAdamW`] steps at once.
        overlap_chunks: number of parts of a batch; the exchange of one part overlaps with the experts' work on another.
        pad_expert_input_to_capacity: whether ranks always exchange as many rows as the experts' capacity allows, so
            that no rank waits for the routing of others. Use it for models with a `capacity_factor` near 1, and batches
            whose padded shape is the same on all data-parallel ranks.
        least_loaded_experts: whether ranks with few tokens compute for ranks with many, with experts that are sent to
            them (Least-Loaded Expert Parallelism, https://huggingface.co/papers/2601.17111). Use it for text whose
            tokens go to few experts.
        least_loaded_bound: largest load of a rank, as a multiple of the mean load, up to which no expert is sent.
        least_loaded_min_tokens: fewest (token, expert) slots of an expert that another rank computes.
        timeout_s: seconds after which a collective that waits for a dead rank fails.

    Raises:
        ValueError: the layout is impossible; the message shows the arithmetic.

    Example:

    ```python
    >>> plugin = TedPlugin(tensor_parallel_size=2, expert_parallel_size=4)
    >>> model = ZCodeM3ForConditionalGeneration.from_pretrained(folder, distributed_config=plugin.distributed_config)
    >>> accelerator = Accelerator(parallelism_config=plugin)
    ```
    """

    def __init__(
        self,
        *,
        tensor_parallel_size: int = 1,
        expert_parallel_size: int = 1,
        expert_tensor_parallel_size: int | None = None,
        data_parallel_size: int | None = None,
        dp_replicate_size: int = 1,
        zero_stage: Literal[1, 2, 3] = 1,
        offload: Literal["cpu"] | None = None,
        duplicate_token_dropping: bool = True,
        communication_aware_checkpointing: bool = True,
        tile_numel: int | None = None,
        overlap_chunks: int = 1,
        pad_expert_input_to_capacity: bool = False,
        least_loaded_experts: bool = False,
        least_loaded_bound: float = LEAST_LOADED_BOUND,
        least_loaded_min_tokens: int = LEAST_LOADED_MIN_TOKENS,
        timeout_s: float = 1800.0,
    ):
        world_size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
        tp, ep, etp, dp = sizes_of_axes(
            world_size, tensor_parallel_size, expert_parallel_size, expert_tensor_parallel_size, data_parallel_size
        )
        if offload == "cpu" and world_size == 1:
            logger.warning("offload='cpu' has no effect on one process")
            offload = None
        layout = Layout(
            tensor_parallel_size=tp,
            data_parallel_size=dp,
            expert_parallel_size=ep,
            expert_tensor_parallel_size=etp,
            dp_replicate_size=replicas_of(world_size, dp_replicate_size),
            zero_stage=zero_stage,
            offload=offload,
            duplicate_token_dropping=duplicate_token_dropping,
            overlap_chunks=overlap_chunks,
            pad_expert_input_to_capacity=pad_expert_input_to_capacity,
            ep_implementation=LEAST_LOADED if least_loaded_experts else "ted",
            least_loaded_bound=least_loaded_bound,
            least_loaded_min_tokens=least_loaded_min_tokens,
        )
        # Accelerate shards nothing and needs to know only which ranks share a batch: to it, as to the Trainer, all
        # data-parallel ranks are one axis
        super().__init__(dp_shard_size=dp, tp_size=tp, dp_replicate_size=1, cp_size=1, sp_size=1)
        self.communication_aware_checkpointing = communication_aware_checkpointing
        self.tile_numel = tile_numel
        self.distributed_config = TedConfig.of_layout(layout)
        if world_size > 1:
            start_distributed(timeout_s)

    @property
    def activation_checkpointing_kwargs(self) -> dict[str, Any]:
        """Arguments for `TrainingArguments` or `model.gradient_checkpointing_enable`."""
        if not self.communication_aware_checkpointing:
            return {"use_reentrant": False}
        return {"use_reentrant": False, "context_fn": communication_aware_context_fn}

    def tiled_adamw(self, **kwargs: Any) -> tuple[type[TiledAdamW], dict[str, Any]]:
        """`optimizer_cls_and_kwargs` of a Trainer: [`TiledAdamW`] with this plugin's tiles and `kwargs`."""
        tile = {} if self.tile_numel is None else {"tile_numel": self.tile_numel}
        return TiledAdamW, {**tile, **kwargs}

    def _validate_accelerator(self, accelerator: Accelerator) -> None:
        """The Accelerator that gets this plugin calls it.

        The parent's refuses CPUs: docs/upstream/accelerate_parallelism_on_cpus.md.
        """
        if self.total_size != accelerator.num_processes:
            raise ValueError(
                f"TedPlugin is for {self.total_size} processes (tensor_parallel_size {self.tp_size} x "
                f"data_parallel_size {self.dp_shard_size}), but the Accelerator has {accelerator.num_processes}; on "
                "CPUs pass use_cpu=True to TrainingArguments or cpu=True to the Accelerator"
            )
        check_accelerator(accelerator)
        if not isinstance(accelerator, TedAcceleratorMixin):
            # the Accelerator is being made; it has no other way to change how it prepares and saves a model
            accelerator.__class__ = type("TedAccelerator", (TedAcceleratorMixin, type(accelerator)), {})

    def __getstate__(self) -> dict[str, Any]:
        # TrainingArguments are copied and pickled, but process groups cannot be
        return {**self.__dict__, "device_mesh": None}


class TedAcceleratorMixin(SharedBatchesMixin, Accelerator):
    """Adds to an [`Accelerator`] what models that `from_pretrained(distributed_config=...)` sharded need.

    The parent would wrap them in DistributedDataParallel, and cannot save DTensors
    (docs/upstream/accelerate_save_state_of_dtensors.md). A state that is saved here loads on any layout and world size.
    Its folder appears under its name once it is complete.
    """

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        if not evaluation_mode:
            check_is_sharded(model, self.parallelism_config)
        if not _is_sharded(model):
            return super().prepare_model(model, device_placement, evaluation_mode)
        prepare_for_training(model)
        shard_adapters(model)
        # with evaluation_mode the parent still does mixed precision and compilation, but wraps nothing
        return super().prepare_model(model, device_placement=False, evaluation_mode=True)

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        """Like the parent's. Make an optimizer only after the adapters of its model are sharded."""
        optimizers = [arg for arg in args if isinstance(arg, torch.optim.Optimizer)]
        models = [arg for arg in args if isinstance(arg, nn.Module)]
        check_optimizers(models, optimizers)
        for model in models:
            show_shards(model)  # the parent looks for the optimizers' parameters among these
        for model, optimizer in itertools.product(models, optimizers):
            step_shards(model, optimizer)
        parameters = [[group["params"] for group in optimizer.param_groups] for optimizer in optimizers]
        prepared = super().prepare(*args, **kwargs)
        if any(_is_sharded(model) for model in models):
            # the parent finds them by their addresses, but shards without elements have no address
            for optimizer, of_groups in zip(optimizers, parameters, strict=True):
                for group, params in zip(optimizer.param_groups, of_groups, strict=True):
                    group["params"] = params
        return prepared

    @contextlib.contextmanager
    def no_sync(self, model: Any) -> Iterator[None]:
        """While `accumulate` goes on to the next micro-batch, only ZeRO-2 reduces gradients, within a replica."""
        model = unwrap_peft_model(model)
        layout = layout_of(model)
        if layout is None or not isinstance(model, FSDPModule):
            with super().no_sync(model):
                yield
            return
        with deferred_reduction(model, layout):
            yield

    def clip_grad_norm_(self, parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2) -> Any:
        parameters = list(parameters)
        if norm_type != 2 or not any(isinstance(param, DTensor) for param in parameters):
            return super().clip_grad_norm_(parameters, max_norm, norm_type)
        self.unscale_gradients()
        return clip_grad_norm_(parameters, max_norm)

    def clip_grad_value_(self, parameters: Iterable[Tensor] | Tensor, clip_value: float) -> None:
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        if not any(isinstance(param, DTensor) for param in parameters):
            super().clip_grad_value_(parameters, clip_value)
            return
        self.unscale_gradients()
        for param in parameters:  # torch can clip only gradients of one mesh together
            torch.nn.utils.clip_grad_value_(param, clip_value, foreach=False)

    def get_state_dict(self, model: Any, unwrap: bool = True) -> dict[str, Tensor]:
        """Whole tensors of a sharded model, on the CPU of rank 0, which must hold them all; empty on other ranks."""
        if not _is_sharded(model):
            return super().get_state_dict(model, unwrap)
        return whole_state_dict(model)

    def save_model(
        self,
        model: nn.Module,
        save_directory: str | os.PathLike[str],
        max_shard_size: int | str = "10GB",
        safe_serialization: bool = True,
    ) -> None:
        """Write a sharded model as an ordinary folder, as its `save_pretrained` does, one tensor at a time."""
        if not _is_sharded(model):
            super().save_model(model, save_directory, max_shard_size, safe_serialization)
            return
        if not safe_serialization:
            raise ValueError(
                "safe_serialization (False) cannot be given for a sharded model, which is saved as safetensors; "
                "leave it out"
            )
        whole: Any = self.unwrap_model(model)
        if is_adapted(whole):
            whole.save_pretrained(save_directory)
            return
        save_pretrained(whole, save_directory, max_shard_size=max_shard_size)

    def save_state(self, output_dir: str | None = None, safe_serialization: bool = True, **kwargs: Any) -> str:
        """Like the parent's. The folder appears once it is complete; then folders beyond `total_limit` are removed.

        Other files in the folder, such as those of hooks, stay; then the new files are put in place one by one.

        Raises:
            ValueError: there is no `output_dir` and no automatic naming, or `checkpoint_N` exists already.
        """
        is_named = (
            self.project_configuration.automatic_checkpoint_naming
        )  # like the parent, which then accepts no other name
        folder = self._next_state() if is_named else output_dir
        if folder is None:
            raise ValueError("output_dir is None: name a folder, or set automatic_checkpoint_naming")
        stale = _STATE_FILE if _has_other_files(Path(folder)) else None
        with atomic_folder(folder, kind=ACCELERATOR_STATE, stale=stale) as staged:
            with without_models(self), self._without_automatic_names():
                super().save_state(str(staged), safe_serialization, **kwargs)
            self._save_training_state(staged)
        limit = self.project_configuration.total_limit
        if is_named and limit is not None:
            with together():
                for old in self._saved_states()[: -max(limit, 1)] if self.is_main_process else []:
                    remove_folder(old)
        return str(folder)

    def load_state(
        self, input_dir: str | None = None, load_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Like the parent's, from a state of any layout. Without `input_dir`, load the latest state.

        Raises:
            ValueError: on all ranks: the folder does not exist, is no state of this model and optimizer, or holds a
                state of a registered object that could run code. `load_kwargs={"weights_only": False}` reads a state
                that you wrote yourself.
        """
        saved = self._saved_states() if self.project_configuration.automatic_checkpoint_naming else []
        if input_dir is None and not saved:
            raise ValueError("input_dir is None: give the folder that save_state wrote")
        input_dir = os.path.expanduser(saved[-1] if input_dir is None else input_dir)
        if not os.path.isdir(input_dir):
            raise ValueError(f"{input_dir} (input_dir) is no folder; give one that save_state wrote")
        if (load_kwargs or {}).get("weights_only", True):
            self._check_objects(Path(input_dir))
        loaded = []
        for index, (model, optimizer) in enumerate(models_with_optimizers(self)):
            extra = load_training_state(os.path.join(input_dir, f"{TRAINING_STATE}_{index}"), model, optimizer)
            load_random_state(model, extra)
            loaded.append((model, extra))
        with without_models(self):
            super().load_state(input_dir, load_kwargs, **kwargs)
        for model, extra in loaded[:1]:  # the parent loaded the generators of the process with the same rank
            load_generators(model, extra)
        self.step = (
            0  # micro-batch of an accumulation: their number may have changed, and their gradients are not saved
        )

    def _saved_states(self) -> list[str]:
        """The states that were named automatically, the latest last."""
        found = Path(self.project_dir, _NAMED_STATES).glob("checkpoint_*")
        numbered = [path for path in found if path.is_dir() and path.name.removeprefix("checkpoint_").isdecimal()]
        return sorted(map(str, numbered), key=lambda path: int(path.rpartition("_")[2]))

    def _next_state(self) -> str:
        folder = os.path.join(self.project_dir, _NAMED_STATES, f"checkpoint_{self.save_iteration}")
        with together():
            if os.path.exists(folder):
                raise ValueError(
                    f"{folder} exists: set accelerator.project_configuration.iteration to the next free number, or "
                    "choose another project_dir"
                )
        return folder

    def _check_objects(self, folder: Path) -> None:
        """Check states of registered objects first: the parent reads them and runs any code that they name."""
        for path in [folder / f"custom_checkpoint_{index}.pkl" for index in range(num_registered_objects(self))]:
            if not path.is_file():
                continue  # the parent reports these
            try:
                with torch.serialization.safe_globals(_of_numpy()):
                    load(path, map_location="cpu")
            except Exception as error:  # errors of pickle, of zip, or of the contents
                raise ValueError(
                    f"{path} is damaged, or cannot be read without running code; nothing in it was executed. If you "
                    "wrote it, give load_kwargs={'weights_only': False} to load_state"
                ) from error

    def _save_training_state(self, folder: str | os.PathLike[str]) -> None:
        for index, (model, optimizer) in enumerate(models_with_optimizers(self)):
            save_training_state(
                os.path.join(folder, f"{TRAINING_STATE}_{index}"), model, optimizer, extra=saved_random_state(model)
            )

    @contextlib.contextmanager
    def _without_automatic_names(self) -> Iterator[None]:
        configuration = self.project_configuration
        before = configuration.automatic_checkpoint_naming
        configuration.automatic_checkpoint_naming = False
        try:
            yield
        finally:
            configuration.automatic_checkpoint_naming = before


def _is_sharded(model: nn.Module) -> bool:
    return bool(getattr(model, "is_distributed_loading_by_transformers", False))


def _has_other_files(folder: Path) -> bool:
    paths = [*folder.rglob("*")] if folder.is_dir() else []
    return bool(paths) and ACCELERATOR_STATE.why_not(folder, paths) is not None


def _of_numpy() -> list[Any]:
    """Classes in pickles of NumPy arrays and scalars; accelerate allows only those of generators."""
    kinds = [getattr(np.dtypes, name) for name in dir(np.dtypes) if name.endswith("DType")]
    return [*kinds, np.float64(0).__reduce__()[0]]


def start_distributed(timeout_s: float) -> None:
    """Start `torch.distributed` for the devices of this machine, with gloo for tensors offloaded to the CPU."""
    if dist.is_initialized():
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))


__all__ = ["TRAINING_STATE", "TedAcceleratorMixin", "TedPlugin"]
