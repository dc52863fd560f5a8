"""One ordinary folder from any layout, into any other; what a failure leaves."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from sharded_by_hand import EIGHT, FOUR, check, clear, mixtral, saved_by_eight, shard, zcode_m3
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig

from hf_moe_ted import ZCodeM3ForConditionalGeneration
from hf_moe_ted.distributed.checkpoint import atomic_folder, load_weights, named_tensors, save_pretrained
from hf_moe_ted.tensors import safetensors_io
from hf_moe_ted.testing import run_distributed_test, tiny_config


class Tokenizer:
    """All that is asked of one."""

    def save_pretrained(self, folder: Path) -> None:
        (folder / "templates").mkdir(exist_ok=True)
        (folder / "templates" / "a.txt").write_text("tokens")


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def save_and_load_on_eight(folder: Path) -> None:
    for make_model, layouts in ((zcode_m3, EIGHT), (mixtral, EIGHT[:1])):
        expected = parameters_of(make_model())
        name = make_model.__name__
        for number, layout in enumerate(layouts):
            model = shard(make_model(), layout)
            model.config.distributed_config = DistributedConfig(tp_size=2)
            max_shard_size = "100KB" if number == 1 else "5GB"
            save_pretrained(model, folder / f"{name}{number}", max_shard_size=max_shard_size)
            clear(model)
            load_weights(model, folder / f"{name}{max(number - 1, 0)}")  # of another layout
            check(model, None, expected)


saved = saved_by_eight(save_and_load_on_eight)


@pytest.mark.parametrize(("make_model", "num_folders"), [(zcode_m3, len(EIGHT)), (mixtral, 1)])
def test_folder_is_that_of_one_process(
    saved: Path, tmp_path: Path, make_model: Callable[[], PreTrainedModel], num_folders: int
) -> None:
    model = make_model()
    model.save_pretrained(tmp_path, save_original_format=False)
    expected = load_file(tmp_path / "model.safetensors")
    for number in range(num_folders):
        folder = saved / f"{make_model.__name__}{number}"
        tensors: dict[str, Tensor] = {}
        files = sorted(folder.glob("*.safetensors"))
        for path in files:
            tensors |= load_file(path)
        assert len(files) > 1 if number == 1 else len(files) == 1
        assert {*tensors} == {*expected}
        for name, tensor in tensors.items():
            assert tensor.dtype == expected[name].dtype
            assert torch.equal(tensor, expected[name])
        for name in ("config.json", "generation_config.json"):
            assert (folder / name).read_text() == (tmp_path / name).read_text()
        loaded, info = type(model).from_pretrained(folder, output_loading_info=True)
        assert not any(info.values())
        check(loaded, None, parameters_of(model))
        clear(model)
        load_weights(model, folder)
        check(model, None, parameters_of(loaded))


def load_on_four(folder: Path) -> None:
    for layout in FOUR:
        for make_model in (zcode_m3, mixtral):
            model = shard(make_model(), layout)
            clear(model)
            load_weights(model, folder / f"{make_model.__name__}0")
            check(model, None, parameters_of(make_model()))


def other_cases_on_four(saved: Path, folder: Path) -> None:
    load_on_four(saved)
    gathered_parameters_are_saved(folder, saved / "zcode_m30")
    files_of_others_stay(folder / "merged")
    errors_reach_all(folder)


def another_zcode_m3() -> PreTrainedModel:
    model = zcode_m3(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    return model


def gathered_parameters_are_saved(folder: Path, source: Path) -> None:
    """ZeRO-1 and 2 leave whole parameters in the modules after a forward without backward."""
    model = shard(another_zcode_m3(), FOUR[1])
    for module in model.modules():
        if hasattr(module, "set_reshard_after_forward"):
            module.set_reshard_after_forward(False)
    inputs = {"input_ids": torch.arange(4, 20).reshape(2, 8), "labels": torch.arange(4, 20).reshape(2, 8)}
    with torch.no_grad():
        before = model(**inputs).loss
        assert not isinstance(model.get_parameter("model.shared.weight"), DTensor)
        save_pretrained(model, folder / "gathered")
        model(**inputs)
        load_weights(model, source)
        after = model(**inputs).loss  # the forward sees what was loaded, in the model's dtype
        torch.testing.assert_close(after, zcode_m3(torch.bfloat16)(**inputs).loss)
    assert abs(before - after) > 0.1


def files_of_others_stay(folder: Path) -> None:
    model = shard(zcode_m3(), FOUR[0])
    if dist.get_rank() == 0:
        (folder / "checkpoint-500").mkdir(parents=True)
        (folder / "checkpoint-500" / "precious").write_text("text")
        (folder / "config.json").write_text("{}")
    dist.barrier()
    save_pretrained(model, folder, processing_class=Tokenizer(), max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    dist.barrier()
    save_pretrained(model, folder, processing_class=Tokenizer())


def errors_reach_all(folder: Path) -> None:
    rank = dist.get_rank()
    model = shard(zcode_m3(), FOUR[0])
    before = sorted(path.name for path in folder.iterdir())
    create, calls = safetensors_io.create_safetensors_file, []

    def full_disk(path: Path, specs: dict[str, Tensor]) -> dict[str, Tensor]:
        calls.append(path)
        if len(calls) == 2:
            raise OSError("no space left")
        return create(path, specs)

    safetensors_io.create_safetensors_file = full_disk
    with pytest.raises(OSError if rank == 0 else RuntimeError, match="no space left"):
        save_pretrained(model, folder / "new", max_shard_size="100KB")
    safetensors_io.create_safetensors_file = create
    assert len(calls) == (2 if rank == 0 else 0)

    with pytest.raises(KeyError if rank == 2 else RuntimeError, match="mistake"), atomic_folder(folder / "new"):
        if rank == 2:
            raise KeyError("mistake")
    with pytest.raises(ValueError, match="is a file; choose a folder"):
        save_pretrained(model, folder / "merged" / "config.json")
    with pytest.raises(ValueError, match=r"has neither model.safetensors nor"):
        load_weights(model, folder if rank == 3 else folder / "merged")
    if rank == 1:
        model.hf_quantizer = object()
    with pytest.raises(ValueError, match="the model is quantized"):
        save_pretrained(model, folder / "new")
    dist.barrier()
    assert sorted(path.name for path in folder.iterdir()) == before


def test_other_cases(saved: Path, tmp_path: Path) -> None:
    run_distributed_test(other_cases_on_four, 4, saved, tmp_path)
    gathered = ZCodeM3ForConditionalGeneration.from_pretrained(tmp_path / "gathered")
    check(gathered, None, parameters_of(another_zcode_m3()))
    assert json.loads((tmp_path / "gathered" / "config.json").read_text())["dtype"] == "bfloat16"
    merged = tmp_path / "merged"
    names = {"checkpoint-500", "config.json", "generation_config.json", "model.safetensors", "templates"}
    assert {path.name for path in merged.iterdir()} == names
    assert (merged / "checkpoint-500" / "precious").read_text() == "text"
    assert (merged / "templates" / "a.txt").read_text() == "tokens"
    check(ZCodeM3ForConditionalGeneration.from_pretrained(merged), None, parameters_of(zcode_m3()))


def test_buffers_and_ties() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "norm": nn.BatchNorm1d(2)})
    model["b"].weight = model["a"].weight
    model["norm"].register_buffer("scratch", torch.ones(1), persistent=False)
    of_norm = {f"norm.{name}" for name in model["norm"].state_dict()}
    assert {*named_tensors(model)} == {"a.weight", "a.bias", "b.bias", *of_norm}
    model.all_tied_weights_keys = {"a.weight": "b.weight"}
    assert {*named_tensors(model)} == {"b.weight", "a.bias", "b.bias", *of_norm}


def test_wrong_weights_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    other = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    save_file({**other.state_dict(), "0.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"(?s)missing: 1.bias.*unknown: 2.bias.*0.weight has the shape"):
        load_weights(model, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="cannot be read"):
        load_weights(model, tmp_path)


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    """As they are where a model is loaded in one process, and nothing outside the folder is read."""
    model = ZCodeM3ForConditionalGeneration(tiny_config(encoder_layers=2))
    model.save_pretrained(tmp_path / "whole", max_shard_size="50KB")
    index = json.loads((tmp_path / "whole" / "model.safetensors.index.json").read_text())
    name, file_name = next(iter(index["weight_map"].items()))
    shutil.copy(tmp_path / "whole" / file_name, tmp_path / "outside.safetensors")
    tensors = load_file(tmp_path / "whole" / file_name)
    elsewhere = {"weight_map": {**index["weight_map"], name: "../outside.safetensors"}}

    def damaged(what: str, change: Any) -> str:
        folder = tmp_path / what
        shutil.copytree(tmp_path / "whole", folder)
        change(folder)
        with pytest.raises(ValueError) as raised:
            load_weights(model, folder)
        return str(raised.value)

    def write_index(content: Any) -> Any:
        return lambda folder: (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    assert "must be a JSON object" in damaged("null", write_index(None))
    assert "has no files by tensor" in damaged("no files", write_index({"weight_map": []}))
    assert "is outside of the folder" in damaged("elsewhere", write_index(elsewhere))
    assert file_name in damaged("missing", lambda folder: (folder / file_name).unlink())
    assert file_name in damaged("cut", lambda folder: os.truncate(folder / file_name, 100))
    without = {key: value for key, value in tensors.items() if key != name}
    assert name in damaged("without one", lambda folder: save_file(without, folder / file_name))
    integers = {**tensors, name: tensors[name].to(torch.int8)}
    message = damaged("integers", lambda folder: save_file(integers, folder / file_name))
    assert f"{name} is torch.int8, but weights must be floating-point numbers" in message
