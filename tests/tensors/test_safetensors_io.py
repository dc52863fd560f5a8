"""Safetensors, written shard by shard."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_moe_ted.tensors.lazy_tensors import LazyTensors
from hf_moe_ted.tensors.safetensors_file import create_safetensors_file
from hf_moe_ted.tensors.safetensors_io import check_tensors, open_pretrained_tensors, write_pretrained_tensors


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


@pytest.mark.parametrize("size", [0, -5, "-1GB", "0MB", "0.5", "abc", "5gb", None, True])
def test_wrong_sizes_are_named_before_a_file_is_written(size: object, tmp_path: Path) -> None:
    tensors = LazyTensors({"a": torch.empty(2, device="meta")}, lambda name: torch.zeros(2))
    with pytest.raises(ValueError, match=rf"max_shard_size \({size!r}\) must be "):
        write_pretrained_tensors(tensors, tmp_path, max_shard_size=size)  # type: ignore[arg-type]
    assert not [*tmp_path.iterdir()]


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


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([1], "must be a JSON object"),
        ({}, "has no files by tensor"),
        ({"weight_map": None}, "has no files by tensor"),
        ({"weight_map": ["a"]}, "has no files by tensor"),
        ({"weight_map": {}}, "has no files by tensor"),
        ({"weight_map": {"a": 1}}, "says that a is in 1, which is not the name of a file"),
        ({"weight_map": {"a": ["x"]}}, "which is not the name of a file"),
        ({"weight_map": {"a": None}}, "says that a is in None"),
        ({"weight_map": {"a": ""}}, "which is not the name of a file"),
        (
            {"weight_map": {"a": "../outside.safetensors"}},
            r"is in \.\./outside\.safetensors, which is outside of the folder",
        ),
        ({"weight_map": {"a": "b/../../outside.safetensors"}}, "is outside of the folder"),
        ({"weight_map": {"a": "{outside}"}}, "is outside of the folder"),
        ({"weight_map": {"a": "pipe.safetensors"}}, "pipe, socket or device"),
        ({"weight_map": {"a": "a\0b"}}, "cannot be read"),
        ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors does not exist"),
        (
            {"weight_map": {"b": "shard.safetensors"}},
            "says that b is in shard.safetensors, but shard.safetensors does not have it",
        ),
    ],
)
def test_damaged_index(index: object, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    os.mkfifo(folder / "pipe.safetensors")
    for path in (tmp_path / "outside.safetensors", folder / "shard.safetensors"):
        save_file({"a": torch.ones(2)}, path)
    text = json.dumps(index).replace("{outside}", str(tmp_path / "outside.safetensors"))
    for name in ("model.safetensors", "pytorch_model.bin"):
        (folder / f"{name}.index.json").write_text(text)
        with pytest.raises(ValueError, match=rf"{tmp_path}.*{message}"):
            open_pretrained_tensors(folder)
        (folder / f"{name}.index.json").unlink()


def test_links_of_a_download_are_followed(tmp_path: Path) -> None:
    """`hf download` makes a folder of links to files that are called by their hashes."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "model").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "blobs" / "1f2e")
    (tmp_path / "model" / "shard.safetensors").symlink_to("../blobs/1f2e")
    (tmp_path / "model" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "shard.safetensors"}}')
    assert open_pretrained_tensors(tmp_path / "model")["a"].tolist() == [1, 1]


@pytest.mark.parametrize(
    "header",
    [
        '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}',
        '{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,8]}}',
        '{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}',
        '{"a":{"dtype":"F99","shape":[2],"data_offsets":[0,8]}}',
        "[1]",
        "[" * 100_000,
        "",
    ],
)
def test_damaged_header(header: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for length in (len(header), 2**62):
        path.write_bytes(length.to_bytes(8, "little") + header.encode() + b"\0" * 12)
        with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
            open_pretrained_tensors(tmp_path)


def test_integers_in_place_of_weights_are_named() -> None:
    specs = {"a": torch.ones(2, dtype=torch.int8), "b": torch.ones(2, dtype=torch.bool), "c": torch.ones(2).half()}
    with pytest.raises(ValueError, match=r"(?s)a is torch.int8, but weights must be.*b is torch.bool") as error:
        check_tensors(specs, {name: torch.ones(2) for name in specs}, "folder")
    assert "c is" not in str(error.value)
