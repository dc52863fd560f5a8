"""Training states from strangers: nothing in them is executed, and none takes more memory than it has bytes."""

import io
import pickle
import zipfile
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, MetadataIndex

from hf_moe_ted.distributed.training_state import load_training_state, save_training_state


@pytest.fixture
def state(tmp_path: Path) -> tuple[Path, nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    save_training_state(tmp_path / "state", model, optimizer, extra={"step": 5})
    return tmp_path / "state", model, optimizer


class Evil:
    """Runs something when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("function", [print, eval, exec, getattr, open, __import__, torch.load, Path.touch])
def test_nothing_is_executed(
    state: tuple[Path, nn.Module, torch.optim.Optimizer], function: Callable[..., Any], capsys: Any
) -> None:
    folder, model, optimizer = state
    mark = folder / "executed"
    arguments = {print: "executed", eval: f"open({str(mark)!r}, 'w')", exec: f"open({str(mark)!r}, 'w')"}
    argument = arguments.get(function, mark if function is Path.touch else str(mark))
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(function, argument)))
    with pytest.raises(ValueError, match=r"nothing in it was executed: it names .*, which no training state needs"):
        load_training_state(folder, model, optimizer)
    assert not mark.exists() and "executed" not in capsys.readouterr().out


class AsEarlyPython311(pickle.Pickler):
    """Pickles members of enumerations as Python 3.11.2 does, which Debian 12 has."""

    def reducer_override(self, obj: Any) -> Any:
        return (getattr, (type(obj), obj.name)) if isinstance(obj, Enum) else NotImplemented


def test_state_of_an_early_python_3_11(state: tuple[Path, nn.Module, torch.optim.Optimizer]) -> None:
    folder, model, optimizer = state
    before = model.weight.detach().clone()
    pickled = io.BytesIO()
    AsEarlyPython311(pickled).dump(dcp.FileSystemReader(folder).read_metadata())
    assert b"getattr" in pickled.getvalue()
    (folder / ".metadata").write_bytes(pickled.getvalue())
    with torch.no_grad():
        model.weight.zero_()
    assert load_training_state(folder, model, optimizer) == {"step": 5}
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("arguments", [(dict, "fromkeys"), (_MEM_FORMAT_ENCODING, "mro"), (_MEM_FORMAT_ENCODING, 0, 1)])
def test_nothing_else_of_getattr(
    state: tuple[Path, nn.Module, torch.optim.Optimizer], arguments: tuple[Any, ...]
) -> None:
    folder, model, optimizer = state
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(getattr, *arguments)))
    with pytest.raises(ValueError, match="cannot be read, and nothing in it was executed"):
        load_training_state(folder, model, optimizer)


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"half",
        b"\x80\x04r\xff\xff\xff\xff.",  # an object with the number 2**32 - 1, for which C would make room
        b"\x80\x04" + b"(" * 10**6,
        b"\x80\x04)" + b"\x85" * 10**6 + b".",  # a tuple in a tuple in a tuple
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",  # bytes that are not there
        pickle.dumps({"state_dict_metadata": {}}),
        b"\x80\x04c" + Metadata.__module__.encode() + b"\nMetadata\n}\x8c\x01xK\x01sb.",  # changes the class
    ],
)
def test_damaged_metadata(state: tuple[Path, nn.Module, torch.optim.Optimizer], damaged: bytes) -> None:
    folder, model, optimizer = state
    (folder / ".metadata").write_bytes(damaged)
    with pytest.raises(ValueError, match="has no training state that can be read"):
        load_training_state(folder, model, optimizer)
    assert not hasattr(Metadata, "x")


def leave_the_folder(metadata: Any) -> None:
    for info in metadata.storage_data.values():
        info.relative_path = "../outside"


def exceed_the_file(metadata: Any) -> None:
    for info in metadata.storage_data.values():
        info.length += 10**9


def have_huge_tensors(metadata: Any) -> None:
    for spec in metadata.state_dict_metadata.values():
        spec.chunks[0].sizes = torch.Size([2**40] * len(spec.size))


def have_wrong_types(metadata: Any) -> None:
    metadata.storage_data = list(metadata.storage_data)


def lack_a_tensor(metadata: Any) -> None:
    metadata.state_dict_metadata.pop("weights.weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (leave_the_folder, "names a file outside its folder"),
        (exceed_the_file, "is shorter than its list of tensors says"),
        (have_huge_tensors, "is outside of the tensor"),
        (have_wrong_types, "is damaged: TypeError"),
        (lack_a_tensor, "is damaged: KeyError"),
    ],
)
def test_metadata_that_disagree_with_the_files(
    state: tuple[Path, nn.Module, torch.optim.Optimizer], change: Callable[[Any], None], message: str
) -> None:
    folder, model, optimizer = state
    before = model.weight.detach().clone()
    metadata = dcp.FileSystemReader(folder).read_metadata()
    assert MetadataIndex("weights.weight", torch.Size([0, 0])) in metadata.storage_data
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=message):
        load_training_state(folder, model, optimizer)
    assert torch.equal(model.weight, before)


def compressed(path: Path) -> None:
    """The same archive, but with its numbers compressed, as a bomb would be."""
    content = path.read_bytes()
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    path.write_bytes(buffer.getvalue())


def test_compressed_archives(state: tuple[Path, nn.Module, torch.optim.Optimizer]) -> None:
    folder, model, optimizer = state
    compressed(folder / "training_state.pt")
    with pytest.raises(ValueError, match="has compressed content"):
        load_training_state(folder, model, optimizer)


def test_compressed_chunk(state: tuple[Path, nn.Module, torch.optim.Optimizer]) -> None:
    folder, model, optimizer = state
    metadata = dcp.FileSystemReader(folder).read_metadata()
    info = metadata.storage_data[MetadataIndex("weights.weight", torch.Size([0, 0]))]
    path = folder / "weights"
    path.write_bytes((folder / info.relative_path).read_bytes()[info.offset : info.offset + info.length])
    compressed(path)
    with (folder / info.relative_path).open("ab") as file:
        info.offset, info.length = file.tell(), path.stat().st_size
        file.write(path.read_bytes())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(RuntimeError, match="has compressed content"):
        load_training_state(folder, model, optimizer)


def test_wrong_types_beside_the_tensors(state: tuple[Path, nn.Module, torch.optim.Optimizer]) -> None:
    folder, model, optimizer = state
    rest = torch.load(folder / "training_state.pt")
    for key in rest:
        torch.save({**rest, key: 5}, folder / "training_state.pt")
        with pytest.raises(ValueError, match=f"{key} is of the type int"):
            load_training_state(folder, model, optimizer)
    torch.save([], folder / "training_state.pt")
    with pytest.raises(ValueError, match="has no training state that can be read"):
        load_training_state(folder, model, optimizer)
