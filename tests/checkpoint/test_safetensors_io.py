"""Safetensors, written shard by shard."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_moe_ted.checkpoint.lazy_tensors import LazyTensors
from hf_moe_ted.checkpoint.safetensors_file import create_safetensors_file
from hf_moe_ted.checkpoint.safetensors_io import write_pretrained_tensors


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
