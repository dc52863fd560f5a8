"""New folders and files: they appear complete or not at all, and replace only an earlier output of their kind."""

import itertools
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .output_kinds import MODEL, TRAINER_CHECKPOINT, OutputKind
from .places import absolute, is_ours, workplace_of
from .system_errors import explained
from .writing import flush, flush_all, tidy_up, writing

CHECKPOINT_NAME = r"checkpoint-\d+"

Source = str | os.PathLike[str]

logger = logging.getLogger(__name__)


def check_output_dir(
    output_dir: Source,
    *,
    overwrite: bool = False,
    kind: OutputKind = MODEL,
    sources: Sequence[Any] = (),
    also_read: Sequence[Any] = (),
) -> None:
    """Raise if `output_dir` cannot become a new folder, before any work is done.

    Inside [`keeping_places`] no other process can write there from now on.

    Args:
        output_dir: the new folder.
        overwrite: whether to replace a folder that is not empty; it must be an earlier output of this kind, and nothing
            else.
        kind: kind of the output.
        sources: inputs of the work: files, folders, and objects with a `name_or_path`.
        also_read: folders from which only some files are read, so `output_dir` may be inside them.

    Raises:
        ValueError: it is a file or a link, holds a source or is in one; it is not empty without `overwrite`, or has
            content of another kind; another process writes there.
        OSError: the system does not allow writing there.
    """
    target = _absolute_folder(output_dir)
    _check_no_leftover((*sources, *also_read), target)
    with writing(target, tidy=False, keep=True) as place:
        if overwrite or not _has_content(target):  # report that first
            _check_sources(target, output_dir, sources, also_read)
        _check_content(target, output_dir, overwrite, kind, place.has_leftovers)


@contextmanager
def new_folder(output_dir: Source, *, overwrite: bool = False, kind: OutputKind = MODEL) -> Iterator[Path]:
    """A temporary folder that becomes `output_dir` if the block ends without an error.

    Everything is flushed to disk before the rename. On an error the temporary folder is removed, so there is never an
    `output_dir` with only a part of the files. A mount point cannot be renamed. There the files are renamed one after
    another, `kind.last` at the end, so an incomplete output of a killed process cannot be loaded. See `writing` for
    other leftovers of a killed process.

    Args, Raises: see `check_output_dir`, which raises before the work.
    """
    target = _absolute_folder(output_dir)
    with writing(target) as place:
        _check_content(target, output_dir, overwrite, kind, place.has_leftovers)
        with place.temporary_path() as temporary:
            temporary.mkdir()
            yield temporary
            flush_all(temporary)
            _check_content(
                target, output_dir, overwrite, kind, place.has_leftovers
            )  # other processes may write there, too
            if place.folder == target:
                old = [path for path in target.rglob("*") if path.is_file() and not _is_below_ours(target, path)]
                _move_files(temporary, target, kind.last, old)
            else:
                place.take_place(temporary)


@contextmanager
def files_into(folder: Source, *, last: str | None = None, stale: re.Pattern[str] | None = None) -> Iterator[Path]:
    """A temporary folder in `folder`; its files move to `folder` if the block ends without an error.

    Other files stay. All files are complete and flushed before the first of them is renamed.

    Args:
        folder: an existing folder.
        last: the file that loading needs; it is removed before anything else is replaced, and written last.
        stale: names of files of an earlier version; they are removed if the new version does not have them.

    Raises:
        ValueError: another process writes there.
        OSError: the disk is full, or another error of the system.
    """
    target = Path(os.path.realpath(folder))
    with writing(target, workplace=target) as place, place.temporary_path() as temporary:
        temporary.mkdir()
        yield temporary
        flush_all(temporary)
        old = [path for path in target.iterdir() if stale is not None and stale.fullmatch(path.name)]
        _move_files(temporary, target, last, old)


def tidy_up_checkpoints(run_dir: Source, name: str) -> None:
    """Prepare a training folder for the checkpoint `name`: remove what killed runs left of any checkpoint.

    A repeated training replaces only its own checkpoints: a folder of that name with other content is renamed, and the
    log says so.
    """
    if not os.path.isdir(run_dir):
        return
    tidy_up(Path(run_dir), CHECKPOINT_NAME)
    folder = Path(run_dir, name)
    paths = [*folder.rglob("*")] if folder.is_dir() and not folder.is_symlink() else []
    if not paths or (reason := TRAINER_CHECKPOINT.why_not(folder, paths)) is None:
        return
    names = (Path(run_dir, f"replaced-{number}-{name}") for number in itertools.count(1))
    aside = next(path for path in names if not os.path.lexists(path))
    folder.rename(aside)
    logger.warning("%s is not only a checkpoint (%s); it was renamed to %s", folder, reason, aside.name)


def remove_folder(folder: Source) -> None:
    """Remove a folder so that, if the process is killed, no part of it remains under its name.

    Leftovers have a hidden name. The next process that writes there under the same name, or `tidy_up_checkpoints`,
    removes them.
    """
    target = absolute(folder)
    with writing(target, workplace=target.parent) as place, place.temporary_path() as aside:
        os.rename(target, aside)


def check_output_file(path: Source, *, overwrite: bool = False, marker: bytes) -> None:
    """Raise if `path` cannot become a new file, before any work is done. It keeps the place like `check_output_dir`.

    Args:
        path: the new file.
        overwrite: whether to replace an existing file.
        marker: bytes in the first 1,000 bytes of such a file; other files are not replaced.

    Raises:
        ValueError: it is a folder, a link or a device; it exists and not `overwrite`, or is not such a file.
        OSError: the system does not allow writing there.
    """
    target = absolute(path)
    with explained(target):
        if target.is_dir():
            raise ValueError(f"{path} is a folder; name a file in it")
        if target.is_symlink() or (target.exists() and not target.is_file()):
            raise ValueError(f"{path} is a link or not an ordinary file; choose another name")
    with writing(target, workplace=target.parent, tidy=False, keep=True):
        pass  # check that it can be written
    if not target.exists():
        return
    if not overwrite:
        raise ValueError(f"{path} exists; choose another name or overwrite it (--overwrite)")
    with target.open("rb") as file:
        if marker not in file.read(1000):
            raise ValueError(f"{path} was not written by an earlier run and is not replaced; choose another name")


def write_file(path: Source, content: str | bytes) -> None:
    """Write a file beside `path`, then rename it to `path`. A missing parent folder is made.

    Raises:
        ValueError: another process writes there.
        OSError: the disk is full, the folder cannot be written to, or another error of the system.
    """
    target = absolute(path)
    encoded = content.encode("utf-8") if isinstance(content, str) else content
    with writing(target, workplace=target.parent) as place, place.temporary_path() as temporary:
        temporary.write_bytes(encoded)
        flush(temporary)
        os.replace(temporary, target)


def _absolute_folder(output_dir: Source) -> Path:
    """The absolute place of a new folder. Raises a `ValueError` if no folder can be there, whatever it contains."""
    target = absolute(output_dir)
    with explained(target):
        if target.is_symlink():
            raise ValueError(f"output_dir ({output_dir}) is a link; give its target folder, or another one")
        if target.exists() and not target.is_dir():
            raise ValueError(f"output_dir ({output_dir}) is a file; choose a folder")
    return target


def _check_sources(target: Path, output_dir: Source, sources: Sequence[Any], also_read: Sequence[Any]) -> None:
    """Raise if the target contains an input, or is inside a folder that is read as a whole."""
    for position, source in enumerate((*sources, *also_read)):
        if (path := _path_of(source)) is None:
            continue
        real = Path(os.path.realpath(path))
        if any(target == file or target in file.parents or _is_same(target, file) for file in _with_links(real)):
            raise ValueError(f"output_dir ({output_dir}) contains the input {path}; choose another folder")
        is_whole = position < len(sources) and path is source
        if is_whole and real in target.parents and real.is_dir():
            raise ValueError(f"output_dir ({output_dir}) is inside the input folder {path}; choose another one")


def _check_no_leftover(sources: Sequence[Any], target: Path) -> None:
    """Raise if an input is a leftover that the writer of the target would restore or remove."""
    folder = workplace_of(target)
    for path in map(_path_of, sources):
        real = None if path is None else Path(os.path.realpath(path))
        if real is not None and folder in real.parents and is_ours(target, real.relative_to(folder).parts[0]):
            raise ValueError(f"{path} was left by a stopped run that wrote to {target}; rename it first")


def _path_of(source: Any) -> Source | None:
    path = getattr(source, "name_or_path", source)
    return path if isinstance(path, str | os.PathLike) and os.fspath(path) else None


def _with_links(source: Path) -> Iterator[Path]:
    """The source, and the targets of links in its folder."""
    yield source
    for path in source.rglob("*") if source.is_dir() else ():
        if path.is_symlink():
            yield Path(os.path.realpath(path))


def _is_same(target: Path, source: Path) -> bool:
    return target.exists() and any(path.exists() and target.samefile(path) for path in (source, *source.parents))


def _check_content(target: Path, output_dir: Source, overwrite: bool, kind: OutputKind, has_leftovers: bool) -> None:
    """Raise if the target has content that may not be replaced."""
    if not _has_content(target):
        return
    if not overwrite:
        raise ValueError(f"output_dir ({output_dir}) is not empty; choose another one or overwrite it (--overwrite)")
    files = (path for path in target.rglob("*") if not _is_below_ours(target, path))
    if (reason := kind.why_not(target, files, is_partial=has_leftovers)) is not None:
        raise ValueError(
            f"output_dir ({output_dir}) is not replaced: {reason}, so it is not only an earlier output ({kind.what}); "
            "choose another folder, or remove it yourself"
        )


def _has_content(target: Path) -> bool:
    return target.is_dir() and not all(is_ours(target, name) for name in os.listdir(target))


def _is_below_ours(target: Path, path: Path) -> bool:
    return is_ours(target, path.relative_to(target).parts[0])


def _move_files(source: Path, target: Path, last: str | None, old: Sequence[Path]) -> None:
    """Rename the files of one folder into another, `last` at the end, and remove old ones that are not replaced."""
    files = sorted(path.relative_to(source) for path in source.rglob("*") if not path.is_dir())
    names = [*(name for name in files if str(name) != last), *(name for name in files if str(name) == last)]
    if names and str(names[-1]) == last:
        (target / names[-1]).unlink(missing_ok=True)
    for path in old:
        if path.relative_to(target) not in files:
            path.unlink(missing_ok=True)
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(source / name, target / name)
    flush(target)


__all__ = [
    "check_output_dir",
    "check_output_file",
    "files_into",
    "new_folder",
    "remove_folder",
    "tidy_up_checkpoints",
    "write_file",
]
