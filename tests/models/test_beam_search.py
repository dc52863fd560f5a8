"""The beam search for CPUs beside that of transformers: the same tokens, scores and rows, however sentences end."""

import functools
from collections.abc import Iterator
from types import MethodType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import LogitsProcessor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMixin

from hf_moe_ted import ZCodeM3Config, ZCodeM3ForConditionalGeneration, quantize_experts
from hf_moe_ted.models import beam_cache, beam_search, generation
from hf_moe_ted.models.beam_search import best_of_rows, row_logsumexp
from hf_moe_ted.models.generation import FirstTokens
from hf_moe_ted.testing import tiny_config

PAD, VOCAB = 1, 96
# a quarter of the words end a sentence, so that sentences end at different steps
ENDS = {"num_beams": 4, "max_new_tokens": 18, "eos_token_id": list(range(2, 26))}
TO_THE_LIMIT = {"num_beams": 4, "max_new_tokens": 40, "min_new_tokens": 40}


class Downgrade(LogitsProcessor):
    """Of a user: knows sentences by their rows."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        assert len(scores) == len(input_ids) == 20
        token_R1 = (torch.arange(20) // 4 + 30).unsqueeze(1)
        return scores.scatter_add(1, token_R1, torch.full((20, 1), -1.0))


COMMON_OPTIONS: dict[str, dict[str, Any]] = {  # of the searches on CPUs and those of recorded steps
    "plain": {},
    "to the limit": TO_THE_LIMIT,
    "length penalty": {"length_penalty": 2.0},
    "early stopping": {"early_stopping": True},
    "never": {"early_stopping": "never"},
    "never, short ones preferred": {"early_stopping": "never", "length_penalty": -1.0},
    "sequences": {"num_return_sequences": 3},
    "two beams": {"num_beams": 2},
    "forced bos": {"forced_bos_token_id": 7},
    "forced eos": {"forced_eos_token_id": 2},
    "first tokens": {"logits_processor": [FirstTokens([30, 31, -1, 33, 34])]},
    "first tokens, another for the rest": {
        "forced_bos_token_id": 40,
        "logits_processor": [FirstTokens([-1, 31, -1, 33, 34])],
    },
    "first tokens twice": {"logits_processor": [FirstTokens([30, -1, 32, -1, 34]), FirstTokens([-1, 31, 36, -1, -1])]},
    "least new tokens": {"min_new_tokens": 6},
}
OPTIONS = COMMON_OPTIONS | {
    "six beams": {"num_beams": 6},
    "one end": {"eos_token_id": 7},
    "processor of rows": {"logits_processor": [Downgrade()]},
    "n-grams": {"no_repeat_ngram_size": 2},
    "repetition": {"repetition_penalty": 1.3},
    "prompt": {"decoder_input_ids": torch.full((5, 3), 2)},
    "dict": {"return_dict_in_generate": True},
    "scores": {"num_return_sequences": 2, "output_scores": True, "return_dict_in_generate": True},
}


def make_model(seed: int = 0, **overrides: Any) -> ZCodeM3ForConditionalGeneration:
    torch.manual_seed(seed)
    varied = {"init_std": 0.7, "tie_word_embeddings": False, "scale_embedding": False, **overrides}
    return ZCodeM3ForConditionalGeneration(tiny_config(**varied)).eval()


@pytest.fixture
def source() -> dict[str, Tensor]:
    ids = torch.randint(3, VOCAB, (5, 9), generator=torch.Generator().manual_seed(3))
    ids[1, 5:] = ids[3, 7:] = PAD
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One for each call of the search."""
    numbers: list[int] = []
    search = generation.beam_search

    def counted(*args: Any, **kwargs: Any) -> Any:
        numbers.append(1)
        return search(*args, **kwargs)

    monkeypatch.setattr(generation, "beam_search", counted)
    return numbers


def of_transformers(model: Any, **options: Any) -> Any:
    return model.generate(**options, custom_generate=GenerationMixin._beam_search, cuda_graphs=False)


@pytest.mark.parametrize(
    ("name", "attention"), [*((name, "sdpa") for name in OPTIONS), ("plain", "eager"), ("prompt", "eager")]
)
def test_tokens_and_scores_are_those_of_transformers(
    name: str, attention: str, source: dict[str, Tensor], calls: list[int]
) -> None:
    model = make_model()
    model.set_attn_implementation(attention)
    options = {**source, **ENDS, **OPTIONS[name]}
    output = model.generate(**options)
    assert calls
    expected = of_transformers(model, **options)
    if not isinstance(output, Tensor):
        assert torch.equal(output.beam_indices, expected.beam_indices)
        if options.get("output_scores"):
            torch.testing.assert_close(output.sequences_scores, expected.sequences_scores, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(output.scores, expected.scores, atol=1e-4, rtol=1e-4)
        output, expected = output.sequences, expected.sequences
    assert torch.equal(output, expected)


def test_sentences_end_at_different_steps(source: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the comparison above is worth: batches shrink, and not to nothing at once."""
    sizes: list[int] = []
    decoded = beam_search._decoded

    def counted(search: Any, batch: Any, tokens: Tensor, mask: Tensor | None) -> Tensor:
        sizes.append(tokens.numel())
        return decoded(search, batch, tokens, mask)

    monkeypatch.setattr(beam_search, "_decoded", counted)
    make_model().generate(**source, **ENDS)
    assert sizes[0] == 5 and sizes[1] == 20
    assert len(set(sizes[1:])) >= 3 and sizes[1:] == sorted(sizes[1:], reverse=True)


def test_keys_without_a_beam_are_left_out(source: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    expected = of_transformers(model, **source, **TO_THE_LIMIT)
    num_keys = []
    compact = beam_cache.AppendedLayer.compact

    def counted(layer: Any, keys_BK: Tensor) -> None:
        num_keys.append((layer.keys.shape[2], keys_BK.shape[1]))
        compact(layer, keys_BK)

    monkeypatch.setattr(beam_cache.AppendedLayer, "compact", counted)
    assert torch.equal(model.generate(**source, **TO_THE_LIMIT), expected)
    assert num_keys and all(after <= 0.75 * before for before, after in num_keys)


@pytest.mark.parametrize(
    ("overrides", "options", "reason"),
    [
        ({}, {"do_sample": True}, "sampling"),
        ({}, {"use_cache": False}, "use_cache=False"),
        ({}, {"cache_implementation": "static"}, "cache_implementation"),
        ({}, {"output_logits": True, "return_dict_in_generate": True}, "output_logits"),
        ({}, {"output_router_logits": True}, "output_router_logits"),
        ({"position_embedding_type": "tupe"}, {}, "untied positions"),
        ({"eval_capacity_factor": 1.0, "token_drop_policy": "position"}, {}, "a capacity of experts"),
    ],
)
def test_what_it_does_not_have_goes_to_transformers(
    overrides: dict[str, Any], options: dict[str, Any], reason: str,
    source: dict[str, Tensor], calls: list[int], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model = make_model(**overrides)
    lines: list[str] = []
    monkeypatch.setattr(generation.logger, "debug", lambda message, *values: lines.append(message % values))
    torch.manual_seed(1)
    output = model.generate(**source, **ENDS, **options)
    assert not calls
    assert lines == [f"beam search of transformers, because of {reason}"]
    torch.manual_seed(1)
    expected = of_transformers(model, **source, **ENDS, **options)
    of_both = [o if isinstance(o, Tensor) else o.sequences for o in (output, expected)]
    assert torch.equal(*of_both)


def test_hooks_training_and_caches_of_the_user(source: dict[str, Tensor], calls: list[int]) -> None:
    model = make_model()
    for module in (model, model.model.decoder.layers[0].self_attn, model.lm_head):
        handle = module.register_forward_hook(lambda *args: None)
        model.generate(**source, **ENDS)
        handle.remove()
    cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
    model.generate(**source, **ENDS, past_key_values=cache)
    assert cache.get_seq_length() > 0
    model.train().generate(**source, **ENDS)
    assert not calls


class Shifted(ZCodeM3ForConditionalGeneration):
    """Of a user: other logits."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + 5.0 * (torch.arange(VOCAB) % 3 == 0)
        return output


class Restarted(ZCodeM3ForConditionalGeneration):
    """Of a user: other inputs."""

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        return {**inputs, "decoder_input_ids": torch.full_like(inputs["decoder_input_ids"], 5)}


class Wrapped(ZCodeM3ForConditionalGeneration):
    """Of a user, who keeps names and docstrings."""

    @functools.wraps(ZCodeM3ForConditionalGeneration.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.roll(1, dims=-1)
        return output


@pytest.mark.parametrize("model_class", [Shifted, Restarted, Wrapped])
def test_methods_of_a_subclass_are_called(model_class: Any, source: dict[str, Tensor], calls: list[int]) -> None:
    model = make_model()
    plain = model.generate(**source, **ENDS)
    assert len(calls) == 1
    overridden = model_class(model.config).eval()
    overridden.load_state_dict(model.state_dict())
    output = overridden.generate(**source, **ENDS)
    assert len(calls) == 1
    assert torch.equal(output, of_transformers(overridden, **source, **ENDS))
    assert output.shape != plain.shape or not torch.equal(output, plain)


def test_methods_replaced_in_the_object_are_called(source: dict[str, Tensor], calls: list[int]) -> None:
    """As prefix tuning of PEFT, compilation and Accelerate do."""
    model = make_model()
    for module, name in ((model, "forward"), (model, "prepare_inputs_for_generation"), (model.model, "forward")):
        method, count = getattr(module, name), []

        def counted(*args: Any, method: Any = method, count: list[int] = count, **kwargs: Any) -> Any:
            count.append(1)
            return method(*args, **kwargs)

        setattr(module, name, counted)
        model.generate(**source, **ENDS)
        assert count and not calls
        setattr(module, name, method)  # as PEFT puts it back
    model.generate(**source, **ENDS)
    assert calls


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(reset_partial_state=True)  # as a Trainer does
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


def test_mixed_precision_of_a_trainer_is_not_in_the_way(
    source: dict[str, Tensor], calls: list[int], accelerator: Accelerator
) -> None:
    """Translations are those of the weights' dtype; something else around `forward` is called."""
    model = make_model()
    expected = model.generate(**source, **ENDS)
    accelerator.prepare_model(model)
    assert "forward" in vars(model)
    assert torch.equal(model.generate(**source, **ENDS), expected)
    model._is_accelerate_prepared = False  # as of a copy whose layers are compiled: it is prepared again
    accelerator.prepare_model(model)
    assert torch.equal(model.generate(**source, **ENDS), expected)
    assert len(calls) == 3
    model.lm_head.double()  # of several dtypes
    with pytest.raises(RuntimeError, match="dtype"):  # from transformers' search, which autocast does not help here
        model.generate(**source, **ENDS)
    assert len(calls) == 3
    model.lm_head.float()
    for prepare_again in (False, True):
        replace_forward(model)
        if prepare_again:
            accelerator.prepare_model(model)
        model.generate(**source, **ENDS)
        assert len(calls) == 3


def test_frozen_bfloat16_in_a_trained_model_is_left_to_autocast(
    source: dict[str, Tensor], calls: list[int], accelerator: Accelerator
) -> None:
    model = make_model().to(torch.bfloat16)
    model.model.decoder.layers.float()
    accelerator.prepare_model(model)
    assert len(model.generate(**source, **ENDS)) == 5
    assert not calls


def test_a_part_in_training_mode_keeps_its_dropout(source: dict[str, Tensor], calls: list[int]) -> None:
    model = make_model(dropout=0.5)
    model.model.decoder.layers.train()
    model.generate(**source, **ENDS)
    assert not model.training and not calls


@pytest.mark.parametrize("keep", [True, False])
def test_unwrapped_models_translate(source: dict[str, Tensor], accelerator: Accelerator, keep: bool) -> None:
    model = make_model()
    expected = model.generate(**source, **ENDS)
    model = accelerator.unwrap_model(accelerator.prepare_model(model), keep_fp32_wrapper=keep)
    assert torch.equal(model.generate(**source, **ENDS), expected)


def replace_forward(model: Any) -> None:
    vars(model).pop("forward", None)
    method = model.forward.__func__

    @functools.wraps(method)
    def replaced(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(self, *args, **kwargs)

    model.forward = MethodType(replaced, model)


def test_a_processor_may_have_any_attributes(source: dict[str, Tensor], calls: list[int]) -> None:
    processor = Downgrade()
    processor.is_active = True  # type: ignore[attr-defined]  # a name that processors of the package have, too
    options = {**source, **ENDS, "logits_processor": [processor]}
    model = make_model()
    assert torch.equal(model.generate(**options), of_transformers(model, **options))
    assert calls


def test_keys_of_a_source_have_no_room_for_more(source: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    caches = []
    continue_from = beam_cache.BeamCache.continue_from

    def kept(cache: Any, parents_BN: Tensor) -> None:
        caches.append(cache)
        continue_from(cache, parents_BN)

    monkeypatch.setattr(beam_cache.BeamCache, "continue_from", kept)
    make_model().generate(**source, **ENDS)
    layers = caches[0].cross_attention_cache.layers
    assert {buffer.shape[2] for layer in layers for buffer in layer._buffers} == {source["input_ids"].shape[1]}


def test_quantized_model(source: dict[str, Tensor], calls: list[int]) -> None:
    quantized = quantize_experts(make_model(tie_word_embeddings=True), what="all")
    assert torch.equal(quantized.generate(**source, **ENDS), of_transformers(quantized, **source, **ENDS))
    assert len(calls) == 1


def test_long_searches_of_a_larger_vocabulary(calls: list[int]) -> None:
    """More words than there are in the blocks that are looked at."""
    torch.manual_seed(0)
    config = ZCodeM3Config(
        vocab_size=5000, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
        encoder_attention_heads=4, decoder_attention_heads=4, num_experts=4, num_experts_per_tok=1, init_std=0.5,
    )  # fmt: skip
    model = ZCodeM3ForConditionalGeneration(config).eval()
    options = {"input_ids": torch.randint(3, 5000, (3, 7)), "num_beams": 5, "max_new_tokens": 20}
    assert torch.equal(model.generate(**options), of_transformers(model, **options))
    assert calls


@pytest.mark.parametrize("num_words", [40, 2048, 5001])
def test_best_of_rows(num_words: int) -> None:
    values = torch.randn(6, num_words, generator=torch.Generator().manual_seed(0))
    values[1, -1] = values[2, 0] = 9.0
    values[3] = -torch.inf
    values[3, 17] = 0.0
    best, words = best_of_rows(values, 8)
    assert torch.equal(best, values.topk(8).values)
    assert torch.equal(values.gather(1, words), best)
    assert all(len(row.unique()) == 8 for row in words)
    torch.testing.assert_close(row_logsumexp(values), values.logsumexp(dim=-1))


def test_numbers_that_are_not_numbers_are_refused(source: dict[str, Tensor], calls: list[int]) -> None:
    model = make_model()
    nn.init.constant_(model.lm_head.weight[5:6], torch.nan)
    with pytest.raises(ValueError, match="logits became NaN"):
        model.generate(**source, **ENDS)
    assert calls
