"""Glossaries: required translations of terms, and terms that are not translated."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..evaluation.placeholders import placeholder_spans
from .words import count_phrase, split_words, words_with_spans

HEADER = ("source", "target")
MAX_TERM_CHARACTERS = 500  # longest term or translation


@dataclass(frozen=True)
class GlossaryEntry:
    """
    Attributes:
        source: a term of one or more words. A term without capital letters is found in any case; other terms only as
            they are written.
        target: its translation, in the form that translations must have. `None` if it is not translated: then
            translations copy it from the text.
    """

    source: str
    target: str | None = None


@dataclass(frozen=True)
class TermOccurrence:
    """
    Attributes:
        start, end: place of the term in its sentence, in characters.
        source: the term as it is written there.
        target: text that the translation must have.
        is_any_case: whether the entry is written without capital letters.
    """

    start: int
    end: int
    source: str
    target: str
    is_any_case: bool


@dataclass(frozen=True)
class Glossary:
    """The entries of a glossary, each source once.

    Raises:
        ValueError: an entry without a source, with a blank target, or longer than `MAX_TERM_CHARACTERS`; or two entries
            with the same source and different targets.
    """

    entries: tuple[GlossaryEntry, ...]

    def __init__(self, entries: Iterable[GlossaryEntry | tuple[str, str | None]]):
        pairs = (entry if isinstance(entry, GlossaryEntry) else GlossaryEntry(*entry) for entry in entries)
        found: dict[tuple[str, ...], GlossaryEntry] = {}
        for entry in pairs:
            _add(found, entry, "")
        object.__setattr__(self, "entries", tuple(found.values()))

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "Glossary":
        """Read a UTF-8 file with a term per line: source, a tab, target. A line with only a source is a term that is
        not translated. Blank lines, lines that start with `#`, and a first line `source<tab>target` are skipped.

        Raises:
            ValueError: the file cannot be read, or a line is wrong; the message gives its number and the fix.
        """
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise ValueError(f"glossary {path} cannot be read: {error.strerror}") from error
        found: dict[tuple[str, ...], GlossaryEntry] = {}
        for number, entry in _entries(content, f"glossary {path}"):
            _add(found, entry, f"glossary {path}, line {number}: ")
        return cls(found.values())

    def terms_in(self, sentence: str) -> list[TermOccurrence]:
        """The terms of a sentence, in order.

        Terms start and end at word boundaries; in scripts without spaces, anywhere. The longest term at a place counts,
        and terms do not overlap. Text inside a placeholder (`<file>`) is no term. Time is linear in the length of the
        sentence, for any size of the glossary.
        """
        placeholders = placeholder_spans(sentence)
        words, spans = words_with_spans(sentence)
        folded = [word.casefold() for word in words]
        occurrences, index = [], 0
        while index < len(words):
            length, entry = self._longest(words, folded, index)
            start, end = spans[index][0], spans[index + length - 1][1]
            if entry is not None and not any(_is_inside((start, end), span) for span in placeholders):
                source = sentence[start:end]
                target = source if entry.target is None else entry.target
                occurrences.append(TermOccurrence(start, end, source, target, _is_any_case(entry.source)))
            index += length
        return occurrences

    def missing_terms(self, sentence: str, translation: str) -> list[TermOccurrence]:
        """The terms of a sentence that a translation lacks, in the form of the glossary, or has less often."""
        missing = []
        num_wanted: Counter[str] = Counter()
        for term in self.terms_in(sentence):
            num_wanted[term.target] += 1
            found = count_phrase(term.target, translation, may_be_capitalized=term.is_any_case)
            if found < num_wanted[term.target]:
                missing.append(term)
        return missing

    def _longest(self, words: list[str], folded: list[str], index: int) -> tuple[int, GlossaryEntry | None]:
        """The longest entry at a place, and its number of words; exact case comes before any case."""
        for length in self._lengths.get(folded[index], ()):
            if index + length <= len(words):
                for here in (words, folded):
                    if (entry := self._by_words.get(tuple(here[index : index + length]))) is not None:
                        return length, entry
        return 1, None

    @cached_property
    def _by_words(self) -> dict[tuple[str, ...], GlossaryEntry]:
        return {_key(entry.source): entry for entry in self.entries}

    @cached_property
    def _lengths(self) -> dict[str, list[int]]:
        """First word of terms, in lower case -> numbers of words of such terms, the largest first."""
        lengths: dict[str, set[int]] = {}
        for words in self._by_words:
            lengths.setdefault(words[0].casefold(), set()).add(len(words))
        return {word: sorted(of_word, reverse=True) for word, of_word in lengths.items()}

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the entries, independent of their order."""
        lines = sorted(f"{entry.source}\t{'' if entry.target is None else entry.target}" for entry in self.entries)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _is_inside(span: tuple[int, int], other: tuple[int, int]) -> bool:
    return other[0] <= span[0] and span[1] <= other[1] and span != other


def _is_any_case(source: str) -> bool:
    return source == source.lower()


def _key(source: str) -> tuple[str, ...]:
    """The words by which a term is found; terms with and without capital letters never have the same key."""
    words = split_words(source)
    return tuple(word.casefold() for word in words) if _is_any_case(source) else words


def _add(found: dict[tuple[str, ...], GlossaryEntry], entry: GlossaryEntry, where: str) -> None:
    if not entry.source.strip():
        raise ValueError(f"{where}a glossary entry needs a source term, got {entry.source!r} -> {entry.target!r}")
    if entry.target is not None and not entry.target.strip():
        raise ValueError(
            f"{where}the target of {entry.source!r} in the glossary is blank; use None for a term that is not "
            "translated"
        )
    if max(len(entry.source), len(entry.target or "")) > MAX_TERM_CHARACTERS:
        raise ValueError(
            f"{where}{entry.source[:40]!r} or its target has more than {MAX_TERM_CHARACTERS} characters; shorten it, "
            "a glossary is for terms"
        )
    other = found.setdefault(_key(entry.source), entry)
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
        raise ValueError(f"{where}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error
    if "\0" in text:
        raise ValueError(f"{where} has a NUL character; save the file as UTF-8 (not UTF-16), without it")
    cells = [cell.strip() for cell in text.split("\t")]
    if len(cells) > 2:
        raise ValueError(
            f"{where} has {len(cells)} columns; a line must be `source<tab>target`, or a source alone: {text!r}"
        )
    if not cells[0]:
        raise ValueError(f"{where} has no source term: {text!r}; write `source<tab>target`")
    return cells


__all__ = ["Glossary", "GlossaryEntry", "TermOccurrence"]
