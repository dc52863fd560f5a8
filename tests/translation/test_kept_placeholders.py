"""What becomes of sentences whose plain translation has lost a placeholder."""

from collections.abc import Sequence
from typing import Any

import pytest
from translation_cases import MakeModel

from hf_moe_ted import Glossary, TextTranslator, ZCodeM3Tokenizer
from hf_moe_ted.translation.sentence_translator import GeneratedSentence, SentenceTranslator, SourceSentence

PLAIN = {"open {x}.": "offen.", "open $1.": "$1 offen."}


@pytest.fixture
def translator(make_model: MakeModel, tokenizer: ZCodeM3Tokenizer) -> TextTranslator:
    return TextTranslator(make_model(), tokenizer, num_beams=2)


def translate(translator: TextTranslator, monkeypatch: pytest.MonkeyPatch, plain: dict[str, str]) -> Any:
    """The first sentence, where the model gives these translations."""

    def generate(_: Any, batch: Sequence[SourceSentence], on_step: Any) -> list[GeneratedSentence]:
        return [GeneratedSentence((plain[sentence.text],), (), False) for sentence in batch]

    monkeypatch.setattr(SentenceTranslator, "_generate", generate)
    [text] = translator.translate([*plain][:1], "en", "de")
    return text.sentences[0]


def test_markers_take_the_places(translator: TextTranslator, monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = translate(translator, monkeypatch, PLAIN)
    assert (sentence.text, sentence.problems) == ("{x} offen.", ())


@pytest.mark.parametrize("name", ["report.pdf", "/etc/hosts", "--dry-run", "example.com"])
def test_markers_take_the_places_of_names(
    translator: TextTranslator, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    sentence = translate(translator, monkeypatch, {f"open {name}.": "offen bericht.", "open $1.": "$1 offen."})
    assert (sentence.text, sentence.problems) == (f"{name} offen.", ())


def test_markers_take_the_places_of_numbers(translator: TextTranslator, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = {"open 250 of 404 tabs.": "250 von 40 offen.", "open $1 of $2 tabs.": "$2 Tabs, $1 offen."}
    sentence = translate(translator, monkeypatch, plain)
    assert (sentence.text, sentence.problems) == ("404 Tabs, 250 offen.", ())


@pytest.mark.parametrize("lost", ["$1 offen.", "$1 von $2, $2 offen.", "$1 von $2 oder 7."])
def test_where_markers_of_numbers_are_lost_the_plain_translation_stays(
    translator: TextTranslator, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    plain = {"open 250 of 404 tabs.": "250 von 40 offen.", "open $1 of $2 tabs.": lost}
    sentence = translate(translator, monkeypatch, plain)
    assert sentence.text == "250 von 40 offen." and sentence.problems == ("numbers that are missing: 404",)


def test_numbers_that_are_kept_have_no_markers(translator: TextTranslator, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the form of the language, and where placeholders are lost."""
    assert translate(translator, monkeypatch, {"open 7,500 tabs.": "7.500 offen."}).text == "7.500 offen."
    plain = {"open {x} of 5 tabs.": "5 offen.", "open $1 of 5 tabs.": "$1 von 5 offen."}
    assert translate(translator, monkeypatch, plain).text == "{x} von 5 offen."


@pytest.mark.parametrize(
    ("source", "plain", "marked", "mended"),
    [
        # a number without a marker is lost: the placeholder is kept as if there were none
        ("save {x} of 7,500.", "speichere 70.", {"save $1 of 7,500.": "speichere $1 von 70."}, "speichere {x} von 70."),
        # markers for numbers fail, those for placeholders alone do not
        (
            "save {x} of 404.",
            "speichere 40.",
            {"save $1 of $2.": "speichere $1.", "save $1 of 404.": "speichere $1 von 40."},
            "speichere {x} von 40.",
        ),
        # with a marker for the placeholder alone the number is lost
        (
            "save {x} of 404.",
            "speichere 404.",
            {"save $1 of 404.": "speichere $1 von 40.", "save $1 of $2.": "speichere $1 von $2."},
            "speichere {x} von 404.",
        ),
    ],
)
def test_placeholders_and_numbers_together(
    translator: TextTranslator,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    plain: str,
    marked: dict[str, str],
    mended: str,
) -> None:
    assert translate(translator, monkeypatch, {source: plain, **marked}).text == mended


@pytest.mark.parametrize("number", ["1", "2"])
def test_small_numbers_may_be_words(translator: TextTranslator, monkeypatch: pytest.MonkeyPatch, number: str) -> None:
    plain = {f"copy {number} tabs.": "ein Tab kopiert.", "copy $1 tabs.": "$1 Tab kopiert."}
    sentence = translate(translator, monkeypatch, plain)
    assert (sentence.text, sentence.problems) == ("ein Tab kopiert.", (f"numbers that are missing: {number}",))


@pytest.mark.parametrize("invented", ["es kostet $$1.", "$1 und $7.", "es kostet $1, $5."])
def test_no_dollars_are_invented(translator: TextTranslator, monkeypatch: pytest.MonkeyPatch, invented: str) -> None:
    plain = {"it has 20 tabs.": "es hat Tabs.", "it has $1 tabs.": invented}
    assert translate(translator, monkeypatch, plain).text == "es hat Tabs."


def test_alternatives_have_no_markers(translator: TextTranslator, monkeypatch: pytest.MonkeyPatch) -> None:
    beams = {"open 404.": ("offen.", "auf."), "open $1.": ("$1 offen.", "$2 offen.", "offen $1.")}

    def generate(_: Any, batch: Sequence[SourceSentence], on_step: Any) -> list[GeneratedSentence]:
        return [
            GeneratedSentence(beams[each.text], (-0.1, -0.2, -0.3)[: len(beams[each.text])], False) for each in batch
        ]

    monkeypatch.setattr(SentenceTranslator, "_generate", generate)
    [text] = translator.translate(["open 404."], "en", "de", num_alternatives=1)
    [sentence] = text.sentences
    assert (sentence.text, sentence.alternatives, sentence.scores) == ("404 offen.", ("offen 404.",), (-0.1, -0.3))


def test_a_glossary_may_replace_a_name(translator: TextTranslator, monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(_: Any, batch: Sequence[SourceSentence], on_step: Any) -> list[GeneratedSentence]:
        page = " Fehlerseite" if "404" in batch[0].text else ""
        return [GeneratedSentence((f"beispiel.de{page} offen.",), (), False) for _ in batch]

    monkeypatch.setattr(SentenceTranslator, "_generate", generate)
    [text] = translator.translate(
        ["open example.com."], "en", "de", glossary=Glossary([("example.com", "beispiel.de")])
    )
    assert (text.text, text.problems) == ("beispiel.de offen.", ())
    glossary = Glossary([("example.com.au", "beispiel.de"), ("404 page", "Fehlerseite")])
    [text] = translator.translate(["open example.com, example.com.au, 404 page."], "en", "de", glossary=glossary)
    assert "not as often as in the source: example.com" in text.sentences[0].problems
    assert not [problem for problem in text.sentences[0].problems if "numbers" in problem]
    [text] = translator.translate(["open example.com."], "en", "de")
    assert "not as often as in the source: example.com beispiel.de" in text.sentences[0].problems


@pytest.mark.parametrize("lost", ["offen.", "$1 und $2 offen.", "$1 und $1 offen.", "$1 " + "offen " * 20])
def test_where_markers_are_lost_the_plain_translation_stays(
    translator: TextTranslator, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    sentence = translate(translator, monkeypatch, {**PLAIN, "open $1.": lost})
    assert sentence.text == "offen." and "not as often as in the source: {x}" in sentence.problems


def test_a_batch_of_markers_is_that_of_single_sentences(translator: TextTranslator) -> None:
    texts = ["open {x}.", "close %s", "yes", "<b>all</b> tabs", "{x} and {x}"]
    together = [text.text for text in translator.translate(texts, "en", "de", num_alternatives=1)]
    alone = [translator.translate([text], "en", "de", num_alternatives=1)[0].text for text in texts]
    assert together == alone
