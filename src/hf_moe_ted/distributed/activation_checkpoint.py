"""Communication-aware activation checkpointing."""

from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from .collectives import KeptResults

_c10d = torch.ops._c10d_functional
_COLLECTIVES = {
    _c10d.all_gather_into_tensor.default,
    _c10d.all_reduce.default,
    _c10d.all_to_all_single.default,
    _c10d.reduce_scatter_tensor.default,
}


def communication_aware_context_fn(every_collective: bool = False) -> tuple[Any, Any]:
    """Contexts for `torch.utils.checkpoint` under which recomputing a layer runs no collective.

    What the collectives of the first forward returned is kept and used again, so a step has the two rounds of
    communication of forward and backward in place of three (https://huggingface.co/papers/2303.06318, section 4.2).
    The gradients are those of full checkpointing, bit for bit.

    Args:
        every_collective: also those of other code, such as the tensor parallelism of transformers. Every operation
            of a layer then goes through Python (`create_selective_checkpoint_contexts`), which doubles the time of a
            step in which the host is the limit; the collectives of TED, all that ZCodeM3 runs, need it not.

    Example:

    ```python
    >>> model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": communication_aware_context_fn})
    ```
    """
    if every_collective:
        return create_selective_checkpoint_contexts(_policy)
    kept = KeptResults()
    return kept.keep(), kept.reuse()


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _COLLECTIVES else CheckpointPolicy.PREFER_RECOMPUTE


__all__ = ["communication_aware_context_fn"]
