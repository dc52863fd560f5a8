"""Places that are written to: the target, and the hidden names beside it."""

import hashlib
import os
import re
from pathlib import Path

_MAX_LABEL_BYTES = 180  # of the 255 of a name in most file systems
LEFTOVER = re.compile(
    r"\.(?P<label>.+)\.(?P<kind>lock|previous|incomplete)(?:-(?:(?P<host>[0-9a-f]{8})[0-9a-f]{8}|\w+))?"
)


def absolute(path: str | os.PathLike[str]) -> Path:
    """The path without links above its last part, and without `.` and `..`."""
    path = Path(os.path.abspath(path))
    return Path(os.path.realpath(path.parent)) / path.name


def label_of(target: Path) -> str:
    """What the hidden names beside `target` have of its name."""
    if len(os.fsencode(target.name)) <= _MAX_LABEL_BYTES:
        return target.name
    return hashlib.sha256(os.fsencode(target.name)).hexdigest()[:32]


def hidden_path(folder: Path, target: Path, kind: str) -> Path:
    """The name in a folder of the lock, the previous or the incomplete version (`kind`) of a target."""
    return folder / f".{label_of(target)}.{kind}"


def workplace_of(target: Path) -> Path:
    """The folder for temporary names, from where a rename gets to `target`.

    That is the folder above, or the target itself where only what is in it can change: a mount point, the working
    directory of this process, or a folder of which the one above cannot be written to.
    """
    if not target.is_dir():
        return target.parent
    working_dir = Path.cwd()
    is_fixed = _is_mount(target) or target in (working_dir, *working_dir.parents)
    return target if is_fixed or not os.access(target.parent, os.W_OK | os.X_OK) else target.parent


def is_ours(target: Path, name: str) -> bool:
    """Whether an entry of a folder is what writers of `target` have there."""
    match = LEFTOVER.fullmatch(name)
    return match is not None and match["label"] == label_of(target)


def _is_mount(folder: Path) -> bool:
    if os.path.ismount(folder):
        return True
    try:  # a folder that is mounted to another place of the same file system
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    points = (re.sub(rb"\\(\d{3})", lambda m: bytes([int(m[1], 8)]), line.split(b" ")[4]) for line in lines)
    return os.fsencode(folder) in points


__all__ = ["LEFTOVER", "absolute", "hidden_path", "is_ours", "label_of", "workplace_of"]
