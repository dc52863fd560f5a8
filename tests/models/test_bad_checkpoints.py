"""Checkpoints whose experts are not those of their config: what transformers reports, what it initializes or refuses.

Missing and unexpected tensors of experts and routers, wrong shapes, damaged files and lost shards raise. Only
`ignore_mismatched_sizes=True` initializes what is missing at random and ignores what is unexpected, with a warning.
"""

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForSeq2SeqLM
from transformers.utils import logging as transformers_logging

from hf_moe_ted import ZCodeM3ForConditionalGeneration
from hf_moe_ted.testing import tiny_config

LAYER = "model.encoder.layers.3.ffn"
EXPERT_TENSORS = [f"experts.{name}" for name in ("up_proj", "up_proj_bias", "down_proj", "down_proj_bias")]
SPARSE_TENSORS = [*EXPERT_TENSORS, "router.weight", "router.bias"]


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """The warnings of transformers, which do not reach the root logger by default."""
    propagates = logging.getLogger("transformers").propagate
    transformers_logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        yield caplog
    logging.getLogger("transformers").propagate = propagates


@pytest.fixture
def tensors(tmp_path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint in `tmp_path`, none of them constant; write back what a test makes of them."""
    torch.manual_seed(0)
    model = ZCodeM3ForConditionalGeneration(tiny_config(router_bias=True))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(tmp_path)
    return load_file(tmp_path / "model.safetensors")


def write(folder: Path, tensors: dict[str, Tensor], **config: Any) -> None:
    """Write tensors and change fields of the config of a checkpoint."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | config))


def load(folder: Path, **kwargs: Any) -> tuple[ZCodeM3ForConditionalGeneration, dict[str, Any]]:
    """The model, and what is not as it should be by the name it has in the loading info."""
    model, info = AutoModelForSeq2SeqLM.from_pretrained(folder, output_loading_info=True, **kwargs)
    return model, {name: keys for name, keys in info.items() if keys}


def reported(caplog: pytest.LogCaptureFixture) -> dict[str, str]:
    """Key -> status (and details) of the last load report that was logged."""
    report = [record.getMessage() for record in caplog.records if "LOAD REPORT" in record.getMessage()][-1]
    rows = [line.split(" | ") for line in report.splitlines() if " | " in line]
    return {key.strip(): " ".join(cells).strip() for key, *cells in rows if key.strip() != "Key"}


def load_anyway(folder: Path, key: str) -> tuple[ZCodeM3ForConditionalGeneration, dict[str, Any]]:
    """As `load`, of a checkpoint that is refused for `key` unless one insists."""
    with pytest.raises(ValueError, match=rf"the experts of .* do not match its config \(.*{re.escape(key)}[,;)]"):
        load(folder)
    return load(folder, ignore_mismatched_sizes=True)


def assert_unchanged(model: ZCodeM3ForConditionalGeneration, tensors: dict[str, Tensor]) -> None:
    """The parameters of `model` by these names are these tensors."""
    weights = model.state_dict()
    assert [name for name, tensor in tensors.items() if not torch.equal(weights[name], tensor)] == []


def test_good_checkpoint(tmp_path: Path, tensors: dict[str, Tensor], warned: pytest.LogCaptureFixture) -> None:
    write(tmp_path, tensors)
    model, wrong = load(tmp_path)
    assert wrong == {}
    assert warned.records == []
    assert_unchanged(model, tensors)


@pytest.mark.parametrize("name", SPARSE_TENSORS)
def test_one_tensor_missing(
    tmp_path: Path, tensors: dict[str, Tensor], name: str, warned: pytest.LogCaptureFixture
) -> None:
    missing = tensors.pop(f"{LAYER}.{name}")
    write(tmp_path, tensors)
    model, wrong = load_anyway(tmp_path, f"{LAYER}.{name}")
    assert wrong == {"missing_keys": {f"{LAYER}.{name}"}}
    assert reported(warned) == {f"{LAYER}.{name}": "MISSING"}
    assert_unchanged(model, tensors)
    initialized = model.get_parameter(f"{LAYER}.{name}")
    assert not torch.equal(initialized, missing)
    expected_std = 0.0 if name.endswith("bias") else model.config.init_std
    assert initialized.std().item() == pytest.approx(expected_std, rel=0.2)


def test_sparse_layer_missing(tmp_path: Path, tensors: dict[str, Tensor], warned: pytest.LogCaptureFixture) -> None:
    """A dense layer where the config has a sparse one: its tensors are ignored and all experts are random."""
    write(tmp_path, tensors, encoder_sparse_layers=[0, 1, 3])
    model, wrong = load_anyway(tmp_path, "model.encoder.layers.0.ffn.experts.up_proj")
    layer = "model.encoder.layers.0.ffn"
    dense = {f"{layer}.{name}.{kind}" for name in ("fc1", "fc2") for kind in ("weight", "bias")}
    sparse = {f"{layer}.{name}" for name in SPARSE_TENSORS}
    assert wrong == {"missing_keys": sparse, "unexpected_keys": dense}
    assert reported(warned) == {**dict.fromkeys(sparse, "MISSING"), **dict.fromkeys(dense, "UNEXPECTED")}
    assert_unchanged(model, {name: tensor for name, tensor in tensors.items() if name not in dense})


def test_extra_tensors(tmp_path: Path, tensors: dict[str, Tensor], warned: pytest.LogCaptureFixture) -> None:
    """Experts in a dense layer, one more matrix in a sparse one, and one expert in a tensor of its own."""
    extra = {
        "model.encoder.layers.0.ffn.experts.up_proj": torch.zeros(4, 64, 32),
        f"{LAYER}.experts.gate_proj": torch.zeros(4, 64, 32),
        f"{LAYER}.experts.4.up_proj": torch.zeros(64, 32),
    }
    write(tmp_path, {**tensors, **extra})
    for key in extra:
        model, wrong = load_anyway(tmp_path, key)
    assert wrong == {"unexpected_keys": set(extra)}
    assert reported(warned) == dict.fromkeys(extra, "UNEXPECTED")
    assert_unchanged(model, tensors)


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForSeq2SeqLM])
@pytest.mark.parametrize("name", [*EXPERT_TENSORS, "router.weight"])
def test_too_few_experts_in_a_tensor(
    tmp_path: Path, tensors: dict[str, Tensor], name: str, auto_class: Any, warned: pytest.LogCaptureFixture
) -> None:
    key = f"{LAYER}.{name}"
    right, wrong = tensors[key].shape, tensors[key][:3].shape
    write(tmp_path, {**tensors, key: tensors[key][:3]})
    with pytest.raises(RuntimeError, match="`ignore_mismatched_sizes` to `False`, thus raising an error"):
        auto_class.from_pretrained(tmp_path)
    (row,) = reported(warned).items()
    assert row[0] == (key if auto_class is AutoModelForSeq2SeqLM else key.removeprefix("model."))
    assert row[1].split() == f"MISMATCH Reinit due to size mismatch - ckpt: {wrong} vs model:{right}".split()


def test_num_experts_of_the_config(
    tmp_path: Path, tensors: dict[str, Tensor], warned: pytest.LogCaptureFixture
) -> None:
    """A checkpoint of 4 experts does not become one of 8 by its config, unless that is asked for."""
    write(tmp_path, tensors, num_experts=8)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(tmp_path)
    layers = ("encoder.layers.1", "encoder.layers.3", "decoder.layers.1")
    keys = {f"model.{layer}.ffn.{name}" for layer in layers for name in SPARSE_TENSORS}
    assert len(keys) == 18
    assert all(status.startswith("MISMATCH") for status in reported(warned).values())

    model, wrong = load(tmp_path, ignore_mismatched_sizes=True)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    assert wrong == {"mismatched_keys": {(key, shapes[key], torch.Size([8, *shapes[key][1:]])) for key in keys}}
    assert_unchanged(model, {name: tensor for name, tensor in tensors.items() if name not in keys})


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
def test_truncated_file(tmp_path: Path, tensors: dict[str, Tensor], kept: int) -> None:
    write(tmp_path, tensors)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(SafetensorError):
        load(tmp_path)


def test_lost_shard(tmp_path: Path) -> None:
    ZCodeM3ForConditionalGeneration(tiny_config()).save_pretrained(tmp_path, max_shard_size="50KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(OSError, match=shard.name):
        load(tmp_path)


def test_shard_without_its_tensors(tmp_path: Path, warned: pytest.LogCaptureFixture) -> None:
    """The index names a tensor that its shard does not have."""
    ZCodeM3ForConditionalGeneration(tiny_config()).save_pretrained(tmp_path, max_shard_size="50KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    key = f"{LAYER}.experts.up_proj"
    shard = tmp_path / index["weight_map"][key]
    tensors = load_file(shard)
    del tensors[key]
    save_file(tensors, shard, metadata={"format": "pt"})
    _, wrong = load_anyway(tmp_path, key)
    assert wrong == {"missing_keys": {key}}
    assert reported(warned) == {key: "MISSING"}


def test_no_weights(tmp_path: Path) -> None:
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        load(tmp_path)
