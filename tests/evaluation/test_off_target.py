"""The share of translations in another language: counted by hand, against the detector itself, and on bad input."""

import sys

import evaluate
import pytest
from py3langid.langid import MODEL_FILE, LanguageIdentifier

from hf_moe_ted.evaluation.placeholders import num_letters
from hf_moe_ted.metrics import metric_path
from hf_moe_ted.models.language_detection import MIN_DETECTED_LETTERS, LanguageDetector, detector_code

GERMAN = "Die Datei konnte nicht gespeichert werden, weil die Festplatte voll ist."
ENGLISH = "The file could not be saved because the disk is full."
FRENCH = "Le fichier n'a pas pu être enregistré, car le disque est plein."
RUSSIAN = "Файл не удалось сохранить, так как диск заполнен."


@pytest.fixture
def off_target(tmp_path):
    return evaluate.load(metric_path("off_target"), cache_dir=str(tmp_path))


def test_counts(off_target):
    predictions = [GERMAN, ENGLISH, "42 %", ENGLISH, "", FRENCH, GERMAN, GERMAN]
    references = [GERMAN] * 7 + [RUSSIAN]
    result = off_target.compute(predictions=predictions, references=references, language="de")
    assert result == {
        "off_target_share": pytest.approx(3 / 6),
        "reference_off_target_share": pytest.approx(1 / 8),
        "detected_languages": {"de": 3, "en": 2, "fr": 1},
    }


def test_short_texts_do_not_count(off_target):
    """Letters of placeholders do not, either: `translate` counts the same."""
    german = "Die Datei in diesem Ordner"  # 22 letters
    short = [german, "Copied", "%(directory)s <strong>42</strong>", ""]
    result = off_target.compute(predictions=short, references=[[text or "Copied"] for text in short], language="de")
    assert result == {"off_target_share": None, "reference_off_target_share": None, "detected_languages": {}}
    enough = f"{german} ist"  # 25 letters
    assert num_letters(enough) == MIN_DETECTED_LETTERS == num_letters(f"<strong>{enough}</strong>")
    result = off_target.compute(predictions=[*short, enough], references=[*short[:3], ENGLISH, "x"], language="de")
    assert result == {"off_target_share": 0, "reference_off_target_share": 1, "detected_languages": {"de": 1}}


def test_every_reference_counts(off_target):
    result = off_target.compute(predictions=[GERMAN], references=[[GERMAN, ENGLISH, FRENCH, GERMAN]], language="de")
    assert result["reference_off_target_share"] == 0.5


def test_candidates(off_target):
    texts = {"predictions": [GERMAN, RUSSIAN], "references": [GERMAN, RUSSIAN]}
    result = off_target.compute(**texts, language="deu_Latn", candidates=["deu_Latn", "eng_Latn", "fra_Latn"])
    assert result["detected_languages"].keys() <= {"de", "en", "fr"}
    assert off_target.compute(**texts, language="de", candidates=["ru", "de"])["off_target_share"] == 0.5
    # of a short text, the fewer languages the better
    assert LanguageDetector().detect("PIN ändern") == "sv"
    assert LanguageDetector(["de", "en", "fr"]).detect("PIN ändern") == "de"


def test_codes():
    labels = LanguageIdentifier.from_model_file(MODEL_FILE).labels
    assert all(detector_code(label) == label for label in labels if label != "nb")
    codes = {"zho_Hant": "zh", "pt_BR": "pt", "pt-BR": "pt", "arb_Arab": "ar", "nob_Latn": "no", "vec_Latn": "vec"}
    codes |= {"ZH": "zh", "cmn": "zh", "iw": "he", "fil": "tl", "zh-yue": "yue", "kik_Latn": "kik", "ckb_Arab": "sdh"}
    assert {code: detector_code(code) for code in codes} == codes
    assert detector_code("tlh") is None and detector_code("ceb_Latn") is None and detector_code("<mask>") is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "language is required"),
        ({"language": "tlh"}, r"language \('tlh'\) is unknown to py3langid"),
        ({"language": "de", "candidates": ["en", "fr"]}, r"language \('de'\) must be one of candidates \(en, fr\)"),
        ({"language": "de", "candidates": ["de", "tlh", "ceb"]}, "does not know the languages ceb, tlh"),
    ],
)
def test_bad_languages(off_target, options, message):
    with pytest.raises(ValueError, match=message):
        off_target.compute(predictions=["a"], references=["a"], **options)


def test_no_candidate():
    with pytest.raises(ValueError, match="at least one candidate"):
        LanguageDetector([])


def test_without_py3langid(monkeypatch, off_target):
    from hf_moe_ted.models import language_detection

    language_detection._identifier.cache_clear()
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(ValueError, match="needs py3langid: `pip install py3langid`"):
        off_target.compute(predictions=["a"], references=["a"], language="de")
