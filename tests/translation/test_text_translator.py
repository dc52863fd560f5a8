"""Whole texts: as if each sentence had been translated alone, in its place."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from translation_cases import MakeModel

from hf_moe_ted import Glossary, ZCodeM3ForConditionalGeneration, ZCodeM3Tokenizer, load_model_and_tokenizer
from hf_moe_ted.translation.text_translator import CUT, TextTranslator

DEMO = Path(__file__).parents[2] / "examples" / "checkpoints" / "zcode_m3_demo"
TEXT = "  One sentence. Another one!\r\n\r\n\tThe third, which is longer than the others?  Yes.\n"
SENTENCES = ["One sentence.", "Another one!", "The third, which is longer than the others?", "Yes."]


@pytest.fixture(scope="module")
def model(make_model: MakeModel) -> ZCodeM3ForConditionalGeneration:
    return make_model()


def alone(model: Any, tokenizer: Any, sentence: str, src: str, tgt: str, **options: Any) -> str:
    """The slow reference: one sentence, one call of generate."""
    inputs = tokenizer(sentence, src_lang=src, return_tensors="pt")
    output = model.generate(**inputs, forced_bos_token_id=tokenizer.lang_code_to_id[tgt], **options)
    return tokenizer.decode(output[0], skip_special_tokens=True)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("batch_tokens", [1, 60, 4096])
def test_as_each_sentence_alone(model: Any, tokenizer: ZCodeM3Tokenizer, num_beams: int, batch_tokens: int) -> None:
    translator = TextTranslator(model, tokenizer, num_beams=num_beams, batch_tokens=batch_tokens, max_new_tokens=12)
    translated, blank = translator.translate([TEXT, " \n"], "en", "de")
    each = [alone(model, tokenizer, s, "en", "de", num_beams=num_beams, max_new_tokens=12) for s in SENTENCES]
    assert [sentence.source for sentence in translated.sentences] == SENTENCES
    assert [sentence.text for sentence in translated.sentences] == each
    assert translated.text == "  {} {}\r\n\r\n\t{}  {}\n".format(*each)
    assert (blank.text, blank.sentences) == (" \n", ())


def test_a_sentence_longer_than_the_positions_is_translated_in_parts(model: Any, tokenizer: ZCodeM3Tokenizer) -> None:
    sentence = "this is the first clause, " * 20
    translator = TextTranslator(model, tokenizer, num_beams=1, max_new_tokens=5)
    [translated] = translator.translate([sentence], "en", "de")
    parts = [part.source for part in translated.sentences]
    assert " ".join(parts) == sentence.strip()
    assert all(len(ids) <= 96 for ids in tokenizer(parts)["input_ids"])
    assert [part.text for part in translated.sentences] == [
        alone(model, tokenizer, part, "en", "de", max_new_tokens=5) for part in parts
    ]


def test_same_sentences_are_translated_once(model: Any, tokenizer: ZCodeM3Tokenizer) -> None:
    calls: list[tuple[int, int]] = []
    translator = TextTranslator(model, tokenizer, num_beams=1, max_new_tokens=4)
    texts = translator.translate(["Yes. Yes.", "Yes.\nNo."], "en", "fr", lambda *counts: calls.append(counts))
    assert sum(num_sentences for num_sentences, _ in calls) == 2
    assert texts[0].sentences[0] == texts[0].sentences[1] == texts[1].sentences[0]


def test_alternatives(model: Any, tokenizer: ZCodeM3Tokenizer) -> None:
    translator = TextTranslator(model, tokenizer, num_beams=3, num_alternatives=2, max_new_tokens=8)
    [text] = translator.translate(["One. Two."], "en", "de")
    first, second = text.sentences
    assert text.alternatives == tuple(f"{a} {b}" for a, b in zip(first.alternatives, second.alternatives, strict=True))
    assert len(first.alternatives) == 2
    assert len(first.scores) == 3
    assert list(first.scores) == sorted(first.scores, reverse=True)


def test_alternatives_are_different_texts(
    model: Any, tokenizer: ZCodeM3Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Different tokens may be the same text."""
    translator = TextTranslator(model, tokenizer, num_beams=4, max_new_tokens=8)
    beams = {"One.": ["a", " a", "b", "a"], "Two.": ["c", "d", "c", "e"], "Three.": 4 * ["f"]}
    decoded = [text for source in sorted(beams, key=len, reverse=True) for text in beams[source]]
    monkeypatch.setattr(tokenizer, "batch_decode", lambda sequences, **options: decoded)
    [text] = translator.translate(["One. Two. Three."], "en", "de", num_alternatives=2)
    assert [sentence.text for sentence in text.sentences] == ["a", "c", "f"]
    assert [sentence.alternatives for sentence in text.sentences] == [("b",), ("d", "e"), ()]
    assert text.alternatives == ("b d f", "a e f")
    for sentence in text.sentences:
        assert len(sentence.scores) == 1 + len(sentence.alternatives)
        assert list(sentence.scores) == sorted(sentence.scores, reverse=True)


def test_what_a_reader_should_look_at(model: Any, tokenizer: ZCodeM3Tokenizer) -> None:
    translator = TextTranslator(model, tokenizer, num_beams=1, max_new_tokens=3, keep_placeholders=False)
    [text] = translator.translate(["Save the file %s in the folder {name} of the disk"], "en", "de")
    problems = text.sentences[0].problems
    assert "not as often as in the source: %s {name}" in problems
    assert CUT in problems
    assert any("times as long as the source" in problem for problem in problems)
    assert text.problems[0].startswith("'Save the file %s")


def translate_as(translations: dict[str, str], tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts, in the order in which the tokenizer is then asked for their translations."""
    texts = sorted(translations, key=len, reverse=True)
    monkeypatch.setattr(tokenizer, "batch_decode", lambda sequences, **options: [translations[text] for text in texts])
    return texts


def test_numbers_that_change_are_reported(
    model: Any, tokenizer: ZCodeM3Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    translations = {
        "Delete 12 items of 1,000?": "1 Elemente von 1.000 löschen?",
        "Page 3 of 3": "Seite 3",
        "Version 3.5 for {0}": "\u0663\u066b\u0665 {0}",  # in Arabic digits
    }
    translator = TextTranslator(model, tokenizer, num_beams=1, max_new_tokens=8, keep_placeholders=False)
    decoded = translate_as(translations, tokenizer, monkeypatch)
    problems = [problem for text in translator.translate(decoded, "en", "fr") for problem in text.sentences[0].problems]
    assert [problem for problem in problems if "numbers" in problem] == [
        "numbers that are missing: 12",
        "numbers that are missing: 3",
    ]


def test_letters_of_another_script_are_reported(
    model: Any, tokenizer: ZCodeM3Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the source and of the glossary are not."""
    translations = {
        "Open the bookmark bar and the tab.": "Lesezeichen बार und Вкладка öffnen.",
        "Open слово.": "Öffne слово.",
    }
    translator = TextTranslator(model, tokenizer, num_beams=1, max_new_tokens=8)
    decoded = translate_as(translations, tokenizer, monkeypatch)
    texts = translator.translate(decoded, "en", "de", glossary=Glossary([("tab", "Вкладка")]))
    problems = [problem for text in texts for problem in text.sentences[0].problems]
    assert [problem for problem in problems if "letters" in problem] == ["letters that de is not written in: बार"]


def test_texts_in_the_target_language_stay(model: Any, tokenizer: ZCodeM3Tokenizer) -> None:
    translator = TextTranslator(model, tokenizer, num_beams=1, max_new_tokens=8)
    text = " Die Datei wurde gelöscht. Fertig!\n"
    for src_lang in ("de", "auto"):
        [found] = translator.translate([text], src_lang, "de")
        assert (found.text, found.src_lang, found.sentences, found.alternatives) == (text, "de", (), ())
    assert [piece.text for piece in translator.stream(text, "de", "de")] == [text]


def test_languages_that_were_detected_are_reported(model: Any, tokenizer: ZCodeM3Tokenizer) -> None:
    """Where they are not sure, and where a text is unchanged; not where the language is given, or without letters."""
    translator = TextTranslator(model, tokenizer, num_beams=1, max_new_tokens=3)
    german, english = "Die Datei wurde in diesem Ordner gespeichert.", "The file could not be saved in this folder."
    texts = [" Abbrechen\n", german, "information", "enregistrer le fichier", english, "42 %", "<b> </b>", " "]

    def about_languages(texts: list[str], src_lang: str) -> list[list[str]]:
        found = translator.translate(texts, src_lang, "de")
        return [[problem for problem in text.problems if "taken for" in problem] for text in found]

    found = about_languages(texts, "auto")
    assert found[:2] == [
        ["'Abbrechen': taken for de, the target language: unchanged"],
        ["'Die Datei wurde in diesem Ordner gespeichert.': taken for de, the target language: unchanged"],
    ]
    [unsure] = found[2]
    assert re.fullmatch(r"'information': taken for (en|fr), with a probability of 0\.[3-6]\d", unsure)
    assert found[3:] == [[] for _ in texts[3:]]
    assert about_languages(texts, "de") == about_languages(texts, "en") == [[] for _ in texts]
    pieces = [*translator.stream("Tab. Oui.", "auto", "de")]
    assert ["taken for" in " ".join(piece.problems) for piece in pieces] == [True, False]


def test_a_text_alone_is_no_list(model: Any, tokenizer: ZCodeM3Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"texts \('Open'\) must be a list of strings: give \[text\]"):
        TextTranslator(model, tokenizer).translate("Open", "en", "de")


def test_detected_language(model: Any, tokenizer: ZCodeM3Tokenizer) -> None:
    translator = TextTranslator(model, tokenizer, num_beams=1, max_new_tokens=3)
    texts = translator.translate(
        ["alle Fenster schließen und den Rechner ausschalten", "fermer tous les onglets de la fenêtre", "42"],
        "auto",
        "en",
    )
    assert [text.src_lang for text in texts] == ["de", "fr", "en"]


def test_detected_language_of_two_scripts(make_model: MakeModel) -> None:
    tokenizer = ZCodeM3Tokenizer(languages=["eng_Latn", "zho_Hans", "zho_Hant"])
    translator = TextTranslator(make_model(), tokenizer, num_beams=1, max_new_tokens=3)
    [text] = translator.translate(["关闭所有标签页并重新启动计算机"], "auto", "en")
    assert text.src_lang == "zho_Hans"


def test_codes_that_people_type(model: Any, tokenizer: ZCodeM3Tokenizer) -> None:
    translator = TextTranslator(model, tokenizer, num_beams=1, max_new_tokens=3)
    [text] = translator.translate(["Yes."], "eng_Latn", "de-AT")
    assert (text.src_lang, text.tgt_lang) == ("en", "de")


def test_a_batch_that_does_not_fit_is_halved(
    model: Any, tokenizer: ZCodeM3Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    translator = TextTranslator(model, tokenizer, num_beams=1, max_new_tokens=6)
    expected = translator.translate([TEXT], "en", "de")
    sizes: list[int] = []
    generate = model.generate

    def at_most_one(**kwargs: Any) -> Any:
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(**kwargs)

    monkeypatch.setattr(model, "generate", at_most_one)
    assert translator.translate([TEXT], "en", "de") == expected
    assert sizes == [4, 2, 1, 1, 2, 1, 1]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_batch_of_several_languages_and_lengths(model: Any, tokenizer: ZCodeM3Tokenizer, num_beams: int) -> None:
    translator = TextTranslator(model, tokenizer, num_beams=num_beams)
    pairs = [("en", "de"), ("fr", "en"), ("de", "fr")]
    texts = ["Yes.", "No, this one is longer than the others.", "Perhaps."]
    plans = [translator.plan([text], *pair)[0] for text, pair in zip(texts, pairs, strict=True)]
    [batch] = translator.batches(sentence for plan in plans for parts in plan.sentences for sentence in parts)
    translated = dict(zip(batch, translator.translate_batch(batch), strict=True))
    for plan, text, pair in zip(plans, texts, pairs, strict=True):
        # the random model never ends: where a sentence is cut must not depend on the others
        assert [plan.whole(translated)] == translator.translate([text], *pair)


def test_work_can_be_ended_between_two_tokens(model: Any, tokenizer: ZCodeM3Tokenizer) -> None:
    translator = TextTranslator(model, tokenizer, num_beams=2, max_new_tokens=20)
    [plan] = translator.plan([TEXT], "en", "de")
    [batch] = translator.batches(sentence for parts in plan.sentences for sentence in parts)
    steps: list[None] = []

    def on_step() -> None:
        steps.append(None)
        if len(steps) == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        translator.translate_batch(batch, on_step)
    assert len(steps) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, r"num_beams \(0\) must be at least 1"),
        ({"batch_tokens": 0}, r"batch_tokens \(0\) must be at least 1"),
        ({"num_beams": 2, "num_alternatives": 2}, r"num_alternatives \(2\) must be less than num_beams \(2\)"),
    ],
)
def test_bad_options(model: Any, tokenizer: ZCodeM3Tokenizer, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextTranslator(model, tokenizer, **options)


def test_bad_input(model: Any, tokenizer: ZCodeM3Tokenizer) -> None:
    translator = TextTranslator(model, tokenizer)
    with pytest.raises(ValueError, match="unknown tgt_lang 'xx'"):
        translator.translate(["Yes."], "en", "xx")
    with pytest.raises(ValueError, match="a text to translate must be a string, got int at 1: 3"):
        translator.translate(["Yes.", 3], "en", "de")  # type: ignore[list-item]
    with pytest.raises(ValueError, match="int must be a tokenizer for translation"):
        TextTranslator(model, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_alternatives": 2}, {"batch_tokens": 1}])
def test_stream(model: Any, tokenizer: ZCodeM3Tokenizer, options: dict[str, int]) -> None:
    translator = TextTranslator(model, tokenizer, **{"num_beams": 1, "max_new_tokens": 6, **options})
    text = f"{TEXT}One sentence. {'a long clause, ' * 12}\n\n"
    [expected] = translator.translate([text], "en", "de")
    pieces = list(translator.stream(text, "en", "de"))
    assert len(pieces) == len(SENTENCES) + 2
    assert "".join(piece.text for piece in pieces) == expected.text
    assert [problem for piece in pieces for problem in piece.problems] == [*expected.problems]
    for rank, alternative in enumerate(expected.alternatives):
        assert (
            "".join([piece.text, *piece.alternatives][rank + 1] for piece in pieces if piece.sentences) in alternative
        )
    [blank] = translator.stream(" \n", "en", "de")
    assert (blank.text, blank.sentences) == (" \n", ())


def test_a_stream_begins_with_one_sentence(
    model: Any, tokenizer: ZCodeM3Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **kw: sizes.append(len(kw["input_ids"])) or generate(**kw))
    stream = TextTranslator(model, tokenizer, num_beams=1, max_new_tokens=6).stream(TEXT, "auto", "de")
    first = next(stream)
    assert (first.text[:2], sizes) == ("  ", [1])
    assert len(list(stream)) == 3
    assert sizes == [1, 2, 1]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_glossary_and_placeholders(model: Any, tokenizer: ZCodeM3Tokenizer, num_beams: int) -> None:
    """Sentences without terms are translated as without a glossary; the others have them."""
    translator = TextTranslator(model, tokenizer, num_beams=num_beams, max_new_tokens=40)
    texts = ["Close the tab. Yes.", "Save %s as <b>it</b>. No."]
    plain = translator.translate(texts, "en", "de")
    glossary = Glossary([("tab", "Reiter"), ("save", None)])
    terms = translator.translate(texts, "en", "de", glossary=glossary)
    assert [text.sentences[1] for text in terms] == [text.sentences[1] for text in plain]
    assert glossary.missing_terms(texts[0], terms[0].text) == []
    for name in ("Save", "%s", "<b>", "</b>"):
        assert name in terms[1].text
    reported = TextTranslator(model, tokenizer, num_beams=num_beams, max_new_tokens=40, keep_placeholders=False)
    [[problem, *_]] = [reported.translate(texts[1:], "en", "de")[0].sentences[0].problems]
    assert problem == "not as often as in the source: %s <b> </b>"


def test_alternatives_with_a_glossary(model: Any, tokenizer: ZCodeM3Tokenizer) -> None:
    translator = TextTranslator(model, tokenizer, num_beams=4, max_new_tokens=30)
    [text] = translator.translate(
        ["close the tab"], "en", "de", glossary=Glossary([("tab", "Reiter")]), num_alternatives=2
    )
    [sentence] = text.sentences
    assert "Reiter" in sentence.text and len({sentence.text, *sentence.alternatives}) == 3 == len(sentence.scores)


def test_many_terms_in_a_batch_with_alternatives() -> None:
    """More terms than the search has banks for: how long it goes on must not depend on other sentences."""
    translator = TextTranslator(*load_model_and_tokenizer(DEMO, device="cpu"), num_beams=4)
    terms = {"settings": "Optionen", "password": "Kennung", "history": "Chronik", "window": "Rahmen", "page": "Blatt"}
    texts = ["Save password, history, page, window, settings.", "Open the page, the window, the history, the settings."]
    glossary = Glossary(terms.items())

    def planned(text: str, num_alternatives: int) -> Any:
        [plan] = translator.plan([text], "en", "de", glossary=glossary, num_alternatives=num_alternatives)
        return plan.sentences[0][0]

    others = [planned(f"Tab {number}", 0) for number in range(12)]  # so that both are searched for at once
    [alone] = translator.translate_batch([planned(texts[0], 0)])
    assert translator.translate_batch([planned(texts[0], 0), planned(texts[1], 3), *others])[0] == alone


def test_terms_that_do_not_fit_are_reported(model: Any, tokenizer: ZCodeM3Tokenizer) -> None:
    translator = TextTranslator(model, tokenizer, num_beams=2, max_new_tokens=5)
    [text] = translator.translate(["the tab"], "en", "de", glossary=Glossary([("tab", "Registerkarte")]))
    assert "not as in the glossary: tab -> Registerkarte" in text.sentences[0].problems
    assert CUT in text.sentences[0].problems
