"""`generate`: what M2M100 does with an option our dense model does, too; the sparse ones equal slow references."""

import copy
import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CompileConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    M2M100Config,
    M2M100ForConditionalGeneration,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    TextIteratorStreamer,
    TextStreamer,
    WatermarkingConfig,
)
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache, StaticLayer
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import BaseModelOutput

from hf_moe_ted import ZCodeM3Config, ZCodeM3ForConditionalGeneration, ZCodeM3Tokenizer
from hf_moe_ted.testing import tiny_config

PAD, START, VOCAB, MAX_POSITIONS = 1, 2, 96, 64
TEN = {"max_new_tokens": 10, "min_new_tokens": 10}
# an untied head and large weights in the layers: the outputs are not one token repeated, and rounding grows
VARIED: dict[str, Any] = {"init_std": 1.5, "tie_word_embeddings": False, "scale_embedding": False}
CLOSE: dict[str, float] = {"atol": 1e-3, "rtol": 1e-3}

Model = ZCodeM3ForConditionalGeneration
Source = dict[str, Tensor]


def _without_special_tokens(model: Model) -> Model:
    """One that gives no special token unless forced to: outputs are as long as was asked for, without padding."""
    with torch.no_grad():
        model.lm_head.weight[:3] = 0.0
    return model


def _model(seed: int = 0, **overrides: Any) -> Model:
    torch.manual_seed(seed)
    return _without_special_tokens(ZCodeM3ForConditionalGeneration(tiny_config(**VARIED, **overrides)).eval())


def _dense(seed: int = 0, **overrides: Any) -> Model:
    return _model(seed, encoder_sparse_step=0, decoder_sparse_step=0, **overrides)


@pytest.fixture
def config(config: ZCodeM3Config) -> ZCodeM3Config:
    for name, value in VARIED.items():
        setattr(config, name, value)
    return config


@pytest.fixture
def model(model: Model) -> Model:
    return _without_special_tokens(model)


@pytest.fixture
def source(batch: Source) -> Source:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@pytest.fixture
def greedy(model: Model, source: Source) -> Tensor:
    tokens = model.generate(**source, **TEN)
    assert tokens.shape == (4, 11)
    assert (tokens[:, 0] == START).all()
    assert (tokens[:, 1:] > 2).all()
    # a model that repeats itself, or translates everything alike, would make many a test pass always
    assert all(len(row.unique()) >= 3 for row in tokens)
    assert len({tuple(row.tolist()) for row in tokens}) == 4
    return tokens


def _alone(source: Source, row: int) -> Source:
    """One sentence without its padding."""
    return {"input_ids": source["input_ids"][row : row + 1, source["attention_mask"][row].bool()]}


def _padded(source: Source, side: str) -> Source:
    if side == "right":
        return source
    shift = (source["attention_mask"] == 0).sum(dim=1)
    return {
        name: torch.stack([row.roll(int(n)) for row, n in zip(value, shift, strict=True)])
        for name, value in source.items()
    }


@torch.no_grad()
def _next_log_probs(model: Model, source: Source, prefix: Tensor) -> Tensor:
    """float[num_prefixes, VOCAB] after each prefix, for one source, without any cache."""
    repeated = {name: value.expand(len(prefix), -1) for name, value in source.items()}
    return model(**repeated, decoder_input_ids=prefix, use_cache=False).logits[:, -1].log_softmax(dim=-1)


def _until(tokens: Tensor, eos: int) -> Tensor:
    """What generation of `tokens` becomes if it stops at `eos`."""
    rows = []
    for row in tokens:
        ends = (row[1:] == eos).nonzero().flatten()
        rows.append(row[: int(ends[0]) + 2] if len(ends) else row)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


def _uneven_end(model: Model, **options: Any) -> int:
    """A token which, as the end, makes some sentences shorter than others."""
    for token in model.generate(**options, **TEN)[:, 3:].unique().tolist():
        if PAD in model.generate(**options, max_new_tokens=10, eos_token_id=token):
            return token
    raise AssertionError("no token does")


def _count_calls(model: Model) -> list[int]:
    """Lengths of the decoder inputs of each forward pass from now on."""
    lengths: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["decoder_input_ids"].shape[1]), with_kwargs=True
    )
    return lengths


# --- M2M100


def _m2m100_of(model: Model) -> M2M100ForConditionalGeneration:
    """M2M100 with the weights of a dense model."""
    same = ["vocab_size", "max_position_embeddings", "d_model", "activation_function", "scale_embedding"]
    same += ["bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id", "tie_word_embeddings"]
    for side in ("encoder", "decoder"):
        same += [f"{side}_layers", f"{side}_attention_heads", f"{side}_ffn_dim"]
    none = ("dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop", "decoder_layerdrop")
    config = M2M100Config(**dict.fromkeys(none, 0.0), **{name: getattr(model.config, name) for name in same})
    reference = M2M100ForConditionalGeneration(config)
    reference.load_state_dict({name.replace(".ffn.", "."): value for name, value in model.state_dict().items()})
    return reference.eval()


@pytest.fixture(scope="module")
def pair() -> tuple[Model, M2M100ForConditionalGeneration]:
    model = _dense()
    return model, _m2m100_of(model)


class _Descending(LogitsProcessor):
    """Each token must be smaller than the one before, as long as there is one."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        last = input_ids[:, -1:].where(input_ids[:, -1:] > 10, VOCAB)
        return scores.masked_fill(torch.arange(VOCAB) >= last, -torch.inf)


class _AfterFive(StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 6)


SAMPLE = {"do_sample": True, "top_k": 0, "temperature": 4.0}
FREE = {"min_new_tokens": 0}
# of each option: what changes the tokens of greedy search; where it depends on them, a function of them
CHANGING: dict[str, dict[str, Any] | Callable[[Tensor], dict[str, Any]]] = {
    "sampling": SAMPLE,
    "top-k": {**SAMPLE, "top_k": 5},
    "top-p": {**SAMPLE, "top_p": 0.7},
    "min-p": {**SAMPLE, "min_p": 0.05},
    "typical-p": {**SAMPLE, "typical_p": 0.7},
    "top-h": {**SAMPLE, "top_h": 0.7},
    "epsilon-cutoff": {**SAMPLE, "epsilon_cutoff": 0.01},
    "eta-cutoff": {**SAMPLE, "eta_cutoff": 0.01},
    "several-samples": {**SAMPLE, "num_return_sequences": 3},
    "beams": {"num_beams": 4},
    "beam-sample": {**SAMPLE, "num_beams": 3},
    "several-beams": {"num_beams": 4, "num_return_sequences": 3},
    "length-penalty": lambda g: {"num_beams": 4, "length_penalty": -2.0, "eos_token_id": g[:, 3].tolist(), **FREE},
    "early-stopping": lambda g: {"num_beams": 4, "early_stopping": True, "eos_token_id": g[:, 3].tolist(), **FREE},
    "never-early": lambda g: {"num_beams": 4, "early_stopping": "never", "eos_token_id": g[:, 3].tolist(), **FREE},
    "renormalized-beams": {"num_beams": 4, "renormalize_logits": True, "repetition_penalty": 2.0},
    "eos": lambda g: {"eos_token_id": int(g[0, 4]), **FREE},
    "min-new-tokens": lambda g: {"eos_token_id": int(g[0, 2]), "min_new_tokens": 6},
    "min-length": lambda g: {"eos_token_id": int(g[0, 2]), "min_length": 6, "min_new_tokens": None},
    "max-length": {"max_length": 7, "max_new_tokens": None, "min_new_tokens": None},
    "forced-bos": {"forced_bos_token_id": 9},
    "forced-padding": {"forced_bos_token_id": PAD},
    "forced-padding-without-cache": {"forced_bos_token_id": PAD, "use_cache": False},
    "forced-eos": {"forced_eos_token_id": 10},
    "suppress": lambda g: {"suppress_tokens": g[:, 2].tolist()},
    "begin-suppress": lambda g: {"begin_suppress_tokens": g[:, 1].tolist()},
    "bad-words": lambda g: {"bad_words_ids": [g[0, 1:3].tolist(), [int(g[1, 4])]]},
    "sequence-bias": lambda g: {"sequence_bias": [[g[0, 1:3].tolist(), -50.0], [[8], 5.0]]},
    "no-repeated-ngrams": {"no_repeat_ngram_size": 1},
    "no-ngrams-of-the-source": {"encoder_no_repeat_ngram_size": 1, "num_beams": 3},
    "repetition-penalty": {"repetition_penalty": 5.0},
    "source-repetition-penalty": {"encoder_repetition_penalty": 50.0},
    "decaying-length": lambda g: {
        "exponential_decay_length_penalty": (2, 3.0),
        "eos_token_id": int(g[0, 9]),
        **FREE,
    },
    "watermark": {"watermarking_config": WatermarkingConfig(bias=20.0)},
    "synthid": {**SAMPLE, "watermarking_config": SynthIDTextWatermarkingConfig(keys=[1, 2, 3], ngram_len=3)},
    "prefix-allowed-tokens": {"prefix_allowed_tokens_fn": lambda row, ids: [10 + row, 20 + len(ids), 30]},
    "logits-processor": {"logits_processor": LogitsProcessorList([_Descending()])},
    "stopping-criteria": {"stopping_criteria": StoppingCriteriaList([_AfterFive()]), **FREE},
    "decoder-prompt": {"decoder_input_ids": torch.tensor([[START, 7, 8]] * 4)},
    "decoder-prompt-without-start": {"decoder_input_ids": torch.tensor([[7, 8]] * 4)},
    "generation-config": {"generation_config": GenerationConfig(num_beams=3, length_penalty=0.5)},
    "no-attention-mask": {"attention_mask": None},
}
NEUTRAL: dict[str, dict[str, Any]] = {
    "greedy": {},
    "one-beam": {"num_beams": 1, "do_sample": False},
    "no-cache": {"use_cache": False},
    "dynamic-cache": {"cache_implementation": "dynamic"},
    "static-cache": {"cache_implementation": "static"},
    "large-static-cache": {"cache_implementation": "static", "max_cache_len": 32},
    "max-time": {"max_time": 1000.0},
    "synced-gpus": {"synced_gpus": False},
    "remove-invalid-values": {"remove_invalid_values": True},
}


def _on_both(pair: tuple, source: Source, **kwargs: Any) -> list[Tensor]:
    tokens = []
    for model in pair:
        torch.manual_seed(3)
        tokens.append(model.generate(**{**source, **TEN, **copy.deepcopy(kwargs)}))
    return tokens


@pytest.mark.parametrize("name", [*CHANGING, *NEUTRAL])
def test_dense_model_generates_the_tokens_of_m2m100(pair: tuple, source: Source, name: str) -> None:
    greedy = pair[1].generate(**source, **TEN)
    option = CHANGING.get(name, NEUTRAL.get(name))
    tokens, expected = _on_both(pair, source, **(option(greedy) if callable(option) else option or {}))
    assert torch.equal(tokens, expected)
    assert torch.equal(tokens, greedy) == (name in NEUTRAL), "an option without effect would prove nothing"


@pytest.mark.parametrize(
    "option",
    [
        {},
        {"num_assistant_tokens": 2, "num_assistant_tokens_schedule": "constant"},
        {"assistant_confidence_threshold": 0.9},
        {"assistant_ensemble_weight": 0.5},
        SAMPLE,
    ],
    ids=["default", "two-at-once", "confidence", "ensemble", "sampling"],
)
def test_dense_model_with_an_assistant_generates_the_tokens_of_m2m100(
    pair: tuple, source: Source, option: dict
) -> None:
    draft = _dense(decoder_layers=1)
    tokens = []
    for model, assistant in zip(pair, (draft, _m2m100_of(draft)), strict=True):
        torch.manual_seed(3)
        tokens.append(model.generate(**_alone(source, 0), assistant_model=assistant, **TEN, **option))
    assert torch.equal(*tokens)
    is_greedy = torch.equal(tokens[0], pair[0].generate(**_alone(source, 0), **TEN))
    assert is_greedy == (option is not SAMPLE and "assistant_ensemble_weight" not in option)


@pytest.mark.parametrize(
    "option",
    [
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"num_beams": 4, "force_words_ids": [[7]]},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "high"},
        {"cache_implementation": "quantized"},
        {"use_mtp": True},
        {"token_healing": True},
        {"num_return_sequences": 2},
        {"num_beams": 2, "num_return_sequences": 3},
        {"no_such_option": 1},
    ],
    ids=lambda option: "-".join(option),
)
def test_what_m2m100_refuses_is_refused_in_the_same_words(pair: tuple, source: Source, option: dict) -> None:
    """Group, constrained and contrastive search and DoLa left the library; without the Hub they are not there."""
    errors = []
    for model in pair:
        with pytest.raises(ValueError) as raised:
            model.generate(**source, **TEN, **option)
        errors.append(str(raised.value))
    assert errors[0] == errors[1]


@pytest.mark.parametrize(
    "option",
    [
        {"guidance_scale": 1.5},
        {"decoder_inputs_embeds": torch.ones(4, 2, 32)},
        {"prefill_chunk_size": 2, "decoder_input_ids": torch.full((4, 6), START)},
        {"past_key_values": DynamicCache()},
    ],
    ids=lambda option: "-".join(option),
)
def test_what_fails_with_m2m100_fails_with_ours(pair: tuple, source: Source, option: dict) -> None:
    """So that the day transformers supports one of these for encoder-decoders, we notice."""
    for model in pair:
        with pytest.raises((ValueError, RuntimeError)):
            model.generate(**source, **TEN, **copy.deepcopy(option))


def test_scores_of_the_dense_model_are_those_of_m2m100(pair: tuple, source: Source) -> None:
    for num_beams in (1, 3):
        ours, theirs = (
            model.generate(
                **source,
                **TEN,
                num_beams=num_beams,
                return_dict_in_generate=True,
                output_scores=True,
                output_logits=True,
                output_hidden_states=True,
            )
            for model in pair
        )
        assert type(ours) is type(theirs)
        assert list(ours) == list(theirs)
        for name in ("scores", "logits"):
            torch.testing.assert_close(ours[name], theirs[name], **CLOSE)
        torch.testing.assert_close(ours.encoder_hidden_states, theirs.encoder_hidden_states, **CLOSE)
        torch.testing.assert_close(ours.decoder_hidden_states, theirs.decoder_hidden_states, **CLOSE)


# --- slow references


def test_greedy_search_is_the_argmax_of_each_step(model: Model, source: Source, greedy: Tensor) -> None:
    for row in range(4):
        tokens = torch.tensor([[START]])
        for _ in range(10):
            following = _next_log_probs(model, _alone(source, row), tokens).argmax(dim=-1, keepdim=True)
            tokens = torch.cat([tokens, following], dim=1)
        assert torch.equal(tokens[0], greedy[row])


def test_sampling_draws_from_the_distribution_of_each_step(model: Model, source: Source, greedy: Tensor) -> None:
    def sample(seed: int, **kwargs: Any) -> Tensor:
        torch.manual_seed(seed)
        return model.generate(**source, **TEN, do_sample=True, **kwargs)

    temperature, top_k = 3.0, 8
    torch.manual_seed(0)
    tokens = torch.full((4, 1), START)
    for _ in range(10):
        log_probs = torch.cat([_next_log_probs(model, _alone(source, row), tokens[row : row + 1]) for row in range(4)])
        scores = log_probs / temperature
        scores = scores.where(scores >= scores.topk(top_k).values[:, -1:], -torch.inf)
        tokens = torch.cat([tokens, torch.multinomial(scores.softmax(dim=-1), 1)], dim=1)
    assert torch.equal(sample(0, temperature=temperature, top_k=top_k), tokens)
    assert not torch.equal(sample(1, temperature=temperature, top_k=top_k), tokens)
    assert not torch.equal(tokens, greedy)
    assert torch.equal(sample(1, temperature=temperature, top_k=1), greedy)
    assert torch.equal(sample(1, temperature=1e-3, top_k=0), greedy)


def test_top_p_keeps_the_smallest_set_of_that_probability(model: Model, source: Source) -> None:
    options = {"do_sample": True, "temperature": 3.0, "top_k": 0, "top_p": 0.6}
    torch.manual_seed(0)
    output = model.generate(**source, **TEN, **options, return_dict_in_generate=True, output_scores=True)
    for step, scores in enumerate(output.scores):
        for row in range(4):
            log_probs = _next_log_probs(model, _alone(source, row), output.sequences[row : row + 1, : step + 1])[0]
            probs, order = (log_probs / 3.0).softmax(dim=-1).sort(descending=True)
            kept = scores[row].isfinite().nonzero().flatten()
            assert set(kept.tolist()) == set(order[: len(kept)].tolist())
            assert probs[: len(kept)].sum() > 0.6 - 1e-3
            assert probs[: len(kept) - 1].sum() < 0.6 + 1e-3
            assert scores[row, output.sequences[row, step + 1]].isfinite()


def _slow_beams(model: Model, source: Source, num_beams: int, num_steps: int) -> tuple[Tensor, Tensor]:
    """Beam search for a sentence that never ends: the best prefixes of each length, and their log-probabilities."""
    tokens, scores = torch.tensor([[START]]), torch.zeros(1)
    for _ in range(num_steps):
        extended = scores[:, None] + _next_log_probs(model, source, tokens)
        scores, index = extended.flatten().topk(num_beams)
        tokens = torch.cat([tokens[index // VOCAB], index[:, None] % VOCAB], dim=1)
    return tokens, scores


@pytest.mark.parametrize("num_beams", [2, 5])
def test_beam_search_equals_a_slow_one(model: Model, source: Source, greedy: Tensor, num_beams: int) -> None:
    options = {"num_beams": num_beams, "num_return_sequences": num_beams, "length_penalty": 0.7}
    output = model.generate(**source, **TEN, **options, return_dict_in_generate=True, output_scores=True)
    sequences = output.sequences.view(4, num_beams, 11)
    for row in range(4):
        tokens, scores = _slow_beams(model, _alone(source, row), num_beams, 10)
        assert torch.equal(sequences[row], tokens)
        torch.testing.assert_close(output.sequences_scores.view(4, -1)[row], scores / 10**0.7, **CLOSE)
    assert not torch.equal(sequences[:, 0], greedy)


@pytest.mark.parametrize("length_penalty", [-1.0, 1.0, 3.0])
def test_wide_beam_search_finds_the_best_of_all_sequences(model: Model, source: Source, length_penalty: float) -> None:
    """Of all that three words and an end can give in up to three steps."""
    words, end = [10, 30, 50], 70
    options = {"num_beams": 30, "num_return_sequences": 12, "early_stopping": "never", "length_penalty": length_penalty}
    for row in range(4):
        output = model.generate(
            **_alone(source, row),
            max_new_tokens=3,
            eos_token_id=end,
            prefix_allowed_tokens_fn=lambda _, ids: [*words, end],
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
        log_probs: dict[tuple[int, ...], float] = {(): 0.0}
        for length in (1, 2, 3):
            prefixes = list(itertools.product(words, repeat=length - 1))
            following = _next_log_probs(model, _alone(source, row), torch.tensor([[START, *p] for p in prefixes]))
            for prefix, scores in zip(prefixes, following, strict=True):
                log_probs |= {(*prefix, last): log_probs[prefix] + float(scores[last]) for last in [*words, end]}
        complete = [tokens for tokens in log_probs if len(tokens) == 3 or end in tokens]
        best = sorted(((log_probs[t] / len(t) ** length_penalty, t) for t in complete), reverse=True)
        found = [tuple(t for t in tokens[1:].tolist() if t != PAD) for tokens in output.sequences]
        assert found == [tokens for _, tokens in best[:12]]
        expected = torch.tensor([score for score, _ in best[:12]])
        torch.testing.assert_close(output.sequences_scores, expected, **CLOSE)


# --- batches, ends and lengths


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
def test_a_batch_generates_what_its_sentences_do_alone(
    model: Model, source: Source, greedy: Tensor, side: str, options: dict
) -> None:
    """With an end that some sentences reach early."""
    options = {**options, "eos_token_id": _uneven_end(model, **source, **options), "max_new_tokens": 10}
    together = model.generate(**_padded(source, side), **options)
    together = together.view(4, -1, together.shape[1])
    assert PAD in together
    for row in range(4):
        alone = model.generate(**_alone(source, row), **options)
        assert torch.equal(together[row, :, : alone.shape[1]], alone)
        assert (together[row, :, alone.shape[1] :] == PAD).all()


def test_generation_stops_at_the_end_token(model: Model, source: Source, greedy: Tensor) -> None:
    for eos in (int(greedy[0, 3]), int(greedy[2, 6])):
        expected = _until(greedy, eos)
        tokens = model.generate(**source, max_new_tokens=10, eos_token_id=eos)
        assert torch.equal(tokens, expected[:, : tokens.shape[1]])
        assert (expected[:, tokens.shape[1] :] == PAD).all()
    several = model.generate(**source, max_new_tokens=10, eos_token_id=greedy[:, 2].tolist())
    assert several.shape[1] <= 3


def test_lengths(model: Model, source: Source, greedy: Tensor) -> None:
    eos = int(greedy[0, 3])
    assert torch.equal(model.generate(**source, max_length=6), greedy[:, :6])
    assert torch.equal(model.generate(**source, max_new_tokens=6), greedy[:, :7])
    longer = model.generate(**source, max_new_tokens=10, min_new_tokens=8, eos_token_id=eos)
    assert (longer[:, :9] != eos).all()
    assert longer.shape[1] >= 9
    assert not torch.equal(longer[0, :4], greedy[0, :4])
    stopped = model.generate(**source, **TEN, stopping_criteria=StoppingCriteriaList([_AfterFive()]))
    assert torch.equal(stopped, greedy[:, :6])


def test_returned_sequences_are_the_best_beams_in_order(model: Model, source: Source) -> None:
    options = {**TEN, "num_beams": 4, "return_dict_in_generate": True, "output_scores": True}
    output = model.generate(**source, num_return_sequences=3, **options)
    scores = output.sequences_scores.view(4, 3)
    assert output.sequences.shape == (12, 11)
    assert (scores.diff(dim=1) <= 0).all()
    sequences = output.sequences.view(4, 3, 11)
    assert all(len({tuple(tokens.tolist()) for tokens in row}) == 3 for row in sequences)
    assert torch.equal(sequences[:, 0], model.generate(**source, **options).sequences)


@pytest.mark.parametrize("position_embedding_type", ["sinusoidal", "learned", "tupe"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generating_more_than_the_positions_is_refused(cache: str, position_embedding_type: str) -> None:
    """The last token that is generated is no input, hence one more token than positions."""
    model, ids = _model(position_embedding_type=position_embedding_type), torch.tensor([[5, 6, 7]])
    longest = model.generate(ids, cache_implementation=cache, max_new_tokens=MAX_POSITIONS)
    assert longest.shape == (1, MAX_POSITIONS + 1)
    with pytest.raises(ValueError, match=r"longer than max_position_embeddings \(64\)"):
        model.generate(ids, cache_implementation=cache, max_new_tokens=MAX_POSITIONS + 1)


# --- options, on every architecture


def test_forced_and_forbidden_tokens(model: Model, source: Source, greedy: Tensor) -> None:
    for num_beams in (1, 3):
        options = {**source, **TEN, "num_beams": num_beams}
        free = model.generate(**options)
        forced = model.generate(**options, forced_bos_token_id=9, forced_eos_token_id=11)
        assert (forced[:, 1] == 9).all()
        assert (forced[:, 10] == 11).all()
        unwanted = free[0, 1:].unique().tolist()
        assert not torch.isin(model.generate(**options, suppress_tokens=unwanted), torch.tensor(unwanted)).any()
        pair = free[0, 1:3].tolist()
        without = model.generate(**options, bad_words_ids=[pair])
        assert pair not in [window.tolist() for window in without[0].unfold(0, 2, 1)]
        once = model.generate(**options, no_repeat_ngram_size=1)
        assert all(len(row.unique()) == 11 for row in once)
        penalized = model.generate(**options, repetition_penalty=100.0)
        assert sum(len(row.unique()) for row in penalized) > sum(len(row.unique()) for row in free)
        allowed = model.generate(**options, prefix_allowed_tokens_fn=lambda row, ids: [40 + row, 50 + len(ids)])
        for row, tokens in enumerate(allowed):
            assert all(token in (40 + row, 50 + i) for i, token in enumerate(tokens.tolist()) if i > 0)
        descending = model.generate(**options, logits_processor=LogitsProcessorList([_Descending()]))
        pairs = [(a, b) for row in descending[:, 1:].tolist() for a, b in itertools.pairwise(row)]
        assert all(b < a for a, b in pairs if a > 10)


def test_forced_bos_equals_a_decoder_prompt(model: Model, source: Source) -> None:
    """The language of a translation can be given either way."""
    for options in ({}, {"num_beams": 3}, {"use_cache": False}):
        forced = model.generate(**source, forced_bos_token_id=9, max_new_tokens=10, **options)
        prompt = torch.tensor([[START, 9]] * 4)
        assert torch.equal(model.generate(**source, decoder_input_ids=prompt, max_new_tokens=9, **options), forced)


def test_decoder_prompts_are_continued(model: Model, source: Source, greedy: Tensor) -> None:
    for length in (1, 2, 6):
        prompt = greedy[:, :length]
        rest = {"max_new_tokens": 11 - length}
        assert torch.equal(model.generate(**source, decoder_input_ids=prompt, **rest), greedy)
        mask = torch.ones_like(prompt)
        with_mask = model.generate(**source, decoder_input_ids=prompt, decoder_attention_mask=mask, **rest)
        assert torch.equal(with_mask, greedy)
    assert torch.equal(model.generate(**source, decoder_input_ids=greedy[:, 1:4], max_new_tokens=7), greedy)


def test_encoder_outputs_and_embeddings_equal_ids(model: Model, source: Source, greedy: Tensor) -> None:
    mask = {"attention_mask": source["attention_mask"]}
    with torch.no_grad():
        encoded = model.get_encoder()(**source)
        embeddings = model.get_encoder().embed_tokens(source["input_ids"])
    for options in ({}, {"num_beams": 3, "num_return_sequences": 2}):
        expected = model.generate(**source, **TEN, **options)
        for inputs in (
            {"encoder_outputs": encoded},
            {"encoder_outputs": BaseModelOutput(encoded.last_hidden_state)},
            {"inputs_embeds": embeddings},
            {"inputs": source["input_ids"]},
        ):
            assert torch.equal(model.generate(**copy.deepcopy(inputs), **mask, **TEN, **options), expected)
    assert torch.equal(model.generate(source["input_ids"], **mask, **TEN), greedy)


def test_the_encoder_runs_once(model: Model, source: Source) -> None:
    calls: list[int] = []
    model.get_encoder().register_forward_hook(lambda *args: calls.append(1))
    for options in ({}, {"num_beams": 3}, {"use_cache": False}):
        model.generate(**source, **TEN, **options)
        assert len(calls) == 1
        calls.clear()


# --- outputs


def test_scores_and_logits_are_those_of_forward(model: Model, source: Source, greedy: Tensor) -> None:
    output = model.generate(
        **source, **TEN, suppress_tokens=[7], output_scores=True, output_logits=True, return_dict_in_generate=True
    )
    inputs = {**source, "decoder_input_ids": output.sequences[:, :-1], "use_cache": False}
    with torch.no_grad():
        logits = model(**inputs).logits
    torch.testing.assert_close(torch.stack(output.logits, dim=1), logits, **CLOSE)
    scores = torch.stack(output.scores, dim=1)
    assert (scores[..., 7] == -torch.inf).all()
    others = torch.arange(3, VOCAB) != 7
    torch.testing.assert_close(scores[..., 3:][..., others], logits[..., 3:][..., others], **CLOSE)

    transition = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    logits[..., 7] = -torch.inf
    logits[..., START] = -torch.inf  # the end is forbidden by `min_new_tokens`
    expected = logits.log_softmax(dim=-1).gather(2, output.sequences[:, 1:, None])[..., 0]
    torch.testing.assert_close(transition, expected, **CLOSE)


def test_transition_scores_of_beams_add_up_to_their_scores(model: Model, source: Source) -> None:
    options = {**source, "num_beams": 4, "num_return_sequences": 2, "length_penalty": 1.5}
    end = _uneven_end(model, **options)
    output = model.generate(
        **options, max_new_tokens=10, eos_token_id=end, output_scores=True, return_dict_in_generate=True
    )
    transition = model.compute_transition_scores(output.sequences, output.scores, output.beam_indices)
    lengths = (output.beam_indices >= 0).sum(dim=1)
    assert lengths.min() < 10
    torch.testing.assert_close(transition.sum(dim=1) / lengths**1.5, output.sequences_scores, **CLOSE)
    for row, tokens in enumerate(output.sequences):
        prefix = tokens[None, : int(lengths[row])]
        log_prob = _next_log_probs(model, _alone(source, row // 2), prefix)[0, tokens[lengths[row]]]
        torch.testing.assert_close(transition[row, lengths[row] - 1], log_prob, **CLOSE)


def test_hidden_states_and_attentions_are_those_of_forward(model: Model, source: Source, greedy: Tensor) -> None:
    model.set_attn_implementation("eager")
    wanted = {"output_attentions": True, "output_hidden_states": True}
    output = model.generate(**source, **TEN, **wanted, return_dict_in_generate=True)
    assert torch.equal(output.sequences, greedy)
    with torch.no_grad():
        expected = model(**source, decoder_input_ids=greedy[:, :-1], **wanted)
    for name in ("encoder_hidden_states", "encoder_attentions"):
        torch.testing.assert_close(output[name], expected[name], **CLOSE)
    for layer, hidden in enumerate(expected.decoder_hidden_states):
        steps = torch.cat([step[layer] for step in output.decoder_hidden_states], dim=1)
        torch.testing.assert_close(steps, hidden, **CLOSE)
    for layer in range(2):
        cross = torch.cat([step[layer] for step in output.cross_attentions], dim=2)
        torch.testing.assert_close(cross, expected.cross_attentions[layer], **CLOSE)
        for step, attentions in enumerate(output.decoder_attentions):
            assert attentions[layer].shape == (4, 4, 1, step + 1)
            all_of_it = expected.decoder_attentions[layer][:, :, step : step + 1, : step + 1]
            torch.testing.assert_close(attentions[layer], all_of_it, **CLOSE)

    beams = model.generate(**source, **TEN, **wanted, num_beams=3, return_dict_in_generate=True)
    assert [a.shape for a in beams.cross_attentions[5]] == [(12, 4, 1, 9)] * 2
    assert [h.shape for h in beams.decoder_hidden_states[5]] == [(12, 1, 32)] * 3


def test_router_outputs_change_nothing(model: Model, source: Source, greedy: Tensor) -> None:
    assert torch.equal(model.generate(**source, **TEN, output_router_logits=True), greedy)
    assert torch.equal(model.generate(**source, **TEN, output_routings=True), greedy)
    beams = model.generate(**source, **TEN, num_beams=3)
    assert torch.equal(model.generate(**source, **TEN, num_beams=3, output_router_logits=True), beams)
    model.config.output_router_logits = True
    assert torch.equal(model.generate(**source, **TEN), greedy)


# --- caches


@pytest.mark.parametrize("num_beams", [1, 4])
def test_every_cache_gives_the_same_tokens(model: Model, source: Source, num_beams: int) -> None:
    options = {**source, **TEN, "num_beams": num_beams}
    expected = model.generate(**options)
    calls = _count_calls(model)
    for cache, lengths in (
        ({"use_cache": False}, list(range(1, 11))),
        ({"use_cache": True}, [1] * 10),
        ({"cache_implementation": "dynamic"}, [1] * 10),
        ({"cache_implementation": "static"}, [1] * 10),
        ({"cache_implementation": "static", "max_cache_len": 40}, [1] * 10),
    ):
        calls.clear()
        assert torch.equal(model.generate(**options, **cache), expected)
        assert calls == lengths


@pytest.mark.parametrize("num_beams", [1, 3])
def test_caches_of_the_user_are_filled(model: Model, source: Source, num_beams: int) -> None:
    options = {**source, **TEN, "num_beams": num_beams}
    expected = model.generate(**options)
    config = model.config
    dynamic = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
    static = EncoderDecoderCache(
        StaticCache(config=config, max_cache_len=20), StaticCache(config=config, max_cache_len=9)
    )
    for cache in (dynamic, static):
        assert torch.equal(model.generate(**options, past_key_values=cache), expected)
        assert int(cache.get_seq_length()) == 10
        assert cache.is_updated == {0: True, 1: True}
        assert cache.cross_attention_cache.layers[1].keys.shape == (4 * num_beams, 4, 9, 8)


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_generation_goes_on_from_a_returned_cache(
    model: Model, source: Source, greedy: Tensor, implementation: str
) -> None:
    static = {"cache_implementation": "static", "max_cache_len": 16}
    first = model.generate(
        **source, max_new_tokens=4, return_dict_in_generate=True, **(static if implementation == "static" else {})
    )
    cache = first.past_key_values
    assert type(cache) is EncoderDecoderCache
    assert isinstance(cache.self_attention_cache.layers[0], StaticLayer) == (implementation == "static")
    assert int(cache.get_seq_length()) == 4
    calls = _count_calls(model)
    rest = model.generate(
        **source,
        decoder_input_ids=first.sequences,
        decoder_attention_mask=torch.ones_like(first.sequences),
        past_key_values=cache,
        max_new_tokens=6,
    )
    assert torch.equal(rest, greedy)
    assert calls == [1] * 6, "what is in the cache is not computed again"


def test_reordered_cache_continues_the_other_sentence(model: Model, source: Source, greedy: Tensor) -> None:
    order = torch.tensor([2, 0, 0, 3])
    cache = model.generate(**source, max_new_tokens=4, return_dict_in_generate=True).past_key_values
    cache.reorder_cache(order)
    with torch.no_grad():
        logits = model(
            encoder_outputs=BaseModelOutput(torch.zeros(4, 9, 32)),  # not looked at: its keys are in the cache
            attention_mask=source["attention_mask"][order],
            decoder_input_ids=greedy[order, 4:5],
            past_key_values=cache,
        ).logits
    assert torch.equal(logits[:, -1].argmax(dim=-1), greedy[order, 5])


def test_a_cache_holds_one_sequence_after_it_is_cropped(model: Model, source: Source, greedy: Tensor) -> None:
    """What assisted generation does with rejected tokens."""
    first = model.generate(**source, max_new_tokens=8, return_dict_in_generate=True)
    first.past_key_values.crop(-5)
    rest = model.generate(
        **source,
        decoder_input_ids=greedy[:, :5],
        decoder_attention_mask=torch.ones(4, 5, dtype=torch.int64),
        past_key_values=first.past_key_values,
        max_new_tokens=6,
    )
    assert torch.equal(rest, greedy)


# --- assisted generation


def test_assisted_generation_equals_greedy_search_in_fewer_steps(model: Model, source: Source, greedy: Tensor) -> None:
    itself, another = copy.deepcopy(model), _dense(seed=5)
    calls = _count_calls(model)
    for row in range(4):
        for assistant in (itself, another):
            calls.clear()
            tokens = model.generate(**_alone(source, row), **TEN, assistant_model=assistant)
            assert torch.equal(tokens[0], greedy[row])
            assert max(calls) > 1
            assert len(calls) < 10 or assistant is another


def test_assistant_of_an_encoder_decoder_needs_a_decoder_mask(model: Model, source: Source, greedy: Tensor) -> None:
    """Without it transformers feeds the assistant tokens that are in its cache already, and fewer are accepted."""
    assistant = copy.deepcopy(model)
    calls = _count_calls(model)
    mask = torch.ones(1, 1, dtype=torch.int64)
    for row in range(4):
        calls.clear()
        tokens = model.generate(**_alone(source, row), **TEN, assistant_model=assistant, decoder_attention_mask=mask)
        assert torch.equal(tokens[0], greedy[row])
        assert len(calls) <= 3


def test_assisted_sampling(model: Model, source: Source, greedy: Tensor) -> None:
    def sample(seed: int, **kwargs: Any) -> Tensor:
        torch.manual_seed(seed)
        options = {**TEN, "do_sample": True, "assistant_model": _dense(), **kwargs}
        torch.manual_seed(seed)
        return model.generate(**_alone(source, 0), **options)[0]

    assert torch.equal(sample(0, temperature=3.0), sample(0, temperature=3.0))
    assert not torch.equal(sample(0, temperature=3.0), sample(1, temperature=3.0))
    assert torch.equal(sample(0, top_k=1), greedy[0])


def test_prompt_lookup_and_early_exit_equal_greedy_search(model: Model, source: Source, greedy: Tensor) -> None:
    config = model.config.to_dict()
    calls = _count_calls(model)
    for options in ({"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}, {"assistant_early_exit": 1}):
        calls.clear()
        for row in range(4):
            assert torch.equal(model.generate(**_alone(source, row), **TEN, **options)[0], greedy[row])
        assert max(calls) > 1
    assert model.config.to_dict() == config


# --- text


@pytest.fixture(scope="module")
def tokenizer() -> ZCodeM3Tokenizer:
    """Of bytes."""
    return ZCodeM3Tokenizer(languages=["en", "de"])


@pytest.fixture
def writer(tokenizer: ZCodeM3Tokenizer) -> tuple[Model, dict[str, Any]]:
    """A model of the tokenizer's bytes, and options with which it writes lower-case letters only."""
    model = _model(vocab_size=len(tokenizer), num_experts_per_tok=2)
    letters = tokenizer.convert_tokens_to_ids(list("abcdefghijklmnopqrstuvwxyz"))
    tokenizer.src_lang = "en"
    inputs = tokenizer("some text", return_tensors="pt")
    return model, {**inputs, **TEN, "suppress_tokens": sorted(set(range(len(tokenizer))) - set(letters))}


def test_stop_strings(writer: tuple, tokenizer: ZCodeM3Tokenizer) -> None:
    model, options = writer
    text = tokenizer.decode(model.generate(**options)[0], skip_special_tokens=True)
    assert len(text) == 10
    assert text.isalpha()
    stop = text[4:7]
    stopped = model.generate(**{**options, "min_new_tokens": 0}, stop_strings=[stop], tokenizer=tokenizer)
    assert tokenizer.decode(stopped[0], skip_special_tokens=True) == text[: text.index(stop) + 3]


class _Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[Tensor] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.tokens.append(value)

    def end(self) -> None:
        self.ended += 1


def test_streamers_get_every_token(model: Model, source: Source, greedy: Tensor) -> None:
    one = _alone(source, 0)
    for options in ({}, {"do_sample": True, "top_k": 1}, {"assistant_model": _dense()}, {"use_cache": False}):
        recorder = _Recorder()
        model.generate(**one, **TEN, streamer=recorder, **options)
        assert torch.equal(torch.cat([tokens.flatten() for tokens in recorder.tokens]), greedy[0])
        assert recorder.ended == 1
        assert len(recorder.tokens) > 2
    recorder = _Recorder()
    model.generate(**source, **TEN, streamer=recorder)
    assert torch.equal(torch.cat([recorder.tokens[0], torch.stack(recorder.tokens[1:], dim=1)], dim=1), greedy)
    with pytest.raises(ValueError, match="streamer"):
        model.generate(**one, **TEN, streamer=recorder, num_beams=2)


def test_text_streamers(writer: tuple, tokenizer: ZCodeM3Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    model, options = writer
    text = tokenizer.decode(model.generate(**options)[0], skip_special_tokens=True)
    model.generate(**options, streamer=TextStreamer(tokenizer, skip_special_tokens=True))
    assert capsys.readouterr().out == text + "\n"
    pieces = TextIteratorStreamer(tokenizer, skip_special_tokens=True, timeout=10.0)
    model.generate(**options, streamer=pieces)
    assert "".join(pieces) == text


# --- generation config and custom loops


def test_generation_config_is_saved_loaded_and_overridden(
    model: Model, source: Source, greedy: Tensor, tmp_path: Path
) -> None:
    special = {name: getattr(model.config, f"{name}_token_id") for name in ("bos", "pad", "eos", "decoder_start")}
    assert special == {"bos": 0, "pad": 1, "eos": 2, "decoder_start": 2}
    assert {name: getattr(model.generation_config, f"{name}_token_id") for name in special} == special

    beams = model.generate(**source, **TEN, num_beams=3, forced_bos_token_id=9)
    model.generation_config.update(num_beams=3, forced_bos_token_id=9, **TEN)
    assert torch.equal(model.generate(**source), beams)
    model.save_pretrained(tmp_path)
    loaded = ZCodeM3ForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.generation_config.to_dict() == GenerationConfig.from_pretrained(tmp_path).to_dict()
    before = loaded.generation_config.to_dict()
    assert (before["num_beams"], before["forced_bos_token_id"], before["max_new_tokens"]) == (3, 9, 10)
    assert torch.equal(loaded.generate(**source), beams)
    own = GenerationConfig(num_beams=1, forced_bos_token_id=11, max_new_tokens=3, min_new_tokens=1)
    of_own = loaded.generate(**source, generation_config=own)
    assert of_own.shape == (4, 4)
    assert (of_own[:, 1] == 11).all()
    assert torch.equal(loaded.generate(**source, generation_config=own, num_beams=3, **TEN)[:, 1], of_own[:, 1])
    assert loaded.generation_config.to_dict() == before, "a call leaves no trace"


def _generates(model: Model, source: Source, **options: Any) -> int:
    """How many tokens, of a model that ends no sentence."""
    model.generation_config.eos_token_id = None
    return model.generate(**source, **options).shape[1]


def test_generation_is_as_long_as_the_positions_by_default(model: Model, source: Source, tmp_path: Path) -> None:
    """Of transformers it would be 20 tokens; M2M100 has a `max_length` in its generation config."""
    assert model.generation_config.max_length == model.config.max_position_embeddings == 64
    assert ZCodeM3Config(max_position_embeddings=1024).default_generation_length == 256
    model.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).max_length == 64
    load = ZCodeM3ForConditionalGeneration.from_pretrained
    loaded = load(tmp_path)
    assert _generates(loaded, source) == 64
    loaded.generation_config = GenerationConfig(num_beams=2, decoder_start_token_id=START, pad_token_id=1)
    assert _generates(loaded, source) == 64
    assert _generates(loaded, source, generation_config=GenerationConfig(num_beams=1)) == 64

    (tmp_path / "generation_config.json").unlink()
    assert load(tmp_path).generation_config.max_length == 64
    GenerationConfig(num_beams=2, decoder_start_token_id=START).save_pretrained(tmp_path)
    assert load(tmp_path).generation_config.max_length == 64
    GenerationConfig(max_length=30, decoder_start_token_id=START).save_pretrained(tmp_path)
    assert _generates(load(tmp_path), source) == 30
    GenerationConfig(max_new_tokens=30, decoder_start_token_id=START).save_pretrained(tmp_path)
    assert _generates(load(tmp_path), source) == 31


def test_a_prompt_may_be_as_long_as_the_default(source: Source) -> None:
    """As by transformers' default, tokens come after it; a limit that was set stays one."""
    model = ZCodeM3ForConditionalGeneration(tiny_config(max_position_embeddings=600)).eval()
    prompt = torch.full((source["input_ids"].shape[0], 300), 9)
    assert _generates(model, source, decoder_input_ids=prompt) == 556
    assert _generates(model, source, decoder_input_ids=prompt[:, :20]) == 256
    with pytest.raises(ValueError, match="Input length"):
        model.generate(**source, decoder_input_ids=prompt, max_length=256)


def test_a_length_of_the_user_counts_and_warns_of_nothing(
    model: Model, source: Source, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    assert _generates(model, source, max_new_tokens=7) == 8
    assert _generates(model, source, max_length=7) == 7
    assert not caplog.records


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_damaged_router_is_named(value: float, source: Source) -> None:
    model = ZCodeM3ForConditionalGeneration(tiny_config()).eval()
    model.model.decoder.layers[1].ffn.router.weight.data[2, 3] = value
    with pytest.raises(ValueError, match=r"NaN or infinity in model\.decoder\.layers\.1\.ffn\.router\.weight"):
        model.generate(**source)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_the_first_router_with_logits_that_are_not_finite_is_named(options: dict, source: Source) -> None:
    model = ZCodeM3ForConditionalGeneration(tiny_config()).eval()
    model.model.encoder.layers[2].ffn.fc1.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or infinity in the logits of model\.encoder\.layers\.3\.ffn\.router"):
        model.generate(**source, **TEN, **options)
    assert not any(module._forward_hooks for name, module in model.named_modules() if name.endswith("router"))
    model = ZCodeM3ForConditionalGeneration(tiny_config()).eval()
    model.model.decoder.layer_norm.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="logits became NaN in generation, though all routers are finite"):
        model.generate(**source, **TEN, **options)


def test_generation_leaves_the_model_as_it_was(model: Model, source: Source, greedy: Tensor) -> None:
    config, generation_config = model.config.to_dict(), model.generation_config.to_dict()
    weights = copy.deepcopy(model.state_dict())
    for options in ({"num_beams": 3}, {"cache_implementation": "static"}, {"do_sample": True}):
        model.generate(**source, **TEN, **options)
        assert model.config.to_dict() == config
        assert model.generation_config.to_dict() == generation_config
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(model.generate(**source, **TEN), greedy), "the same again"


def test_custom_generation_loop(model: Model, source: Source, greedy: Tensor) -> None:
    def loop(model: Any, input_ids: Tensor, generation_config: GenerationConfig, **kwargs: Any) -> Tensor:
        for name in ("logits_processor", "stopping_criteria"):
            kwargs.pop(name, None)
        while input_ids.shape[1] < generation_config.max_length:
            inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **kwargs)
            outputs = model(**inputs, return_dict=True)
            kwargs = model._update_model_kwargs_for_generation(outputs, kwargs, is_encoder_decoder=True)
            input_ids = torch.cat([input_ids, outputs.logits[:, -1:].argmax(dim=-1)], dim=1)
        return input_ids

    assert torch.equal(model.generate(**source, **TEN, custom_generate=loop), greedy)


# --- training mode, checkpointing and half precision


def test_generation_in_training_mode(model: Model, source: Source, greedy: Tensor) -> None:
    """Between two steps: experts drop tokens and generation depends on it, but nothing of it stays."""
    model.train()
    tokens = model.generate(**source, **TEN)
    assert tokens.shape == greedy.shape
    assert model.training
    assert torch.equal(model.eval().generate(**source, **TEN), greedy)
    model.config.capacity_factor = None
    for module in model.modules():
        if hasattr(module, "capacity_factor"):
            module.capacity_factor = None
    assert torch.equal(model.train().generate(**source, **TEN), greedy), "without dropping it is evaluation"


def test_generation_after_a_step_with_activation_checkpointing(model: Model, batch: Source) -> None:
    source = {name: batch[name] for name in ("input_ids", "attention_mask")}
    plain = copy.deepcopy(model)
    model.activation_checkpointing_enable()
    for trained in (plain, model):
        torch.manual_seed(0)
        trained.train()(**batch).loss.backward()
        with torch.no_grad():
            for parameter in trained.parameters():
                if parameter.grad is not None:  # of the shared embedding there is none without tying
                    parameter -= 0.1 * parameter.grad.clamp(-1, 1)
        trained.eval()
    for options in ({}, {"num_beams": 3}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(**source, **TEN, **options), plain.generate(**source, **TEN, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(model: Model, source: Source, dtype: torch.dtype) -> None:
    """Every token is about the best that forward without a cache, in the same precision, finds."""
    half = model.to(dtype)
    for options in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        output = half.generate(**source, **TEN, **options, return_dict_in_generate=True, output_logits=True)
        with torch.no_grad():
            logits = half(**source, decoder_input_ids=output.sequences[:, :-1]).logits
        assert logits.dtype == dtype
        chosen = torch.stack(output.logits, dim=1).argmax(dim=-1)
        assert torch.equal(chosen, output.sequences[:, 1:])
        behind = logits.amax(dim=-1) - logits.gather(2, output.sequences[:, 1:, None])[..., 0]
        assert (behind < 0.1 * logits.amax(dim=-1).abs()).float().mean() > 0.9
    assert half.generate(**source, **TEN, num_beams=3).shape == (4, 11)


# --- torch.compile


def _counting_backend() -> tuple[Callable, list[torch.fx.GraphModule]]:
    """A backend that runs graphs as they are, and the graphs that it was given."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    return backend, graphs  # a function, because `generate` copies its options


def _compiled(backend: Callable) -> dict[str, Any]:
    """Options with which `generate` compiles on a CPU, too, what it compiles on an accelerator: each decoding step."""
    compile_config = CompileConfig(fullgraph=True, backend=backend, mode=None)  # type: ignore[arg-type]
    compile_config._compile_all_devices = True
    return {"cache_implementation": "static", "max_cache_len": 32, "compile_config": compile_config}


@pytest.fixture
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _is_sparse(model: Model) -> bool:
    return any(name.endswith("experts") for name, _ in model.named_modules())


@pytest.mark.usefixtures("fresh_dynamo")
def test_decoding_is_one_graph_however_many_tokens(model: Model, source: Source, greedy: Tensor) -> None:
    assert model._can_compile_fullgraph
    assert set(model.get_experts_implementation().values()) == {"grouped_mm"}
    longer = model.generate(**source, max_new_tokens=25)
    backend, graphs = _counting_backend()
    assert torch.equal(model.generate(**source, **TEN, **_compiled(backend)), greedy)
    assert len(graphs) == 1
    assert torch.equal(model.generate(**source, max_new_tokens=25, **_compiled(backend)), longer)
    assert len(graphs) == 1
    calls = {str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"}
    is_sparse = any(name.endswith("experts") for name, _ in model.named_modules())
    assert any("grouped_mm" in call for call in calls) == is_sparse


BY_POSITION = {"token_drop_policy": "position", "min_capacity": 1}


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    ("implementation", "overrides"),
    [
        ("batched_mm", {"num_experts_per_tok": 2}),
        ("grouped_mm", {"position_embedding_type": "learned", "eval_capacity_factor": 0.5, **BY_POSITION}),
        ("grouped_mm", {"position_embedding_type": "tupe", "output_router_logits": True}),
    ],
    ids=["batched", "learned-capacity", "tupe-router-logits"],
)
def test_decoding_with_other_options_is_one_graph(source: Source, implementation: str, overrides: dict) -> None:
    """`batched_mm` is what `generate` changes to on an accelerator."""
    model = _model(**overrides)
    model.set_experts_implementation(implementation)
    backend, graphs = _counting_backend()
    for length in (10, 25):
        expected = model.generate(**source, max_new_tokens=length)
        assert torch.equal(model.generate(**source, max_new_tokens=length, **_compiled(backend)), expected)
        assert len(graphs) == 1


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("num_beams", [1, 3])
def test_model_compiled_by_hand(source: Source, num_beams: int) -> None:
    """The first step and the others: two graphs, without a break in either."""
    model = _model(num_experts_per_tok=2)
    compiled = copy.deepcopy(model)
    backend, graphs = _counting_backend()
    if num_beams == 1:
        compiled.forward = torch.compile(compiled.forward, backend=backend, fullgraph=True)  # type: ignore
    else:
        compiled.compile(backend=backend, fullgraph=True)
    static = {"cache_implementation": "static", "max_cache_len": 32, "num_beams": num_beams}
    for length in (6, 20):
        expected = model.generate(**source, max_new_tokens=length, num_beams=num_beams)
        assert torch.equal(compiled.generate(**source, max_new_tokens=length, **static), expected)
        assert len(graphs) == 2
