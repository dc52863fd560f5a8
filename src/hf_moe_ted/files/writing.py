"""One writer per place at a time, and the cleanup after a killed writer.

Beside the output `NAME` there may be `.NAME.lock`, which a living writer holds; `.NAME.incomplete-*`, where it writes;
and `.NAME.previous`, the replaced folder, between two renames. The system frees a lock when its process ends, in
whatever way. So a process that gets the lock knows that no other process writes there.
"""

import fcntl
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

from .places import LEFTOVER, hidden_path, label_of, workplace_of
from .system_errors import explained

LOCK_WAIT_S = 1.0  # for a process that only checks whether there is a writer
FOREIGN_LEFTOVER_S = 3600.0
"""Leftovers of another machine are removed if nothing in them has changed for so long, because some shared file systems
do not share locks between machines."""

logger = logging.getLogger(__name__)


class _Kept(ExitStack):
    """Places that are kept until the end of a block; `locks` maps paths to descriptors."""

    def __init__(self, above: "_Kept | None"):
        super().__init__()
        self.locks: dict[Path, int | None] = {} if above is None else dict(above.locks)


_kept: ContextVar[_Kept | None] = ContextVar("kept", default=None)  # each thread has its own


@contextmanager
def keeping_places() -> Iterator[None]:
    """Keep places that are checked in the block until its end, so other writers are refused before their work.

    It is also a decorator for functions that check a place, work, and then write there.
    """
    with _Kept(_kept.get()) as kept:
        token = _kept.set(kept)
        try:
            yield
        finally:
            _kept.reset(token)


@contextmanager
def writing(
    target: Path, *, workplace: Path | None = None, tidy: bool = True, keep: bool = False
) -> Iterator["Workplace"]:
    """Hold the lock of `target`, and clean up after a killed writer. SIGTERM ends the block like Ctrl-C.

    Args:
        target: the path to write, from `absolute`.
        workplace: the folder for temporary names; by default `workplace_of(target)`. It is made if missing, and removed
            if it is empty at the end.
        tidy: whether to remove temporary files of a killed writer.
        keep: whether to hold the lock until the end of the enclosing `keeping_places`, if there is one.

    Raises:
        ValueError: a part of the path is a file; another process writes to `target`; or a killed one left
            `.NAME.previous`, and it is unclear which version is wanted.
        OSError: the folder cannot be written, or another error of the system; the message says what to do.
    """
    with explained(target):
        folder = workplace or workplace_of(target)
        missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
        if (file := next((path for path in (folder, *folder.parents) if path.is_file()), None)) is not None:
            raise ValueError(f"{target} cannot be created: {file} is a file; choose another place")
        kept = _kept.get() if keep else None
        with ExitStack() as own:
            stack = own if kept is None else kept
            stack.callback(_remove_empty, missing)
            stack.enter_context(_stoppable(target))
            lock = stack.enter_context(_locked(target, folder, kept))
            yield Workplace(target, folder, lock, tidy=tidy)


def _remove_empty(folders: list[Path]) -> None:
    for path in folders:  # the innermost first
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


class Workplace:
    """The working place of a target's writer.

    Attributes:
        target: the path that is written.
        folder: folder for temporary names.
        has_leftovers: whether a stopped writer left temporary files there.
    """

    def __init__(self, target: Path, folder: Path, lock: int | None, *, tidy: bool):
        self.target, self.folder, self._lock = target, folder, lock
        self.previous = hidden_path(folder, target, "previous")
        self.has_leftovers = False
        if lock is not None:
            self._take_back(_read_record(lock))
            self._find_leftovers(tidy)
            self._write_record({})

    @contextmanager
    def temporary_path(self) -> Iterator[Path]:
        """A new path that contains the name of this machine; it is removed at the end of the block."""
        path = hidden_path(self.folder, self.target, f"incomplete-{_host()}{os.urandom(4).hex()}")
        try:
            yield path
        finally:
            remove(path)

    def take_place(self, complete: Path) -> None:
        """Rename a folder to the target, then remove the old target.

        If the process is killed, the target is the old or the new version. Only between the two renames the old one is
        called `.NAME.previous`; the next writer restores it. Ctrl-C at any time leaves one of the two versions.
        """
        is_swap = self.target.is_dir() and any(self.target.iterdir())
        new = complete.stat().st_ino
        if is_swap:
            self._write_record({"swapped": new})
        try:
            if is_swap:
                os.rename(self.target, self.previous)
            os.rename(complete, self.target)
            flush(self.folder)
        finally:
            if is_swap and os.path.lexists(self.previous):
                self._end_swap(new)

    def _end_swap(self, new: int) -> None:
        if not os.path.lexists(self.target):
            os.rename(self.previous, self.target)
        elif self.target.stat().st_ino == new:
            remove(self.previous)

    def _find_leftovers(self, tidy: bool) -> None:
        for path in self.folder.iterdir():
            match = LEFTOVER.fullmatch(path.name)
            if match is None or match["kind"] != "incomplete" or match["label"] != label_of(self.target):
                continue
            is_foreign = match["host"] is not None and match["host"] != _host()
            if is_foreign and time.time() - _last_change(path) < FOREIGN_LEFTOVER_S:
                logger.warning("%s was not removed: another machine may be writing there; remove it if not", path)
                continue
            self.has_leftovers = True
            if tidy:
                remove(path)
                logger.warning("Removed %s, left by a stopped run", path)

    def _take_back(self, record: dict[str, Any]) -> None:
        """Undo or finish a replacement that was stopped between or after its renames."""
        if not os.path.lexists(self.previous):
            return
        is_empty = self.target.is_dir() and not any(self.target.iterdir())
        if is_empty or not os.path.lexists(self.target):
            os.rename(self.previous, self.target)
            logger.warning("Restored %s, which a stopped run had moved aside", self.target)
        elif self.target.stat().st_ino == record.get("swapped"):
            shutil.rmtree(self.previous)
            logger.warning("Removed %s, left by a stopped run", self.previous)
        else:
            raise ValueError(
                f"{self.previous} was left by a stopped run and is the earlier {self.target}; keep one of the two and "
                "remove or rename the other"
            )

    def _write_record(self, record: dict[str, Any]) -> None:
        if self._lock is not None:
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, json.dumps({"host": platform.node(), "pid": os.getpid(), **record}).encode(), 0)


def tidy_up(folder: Path, names: str) -> None:
    """Clean up after killed writers in a folder, for targets whose names match a regular expression.

    Files of living writers stay.
    """
    labels = {match["label"] for name in os.listdir(folder) if (match := LEFTOVER.fullmatch(name))}
    for label in sorted(label for label in labels if re.fullmatch(names, label)):
        try:
            with writing(folder / label, workplace=folder):
                pass
        except (ValueError, OSError) as error:
            logger.warning("%s", error)


def remove(path: Path) -> None:
    """Remove a file or a folder with its content; Ctrl-C does not stop it half-way."""
    if path.is_dir() and not path.is_symlink():
        _to_the_end(partial(shutil.rmtree, path, ignore_errors=True))
    else:
        path.unlink(missing_ok=True)


def _to_the_end(action: Callable[[], object]) -> None:
    """Run an action that may run twice; repeat it if a signal interrupts it."""
    try:
        action()
    except BaseException:
        action()
        raise


def flush(path: Path) -> None:
    """Make the system write a file, or the list of files of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_all(folder: Path) -> None:
    """The same for everything in a folder. It also sets the usual permissions, because some writers restrict them."""
    umask = os.umask(0)
    os.umask(umask)
    for path in [*folder.rglob("*"), folder]:
        if not path.is_symlink():
            path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
            flush(path)


@contextmanager
def _locked(target: Path, folder: Path, kept: _Kept | None) -> Iterator[int | None]:
    """The descriptor of the lock; `kept` remembers it, and a lock that is held already is reused."""
    path, previous = hidden_path(folder, target, "lock"), hidden_path(folder, target, "previous")
    if (around := _kept.get()) is not None and path in around.locks:
        yield around.locks[path]
        return
    lock = _acquire(path, target)
    if kept is not None:
        kept.locks[path] = lock
    try:
        yield lock
    finally:
        if lock is not None:
            try:
                _to_the_end(partial(_remove_lock, path, previous))
            finally:
                os.close(lock)


def _remove_lock(path: Path, previous: Path) -> None:
    """Remove a lock while it is held; a process that opened it notices that it was removed."""
    if not os.path.lexists(previous):  # the next writer reads this in the lock
        path.unlink(missing_ok=True)


def _acquire(path: Path, target: Path) -> int | None:
    """The descriptor of the lock; `None` if the file system has no locks."""
    end = time.monotonic() + LOCK_WAIT_S
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)  # another run may just have removed it again
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_file_of(lock, path):
                return lock
        except BlockingIOError:
            if time.monotonic() > end:
                record = _read_record(lock)
                os.close(lock)
                raise ValueError(
                    f"another process is writing to {target} (number {record.get('pid')} on {record.get('host')}); "
                    "wait for it, or choose another place"
                ) from None
        except OSError:
            os.close(lock)
            path.unlink(missing_ok=True)
            return None
        os.close(lock)
        time.sleep(0.02)


def _is_file_of(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _read_record(lock: int) -> dict[str, Any]:
    try:
        record = json.loads(os.pread(lock, 4096, 0) or b"{}")
    except ValueError:  # the writer was killed while it wrote it
        record = {}
    return record if isinstance(record, dict) else {}


def _host() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _last_change(path: Path) -> float:
    return max(p.lstat().st_mtime for p in (path, *path.rglob("*")))


@contextmanager
def _stoppable(target: Path) -> Iterator[None]:
    """If SIGTERM would end the process at once, it leaves the block with a SystemExit instead, and logs one line."""
    takes_signal = (
        threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )

    def stop(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second signal must not disturb the removal
        raise SystemExit(128 + number)

    if takes_signal:
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if takes_signal:
            logger.warning("Stopped before %s was complete; the temporary files are removed", target)
        raise
    finally:
        if takes_signal:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


__all__ = [
    "Workplace",
    "flush",
    "flush_all",
    "keeping_places",
    "remove",
    "tidy_up",
    "writing",
]
