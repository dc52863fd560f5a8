"""Runs for several processes: each takes those that no other has in work."""

import os
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from multitask_recipe import Run

FAILURE = "failure.txt"
SECONDS_BETWEEN_LOOKS = 1.0


def claimed_runs(runs: Iterable[Run], deadline: float | None = None, *, since: float | None = None) -> Iterator[Run]:
    """The runs that are not done, in their order, each for this process alone until the next one is asked for.

    Runs that another process has in work are left to it. A run that needs others waits until they are done, if they are
    among `runs` or in work. The ranks of one distributed training all get all runs.

    Args:
        runs: pilots come before the first run that needs them.
        deadline: value of `time.perf_counter()`, in seconds, behind which no second run is begun.
        since: value of `time.time()`, in seconds; what has failed since then (`failure_noted`) is not tried again. By
            default now.

    Raises:
        ValueError: a run was begun with other settings.
        RuntimeError: at the end, for runs that have failed in other processes, or need one that has.
    """
    since = time.time() if since is None else since
    left = {each.folder: each for run in runs for each in ((run,) if run.result() else (*run.pilots, run))}
    for run in left.values():
        run.check_settings()
    without: list[Path] = []  # that cannot be done
    is_waiting = False
    while left:
        is_begun = False
        for run in list(left.values()):
            if run.result() is not None:
                print(f"{run.folder} is done", flush=True)
            elif any(_has_failed(each, since) or each.folder in without for each in (run, *run.needs)):
                without.append(run.folder)
            elif any(each.result() is None and (each.folder in left or _is_in_work(each)) for each in run.needs):
                continue
            else:
                with _claim(run) as is_ours:
                    if not is_ours or run.result() is not None or _has_failed(run, since):
                        continue
                    (run.folder / FAILURE).unlink(missing_ok=True)
                    yield run
                    is_begun, is_waiting = True, False
            del left[run.folder]
            if is_begun:
                break  # what waited for it comes in its order
        if deadline is not None and time.perf_counter() >= deadline:
            return
        if left and not is_begun:
            if not is_waiting:
                print(f"waiting for other processes: {len(left)} runs are in work, or need those", flush=True)
            is_waiting = True
            time.sleep(SECONDS_BETWEEN_LOOKS)
    if without:
        raise RuntimeError(
            f"{', '.join(map(str, without))}: failed in another process, or need a run that failed; see its {FAILURE}. "
            "The same command tries again"
        )


@contextmanager
def failure_noted(run: Run) -> Iterator[None]:
    """Leave an exception in the folder of a run, so that other processes do not end by it, too."""
    try:
        yield
    except Exception:
        run.folder.mkdir(parents=True, exist_ok=True)
        with (run.folder / FAILURE).open("a", encoding="utf-8") as file:  # ranks may fail one by the other
            file.write(traceback.format_exc())
        raise


def _has_failed(run: Run, since: float) -> bool:
    try:
        return (run.folder / FAILURE).stat().st_mtime >= since
    except FileNotFoundError:
        return False


@contextmanager
def _claim(run: Run) -> Iterator[bool]:
    """Whether the run is this process's; it is given back at the end, or when the process ends in whatever way."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        yield True
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run.folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _is_in_work(run: Run) -> bool:
    if not run.folder.is_dir():
        return False
    with _claim(run) as is_free:
        return not is_free


def shared(path: Path) -> FileLock:
    """A lock for what several runs read, and the first one that needs it makes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_name(f".{path.name}.shared"))
