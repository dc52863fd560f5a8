"""New folders appear whole or not at all."""

import itertools
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_moe_ted.checkpoint.lazy_tensors import LazyTensors
from hf_moe_ted.checkpoint.safetensors_file import create_safetensors_file
from hf_moe_ted.checkpoint.safetensors_io import new_folder, write_pretrained_tensors


def test_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    output_dir = tmp_path / "above" / "new"
    with new_folder(output_dir) as folder:
        (folder / "file").write_text("text")
        assert not output_dir.exists()
        assert folder.parent == output_dir.parent  # on the same disk, so that renaming moves no bytes
    assert (output_dir / "file").read_text() == "text"
    assert [path.name for path in output_dir.parent.iterdir()] == ["new"]


def test_files_have_the_usual_permissions(tmp_path: Path) -> None:
    with new_folder(tmp_path / "new") as folder:
        write_pretrained_tensors(LazyTensors({"a": torch.empty(2, device="meta")}, lambda _: torch.ones(2)), folder)
    (tmp_path / "usual").mkdir()
    (tmp_path / "usual" / "file").touch()
    for ours, usual in (("new", "usual"), ("new/model.safetensors", "usual/file")):
        modes = [stat.S_IMODE((tmp_path / path).stat().st_mode) for path in (ours, usual)]
        assert modes[0] == modes[1]


def test_error_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "precious.txt").write_text("text")
    for name, overwrite in (("new", False), ("old", True)):
        with pytest.raises(OSError, match="disk full"), new_folder(tmp_path / name, overwrite=overwrite) as folder:
            (folder / "half").write_text("half")
            raise OSError("disk full")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["precious.txt"]


def test_killed_process_leaves_no_folder_of_that_name(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, sys\n"
        "from hf_moe_ted.checkpoint.safetensors_io import new_folder\n"
        "with new_folder(pathlib.Path(sys.argv[1])) as folder:\n"
        "    (folder / 'model.safetensors').write_text('half')\n"
        "    os._exit(9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "new")], check=False)
    assert done.returncode == 9
    assert not (tmp_path / "new").exists()
    with new_folder(tmp_path / "new") as folder:
        assert list(folder.iterdir()) == []  # and a rerun starts over


def test_killed_at_any_system_call_leaves_the_old_or_the_new_folder(tmp_path: Path) -> None:
    """A process that dies at its n-th flush, renaming or removal, for all n."""
    folder, previous = tmp_path / "folder", tmp_path / ".folder.previous"
    seen = set()
    for number in range(50):
        with new_folder(folder, overwrite=True) as temporary:
            (temporary / "file").write_text("old")
        pid = os.fork()
        if pid == 0:
            calls = itertools.count()

            def dying(function: Callable[..., Any], calls: Any = calls, last: int = number) -> Callable[..., Any]:
                return lambda *args, **kwargs: function(*args, **kwargs) if next(calls) < last else os._exit(9)

            for name in ("fsync", "rename", "unlink", "rmdir"):
                setattr(os, name, dying(getattr(os, name)))
            with new_folder(folder, overwrite=True) as temporary:
                (temporary / "file").write_text("new")
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        aside = not folder.exists()
        seen.add("aside" if aside else (folder / "file").read_text())
        assert not aside or (previous / "file").read_text() == "old"
        if status == 0:
            break
    assert status == 0 and not previous.exists()
    assert seen == {"old", "new", "aside"}


def test_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"output_dir \(.*file\) is a file"), new_folder(tmp_path / "file"):
        pass
    with pytest.raises(ValueError, match=r"cannot be created"), new_folder(tmp_path / "file" / "new"):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_that_may_not_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(ValueError, match=r"cannot be created"), new_folder(tmp_path / "closed" / "new"):
        pass


def test_only_one_shard_is_in_memory(tmp_path: Path) -> None:
    """A tensor is read when its shard is written, and the next shard is begun after that."""
    num_files: list[int] = []

    def read(name: str) -> torch.Tensor:
        num_files.append(len(list(tmp_path.glob("*.safetensors"))))
        return torch.full((100,), float(name))

    specs = {str(i): torch.empty(100, device="meta") for i in range(6)}
    paths = write_pretrained_tensors(LazyTensors(specs, read), tmp_path, max_shard_size=800)
    assert num_files == [1, 1, 2, 2, 3, 3]
    assert [path.name for path in paths][-1] == "model.safetensors.index.json"
    assert load_file(tmp_path / "model-00003-of-00003.safetensors")["5"][0] == 5


def test_integers_keep_their_dtype(tmp_path: Path) -> None:
    specs = {"counts": torch.empty(2, dtype=torch.int64, device="meta"), "weights": torch.empty(2, device="meta")}
    tensors = {"counts": torch.tensor([1, 2**40]), "weights": torch.ones(2)}
    write_pretrained_tensors(LazyTensors(specs, tensors.__getitem__), tmp_path, dtype=torch.float16)
    written = load_file(tmp_path / "model.safetensors")
    assert written["counts"].tolist() == [1, 2**40]
    assert written["weights"].dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool])
def test_files_are_those_of_safetensors(dtype: torch.dtype, tmp_path: Path) -> None:
    """Odd sizes, a scalar, an empty tensor and a transposed one, beside another dtype."""
    shapes: dict[str, tuple[int, ...]] = {"odd": (3, 5), "scalar": (), "empty": (0, 4), "one": (1,)}
    tensors = {name: (torch.rand(shape) * 4).to(dtype) for name, shape in shapes.items()}
    tensors |= {"wide": torch.rand(3, dtype=torch.float64), "transposed": torch.rand(2, 3).t()}
    created = create_safetensors_file(tmp_path / "ours", {name: t.to("meta") for name, t in tensors.items()})
    for name, tensor in tensors.items():
        created[name].copy_(tensor)
    del created
    loaded = load_file(tmp_path / "ours")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name].double(), tensor.double()), name


def test_dtype_that_safetensors_lacks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a is torch.complex64, which safetensors cannot hold"):
        create_safetensors_file(tmp_path / "file", {"a": torch.empty(2, dtype=torch.complex64, device="meta")})


def test_full_disk_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No space left|File too large"):
        create_safetensors_file(tmp_path / "file", {"a": torch.empty(2**55, device="meta")})
