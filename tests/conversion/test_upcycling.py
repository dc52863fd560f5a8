"""Models with copied experts compute what the dense one does; routers and noise are random in the way they should."""

import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    M2M100Config,
    M2M100ForConditionalGeneration,
    NllbTokenizer,
)

from hf_moe_ted import ConversionReport, ZCodeM3Config, ZCodeM3ForConditionalGeneration
from hf_moe_ted.conversion.m2m100 import m2m100_config_fields
from hf_moe_ted.conversion.upcycling import upcycle_dense_checkpoint
from hf_moe_ted.testing import tiny_config

REPOSITORY = Path(__file__).parents[2]
PAD = 1
CLOSE = {"rtol": 0.0, "atol": 1e-5}
EXPERTS = ("experts.up_proj", "experts.up_proj_bias", "experts.down_proj", "experts.down_proj_bias")
DENSE = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
SPARSE_LAYERS = ("encoder.layers.1", "encoder.layers.3", "decoder.layers.1")  # every second of 4 + 2


def randomize(model: Any) -> Any:
    """Weights, biases and norms that all matter for the output."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if name.endswith("layer_norm.weight") else 0.0
            parameter.copy_(mean + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def m2m100(**overrides: Any) -> M2M100ForConditionalGeneration:
    fields = {
        "vocab_size": 96,
        "max_position_embeddings": 64,
        "d_model": 32,
        "encoder_layers": 4,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 8,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 48,
        "encoder_layerdrop": 0.0,
    }
    return randomize(M2M100ForConditionalGeneration(M2M100Config(**{**fields, **overrides})))


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tests may not change it."""
    folder = tmp_path_factory.mktemp("m2m100")
    m2m100().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dense_logits(dense_folder: Path) -> Tensor:
    return logits(M2M100ForConditionalGeneration.from_pretrained(dense_folder))


@pytest.fixture
def source(dense_folder: Path, tmp_path: Path) -> Path:
    """A copy that tests may change."""
    return Path(shutil.copytree(dense_folder, tmp_path / "m2m100"))


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    source = torch.randint(4, 96, (3, 9), generator=generator)
    target = torch.randint(4, 96, (3, 6), generator=generator)
    source[1, 5:] = target[2, 3:] = PAD
    return {
        "input_ids": source,
        "attention_mask": source.ne(PAD).long(),
        "decoder_input_ids": target,
        "decoder_attention_mask": target.ne(PAD).long(),
    }


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Of real tokens: M2M100 computes padding, too."""
    inputs = batch()
    return model.eval()(**inputs).logits[inputs["decoder_attention_mask"].bool()]


def load(folder: Path, **kwargs: Any) -> ZCodeM3ForConditionalGeneration:
    model, info = AutoModelForSeq2SeqLM.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert isinstance(model, ZCodeM3ForConditionalGeneration)
    assert not any(info.values()), info
    return model


def upcycled_tensors(source: Path, folder: Path, num_experts: int = 4, **kwargs: Any) -> dict[str, Tensor]:
    upcycle_dense_checkpoint(source, folder, num_experts=num_experts, **kwargs)
    tensors: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


# --- equal outputs

PRESERVING = {
    "defaults": {"num_experts": 4},
    "top-2-before": {
        "num_experts": 4,
        "config_overrides": {"num_experts_per_tok": 2, "normalize_router_weights": "before_dropping"},
    },
    "top-4": {"num_experts": 6, "config_overrides": {"num_experts_per_tok": 4}},
    "top-4-before": {
        "num_experts": 6,
        "config_overrides": {"num_experts_per_tok": 4, "normalize_router_weights": "before_dropping"},
    },
    "all-experts": {"num_experts": 3, "config_overrides": {"num_experts_per_tok": 3, "normalize_router_weights": None}},
    "list": {"num_experts": [2, 8, 5]},
    "sampling": {"num_experts": 4, "config_overrides": {"second_expert_policy": "sampling"}},
    "second-at-random": {"num_experts": 4, "config_overrides": {"second_expert_policy": "random"}},
    "router-bias": {"num_experts": 4, "config_overrides": {"router_bias": True}},
    "residual": {"num_experts": 4, "config_overrides": {"use_residual": True}},
}


@pytest.mark.parametrize("kwargs", PRESERVING.values(), ids=PRESERVING.keys())
def test_logits_equal_those_of_m2m100(
    kwargs: dict[str, Any], dense_folder: Path, dense_logits: Tensor, tmp_path: Path
) -> None:
    report = upcycle_dense_checkpoint(dense_folder, tmp_path / "moe", **kwargs)
    model = load(tmp_path / "moe")
    assert dense_logits.std() > 0.5
    torch.testing.assert_close(logits(model), dense_logits, **CLOSE)

    counts = kwargs["num_experts"] if isinstance(kwargs["num_experts"], list) else [kwargs["num_experts"]] * 3
    assert report.num_experts == tuple(counts)
    found = [layer.ffn.router.num_experts for layer in model.model.encoder.layers[1::2]]
    assert [*found, model.model.decoder.layers[1].ffn.router.num_experts] == counts
    assert report.num_parameters == model.num_parameters()
    assert [warning for warning in report.warnings if "layerdrop" not in warning] == []


@pytest.mark.parametrize(
    ("steps", "overrides", "expected"),
    [
        ((1, 2), {}, ([0, 1, 2, 3], [1])),
        ((3, 0), {}, ([2], [])),
        ((0, 1), {}, ([], [0, 1])),
        ((0, 0), {"encoder_sparse_layers": [0, 3]}, ([0, 3], [])),
    ],
)
def test_steps_choose_the_sparse_layers(
    steps: tuple[int, int], overrides: dict, expected: tuple, dense_folder: Path, dense_logits: Tensor, tmp_path: Path
) -> None:
    upcycle_dense_checkpoint(
        dense_folder,
        tmp_path / "moe",
        num_experts=4,
        encoder_sparse_step=steps[0],
        decoder_sparse_step=steps[1],
        config_overrides=overrides,
    )
    model = load(tmp_path / "moe")
    assert (model.config.sparse_layers("encoder"), model.config.sparse_layers("decoder")) == expected
    torch.testing.assert_close(logits(model), dense_logits, **CLOSE)


@pytest.mark.parametrize(
    "overrides",
    [{"activation_function": "gelu", "scale_embedding": False}, {"tie_word_embeddings": False}, {"pad_token_id": 5}],
    ids=lambda overrides: "-".join(overrides),
)
def test_config_of_m2m100_is_kept(overrides: dict, tmp_path: Path) -> None:
    reference = m2m100(**overrides, init_std=0.03, dropout=0.2, eos_token_id=[2, 3])
    reference.save_pretrained(tmp_path / "m2m100")
    upcycle_dense_checkpoint(tmp_path / "m2m100", tmp_path / "moe", num_experts=4)
    model = load(tmp_path / "moe")
    torch.testing.assert_close(logits(model), logits(reference), **CLOSE)
    for name in {*M2M100Config().to_dict()} & {*ZCodeM3Config().to_dict()}:
        if name not in ("model_type", "architectures", "transformers_version", "_name_or_path", "dtype"):
            assert getattr(model.config, name) == getattr(reference.config, name), name


@pytest.mark.parametrize("legacy", [False, True], ids=["generation_config.json", "in-config.json"])
def test_generation_is_identical(legacy: bool, source: Path, tmp_path: Path) -> None:
    options = {"num_beams": 3, "max_length": 12, "forced_bos_token_id": 7, "early_stopping": True}
    options["suppress_tokens"] = [PAD]  # which trained models do not generate
    if legacy:
        (source / "generation_config.json").unlink()
        config = json.loads((source / "config.json").read_text()) | options
        (source / "config.json").write_text(json.dumps(config))
    else:
        GenerationConfig(**options, pad_token_id=PAD, eos_token_id=2, decoder_start_token_id=2).save_pretrained(source)
    report = upcycle_dense_checkpoint(source, tmp_path / "moe", num_experts=4)
    assert "generation_config.json" in report.other_files
    reference, model = M2M100ForConditionalGeneration.from_pretrained(source).eval(), load(tmp_path / "moe").eval()
    inputs = {name: batch()[name] for name in ("input_ids", "attention_mask")}
    generated = model.generate(**inputs)
    assert generated[:, 1].tolist() == [7] * 3
    assert generated.tolist() == reference.generate(**inputs).tolist()
    greedy = {"num_beams": 1, "early_stopping": False, "max_length": 20}
    assert model.generate(**inputs, **greedy).tolist() == reference.generate(**inputs, **greedy).tolist()


DIFFERING = {
    "top-1-scaled": ({"num_experts_per_tok": 1, "normalize_router_weights": None}, "normalize_router_weights=None"),
    "top-2-scaled": ({"normalize_router_weights": None}, "normalize_router_weights=None"),
    "full-experts": ({"eval_capacity_factor": 0.1, "min_capacity": 1}, "eval_capacity_factor=0.1"),
    "masked-outputs": ({"moe_token_dropout": 0.2}, "moe_token_dropout=0.2"),
    "second-left-out": (
        {"second_expert_policy": "random", "normalize_router_weights": "before_dropping"},
        "second_expert_policy='random'",
    ),
}


@pytest.mark.parametrize(("overrides", "warning"), DIFFERING.values(), ids=DIFFERING.keys())
def test_routing_that_changes_outputs_is_reported(
    overrides: dict, warning: str, dense_folder: Path, dense_logits: Tensor, tmp_path: Path
) -> None:
    report = upcycle_dense_checkpoint(dense_folder, tmp_path / "moe", num_experts=4, config_overrides=overrides)
    assert [warning in line for line in report.warnings if "do not compute" in line] == [True]
    assert f"warning: {report.warnings[-1]}" in str(report)
    assert (logits(load(tmp_path / "moe")) - dense_logits).abs().max() > 0.01


@pytest.mark.parametrize(
    ("top_k", "noise_std", "learns"), [(2, 0.0, False), (2, 0.05, True), (1, 0.0, False), (1, 0.05, False)]
)
def test_what_routers_learn_from_translation(
    top_k: int, noise_std: float, learns: bool, dense_folder: Path, tmp_path: Path
) -> None:
    """Without their own losses: nothing as long as experts are equal, and nothing from one weight that is always 1."""
    overrides = {
        "num_experts_per_tok": top_k,
        "router_aux_loss_coef": 0.0,
        "router_z_loss_coef": 0.0,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "capacity_factor": None,
    }
    report = upcycle_dense_checkpoint(
        dense_folder, tmp_path / "moe", num_experts=4, noise_std=noise_std, config_overrides=overrides
    )
    assert any("the one weight is always 1" in warning for warning in report.warnings) == (top_k == 1)
    model = load(tmp_path / "moe").train()
    inputs = batch()
    model(input_ids=inputs["input_ids"], labels=inputs["decoder_input_ids"]).loss.backward()
    layers = [*model.model.encoder.layers[1::2], model.model.decoder.layers[1]]
    assert all(float(layer.ffn.experts.up_proj.grad.abs().max()) > 1e-4 for layer in layers)
    largest = [float(layer.ffn.router.weight.grad.abs().max()) for layer in layers]
    assert min(largest) > 1e-5 if learns else max(largest) < 1e-6


# --- what is written


def test_experts_are_copies_and_all_else_is_equal(dense_folder: Path, tmp_path: Path) -> None:
    expected = load_file(dense_folder / "model.safetensors")
    found = upcycled_tensors(dense_folder, tmp_path / "moe")
    for layer in SPARSE_LAYERS:
        for name, dense in zip(EXPERTS, DENSE, strict=True):
            weight = expected.pop(f"model.{layer}.{dense}")
            assert torch.equal(found.pop(f"model.{layer}.ffn.{name}"), torch.stack([weight] * 4))
        del found[f"model.{layer}.ffn.router.weight"]
    renamed = {name.replace(".fc", ".ffn.fc"): tensor for name, tensor in expected.items()}
    assert found.keys() == renamed.keys()
    assert [name for name in found if not torch.equal(found[name], renamed[name])] == []


def test_source_is_left_alone(source: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    upcycle_dense_checkpoint(source, tmp_path / "moe", num_experts=4, noise_std=0.1)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def test_noise_is_on_the_weights_of_experts_only(dense_folder: Path, tmp_path: Path) -> None:
    plain = upcycled_tensors(dense_folder, tmp_path / "plain", 16)
    noisy = upcycled_tensors(dense_folder, tmp_path / "noisy", 16, noise_std=0.03)
    changed = {name for name in plain if not torch.equal(plain[name], noisy[name])}
    assert changed == {f"model.{layer}.ffn.experts.{kind}_proj" for layer in SPARSE_LAYERS for kind in ("up", "down")}

    seen = []
    for name in sorted(changed):
        for noise in noisy[name] - plain[name]:
            assert noise.std().item() == pytest.approx(0.03, rel=0.1)  # 1536 numbers or more: 5 standard errors
            assert abs(noise.mean().item()) < 0.03 * 5 / noise.numel() ** 0.5
            assert noise.abs().max() < 0.03 * 6
            assert (noise.abs() > 0.03).float().mean().item() == pytest.approx(0.3173, abs=0.06), (
                "a normal distribution"
            )
            seen.append(noise.flatten()[:1000])
    correlations = torch.corrcoef(torch.stack(seen)).fill_diagonal_(0.0)
    assert correlations.abs().max() < 0.2, "experts and tensors have noise of their own"


def test_noise_and_routers_depend_on_seed_and_name_only(dense_folder: Path, tmp_path: Path) -> None:
    first = upcycled_tensors(dense_folder, tmp_path / "first", noise_std=0.1, seed=5)
    torch.manual_seed(123)
    shards = upcycled_tensors(dense_folder, tmp_path / "shards", noise_std=0.1, seed=5, max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 5
    assert first.keys() == shards.keys()
    assert [name for name in first if not torch.equal(first[name], shards[name])] == []

    every = upcycled_tensors(dense_folder, tmp_path / "every", 6, noise_std=0.1, seed=5, encoder_sparse_step=1)
    for layer in SPARSE_LAYERS:
        for name in EXPERTS:
            assert torch.equal(every[f"model.{layer}.ffn.{name}"][:4], first[f"model.{layer}.ffn.{name}"])
    other = upcycled_tensors(dense_folder, tmp_path / "other", noise_std=0.1, seed=6)
    random = {name for name in first if name.endswith(("up_proj", "down_proj", "router.weight"))}
    assert {name for name in first if not torch.equal(first[name], other[name])} == random


def test_random_state_is_left_alone(dense_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    upcycle_dense_checkpoint(dense_folder, tmp_path / "moe", num_experts=4, noise_std=0.1)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("init_std", [0.02, 0.5])
def test_routers_are_initialized_as_in_training_from_scratch(init_std: float, tmp_path: Path) -> None:
    m2m100(init_std=init_std).save_pretrained(tmp_path / "m2m100")
    overrides = {"router_bias": True, "use_residual": True}
    found = upcycled_tensors(tmp_path / "m2m100", tmp_path / "moe", 64, config_overrides=overrides)
    routers = [found[f"model.{layer}.ffn.router.weight"] for layer in SPARSE_LAYERS]
    for router in routers:
        assert router.shape == (64, 32)
        assert router.std().item() == pytest.approx(init_std, rel=0.08)
        assert abs(router.mean().item()) < init_std * 0.1
    assert torch.corrcoef(torch.stack([router.flatten() for router in routers])).fill_diagonal_(0.0).abs().max() < 0.1
    for layer in SPARSE_LAYERS:
        assert not found[f"model.{layer}.ffn.router.bias"].any()
        assert not found[f"model.{layer}.ffn.residual.coefficient.bias"].any()
        coefficient = found[f"model.{layer}.ffn.residual.coefficient.weight"]
        assert 0.5 * init_std < coefficient.std().item() < 1.5 * init_std


# --- sources


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "tupe"])
def test_dense_zcode_m3(positions: str, tmp_path: Path) -> None:
    fields = {"position_embedding_type": positions, "capacity_factor": 3.0, "label_smoothing": 0.1}
    dense = randomize(
        ZCodeM3ForConditionalGeneration(tiny_config(encoder_sparse_step=0, decoder_sparse_step=0, **fields))
    )
    dense.save_pretrained(tmp_path / "dense")
    report = upcycle_dense_checkpoint(tmp_path / "dense", tmp_path / "moe", num_experts=[4, 4, 2])
    model = load(tmp_path / "moe")
    torch.testing.assert_close(logits(model), logits(dense), **CLOSE)
    assert report.warnings == ()
    assert {name: getattr(model.config, name) for name in fields} == fields


def test_sparse_layers_of_zcode_m3_stay(tmp_path: Path) -> None:
    routing = {"num_experts_per_tok": 3, "normalize_router_weights": "before_dropping", "router_bias": True}
    config = tiny_config(
        encoder_sparse_layers=[2, 3], decoder_sparse_step=0, num_experts=[5, 6], use_residual=True, **routing
    )
    dense = randomize(ZCodeM3ForConditionalGeneration(config))
    dense.save_pretrained(tmp_path / "dense")
    expected = load_file(tmp_path / "dense" / "model.safetensors")
    upcycle_dense_checkpoint(tmp_path / "dense", tmp_path / "moe", num_experts=[3, 4], noise_std=0.0)
    model = load(tmp_path / "moe")
    assert model.config.num_experts_per_layer("encoder") == {1: 3, 2: 5, 3: 6}
    assert model.config.num_experts_per_layer("decoder") == {1: 4}
    assert {name: getattr(model.config, name) for name in routing} == routing
    torch.testing.assert_close(logits(model), logits(dense), **CLOSE)
    noisy = upcycled_tensors(tmp_path / "dense", tmp_path / "noisy", 4, noise_std=0.1)
    kept = [name for name in expected if name in noisy]
    assert any(".layers.3.ffn.experts.up_proj" in name for name in kept)
    assert [name for name in kept if not torch.equal(noisy[name], expected[name])] == []


def store_bin(folder: Path, tensors: dict[str, Tensor]) -> None:
    """As old versions of transformers: tied tensors several times, sharing memory, and the sinusoids."""
    shared = {f"model.{side}.embed_tokens.weight": tensors["model.shared.weight"] for side in ("encoder", "decoder")}
    sinusoids = {f"model.{side}.embed_positions.weights": torch.zeros(66, 32) for side in ("encoder", "decoder")}
    content = {**tensors, **shared, "lm_head.weight": tensors["model.shared.weight"], **sinusoids}
    torch.save(content, folder / "pytorch_model.bin")


def store_other_copy(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Converters to safetensors keep one of the tied tensors, not always `model.shared.weight`."""
    content = {name.replace("model.shared", "model.decoder.embed_tokens"): value for name, value in tensors.items()}
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})


def store_in_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    names = list(tensors)
    files = {f"weights-{i}.safetensors": names[i::3] for i in range(3)}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("store", [store_bin, store_other_copy, store_in_shards])
def test_every_layout_gives_the_same_weights(store, source: Path, tmp_path: Path) -> None:
    expected = upcycled_tensors(source, tmp_path / "expected", noise_std=0.1)
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    store(source, tensors)
    found = upcycled_tensors(source, tmp_path / "moe", noise_std=0.1)
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_dtype(source: Path, tmp_path: Path) -> None:
    expected = upcycled_tensors(source, tmp_path / "float32", noise_std=0.1)
    report = upcycle_dense_checkpoint(source, tmp_path / "half", num_experts=4, noise_std=0.1, dtype="bfloat16")
    assert report.dtypes == (torch.bfloat16,)
    assert load(tmp_path / "half", dtype="auto").dtype == torch.bfloat16
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert [name for name in half if not torch.equal(half[name], expected[name].bfloat16())] == []

    M2M100ForConditionalGeneration.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(source)
    kept = upcycled_tensors(source, tmp_path / "kept")
    assert {tensor.dtype for tensor in kept.values()} == {torch.bfloat16}
    plain = upcycled_tensors(source, tmp_path / "plain", dtype=torch.float32)
    noisy = upcycled_tensors(source, tmp_path / "noisy", noise_std=1e-4, dtype=torch.float32)
    name = f"model.{SPARSE_LAYERS[0]}.ffn.experts.up_proj"
    assert (noisy[name] - plain[name]).std().item() == pytest.approx(1e-4, rel=0.05), "not rounded to bfloat16"


@pytest.mark.parametrize("weight", ["layers.0.fc1.weight", "layers.1.fc1.weight"])  # which stays; which is copied
def test_a_dtype_that_cannot_hold_a_weight_is_refused(weight: str, source: Path, tmp_path: Path) -> None:
    weights = load_file(source / "model.safetensors")
    weights[f"model.encoder.{weight}"][1, 2] = 1e5
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"has 1e\+05 at \[1, 2\], which torch.float16 cannot hold"):
        upcycle_dense_checkpoint(source, tmp_path / "moe", num_experts=4, dtype="float16")
    assert not (tmp_path / "moe").exists()


def test_logits_in_bfloat16_equal_those_of_m2m100(dense_folder: Path, tmp_path: Path) -> None:
    """Two weights that are rounded to bfloat16 sum to 1 up to 2**-8."""
    upcycle_dense_checkpoint(dense_folder, tmp_path / "moe", num_experts=4, dtype="bfloat16")
    expected = logits(M2M100ForConditionalGeneration.from_pretrained(dense_folder, dtype=torch.bfloat16))
    difference = logits(load(tmp_path / "moe", dtype="auto")) - expected
    assert difference.dtype == torch.bfloat16
    assert difference.float().std() < 0.02 * expected.float().std()


def test_tokenizers_come_along(source: Path, tmp_path: Path) -> None:
    tokenizer = NllbTokenizer(extra_special_tokens=["eng_Latn", "deu_Latn"], src_lang="eng_Latn", tgt_lang="deu_Latn")
    tokenizer.train_new_from_iterator(["guten morgen", "good morning"] * 20, 90).save_pretrained(source)
    slow = {"vocab.json": b"{}", "sentencepiece.bpe.model": b"pieces"}  # the files of M2M100Tokenizer
    for name, content in slow.items():
        (source / name).write_bytes(content)
    report = upcycle_dense_checkpoint(source, tmp_path / "moe", num_experts=4)
    assert {"tokenizer.json", "tokenizer_config.json", "config.json", *slow} <= {*report.other_files}
    assert {name: (tmp_path / "moe" / name).read_bytes() for name in slow} == slow
    languages = {"src_lang": "eng_Latn", "tgt_lang": "deu_Latn"}
    loaded = NllbTokenizer.from_pretrained(tmp_path / "moe", **languages)
    expected = NllbTokenizer.from_pretrained(source, **languages)
    assert dict(loaded("good", text_target="guten")) == dict(expected("good", text_target="guten"))


def test_layer_drop_is_reported(tmp_path: Path) -> None:
    m2m100(encoder_layerdrop=0.0, decoder_layerdrop=0.25).save_pretrained(tmp_path / "m2m100")
    report = upcycle_dense_checkpoint(tmp_path / "m2m100", tmp_path / "moe", num_experts=4)
    assert report.warnings == ("decoder_layerdrop (0.25) is left out: ZCodeM3 has no layer drop",)


def test_defaults_of_m2m100_are_not_ours() -> None:
    fields = m2m100_config_fields({"model_type": "m2m_100"})
    assert (fields["vocab_size"], fields["encoder_layers"]) == (128112, 12)
    assert fields.keys() <= ZCodeM3Config().to_dict().keys()


# --- errors


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_experts": 1}, r"num_experts \(1\) must be at least 2"),
        ({"num_experts": [4, 1, 4]}, r"num_experts \(\[4, 1, 4\]\) must be at least 2"),
        ({"num_experts": []}, r"num_experts \(\[\]\) must be at least 2"),
        (
            {"num_experts": [4, 4]},
            r"num_experts \(\[4, 4\]\) lists 2 layers, but 3 become sparse: encoder \[1, 3\], decoder \[1\]",
        ),
        ({"num_experts": 2.5}, r"num_experts, .*Field 'num_experts'"),
        ({"noise_std": -0.1}, r"noise_std \(-0\.1\) must be a finite number"),
        ({"noise_std": float("nan")}, r"noise_std \(nan\) must be a finite number"),
        (
            {"encoder_sparse_step": 0, "decoder_sparse_step": 0},
            r"encoder_sparse_step \(0\), decoder_sparse_step \(0\) make no dense layer sparse",
        ),
        (
            {"encoder_sparse_step": 5, "decoder_sparse_step": 3},
            r"encoder_sparse_step \(5\), .* make no dense layer sparse",
        ),
        ({"encoder_sparse_step": -1}, r"encoder_sparse_step \(-1\) must be 0 \(dense\) or positive"),
        ({"dtype": "int8"}, r"dtype \(int8\) must be a floating-point one"),
        ({"config_overrides": {"num_experts": 8}}, r"config_overrides has num_experts; pass it as a separate argument"),
        ({"config_overrides": {"top_k": 2}}, r"config_overrides has top_k, which ZCodeM3Config does not have"),
        ({"config_overrides": {"d_model": 64}}, r"config_overrides sets d_model to 64, but .* were made for 32"),
        (
            {"config_overrides": {"activation_function": "gelu"}},
            r"config_overrides sets activation_function to 'gelu', but .* were made for 'relu'",
        ),
        ({"config_overrides": {"num_experts_per_tok": 5}}, r"num_experts_per_tok \(5\) is more than the experts of a"),
        ({"config_overrides": {"capacity_factor": "two"}}, r"config_overrides do not fit .*Field 'capacity_factor'"),
        ({"config_overrides": {"encoder_sparse_layers": [9]}}, r"encoder_sparse_layers \(\[9\]\) must be distinct"),
    ],
)
def test_wrong_arguments_are_named(kwargs: dict[str, Any], message: str, dense_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        upcycle_dense_checkpoint(dense_folder, tmp_path / "moe", **{"num_experts": 4, **kwargs})
    assert list(tmp_path.iterdir()) == []


def test_override_that_says_what_the_source_says_is_accepted(dense_folder: Path, tmp_path: Path) -> None:
    report = upcycle_dense_checkpoint(dense_folder, tmp_path / "moe", num_experts=4, config_overrides={"d_model": 32})
    assert report.num_experts == (4, 4, 4)


@pytest.mark.parametrize(
    ("sparse", "kwargs", "message"),
    [
        ({}, {}, r"make no dense layer sparse: of 4 encoder layers, 2 decoder layers, 3 are sparse already"),
        (
            {"decoder_sparse_step": 0},
            {"config_overrides": {"use_residual": True}},
            r"config_overrides sets use_residual to True, but the source's weights were made for False",
        ),
    ],
)
def test_wrong_arguments_for_sparse_sources(sparse: dict, kwargs: dict, message: str, tmp_path: Path) -> None:
    ZCodeM3ForConditionalGeneration(tiny_config(**sparse)).save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=message):
        upcycle_dense_checkpoint(tmp_path / "dense", tmp_path / "moe", num_experts=4, **kwargs)


def change_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "bart"}, r"has model_type 'bart'; it must be 'm2m_100'"),
        ({"activation_function": "sine"}, r"config\.json: .*activation_function \('sine'\) must be one of"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"config\.json has a quantization_config"),
        ({"d_model": "wide"}, r"config\.json: .*Field 'd_model' expected int"),
        ({"pad_token_id": None}, r"config\.json: pad_token_id must be set"),
        ({"encoder_ffn_dim": 72}, r"layers\.0\.fc1\.weight has the shape \(64, 32\), but the config needs \(72, 32\)"),
        ({"decoder_layers": 3}, r"missing: model\.decoder\.layers\.2\.fc2\.bias"),
        ({"encoder_layers": 3}, r"unknown: model\.encoder\.layers\.3\.fc1\.weight"),
    ],
)
def test_wrong_config_of_the_source_is_named(fields: dict, message: str, source: Path, tmp_path: Path) -> None:
    change_config(source, **fields)
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        upcycle_dense_checkpoint(source, tmp_path / "moe", num_experts=4)
    assert [path.name for path in tmp_path.iterdir()] == ["m2m100"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop("model.encoder.layers.1.fc2.bias"),
            r"missing: model\.encoder\.layers\.1\.fc2\.bias",
        ),
        (lambda tensors: tensors.pop("model.shared.weight"), r"missing: model\.shared\.weight"),
        (lambda tensors: tensors.update({"final_logits_bias": torch.zeros(1, 96)}), r"unknown: final_logits_bias"),
        (
            lambda tensors: tensors.update({"model.decoder.embed_tokens.weight": torch.ones(96, 32)}),
            r"model\.decoder\.embed_tokens\.weight and model\.shared\.weight differ",
        ),
    ],
)
def test_wrong_tensors_are_named(change, message: str, source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        upcycle_dense_checkpoint(source, tmp_path / "moe", num_experts=4)
    assert [path.name for path in tmp_path.iterdir()] == ["m2m100"]


def test_wrong_folders_are_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\) must be a folder with config\.json"):
        upcycle_dense_checkpoint(tmp_path / "nowhere", tmp_path / "moe", num_experts=4)
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "precious.txt").write_text("text")
    with pytest.raises(ValueError, match=r"moe\) is not empty"):
        upcycle_dense_checkpoint(source, tmp_path / "moe", num_experts=4)
    assert (tmp_path / "moe" / "precious.txt").read_text() == "text"
    with pytest.raises(ValueError, match=r"moe\) is not replaced: it has precious\.txt"):
        upcycle_dense_checkpoint(source, tmp_path / "moe", num_experts=4, overwrite=True)
    (tmp_path / "moe" / "precious.txt").unlink()
    for num_experts in (2, 4):
        report = upcycle_dense_checkpoint(source, tmp_path / "moe", num_experts=num_experts, overwrite=True)
        assert isinstance(report, ConversionReport)
    assert load(tmp_path / "moe").config.num_experts == 4


def test_script_upcycles(
    dense_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--num_experts", "[2,8,5]", "--noise_std", "0.1", "--seed", "3", "--dtype", "bfloat16"]
    arguments += ["--config_overrides", '{"router_bias": true}']
    script = str(REPOSITORY / "convert" / "upcycle_dense.py")
    monkeypatch.setattr(sys, "argv", [script, str(dense_folder), str(tmp_path / "moe"), *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(script, run_name="__main__")
    assert not end.value.code
    assert "experts of the sparse layers: 2, 8, 5" in capsys.readouterr().out
    found = load_file(tmp_path / "moe" / "model.safetensors")
    expected = upcycled_tensors(
        dense_folder,
        tmp_path / "expected",
        [2, 8, 5],
        noise_std=0.1,
        seed=3,
        dtype="bfloat16",
        config_overrides={"router_bias": True},
    )
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
