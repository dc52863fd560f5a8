"""Arguments of `forward`: those that other code reads, and the cache with its two names."""

import difflib
import inspect
from typing import Any

from torch import nn
from transformers.cache_utils import Cache

# arguments in `**kwargs` of `forward` that are read by this file or a decorator of transformers
_PASSED_ON = {
    "debug_io",
    "debug_io_dir",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "output_routings",
    "prune_layers",
    "use_cache",
}


def refuse_unknown_arguments(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Refuse `kwargs` of a `forward` that nothing reads.

    Raises:
        TypeError: nothing reads an argument of `forward`. This includes packed sequences (`position_ids`,
            `cu_seq_lens_q`): a text always begins at the first position of its row.
    """
    unknown = [name for name, value in kwargs.items() if name not in _PASSED_ON and value is not None]
    if unknown:
        known = {*inspect.signature(module.forward).parameters, *_PASSED_ON} - {"kwargs"}
        alike = [match for name in unknown for match in difflib.get_close_matches(name, known, n=1)]
        hint = f" (did you mean {', '.join(alike)}?)" if alike else ""
        raise TypeError(
            f"{type(module).__name__}.forward does not know {', '.join(unknown)}{hint}; leave it out. It takes "
            f"{', '.join(sorted(known))}"
        )


def the_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache of a call, given under either of its two names.

    Raises:
        ValueError: two caches are given.
    """
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError(
            "past_key_values and cache are two names of one argument, but both are given; pass one of them"
        )
    return past_key_values if cache is None else cache


__all__ = ["refuse_unknown_arguments", "the_cache"]
