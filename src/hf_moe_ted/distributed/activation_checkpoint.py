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
    """Makes contexts for `torch.utils.checkpoint` under which recomputing a layer runs no collective.

    What the collectives of the first forward returned is kept and used again, so a step has the two rounds of
    communication of forward and backward in place of three (https://huggingface.co/papers/2303.06318, section 4.2).
    The gradients are those of full checkpointing, bit for bit.

    It is a string, too: loggers of a Trainer write its arguments as JSON, which has no functions.

    Args:
        every_collective: also those of other code, such as the tensor parallelism of transformers. Every operation
            of a layer then goes through Python (`create_selective_checkpoint_contexts`), which doubles the time of a
            step whose speed the host limits. The collectives of TED, all that ZCodeM3 runs, do not need it.
    """

    every_collective: bool
    __name__: str

    def __new__(cls, every_collective: bool = False) -> "CommunicationAwareContextFn":
        named = super().__new__(
            cls, f"communication_aware_context_fn{' of every collective' if every_collective else ''}"
        )
        named.every_collective = every_collective
        named.__name__ = "communication_aware_context_fn"  # as of the function that it stands for
        return named

    def __call__(self, every_collective: bool | None = None) -> tuple[Any, Any]:
        """Two contexts, of the first forward and of the second; `every_collective` as for the class."""
        if self.every_collective if every_collective is None else every_collective:
            return create_selective_checkpoint_contexts(_policy)
        kept = KeptResults()
        return kept.keep(), kept.reuse()

    def __getnewargs__(self) -> tuple[bool]:  # type: ignore[override]  # arguments are pickled and copied
        return (self.every_collective,)


communication_aware_context_fn = CommunicationAwareContextFn()
"""What `context_fn` is for ZCodeM3.

Example:

```python
>>> model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": communication_aware_context_fn})
```
"""


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _COLLECTIVES else CheckpointPolicy.PREFER_RECOMPUTE


__all__ = ["CommunicationAwareContextFn", "communication_aware_context_fn"]
