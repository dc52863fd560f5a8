"""Explain errors of the system during writing: the place, and what to do."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .places import label_of

_FIXES = {
    errno.ENOSPC: "free some space on the disk, or choose another place",
    errno.EDQUOT: "your quota is used up: free some space, or choose another place",
    errno.EFBIG: "the system allows no larger file (ulimit -f): choose another place, or a smaller --max-shard-size",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EROFS: "choose a folder that can be written to",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "a part of the path is not a folder; choose another place",
}


@contextmanager
def explained(target: Path) -> Iterator[None]:
    """Turn an error of the system, from any library, into an OSError that names the place and the fix."""
    try:
        yield
    except Exception as raised:
        error = _error_of_system(raised)
        if error is None or "cannot be written" in str(error.strerror):  # this error is explained already
            raise
        number = error.errno
        where = str(error.filename or target)
        is_in_target = where.startswith(str(target)) or f"{os.sep}.{label_of(target)}." in where
        if number not in _FIXES or not (is_in_target or Path(where) in target.parents):
            raise
        problem = f"{target} cannot be written: {os.strerror(number)}" + ("" if where == str(target) else f" ({where})")
        raise OSError(number, f"{problem}; {_FIXES[number]}") from raised


def _error_of_system(raised: BaseException) -> OSError | None:
    """The system error in an exception; `None` if there is none or it is explained already."""
    if isinstance(raised, OSError):
        return raised
    error: BaseException | None = None if isinstance(raised, ValueError) else raised
    while error is not None and not isinstance(error, OSError):
        if match := re.search(r"\(os error (\d+)\)", str(error)):  # libraries in Rust say this
            return OSError(int(match[1]), os.strerror(int(match[1])))
        error = error.__cause__ or error.__context__  # torch.save fails again when it closes an incomplete file
    return error


__all__ = ["explained"]
