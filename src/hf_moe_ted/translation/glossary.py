"""Glossaries: how terms are to be translated, and which are not."""

import hashlib
import os
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import regex

# Characters of words, where words have ends that can be seen: not in the scripts that write no spaces between them.
_SCRIPTS_WITHOUT_SPACES = r"\p{Han}\p{Hiragana}\p{Katakana}ー\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
_WORD = regex.compile(rf"(?V1)[[\p{{L}}\p{{M}}\p{{N}}_\u200C\u200D]--[{_SCRIPTS_WITHOUT_SPACES}]]+")
_TOKEN = regex.compile(rf"{_WORD.pattern}|\s+|.", flags=regex.DOTALL)

HEADER = ("source", "target")


@dataclass(frozen=True)
class GlossaryEntry:
    """
    Attributes:
        source: a term of one or more words. Written without capital letters it is found in any case, otherwise as it
            is written.
        target: its translation, in the form that translations are to have; `None` if it is not translated: then
            translations have it as the text does.
    """

    source: str
    target: str | None = None


@dataclass(frozen=True)
class TermOccurrence:
    """
    Attributes:
        start, end: of the term in its sentence, in characters.
        source: as it stands there.
        target: what the translation has to have.
        is_any_case: whether the entry is written without capital letters.
    """

    start: int
    end: int
    source: str
    target: str
    is_any_case: bool


@dataclass(frozen=True)
class Glossary:
    """Entries, each source once.

    Raises:
        ValueError: an entry without a source, or two of the same source with different targets.
    """

    entries: tuple[GlossaryEntry, ...]

    def __init__(self, entries: Iterable[GlossaryEntry | tuple[str, str | None]]):
        pairs = (entry if isinstance(entry, GlossaryEntry) else GlossaryEntry(*entry) for entry in entries)
        found: dict[str, GlossaryEntry] = {}
        for entry in pairs:
            _add(found, entry, "")
        object.__setattr__(self, "entries", tuple(found.values()))

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "Glossary":
        """
        A file of UTF-8, a term a line: source, a tab, target. A line with a source alone is a term that is not
        translated. Blank lines, lines that start with `#`, and a first line `source<tab>target` are skipped.

        Raises:
            ValueError: the file cannot be read, or a line is wrong: its number, and what to do.
        """
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise ValueError(f"glossary {path} cannot be read: {error.strerror}") from error
        found: dict[str, GlossaryEntry] = {}
        for number, entry in _entries(content, f"glossary {path}"):
            _add(found, entry, f"glossary {path}, line {number}: ")
        return cls(found.values())

    def terms_in(self, sentence: str) -> list[TermOccurrence]:
        """The terms of a sentence, in its order. They start and end where words do, the longest at a place counts, and
        none overlap. In scripts without spaces between words a term stands anywhere. The time is linear in the
        length of the sentence, whatever the size of the glossary."""
        places = [(match[0], match.start(), match.end()) for match in _TOKEN.finditer(sentence)]
        tokens = [_normalized(token) for token, _, _ in places]
        folded = [token.casefold() for token in tokens]
        occurrences, index = [], 0
        while index < len(tokens):
            length, entry = self._longest(tokens, folded, index)
            if entry is not None:
                start, end = places[index][1], places[index + length - 1][2]
                source = sentence[start:end]
                target = source if entry.target is None else entry.target
                occurrences.append(TermOccurrence(start, end, source, target, _is_any_case(entry.source)))
            index += length
        return occurrences

    def _longest(self, tokens: list[str], folded: list[str], index: int) -> tuple[int, GlossaryEntry | None]:
        for length in self._lengths.get(folded[index], ()):
            for words, is_any_case in ((tokens, False), (folded, True)):
                entry = self._by_tokens.get((is_any_case, *words[index : index + length]))
                if entry is not None and index + length <= len(tokens):
                    return length, entry
        return 1, None

    @cached_property
    def _by_tokens(self) -> dict[tuple[bool | str, ...], GlossaryEntry]:
        return {(_is_any_case(entry.source), *split_words(entry.source)): entry for entry in self.entries}

    @cached_property
    def _lengths(self) -> dict[str, list[int]]:
        """Of the first words of terms in lower case: how many words such terms have, the most first."""
        lengths: dict[str, set[int]] = {}
        for _, *words in self._by_tokens:
            lengths.setdefault(str(words[0]).casefold(), set()).add(len(words))
        return {word: sorted(of_word, reverse=True) for word, of_word in lengths.items()}

    @cached_property
    def sha256(self) -> str:
        """Of its entries, in any order."""
        lines = sorted(f"{entry.source}\t{'' if entry.target is None else entry.target}" for entry in self.entries)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def split_words(text: str) -> tuple[str, ...]:
    """Words, and each character between them; white space of any kind is one space, letters are normalized to NFC."""
    return tuple(_normalized(token) for token in _TOKEN.findall(text))


def count_phrase(phrase: str, text: str, *, may_be_capitalized: bool = False) -> int:
    """How often a text has a phrase as whole words.

    Args:
        may_be_capitalized: whether the phrase may have a capital letter at the start of the text.
    """
    wanted = split_words(phrase)
    if wanted[0].casefold() not in unicodedata.normalize("NFC", text).casefold():
        return 0  # much faster
    words = split_words(text)
    first = next((index for index, word in enumerate(words) if _is_word(word)), 0)
    capital = split_words(capitalized(phrase)) if may_be_capitalized else wanted
    count, index = 0, 0
    while index + len(wanted) <= len(words):
        here = words[index : index + len(wanted)]
        is_here = here == wanted or (index == first and here == capital)
        count += is_here
        index += len(wanted) if is_here else 1
    return count


def capitalized(text: str) -> str:
    """With its first letter upper case; the others stay."""
    return text[:1].upper() + text[1:]


def starts_in_word(text: str) -> bool:
    """Whether a word that stands before the text would go on with it."""
    return _WORD.match(text) is not None


def ends_in_word(text: str) -> bool:
    """Whether a word that stands after the text would go on from it."""
    return text != "" and _WORD.match(text[-1]) is not None


def _is_word(token: str) -> bool:
    return any(map(str.isalnum, token))


def _normalized(token: str) -> str:
    return " " if token.isspace() else unicodedata.normalize("NFC", token)


def _is_any_case(source: str) -> bool:
    return source == source.lower()


def _add(found: dict[str, GlossaryEntry], entry: GlossaryEntry, where: str) -> None:
    source = "".join(split_words(entry.source))
    source = source.casefold() if _is_any_case(source) else source
    if not source.strip():
        raise ValueError(f"{where}a glossary entry needs a source term, got {entry.source!r} -> {entry.target!r}")
    other = found.setdefault(source, entry)
    if other.target != entry.target:
        raise ValueError(
            f"{where}{entry.source!r} has two targets in the glossary, {other.target!r} and {entry.target!r}; keep one"
        )


def _entries(content: bytes, where: str) -> Iterator[tuple[int, GlossaryEntry]]:
    is_first = True
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        if not line.strip() or line.startswith(b"#"):
            continue
        cells = _cells(line, f"{where}, line {number}")
        is_header = is_first and tuple(map(str.casefold, cells)) == HEADER
        is_first = False
        if not is_header:
            yield number, GlossaryEntry(cells[0], (cells[1] or None) if len(cells) == 2 else None)


def _cells(line: bytes, where: str) -> list[str]:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: no UTF-8 at byte {error.start}; save the file as UTF-8") from error
    if "\0" in text:
        raise ValueError(f"{where} has a NUL character; save the file as UTF-8 (not UTF-16), without it")
    cells = [cell.strip() for cell in text.split("\t")]
    if len(cells) > 2:
        raise ValueError(f"{where} has {len(cells)} columns; a line is `source<tab>target`, or a source alone: {text!r}")
    if not cells[0]:
        raise ValueError(f"{where} has no source term: {text!r}; write `source<tab>target`")
    return cells


__all__ = ["Glossary", "GlossaryEntry", "TermOccurrence", "capitalized", "count_phrase", "ends_in_word",
           "split_words", "starts_in_word"]
