"""Collected statistics against a reference that runs sentence by sentence and every expert on every token."""

import functools
import operator
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from hf_moe_ted import ZCodeM3ForConditionalGeneration, ZCodeM3Tokenizer
from hf_moe_ted.evaluation import parallel_text
from hf_moe_ted.routing.expert_statistics import ExpertStatistics, LayerStatistics
from hf_moe_ted.routing.statistics_collection import collect_expert_statistics
from hf_moe_ted.testing import run_distributed_test, tiny_config

Rows = list[dict[str, str]]
MakeModel = Callable[..., ZCodeM3ForConditionalGeneration]
LAYERS = ("model.encoder.layers.1.ffn", "model.encoder.layers.3.ffn", "model.decoder.layers.1.ffn")
NAMES = tuple(LayerStatistics.__annotations__)


# --- the reference


@torch.no_grad()
def reference(model: Any, tokenizer: Any, rows: Rows) -> dict[tuple[str, str], dict[tuple[str, str], Tensor]]:
    """(source, target) language -> (layer, name of the statistic) -> its row; `output_sum` under ("", "")."""
    sums: Any = defaultdict(lambda: defaultdict(int))
    for row in rows:
        pair = (row["src_lang"], row["tgt_lang"])
        batch = tokenizer(
            row["source"], text_target=row["target"], src_lang=pair[0], tgt_lang=pair[1], return_tensors="pt"
        )
        inputs = inputs_of_moe_layers(model, batch)
        outputs = model(**batch, output_routings=True)
        for layer, routing in zip(LAYERS, outputs.encoder_routings + outputs.decoder_routings, strict=True):
            for name, value in reference_layer(model.get_submodule(layer), inputs[layer], routing).items():
                sums[("", "") if name == "output_sum" else pair][layer, name] += value
    return sums


def inputs_of_moe_layers(model: Any, batch: Any) -> dict[str, Tensor]:
    """float[T, D] of each layer."""
    inputs: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(layer).register_forward_pre_hook(
            lambda module, args, layer=layer: inputs.update({layer: args[0][0]})
        )
        for layer in LAYERS
    ]
    model(**batch)
    for hook in hooks:
        hook.remove()
    return inputs


def reference_layer(layer: Any, tokens_TD: Tensor, routing: Any) -> dict[str, Tensor]:
    experts, num_experts = layer.experts, routing.num_experts
    top_k = routing.choices.shape[1]
    scale = 1.0 - layer.output_masking
    zeros = torch.zeros(num_experts, dtype=torch.float64)
    result = {"num_routed": torch.zeros(top_k, num_experts, dtype=torch.int64), "num_dropped": zeros.long()}
    result |= {"gate_mass": zeros.clone(), "confidence": zeros.clone(), "gated_norm": zeros.clone()}
    result["output_sum"] = torch.zeros(num_experts, tokens_TD.shape[1], dtype=torch.float64)
    for t, token in enumerate(tokens_TD):
        probs = routing.logits[t].double().softmax(-1)
        result["gate_mass"] += probs
        result["confidence"][routing.choices[t, 0]] += probs[routing.choices[t, 0]]
        for k in range(top_k):
            expert = int(routing.choices[t, k])
            result["num_routed"][k, expert] += 1
            if routing.expert_ids[t, k] == num_experts:
                result["num_dropped"][expert] += 1
                continue
            up = experts.up_proj[expert].double() @ token.double() + experts.up_proj_bias[expert].double()
            output = experts.down_proj[expert].double() @ up.relu() + experts.down_proj_bias[expert].double()
            result["gated_norm"][expert] += scale * routing.weights[t, k].double() * output.norm()
            result["output_sum"][expert] += output
    return result


def assert_equals_reference(statistics: ExpertStatistics, expected: Any) -> None:
    assert tuple(statistics.layers) == LAYERS
    assert statistics.pairs == tuple(sorted(expected.keys() - {("", "")}))
    for layer, found in statistics.layers.items():
        for name in NAMES:
            value = getattr(found, name)
            if name == "output_sum":
                rows = expected["", ""][layer, name]
            else:
                rows = torch.stack([expected[pair][layer, name] for pair in statistics.pairs])
            assert value.dtype == rows.dtype
            torch.testing.assert_close(value, rows, rtol=1e-5, atol=1e-4 if name == "output_sum" else 1e-5)


# --- equal numbers

OPTIONS: dict[str, dict[str, Any]] = {
    "top1": {},
    "top2": {"num_experts_per_tok": 2, "normalize_router_weights": "after_dropping"},
    "top3": {"num_experts_per_tok": 3, "normalize_router_weights": "before_dropping", "router_bias": True},
    "pyramid-residual": {"num_experts": [3, 6, 4], "use_residual": True, "moe_token_dropout": 0.2},
    "padding-is-routed": {"router_ignore_padding_tokens": False},
    "noise-of-training": {"router_noise_policy": "jitter", "router_jitter_noise": 0.9, "dropout": 0.5},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_equals_reference(
    options: dict[str, Any], implementation: str, make_model: MakeModel, tokenizer: ZCodeM3Tokenizer, rows: Rows
) -> None:
    model = make_model(**options)
    model.set_experts_implementation(implementation)
    expected = reference(model, tokenizer, rows)
    statistics = collect_expert_statistics(model.train(), tokenizer, rows, batch_size=3)
    assert_equals_reference(statistics, expected)
    assert statistics.num_sentences == (4,) * 6


def test_capacity_of_evaluation(make_model: MakeModel, tokenizer: ZCodeM3Tokenizer, rows: Rows) -> None:
    capacity = {"eval_capacity_factor": 0.6, "min_capacity": 0, "token_drop_policy": "position"}
    model = make_model(num_experts_per_tok=2, **capacity)
    statistics = collect_expert_statistics(model, tokenizer, rows, batch_size=1)  # dropping depends on the batch
    assert_equals_reference(statistics, reference(model, tokenizer, rows))
    assert all(layer.num_dropped.sum() > 0 for layer in statistics.layers.values())


@pytest.mark.parametrize("top_k", [1, 2])
def test_experts_run_once_and_outputs_stay(
    top_k: int, make_model: MakeModel, tokenizer: ZCodeM3Tokenizer, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(num_experts_per_tok=top_k)
    calls: list[tuple[int, ...]] = []
    experts = model.model.encoder.layers[1].ffn.experts
    forward = type(experts).forward
    monkeypatch.setattr(experts, "forward", lambda *args: calls.append(args[1].shape) or forward(experts, *args))
    outputs: list[Tensor] = []
    hook = model.register_forward_hook(lambda module, args, output: outputs.append(output.logits))
    batch = tokenizer(
        rows[0]["source"], text_target=rows[0]["target"], src_lang="en", tgt_lang="de", return_tensors="pt"
    )
    with torch.no_grad():
        model(**batch)
    collect_expert_statistics(model, tokenizer, rows[:1])
    hook.remove()
    num_tokens = batch["input_ids"].numel()
    assert calls == [(num_tokens, top_k), (num_tokens * top_k, 1)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0.0, atol=1e-5)


def test_order_and_buckets_do_not_matter(
    make_model: MakeModel, tokenizer: ZCodeM3Tokenizer, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    expected = collect_expert_statistics(model, tokenizer, rows)
    monkeypatch.setattr(parallel_text, "MAX_WAITING_BUCKETS", 0.2)
    found = collect_expert_statistics(model, tokenizer, iter(reversed(rows)), batch_size=2)
    assert found.pairs == expected.pairs
    for layer in LAYERS:
        assert torch.equal(found.layers[layer].num_routed, expected.layers[layer].num_routed)
        torch.testing.assert_close(
            found.layers[layer].gated_norm, expected.layers[layer].gated_norm, rtol=1e-5, atol=1e-5
        )


def test_buckets_are_of_one_pair_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_text, "MAX_WAITING_BUCKETS", 2)
    pairs = "aaabbcdeaaaab"  # three of a are a bucket; with the fourth, six of different pairs wait
    sentences = [((pair, "x"), parallel_text.Sentence(str(i), "")) for i, pair in enumerate(pairs)]
    found = [(pair[0], [int(s.source) for s in bucket]) for pair, bucket in parallel_text.buckets(sentences, 3)]
    rest = [("c", [5]), ("d", [6]), ("e", [7]), ("a", [11]), ("b", [12])]
    assert found == [("a", [0, 1, 2]), ("b", [3, 4]), ("a", [8, 9, 10]), *rest]


def test_translation_rows(make_model: MakeModel, tokenizer: ZCodeM3Tokenizer, rows: Rows) -> None:
    model = make_model()
    english_german = [row for row in rows if (row["src_lang"], row["tgt_lang"]) == ("en", "de")]
    translations = [{"translation": {"en": row["source"], "de": row["target"]}} for row in english_german]
    two = [row for row in rows if "fr" not in row.values()]
    expected = collect_expert_statistics(model, tokenizer, two)
    found = collect_expert_statistics(model, tokenizer, translations)
    assert found.pairs == expected.pairs == (("de", "en"), ("en", "de"))
    assert all(torch.equal(found.layers[x].num_routed, expected.layers[x].num_routed) for x in LAYERS)


def test_languages_are_chosen(make_model: MakeModel, tokenizer: ZCodeM3Tokenizer, rows: Rows) -> None:
    statistics = collect_expert_statistics(make_model(), tokenizer, rows, languages=["en", "fr"])
    assert statistics.pairs == (("en", "fr"), ("fr", "en"))
    assert statistics.languages("encoder") == {"en": [0], "fr": [1]}
    assert statistics.languages("decoder") == {"en": [1], "fr": [0]}


def test_max_tokens_per_pair(make_model: MakeModel, tokenizer: ZCodeM3Tokenizer, rows: Rows) -> None:
    model, pair = make_model(), {"src_lang": "en", "tgt_lang": "de"}
    lengths = []
    for row in [row for row in rows if row.items() >= pair.items()]:
        encoded = tokenizer(row["source"], text_target=row["target"], **pair)
        lengths.append(len(encoded["input_ids"]) + len(encoded["labels"]))
    first_two = sum(lengths[:2])
    for max_tokens, num_sentences in ((1, 1), (first_two, 2), (first_two + 1, 3), (10**6, 4)):
        statistics = collect_expert_statistics(model, tokenizer, rows, batch_size=1, max_tokens=max_tokens)
        assert statistics.num_sentences[statistics.pairs.index(("en", "de"))] == num_sentences


def test_long_texts_are_truncated(make_model: MakeModel, tokenizer: ZCodeM3Tokenizer, rows: Rows) -> None:
    row = {**rows[0], "source": "long " * 100, "target": "lang " * 100}
    statistics = collect_expert_statistics(make_model(), tokenizer, [row])
    assert [statistics.layers[layer].num_routed.sum().item() for layer in LAYERS] == [96, 96, 96]


# --- the model stays as it is


class Broken(RuntimeError):
    pass


@pytest.mark.parametrize("fails", [False, True])
def test_modes_hooks_and_languages_are_restored(
    fails: bool, make_model: MakeModel, tokenizer: ZCodeM3Tokenizer, rows: Rows
) -> None:
    model = make_model().train()
    model.model.decoder.eval()
    before = {name: module.training for name, module in model.named_modules()}
    tokenizer.src_lang, tokenizer.tgt_lang = "fr", "en"

    def data() -> Any:
        yield from rows
        if fails:
            raise Broken

    try:
        collect_expert_statistics(model, tokenizer, data())
    except Broken:
        assert fails
    assert {name: module.training for name, module in model.named_modules()} == before
    assert (tokenizer.src_lang, tokenizer.tgt_lang) == ("fr", "en")
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []


# --- several processes


def _collect_half(rank_rows: list[Rows]) -> ExpertStatistics:
    model, tokenizer = _of_processes()
    gathered: Any = [None, None]
    own = collect_expert_statistics(model, tokenizer, rank_rows[torch.distributed.get_rank()])
    torch.distributed.all_gather_object(gathered, own)
    return functools.reduce(operator.add, gathered)


def _collect_sharded(rows: Rows) -> ExpertStatistics:
    model, tokenizer = _of_processes()
    for layer in [*model.model.encoder.layers, *model.model.decoder.layers]:
        fully_shard(layer)
    return collect_expert_statistics(fully_shard(model), tokenizer, rows)


def _of_processes() -> tuple[Any, ZCodeM3Tokenizer]:
    torch.manual_seed(0)
    config = tiny_config(vocab_size=272, max_position_embeddings=96, num_experts_per_tok=2, init_std=0.2)
    return ZCodeM3ForConditionalGeneration(config), ZCodeM3Tokenizer(languages=["en", "de", "fr"])


@pytest.mark.parametrize("how", [_collect_half, _collect_sharded])
def test_two_processes_equal_one(how: Callable[..., ExpertStatistics], rows: Rows) -> None:
    model, tokenizer = _of_processes()
    expected = collect_expert_statistics(model, tokenizer, rows)
    data = [rows[:5], rows[5:]] if how is _collect_half else rows
    for found in run_distributed_test(how, 2, data):
        assert found.fingerprint == expected.fingerprint
        order = [found.pairs.index(pair) for pair in expected.pairs]
        assert tuple(found.num_sentences[i] for i in order) == expected.num_sentences
        for layer, of_layer in expected.layers.items():
            assert torch.equal(found.layers[layer].of_pairs(order).num_routed, of_layer.num_routed)
            for name in ("gate_mass", "confidence", "gated_norm", "output_sum"):
                value = getattr(found.layers[layer].of_pairs(order), name)
                torch.testing.assert_close(value, getattr(of_layer, name), rtol=1e-5, atol=1e-5)


# --- wrong input


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ([], {}, "dataset has no sentence"),
        ([{"source": "a", "target": "b"}], {}, "row 0 of the dataset must have the strings source, target, src_lang"),
        ([{"translation": {"en": "a", "de": None}}], {}, "row 0 .*'translation' with a string for each language"),
        ([{"translation": {"en": "a", "xx": "b"}}], {}, "unknown language 'xx'"),
        (
            None,
            {"languages": ["en", "sw", "zu"]},
            "unknown languages 'sw', the tokenizer knows: en, de, fr",
        ),
        (None, {"languages": "en"}, r"languages \('en'\) must be a list"),
        (None, {"batch_size": 0}, r"batch_size \(0\)"),
        (None, {"max_tokens": 0}, r"max_tokens \(0\)"),
    ],
)
def test_wrong_input(
    data: Any, options: dict[str, Any], message: str, make_model: MakeModel, tokenizer: ZCodeM3Tokenizer, rows: Rows
) -> None:
    with pytest.raises(ValueError, match=message):
        collect_expert_statistics(make_model(), tokenizer, rows if data is None else data, **options)


def test_dense_model(make_model: MakeModel, tokenizer: ZCodeM3Tokenizer, rows: Rows) -> None:
    with pytest.raises(ValueError, match="ZCodeM3ForConditionalGeneration has no MoE layer"):
        collect_expert_statistics(make_model(encoder_sparse_step=0, decoder_sparse_step=0), tokenizer, rows)


@pytest.mark.parametrize(
    ("weight", "wrong"),
    [("router.weight", torch.nan), ("experts.up_proj", torch.nan), ("experts.down_proj", torch.inf)],
)
def test_numbers_that_are_not_finite(
    weight: str, wrong: float, make_model: MakeModel, tokenizer: ZCodeM3Tokenizer, rows: Rows
) -> None:
    model = make_model()
    with torch.no_grad():
        model.get_parameter(f"{LAYERS[0]}.{weight}")[:] = wrong
    with pytest.raises(ValueError, match=f"{LAYERS[0]} of the model returned NaN or infinity for text from .. to .."):
        collect_expert_statistics(model, tokenizer, rows)
