"""Avoid two problems of PyTorch's choice of attention kernels: NaN gradients, and a new plan for each shape."""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers.utils import is_torchdynamo_compiling, logging
from transformers.utils.import_utils import is_torch_greater_or_equal

logger = logging.get_logger(__name__)

_switch = threading.Lock()
_num_without_cudnn = 0
_was_enabled = True


@functools.cache
def has_faulty_cudnn_backward(device: torch.device) -> bool:
    """Whether cuDNN's attention can give NaN gradients on a device, which is true on Hopper since torch 2.11.

    There cuDNN runs masked attention by default. If the last tile of 128 keys is half full and the scores of a query
    are below -88, the gradient of the query is NaN: docs/upstream/torch_cudnn_attention_gradient.md.
    """
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device)[0] == 9
        and is_torch_greater_or_equal("2.11", accept_dev=True)
    )


def warn_of_cudnn_backward(query: Tensor, attention_mask: object) -> None:
    """Warn once if gradients of `scaled_dot_product_attention` may be NaN without a change of settings.

    Args:
        query: [batch, heads, length, head_dim].
        attention_mask: the mask, or `None`; without a mask cuDNN is correct.
    """
    if (
        attention_mask is not None
        and query.requires_grad
        and query.dtype != torch.float32  # another kernel than cuDNN's
        and not is_torchdynamo_compiling()
        and has_faulty_cudnn_backward(query.device)
        and torch.backends.cuda.cudnn_sdp_enabled()
    ):
        logger.warning_once(
            f"attention in cuDNN can give NaN gradients on this GPU with torch {torch.__version__} "
            "(https://github.com/pytorch/pytorch/issues/196678); call torch.backends.cuda.enable_cudnn_sdp(False) "
            "before training"
        )


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Use other attention kernels than cuDNN's, in all threads of the process.

    cuDNN makes a plan for each new shape, which takes the host some milliseconds, and each token of a generation has a
    new length. On an H200, where cuDNN is PyTorch's first choice, a server of texts with ever new lengths answered two
    to five times as many requests without it.
    """
    global _num_without_cudnn, _was_enabled
    with _switch:
        if _num_without_cudnn == 0:
            _was_enabled = torch.backends.cuda.cudnn_sdp_enabled()
            torch.backends.cuda.enable_cudnn_sdp(False)
        _num_without_cudnn += 1
    try:
        yield
    finally:
        with _switch:
            _num_without_cudnn -= 1
            if _num_without_cudnn == 0:
                torch.backends.cuda.enable_cudnn_sdp(_was_enabled)


__all__ = ["has_faulty_cudnn_backward", "warn_of_cudnn_backward", "without_cudnn_attention"]
