"""Refuse early, with clear errors, what a sharded model, its Accelerator and its Trainer cannot do."""

import functools
import os
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend
from torch import nn

from ..models.pretrained_model import ZCodeM3PreTrainedModel
from .private_transformers import has_adapters

_AGAIN = "load it in one process, change it, save it, and load it with distributed_config"
_DTYPE = "give dtype=torch.bfloat16 or torch.float32 to from_pretrained"
_METHODS = {
    "resize_token_embeddings": _AGAIN,
    "set_input_embeddings": _AGAIN,
    "set_output_embeddings": _AGAIN,
    "add_adapter": "give the model to peft.get_peft_model(model, config)",
    "load_adapter": "give the model to peft.PeftModel.from_pretrained(model, folder, is_trainable=True)",
    "push_to_hub": "call save_pretrained on all ranks and huggingface_hub.upload_folder on rank 0, or "
    "trainer.push_to_hub()",
    "half": _DTYPE,
    "bfloat16": _DTYPE,
    "float": _DTYPE,
    "double": _DTYPE,
}
_ONE_ADAPTER = "a sharded model keeps its first adapter: merge it, or load the model again"
_METHODS_OF_ADAPTERS = {
    "add_adapter": _ONE_ADAPTER,
    "load_adapter": _ONE_ADAPTER,
    "delete_adapter": "call unload() for the model without it",
    "add_weighted_adapter": _ONE_ADAPTER,
    "merge_adapter": "call merge_and_unload()",
    "unmerge_adapter": "the adapter is not merged",
    "push_to_hub": _METHODS["push_to_hub"],
}
# optimizers of TrainingArguments that step a DTensor like a whole tensor; tested in test_ted_trainer_options.py
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop", "adagrad")


def refuse_methods(model: nn.Module) -> None:
    """Replace methods that would change a whole model by errors: a ValueError says what to do instead.

    Raises:
        ValueError: the model has adapters of `add_adapter` already.
    """
    if has_adapters(model):
        raise ValueError(f"{type(model).__name__} is sharded and has adapters; {_METHODS['add_adapter']}")
    for name, instead in _METHODS.items():
        if hasattr(model, name):
            setattr(model, name, functools.partial(_refuse, name, instead))


def refuse_methods_of_adapters(model: Any) -> None:
    """Like [`refuse_methods`], for a PEFT model with sharded adapters and for its tuner."""
    for part in (model, model.base_model):
        for name, instead in _METHODS_OF_ADAPTERS.items():
            setattr(part, name, functools.partial(_refuse, name, instead))


def check_accelerator(accelerator: Accelerator) -> None:
    """
    Raises:
        ValueError: on several processes, the Accelerator shards or compiles models in another way, or has a mixed
            precision that needs a GradScaler.
    """
    if accelerator.num_processes == 1:
        return
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(
            f"mixed_precision ({accelerator.mixed_precision!r}) must be 'no' or 'bf16' with a sharded model"
        )
    others = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM)
    # on CPUs an fsdp_plugin is ignored; it, `accelerate launch --use_fsdp` and args.fsdp set this variable
    uses_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if accelerator.distributed_type in others or uses_fsdp:
        raise ValueError(
            "TedPlugin shards a model itself and does not work with FSDP, DeepSpeed or Megatron of Accelerate; leave "
            "them, --use_fsdp and --use_deepspeed out"
        )
    backend = accelerator.state.dynamo_plugin.backend
    if backend != DynamoBackend.NO:
        raise ValueError(
            f"torch.compile (dynamo backend {backend.value}) does not work with a sharded model; leave torch_compile "
            "and dynamo_backend out"
        )


def check_training_arguments(args: Any, model: nn.Module, *, has_optimizer: bool) -> None:
    """
    Args:
        args: `TrainingArguments`.
        model: a sharded model, or a ZCodeM3 that is not sharded.
        has_optimizer: whether the Trainer was given an optimizer, so that `args.optim` has no effect.

    Raises:
        ValueError: an argument that would fail later, hang, or have no effect.
    """
    if isinstance(model, ZCodeM3PreTrainedModel) and args.neftune_noise_alpha is not None:
        raise ValueError(
            f"neftune_noise_alpha ({args.neftune_noise_alpha}) has no effect on {type(model).__name__}, because "
            "encoder and decoder do not look words up in the embedding that gets the noise; leave it None"
        )
    if not getattr(model, "is_distributed_loading_by_transformers", False):
        return
    for name, instead in _ARGUMENTS.items():
        if getattr(args, name, None):
            raise ValueError(f"{name} ({getattr(args, name)!r}) does not work with a sharded model: {instead}")
    optim = getattr(args.optim, "value", args.optim)
    if not has_optimizer and optim not in OPTIMIZERS:
        raise ValueError(
            f"optim ({optim!r}) does not work with a sharded model: give "
            f"optimizer_cls_and_kwargs=plugin.tiled_adamw(...), or one of {', '.join(OPTIMIZERS)}"
        )
    if not args.accelerator_config.even_batches or args.accelerator_config.dispatch_batches:
        raise ValueError(
            f"accelerator_config ({args.accelerator_config.to_dict()}) must have even_batches True and "
            "dispatch_batches None or False with a sharded model, because all ranks take part in each forward, with "
            "the batch of their data-parallel rank"
        )


_ARGUMENTS = {
    "auto_find_batch_size": "a rank that restarts alone would leave the others waiting; set the batch size",
    "bf16_full_eval": _DTYPE,
    "deepspeed": "TedPlugin shards it",
    "enable_jit_checkpoint": "ranks would save at different steps; use save_steps",
    "fp16": "use bf16, or weights in bfloat16",
    "fp16_full_eval": _DTYPE,
    "fsdp": "TedPlugin(zero_stage=...) does that",
    "torch_compile": "leave it out",
    "use_liger_kernel": "its loss needs an unsharded head; leave it out",
}


def _refuse(name: str, instead: str, *args: Any, **kwargs: Any) -> None:
    raise ValueError(f"{name} cannot be called on a sharded model: {instead}")


__all__ = [
    "OPTIMIZERS",
    "check_accelerator",
    "check_training_arguments",
    "refuse_methods",
    "refuse_methods_of_adapters",
]
