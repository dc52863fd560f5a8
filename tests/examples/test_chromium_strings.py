"""The script that reads short strings out of Chromium's files."""

import struct
from pathlib import Path

import pytest
from chromium_strings import catalog, is_short_string, plain, read_pak
from prepare_data import LANGUAGES


def write_pak(path: Path, strings: dict[int, str], aliases: dict[int, int] | None = None, *, encoding: int = 1) -> None:
    """A file of version 5; an alias is the number of a text that another number has."""
    texts = [text.encode("utf-8" if encoding == 1 else "utf-16-le") for text in strings.values()]
    aliases = aliases or {}
    place = 12 + 6 * (len(texts) + 1) + 4 * len(aliases)
    content = struct.pack("<IB3xHH", 5, encoding, len(texts), len(aliases))
    for number, text in zip([*strings, 0], [*texts, b""], strict=True):
        content += struct.pack("<HI", number, place)
        place += len(text)
    numbers = [*strings]
    for alias, number in aliases.items():
        content += struct.pack("<HH", alias, numbers.index(number))
    path.write_bytes(content + b"".join(texts))


@pytest.mark.parametrize("encoding", [1, 2])
def test_strings_and_their_aliases(tmp_path: Path, encoding: int) -> None:
    write_pak(tmp_path / "de.pak", {3: "Öffnen", 7: "", 9: "Ja"}, {12: 9, 5: 3}, encoding=encoding)
    assert read_pak(tmp_path / "de.pak") == {3: "Öffnen", 7: "", 9: "Ja", 12: "Ja", 5: "Öffnen"}


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"de\.pak does not exist.*chromium-l10n"):
        read_pak(tmp_path / "de.pak")
    for content in (b"", b"\x04\x00\x00\x00" + bytes(20)):
        (tmp_path / "de.pak").write_bytes(content)
        with pytest.raises(ValueError, match=r"de\.pak is no \.pak file of version 5 with text, but has version"):
            read_pak(tmp_path / "de.pak")


@pytest.mark.parametrize(
    ("text", "shown"),
    [("&File", "File"), ("文件(&F)", "文件"), ("A &amp;&amp; B", "A & B"), (" two\n words ", "two words")],
)
def test_marks_of_keys_are_not_shown(text: str, shown: str) -> None:
    assert plain(text) == shown


@pytest.mark.parametrize(
    ("english", "target", "lang", "is_short"),
    [
        ("Close", "Schließen", "de", True),
        ("New folder", "新しいフォルダ", "ja", True),
        ("OK", "OK", "ja", True),
        ("Close all tabs", "Alle Tabs schließen", "de", False),
        ("Open $1", "$1 öffnen", "de", False),
        ("tab, tabs", "Tab, Tabs", "de", False),
        ("PDF", "ПДФ", "ru", False),
        ("Envelope C4", "Конверт C4", "ru", False),
        ("Settings", "Settings page", "ru", False),
        ("", "", "de", False),
    ],
)
def test_what_is_a_short_string(english: str, target: str, lang: str, is_short: bool) -> None:
    assert is_short_string(english, target, lang) is is_short


def test_catalog(tmp_path: Path) -> None:
    """The most frequent translation, and equal ones if few languages have them."""
    english = {1: "&Open", 2: "Open", 3: "Open", 4: "Bluetooth", 5: "Tab", 6: "One two three"}
    write_pak(tmp_path / "en-US.pak", english)
    for lang in LANGUAGES:
        write_pak(tmp_path / f"{'zh-CN' if lang == 'zh' else lang}.pak", {4: "Bluetooth"})
    write_pak(tmp_path / "de.pak", {1: "Offen", 2: "&Öffnen", 4: "Bluetooth", 5: "Tab", 6: "Eins zwei drei"}, {3: 2})
    write_pak(tmp_path / "zh-CN.pak", {1: "打开(&O)", 9: "没有"})
    assert [tuple(pair) for pair in catalog(tmp_path)] == [
        ("de", "Open", "Öffnen"),
        ("de", "Tab", "Tab"),
        ("zh", "Open", "打开"),
    ]
