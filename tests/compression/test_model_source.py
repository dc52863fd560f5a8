"""No command spreads weights that are missing, integers or not finite."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_moe_ted import (
    ZCodeM3ForConditionalGeneration,
    aggregate_experts,
    export_deepspeed_checkpoint,
    prune_experts,
    upcycle_dense_checkpoint,
)
from hf_moe_ted.compression.model_source import ModelSource
from hf_moe_ted.tensors.lazy_tensors import check_all

SHARED, UP = "model.shared.weight", "model.encoder.layers.1.ffn.experts.up_proj"

COMMANDS: dict[str, Callable[[Path, Path], Any]] = {
    "prune": lambda folder, new: prune_experts(folder, None, keep=1.0, criterion="random", output_dir=new),
    "aggregate": lambda folder, new: aggregate_experts([folder.with_name("good"), folder], new),
    "export": lambda folder, new: export_deepspeed_checkpoint(folder, new, rules="m2m100"),
    "upcycle": lambda folder, new: upcycle_dense_checkpoint(
        folder, new, num_experts=2, encoder_sparse_step=1, decoder_sparse_step=0
    ),
    "check_all": lambda folder, new: check_all(ModelSource.open(folder).tensors),
}


def set_at(index: tuple[int, ...], value: float) -> Callable[[Tensor], Tensor]:
    def change(weight: Tensor) -> Tensor:
        weight[index] = value
        return weight

    return change


DAMAGES: dict[str, tuple[str, Callable[[Tensor], Tensor | None], str]] = {
    "missing": (SHARED, lambda weight: None, rf"missing: {SHARED}"),
    "integers": (
        UP,
        lambda weight: weight.to(torch.int8),
        rf"{UP} is torch\.int8, but weights must be floating-point",
    ),
    "shape": (UP, lambda weight: weight[:, 1:].contiguous(), rf"{UP} has the shape .*, but the config needs"),
    "nan": (UP, set_at((2, 1, 0), float("nan")), rf"{UP} in .*safetensors has .* at \[2, 1, 0\] \(expert 2\)"),
    "infinity": (SHARED, set_at((5, 3), float("inf")), rf"{SHARED} in .*safetensors has .* at \[5, 3\];"),
}


@pytest.fixture(name="folder", scope="module")
def _folder(make_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "good"
    make_model().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_refused_by_name(command: str, damage: str, folder: Path, tmp_path: Path) -> None:
    name, change, message = DAMAGES[damage]
    shutil.copytree(folder, tmp_path / "good")
    bad = shutil.copytree(folder, tmp_path / "bad")
    weights = load_file(bad / "model.safetensors")
    changed = change(weights.pop(name))
    save_file(weights if changed is None else {**weights, name: changed}, bad / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        COMMANDS[command](bad, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "good"]


def test_model_in_memory_is_checked(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model: ZCodeM3ForConditionalGeneration = make_model()
    with torch.no_grad():
        model.get_parameter(UP)[2, 1, 0] = float("nan")
    message = rf"{UP} in the model in memory \(ZCodeM3ForConditionalGeneration\) has .* \[2, 1, 0\] \(expert 2\)"
    with pytest.raises(ValueError, match=message):
        check_all(ModelSource.open(model).tensors)
    with pytest.raises(ValueError, match=message):
        export_deepspeed_checkpoint(model, tmp_path / "new", rules="m2m100")
