"""New folders appear whole or not at all, and replace nothing but earlier ones of their kind."""

import itertools
import logging
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_moe_ted.files import places
from hf_moe_ted.files import writing as writing_module
from hf_moe_ted.files.output import (
    check_output_dir,
    check_output_file,
    files_into,
    new_folder,
    tidy_up_checkpoints,
    write_file,
)
from hf_moe_ted.files.output_kinds import DEEPSPEED_EXPORT, EXPERT_STATISTICS, MODEL, TRAINER_CHECKPOINT

CONFIG = '{"model_type": "zcode_m3"}'


def make_model(folder: Path, text: str = "old") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(CONFIG)
    (folder / "model.safetensors").write_text(text)
    return folder


def text_of(folder: Path) -> str:
    return (folder / "model.safetensors").read_text()


def names_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    output_dir = tmp_path / "above" / "new"
    with new_folder(output_dir) as folder:
        (folder / "file").write_text("text")
        assert not output_dir.exists()
        assert folder.parent == output_dir.parent  # on the same disk, so that renaming moves no bytes
    assert (output_dir / "file").read_text() == "text"
    assert names_in(tmp_path) == ["above", "above/new", "above/new/file"]


def test_files_have_the_usual_permissions(tmp_path: Path) -> None:
    with new_folder(tmp_path / "new") as folder:
        (folder / "file").touch(mode=0o600)
    (tmp_path / "usual").mkdir()
    (tmp_path / "usual" / "file").touch()
    for ours, usual in (("new", "usual"), ("new/file", "usual/file")):
        modes = [stat.S_IMODE((tmp_path / path).stat().st_mode) for path in (ours, usual)]
        assert modes[0] == modes[1]


def test_error_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    make_model(tmp_path / "old")
    for name, overwrite in (("above/new", False), ("old", True)):
        with pytest.raises(OSError, match="disk full"), new_folder(tmp_path / name, overwrite=overwrite) as folder:
            (folder / "half").write_text("half")
            raise OSError("disk full")
    assert names_in(tmp_path) == ["old", "old/config.json", "old/model.safetensors"]
    assert text_of(tmp_path / "old") == "old"


# ---- what is replaced ----


def test_an_earlier_model_is_replaced(tmp_path: Path) -> None:
    report = make_model(tmp_path / "model")
    (report / "compression_report").mkdir()
    for name in ("compression_report.json", "README.md", "report.md", "compression_report/sizes.png", "vocab.json"):
        (report / name).touch()
    check_output_dir(report, overwrite=True)
    with pytest.raises(ValueError, match=r"is not empty; choose another one or overwrite it \(--overwrite\)"):
        check_output_dir(report)
    with new_folder(report, overwrite=True) as folder:
        (folder / "config.json").write_text(CONFIG)
    assert names_in(report) == ["config.json"]


@pytest.mark.parametrize(
    "name",
    ["thesis.txt", "other/thesis.txt", "checkpoint-5/config.json", "README.md", ".git/HEAD", "empty/", "model.bin"],
)
def test_nothing_else_is_replaced(tmp_path: Path, name: str) -> None:
    path = make_model(tmp_path / "model") / name
    if name.endswith("/"):
        path.mkdir()
    else:
        path.parent.mkdir(exist_ok=True)
        path.write_text("precious")
    before = names_in(tmp_path)
    with pytest.raises(ValueError, match="is not replaced: it has"):
        check_output_dir(tmp_path / "model", overwrite=True)
    with pytest.raises(ValueError, match="is not replaced"), new_folder(tmp_path / "model", overwrite=True):
        pass
    assert names_in(tmp_path) == before


def test_kinds_are_told_apart(tmp_path: Path) -> None:
    other_model = make_model(tmp_path / "other")
    (other_model / "config.json").write_text('{"model_type": "nllb-moe"}')
    (tmp_path / "deepspeed" / "global_step0").mkdir(parents=True)
    (tmp_path / "deepspeed" / "global_step0" / "mp_rank_00_model_states.pt").touch()
    (tmp_path / "deepspeed" / "latest").write_text("global_step0")
    (tmp_path / "statistics").mkdir()
    (tmp_path / "statistics" / "expert_statistics.json").write_text('{"format": "hf_moe_ted.expert_statistics"}')
    model = make_model(tmp_path / "model")
    (tmp_path / "training" / "global_step0").mkdir(parents=True)
    (tmp_path / "training" / "global_step0" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    (tmp_path / "training" / "latest").write_text("global_step0")
    fitting = {MODEL: model, DEEPSPEED_EXPORT: tmp_path / "deepspeed", EXPERT_STATISTICS: tmp_path / "statistics"}
    for kind, own in fitting.items():
        for folder in sorted(tmp_path.iterdir()):
            if folder == own:
                check_output_dir(folder, overwrite=True, kind=kind)
            else:
                with pytest.raises(ValueError, match="is not replaced"):
                    check_output_dir(folder, overwrite=True, kind=kind)


def test_sources_stay(tmp_path: Path) -> None:
    source = make_model(tmp_path / "runs" / "source")
    (tmp_path / "same").symlink_to(source)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for target in (source, tmp_path / "runs", tmp_path / "runs" / "." / "x" / ".." / "source"):
        with pytest.raises(ValueError, match="contains the input"):
            check_output_dir(target, overwrite=True, sources=[source])
    with pytest.raises(ValueError, match="contains the input"):
        check_output_dir(source, overwrite=True, sources=[tmp_path / "same"])
    with pytest.raises(ValueError, match="is inside the input folder"):
        check_output_dir(source / "pruned", sources=[source])
    check_output_dir(source / "pruned", also_read=[source])
    with pytest.raises(ValueError, match="contains the input"):
        check_output_dir(source, overwrite=True, also_read=[source / "config.json"])
    for link in ("same", "dangling"):
        with pytest.raises(ValueError, match="is a link"):
            check_output_dir(tmp_path / link, overwrite=True)
    assert text_of(source) == "old"
    check_output_dir(tmp_path / "runs" / "source-2", sources=[source, None, object(), {"d_model": 8}])


def test_sources_of_links_stay(tmp_path: Path) -> None:
    """A folder of links, as in the cache of the Hub."""
    blobs, model = make_model(tmp_path / "blobs"), tmp_path / "model"
    model.mkdir()
    for path in blobs.iterdir():
        (model / path.name).symlink_to(path)
    for kept in ({"sources": [model]}, {"also_read": [model]}):
        with pytest.raises(ValueError, match="contains the input"):
            check_output_dir(blobs, overwrite=True, **kept)
    check_output_dir(tmp_path / "new", sources=[model])


@pytest.mark.parametrize("name", [".new.previous", ".new.incomplete-0123456789abcdef"])
def test_sources_that_a_killed_run_has_left_stay(tmp_path: Path, name: str) -> None:
    """Somebody wants to save what there is; it is neither moved nor removed before it is read."""
    left = make_model(tmp_path / name)
    with pytest.raises(ValueError, match="rename it first"):
        check_output_dir(tmp_path / "new", sources=[left])
    assert names_in(tmp_path) == [name, f"{name}/config.json", f"{name}/model.safetensors"]
    check_output_dir(tmp_path / "other", sources=[left])


def test_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays the same folder, so that the shell that is there sees what was written."""
    monkeypatch.chdir(tmp_path)
    before = tmp_path.stat().st_ino
    with new_folder(".") as folder:
        make_model(folder)
    assert tmp_path.stat().st_ino == before
    assert names_in(tmp_path) == ["config.json", "model.safetensors"]
    with new_folder(".", overwrite=True) as folder:
        (folder / "config.json").write_text(CONFIG)
        (folder / "model-00001-of-00001.safetensors").touch()
    assert names_in(tmp_path) == ["config.json", "model-00001-of-00001.safetensors"]
    Path("thesis.txt").touch()
    with pytest.raises(ValueError, match="it has thesis"):
        check_output_dir(".", overwrite=True)


def test_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"output_dir \(.*file\) is a file"), new_folder(tmp_path / "file"):
        pass
    with pytest.raises(ValueError, match=r"cannot be created: .*file is a file"), new_folder(tmp_path / "file" / "new"):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_that_may_not_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(OSError, match=r"choose a folder that you may write to"):
        check_output_dir(tmp_path / "closed" / "new")


@pytest.mark.parametrize("length", [250, 300])
def test_long_names(tmp_path: Path, length: int) -> None:
    target = tmp_path / ("n" * length)
    if length < 256:
        with new_folder(target) as folder:
            make_model(folder)
        assert text_of(target) == "old"
    else:
        with pytest.raises(OSError, match=r"File name too long.*; choose a shorter name"):
            check_output_dir(target)
    assert len(names_in(tmp_path)) == (3 if length < 256 else 0)


# ---- writers that are stopped ----


def in_a_child(function: Callable[[], Any]) -> int:
    """The status of a forked process."""
    pid = os.fork()
    if pid == 0:
        function()
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def write_and_die(target: Path) -> None:
    with new_folder(target, overwrite=True) as folder:
        (folder / "model.safetensors").write_text("half")
        os._exit(9)


def test_next_run_removes_what_a_killed_one_has_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / ".other.incomplete-abc").mkdir()  # of another output
    assert in_a_child(lambda: write_and_die(tmp_path / "new")) != 0
    left = [name for name in names_in(tmp_path) if name.startswith(".new")]
    assert any("incomplete" in name for name in left) and not (tmp_path / "new").exists()
    with caplog.at_level(logging.WARNING), new_folder(tmp_path / "new") as folder:
        assert list(folder.iterdir()) == []
    assert sorted(os.listdir(tmp_path)) == [".other.incomplete-abc", "new"]
    assert [record.getMessage() for record in caplog.records if "Removed" in record.getMessage()] == [
        f"Removed {tmp_path / min(left, key=len)}, left by a stopped run"
    ] or len(caplog.records) == 1


def test_living_writer_is_left_alone(tmp_path: Path) -> None:
    with new_folder(tmp_path / "new") as folder:
        (folder / "file").write_text("first")
        before = names_in(tmp_path)
        for attempt in (check_output_dir, lambda path: new_folder(path).__enter__()):
            with pytest.raises(ValueError, match=rf"another process is writing to .*new \(number {os.getpid()} on"):
                attempt(tmp_path / "new")
        assert names_in(tmp_path) == before
    assert (tmp_path / "new" / "file").read_text() == "first"
    with pytest.raises(ValueError, match="is not empty"):
        check_output_dir(tmp_path / "new")


def test_who_comes_second_does_not_replace_the_first(tmp_path: Path) -> None:
    """Another program, which knows nothing of locks, has made the folder meanwhile."""
    with pytest.raises(ValueError, match="is not empty"), new_folder(tmp_path / "new"):
        make_model(tmp_path / "new", "first")
    assert text_of(tmp_path / "new") == "first"


def test_what_another_machine_may_be_writing_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    foreign = tmp_path / f".new.incomplete-{'0' * 8}{'1' * 8}"
    foreign.mkdir()
    with caplog.at_level(logging.WARNING):
        with new_folder(tmp_path / "new") as folder:
            make_model(folder)
        assert foreign.is_dir() and "another machine may be writing there" in caplog.text
        long_ago = time.time() - 2 * writing_module.FOREIGN_LEFTOVER_S
        os.utime(foreign, (long_ago, long_ago))
        with new_folder(tmp_path / "new", overwrite=True) as folder:
            make_model(folder)
    assert not foreign.exists()


def test_killed_at_any_system_call_leaves_the_old_or_the_new_folder(tmp_path: Path) -> None:
    """A process that dies at its n-th flush, renaming or removal, for all n; the next run tidies up."""
    folder, previous = tmp_path / "folder", tmp_path / ".folder.previous"
    make_model(folder)
    seen = set()
    for number in range(50):
        with new_folder(folder, overwrite=True) as temporary:
            make_model(temporary)
        assert os.listdir(tmp_path) == ["folder"]

        def overwrite(last: int = number) -> None:
            calls = itertools.count()

            def dying(function: Callable[..., Any]) -> Callable[..., Any]:
                return lambda *args, **kwargs: function(*args, **kwargs) if next(calls) < last else os._exit(9)

            for name in ("fsync", "rename", "unlink", "rmdir"):
                setattr(os, name, dying(getattr(os, name)))
            with new_folder(folder, overwrite=True) as temporary:
                make_model(temporary, "new")

        status = in_a_child(overwrite)
        aside = not folder.exists()
        seen.add("aside" if aside else text_of(folder))
        assert not aside or text_of(previous) == "old"
        if status == 0:
            break
    assert status == 0 and not previous.exists()
    assert seen == {"old", "new", "aside"}


@pytest.mark.parametrize("after", [False, True])
def test_interrupted_at_any_system_call_leaves_the_old_or_the_new_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    """Ctrl-C before or after the n-th flush, renaming or removal, for all n: nothing is left beside it."""
    folder = make_model(tmp_path / "folder")
    seen = []
    for number in range(50):
        make_model(folder)
        calls = itertools.count()

        def interrupted(function: Callable[..., Any], calls: Any = calls, last: int = number) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                is_last = next(calls) == last
                if is_last and not after:
                    raise KeyboardInterrupt
                result = function(*args, **kwargs)
                if is_last and after:
                    raise KeyboardInterrupt
                return result

            return call

        with monkeypatch.context() as patch:
            for name in ("fsync", "rename", "unlink", "rmdir"):
                patch.setattr(os, name, interrupted(getattr(os, name)))
            try:
                with new_folder(folder, overwrite=True) as temporary:
                    make_model(temporary, "new")
            except KeyboardInterrupt:
                seen.append(text_of(folder))
            else:
                break
        assert [name for name in os.listdir(tmp_path) if name != ".folder.lock"] == ["folder"]
        check_output_dir(folder, overwrite=True)
        assert os.listdir(tmp_path) == ["folder"]
    assert set(seen) == {"old", "new"} and len(seen) > 5


def test_the_only_good_copy_is_put_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_model(tmp_path / ".new.previous", "good")
    with pytest.raises(ValueError, match="is not empty"), caplog.at_level(logging.WARNING):
        check_output_dir(tmp_path / "new")
    assert text_of(tmp_path / "new") == "good"
    assert "which a stopped run had moved aside" in caplog.text


def test_two_copies_of_which_one_may_be_good(tmp_path: Path) -> None:
    make_model(tmp_path / ".new.previous", "good")
    make_model(tmp_path / "new", "other")
    with pytest.raises(ValueError, match="keep one of the two"):
        check_output_dir(tmp_path / "new", overwrite=True)
    assert (text_of(tmp_path / "new"), text_of(tmp_path / ".new.previous")) == ("other", "good")


WAITING = """
import pathlib, signal, sys, time
from hf_moe_ted.files.output import new_folder
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
with new_folder(pathlib.Path(sys.argv[1])) as folder:
    (folder / "half").touch()
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
def test_stopped_process_leaves_nothing(tmp_path: Path, number: int, status: int) -> None:
    command = [sys.executable, "-c", WAITING, str(tmp_path / "new")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(number)
        _, printed = process.communicate()
    assert process.returncode == status
    assert f"Stopped before {tmp_path / 'new'} was complete" in printed
    assert os.listdir(tmp_path) == []


# ---- mount points and folders that have other files ----


def test_mount_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are renamed in it, one after another, and the config is the last."""
    target = tmp_path / "mounted"
    target.mkdir()
    monkeypatch.setattr(places, "_is_mount", lambda folder: folder == target)
    inode = target.stat().st_ino
    order = []
    replace = os.replace

    def record(source: Path, destination: Path) -> None:
        order.append(destination.name)
        replace(source, destination)

    monkeypatch.setattr(os, "replace", record)
    for text, overwrite in (("one", False), ("two", True)):
        with new_folder(target, overwrite=overwrite) as folder:
            assert folder.is_relative_to(target)
            make_model(folder, text)
            (folder / "vocab.json").touch()
        assert order[-1] == "config.json" and len(order) == 3
        order.clear()
    assert (target.stat().st_ino, text_of(target)) == (inode, "two")
    assert os.listdir(tmp_path) == ["mounted"]


def test_killed_in_a_mount_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = make_model(tmp_path / "mounted")
    monkeypatch.setattr(places, "_is_mount", lambda folder: folder == target)

    def die_at_second_file() -> None:
        calls = itertools.count()
        replace = os.replace

        def dying(source: Path, destination: Path) -> None:
            if next(calls) > 0:
                os._exit(9)
            replace(source, destination)

        os.replace = dying  # type: ignore[assignment]
        with new_folder(target, overwrite=True) as folder:
            make_model(folder, "new")

    assert in_a_child(die_at_second_file) != 0
    assert not (target / "config.json").exists()  # nobody takes it for a model
    check_output_dir(target, overwrite=True)
    with new_folder(target, overwrite=True) as folder:
        make_model(folder, "newer")
    assert names_in(target) == ["config.json", "model.safetensors"] and text_of(target) == "newer"


def test_files_into_a_folder(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("other")
    (tmp_path / "model-1").write_text("old")
    stale = re.compile(r"model-\d")
    with pytest.raises(KeyError), files_into(tmp_path, stale=stale) as folder:
        (folder / "model-2").write_text("half")
        raise KeyError
    assert names_in(tmp_path) == ["model-1", "other"]
    with files_into(tmp_path, stale=stale) as folder:
        (folder / "below").mkdir()
        (folder / "below" / "file").touch()
        (folder / "model-2").write_text("new")
    assert names_in(tmp_path) == ["below", "below/file", "model-2", "other"]


def test_checkpoints_of_killed_trainings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / ".checkpoint-4.incomplete").mkdir()
    (tmp_path / ".checkpoint-5.incomplete-ab12").mkdir()
    make_model(tmp_path / ".checkpoint-6.previous")
    make_model(tmp_path / "checkpoint-7")
    (tmp_path / "checkpoint-7" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-8").mkdir()
    (tmp_path / "checkpoint-8" / "thesis.txt").touch()
    (tmp_path / ".notes.incomplete-1").mkdir()
    with caplog.at_level(logging.WARNING):
        tidy_up_checkpoints(tmp_path, "checkpoint-7")
        tidy_up_checkpoints(tmp_path, "checkpoint-8")
        tidy_up_checkpoints(tmp_path / "nowhere", "checkpoint-8")
    names = [".notes.incomplete-1", "checkpoint-6", "checkpoint-7", "replaced-1-checkpoint-8"]
    assert sorted(os.listdir(tmp_path)) == names
    assert "is not only a checkpoint (it has thesis.txt)" in caplog.text
    check_output_dir(tmp_path / "checkpoint-7", overwrite=True, kind=TRAINER_CHECKPOINT)


# ---- files, and errors of the system ----


def test_file_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(tmp_path / "new" / "file.json", "one")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"file.json cannot be written: No space left on device; free some space"):
        write_file(tmp_path / "new" / "file.json", "two")
    assert (tmp_path / "new" / "file.json").read_text() == "one"
    assert os.listdir(tmp_path / "new") == ["file.json"]


class RustError(Exception):
    """What libraries in Rust raise."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), r"new cannot be written: No space left on device; free some space"),
        (RustError("I/O error: File too large (os error 27)"), r"new cannot be written: File too large; the system"),
        (OSError(13, "Permission denied", "/else/where"), r"Permission denied: '/else/where'"),
    ],
)
def test_errors_say_what_to_do(tmp_path: Path, error: Exception, message: str) -> None:
    with pytest.raises(OSError, match=message), new_folder(tmp_path / "new"):
        raise error
    assert os.listdir(tmp_path) == []


# ---- places that are kept from the check on ----


def test_a_place_that_is_checked_is_kept_to_the_end(tmp_path: Path) -> None:
    target = tmp_path / "above" / "new"

    def refused(attempt: Callable[[], None]) -> bool:
        def child() -> None:
            writing_module._kept.set(None)  # as in a process that was not forked
            try:
                attempt()
            except ValueError as error:
                os._exit(0 if "another process is writing to" in str(error) else 2)
            os._exit(1)

        return in_a_child(child) == 0

    with writing_module.keeping_places():
        check_output_dir(target)
        check_output_file(tmp_path / "scores.json", marker=b"scores")
        assert refused(lambda: check_output_dir(target))
        assert refused(lambda: check_output_file(tmp_path / "scores.json", marker=b"scores"))
        with writing_module.keeping_places():  # a function that keeps places, called by another one
            check_output_dir(target)
        assert refused(lambda: check_output_dir(target))
        with new_folder(target) as folder:
            make_model(folder)
        write_file(tmp_path / "scores.json", "scores")
        assert refused(lambda: check_output_dir(target, overwrite=True))
    assert names_in(tmp_path / "above") == ["new", "new/config.json", "new/model.safetensors"]
    assert sorted(os.listdir(tmp_path)) == ["above", "scores.json"]
    check_output_dir(target, overwrite=True)


def test_a_place_that_is_kept_in_vain_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="of the work"), writing_module.keeping_places():
        check_output_dir(tmp_path / "above" / "new")
        assert os.listdir(tmp_path / "above") == [".new.lock"]
        raise ValueError("of the work")
    assert os.listdir(tmp_path) == []
    make_model(tmp_path / "full")
    with pytest.raises(ValueError, match="is not empty"), writing_module.keeping_places():
        check_output_dir(tmp_path / "full")
    assert os.listdir(tmp_path) == ["full"]
