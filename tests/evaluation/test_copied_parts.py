"""What translations have to copy, in all scripts, and repetition."""

import pytest

from hf_moe_ted.evaluation.copied_parts import (
    copied_parts,
    missing_numbers,
    names,
    numbers,
    repeating_share,
    repeats_itself,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1,000.50 or 1.000,50 or 1 000", ["1000.50", "1000.50", "1", "000"]),
        ("1,234,567.89, 1'000, 1\u00a0000, 2.500, 12,34,567", ["1234567.89", "1000", "1000", "2500", "1234567"]),
        (
            "2.5 or 2,5, not 25; 0.125, 1.2.3, 10.30, 31.12.2026",
            ["2.5", "2.5", "25", "0.125", "1.2.3", "10.30", "31.12.2026"],
        ),
        ("١٬٠٠٠ و ३ และ ๔", ["1000", "3", "4"]),  # noqa: RUF001
        ("at 10:30, $1 of %1$s in {0} for <b>5</b>", ["10", "30", "5"]),
        ("1'000'000 x 2", ["1000000", "2"]),
        ("none", []),
    ],
)
def test_numbers(text: str, expected: list[str]) -> None:
    assert numbers(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Open the Wi-Fi settings of Google Chrome. Then restart", ["Wi-Fi", "Google", "Chrome"]),
        ("USB devices, WebKit and iOS: Another", ["USB", "WebKit", "iOS"]),
        ("使用Chrome浏览器和 gzip 压缩", ["Chrome", "gzip"]),
        ("Ο περιηγητής Chrome και η Αθήνα", ["Chrome", "Αθήνα"]),  # noqa: RUF001
        ("Откройте Chrome в Москве", ["Chrome", "Москве"]),
        ("“Quoted” text", []),
        ("A {Name} and %(Name)s", []),
    ],
)
def test_names(text: str, expected: list[str]) -> None:
    assert names(text) == expected


@pytest.mark.parametrize(
    ("source", "translation", "missing"),
    [
        ("250 of 404", "250 von 40", ["404"]),
        ("3 and 3", "3", ["3"]),
        ("2.5 MB", "2,5 Mo", []),
        ("2.5 MB", "25 MB", ["2.5"]),
        ("2.5", "5 2", ["2.5"]),
        ("5 files", "2.5 files", ["5"]),
        ("20", "2026", ["20"]),
        ("at 10:30", "um 10.30 Uhr", []),
        ("12/31/2026", "31.12.2026", []),
        ("31.12.2026", "12/31/2026", []),
        ("1 000 000", "1.000.000", []),
        ("7,500", "7 500", []),
        ("Open {a5} 5", "Öffne {a5}", ["5"]),
    ],
)
def test_missing_numbers(source: str, translation: str, missing: list[str]) -> None:
    assert missing_numbers(source, translation) == missing


def test_what_the_reference_does_not_copy_is_not_asked_for() -> None:
    sources = ["Chrome has 2 tabs for $1 in London", "{name} pays 3 or 3", "nothing"]
    references = ["Chrome hat zwei Tabs für $1 in London", "{name} zahlt 3 oder 3", "nichts"]
    assert copied_parts(sources, references, references) == {
        "numbers": (2, 2), "placeholders": (2, 2), "names": (1, 1)
    }  # fmt: skip
    worse = ["Chrome hat 2 Tabs für $2", "{Name} zahlt 3 3 3", ""]
    assert copied_parts(sources, worse, references) == {"numbers": (2, 2), "placeholders": (2, 0), "names": (1, 0)}
    # digits of another script, and a name inside of a text without spaces
    assert copied_parts(["Use Chrome 12"], ["قم باستخدام Chrome ١٢"], ["استخدم Chrome ١٢"])["numbers"] == (1, 1)
    assert copied_parts(["Get Google Chrome"], ["获取Google Chrome"], ["下载Google Chrome浏览器"])["names"] == (2, 2)


@pytest.mark.parametrize(
    "text",
    [
        "the the the",
        "No more, no more. No more",
        "a b c d e f g h a b c d e f g h a b c d e f g h",
        "我们我们我们",
        "हिन्दी हिन्दी हिन्दी",
        "x the cat the cat the cat y",
        "no no no 5",
    ],
)
def test_repetition(text: str) -> None:
    assert repeats_itself(text)


@pytest.mark.parametrize(
    "text", ["the the", "哈哈哈", "0 0 0 0", "a b c a b c a b d", "", "...", "हिन्दी और हिन्दी", "ha-ha"]
)
def test_no_repetition(text: str) -> None:
    assert not repeats_itself(text)


def test_share_of_texts_that_repeat_themselves() -> None:
    assert repeating_share(["the the the", "the end", "", "no no no"]) == 0.5
