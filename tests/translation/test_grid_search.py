"""Searching for translations with phrases: exact where it can be, plain beam search where there are none."""

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from transformers import LogitsProcessor, M2M100Config, M2M100ForConditionalGeneration, M2M100Tokenizer, NllbTokenizer
from translation_cases import TEXTS, MakeModel

from hf_moe_ted import Glossary, ZCodeM3Tokenizer
from hf_moe_ted.translation.grid_search import Hypothesis, grid_search
from hf_moe_ted.translation.phrases import Phrase, PhraseTokens, phrases_of

SENTENCES = ["close all tabs", "yes", "the disk is full, so nothing was saved"]
LIMIT = 14


@pytest.fixture(scope="module")
def model(make_model: MakeModel) -> Any:
    return make_model()


def search(
    model: Any, tokenizer: Any, phrases: list[list[Phrase]], num_beams: int, *, limit: int = LIMIT, **options: Any
) -> list[list[Hypothesis]]:
    inputs = tokenizer(SENTENCES[: len(phrases)], src_lang="en", padding=True, return_tensors="pt")
    return model.generate(
        **inputs,
        forced_bos_token_id=tokenizer.lang_code_to_id["de"],
        custom_generate=grid_search,
        phrases=phrases,
        phrase_tokens=PhraseTokens(tokenizer),
        limits=[limit] * len(phrases),
        beams_of_grid=num_beams,
        max_new_tokens=limit,
        use_cache=True,
        **options,
    )


def decoded(tokenizer: Any, found: list[list[Hypothesis]]) -> list[str]:
    return [tokenizer.decode(list(row[0].tokens), skip_special_tokens=True) for row in found]


@pytest.mark.parametrize("num_beams", [1, 4])
def test_without_phrases_it_is_beam_search(demo_like: Any, tokenizer: ZCodeM3Tokenizer, num_beams: int) -> None:
    """The same tokens and scores as transformers' own, for a model that ends its sentences."""
    inputs = tokenizer(SENTENCES, src_lang="en", padding=True, return_tensors="pt")
    expected = demo_like.generate(
        **inputs,
        forced_bos_token_id=tokenizer.lang_code_to_id["de"],
        num_beams=num_beams,
        max_new_tokens=LIMIT,
        return_dict_in_generate=True,
        output_scores=True,
    )
    found = search(demo_like, tokenizer, [[], [], []], num_beams)
    pad = tokenizer.pad_token_id
    for row, sequence in zip(found, expected.sequences.tolist(), strict=True):
        assert [token for token in row[0].tokens if token != pad] == [token for token in sequence if token != pad]
    assert any(row[0].has_ended for row in found)
    if num_beams > 1:
        scores = torch.tensor([row[0].score for row in found])
        torch.testing.assert_close(scores, expected.sequences_scores)


@pytest.fixture(scope="module")
def demo_like(make_model: MakeModel) -> Any:
    """A random model for which the end is likely."""
    model = make_model()
    model.generation_config.eos_token_id = [2, *range(20, 60)]
    return model


class LikelyEnd(LogitsProcessor):
    """So that ends are among the best tokens, as beam search wants them."""

    bonus = 9.0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        scores[:, 2] += self.bonus
        return scores


def test_a_wide_search_finds_the_best_of_all(model: Any, tokenizer: ZCodeM3Tokenizer) -> None:
    """Every translation of up to two tokens and the end, by brute force."""
    inputs = tokenizer(SENTENCES[:1], src_lang="en", return_tensors="pt")
    first, eos = tokenizer.lang_code_to_id["de"], tokenizer.eos_token_id
    vocab_size = model.config.vocab_size
    [phrase_id] = tokenizer.encode("q", add_special_tokens=False)
    prefixes = torch.tensor([[eos, first, token] for token in range(vocab_size)])
    many = {name: value.expand(vocab_size, -1) for name, value in inputs.items()}
    with torch.no_grad():
        log_probs = model(**many, decoder_input_ids=prefixes).logits.log_softmax(-1)
        thirds = torch.tensor([[eos, first, phrase_id, token] for token in range(vocab_size)])
        after_phrase = model(**many, decoder_input_ids=thirds).logits[:, -1].log_softmax(-1)[:, eos]
        fourths = torch.tensor([[eos, first, token, phrase_id] for token in range(vocab_size)])
        before_phrase = model(**many, decoder_input_ids=fourths).logits[:, -1].log_softmax(-1)[:, eos]
    second = log_probs[0, 1]  # after the language
    ends = after_phrase + LikelyEnd.bonus, before_phrase + LikelyEnd.bonus
    scores = {(phrase_id, eos): (second[phrase_id] + log_probs[phrase_id, 2, eos] + LikelyEnd.bonus) / 3}
    for token in set(range(vocab_size)) - {eos}:
        scores[phrase_id, token, eos] = (second[phrase_id] + log_probs[phrase_id, 2, token] + ends[0][token]) / 4
        scores[token, phrase_id, eos] = (second[token] + log_probs[token, 2, phrase_id] + ends[1][token]) / 4
    best = max(scores, key=lambda tokens: scores[tokens])
    [[found, *_]] = search(model, tokenizer, [[Phrase("q")]], 2 * vocab_size, limit=4, logits_processor=[LikelyEnd()])
    assert found.tokens == (eos, first, *best) and found.has_ended
    assert found.score == pytest.approx(float(scores[best]), abs=1e-5)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_each_sentence_has_its_phrases(model: Any, tokenizer: ZCodeM3Tokenizer, num_beams: int) -> None:
    phrases = [
        [Phrase("alle Tabs", source="all tabs"), Phrase("$1", count=2)],
        [],
        [Phrase("voll", source="full", may_be_capitalized=True), Phrase("日本", source="x"), Phrase("`a b`")],
    ]
    found = search(model, tokenizer, phrases, num_beams, limit=60)
    texts = decoded(tokenizer, found)
    for text, of_row in zip(texts, phrases, strict=True):
        assert all(phrase.is_in(text) for phrase in of_row), text
    [[alone, *_]] = search(model, tokenizer, [phrases[0]], num_beams, limit=60)
    assert found[0][0].tokens == alone.tokens  # whatever the others are


def test_the_limit_cuts_those_with_the_most_phrases(model: Any, tokenizer: ZCodeM3Tokenizer) -> None:
    phrases = [Phrase("ab", source="a"), Phrase("a long term that does not fit", source="b")]
    [[found, *_]] = search(model, tokenizer, [phrases], 3, limit=8)
    text = tokenizer.decode(list(found.tokens), skip_special_tokens=True)
    assert not found.has_ended and len(found.tokens) == 1 + 8
    assert phrases[0].is_in(text) and not phrases[1].is_in(text)


def test_steps_are_told_and_may_end_the_work(model: Any, tokenizer: ZCodeM3Tokenizer) -> None:
    steps: list[int] = []

    def on_step() -> None:
        steps.append(len(steps))
        if len(steps) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(model, tokenizer, [[Phrase("xyz")]], 2, on_step=on_step)
    assert steps == [0, 1, 2]


def sentencepiece_tokenizers(folder: Path) -> list[Any]:
    """Small ones of NLLB and of M2M100, whose words begin with a mark."""
    words = [word for texts in TEXTS.values() for text in texts for word in text.split()]
    (folder / "text.txt").write_text("\n".join(words * 5), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "sp"), vocab_size=60, character_coverage=1.0,
        minloglevel=2,
    )  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(str(folder / "sp.model"))
    names = [pieces.id_to_piece(index) for index in range(pieces.get_piece_size())]
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = {name: index for index, name in enumerate(dict.fromkeys([*special, *names]))}
    letters = {name: index for index, name in enumerate([*special, "▁", *"abcdefghijklmnopqrstuvwxyzABT()"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    return [
        M2M100Tokenizer(str(folder / "vocab.json"), str(folder / "sp.model")),
        NllbTokenizer(vocab=letters, merges=[], extra_special_tokens=["eng_Latn", "deu_Latn"]),
    ]


def test_spellings(tokenizer: ZCodeM3Tokenizer, tmp_path: Path) -> None:
    """However a tokenizer writes words, each spelling is one of the phrase, in its place."""
    phrase = Phrase("tabs", source="x", may_be_capitalized=True)
    for each in [tokenizer, *sentencepiece_tokenizers(tmp_path)]:
        spellings = PhraseTokens(each).spellings(phrase)
        assert {spelling.is_at_start for spelling in spellings} == {True, False}
        for spelling in spellings:
            before = [] if spelling.is_at_start else each.encode("a", add_special_tokens=False)
            if not spelling.is_at_start and not spelling.is_after_word:
                before = each.encode("(", add_special_tokens=False)
            text = each.decode([*before, *spelling.tokens]).strip()
            expected = {"Tabs", "tabs"} if not before else {"a tabs", "(tabs"}
            assert text in expected or each.unk_token in text


def test_ends_of_words(tokenizer: ZCodeM3Tokenizer, tmp_path: Path) -> None:
    for each in [tokenizer, *sentencepiece_tokenizers(tmp_path)]:
        tokens = PhraseTokens(each)
        ids = each.encode("ab", add_special_tokens=False)
        assert tokens.continues_word(ids[-1]) and tokens.ends_in_word(ids[-1])
        assert not tokens.continues_word(each.eos_token_id)
    space, dot = tokenizer.encode(" .", add_special_tokens=False)
    tokens = PhraseTokens(tokenizer)
    assert not any(check(token) for check in (tokens.continues_word, tokens.ends_in_word) for token in (space, dot))
    assert tokens.ends_in_word(tokenizer.encode("é", add_special_tokens=False)[-1])  # a byte of a letter


def test_dense_model_of_transformers(tmp_path: Path) -> None:
    tokenizer = sentencepiece_tokenizers(tmp_path)[1]
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 64}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_layers": 1, "decoder_layers": 1}
    model = M2M100ForConditionalGeneration(M2M100Config(vocab_size=len(tokenizer), **sizes, **heads)).eval()
    inputs = tokenizer(["close all tabs", "yes"], padding=True, return_tensors="pt")
    options = {"forced_bos_token_id": tokenizer.convert_tokens_to_ids("deu_Latn"), "max_new_tokens": 30}
    found = model.generate(
        **inputs, **options, custom_generate=grid_search, phrases=[[Phrase("alle", source="all")], []], limits=[30, 30],
        phrase_tokens=PhraseTokens(tokenizer), beams_of_grid=2,
    )  # fmt: skip
    plain = model.generate(**inputs, **options, num_beams=2)
    assert Phrase("alle", source="all").is_in(decoded(tokenizer, found)[0])
    assert decoded(tokenizer, found)[1] == tokenizer.decode(plain[1], skip_special_tokens=True)


def test_phrases_of_a_sentence() -> None:
    glossary = Glossary([("tab", "Tab"), ("file %s", "Datei %s"), ("Chrome", None)])
    assert phrases_of("Tab, tab: $1, file %s of Chrome <b>tab</b> $1 %s", glossary) == (
        Phrase("Tab", 3, "Tab", True),
        Phrase("Datei %s", 1, "file %s", True),
        Phrase("Chrome", 1, "Chrome", False),
        Phrase("$1", 2),
        Phrase("<b>"),
        Phrase("</b>"),
        Phrase("%s"),
    )
    assert phrases_of("$1 tab", None) == (Phrase("$1"),)
    assert phrases_of("$1 tab", glossary, keep_placeholders=False) == (Phrase("Tab", 1, "tab", True),)
