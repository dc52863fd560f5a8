"""Communication-aware activation checkpointing."""

from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from .collectives import KeptResults
from .private_torch import c10d

_COLLECTIVES = {
    c10d.all_gather_into_tensor.default,
    c10d.all_reduce.default,
    c10d.all_to_all_single.default,
    c10d.reduce_scatter_tensor.default,
}


class CommunicationAwareContextFn(str):
    """Makes contexts for `torch.utils.checkpoint` in which the recomputation of a layer runs no collective.

    The results of collectives in the first forward are kept and used again. So a step has two rounds of communication,
    forward and backward, instead of three (https://huggingface.co/papers/2303.06318, section 4.2). The gradients are
    those of full checkpointing, bit for bit.

    It is also a string, because loggers of a Trainer write its arguments as JSON, which has no functions.

    Args:
        every_collective: whether to keep results of other code's collectives, too, such as the tensor parallelism of
            transformers. Every operation of a layer then goes through Python (`create_selective_checkpoint_contexts`),
            which doubles the time of a step whose speed the host limits. The collectives of TED, all that ZCodeM3 runs,
            do not need it.
    """

    every_collective: bool
    __name__: str

    def __new__(cls, every_collective: bool = False) -> "CommunicationAwareContextFn":
        named = super().__new__(
            cls, f"communication_aware_context_fn{' of every collective' if every_collective else ''}"
        )
        named.every_collective = every_collective
        named.__name__ = "communication_aware_context_fn"  # as for the function that it represents
        return named

    def __call__(self, every_collective: bool | None = None) -> tuple[Any, Any]:
        """Two contexts, for the first forward and for the recomputation; `every_collective` as for the class."""
        if self.every_collective if every_collective is None else every_collective:
            return create_selective_checkpoint_contexts(_policy)
        kept = KeptResults()
        return kept.keep(), kept.reuse()

    def __getnewargs__(self) -> tuple[bool]:  # type: ignore[override]  # arguments are pickled and copied
        return (self.every_collective,)


communication_aware_context_fn = CommunicationAwareContextFn()
"""The `context_fn` for ZCodeM3.

Example:

```python
>>> model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": communication_aware_context_fn})
```
"""


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _COLLECTIVES else CheckpointPolicy.PREFER_RECOMPUTE


__all__ = ["CommunicationAwareContextFn", "communication_aware_context_fn"]
