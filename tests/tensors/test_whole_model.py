"""Models from folders, all of whose weights are there and are weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_moe_ted import ZCodeM3ForConditionalGeneration, ZCodeM3Tokenizer, load_model_and_tokenizer, quantize_experts
from hf_moe_ted.testing import tiny_config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = ZCodeM3Tokenizer(languages=["en", "de"])
    ZCodeM3ForConditionalGeneration(tiny_config(vocab_size=len(tokenizer))).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool])
def test_weights_that_are_no_floating_point_numbers_are_refused(folder: Path, dtype: torch.dtype) -> None:
    weights = load_file(folder / "model.safetensors")
    name = "model.encoder.layers.2.self_attn.v_proj.weight"
    weights[name] = weights[name].to(dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=rf"cannot be loaded: {name} in .* is {dtype}, but weights must be floating-point"
    ):
        load_model_and_tokenizer(folder)


def test_quantized_experts_have_integers(folder: Path) -> None:
    quantize_experts(folder, output_dir=folder.parent / "int8")
    model, tokenizer = load_model_and_tokenizer(folder.parent / "int8")
    assert model.is_quantized
    assert tokenizer.languages == ["en", "de"]
