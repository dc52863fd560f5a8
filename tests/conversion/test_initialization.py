"""Initial checkpoints load, and their weights are distributed as those of the model's constructor."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peak_memory import PeakMemory
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig

from hf_moe_ted import ZCodeM3Config, ZCodeM3ForConditionalGeneration, ZCodeM3Tokenizer
from hf_moe_ted.conversion.initialization import initialize_checkpoint
from hf_moe_ted.testing import tiny_config

PAD = 1


def initialize(folder: Path, config: Any = None, **kwargs: Any) -> dict[str, Tensor]:
    initialize_checkpoint(tiny_config() if config is None else config, folder, **kwargs)
    tensors: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


@pytest.mark.parametrize(
    "overrides",
    [
        {"position_embedding_type": "learned"},
        {"position_embedding_type": "tupe", "init_std": 0.1},
        {"router_bias": True, "use_residual": True, "num_experts": [2, 4, 3]},
        {"tie_word_embeddings": False, "encoder_sparse_step": 0, "decoder_sparse_step": 0},
    ],
    ids=["learned", "tupe", "residual", "dense-untied"],
)
def test_weights_are_distributed_as_in_the_constructor(overrides: dict[str, Any], tmp_path: Path) -> None:
    config = tiny_config(vocab_size=1000, d_model=64, encoder_ffn_dim=256, decoder_ffn_dim=256, **overrides)
    report = initialize_checkpoint(config, tmp_path / "model")
    model, info = ZCodeM3ForConditionalGeneration.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info.values()), info
    assert report.num_parameters == model.num_parameters()
    torch.manual_seed(0)
    expected = ZCodeM3ForConditionalGeneration(config).state_dict()
    for name, weight in model.state_dict().items():
        if len(expected[name].unique()) <= 2:  # zeros of biases, ones of norms
            assert torch.equal(weight, expected[name]), name
            continue
        per_expert = weight.flatten(1) if ".experts." in name else weight.flatten()[None]
        zeros = torch.zeros(len(per_expert))
        tolerance = 5 * config.init_std / per_expert.shape[1] ** 0.5
        torch.testing.assert_close(per_expert.mean(dim=1), zeros, rtol=0.0, atol=tolerance, msg=name)
        torch.testing.assert_close(per_expert.std(dim=1), zeros + config.init_std, rtol=0.0, atol=tolerance, msg=name)
        assert len(per_expert.unique(dim=0)) == len(per_expert), name
    assert torch.equal(model.model.shared.weight[PAD], torch.zeros(64))


def test_seed(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    first, same, other = (initialize(tmp_path / str(i), seed=seed) for i, seed in enumerate((0, 0, 1)))
    assert torch.equal(torch.random.get_rng_state(), state)
    files = [(tmp_path / str(i) / "model.safetensors").read_bytes() for i in range(3)]
    assert files[0] == files[1] != files[2]
    random = [name for name, weight in first.items() if len(weight.unique()) > 2]
    assert len(random) > 20
    assert all(torch.equal(first[name], same[name]) and not torch.equal(first[name], other[name]) for name in random)
    # no two weights are drawn from the same stream
    assert len({first[name].flatten()[-16:].numpy().tobytes() for name in random}) == len(random)


def test_numbers_do_not_depend_on_what_else_is_drawn(tmp_path: Path) -> None:
    small = initialize(tmp_path / "small", max_shard_size="50KB")
    more = initialize(tmp_path / "more", tiny_config(encoder_layers=6, num_experts=8, router_bias=True))
    for name, weight in small.items():
        expected = more[name][:4] if ".experts." in name else more[name]
        assert ".router." in name or torch.equal(weight, expected), name


def test_dtype_is_rounded(tmp_path: Path) -> None:
    exact = initialize(tmp_path / "float32")
    rounded = initialize(tmp_path / "bfloat16", dtype=torch.bfloat16)
    assert all(torch.equal(rounded[name], weight.bfloat16()) for name, weight in exact.items())
    assert json.loads((tmp_path / "bfloat16" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_more_than_one_weight_is_in_memory(dtype: str, tmp_path: Path) -> None:
    config = tiny_config(d_model=64, encoder_ffn_dim=512, decoder_ffn_dim=512, num_experts=16)
    with PeakMemory() as memory:
        initialize_checkpoint(config, tmp_path / "model", dtype=dtype)
    largest = 4 * 512 * 64  # one expert of the 16, or a dense feed-forward
    assert memory.peak <= (largest if dtype == "bfloat16" else 0) + 1000
    with PeakMemory() as memory:
        ZCodeM3ForConditionalGeneration(config)
    assert memory.peak > 50 * largest


def test_sources_of_the_config_agree(tmp_path: Path) -> None:
    config = tiny_config(num_experts_per_tok=2, capacity_factor=1.25)
    config.save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    (tmp_path / "other.json").write_text(path.read_text())
    sources = [config, config.to_dict(), json.loads(path.read_text()), path, tmp_path / "other.json", path.parent]
    for number, source in enumerate(sources):
        initialize_checkpoint(source, tmp_path / str(number))
        for name in ("config.json", "generation_config.json", "model.safetensors"):
            assert (tmp_path / str(number) / name).read_bytes() == (tmp_path / "0" / name).read_bytes()
    loaded = ZCodeM3Config.from_pretrained(tmp_path / "0")
    assert (loaded.num_experts_per_tok, loaded.capacity_factor, loaded.d_model) == (2, 1.25, 32)
    assert (config.dtype, config.architectures) == (None, None)  # the user's own is as it was


def test_generation_config_and_tokenizer(tmp_path: Path) -> None:
    config = tiny_config(vocab_size=300)
    tokenizer = ZCodeM3Tokenizer(languages=["en", "de"])
    for number, given in enumerate((tokenizer, tmp_path / "0")):
        initialize_checkpoint(config, tmp_path / str(number), tokenizer=given)
        assert ZCodeM3Tokenizer.from_pretrained(tmp_path / str(number)).languages == ["en", "de"]
        generation_config = GenerationConfig.from_pretrained(tmp_path / str(number))
        assert generation_config.decoder_start_token_id == 2
        assert generation_config.max_length == 64, "without it generation stops after 20 tokens"

    config.save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    GenerationConfig(num_beams=7, decoder_start_token_id=2).save_pretrained(tmp_path / "source")
    report = initialize_checkpoint(tmp_path / "source", tmp_path / "ours")
    assert GenerationConfig.from_pretrained(tmp_path / "ours").num_beams == 7
    assert "tokenizer.json" in report.other_files


def test_bad_input(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    fields = {field.name: getattr(tiny_config(), field.name) for field in dataclasses.fields(ZCodeM3Config)}

    def refuse(message: str, config: Any = fields, **kwargs: Any) -> None:
        with pytest.raises(ValueError, match=message):
            initialize_checkpoint(config, tmp_path / "ours", **kwargs)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.json", "list.json"]

    refuse("nowhere", "nowhere")
    refuse(r"max_shard_size \('5 apples'\) must be a number of bytes", max_shard_size="5 apples")
    refuse("broken.json.* is not JSON", tmp_path / "broken.json")
    refuse("list.json.* must be a JSON object", tmp_path / "list.json")
    refuse("model_type 'm2m_100'", {"model_type": "m2m_100"})
    refuse("has num_expert, which", {**fields, "num_expert": 8})
    refuse("attention_heads", {**fields, "encoder_attention_heads": 5})
    refuse("d_model", {**fields, "d_model": "wide"})
    refuse("dtype", dtype="int8")
    refuse("dtype", dtype=None)
    refuse(r"tokenizer \(nowhere\)", tokenizer="nowhere")
    refuse("must be a tokenizer or a folder with one", tokenizer=tmp_path)
    refuse(r"tokens, more than vocab_size \(96\)", tokenizer=ZCodeM3Tokenizer(languages=["en", "de"]))


@pytest.mark.parametrize(
    "fields",
    [
        {"encoder_layers": 10**9},
        {"decoder_layers": 1001},
        {"num_experts": 10**9},
        {"num_experts_per_tok": 10**9},
        {"d_model": 10**9},
        {"decoder_ffn_dim": 10**12},
        {"vocab_size": 10**30},
        {"max_position_embeddings": 2**63},
    ],
)
def test_sizes_that_no_model_has(fields: dict[str, Any], tmp_path: Path) -> None:
    name = next(iter(fields))
    with pytest.raises(ValueError, match=rf"config \(.*{name} \(\d+\) must be at most \d+"):
        initialize_checkpoint(fields, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_sizes_whose_product_cannot_be_counted(tmp_path: Path) -> None:
    fields = {"d_model": 2**24, "encoder_ffn_dim": 2**24, "num_experts": 100_000, "encoder_layers": 2}
    with pytest.raises(ValueError, match="the config describes no model"):
        initialize_checkpoint(fields, tmp_path / "new")
