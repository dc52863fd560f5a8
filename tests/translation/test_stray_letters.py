"""Letters in a script that the language of a text is not written in."""

import pytest
from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES

from hf_moe_ted.translation.scripts import stray_letters


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("Lesezeichen बार öffnen", "de", ["बार"]),
        ("In Chrome-Lesezeichen栏 anzeigen", "deu_Latn", ["栏"]),
        ("Доступ к вашему الطابعة", "ru", ["الطابعة"]),
        ("탭 닫기 栏", "ko", ["栏"]),
        ("标签页の 关闭", "zh-CN", ["の"]),
        ("Otvori traku", "srp_Cyrl", []),  # Latin letters never are
        ("Google Chrome для Android", "ru", []),
        ("タブを閉じる、設定ー5%", "ja", []),
        ("ㄅ 標籤", "zh_TW", []),
        ("12 → ∑ 5 µm 🙂 é", "fr", []),
        ("Добро", "sr", []),
        ("Дастур", "uz", []),  # Latin in NLLB, and Cyrillic elsewhere
        ("Дастур", "uzn_Latn", ["Дастур"]),
        ("بار", "xx", []),
    ],
)
def test_stray_letters(text: str, language: str, expected: list[str]) -> None:
    assert stray_letters(text, language) == expected


def test_scripts_of_the_source_are_allowed() -> None:
    assert stray_letters("Das Wort привет und बार", "de", ["слово"]) == ["बार"]
    assert stray_letters("Das Wort привет und बार", "de", ["слово", "बार"]) == []


@pytest.mark.parametrize("code", FAIRSEQ_LANGUAGE_CODES)
def test_languages_of_nllb_are_known(code: str) -> None:
    """Of each, letters of another script are seen: Tifinagh for all but Tamazight."""
    assert bool(stray_letters("ⴰ", code)) == (code not in {"taq_Tfng", "tzm_Tfng"})
