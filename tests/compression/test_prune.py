"""A pruned model computes what the full one does with the removed experts' logits at minus infinity."""

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, GenerationConfig

from hf_moe_ted import (
    ZCodeM3ForConditionalGeneration,
    ZCodeM3Tokenizer,
    convert_deepspeed_checkpoint,
    convert_nllb_moe_checkpoint,
)
from hf_moe_ted.compression.prune import PruningResult, prune_experts
from hf_moe_ted.models import router as router_module
from hf_moe_ted.routing.expert_statistics import ExpertStatistics
from hf_moe_ted.routing.statistics_collection import collect_expert_statistics
from hf_moe_ted.tensors import safetensors_io
from hf_moe_ted.tensors.lazy_tensors import TensorFile

MakeModel = Callable[..., ZCodeM3ForConditionalGeneration]
FIXTURES = Path(__file__).parents[1] / "fixtures"
LAYERS = ("model.encoder.layers.1.ffn", "model.encoder.layers.3.ffn", "model.decoder.layers.1.ffn")
ENCODER_INPUTS = ("input_ids", "attention_mask")
PAD = 1


def batch(vocab_size: int = 272) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    source = torch.randint(4, vocab_size, (4, 11), generator=generator)
    target = torch.randint(4, vocab_size, (4, 7), generator=generator)
    source[1, 5:] = source[3, 8:] = target[2, 3:] = PAD
    return {
        "input_ids": source,
        "attention_mask": source.ne(PAD).long(),
        "decoder_input_ids": target,
        "decoder_attention_mask": target.ne(PAD).long(),
    }


def masked(model: Any, kept_experts: dict[str, list[int]]) -> Any:
    """The full model with the logits of the other experts at minus infinity."""
    model = copy.deepcopy(model)
    for layer, kept in kept_experts.items():
        router = model.get_submodule(layer).router
        is_removed_E = torch.ones(router.num_experts, dtype=torch.bool)
        is_removed_E[kept] = False

        def logits(hidden_TD: Tensor, full: Any = router._logits, is_removed_E: Tensor = is_removed_E) -> Tensor:
            return full(hidden_TD).masked_fill(is_removed_E, -torch.inf)

        router._logits = logits
    return model


@torch.no_grad()
def assert_equal(pruned: Any, expected: Any, vocab_size: int = 272, tolerance: float = 1e-5) -> None:
    """Logits of some units are sums of float32 numbers, which processors add up in orders of their own."""
    inputs = batch(vocab_size)
    outputs = []
    for model in (pruned, expected):
        torch.manual_seed(3)
        logits = model.eval()(**inputs).logits[inputs["decoder_attention_mask"].bool()]
        encoder_inputs = {name: inputs[name] for name in ENCODER_INPUTS}
        outputs.append((logits, model.generate(**encoder_inputs, num_beams=1, do_sample=False, max_new_tokens=8)))
    torch.testing.assert_close(outputs[0][0], outputs[1][0], rtol=tolerance, atol=tolerance)
    assert torch.equal(outputs[0][1], outputs[1][1])


def load(folder: Path | None) -> Any:
    assert folder is not None
    model, info = AutoModelForSeq2SeqLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


def collect(model: Any, languages: tuple[str, ...] = ("en", "de", "fr"), rows: Any = None) -> ExpertStatistics:
    return collect_expert_statistics(model, ZCodeM3Tokenizer(languages=languages), rows)


@pytest.fixture
def statistics(make_model: MakeModel, rows: Any) -> ExpertStatistics:
    return collect(make_model(), rows=rows)


# --- exactness

OPTIONS: dict[str, dict[str, Any]] = {
    "top1": {},
    "top1-fewer": {"keep": 0.25, "per_layer": "adaptive", "num_experts": 8},
    "top1-pyramid": {"num_experts": [3, 6, 4]},
    "top1-normalized": {"normalize_router_weights": "before_dropping"},
    "top2": {"num_experts_per_tok": 2},
    "top2-before": {"num_experts_per_tok": 2, "normalize_router_weights": "before_dropping"},
    "top2-after": {"num_experts_per_tok": 2, "normalize_router_weights": "after_dropping"},
    "top2-masked-output": {"num_experts_per_tok": 2, "moe_token_dropout": 0.2},
    "top2-random": {"num_experts_per_tok": 2, "second_expert_policy": "random"},
    "top3": {"num_experts_per_tok": 3, "keep": 0.75, "token_drop_policy": "probability"},
    "top3-after": {"num_experts_per_tok": 3, "keep": 0.75, "normalize_router_weights": "after_dropping"},
    "prioritized": {"num_experts_per_tok": 2, "token_drop_policy": "position", "batch_prioritized_routing": True},
    "bias": {"router_bias": True},
    "residual": {"use_residual": True},
    "padding-is-routed": {"router_ignore_padding_tokens": False},
    "bfloat16-router": {"router_dtype": "bfloat16"},
    "training-noise": {"router_noise_policy": "rsample"},
    "untied-tupe": {"tie_word_embeddings": False, "position_embedding_type": "tupe"},
    "dense": {"keep": 1},
    "dense-normalized": {"keep": 1, "normalize_router_weights": "after_dropping"},
    "one-residual": {"keep": 1, "use_residual": True},
    "one-masked-output": {"keep": 1, "moe_token_dropout": 0.2},
    "one-of-some-layers": {"num_experts": [2, 6, 4], "keep": 0.5},
}


def split_options(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those of the config, those of pruning."""
    pruning = {"keep": 0.5} | {name: options[name] for name in ("keep", "per_layer") if name in options}
    return {name: value for name, value in options.items() if name not in pruning}, pruning


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_equals_masked_logits(options: dict[str, Any], make_model: MakeModel, tmp_path: Path) -> None:
    config, pruning = split_options(options)
    model = make_model(**config)
    result = prune_experts(model, None, criterion="random", **pruning)
    assert result.model is not None
    assert_equal(result.model, masked(model, result.kept_experts))

    # the same from a folder, and on disk
    model.save_pretrained(tmp_path / "full")
    pruning |= {"criterion": "random", "max_shard_size": "50KB"}
    from_folder = prune_experts(tmp_path / "full", None, output_dir=tmp_path / "a", **pruning)
    from_model = prune_experts(model, None, output_dir=tmp_path / "b", **pruning)
    assert from_folder.kept_experts == from_model.kept_experts == result.kept_experts
    expected = result.model.state_dict()
    for folder in (tmp_path / "a", tmp_path / "b"):
        found = load(folder).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(weight, expected[name]) for name, weight in found.items())


@pytest.mark.parametrize("name", ["top1-pyramid", "top2-before", "top3", "one-of-some-layers"])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_equals_masked_logits_however_experts_run(name: str, implementation: str, make_model: MakeModel) -> None:
    config, pruning = split_options(OPTIONS[name])
    model = make_model(**config)
    model.set_experts_implementation(implementation)
    result = prune_experts(model, None, criterion="random", **pruning)
    assert_equal(result.model, masked(model, result.kept_experts))


def test_sampled_second_expert(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise differs between models with different numbers of experts; without noise they agree."""
    model = make_model(num_experts_per_tok=2, second_expert_policy="sampling")
    pruned = prune_experts(model, None, keep=0.5, criterion="random")
    monkeypatch.setattr(router_module, "_gumbel_like", torch.zeros_like)
    assert_equal(pruned.model, masked(model, pruned.kept_experts))


PROBABILITIES_OF_ALL: dict[str, dict[str, Any]] = {
    "top1": {},
    "top1-one": {"keep": 1},
    "top1-pyramid-bias": {"num_experts": [3, 6, 4], "router_bias": True, "per_layer": "adaptive"},
    "top2": {"num_experts_per_tok": 2},
    "top2-after": {"num_experts_per_tok": 2, "normalize_router_weights": "after_dropping"},
    "top3-residual": {"num_experts_per_tok": 3, "keep": 0.75, "use_residual": True},
}


@pytest.mark.parametrize("options", PROBABILITIES_OF_ALL.values(), ids=PROBABILITIES_OF_ALL.keys())
def test_without_renormalizing(options: dict[str, Any], make_model: MakeModel, tmp_path: Path) -> None:
    """Kept experts are chosen among each other, and weigh what they do in the full model."""
    config, pruning = split_options(options)
    pruning |= {"criterion": "random", "renormalize": False}
    model = make_model(**config)
    result = prune_experts(model, None, **pruning)
    expected = copy.deepcopy(model)
    for layer, kept in result.kept_experts.items():
        router: Any = expected.get_submodule(layer).router

        def choices(logits_TE: Tensor, probs_TE: Tensor, router: Any = router, kept: list[int] = kept) -> Tensor:
            return torch.tensor(kept)[probs_TE[:, kept].topk(router.top_k).indices]

        router._choices = choices
    assert_equal(result.model, expected)
    assert result.report.dense_layers == ()

    model.save_pretrained(tmp_path / "full")
    report = prune_experts(tmp_path / "full", None, output_dir=tmp_path / "small", **pruning).report
    found = load(tmp_path / "small")
    assert_equal(found, result.model)
    assert report.num_bytes_after == sum(parameter.nbytes for parameter in found.parameters())
    by_size = prune_experts(model, None, **{**pruning, "keep": f"{report.num_bytes_after / 1000}KB"})
    assert by_size.report.num_bytes_after <= report.num_bytes_after


def test_capacity_is_that_of_fewer_experts(make_model: MakeModel) -> None:
    """Half of the experts with half of the factor have the same capacity."""
    capacity = {"eval_capacity_factor": 0.8, "min_capacity": 0, "token_drop_policy": "position"}
    model = make_model(**capacity)
    result = prune_experts(model, None, keep=0.5, criterion="random")
    expected = masked(model, result.kept_experts)
    with torch.no_grad():
        dropped = [r.dropped_share() for r in expected(**batch(), output_routings=True).encoder_routings]
        fewer_dropped = [r.dropped_share() for r in result.model(**batch(), output_routings=True).encoder_routings]
    assert all(few < many for few, many in zip(fewer_dropped, dropped, strict=True))
    for layer in LAYERS:
        result.model.get_submodule(layer).router.eval_capacity_factor /= 2
    assert_equal(result.model, expected)
    assert "eval_capacity_factor=0.8" in result.report.warnings[0]


def test_without_pruning_nothing_changes(make_model: MakeModel) -> None:
    model = make_model()
    for renormalize in (True, False):
        result = prune_experts(model, None, keep=1.0, criterion="random", renormalize=renormalize)
        assert result.model.config.to_dict() == model.config.to_dict()
        assert_equal(result.model, model, tolerance=0.0)


# --- the pruned model


def test_input_is_untouched(make_model: MakeModel) -> None:
    model = make_model().train()
    model.generation_config.num_beams = 3
    model.model.encoder.layers[1].ffn.experts.requires_grad_(False)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    config = model.config.to_dict()
    pruned = prune_experts(model, None, keep=2, criterion="random").model
    assert pruned.training and pruned.generation_config.num_beams == 3
    assert pruned.lm_head.weight is pruned.model.shared.weight is pruned.model.encoder.embed_tokens.weight
    assert not any(p.requires_grad for p in pruned.model.encoder.layers[1].ffn.experts.parameters())
    assert pruned.model.encoder.layers[1].ffn.router.weight.requires_grad
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.zero_()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert model.config.to_dict() == config
    assert {id(module.config) for module in pruned.modules() if hasattr(module, "config")} == {id(pruned.config)}


def test_training_goes_on(make_model: MakeModel) -> None:
    pruned = prune_experts(make_model(num_experts=[2, 6, 4]), None, keep=0.5, criterion="random").model.train()
    inputs = batch()
    pruned(**{name: inputs[name] for name in ENCODER_INPUTS}, labels=inputs["decoder_input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in pruned.parameters())


def test_dense_layers_in_config(make_model: MakeModel) -> None:
    mixed = prune_experts(make_model(num_experts=[2, 6, 4]), None, keep=0.5, criterion="random")
    config = mixed.model.config
    assert (config.num_experts, config.sparse_layers("encoder"), config.sparse_layers("decoder")) == ([3, 2], [3], [1])
    assert config.decoder_sparse_layers is None
    assert mixed.report.dense_layers == LAYERS[:1]
    dense = prune_experts(make_model(), None, keep=1, criterion="random")
    assert (dense.model.config.num_experts, dense.model.config.sparse_layers("encoder")) == ([], [])
    assert not [name for name in dense.model.state_dict() if ".experts." in name or ".router." in name]
    assert dense.report.dense_layers == LAYERS


def test_one_expert_that_cannot_be_dense(make_model: MakeModel) -> None:
    result = prune_experts(make_model(use_residual=True), None, keep=1, criterion="random")
    assert result.model.config.num_experts == 1
    assert result.report.dense_layers == ()
    assert result.report.warnings == ("layers with one expert stay MoE layers because of use_residual",)


def test_mixed_dtypes_stay(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model().bfloat16()
    for layer in LAYERS:
        model.get_submodule(layer).router.float()
    result = prune_experts(model, None, keep=2, criterion="random")
    assert result.model.get_submodule(LAYERS[0]).router.weight.dtype == torch.float32
    assert result.model.get_submodule(LAYERS[0]).experts.up_proj.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "full")
    report = prune_experts(tmp_path / "full", None, keep=2, criterion="random", output_dir=tmp_path / "small").report
    assert report.num_bytes_after == result.report.num_bytes_after
    fields = json.loads((tmp_path / "small" / "config.json").read_text())
    (tmp_path / "small" / "config.json").write_text(json.dumps(fields | {"dtype": "float32"}))
    pruned_again = prune_experts(tmp_path / "small", None, keep=1, criterion="random", output_dir=tmp_path / "smaller")
    assert pruned_again.report.num_bytes_before == report.num_bytes_after
    assert load(tmp_path / "smaller").dtype == torch.float32  # as the config says, though stored in fewer bytes


# --- which experts


def test_most_used_experts_stay(make_model: MakeModel, statistics: ExpertStatistics) -> None:
    result = prune_experts(make_model(), statistics, keep=2)
    for layer, of_layer in statistics.layers.items():
        used = of_layer.num_computed.sum(0)
        assert result.kept_experts[layer] == sorted(used.topk(2).indices.tolist())
    assert [*result.kept_experts] == [*LAYERS]


def test_scope_and_languages_reach_the_criterion(make_model: MakeModel, statistics: ExpertStatistics) -> None:
    def first_if_german(layer: Any) -> Tensor:
        has_two_pairs = len(layer.num_routed) == 2  # from German to two languages, to German from two
        return torch.tensor([1.0, 0, 0, 0]) if has_two_pairs else torch.tensor([0, 0, 0, 1.0])

    options = {"keep": 1, "criterion": first_if_german}
    german = prune_experts(make_model(), statistics, scope="language", languages=["de"], **options)
    assert {*map(tuple, german.kept_experts.values())} == {(0,)}
    everything = prune_experts(make_model(), statistics, **options)
    assert {*map(tuple, everything.kept_experts.values())} == {(3,)}
    assert german.report.arguments["criterion"] == "first_if_german"


def test_statistics_fit_the_model_in_bfloat16(make_model: MakeModel, statistics: ExpertStatistics) -> None:
    expected = prune_experts(make_model(), statistics, keep=2).kept_experts
    assert prune_experts(make_model().bfloat16(), statistics, keep=2).kept_experts == expected


def test_size_budget(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(num_experts=8)
    reports = {keep: prune_experts(model, None, keep=keep, criterion="random").report for keep in (1, 4, 8)}
    sizes = {keep: report.num_bytes_after for keep, report in reports.items()}
    for keep, size in sizes.items():
        budget = f"{size / 1000}KB"
        found = prune_experts(model, None, keep=budget, criterion="random", output_dir=tmp_path / str(keep))
        assert [*found.report.num_experts_after.values()] == [keep] * 3
        weights = sum(weight.nbytes for weight in load(found.output_dir).parameters())
        assert weights == found.report.num_bytes_after == size
    with pytest.raises(ValueError, match=f"less than the {sizes[1]:,} bytes of the smallest model"):
        prune_experts(model, None, keep=f"{sizes[1] / 1000 - 0.01}KB", criterion="random")


# --- folders


@pytest.fixture
def folder(make_model: MakeModel, tokenizer: ZCodeM3Tokenizer, tmp_path: Path) -> Path:
    model = make_model(num_experts=8)
    model.generation_config = GenerationConfig(num_beams=3, pad_token_id=1, eos_token_id=2, decoder_start_token_id=2)
    model.save_pretrained(tmp_path / "full", max_shard_size="60KB")
    tokenizer.save_pretrained(tmp_path / "full")
    return tmp_path / "full"


def test_only_kept_experts_are_read(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[str, int | None]] = []
    original = TensorFile.read

    def recorded(self: TensorFile, name: str, index: int | None = None) -> Tensor:
        read.append((name, index))
        return original(self, name, index)

    monkeypatch.setattr(TensorFile, "read", recorded)
    result = prune_experts(folder, None, keep=2, criterion="random", output_dir=tmp_path / "small")
    names = [
        f"{layer}.experts.{kind}"
        for layer in LAYERS
        for kind in ("up_proj", "up_proj_bias", "down_proj", "down_proj_bias")
    ]
    assert {(name, index) for name, index in read if ".experts." in name} == {
        (name, expert) for name in names for expert in result.kept_experts[name.split(".experts.")[0]]
    }
    assert len(read) == len({*read})


def test_files_that_come_along(folder: Path, tmp_path: Path) -> None:
    result = prune_experts(folder, None, keep=0.25, criterion="random", output_dir=tmp_path / "small")
    assert result.model is None and result.output_dir == tmp_path / "small"
    assert ZCodeM3Tokenizer.from_pretrained(tmp_path / "small").languages == ["en", "de", "fr"]
    assert load(tmp_path / "small").generation_config.num_beams == 3
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_report(folder: Path, rows: Any, tmp_path: Path) -> None:
    model = load(folder)
    statistics = collect(model, rows=rows)
    result = prune_experts(
        folder, statistics, keep=0.5, languages=["en", "de"], per_layer="adaptive", output_dir=tmp_path / "small"
    )
    report, small = result.report, load(tmp_path / "small")
    assert report.num_parameters_before == model.num_parameters()
    assert report.num_parameters_after == small.num_parameters()
    assert report.num_bytes_after == sum(p.nbytes for p in small.parameters())
    assert report.num_experts_before == dict.fromkeys(LAYERS, 8)
    assert sum(report.num_experts_after.values()) == 12
    routed = [statistics.layers[layer].num_routed[2:4].sum(dim=(0, 1)) for layer in LAYERS[:2]]  # English sources
    assert statistics.pairs[2:4] == (("en", "de"), ("en", "fr"))
    kept = sum(r[result.kept_experts[layer]].sum().item() for r, layer in zip(routed, LAYERS, strict=False))
    assert report.routed_share_kept["encoder"]["en"] == kept / sum(r.sum().item() for r in routed)
    assert [*report.routed_share_kept["decoder"]] == ["de", "en", "fr"]
    written = json.loads((tmp_path / "small" / "compression_report.json").read_text())
    assert written["operation"] == "prune_experts"
    assert written["arguments"]["languages"] == ["en", "de"]
    assert written["num_experts_after"] == {layer: len(experts) for layer, experts in result.kept_experts.items()}
    assert written["kept_experts"] == result.kept_experts
    assert "12 of 24 experts kept" in str(report)


def test_interrupted_writing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*args: Any) -> None:
        raise OSError("No space left on device")

    before = {*tmp_path.rglob("*")}
    monkeypatch.setattr(safetensors_io, "create_safetensors_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        prune_experts(folder, None, keep=2, criterion="random", output_dir=tmp_path / "small")
    assert {*tmp_path.rglob("*")} == before


@pytest.mark.parametrize("name", ["tiny_a", "tiny_b"])
def test_converted_nllb_moe(name: str, tmp_path: Path) -> None:
    convert_nllb_moe_checkpoint(FIXTURES / "nllb_moe" / name, tmp_path / "full")
    full = load(tmp_path / "full")
    result = prune_experts(tmp_path / "full", None, keep=0.5, criterion="random", output_dir=tmp_path / "small")
    assert_equal(load(result.output_dir), masked(full, result.kept_experts), full.config.vocab_size)


@pytest.mark.parametrize(
    ("name", "top_k"),
    [("m2m_ep1_zero0_top1_fp32", 1), ("m2m_ep2_zero1_top2_fp32", 2), ("m2m_ep2_zero2_top1_bf16_residual", 1)],
)
def test_converted_deepspeed(name: str, top_k: int, tmp_path: Path) -> None:
    source = FIXTURES / "deepspeed" / name
    base = torch.load(source / "expected.pt", weights_only=True)["base_config"]
    overrides = {"num_experts_per_tok": top_k}
    convert_deepspeed_checkpoint(
        source, tmp_path / "full", base_config=base, config_overrides=overrides, dtype="float32"
    )
    full = load(tmp_path / "full")
    result = prune_experts(tmp_path / "full", None, keep=0.5, criterion="random", output_dir=tmp_path / "small")
    assert_equal(load(result.output_dir), masked(full, result.kept_experts), full.config.vocab_size)


# --- wrong input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.01}, "rounds to zero"),
        ({"max_shard_size": "0KB"}, r"max_shard_size \('0KB'\) must be positive"),
        ({"criterion": "utilization", "statistics": None}, r"criterion \(utilization\) needs statistics"),
        ({"criterion": "magic"}, r"criterion \('magic'\) must be"),
        ({"languages": ["en", "sw"]}, "no sentences in sw"),
        ({"min_experts": 0}, r"min_experts \(0\) must be at least num_experts_per_tok \(1\)"),
        ({"keep": 1, "min_experts": 2}, r"fewer than min_experts \(2\)"),
    ],
)
def test_wrong_input(
    options: dict[str, Any], message: str, make_model: MakeModel, statistics: ExpertStatistics, tmp_path: Path
) -> None:
    options = {"statistics": statistics, "keep": 2, **options}
    with pytest.raises(ValueError, match=message):
        prune_experts(make_model(), options.pop("statistics"), **options, output_dir=tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_more_experts_per_token_than_are_left(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match=r"keep \(1\) leaves 1 of the 4 experts .* min_experts \(2\)"):
        prune_experts(make_model(num_experts_per_tok=2), None, keep=1, criterion="random")


def test_statistics_of_another_model(make_model: MakeModel, statistics: ExpertStatistics) -> None:
    other = make_model()
    with torch.no_grad():
        other.get_submodule(LAYERS[2]).router.weight.add_(0.5)
    different = {
        "num_experts": make_model(num_experts=6),
        "num_experts_per_tok 1 and 2": make_model(num_experts_per_tok=2),
        "router_hash": other,
    }
    for message, model in different.items():
        with pytest.raises(ValueError, match=f"the statistics and ZCodeM3For.* are of different models: .*{message}"):
            prune_experts(model, statistics, keep=2, criterion="random")


def test_wrong_models(make_model: MakeModel, folder: Path, tmp_path: Path) -> None:
    def message_of(model: Any, **options: Any) -> str:
        options = {"keep": 2, "criterion": "random", "output_dir": tmp_path / "small", **options}
        with pytest.raises(ValueError) as error:
            prune_experts(model, None, **options)
        return str(error.value)

    assert "got ZCodeM3Model" in message_of(make_model().model)
    assert "has no MoE layer to prune" in message_of(make_model(encoder_sparse_step=0, decoder_sparse_step=0))
    with torch.device("meta"):
        on_meta = ZCodeM3ForConditionalGeneration(make_model().config)
    assert "model.shared.weight is not completely in the memory of this process" in message_of(on_meta)
    assert "output_dir is required to prune a folder" in message_of(folder, output_dir=None)
    assert f"output_dir ({folder}) is not empty" in message_of(folder, output_dir=folder)
    assert "must be a folder with config.json" in message_of(tmp_path / "nothing")
    nllb_moe = message_of(FIXTURES / "nllb_moe" / "tiny_a")
    assert "has model_type 'nllb-moe' but must have 'zcode_m3'; `hf-moe-ted convert`" in nllb_moe
    shutil.copytree(folder, tmp_path / "copy")
    fields = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"num_experts": 6}, "has the shape (8, 32), but the config needs (6, 32)"),
        ({"num_experts": "many"}, "config.json: "),
        ({"quantization_config": {"bits": 4}}, "compress the model before you quantize it"),
    ):
        (tmp_path / "copy" / "config.json").write_text(json.dumps(fields | change))
        assert message in message_of(tmp_path / "copy")
    assert not (tmp_path / "small").exists()


def test_overwrite(folder: Path, tmp_path: Path) -> None:
    options = {"criterion": "random", "output_dir": tmp_path / "small", "overwrite": True}
    results: list[PruningResult] = [prune_experts(folder, None, keep=keep, **options) for keep in (4, 2)]
    assert math.prod(load(tmp_path / "small").config.num_experts_per_layer("encoder").values()) == 4
    assert results[1].report.num_parameters_after < results[0].report.num_parameters_after
