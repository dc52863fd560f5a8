"""Translations in batches against one at a time, scores against sacreBLEU, what is counted, and bad input."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
import torch
from transformers import NllbTokenizer

from hf_moe_ted import (
    ZCodeM3ForConditionalGeneration,
    ZCodeM3Tokenizer,
    evaluate_translation,
    score_translations,
)
from hf_moe_ted.evaluation import translation_evaluation
from hf_moe_ted.models.language_detection import LanguageDetector

Rows = list[dict[str, str]]
DEMO = Path(__file__).parents[2] / "examples" / "checkpoints" / "zcode_m3_demo"
TEXTS = (
    ("Close all tabs", "Alle Tabs schließen"),
    ("Open settings", "Einstellungen öffnen"),
    ("The file could not be saved because the disk is full", "Die Datei konnte nicht gespeichert werden"),
    ("Copy", "Kopieren"),
    ("You can change this in settings", "Sie können dies in den Einstellungen ändern"),
)
ROWS = [{"source": en, "target": de, "src_lang": "en", "tgt_lang": "de"} for en, de in TEXTS] + [
    {"source": de, "target": en, "src_lang": "de", "tgt_lang": "en"} for en, de in TEXTS
]


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    model = ZCodeM3ForConditionalGeneration.from_pretrained(DEMO)
    return model.train(), ZCodeM3Tokenizer.from_pretrained(DEMO, src_lang="fr", tgt_lang="ja")


@torch.no_grad()
def one_at_a_time(model: Any, tokenizer: Any, rows: Rows, **generation: Any) -> list[str]:
    """The slow reference."""
    texts = []
    for row in rows:
        inputs = tokenizer(row["source"], src_lang=row["src_lang"], return_tensors="pt")
        language = tokenizer.get_lang_id(row["tgt_lang"])
        output = model.generate(**inputs, forced_bos_token_id=language, do_sample=False, **generation)
        texts.append(tokenizer.decode(output[0], skip_special_tokens=True))
    return texts


@pytest.mark.parametrize("num_beams", [1, 2])
def test_equals_one_sentence_at_a_time(demo: tuple[Any, Any], num_beams: int) -> None:
    model, tokenizer = demo
    quality = evaluate_translation(model, tokenizer, ROWS, batch_size=2, num_beams=num_beams, max_new_tokens=20)
    assert model.training and (tokenizer.src_lang, tokenizer.tgt_lang) == ("fr", "ja")
    assert list(quality.directions) == [("de", "en"), ("en", "de")] and quality.num_sentences == 10
    model.eval()
    detect = LanguageDetector(tokenizer.languages).detect
    for pair, direction in quality.directions.items():
        rows = [row for row in ROWS if (row["src_lang"], row["tgt_lang"]) == pair]
        expected = one_at_a_time(model, tokenizer, rows, num_beams=num_beams, max_new_tokens=20)
        references = [row["target"] for row in rows]
        assert direction.bleu == pytest.approx(sacrebleu.corpus_bleu(expected, [references]).score)
        assert direction.bleu > 5
        assert direction.chrf == pytest.approx(sacrebleu.corpus_chrf(expected, [references]).score)
        sources = [row["source"] for row in rows]
        assert direction.source_chrf == pytest.approx(sacrebleu.corpus_chrf(sources, [references]).score)
        assert direction.length_ratio == sum(map(len, expected)) / sum(map(len, references))
        shares = []
        for texts in (expected, references):
            others = [detect(text) != pair[1] for text in texts if sum(map(str.isalpha, text)) >= 25]
            shares.append(sum(others) / len(others) if others else None)
        assert [direction.off_target, direction.reference_off_target] == shares
        assert direction.reference_off_target == 0.0
        assert direction.num_cut == 0
    model.train()


def test_what_is_measured(demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    quality = evaluate_translation(model, tokenizer, iter(ROWS), max_sentences=3, max_new_tokens=2)
    assert [direction.num_sentences for direction in quality.directions.values()] == [3, 3]
    # the tag of the language and one token: only what is one token long could end in time
    assert [direction.num_cut for direction in quality.directions.values()] == [3, 3]
    assert quality.sentences_per_s == 6 / sum(direction.seconds for direction in quality.directions.values())
    assert (quality.device, quality.dtype, quality.peak_memory_bytes) == ("cpu", "float32", None)
    assert quality.num_bytes == 4 * model.num_parameters()
    assert (quality.batch_size, quality.num_beams, quality.max_new_tokens) == (32, 1, 2)

    shuffled = evaluate_translation(model, tokenizer, ROWS[:3][::-1] + ROWS[5:8], batch_size=1, max_new_tokens=2)
    for pair, direction in quality.directions.items():
        assert shuffled.directions[pair].text_sha256 == direction.text_sha256
    other = evaluate_translation(model, tokenizer, ROWS[1:4] + ROWS[5:8], max_new_tokens=2)
    assert other.directions["en", "de"].text_sha256 != quality.directions["en", "de"].text_sha256
    assert other.directions["de", "en"].text_sha256 == quality.directions["de", "en"].text_sha256


def test_another_text(make_model: Callable[..., Any], tokenizer: ZCodeM3Tokenizer) -> None:
    """Measured as it is alone, and read before the first sentence is translated."""
    texts = [[{"translation": {"en": f"save {number}", "de": f"speichern {number}"}}] for number in (1, 2)]
    options: dict[str, Any] = {"max_new_tokens": 3}
    quality = evaluate_translation(make_model(), tokenizer, texts[0], also=texts[1], **options)
    alone = [evaluate_translation(make_model(), tokenizer, text, **options) for text in texts]
    assert quality.also is not None and alone[0].also is None and quality.num_sentences == 2
    for found, expected in zip((quality, quality.also), alone, strict=True):
        found.require_comparable(found)
        for pair, direction in expected.directions.items():
            assert vars(found.directions[pair]) | {"seconds": 0} == vars(direction) | {"seconds": 0}
            assert direction.copied["numbers"][0] == 1
    model = make_model()
    model.generate = lambda *args, **kwargs: pytest.fail("translated")
    with pytest.raises(ValueError, match="does not know the languages xx"):
        evaluate_translation(model, tokenizer, texts[0], also=[ROWS[0] | {"tgt_lang": "xx"}])


def test_translation_rows_and_languages(make_model: Callable[..., Any], tokenizer: ZCodeM3Tokenizer) -> None:
    rows = [{"translation": {"en": "save", "de": "speichern", "fr": "enregistrer"}}] * 2
    quality = evaluate_translation(make_model(), tokenizer, rows, languages=["en", "fr"], max_new_tokens=3)
    assert list(quality.directions) == [("en", "fr"), ("fr", "en")] and quality.num_sentences == 4


def test_tokenizer_of_nllb(make_model: Callable[..., Any]) -> None:
    languages = ["eng_Latn", "deu_Latn", "tlh_Latn"]
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = NllbTokenizer(vocab=vocabulary, merges=[], extra_special_tokens=languages)
    model = make_model(vocab_size=len(tokenizer))
    target = "die Datei wurde nicht gespeichert"
    rows = [{"source": "save", "target": target, "src_lang": "eng_Latn", "tgt_lang": tgt} for tgt in languages[1:]]
    quality = evaluate_translation(model, tokenizer, rows, max_new_tokens=4)
    assert quality.directions["eng_Latn", "deu_Latn"].reference_off_target == 0.0
    assert quality.directions["eng_Latn", "deu_Latn"].off_target is None  # translations are too short
    assert quality.directions["eng_Latn", "tlh_Latn"].reference_off_target is None
    rows[0]["tgt_lang"] = "fra_Latn"
    with pytest.raises(
        ValueError, match=r"the tokenizer does not know the languages fra_Latn .*; it knows eng_Latn, deu"
    ):
        evaluate_translation(model, tokenizer, rows)


def test_blank_sources_have_empty_translations(demo: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the pipeline, and the others are translated as without them."""
    made: list[str] = []
    score = translation_evaluation.score_translations

    def recorded(sources: Any, translations: Any, references: Any, **kwargs: Any) -> Any:
        made.extend(translations)
        return score(sources, translations, references, **kwargs)

    monkeypatch.setattr(translation_evaluation, "score_translations", recorded)
    blank = [ROWS[0] | {"source": source} for source in ("", " \n", "\u3000")]
    quality = evaluate_translation(*demo, [blank[0], ROWS[0], *blank[1:]], max_new_tokens=20)
    assert made[0] == made[2] == made[3] == "" and made[1]
    assert (quality.num_sentences, quality.directions["en", "de"].num_cut) == (4, 0)
    made.clear()
    all_blank = evaluate_translation(*demo, blank, batch_size=2)
    assert (all_blank.num_sentences, all_blank.sentences_per_s) == (3, 0.0)
    assert made == [""] * 3


def test_generation_config_of_the_model_does_not_change_the_form(demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    expected = evaluate_translation(model, tokenizer, ROWS[:3], num_beams=2, max_new_tokens=9)
    before = copy.deepcopy(model.generation_config)
    model.generation_config.update(num_return_sequences=2, num_beams=3, do_sample=True, return_dict_in_generate=True)
    try:
        found = evaluate_translation(model, tokenizer, ROWS[:3], num_beams=2, max_new_tokens=9)
    finally:
        model.generation_config = before
    assert vars(found.directions["en", "de"]) | {"seconds": 0} == vars(expected.directions["en", "de"]) | {"seconds": 0}


def test_typed_codes_are_the_languages_of_the_tokenizer(demo: tuple[Any, Any]) -> None:
    rows = [{"source": "Copy", "target": "复制", "src_lang": "eng_Latn", "tgt_lang": code} for code in ("zh-CN", "ZH")]
    quality = evaluate_translation(*demo, [*rows, ROWS[0]], languages=["EN", "cmn"], max_new_tokens=4)
    assert list(quality.directions) == [("en", "zh")] and quality.num_sentences == 2
    assert quality.directions["en", "zh"].bleu_tokenizer == "zh"


def test_languages_are_checked_before_the_first_translation(
    demo: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(demo[0]), "generate", lambda *args, **kwargs: pytest.fail("translated"))
    rows = [*ROWS, ROWS[0] | {"tgt_lang": "xx"}, *ROWS, ROWS[0] | {"src_lang": "yy"}]
    for dataset in (rows, iter(rows)):
        with pytest.raises(ValueError, match="does not know the languages xx, yy; it knows en, ar"):
            evaluate_translation(*demo, dataset, batch_size=1)
    with pytest.raises(ValueError, match="unknown languages 'xx', the tokenizer knows: en, ar"):
        evaluate_translation(*demo, rows, languages=["en", "xx"])


@pytest.mark.parametrize("code", ["zh", "ZH", "zh-CN", "zh_CN", "zh-Hant", "zho_Hans", "cmn"])
def test_scores_of_chinese_by_any_code(code: str) -> None:
    text, references = [2 * "今天天气很好我们去公园散步"], [2 * "今天天气非常好我们去公园走走"]
    expected = sacrebleu.corpus_bleu(text, [references], tokenize="zh").score
    scores = score_translations(text, text, references, tgt_lang=code)
    assert (scores.bleu_tokenizer, scores.bleu, scores.off_target) == ("zh", pytest.approx(expected), 0.0)


@pytest.mark.parametrize(("tgt_lang", "texts"), [("de", ["Speichern", "Neuer Ordner"]), ("zh", ["保存", "新建夹"])])
def test_there_is_no_bleu_without_4_grams(tgt_lang: str, texts: list[str]) -> None:
    """Not even where translations have some; with one reference of four tokens it is sacreBLEU's."""
    sources = ["Save", "New folder"]
    for translations in (texts, ["ein ganz neuer Ordner hier", "新建一个文件夹"]):
        scores = score_translations(sources, translations, texts, tgt_lang=tgt_lang)
        assert scores.bleu is None and scores.chrf > 0
    longer = {"de": "alle Tabs jetzt schließen", "zh": "关闭标签"}[tgt_lang]
    perfect = score_translations([*sources, "x"], [*texts, longer], [*texts, longer], tgt_lang=tgt_lang)
    assert perfect.bleu == pytest.approx(100.0)
    assert score_translations([*sources, "x"], [*texts, "x"], [*texts, longer], tgt_lang=tgt_lang).bleu == 0.0


@pytest.mark.parametrize("code", ["xx", "zhh", "Chinese", "jp", ""])
def test_scores_of_an_unknown_language(code: str) -> None:
    with pytest.raises(ValueError, match=f"unknown language '{code}'"):
        score_translations(["a"], ["a"], ["a"], tgt_lang=code)


def test_scores() -> None:
    texts = {"sources": ["关闭"], "translations": ["请关闭标签页"], "references": ["请关闭所有标签页"]}
    chinese = score_translations(**texts, tgt_lang="zho_Hans", languages=["eng_Latn", "zho_Hans"])
    assert chinese.bleu_tokenizer == "zh"
    assert chinese.bleu == sacrebleu.corpus_bleu(texts["translations"], [texts["references"]], tokenize="zh").score
    assert score_translations(**texts, tgt_lang="th").bleu_tokenizer == "char"
    assert score_translations(**texts, tgt_lang="de").off_target is None
    long = {name: [5 * text for text in of_name] for name, of_name in texts.items()}
    assert score_translations(**long, tgt_lang="de").off_target == 1.0
    unknown = score_translations(**texts, tgt_lang="tlh", languages=["en", "tlh"])
    assert unknown.off_target is unknown.reference_off_target is None and unknown.bleu_tokenizer == "13a"
    assert (chinese.copied["numbers"], chinese.repeating) == ((0, 0), 0.0)
    copying = score_translations(
        ["Open %s in WebKit, 3 times", "a 5"],
        ["Öffne %s in Webkit, Webkit, Webkit", "ein 5"],
        ["Öffne %s dreimal in WebKit", "das das das 5"],
        tgt_lang="de",
    )
    assert copying.copied == {"numbers": (1, 1), "placeholders": (1, 1), "names": (1, 0)}
    assert (copying.repeating, copying.reference_repeating) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (ROWS, {"batch_size": 0}, r"batch_size \(0\) must be at least 1"),
        (ROWS, {"max_sentences": -1}, r"max_sentences \(-1\) must be at least 1"),
        (ROWS, {"languages": "en"}, r"languages \('en'\) must be a list of codes"),
        (ROWS, {"languages": ["en", "fr"]}, "the dataset has no sentence in en, fr"),
        ([], {}, "the dataset has no sentence"),
        ([{"text": "save"}], {}, "row 0 of the dataset must have the strings source, target, src_lang, tgt_lang"),
        ([ROWS[0] | {"target": " "}], {}, "a sentence from en to de has an empty target: 'Close all tabs'"),
        ([ROWS[0] | {"tgt_lang": "ja"}], {}, "does not know the languages ja; it knows en, de, fr"),
    ],
)
def test_bad_input(
    make_model: Callable[..., Any], tokenizer: ZCodeM3Tokenizer, rows: Rows, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_translation(make_model(), tokenizer, rows, max_new_tokens=3, **options)
