"""Arguments of `forward`: those that are passed on and read elsewhere, and the cache with its two names."""

import difflib
import inspect
from typing import Any

from torch import nn
from transformers.cache_utils import Cache

# what `forward` passes on by `**kwargs`, and somebody reads: this file, or a decorator of transformers
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
    """Refuse what nobody reads of the `kwargs` of a `forward`.

    Raises:
        TypeError: an argument of `forward` that nobody reads. Packed sequences (`position_ids`, `cu_seq_lens_q`) are
            among these: a text begins at the first position of its row.
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
    """The cache of a call, under whichever of its two names it was given.

    Raises:
        ValueError: two caches.
    """
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("past_key_values and cache are two names of one argument, got two caches; pass one of them")
    return past_key_values if cache is None else cache


__all__ = ["refuse_unknown_arguments", "the_cache"]
