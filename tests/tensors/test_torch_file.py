"""Files of `torch.save` that are damaged, or made to take all memory and time."""

import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_moe_ted.files.messages import UnreadableFileError
from hf_moe_ted.tensors import torch_file
from hf_moe_ted.tensors.lazy_tensors import TensorFile
from hf_moe_ted.tensors.torch_file import check_checksums, load_torch_file


@pytest.fixture(name="path")
def _path(tmp_path: Path) -> Path:
    path = tmp_path / "pytorch_model.bin"
    torch.save(OrderedDict(a=torch.arange(300.0), b=torch.ones(2, 5), c=torch.zeros(3, dtype=torch.bfloat16)), path)
    return path


def read_all(path: Path) -> dict[str, torch.Tensor]:
    file = TensorFile(path)
    return {name: file.read(name) for name in file.specs}


def test_a_flipped_bit_in_any_entry_is_seen(path: Path) -> None:
    good, content = read_all(path), path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        entries = [entry for entry in archive.infolist() if entry.file_size]
    assert sum("/data/" in entry.filename for entry in entries) == 3
    for entry in entries:
        name_length, extra_length = (
            int.from_bytes(content[entry.header_offset + at :][:2], "little") for at in (26, 28)
        )
        start = entry.header_offset + 30 + name_length + extra_length
        for position in {start, start + entry.file_size - 1}:
            damaged = bytearray(content)
            damaged[position] ^= 0x10
            path.write_bytes(damaged)
            with pytest.raises(UnreadableFileError, match=r"pytorch_model\.bin .*(damaged|not of torch\.save|names)"):
                read_all(path)
    path.write_bytes(content)
    assert all(torch.equal(value, good[name]) for name, value in read_all(path).items())


def test_a_file_is_compared_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []
    monkeypatch.setattr("hf_moe_ted.tensors.lazy_tensors.check_checksums", calls.append)
    file = TensorFile(path)
    assert calls == []  # names and shapes need no numbers
    file.read("a"), file.read("b"), file.close(), file.read("a")
    assert calls == [path]


def test_files_without_checksums_are_read(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(5.0)}
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensors, tmp_path / "new.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    torch.save(tensors, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    for name in ("new.bin", "old.bin"):
        check_checksums(tmp_path / name)
        assert torch.equal(read_all(tmp_path / name)["a"], tensors["a"])


class Call:
    def __init__(self, function: Any, *args: Any):
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def nested(depth: int) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for _ in range(depth):
        content = {"a": content}
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Call(bytearray, 2**36), "bytearray, which no checkpoint of weights needs"),
        (Call(torch.FloatTensor, 2**36), "torch.FloatTensor, which no checkpoint"),
        ({"a": torch.zeros(1).expand(2**40)}, r"a tensor .* of 4,398,046,511,104 bytes, but fewer numbers"),
        ({"a": torch.zeros(2**40, 0)}, "without numbers"),
        ({"a": torch.zeros(2**40, device="meta")}, "not a plain, dense tensor"),
        ({"a": torch.eye(3).to_sparse()}, "not a plain, dense tensor|names"),
        (nested(200), "nested more than 64 deep"),
    ],
)
def test_what_takes_more_than_the_file_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    torch.save(content, path)
    with pytest.raises(UnreadableFileError, match=rf"file\.pt .*({message})"):
        load_torch_file(path)


def test_compressed_and_long_pickles_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_file, "MAX_PICKLE_OPERATIONS", 20)
    with pytest.raises(UnreadableFileError, match=r"pytorch_model\.bin .*more than 20 operations"):
        load_torch_file(path)
    monkeypatch.setattr(torch_file, "MAX_PICKLE_BYTES", 100)
    with pytest.raises(UnreadableFileError, match=r"pytorch_model\.bin has \d+ bytes besides its tensors"):
        load_torch_file(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pytorch_model/data.pkl", pickle.dumps("a" * 2**20, protocol=2))
    for function in (load_torch_file, check_checksums):
        with pytest.raises(UnreadableFileError, match=r"pytorch_model\.bin has compressed entries"):
            function(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("text.txt", "text")
    with pytest.raises(UnreadableFileError, match=r"an archive, but not of torch\.save"):
        load_torch_file(path)


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.bin")
    (tmp_path / "device.bin").symlink_to("/dev/zero")
    (tmp_path / "folder.bin").mkdir()
    (tmp_path / "nowhere.bin").symlink_to(tmp_path / "gone")
    kinds = {"pipe": "pipe, socket or device", "device": "pipe, socket or device", "folder": "it is a folder"}
    for name, kind in {**kinds, "nowhere": "does not exist"}.items():
        for function in (load_torch_file, check_checksums, TensorFile):
            with pytest.raises(UnreadableFileError, match=rf"{name}\.bin .*{kind}"):
                function(tmp_path / f"{name}.bin")
