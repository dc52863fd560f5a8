"""A progress bar, shown once per machine."""

import os
from typing import Any

from tqdm.auto import tqdm


def progress_bar(*args: Any, **kwargs: Any) -> Any:
    """`tqdm(*args, **kwargs)`, for the first of the processes that a launcher started; gone when it is done."""
    return tqdm(*args, leave=False, disable=int(os.environ.get("LOCAL_RANK", "0")) > 0, **kwargs)


__all__ = ["progress_bar"]
