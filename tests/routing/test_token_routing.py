"""Which experts tokens went to, against routers computed by hand from what reaches each layer."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import M2M100Config, M2M100ForConditionalGeneration

from hf_moe_ted import ZCodeM3ForConditionalGeneration, ZCodeM3Tokenizer
from hf_moe_ted.models.layer_names import moe_layers
from hf_moe_ted.routing.token_routing import LayerTokenRouting, TokenRouting, has_experts, token_routing, token_texts

MakeModel = Callable[..., ZCodeM3ForConditionalGeneration]
SOURCE, TRANSLATION = "close all tabs", "alle Tabs schließen"
NLLB_MOE = Path(__file__).parents[1] / "fixtures" / "nllb_moe" / "tiny_a"


# --- the reference


@torch.no_grad()
def inputs_by_hand(model: Any, source_ids: list[int], decoder_ids: list[int]) -> dict[str, Tensor]:
    """float[T, D], what reaches each MoE layer."""
    inputs: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: inputs.update({name: args[0][0]})
        )
        for name in moe_layers(model.config)
    ]
    model(input_ids=torch.tensor([source_ids]), decoder_input_ids=torch.tensor([decoder_ids]))
    for hook in hooks:
        hook.remove()
    return inputs


def route_by_hand(router: Any, config: Any, tokens: Tensor) -> list[list[tuple[int, int, float]]]:
    """Of each token and choice: the chosen expert, the one that computed it or the number of experts, the weight."""
    rows = []
    for token in tokens.double():
        logits = router.weight.double() @ token
        if router.bias is not None:
            logits = logits + router.bias.double()
        probs = (logits - logits.logsumexp(0)).exp().tolist()
        allowed = [row for row in range(len(probs)) if expert_of(router, row) < router.num_experts]
        best = sorted(allowed, key=lambda row: -probs[row])[: config.num_experts_per_tok]
        rows.append([(expert_of(router, row), probs[row]) for row in best])
    return [normalized(config, row) for row in dropped_by_position(router, config, rows)]


def expert_of(router: Any, row: int) -> int:
    return row if router.expert_map is None else router.expert_map[row]


def dropped_by_position(router: Any, config: Any, rows: Any) -> list[list[tuple[int, int, float, bool]]]:
    """All first choices queue before all second choices, in the order of the text."""
    capacity = float("inf")
    if config.eval_capacity_factor is not None:
        share = len(rows) / router.num_experts * config.eval_capacity_factor * config.num_experts_per_tok
        capacity = max(-int(-share // 1), config.min_capacity)
    taken: Counter[int] = Counter()
    kept: Any = [[None] * config.num_experts_per_tok for _ in rows]
    for choice in range(config.num_experts_per_tok):
        for token, row in enumerate(rows):
            expert, prob = row[choice]
            is_kept = taken[expert] < capacity
            taken[expert] += 1
            kept[token][choice] = (expert, expert if is_kept else router.num_experts, prob, is_kept)
    return kept


def normalized(config: Any, row: list[tuple[int, int, float, bool]]) -> list[tuple[int, int, float]]:
    weights = [prob if is_kept else 0.0 for _, _, prob, is_kept in row]
    if config.normalize_router_weights == "before_dropping":
        total = sum(prob for _, _, prob, _ in row)
        weights = [weight / total for weight in weights]
    elif config.normalize_router_weights == "after_dropping" and sum(weights) > 0:
        weights = [weight / sum(weights) for weight in weights]
    return [(chosen, computed, weight) for (chosen, computed, _, _), weight in zip(row, weights, strict=True)]


def assert_equals_reference(model: Any, found: TokenRouting, source_ids: list[int], decoder_ids: list[int]) -> None:
    inputs = inputs_by_hand(model, source_ids, decoder_ids)
    sides = {"encoder": found.encoder, "decoder": found.decoder}
    layers = {f"model.{side}.layers.{of.layer}.ffn": of for side in sides for of in sides[side].layers}
    assert list(layers) == list(moe_layers(model.config))
    for name, layer in layers.items():
        router = model.get_submodule(name).router
        expected = route_by_hand(router, model.config, inputs[name])
        assert layer.num_experts == router.num_experts
        assert layer.chosen_ids.tolist() == [[chosen for chosen, _, _ in row] for row in expected]
        assert layer.expert_ids.tolist() == [[computed for _, computed, _ in row] for row in expected]
        weights = torch.tensor([[weight for *_, weight in row] for row in expected])
        torch.testing.assert_close(layer.weights, weights, rtol=1e-4, atol=1e-5)


def all_layers(routing: TokenRouting) -> tuple[LayerTokenRouting, ...]:
    return (*routing.encoder.layers, *routing.decoder.layers)


# --- equal numbers

CAPACITY = {"eval_capacity_factor": 0.6, "min_capacity": 0, "token_drop_policy": "position"}
OPTIONS: dict[str, dict[str, Any]] = {
    "top1": {},
    "top2": {"num_experts_per_tok": 2, "normalize_router_weights": "after_dropping"},
    "top3": {"num_experts_per_tok": 3, "normalize_router_weights": "before_dropping", "router_bias": True},
    "pyramid": {"num_experts": [3, 6, 4], "use_residual": True},
    "capacity": CAPACITY,
    "capacity of two": {"num_experts_per_tok": 2, "normalize_router_weights": "after_dropping", **CAPACITY},
    "merged": {"num_experts": 2, "expert_map": [[0, 1, 0, 1], [1, 1, 0, 0], [0, 1, 2, 1]]},  # 2: never chosen
    "encoder only": {"decoder_sparse_step": 0},
    "noise of training": {"router_noise_policy": "jitter", "router_jitter_noise": 0.9, "dropout": 0.5},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_equals_reference(options: dict[str, Any], make_model: MakeModel, tokenizer: ZCodeM3Tokenizer) -> None:
    model = make_model(**options)
    found = token_routing(model.train(), tokenizer, SOURCE, TRANSLATION, "en", "de_DE")
    assert model.training
    source_ids = tokenizer(SOURCE, src_lang="en")["input_ids"]
    labels = tokenizer(text_target=TRANSLATION, tgt_lang="de")["input_ids"]
    assert_equals_reference(model.eval(), found, source_ids, [2, *labels[:-1]])
    assert (found.encoder.language, found.decoder.language) == ("en", "de")
    assert found.encoder.tokens == ("__en__", *SOURCE, "</s>")
    assert found.decoder.tokens[:2] == ("</s>", "__de__")
    assert "".join(found.decoder.tokens[2:]) == TRANSLATION
    is_full = [layer.expert_ids == layer.num_experts for layer in all_layers(found)]
    assert all(full.any() for full in is_full) == ("eval_capacity_factor" in options)


def test_nllb_moe(nllb_tokenizer: Any) -> None:
    model = ZCodeM3ForConditionalGeneration.from_pretrained(NLLB_MOE)
    model.resize_token_embeddings(len(nllb_tokenizer))
    found = token_routing(model, nllb_tokenizer, "ab cd", "xyz", "en", "arb_Arab")
    assert found.encoder.tokens == ("eng_Latn", "", "a", "b", " ", "c", "d", "</s>")
    decoder_ids = [2, *nllb_tokenizer.convert_tokens_to_ids(["arb_Arab", "▁", "x", "y", "z"])]
    source_ids = nllb_tokenizer.convert_tokens_to_ids(["eng_Latn", "▁", "a", "b", "▁", "c", "d", "</s>"])
    assert_equals_reference(model, found, source_ids, decoder_ids)
    assert found.decoder.tokens[:2] == ("</s>", "arb_Arab")


def test_threads_do_not_see_each_other(make_model: MakeModel, tokenizer: ZCodeM3Tokenizer) -> None:
    model, texts = make_model(), [SOURCE, "yes", "the disk is full", "save"]
    expected = [token_routing(model, tokenizer, text, TRANSLATION, "en", "de") for text in texts]
    found: list[list[TokenRouting]] = [[] for _ in texts]

    def work(index: int) -> None:
        for _ in range(5):
            found[index].append(token_routing(model, tokenizer, texts[index], TRANSLATION, "en", "de"))

    threads = [Thread(target=work, args=(index,)) for index in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for of_text, first in zip(found, expected, strict=True):
        assert len(of_text) == 5
        for routing in of_text:
            for layer, same in zip(all_layers(routing), all_layers(first), strict=True):
                assert torch.equal(layer.expert_ids, same.expert_ids)


@pytest.mark.parametrize(
    "text", ["close all tabs", "Éclair, naïve", "日本語を 𓀀 話す", "مرحبا", "a\ufffdb", "e\u0301 x"]
)
def test_pieces_are_the_text(text: str, tokenizer: ZCodeM3Tokenizer) -> None:
    ids = tokenizer(text, src_lang="fr")["input_ids"]
    pieces = token_texts(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert pieces[0] == "__fr__" and pieces[-1] == "</s>"
    assert "".join(pieces[1:-1]) == tokenizer.decode(ids, skip_special_tokens=True)


# --- wrong input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((SOURCE, TRANSLATION, "xx", "de"), "unknown src_lang 'xx'"),
        ((SOURCE, TRANSLATION, "en", "xx"), "unknown tgt_lang 'xx'"),
        ((" ", TRANSLATION, "en", "de"), r"source \(' '\) is blank"),
        ((SOURCE, "", "en", "de"), r"translation \(''\) is blank"),
        (("long " * 100, TRANSLATION, "en", "de"), "source has 502 tokens, but the model has positions for 96"),
    ],
)
def test_wrong_input(
    arguments: tuple[str, str, str, str], message: str, make_model: MakeModel, tokenizer: ZCodeM3Tokenizer
) -> None:
    with pytest.raises(ValueError, match=message):
        token_routing(make_model(), tokenizer, *arguments)


def test_dense_models(make_model: MakeModel, tokenizer: ZCodeM3Tokenizer) -> None:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    m2m100 = M2M100ForConditionalGeneration(M2M100Config(vocab_size=272, **sizes, **heads))
    for model in (make_model(encoder_sparse_step=0, decoder_sparse_step=0), m2m100):
        assert not has_experts(model)
        with pytest.raises(ValueError, match=f"{type(model).__name__} is dense: it has no experts"):
            token_routing(model, tokenizer, SOURCE, TRANSLATION, "en", "de")
    assert has_experts(make_model(decoder_sparse_step=0))
