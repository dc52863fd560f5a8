"""Trainers for models that are sharded by TED: checkpoints, resume on another layout, evaluation."""

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from ..cuda_graphs.recorded_step import RecordedStep
from ..cuda_graphs.trainer_mixin import CudaGraphsTrainerMixin
from ..files.output import remove_folder, tidy_up_checkpoints
from ..files.output_kinds import TRAINER_CHECKPOINT
from ..models.pretrained_model import ZCodeM3PreTrainedModel
from ..optim.clipped_adamw import ClippedAdamW
from .accelerate_plugin import TRAINING_STATE, TedPlugin
from .activation_checkpoint import CommunicationAwareContextFn
from .adapter_folder import load_adapter
from .adapters import is_adapted, shard_adapters
from .bounded_exchange import bounded_expert_load
from .checkpoint import atomic_folder, has_weights, load_weights, save_pretrained
from .counts import CountsOnceMixin
from .expert_load import EXPERT_LOAD_BOUND
from .gradient_norm import clip_grad_norm_, clip_in_step
from .layout import layout_of
from .layout_check import check_is_sharded
from .parallelize import deferred_reduction, prepare_for_training, show_shards, step_shards
from .private_transformers import tensor_parallel_size
from .random_state import RandomState, load_generators, load_random_state, saved_random_state
from .refusals import check_training_arguments
from .samplers import for_data_parallel_ranks, set_epoch
from .training_state import load_training_state, save_training_state
from .weight_names import has_other_names
from .whole_state import (
    check_whole_state,
    groups_of_trainer,
    is_described,
    load_whole_state,
    mark_described,
    save_description,
    saved_generators,
)


class TedTrainerMixin(CountsOnceMixin, CudaGraphsTrainerMixin):
    """Adds to a [`Trainer`] what a model that `from_pretrained(distributed_config=...)` sharded needs.

    - Optimizer and scheduler are saved as shards, and a checkpoint resumes on any layout and world size, one process
      included. A checkpoint folder appears once it is complete.
    - The gradient norm takes one collective.
    - Ranks of a tensor-parallel group draw the same batches; each token and each prediction counts once.
    """

    _staging_dir: str | None = None
    _resumed: dict[str, Any] | None = None  # `extra` of the loaded training state

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *more: Any,
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        **kwargs: Any,
    ):
        if optimizer_cls_and_kwargs is not None and any(kwargs.get("optimizers", ())):
            raise ValueError("give only one of optimizers and optimizer_cls_and_kwargs")
        if model is not None:
            _check_and_prepare(model, args)
        self._has_optimizer = optimizer_cls_and_kwargs is not None
        # the parent refuses to write checkpoints of a sharded model that it could not read again
        is_sharded = getattr(model, "is_distributed_loading_by_transformers", False)
        plugin = getattr(args, "parallelism_config", None)
        may_be_sharded = is_sharded or (
            model is None and isinstance(plugin, TedPlugin)
        )  # model_init makes the model later
        is_refused = may_be_sharded and args is not None and not args.save_only_model
        if is_refused:
            args.save_only_model = True
        try:
            super().__init__(model, args, *more, **kwargs)
        finally:
            if is_refused:
                args.save_only_model = False
        if optimizer_cls_and_kwargs is not None:  # Seq2SeqTrainer does not take this argument
            self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs

    def call_model_init(self, trial: Any = None) -> nn.Module:
        model = super().call_model_init(trial)
        _check_and_prepare(model, self.args)
        return model

    def _validate_args(self) -> None:
        super()._validate_args()
        has_optimizer = self._has_optimizer or self.optimizer is not None
        check_training_arguments(self.args, self._sharded_model, has_optimizer=has_optimizer)

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Like the parent's, for a model that is not sharded."""
        if self.is_distributed_loading_by_transformers:
            raise ValueError(
                "hyperparameter_search cannot be called for a sharded model: each trial would create new groups of "
                "ranks; start a run per trial"
            )
        return super().hyperparameter_search(*args, **kwargs)

    # ---- checkpoints ----

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging_dir or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save into a temporary folder, which gets the name of the checkpoint once it is complete."""
        run_dir = super()._get_output_dir(trial)
        # the first uploads the folder in the background under its name; the second has a folder on the disk of each
        # node
        if self.args.push_to_hub or self.args.save_on_each_node:
            super()._save_checkpoint(model, trial)
            return
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        final = os.path.join(run_dir, name)
        if self.args.should_save:
            tidy_up_checkpoints(run_dir, name)
        try:
            with atomic_folder(final, kind=TRAINER_CHECKPOINT) as staged:
                self._staging_dir = str(staged)
                super()._save_checkpoint(model, trial)
                self._move_up(staged / name, final)
        finally:
            self._staging_dir = None
        if self.args.should_save:
            self._remove_old_checkpoints(run_dir)
        _barrier()

    def _move_up(self, inner: Path, final: str) -> None:
        """Move what the parent wrote under the checkpoint's name in the staged folder into that folder itself."""
        if self.state.best_model_checkpoint == str(inner):
            self.state.best_model_checkpoint = final
        _barrier()
        if self.args.should_save:
            self.state.save_to_json(str(inner / TRAINER_STATE_NAME))
            for path in inner.iterdir():
                path.rename(inner.parent / path.name)
            inner.rmdir()

    def _remove_old_checkpoints(self, run_dir: str) -> None:
        """Like `transformers.trainer_utils.rotate_checkpoints`; a kill leaves no partly removed checkpoint."""
        limit, found = self.args.save_total_limit or 0, sort_checkpoints(run_dir, use_mtime=True)
        if limit <= 0:
            return
        best = self.state.best_model_checkpoint
        kept = {found[-1]} | ({str(Path(best))} if best is not None else set())
        for old in [path for path in found if path not in kept][: max(0, len(found) - max(limit, len(kept)))]:
            remove_folder(old)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.is_distributed_loading_by_transformers:
            super()._save(output_dir, state_dict)
            return
        folder: str = output_dir or self.args.output_dir  # None only if nothing is saved
        if is_adapted(self._sharded_model):
            self._sharded_model.save_pretrained(folder)
        else:
            save_pretrained(self._sharded_model, folder)
        if self.args.should_save:
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            torch.save(self.args, os.path.join(folder, TRAINING_ARGS_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if is_adapted(self._sharded_model):
            load_adapter(self._sharded_model, resume_from_checkpoint)
        elif self._reads_weights_itself(resume_from_checkpoint):
            load_weights(self._sharded_model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best: str = self.state.best_model_checkpoint  # type: ignore[assignment]  # called where there is one
        if is_adapted(self._sharded_model):
            load_adapter(self._sharded_model, best)
        elif self._reads_weights_itself(best):
            load_weights(self._sharded_model, best)
        else:
            super()._load_best_model()

    def _reads_weights_itself(self, checkpoint: str) -> bool:
        """The parent cannot read weights of a sharded model, and skips experts whose names in checkpoints differ.

        docs/upstream/transformers_resume_renamed_experts.md
        """
        if self.is_distributed_loading_by_transformers:
            return True
        return has_other_names(self._sharded_model) and has_weights(checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if not self.is_distributed_loading_by_transformers:
            self._save_whole_state(output_dir)
            return
        save_training_state(
            os.path.join(output_dir, TRAINING_STATE),
            self._sharded_model,
            self._plain_optimizer,
            self.lr_scheduler,
            weights=False,  # they are in the checkpoint already
            extra=saved_random_state(self._sharded_model),
        )

    def _save_rng_state(self, output_dir: str) -> None:
        if not self.is_distributed_loading_by_transformers:  # else the training state has it, by data-parallel rank
            super()._save_rng_state(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """
        Raises:
            ValueError: the checkpoint lacks the optimizer, scheduler or random state, or they are of another model.
        """
        if checkpoint is None or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder = os.path.join(checkpoint, TRAINING_STATE)
        if os.path.isdir(folder) and not is_described(folder):
            self._resumed = load_training_state(folder, self._sharded_model, self._plain_optimizer, self.lr_scheduler)
            if "generators" not in self._resumed:
                self._resumed["generators"] = self._generators_by_process(checkpoint)
            load_random_state(self._sharded_model, self._resumed)
            return
        has_scaler = getattr(self.accelerator, "scaler", None) is not None
        description = check_whole_state(checkpoint, folder, has_scaler=has_scaler)
        self._resumed = {"generators": saved_generators(checkpoint)}
        if not self.is_distributed_loading_by_transformers:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        if description is None or description["parameters"] is None:
            groups = groups_of_trainer(self._sharded_model, self.get_decay_parameter_names(self._sharded_model))
            known: dict[str, Any] = {}
        else:
            groups, known = description["parameters"], {"optimizer_class": description["optimizer_class"]}
        load_whole_state(checkpoint, self._sharded_model, self._plain_optimizer, self.lr_scheduler, groups, **known)

    def _save_whole_state(self, output_dir: str) -> None:
        """Save what the parent saves, for a plain Trainer, and what a sharded model needs in addition."""
        handle = self._plain_optimizer.register_state_dict_post_hook(mark_described)
        try:
            super()._save_optimizer_and_scheduler(output_dir)
        finally:
            handle.remove()
        if self.args.should_save:
            num_processes = self.args.world_size
            files = [f"rng_state_{process}.pth" for process in range(num_processes)]
            files = [OPTIMIZER_NAME, SCHEDULER_NAME, *(files if num_processes > 1 else ["rng_state.pth"])]
            save_description(
                os.path.join(output_dir, TRAINING_STATE), self._sharded_model, self._plain_optimizer, files
            )

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load the random state of this process's data-parallel rank, from any layout and number of processes."""
        if self._resumed is None:
            super()._load_rng_state(checkpoint)
        elif checkpoint is not None:
            load_generators(self._sharded_model, self._resumed)

    def _generators_by_process(self, checkpoint: str) -> list[dict[str, Any]]:
        """Read generators from a checkpoint of an earlier version, which has the Trainer's file for each process."""
        found = saved_generators(checkpoint)
        is_same_world = len(found) == self.args.world_size
        return found[:: self.get_tp_size()] if is_same_world else found

    @property
    def _sharded_model(self) -> Any:
        return self.model

    @property
    def _plain_optimizer(self) -> Any:
        return getattr(self.optimizer, "optimizer", self.optimizer)  # Accelerate wraps it

    # ---- batches ----

    @property
    def _has_layout(self) -> bool:
        """Whether the run may continue in another layout; then its order of data must not depend on this layout."""
        return self.is_distributed_loading_by_transformers or isinstance(self.args.parallelism_config, TedPlugin)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        if not self._has_layout:
            return sampler
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        num_batches = self.args.world_size // self.get_tp_size()
        return for_data_parallel_ranks(
            sampler,
            seed=seed,
            batch_size=self.get_total_train_batch_size(self.args),
            data_parallel_size=num_batches,
            data_parallel_rank=self._data_parallel_rank,
        )

    def get_train_dataloader(self) -> Any:
        """Like the parent's; workers of ranks that share a batch get the same seeds."""
        loader = super().get_train_dataloader()
        source = getattr(loader, "base_dataloader", loader)
        init = getattr(source, "worker_init_fn", None)
        if self._has_layout and isinstance(init, functools.partial) and "rank" in init.keywords:
            keywords = {**init.keywords, "rank": self._data_parallel_rank}
            source.worker_init_fn = functools.partial(init.func, *init.args, **keywords)
        return loader

    @property
    def _data_parallel_rank(self) -> int:
        return int(self.args.process_index // self.get_tp_size())

    def _run_epoch(self, model: Any, epoch: Any, train_dataloader: Any, *args: Any, **kwargs: Any) -> None:
        if self._has_layout:
            set_epoch(train_dataloader, epoch)
            load_generators(self._sharded_model, {})  # ranks that share a batch make the same one, whatever their seeds
        super()._run_epoch(model, epoch, train_dataloader, *args, **kwargs)

    # ---- training ----

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Like the parent's, also after an evaluation."""
        show_shards(self._sharded_model)
        optimizer = super().create_optimizer(*args, **kwargs)
        step_shards(self._sharded_model, self._plain_optimizer)  # an optimizer that was given to the Trainer
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if not self.is_distributed_loading_by_transformers:
            return super()._clip_grad_norm(model)
        norm = self._clip_in_step(model, self.args.max_grad_norm)
        return clip_grad_norm_(model.parameters(), self.args.max_grad_norm) if norm is None else norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None and self.is_distributed_loading_by_transformers:
            norm = self._clip_in_step(model, math.inf)
            return clip_grad_norm_(model.parameters(), None) if norm is None else norm
        return super()._get_grad_norm(model, grad_norm)

    def _norm_in_step(self, optimizer: ClippedAdamW, max_norm: float) -> Tensor | None:
        if not self.is_distributed_loading_by_transformers:
            return super()._norm_in_step(optimizer, max_norm)
        return clip_in_step(optimizer, max_norm)

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        """Skip it if all ranks share one batch: parameters that are no DTensors then have equal gradients."""
        if self._sharded_model.config.distributed_config.dp_size > 1:
            super()._sync_replicated_trainable_parameters(model)

    def _check_can_capture(self) -> None:
        layout = layout_of(self._sharded_model)
        if layout is not None and layout.offload is not None:
            raise ValueError(
                f"offload ({layout.offload!r}) does not work with cuda_graphs (True): the optimizer steps on the CPU; "
                "leave offload out"
            )
        if is_adapted(self._sharded_model):
            raise ValueError(
                "cuda_graphs (True) does not work with the adapters (PEFT) of a sharded model: leave cuda_graphs out"
            )
        if layout is not None and layout.moves_experts:
            raise ValueError(
                "least_loaded_experts (True) does not work with cuda_graphs (True): the host reads the load of each "
                "expert; leave one of them False"
            )
        super()._check_can_capture()

    def _step_to_record(self, model: nn.Module, inputs: dict[str, Any], num_items: Any) -> tuple[Tensor, Tensor | None]:
        if self._seeds is None:
            return super()._step_to_record(model, inputs, num_items)
        bound = getattr(self.args, "expert_load_bound", EXPERT_LOAD_BOUND)
        with self._seeds.leave_alone(), bounded_expert_load(self._sharded_model, bound) as overflow:
            loss, _ = super()._step_to_record(model, inputs, num_items)
            return loss, overflow.any_rank()

    @contextlib.contextmanager
    def _replaying(self, model: nn.Module) -> Iterator[None]:
        with self._seeds.around_replay() if self._seeds is not None else contextlib.nullcontext():
            yield

    def _is_valid(self, step: RecordedStep) -> bool:
        """Whether each rank had rows for all tokens; it waits for the device only if that is not certain before."""
        if step.is_invalid is None or not step.is_invalid:
            return True
        assert self._seeds is not None
        self._seeds.take_back_forward()
        return False

    @property
    def _seeds(self) -> RandomState | None:
        return getattr(self.model, "ted_random_state", None)

    @contextlib.contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Do not defer the reduction with ZeRO-2, which keeps no whole gradients between micro-batches."""
        layout = layout_of(self._sharded_model)
        if layout is None or self._step_store is not None:
            with super()._defer_fsdp_gradient_reduction():
                yield
            return
        with deferred_reduction(self._sharded_model, layout):
            yield

    # ---- evaluation ----

    @property
    def gather_function(self) -> Callable[[Any], Any]:
        """The function with which evaluation gathers predictions, each once.

        The parent's function would repeat those of a tensor-parallel group, and Seq2SeqTrainer's would repeat the
        samples that pad the last batch.
        """
        is_sharded = getattr(self.model, "is_distributed_loading_by_transformers", False)
        if not is_sharded:
            return self._gather_function
        use_objects = self.args.eval_use_gather_object
        return functools.partial(self.accelerator.gather_for_metrics, use_gather_object=use_objects)

    @gather_function.setter
    def gather_function(self, function: Callable[[Any], Any]) -> None:
        self._gather_function = function


class TedTrainer(TedTrainerMixin, Trainer):
    """[`Trainer`] for sharded models; for other models it behaves like the parent."""


class TedSeq2SeqTrainer(TedTrainerMixin, Seq2SeqTrainer):
    """[`Seq2SeqTrainer`] for sharded models; for other models it behaves like the parent."""


def _check_and_prepare(model: Any, args: Any) -> None:
    check_is_sharded(model, getattr(args, "parallelism_config", None))
    if getattr(model, "is_distributed_loading_by_transformers", False):
        prepare_for_training(model)
        shard_adapters(model)
        _keep_collectives_of_transformers(model, args)


def _keep_collectives_of_transformers(model: Any, args: Any) -> None:
    """Keep results of all collectives if transformers splits the dense layers: those collectives are not ours."""
    kwargs = getattr(args, "activation_checkpointing_kwargs", None) or {}
    is_ours = isinstance(model, ZCodeM3PreTrainedModel) or tensor_parallel_size(model) == 1
    if not is_ours and isinstance(kwargs.get("context_fn"), CommunicationAwareContextFn):
        every = CommunicationAwareContextFn(every_collective=True)
        args.activation_checkpointing_kwargs = {**kwargs, "context_fn": every}


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


__all__ = ["TedSeq2SeqTrainer", "TedTrainer", "TedTrainerMixin"]
