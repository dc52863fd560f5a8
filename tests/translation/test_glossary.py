"""Glossaries: files, where their terms stand in a sentence, and whether a translation has them."""

import sys
from pathlib import Path
from typing import Any

import pytest

from hf_moe_ted import Glossary, GlossaryEntry

FILE = """\ufeffSource\ttarget\r
# names\r
\r
Chrome OS\r
Chrome\t\r
bookmark\tLesezeichen\r
bookmark bar\t Lesezeichenleiste \r
Tab\tTab\r
"""


def found(glossary: Glossary, sentence: str) -> list[tuple[str, str]]:
    terms = glossary.terms_in(sentence)
    assert [sentence[term.start : term.end] for term in terms] == [term.source for term in terms]
    return [(term.source, term.target) for term in terms]


def test_file(tmp_path: Path) -> None:
    path = tmp_path / "terms.tsv"
    path.write_text(FILE, encoding="utf-8", newline="")
    glossary = Glossary.from_file(path)
    assert glossary.entries == (
        GlossaryEntry("Chrome OS"),
        GlossaryEntry("Chrome"),
        GlossaryEntry("bookmark", "Lesezeichen"),
        GlossaryEntry("bookmark bar", "Lesezeichenleiste"),
        GlossaryEntry("Tab", "Tab"),
    )
    assert glossary == Glossary(glossary.entries) and hash(glossary) == hash(Glossary(glossary.entries))
    assert glossary.sha256 == Glossary(glossary.entries[::-1]).sha256 != Glossary(glossary.entries[1:]).sha256


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\tb\nc\td\te\n", "line 2 has 3 columns; a line must be `source<tab>target`, or a source alone: 'c"),
        (b"a\tb\n\tc\n", "line 2 has no source term: '.tc'; write"),
        (b"#\n\na\tb\nA\tc\na\tc\n", "line 5: 'a' has two targets in the glossary, 'b' and 'c'; keep one"),
        (b"a  b\tc\na b\n", "line 2: 'a b' has two targets in the glossary, 'c' and None"),
        (b"a\tb\nc\t\xff\n", "line 2: not UTF-8 at byte 2; save the file as UTF-8"),
        ("a\tb\n".encode("utf-16-be"), "line 1 has a NUL character; save the file as UTF-8"),
    ],
)
def test_wrong_lines(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "terms.tsv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"glossary {path},? {message}"):
        Glossary.from_file(path)


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"glossary .*nowhere.tsv cannot be read: No such file"):
        Glossary.from_file(tmp_path / "nowhere.tsv")
    with pytest.raises(ValueError, match="needs a source term, got ' ' -> 'x'"):
        Glossary([(" ", "x")])
    with pytest.raises(ValueError, match="two targets in the glossary, 'x' and 'y'"):
        Glossary([("straße", "x"), ("strasse", "y")])  # the same in any case: STRASSE


@pytest.mark.parametrize(
    ("sentence", "terms"),
    [
        ("Bookmark the BOOKMARK  Bar!", [("Bookmark", "L"), ("BOOKMARK  Bar", "Ll")]),  # any case, the longest
        ("bookmarks rebookmark bookmark_x book-bookmark", [("bookmark", "L")]),  # whole words
        ("Chrome OS, Chrome, chrome, CHROME", [("Chrome OS", "Chrome OS"), ("Chrome", "Chrome")]),  # as written
        ("docker and Docker", [("docker", "docker"), ("Docker", "Docker")]),  # as the text has it
        ("bookmark bar bar", [("bookmark bar", "Ll"), ("bar", "B")]),  # no overlaps
        ("打开文件夹", [("文件", "file")]),  # no spaces between words
        ("Chromeのタブ", [("Chrome", "Chrome"), ("タブ", "tab")]),
        ("cafe\u0301 and caf\u00e9", [("cafe\u0301", "K"), ("caf\u00e9", "K")]),  # one letter in two forms
        ("हिन्दी हिन्दीय", [("हिन्दी", "Hindi")]),  # vowel signs belong to words
        ("use C++, not C++x", [("C++", "C++"), ("C++", "C++")]),
        ("<bookmark> `bookmark` {bookmark} https://x.org/bookmark", []),  # placeholders
        ("the bookmark", [("bookmark", "L")]),
        ("bookmark", [("bookmark", "L")]),
        ("", []),
    ],
)
def test_terms(sentence: str, terms: list[tuple[str, str]]) -> None:
    glossary = Glossary(
        [
            *[("bookmark", "L"), ("bookmark bar", "Ll"), ("bar", "B"), ("Chrome OS", None), ("Chrome", None)],
            *[
                ("docker", None),
                ("文件", "file"),
                ("タブ", "tab"),
                ("caf\u00e9", "K"),
                ("हिन्दी", "Hindi"),
                ("C++", None),
            ],
            ("the bookmark of all", "x"),
        ]
    )
    assert found(glossary, sentence) == terms


def test_a_term_as_it_is_written_goes_before_one_of_any_case() -> None:
    glossary = Glossary([("apple", "Apfel"), ("Apple", None)])
    assert found(glossary, "an apple, an Apple, an APPLE") == [
        *[("apple", "Apfel"), ("Apple", "Apple"), ("APPLE", "Apfel")]
    ]


@pytest.mark.parametrize(
    ("translation", "missing"),
    [
        ("Signet and onglet: signet", []),  # a capital letter at the start
        ("« Signet » and onglet: signet", []),
        ("signet, Signet, onglet", ["Bookmark"]),  # once more, but not as the glossary has it
        ("signets signet onglet", ["Bookmark"]),
        ("signet signet", ["tab"]),
        ("", ["bookmark", "tab", "Bookmark"]),
    ],
)
def test_missing_terms(translation: str, missing: list[str]) -> None:
    glossary = Glossary([("bookmark", "signet"), ("tab", "onglet")])
    terms = glossary.missing_terms("A bookmark and a tab, a Bookmark", translation)
    assert [term.source for term in terms] == missing


def test_a_large_glossary_takes_as_many_steps_as_a_small_one() -> None:
    sentence = " ".join(f"word{index % 700}" for index in range(2_000))

    def num_steps(num_entries: int) -> int:
        """Lines of Python that a search executes."""
        glossary = Glossary([(f"word{index} word{index + 1}", f"Wort{index}") for index in range(num_entries)])
        assert len(glossary.terms_in(sentence)) > 900
        steps = 0

        def count(frame: Any, event: str, arg: Any) -> Any:
            nonlocal steps
            steps += event == "line"
            return count

        before = sys.gettrace()
        sys.settrace(count)
        try:
            glossary.terms_in(sentence)
        finally:
            sys.settrace(before)
        return steps

    small = num_steps(1_000)
    assert small > 2_000
    assert num_steps(20_000) == small  # a search by entry would take twenty times as many
