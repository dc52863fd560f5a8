"""Quantized experts: exact integers, the same model after saving, and what cannot be done with it."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, Trainer, TrainingArguments
from transformers.integrations.peft import MIN_PEFT_VERSION

from hf_moe_ted import ZCodeM3ForConditionalGeneration, ZCodeM3Tokenizer
from hf_moe_ted.compression.prune import prune_experts
from hf_moe_ted.compression.quantize import quantize_experts
from hf_moe_ted.compression.quantized_experts import (
    ExpertQuantizationConfig,
    QuantizedExperts,
    dequantize_weight,
    quantize_weight,
)
from hf_moe_ted.compression.report.compression_report import report_from_dict
from hf_moe_ted.testing import tiny_config

MakeModel = Callable[..., ZCodeM3ForConditionalGeneration]
FIXTURES = Path(__file__).parents[1] / "fixtures"
LAYERS = ("model.encoder.layers.1.ffn", "model.encoder.layers.3.ffn", "model.decoder.layers.1.ffn")
CASES = [(8, None), (8, 16), (4, None), (4, 8)]


def tokens() -> Tensor:
    return torch.randint(4, 270, (3, 9), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    return model(input_ids=tokens(), decoder_input_ids=tokens().flip(0)).logits


def load(folder: Path, **options: Any) -> Any:
    model, info = AutoModelForSeq2SeqLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


# --- the integers


def test_eight_bits_by_hand() -> None:
    weight = torch.tensor([[1.27, -0.64, 0.004, 0.0], [0.0, 0.0, 0.0, 0.0], [-2.54, 2.0, 0.03, 1.0]])
    packed, scale = quantize_weight(weight, 8, None)
    assert packed.dtype == torch.int8
    assert packed.tolist() == [[127, -64, 0, 0], [0, 0, 0, 0], [-127, 100, 2, 50]]
    torch.testing.assert_close(scale, torch.tensor([[0.01], [0.0], [0.02]]))
    torch.testing.assert_close(dequantize_weight(packed, scale, 8)[2], torch.tensor([-2.54, 2.0, 0.04, 1.0]))


def test_four_bits_by_hand() -> None:
    weight = torch.tensor([[7.0, -7.0, 3.4, 0.0, 70.0, -30.0, 14.0, 6.0]])
    packed, scale = quantize_weight(weight, 4, 4)
    assert packed.dtype == torch.uint8
    # 7 and -7 are 15 and 1 with 8 added, the first in the low half
    assert packed.tolist() == [[0x1F, 0x8B, 0x5F, 0x99]]
    assert scale.tolist() == [[1.0, 10.0]]
    assert dequantize_weight(packed, scale, 4).tolist() == [[7.0, -7.0, 3.0, 0.0, 70.0, -30.0, 10.0, 10.0]]


def test_weights_are_divided_by_the_scale_that_is_stored() -> None:
    weight = torch.tensor([[300.0, 254.0, 1.1875, -3.5625]], dtype=torch.bfloat16)
    packed, scale = quantize_weight(weight, 8, None)
    assert scale.tolist() == [[2.359375]]  # 300 / 127 is 2.362205
    assert packed.tolist() == [[round(value / 2.359375) for value in (300.0, 254.0, 1.1875, -3.5625)]]

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 256, generator=generator).bfloat16()
    packed, scale = quantize_weight(weight, 8, None)
    exact_scale = weight.float().abs().amax(dim=-1, keepdim=True) / 127
    by_stored = (weight.double() / scale.double()).round().clamp(-127, 127)
    assert torch.equal(packed.double(), by_stored)
    assert not torch.equal(packed.double(), (weight.float() / exact_scale).round().double())
    # the error is the least that integers with this scale can have
    error = (dequantize_weight(packed, scale.double(), 8) - weight.double()).abs()
    for step in (-1, 1):
        other = (packed.double() + step).clamp(-127, 127)
        assert (error <= (other * scale.double() - weight.double()).abs() + 1e-12).all()


@pytest.mark.parametrize(("bits", "largest"), [(8, 127), (4, 7)])
def test_integers_are_cut_where_the_scale_was_rounded_down(bits: int, largest: int) -> None:
    """Without the cut, 8 bits would wrap around to -128, and 4 bits would take a bit of their neighbour."""
    for numerator in range(1, 4000):
        weight = torch.tensor([[numerator / 7.0, -numerator / 7.0, 0.0, numerator / 14.0]], dtype=torch.bfloat16)
        packed, scale = quantize_weight(weight, bits, None)
        again = dequantize_weight(packed, scale.float(), bits)
        assert (again.sign() * weight.float().sign() >= 0).all()
        assert again.abs().max() == largest * scale.float().item()
    # a scale in float16 among its subnormal numbers is rounded by up to a half
    weight = torch.tensor([[1.0, -1.0, 0.25, 0.0]]).mul(2.0**-24 * 1.4 * largest).half()
    packed, scale = quantize_weight(weight, bits, None)
    assert scale.item() == 2.0**-24 and (weight.float() / scale.float()).abs().max() > 1.3 * largest
    assert dequantize_weight(packed, scale.float(), bits).tolist()[0][:2] == [largest * 2.0**-24, -largest * 2.0**-24]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "group_size"), CASES)
def test_error_is_half_a_step(bits: int, group_size: int | None, dtype: torch.dtype) -> None:
    weight = torch.randn(3, 10, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[1, 2] = 0
    packed, scale = quantize_weight(weight, bits, group_size)
    assert scale.dtype == dtype and scale.shape == (3, 10, 32 // (group_size or 32))
    exact = dequantize_weight(packed, scale.double(), bits)
    step = scale.double().repeat_interleave(group_size or 32, dim=-1)
    # a scale that was rounded down leaves the largest weights beyond the last integer
    cut = 2 ** (bits - 1) * torch.finfo(dtype).eps
    assert ((exact - weight.double()).abs() <= step * (0.5 + cut) + 1e-12).all()


# --- the model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "group_size"), CASES)
def test_computes_with_the_rounded_weights(
    bits: int, group_size: int | None, dtype: torch.dtype, make_model: MakeModel
) -> None:
    capacity = {"eval_capacity_factor": 0.8, "min_capacity": 0, "token_drop_policy": "position"}
    model = make_model(num_experts=[2, 4, 3], num_experts_per_tok=2, **capacity).to(dtype)
    quantized = quantize_experts(model, bits, group_size)
    expected = logits_of(model)
    with torch.no_grad():
        for layer in LAYERS:
            experts = model.get_submodule(layer).experts
            rounded = quantized.get_submodule(layer).experts
            assert isinstance(rounded, QuantizedExperts)
            for name in ("up_proj", "down_proj"):
                exact = experts.get_parameter(name)
                weights = torch.stack([rounded.weight(name, expert) for expert in range(len(exact))])
                assert 0 < (weights - exact).abs().max() < 0.2 * exact.abs().max()
                exact.copy_(weights)
    model.set_experts_implementation("eager")
    quantized.set_experts_implementation("eager")
    assert torch.equal(logits_of(quantized), logits_of(model))
    assert not torch.equal(expected, logits_of(model))
    # 8 bits change less than 4
    assert (logits_of(quantized) - expected).norm() / expected.norm() < (0.05 if bits == 8 else 0.5)


def test_input_is_untouched(make_model: MakeModel) -> None:
    model = make_model().train()
    config, weights = model.config.to_dict(), {name: weight.clone() for name, weight in model.state_dict().items()}
    quantized = quantize_experts(model)
    assert not any(module.training for module in quantized.modules())
    assert all(module.training for module in model.modules())
    with torch.no_grad():
        for parameter in quantized.parameters():
            parameter.zero_()
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert model.config.to_dict() == config and getattr(model, "hf_quantizer", None) is None
    assert quantized.lm_head.weight is quantized.model.shared.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "group_size"), CASES)
def test_round_trip(
    bits: int, group_size: int | None, dtype: torch.dtype, make_model: MakeModel, tmp_path: Path
) -> None:
    quantized = quantize_experts(make_model(router_bias=True).to(dtype), bits, group_size)
    quantized.save_pretrained(tmp_path / "a", max_shard_size="40KB")
    first = load(tmp_path / "a")
    first.save_pretrained(tmp_path / "b")
    second = ZCodeM3ForConditionalGeneration.from_pretrained(tmp_path / "b")
    for loaded in (first, second):
        weights = loaded.state_dict()
        assert weights.keys() == quantized.state_dict().keys()
        for name, weight in quantized.state_dict().items():
            assert weights[name].dtype == weight.dtype and torch.equal(weights[name], weight), name
        assert torch.equal(logits_of(loaded), logits_of(quantized))
        assert not any(p.requires_grad for name, p in loaded.named_parameters() if ".experts." in name)
    saved = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    expected = {"bits": bits, "group_size": group_size or (None if bits == 8 else 32), "quant_method": "zcode_experts"}
    assert saved == expected


def test_quantized_while_loading(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, quantization_config=ExpertQuantizationConfig(bits=4, group_size=16))
    expected = quantize_experts(model, 4, 16)
    assert torch.equal(logits_of(loaded), logits_of(expected))
    assert loaded.hf_quantizer.relative_errors == expected.hf_quantizer.relative_errors


@pytest.mark.parametrize("tied", [True, False])
def test_all(tied: bool, make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(tie_word_embeddings=tied)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    quantized: Any = quantize_experts(model, what="all", output_dir=tmp_path / "small")
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    loaded = load(tmp_path / "small")
    expected = logits_of(model)
    assert 0 < (logits_of(quantized) - expected).norm() / expected.norm() < 0.05
    assert torch.equal(logits_of(loaded), logits_of(quantized))
    for one in (quantized, loaded):
        assert not any(type(m) is torch.nn.Linear and m.out_features > 2 for m in one.modules())
        assert (getattr(one.model.shared, "weight_packed", None) is one.lm_head.weight_packed) == tied
    # attention and feed-forward without integer products: the same weights, activations that are not rounded
    with torch.enable_grad():
        exact = loaded(input_ids=tokens(), decoder_input_ids=tokens().flip(0)).logits
    assert 0 < (exact - logits_of(loaded)).norm() / exact.norm() < 0.05
    report: Any = quantized.hf_quantizer.report
    assert report.num_bytes_after == sum(p.nbytes for p in loaded.parameters()) < 0.45 * report.num_bytes_before
    assert set(report.errors_of_parts) == {"attention", "feed-forward", "vocabulary"}
    assert 0 < max(report.errors_of_parts.values()) < 0.01
    config = ExpertQuantizationConfig(what="all")
    model.save_pretrained(tmp_path / "full")
    assert torch.equal(logits_of(load(tmp_path / "full", quantization_config=config)), logits_of(quantized))


def test_reports_of_earlier_versions_are_read(make_model: MakeModel) -> None:
    report: Any = quantize_experts(make_model()).hf_quantizer.report
    fields = json.loads(json.dumps(report.to_dict()))
    assert fields.pop("errors_of_parts") == {}
    assert report_from_dict(fields) == report


def test_generates(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    quantize_experts(model, output_dir=tmp_path / "small")
    options = {"input_ids": tokens(), "num_beams": 2, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(load(tmp_path / "small").generate(**options), model.generate(**options))


def test_converted_nllb_moe(tmp_path: Path) -> None:
    """An NLLB-MoE checkpoint is read and quantized at once."""
    quantized = quantize_experts(FIXTURES / "nllb_moe" / "tiny_a", 8)
    quantize_experts(FIXTURES / "nllb_moe" / "tiny_a", 8, output_dir=tmp_path / "small")
    loaded = load(tmp_path / "small")
    ids = tokens() % quantized.config.vocab_size
    with torch.no_grad():
        logits = [m(input_ids=ids, decoder_input_ids=ids).logits for m in (quantized, loaded)]
    assert torch.equal(*logits)


def test_merged_rows_and_pruned_experts(make_model: MakeModel, tmp_path: Path) -> None:
    expert_map = [[0, 1, 1, 2, 0]] * 3
    mapped = make_model(num_experts=3, expert_map=expert_map)
    quantize_experts(mapped, output_dir=tmp_path / "small")
    assert (logits_of(load(tmp_path / "small")) - logits_of(mapped)).abs().max() < 0.2
    pruned = prune_experts(make_model(), None, keep=2, criterion="random").model
    assert quantize_experts(pruned).get_submodule(LAYERS[0]).experts.num_experts == 2


# --- report


def test_report(make_model: MakeModel, tokenizer: ZCodeM3Tokenizer, tmp_path: Path) -> None:
    model = make_model().bfloat16()
    model.save_pretrained(tmp_path / "full")
    tokenizer.save_pretrained(tmp_path / "full")
    sizes = []
    for bits in (8, 4):
        report = quantize_experts(tmp_path / "full", bits, output_dir=tmp_path / f"int{bits}")
        quantized = load(tmp_path / f"int{bits}")
        assert report.num_bytes_before == sum(p.nbytes for p in model.parameters())
        assert report.num_bytes_after == sum(p.nbytes for p in load(tmp_path / f"int{bits}").parameters())
        assert report.num_parameters_after == model.num_parameters()
        sizes.append(report.num_bytes_after)
        for layer, error in report.relative_errors.items():
            exact, rounded = model.get_submodule(layer).experts, quantized.get_submodule(layer).experts
            pairs = [
                (rounded.weight(n, e), exact.get_parameter(n)[e]) for n in ("up_proj", "down_proj") for e in range(4)
            ]
            squares = [((a.double() - b.double()).square().sum(), b.double().square().sum()) for a, b in pairs]
            assert error == pytest.approx((sum(s[0] for s in squares) / sum(s[1] for s in squares)).sqrt().item())
        assert [*report.relative_errors] == [*LAYERS]
        assert max(report.relative_errors.values()) < (0.01 if bits == 8 else 0.15)
        written = json.loads((tmp_path / f"int{bits}" / "compression_report.json").read_text())
        assert written["operation"] == "quantize_experts" and written["relative_errors"] == report.relative_errors
        assert f"experts in {bits} bits" in str(report)
    num_weights = sum(p.numel() for n, p in model.named_parameters() if n.endswith(("up_proj", "down_proj")))
    assert sizes[0] - sizes[1] > 0.4 * num_weights
    assert ZCodeM3Tokenizer.from_pretrained(tmp_path / "int4").languages == ["en", "de", "fr"]


# --- what is refused


def test_training(make_model: MakeModel, tmp_path: Path) -> None:
    quantized = quantize_experts(make_model())
    quantized.train()
    with pytest.raises(ValueError, match="quantized experts cannot be trained"):
        quantized(input_ids=tokens(), labels=tokens())
    with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
        Trainer(quantized, TrainingArguments(output_dir=str(tmp_path), report_to=[]))


def test_twice(make_model: MakeModel, tmp_path: Path) -> None:
    quantized = quantize_experts(make_model(), output_dir=tmp_path / "small")
    for model in (quantized, tmp_path / "small"):
        with pytest.raises(ValueError, match="is quantized already"):
            quantize_experts(model, 4)
        with pytest.raises(ValueError, match="compress the model before you quantize it"):
            prune_experts(model, None, keep=2, criterion="random", output_dir=tmp_path / "pruned")


@pytest.mark.parametrize("tied", [True, False])
def test_resized_embeddings(tied: bool, make_model: MakeModel) -> None:
    model = make_model(tie_word_embeddings=tied)
    quantized: Any = quantize_experts(model, what="all")
    expected, num_tokens = logits_of(quantized), model.config.vocab_size
    name = "QuantizedEmbedding" if tied else "QuantizedLinear"
    with pytest.raises(
        ValueError, match=f"{name} has no floating-point rows .* resize the model before you quantize it"
    ):
        quantized.resize_token_embeddings(num_tokens + 8)
    assert quantized.config.vocab_size == num_tokens
    assert torch.equal(logits_of(quantized), expected)
    model.resize_token_embeddings(num_tokens + 8)
    assert logits_of(quantize_experts(model, what="all")).shape[-1] == num_tokens + 8

    experts_only: Any = quantize_experts(make_model(tie_word_embeddings=tied))
    experts_only.resize_token_embeddings(num_tokens + 8)
    assert logits_of(experts_only).shape[-1] == num_tokens + 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 2}, r"bits \(2\) must be one of \(8, 4\)"),
        ({"group_size": 0}, r"group_size \(0\) must be a positive integer, or None for one scale"),
        ({"max_shard_size": "-1MB"}, r"max_shard_size \('-1MB'\) must be positive"),
        ({"group_size": 48}, r"group_size \(48\) must divide the width 32 of model.encoder.layers.1.ffn.experts"),
    ],
)
def test_wrong_options(options: dict[str, int], message: str, make_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_experts(make_model(), **options, output_dir=tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_wrong_models(make_model: MakeModel, tmp_path: Path) -> None:
    dense = make_model(encoder_sparse_step=0, decoder_sparse_step=0)
    with torch.device("meta"):
        on_meta = ZCodeM3ForConditionalGeneration(dense.config)
    for model, message in (
        (dense, "has no ZCodeM3 experts to quantize"),
        (on_meta, "is not completely in the memory of this process"),
        (make_model().model, "got ZCodeM3Model"),
        (tmp_path / "none", "must be a folder with config.json"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize_experts(model)
    with pytest.raises(ValueError, match="zcode_experts has no option colour"):
        ExpertQuantizationConfig(bits=4, colour="red")
    odd = make_model(encoder_ffn_dim=33)
    with pytest.raises(ValueError, match=r"bits=4 needs even widths, .*down_proj has 33"):
        quantize_experts(odd, 4, 1)


def test_interrupted_writing(make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="No space left"):
            quantize_experts(make_model(), output_dir=tmp_path / "small")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is not empty"):
        quantize_experts(make_model(), output_dir=tmp_path)


def test_models_with_adapters(make_model: MakeModel, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):
        pytest.skip(f"add_adapter of this transformers asks for peft {MIN_PEFT_VERSION}")
    make_model().save_pretrained(tmp_path / "full")
    options = {"output_dir": tmp_path / "small"}

    with_adapter = make_model()
    with_adapter.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    injected = peft.get_peft_model(make_model(), peft.LoraConfig(r=2, target_modules=["k_proj"])).get_base_model()
    whole_module = peft.get_peft_model(
        make_model(), peft.LoraConfig(r=2, target_modules=["k_proj"], modules_to_save=["router"])
    ).get_base_model()
    for model in (with_adapter, injected, whole_module):
        with pytest.raises(ValueError, match="has an adapter of PEFT; merge adapters"):
            quantize_experts(model, **options)
        with pytest.raises(ValueError, match="has an adapter of PEFT; merge adapters"):
            prune_experts(model, None, keep=2, criterion="random", **options)
    wrapped: Any = peft.get_peft_model(make_model(), peft.LoraConfig(r=2, target_modules=["k_proj"]))
    with pytest.raises(ValueError, match=r"must be a ZCodeM3ForConditionalGeneration .* got PeftModel"):
        quantize_experts(wrapped, **options)

    with_adapter.save_pretrained(tmp_path / "full")  # the adapter alone, beside the weights
    with pytest.raises(ValueError, match=r"full has adapter_config\.json: an adapter of PEFT"):
        quantize_experts(tmp_path / "full", **options)
    with pytest.raises(ValueError, match=r"full has adapter_config\.json: an adapter of PEFT"):
        prune_experts(tmp_path / "full", None, keep=2, criterion="random", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_merged_adapter(make_model: MakeModel) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_model(), peft.LoraConfig(r=2, target_modules=["q_proj"])).merge_and_unload()
    assert torch.equal(logits_of(quantize_experts(model)), logits_of(quantize_experts(make_model())))


def test_weights_that_are_not_all_there(make_model: MakeModel, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "full")
    path = tmp_path / "full" / "model.safetensors"
    weights = load_file(path)
    name = f"{LAYERS[0]}.experts.up_proj"
    changes: list[tuple[dict[str, Any], str]] = [
        ({"model.shared.weight": None}, "missing: model.shared.weight"),
        ({name: None}, f"missing: {name}"),
        ({name: weights[name][:2]}, rf"{name} has the shape \(2, "),
        ({"model.shared.weight": weights["model.shared.weight"] * torch.nan}, r"model.shared.weight in .* NaN"),
        ({name: weights[name] / 0}, f"{name} in .* NaN"),
    ]
    for change, message in changes:
        changed = {key: weight for key, weight in {**weights, **change}.items() if weight is not None}
        save_file(changed, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            quantize_experts(tmp_path / "full", output_dir=tmp_path / "small")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["full"]

    shutil.copytree(FIXTURES / "nllb_moe" / "tiny_a", tmp_path / "nllb_moe")
    path = tmp_path / "nllb_moe" / "model.safetensors"
    weights = load_file(path)
    lacking = next(name for name in weights if name.endswith("encoder.layer_norm.weight"))
    save_file({name: weights[name] for name in weights if name != lacking}, path, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"nllb_moe does not hold the model of its config\n  missing: model.encoder.lay"
    ):
        quantize_experts(tmp_path / "nllb_moe", output_dir=tmp_path / "small")
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite(wrong: float, make_model: MakeModel, tmp_path: Path) -> None:
    for name in (f"{LAYERS[0]}.experts.down_proj", f"{LAYERS[1]}.experts.up_proj_bias", "model.shared.weight"):
        model = make_model()
        with torch.no_grad():
            model.get_parameter(name)[1] = wrong
        with pytest.raises(ValueError, match=rf"{name} in .*ZCodeM3ForConditionalGeneration.* NaN"):
            quantize_experts(model)
        model.save_pretrained(tmp_path / "full")
        if name.endswith("down_proj"):
            with pytest.raises(ValueError, match=r"down_proj of expert 1 has NaN or infinity"):
                load(tmp_path / "full", quantization_config=ExpertQuantizationConfig(8))


def test_weights_that_the_config_ties_but_that_differ(make_model: MakeModel) -> None:
    model = make_model(tie_word_embeddings=True)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    quantize_experts(model)
    with torch.no_grad():
        model.lm_head.weight[3] += 1
    with pytest.raises(ValueError, match=r"lm_head.weight .* differ, but the config ties them"):
        quantize_experts(model)
    with pytest.raises(ValueError, match=r"lm_head.weight .* differ, but the config ties them"):
        prune_experts(model, None, keep=2, criterion="random")


def test_ids_that_are_no_words_are_refused() -> None:
    """As by embeddings of floats: indexing would take -100 of labels for a word, counted from the end."""
    torch.manual_seed(0)
    model = quantize_experts(ZCodeM3ForConditionalGeneration(tiny_config()).eval(), what="all")
    vocab_size = model.config.vocab_size
    words = model.get_input_embeddings()(torch.tensor([[0, vocab_size - 1]]))
    assert words.shape == (1, 2, model.config.d_model)
    for wrong in (-1, vocab_size):
        with pytest.raises(IndexError, match="out of range"):
            model.get_input_embeddings()(torch.tensor([[2, wrong]]))
