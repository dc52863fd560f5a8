"""A progress bar, shown once per machine."""

import os
from typing import Any

from tqdm.auto import tqdm


def progress_bar(*args: Any, **kwargs: Any) -> Any:
    """`tqdm(*args, **kwargs)` on the first process of a launcher; the bar disappears when it is done."""
    return tqdm(*args, leave=False, disable=int(os.environ.get("LOCAL_RANK", "0")) > 0, **kwargs)


__all__ = ["progress_bar"]
