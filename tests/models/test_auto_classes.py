"""Saving and loading through the Auto classes: types, files, shards, tied weights, dtypes, meta device, resizing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel

from hf_moe_ted import ZCodeM3Config, ZCodeM3ForConditionalGeneration, ZCodeM3Model, ZCodeM3Tokenizer
from hf_moe_ted.testing import tiny_config

CONFIGS = {
    "top-1": {},
    "top-2 with router bias": {"num_experts_per_tok": 2, "router_bias": True},
    "pyramid": {"num_experts": [2, 3, 5]},
    "chosen layers": {"encoder_sparse_layers": [0], "decoder_sparse_layers": [0, 1], "num_experts": [2, 4, 3]},
    "dense": {"encoder_sparse_step": 0, "decoder_sparse_step": 0},
    "untied": {"tie_word_embeddings": False},
}
EMBEDDINGS = ["model.shared.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"]


def make_model(**overrides) -> ZCodeM3ForConditionalGeneration:
    torch.manual_seed(0)
    return ZCodeM3ForConditionalGeneration(tiny_config(init_std=0.2, **overrides)).eval()


@torch.no_grad()
def outputs_of(model: PreTrainedModel) -> Tensor:
    """Logits, or hidden states of a base model, for a batch with padding and ids below 90."""
    input_ids = torch.arange(3, 17).view(2, 7) * 5
    input_ids[1, 5:] = model.config.pad_token_id
    return model(input_ids, decoder_input_ids=torch.arange(2, 10).view(2, 4) * 7)[0]


def tensors_in(folder: Path) -> dict[str, list[int]]:
    """Names and shapes of the tensors of a checkpoint."""
    shapes = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return shapes


def settings_of(config: ZCodeM3Config) -> dict[str, Any]:
    """The fields of a config without what loading and saving add."""
    added = ("_name_or_path", "architectures", "dtype")
    return {name: value for name, value in config.to_dict().items() if name not in added}


def assert_equal_weights(first: PreTrainedModel, second: PreTrainedModel) -> None:
    tensors, others = first.state_dict(), second.state_dict()
    assert tensors.keys() == others.keys()
    assert [name for name, tensor in tensors.items() if not torch.equal(tensor, others[name])] == []


def test_types(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    ZCodeM3Tokenizer(languages=["en", "de"]).save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is ZCodeM3Config
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is ZCodeM3Tokenizer
    assert type(AutoModel.from_pretrained(tmp_path)) is ZCodeM3Model
    assert type(AutoModelForSeq2SeqLM.from_pretrained(tmp_path)) is ZCodeM3ForConditionalGeneration
    assert type(AutoModelForSeq2SeqLM.from_config(model.config)) is ZCodeM3ForConditionalGeneration


@pytest.mark.parametrize("overrides", CONFIGS.values(), ids=CONFIGS)
def test_round_trip(tmp_path: Path, overrides: dict[str, Any]) -> None:
    model = make_model(**overrides)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert settings_of(config) == settings_of(model.config)
    assert settings_of(config).items() >= overrides.items()

    loaded, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert all(not keys for keys in info.values())
    assert_equal_weights(loaded, model)
    torch.testing.assert_close(outputs_of(loaded), outputs_of(model))


def test_head_and_base_load_each_other(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path / "head")
    base, info = AutoModel.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert all(not keys for keys in info.values())
    assert_equal_weights(base, model.model)
    torch.testing.assert_close(outputs_of(base), outputs_of(model.model))

    base.save_pretrained(tmp_path / "base")
    assert not any(name.startswith("model.") for name in tensors_in(tmp_path / "base"))
    loaded, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert all(not keys for keys in info.values())
    torch.testing.assert_close(outputs_of(loaded), outputs_of(model))


def test_untied_base_has_no_head(tmp_path: Path) -> None:
    make_model(tie_word_embeddings=False).model.save_pretrained(tmp_path)
    _, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert {name: keys for name, keys in info.items() if keys} == {"missing_keys": {"lm_head.weight"}}


def test_shards(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="50KB")
    shards = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 3
    assert shards == [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    weight_map = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())["weight_map"]
    assert weight_map.keys() == tensors_in(tmp_path / "many").keys()
    assert tensors_in(tmp_path / "many") == tensors_in(tmp_path / "one")
    experts = [name for name in weight_map if name.startswith("model.encoder.layers.1.ffn.experts.")]
    assert len(experts) == 4 and len({weight_map[name] for name in experts}) > 1

    loaded, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "many", output_loading_info=True)
    assert all(not keys for keys in info.values())
    assert_equal_weights(loaded, model)


def test_tied_weights_are_saved_once(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    saved = tensors_in(tmp_path)
    assert [name for name in ["lm_head.weight", *EMBEDDINGS] if name in saved] == ["model.shared.weight"]
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    tied = [loaded.lm_head.weight, *(loaded.get_parameter(name) for name in EMBEDDINGS)]
    assert all(parameter is tied[0] for parameter in tied)
    assert saved.keys() == dict(loaded.named_parameters()).keys()


def test_untied_weights_are_all_saved(tmp_path: Path) -> None:
    make_model(tie_word_embeddings=False).save_pretrained(tmp_path)
    assert {"lm_head.weight", *EMBEDDINGS} <= tensors_in(tmp_path).keys()
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    untied = [loaded.lm_head.weight, *(loaded.get_parameter(name) for name in EMBEDDINGS)]
    assert len({parameter.data_ptr() for parameter in untied}) == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    model = make_model()
    model.save_pretrained(tmp_path / "float32")
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "float32", dtype=dtype)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {loaded.dtype} == {dtype}
    converted = make_model().to(dtype)
    assert_equal_weights(loaded, converted)
    torch.testing.assert_close(outputs_of(loaded), outputs_of(converted))
    torch.testing.assert_close(outputs_of(loaded).float(), outputs_of(model), rtol=0.1, atol=0.3)

    loaded.save_pretrained(tmp_path / "saved")
    assert AutoConfig.from_pretrained(tmp_path / "saved").dtype == dtype
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "saved").dtype == dtype
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).dtype == torch.float32


def test_meta_device() -> None:
    model = make_model()
    with torch.device("meta"):
        empty = AutoModelForSeq2SeqLM.from_config(model.config)
    assert {tensor.device.type for tensor in [*empty.parameters(), *empty.buffers()]} == {"meta"}
    empty.to_empty(device="cpu")
    empty.init_weights()  # fills the positions, which are in no checkpoint
    empty.load_state_dict(model.state_dict())
    torch.testing.assert_close(outputs_of(empty.eval()), outputs_of(model))


def test_weights_not_read_are_initialized() -> None:
    """`from_pretrained` builds the model on the meta device, and with nothing to read it must fill in every tensor."""
    config = tiny_config(init_std=0.2, router_bias=True)
    torch.manual_seed(0)
    loaded = ZCodeM3ForConditionalGeneration.from_pretrained(
        None, config=config, state_dict={}, ignore_mismatched_sizes=True
    )
    for name, tensor in loaded.state_dict().items():
        is_constant = name.endswith(("bias", "layer_norm.weight"))
        expected = 0.0 if is_constant else 0.2
        assert tensor.std().item() == pytest.approx(expected, rel=0.2), name
    assert torch.equal(loaded.model.encoder.embed_positions.weights, make_model().model.encoder.embed_positions.weights)


@pytest.mark.parametrize("tie_word_embeddings", [True, False])
@pytest.mark.parametrize("vocab_size", [100, 90])
def test_resize_token_embeddings(tmp_path: Path, vocab_size: int, tie_word_embeddings: bool) -> None:
    model = make_model(tie_word_embeddings=tie_word_embeddings)
    before = outputs_of(model)
    embeddings = model.resize_token_embeddings(vocab_size)
    assert embeddings is model.get_input_embeddings()
    assert model.config.vocab_size == vocab_size
    modules = [model.lm_head, model.model.encoder.embed_tokens, model.model.decoder.embed_tokens, embeddings]
    assert [module.weight.shape[0] for module in modules] == [vocab_size] * 4
    assert (model.lm_head.weight is embeddings.weight) == tie_word_embeddings
    after = outputs_of(model)
    assert after.shape[-1] == vocab_size
    torch.testing.assert_close(after[..., :90], before[..., :90])

    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    torch.testing.assert_close(outputs_of(loaded), after)


def test_resize_to_a_multiple() -> None:
    model = make_model()
    model.resize_token_embeddings(97, pad_to_multiple_of=8)
    assert model.config.vocab_size == model.lm_head.out_features == model.get_input_embeddings().num_embeddings == 104
