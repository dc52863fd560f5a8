"""Refuse, when a Trainer is made, what cannot be captured as a CUDA graph."""

from typing import Any

import torch
from accelerate.utils import DistributedType
from transformers import Trainer

_ARGUMENTS = {
    "fp16": "its GradScaler waits for the device; use bf16",
    "torch_empty_cache_steps": "memory cannot be freed inside a graph; leave it None",
}
_UPDATES_IN_BACKWARD = ("lomo", "adalomo")
_OWN_GRAPHS = ("reduce-overhead", "max-autotune")


def check_can_capture(trainer: Trainer) -> None:
    """
    Raises:
        ValueError: the arguments, the model, or its distribution over devices cannot be captured.
    """
    args: Any = trainer.args
    if not torch.cuda.is_available() or args.device.type != "cuda":
        raise ValueError(f"cuda_graphs (True) needs a CUDA GPU, but training runs on {args.device}; leave it False")
    for name, instead in _ARGUMENTS.items():
        if getattr(args, name, None):
            raise ValueError(_refusal(f"{name} ({getattr(args, name)!r})", instead))
    optim = str(getattr(args.optim, "value", args.optim))
    if optim in _UPDATES_IN_BACKWARD:
        raise ValueError(_refusal(f"optim ({optim!r})", "it changes parameters in backward; choose another optimizer"))
    if args.torch_compile and args.torch_compile_mode in _OWN_GRAPHS:
        raise ValueError(
            _refusal(f"torch_compile_mode ({args.torch_compile_mode!r})", "it makes its own graphs; use 'default'")
        )
    _check_devices(trainer)


def _check_devices(trainer: Trainer) -> None:
    model: Any = trainer.model
    if trainer.args.n_gpu > 1:
        raise ValueError(
            _refusal(
                f"DataParallel over {trainer.args.n_gpu} GPUs", "start one process per GPU (torchrun) with a TedPlugin"
            )
        )
    is_sharded = getattr(model, "is_distributed_loading_by_transformers", False)
    kind = trainer.accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM):
        raise ValueError(_refusal(f"distributed_type ({kind.value})", "use TedSeq2SeqTrainer with a TedPlugin"))
    if trainer.args.world_size > 1 and not is_sharded:
        raise ValueError(
            _refusal(
                f"DistributedDataParallel over {trainer.args.world_size} processes",
                "load the model with from_pretrained(distributed_config=TedPlugin().distributed_config), and use "
                "TedSeq2SeqTrainer",
            )
        )
    devices = {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}
    if devices & {"cpu", "disk"} or len(devices) > 1:
        raise ValueError(_refusal(f"device_map over {sorted(devices)}", "load the model on one GPU"))


def _refusal(what: str, instead: str) -> str:
    return f"{what} does not work with cuda_graphs (True): {instead}"


__all__ = ["check_can_capture"]
