"""Weights that are read to be written are finite floating-point numbers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hf_moe_ted.tensors.lazy_tensors import LazyTensors, check_all, check_weight, checked_weights
from hf_moe_ted.tensors.safetensors_io import open_pretrained_tensors, write_pretrained_tensors

NAME = "layers.1.ffn.experts.up_proj"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_a_number_that_is_not_finite_is_named(bad: float, dtype: torch.dtype) -> None:
    tensor = torch.ones(4, 3, 5).to(dtype)
    check_weight(NAME, tensor, "file")
    tensor[2, 1, 3] = bad
    with pytest.raises(ValueError, match=rf"{NAME} in file has .* the first at \[2, 1, 3\] \(expert 2\)"):
        check_weight(NAME, tensor, "file")
    with pytest.raises(ValueError, match=r"norm.weight in file has .* the first at \[3, 1, 2\];"):
        check_weight("norm.weight", tensor.transpose(0, 2), "file")


def test_large_numbers_are_finite_and_parts_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_moe_ted.tensors.lazy_tensors._CHUNK_NUMEL", 7)
    check_weight(NAME, torch.full((9, 9), torch.finfo(torch.float32).max), "file")  # whose sum is not
    check_weight(NAME, torch.empty(0, 3), "file")
    check_weight(NAME, torch.tensor(1.0), "file")
    tensor = torch.ones(9, 9)
    tensor[8, 7] = tensor[8, 8] = float("nan")
    with pytest.raises(ValueError, match=r"the first at \[8, 7\]"):
        check_weight(NAME, tensor, "file")


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_every_way_of_reading_checks(suffix: str, tmp_path: Path) -> None:
    tensors = {"good": torch.ones(3, 2), NAME: torch.tensor([[1.0, 2], [3, float("nan")]]), "whole": torch.arange(3)}
    path = tmp_path / ("model.safetensors" if suffix == "safetensors" else "pytorch_model.bin")
    save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
    found = open_pretrained_tensors(tmp_path)
    assert torch.equal(found["good"], tensors["good"])
    assert found.row(NAME, 0).tolist() == [1, 2]
    for read in (
        lambda: found[NAME],
        lambda: found.row(NAME, 1),
        lambda: found.into(NAME, torch.empty(2, 2)),
        lambda: check_all(found),
    ):
        with pytest.raises(ValueError, match=rf"{NAME} in .*{path.name} has .* the first at \[1, 1\] \(expert 1\)"):
            read()
    with pytest.raises(ValueError, match=rf"whole in .*{path.name} is torch.int64"):
        found["whole"]


def test_a_dtype_that_cannot_hold_a_number_is_refused(tmp_path: Path) -> None:
    tensors = {"a": torch.tensor([1.0, 70_000.0])}
    lazy = LazyTensors({"a": tensors["a"].to("meta")}, tensors.__getitem__)
    write_pretrained_tensors(checked_weights(lazy), tmp_path, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"a has 7e\+04 at \[1\], which torch.float16 cannot hold; choose another"):
        write_pretrained_tensors(checked_weights(lazy), tmp_path, dtype=torch.float16)


def test_one_way_of_reading_is_enough() -> None:
    weights = {"a": torch.arange(6.0).reshape(3, 2), "b": torch.ones(2, dtype=torch.bfloat16)}

    def read_into(name: str, out: Tensor) -> None:
        out.copy_(weights[name])

    specs = {name: weight.to("meta") for name, weight in weights.items()}
    for lazy in (LazyTensors(specs, lambda name: weights[name].clone()), LazyTensors(specs, read_into=read_into)):
        renamed = lazy.under_names({"x": "b", "y": "a", "z": "a"})
        assert [*renamed] == ["x", "y", "z"] and renamed.specs["y"].shape == (3, 2)
        for tensors, name in ((lazy, "a"), (renamed, "y"), (renamed, "z")):
            tensors.into(name, out := torch.empty(3, 2))
            assert torch.equal(out, weights["a"]) and torch.equal(tensors[name], weights["a"])
            assert tensors.row(name, 2).tolist() == [4, 5]
        assert renamed["x"].dtype == torch.bfloat16
        with pytest.raises(KeyError):
            renamed["a"]
