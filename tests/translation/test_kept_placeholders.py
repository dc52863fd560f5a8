"""What becomes of sentences whose plain translation has lost a placeholder."""

from collections.abc import Sequence
from typing import Any

import pytest
from translation_cases import MakeModel

from hf_moe_ted import TextTranslator, ZCodeM3Tokenizer
from hf_moe_ted.translation.grid_search import Hypothesis
from hf_moe_ted.translation.sentence_translator import GeneratedSentence, SentenceTranslator, SourceSentence

PLAIN = {"open {x}.": "offen.", "open $1.": "$1 offen."}


@pytest.fixture
def translator(make_model: MakeModel, tokenizer: ZCodeM3Tokenizer) -> TextTranslator:
    return TextTranslator(make_model(), tokenizer, num_beams=2)


def translate(
    translator: TextTranslator,
    monkeypatch: pytest.MonkeyPatch,
    plain: dict[str, str],
    found: str = "",
    ends: bool = True,
) -> tuple[Any, int]:
    """The sentence, and how often it was searched for."""
    num_searches = 0

    def generate(_: Any, batch: Sequence[SourceSentence], on_step: Any) -> list[GeneratedSentence]:
        return [GeneratedSentence((plain[sentence.text],), (), False) for sentence in batch]

    def search(_: Any, batch: Sequence[SourceSentence], on_step: Any) -> list[list[Hypothesis]]:
        nonlocal num_searches
        num_searches += 1
        tokens = translator.tokenizer.encode(found, add_special_tokens=False)
        return [[Hypothesis((*tokens,), -1.0, ends)] for _ in batch]

    monkeypatch.setattr(SentenceTranslator, "_generate", generate)
    monkeypatch.setattr(SentenceTranslator, "_search", search)
    [text] = translator.translate([*plain][:1], "en", "de")
    return text.sentences[0], num_searches


def test_markers_come_first(translator: TextTranslator, monkeypatch: pytest.MonkeyPatch) -> None:
    sentence, num_searches = translate(translator, monkeypatch, PLAIN)
    assert (sentence.text, sentence.problems, num_searches) == ("{x} offen.", (), 0)


def test_the_search_is_for_lost_markers(translator: TextTranslator, monkeypatch: pytest.MonkeyPatch) -> None:
    for lost in ("offen.", "$1 und $2 offen.", "$1 und $1 offen."):
        sentence, num_searches = translate(translator, monkeypatch, {**PLAIN, "open $1.": lost}, "auf {x}")
        assert (sentence.text, num_searches) == ("auf {x}", 1)


@pytest.mark.parametrize("found", ["auf x", "auf {x} {y}", "{x} " + "auf " * 40])
def test_what_is_not_better_is_not_taken(
    translator: TextTranslator, monkeypatch: pytest.MonkeyPatch, found: str
) -> None:
    sentence, _ = translate(translator, monkeypatch, {**PLAIN, "open $1.": "offen."}, found)
    assert sentence.text == "offen." and "not as often as in the source: {x}" in sentence.problems


def test_a_batch_of_markers_is_that_of_single_sentences(translator: TextTranslator) -> None:
    texts = ["open {x}.", "close %s", "yes", "<b>all</b> tabs", "{x} and {x}"]
    together = [text.text for text in translator.translate(texts, "en", "de", num_alternatives=1)]
    alone = [translator.translate([text], "en", "de", num_alternatives=1)[0].text for text in texts]
    assert together == alone
