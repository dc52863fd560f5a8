"""A merged model computes what the full one does when every expert has the weights of the one it is part of."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM

from hf_moe_ted import ZCodeM3ForConditionalGeneration, ZCodeM3Tokenizer, convert_nllb_moe_checkpoint
from hf_moe_ted.compression.merge import merge_experts
from hf_moe_ted.compression.prune import prune_experts
from hf_moe_ted.models.layer_names import moe_layers
from hf_moe_ted.routing.expert_statistics import ExpertStatistics, LayerStatistics, ModelFingerprint
from hf_moe_ted.routing.statistics_collection import collect_expert_statistics
from hf_moe_ted.tensors import safetensors_io

MakeModel = Callable[..., ZCodeM3ForConditionalGeneration]
FIXTURES = Path(__file__).parents[1] / "fixtures"
LAYERS = ("model.encoder.layers.1.ffn", "model.encoder.layers.3.ffn", "model.decoder.layers.1.ffn")
METHODS = ("clustering", "frequency")


def inputs(vocab_size: int = 272) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    source = torch.randint(4, vocab_size, (4, 11), generator=generator)
    target = torch.randint(4, vocab_size, (4, 7), generator=generator)
    return {"input_ids": source, "decoder_input_ids": target}


@torch.no_grad()
def assert_equal(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Logits of some units are sums of float32 numbers, which processors add up in orders of their own."""
    logits, generated = [], []
    for model in (found, expected):
        torch.manual_seed(3)
        logits.append(model.eval()(**inputs()).logits)
        generated.append(model.generate(inputs()["input_ids"], num_beams=1, do_sample=False, max_new_tokens=8))
    torch.testing.assert_close(*logits, rtol=tolerance, atol=tolerance)
    assert torch.equal(*generated)


def load(folder: Path | None) -> Any:
    model, info = AutoModelForSeq2SeqLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


def collect(model: Any, rows: Any) -> ExpertStatistics:
    return collect_expert_statistics(model, ZCodeM3Tokenizer(languages=["en", "de", "fr"]), rows)


def spread(merged: Any, full: Any, expert_map: dict[str, list[int]]) -> Any:
    """The full model whose experts have the weights of the merged ones."""
    full = copy.deepcopy(full)
    with torch.no_grad():
        for layer, experts in expert_map.items():
            for name, parameter in full.get_submodule(f"{layer}.experts").named_parameters():
                parameter.copy_(merged.get_submodule(f"{layer}.experts").get_parameter(name)[experts])
    return full


OPTIONS: dict[str, dict[str, Any]] = {
    "top1": {},
    "top2": {"num_experts_per_tok": 2},
    "top2-before": {"num_experts_per_tok": 2, "normalize_router_weights": "before_dropping"},
    "top3-after-pyramid": {
        "num_experts_per_tok": 3,
        "normalize_router_weights": "after_dropping",
        "num_experts": [3, 6, 4],
    },
    "top2-sampling": {"num_experts_per_tok": 2, "second_expert_policy": "sampling"},
    "bias-residual": {"router_bias": True, "use_residual": True},
    "masked-output": {"moe_token_dropout": 0.2},
    "one": {"keep": 1, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_equals_full_model_with_merged_weights(
    options: dict[str, Any], method: str, make_model: MakeModel, rows: Any, tmp_path: Path
) -> None:
    model = make_model(**{name: value for name, value in options.items() if name != "keep"})
    statistics = collect(model, rows)
    merging: dict[str, Any] = {"keep": options.get("keep", 0.5), "method": method}
    result = merge_experts(model, statistics, **merging)
    assert_equal(result.model, spread(result.model, model, result.expert_map))

    # the same from a folder, and on disk
    model.save_pretrained(tmp_path / "full")
    from_folder = merge_experts(
        tmp_path / "full", statistics, **merging, output_dir=tmp_path / "a", max_shard_size="50KB"
    )
    assert from_folder.expert_map == result.expert_map
    loaded, expected = load(tmp_path / "a"), result.model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in loaded.state_dict().items())
    assert_equal(loaded, result.model)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "zcode_grouped"])
def test_however_experts_run(implementation: str, make_model: MakeModel, rows: Any) -> None:
    model = make_model(num_experts_per_tok=2)
    result = merge_experts(model, collect(model, rows), keep=2)
    result.model.set_experts_implementation(implementation)
    assert_equal(result.model, spread(result.model, model, result.expert_map))


def test_weights_are_means_by_frequency(make_model: MakeModel, rows: Any) -> None:
    model = make_model(num_experts=6)
    statistics = collect(model, rows)
    result = merge_experts(model, statistics, keep=2)
    for layer, experts in result.expert_map.items():
        used = statistics.layers[layer].num_computed.sum(dim=0).double()
        for name, parameter in model.get_submodule(f"{layer}.experts").named_parameters():
            merged = result.model.get_submodule(f"{layer}.experts").get_parameter(name)
            for new in range(2):
                group = [old for old in range(6) if experts[old] == new]
                shares = used[group] / used[group].sum()
                expected = sum(share * parameter[old].double() for share, old in zip(shares, group, strict=True))
                torch.testing.assert_close(merged[new], expected.float())


def with_copies(make_model: MakeModel, is_shuffled: bool) -> ZCodeM3ForConditionalGeneration:
    """Of six experts, 3 to 5 are 0 to 2 with their neurons in another order, and their router rows are similar."""
    model = make_model(num_experts=6)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in LAYERS:
            ffn = model.get_submodule(layer)
            ffn.router.weight[3:] = 0.9 * ffn.router.weight[:3]
            for expert in range(3):
                order = torch.randperm(64, generator=generator) if is_shuffled else torch.arange(64)
                ffn.experts.up_proj[expert + 3] = ffn.experts.up_proj[expert][order]
                ffn.experts.up_proj_bias[expert + 3] = ffn.experts.up_proj_bias[expert][order]
                ffn.experts.down_proj[expert + 3] = ffn.experts.down_proj[expert][:, order]
                ffn.experts.down_proj_bias[expert + 3] = ffn.experts.down_proj_bias[expert]
    return model


def test_copies_merge_without_loss(make_model: MakeModel, rows: Any) -> None:
    """The order of neurons is found again, so nothing is lost."""
    model = with_copies(make_model, is_shuffled=True)
    statistics = collect(model, rows)
    # only those of which one is dominant and the other is not; that is sure for these
    for layer in LAYERS:
        statistics.layers[layer].num_routed[:, :, :3] += 1000
    result = merge_experts(model, statistics, keep=3, method="frequency")
    assert [*result.expert_map.values()] == [[0, 1, 2, 0, 1, 2]] * 3
    assert_equal(result.model, model)


def test_experts_without_tokens(make_model: MakeModel, rows: Any) -> None:
    """They go with the expert of the most similar router row, and their weights count for nothing."""
    model = with_copies(make_model, is_shuffled=False)
    statistics = collect(model, rows)
    for layer in LAYERS:
        statistics.layers[layer].num_routed[:, :, 3:] = 0
        statistics.layers[layer].num_routed[:, :, :3] += 1
        statistics.layers[layer].output_sum[3:] = 0
        with torch.no_grad():
            model.get_submodule(layer).experts.up_proj[3:] = 1e4
    result = merge_experts(model, statistics, keep=3)
    assert [*result.expert_map.values()] == [[0, 1, 2, 0, 1, 2]] * 3
    assert "so their weights do not count: model.encoder.layers.1.ffn: 3" in result.report.warnings[0]
    assert torch.equal(
        result.model.get_submodule(LAYERS[0]).experts.up_proj, model.get_submodule(LAYERS[0]).experts.up_proj[:3]
    )


def test_without_merging_nothing_changes(make_model: MakeModel, rows: Any) -> None:
    model = make_model()
    for method in METHODS:
        result = merge_experts(model, collect(model, rows), keep=1.0, method=method)
        assert result.model.config.to_dict() == model.config.to_dict()
        assert_equal(result.model, model, tolerance=0.0)


def test_input_is_untouched_and_training_goes_on(make_model: MakeModel, rows: Any) -> None:
    model = make_model()
    weights, config = {n: w.clone() for n, w in model.state_dict().items()}, model.config.to_dict()
    merged = merge_experts(model, collect(model, rows), keep=2).model.train()
    merged(input_ids=inputs()["input_ids"], labels=inputs()["decoder_input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in merged.parameters())
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.zero_()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert model.config.to_dict() == config
    assert merged.lm_head.weight is merged.model.shared.weight


def test_adaptive_sizes_and_report(
    make_model: MakeModel, tokenizer: ZCodeM3Tokenizer, rows: Any, tmp_path: Path
) -> None:
    model = make_model(num_experts=8)
    model.save_pretrained(tmp_path / "full")
    tokenizer.save_pretrained(tmp_path / "full")
    statistics = collect(model, rows)
    result = merge_experts(
        tmp_path / "full",
        statistics,
        keep=0.5,
        method="frequency",
        languages=["en", "de"],
        per_layer="adaptive",
        output_dir=tmp_path / "small",
    )
    small, report = load(tmp_path / "small"), result.report
    assert sum(report.num_experts_after.values()) == 12 and report.num_experts_before == dict.fromkeys(LAYERS, 8)
    assert len({*report.num_experts_after.values()}) > 1
    assert small.config.expert_map == [*result.expert_map.values()]
    assert report.num_parameters_after == small.num_parameters()
    assert report.num_bytes_before - report.num_bytes_after == 12 * (2 * 64 * 32 + 64 + 32) * 4
    assert ZCodeM3Tokenizer.from_pretrained(tmp_path / "small").languages == ["en", "de", "fr"]
    written = json.loads((tmp_path / "small" / "compression_report.json").read_text())
    assert written["operation"] == "merge_experts" and written["expert_map"] == result.expert_map
    assert written["arguments"]["languages"] == ["en", "de"]
    assert "24 experts merged to 12" in str(report)
    same_size = merge_experts(model, statistics, keep=f"{report.num_bytes_after / 1000}KB", per_layer="adaptive")
    assert same_size.report.num_bytes_after == report.num_bytes_after


def test_converted_nllb_moe(tmp_path: Path) -> None:
    convert_nllb_moe_checkpoint(FIXTURES / "nllb_moe" / "tiny_a", tmp_path / "full")
    full = load(tmp_path / "full")
    vocabulary = full.config.vocab_size
    statistics = _statistics_by_hand(full)
    result = merge_experts(tmp_path / "full", statistics, keep=0.5, output_dir=tmp_path / "small")
    small = load(result.output_dir)
    with torch.no_grad():
        logits = [m(**inputs(vocabulary)).logits for m in (small, spread(small, full, result.expert_map))]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


def _statistics_by_hand(model: Any) -> ExpertStatistics:
    layers = {}
    for layer, num in moe_layers(model.config).items():
        generator = torch.Generator().manual_seed(num)
        layers[layer] = LayerStatistics(
            num_routed=torch.randint(1, 9, (1, model.config.num_experts_per_tok, num), generator=generator),
            num_dropped=torch.zeros(1, num, dtype=torch.int64),
            gate_mass=torch.ones(1, num),
            confidence=torch.ones(1, num),
            gated_norm=torch.ones(1, num),
            output_sum=torch.randn(num, model.config.d_model, generator=generator, dtype=torch.float64),
        )
    weights = {layer: model.get_submodule(layer).router.weight for layer in layers}
    return ExpertStatistics(ModelFingerprint.of(model.config, weights), (("en", "de"),), (1,), layers)


def test_merged_model_is_not_compressed_again(make_model: MakeModel, rows: Any, tmp_path: Path) -> None:
    model = make_model()
    statistics = collect(model, rows)
    merged = merge_experts(model, statistics, keep=2).model
    with pytest.raises(ValueError, match="has an expert_map: its experts were merged"):
        prune_experts(merged, None, keep=1, criterion="random")
    with pytest.raises(ValueError, match="has an expert_map: its experts were merged"):
        merge_experts(merged, statistics, keep=1)
    with pytest.raises(ValueError, match="has an expert_map: its experts were merged"):
        collect(merged, rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, r"method \('magic'\) must be one of"),
        ({"keep": 0.01}, "rounds to zero"),
        ({"keep": 9}, "asks for 9 experts"),
        ({"keep": 1, "min_experts": 2}, r"fewer than min_experts \(2\)"),
        ({"min_experts": 0}, r"min_experts \(0\) must be at least 1"),
        ({"languages": ["sw"]}, "no sentences in sw"),
        ({"statistics": None}, "merging needs statistics .* got NoneType"),
    ],
)
def test_wrong_input(options: dict[str, Any], message: str, make_model: MakeModel, rows: Any, tmp_path: Path) -> None:
    model = make_model()
    options = {"statistics": collect(model, rows[:6]), "keep": 2, **options}
    with pytest.raises(ValueError, match=message):
        merge_experts(model, options.pop("statistics"), **options, output_dir=tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_without_scipy(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs SciPy: pip install 'hf-moe-ted\[merge\]'"):
        merge_experts(make_model(), None, keep=2)


def test_other_wrong_input(make_model: MakeModel, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    statistics = collect(model, rows[:6])
    with pytest.raises(ValueError, match="are of different models"):
        merge_experts(make_model(num_experts=6), statistics, keep=2)
    with pytest.raises(ValueError, match="has no MoE layer"):
        merge_experts(make_model(encoder_sparse_step=0, decoder_sparse_step=0), statistics, keep=2)
    model.save_pretrained(tmp_path / "full")
    with pytest.raises(ValueError, match="output_dir is required"):
        merge_experts(tmp_path / "full", statistics, keep=2)
    with pytest.raises(ValueError, match="is not empty"):
        merge_experts(model, statistics, keep=2, output_dir=tmp_path)

    def full_disk(*args: Any) -> None:
        raise OSError("No space left on device")

    before = {*tmp_path.rglob("*")}
    monkeypatch.setattr(safetensors_io, "create_safetensors_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        merge_experts(tmp_path / "full", statistics, keep=2, output_dir=tmp_path / "small")
    assert {*tmp_path.rglob("*")} == before


def test_an_expert_with_nan_does_not_spread(make_model: MakeModel, rows: Any, tmp_path: Path) -> None:
    model = make_model()
    statistics = collect(model, rows[:6])
    with torch.no_grad():
        for experts in (layer.experts for layer in model.modules() if hasattr(layer, "experts")):
            experts.down_proj[2] = torch.nan
    with pytest.raises(ValueError, match=r"down_proj in the model in memory .* at \[2, 0, 0\] \(expert 2\)"):
        merge_experts(model, statistics, keep=1)
    with pytest.raises(ValueError, match=r"down_proj in the model in memory .* at \[2, 0, 0\] \(expert 2\)"):
        prune_experts(model, None, keep=2, criterion="random")
    model.save_pretrained(tmp_path / "full")
    with pytest.raises(ValueError, match=r"down_proj in .*model.safetensors has numbers that are NaN"):
        merge_experts(tmp_path / "full", statistics, keep=1, output_dir=tmp_path / "small")
    with pytest.raises(ValueError, match=r"down_proj in .* \(expert 2\)"):
        merge_experts(model, statistics, keep=1, method="frequency")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]
