"""Paths of outputs: the target, and the hidden names beside it."""

import hashlib
import os
import re
from pathlib import Path

_MAX_LABEL_BYTES = 180  # bytes of the 255 that a name may have in most file systems
LEFTOVER = re.compile(
    r"\.(?P<label>.+)\.(?P<kind>lock|previous|incomplete)(?:-(?:(?P<host>[0-9a-f]{8})[0-9a-f]{8}|\w+))?"
)


def absolute(path: str | os.PathLike[str]) -> Path:
    """The absolute path; links above the last part, `.` and `..` are resolved."""
    path = Path(os.path.abspath(path))
    return Path(os.path.realpath(path.parent)) / path.name


def label_of(target: Path) -> str:
    """The part of `target`'s name that hidden names beside it contain."""
    if len(os.fsencode(target.name)) <= _MAX_LABEL_BYTES:
        return target.name
    return hashlib.sha256(os.fsencode(target.name)).hexdigest()[:32]


def hidden_path(folder: Path, target: Path, kind: str) -> Path:
    """The name in a folder of the lock, the previous or the incomplete version (`kind`) of a target."""
    return folder / f".{label_of(target)}.{kind}"


def workplace_of(target: Path) -> Path:
    """The folder for temporary names, from which a rename to `target` is possible.

    It is the parent folder. It is the target itself if only its content can change: a mount point, the working
    directory of this process, or a folder whose parent cannot be written.
    """
    if not target.is_dir():
        return target.parent
    working_dir = Path.cwd()
    is_fixed = _is_mount(target) or target in (working_dir, *working_dir.parents)
    return target if is_fixed or not os.access(target.parent, os.W_OK | os.X_OK) else target.parent


def is_ours(target: Path, name: str) -> bool:
    """Whether an entry of a folder belongs to writers of `target`."""
    match = LEFTOVER.fullmatch(name)
    return match is not None and match["label"] == label_of(target)


def _is_mount(folder: Path) -> bool:
    if os.path.ismount(folder):
        return True
    try:  # a folder that is mounted from another place of the same file system
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    points = (re.sub(rb"\\(\d{3})", lambda m: bytes([int(m[1], 8)]), line.split(b" ")[4]) for line in lines)
    return os.fsencode(folder) in points


__all__ = ["LEFTOVER", "absolute", "hidden_path", "is_ours", "label_of", "workplace_of"]
