"""Text as sentences and the gaps between them, so that translations can replace the sentences."""

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from .language_codes import has_spaces_between_sentences, parse_language

# Places to cut a sentence that is too long: after a clause, else between words. The white space stays before the cut.
_CLAUSE = re.compile(r"(?<=[,;:،؛，；：、。！？])\s*(?=\S)|(?<=\s[–—-])\s+(?=\S)")  # noqa: RUF001
_WORD = re.compile(r"(?<=\s)(?=\S)")

CountTokens = Callable[[Sequence[str]], list[int]]


@dataclass(frozen=True)
class Segments:
    """A text: `gaps[0]`, `sentences[0]`, `gaps[1]`, ..., `sentences[-1]`, `gaps[-1]`.

    Attributes:
        sentences: texts to translate, without white space at their ends; none is empty.
        gaps: white space and line ends; one more than sentences.
    """

    sentences: tuple[str, ...]
    gaps: tuple[str, ...]

    @classmethod
    def whole(cls, text: str) -> "Segments":
        """The text as one sentence, with any number of lines."""
        return _segments([text])

    def with_parts(self, parts: Sequence["Segments"]) -> "Segments":
        """The same text, with each sentence replaced by its parts."""
        sentences = [sentence for of_sentence in parts for sentence in of_sentence.sentences]
        gaps = [self.gaps[0]]
        for of_sentence, gap in zip(parts, self.gaps[1:], strict=True):
            gaps += [*of_sentence.gaps[1:-1], gap]
        return Segments(tuple(sentences), tuple(gaps))

    def join(self, translations: Sequence[str], tgt_lang: str | None = None) -> str:
        """The text with its sentences replaced by translations.

        Args:
            translations: one for each sentence.
            tgt_lang: their language, if its spaces may differ: Chinese has no space between sentences; languages with
                spaces between words have one.
        """
        return "".join(self.joined(translations, tgt_lang))

    def joined(self, translations: Iterable[str], tgt_lang: str | None = None) -> Iterator[str]:
        """Like `join`, in pieces: each is a sentence with the gap before it; the last also has the gap after it.

        Args:
            translations: may be an iterator, which is read only as far as the next piece needs.
        """
        if not self.gaps[1:]:
            yield self.gaps[0]
            return
        for piece, translation in zip(self.pieces(tgt_lang), translations, strict=True):
            yield piece.gaps[0] + translation + piece.gaps[1]

    def pieces(self, tgt_lang: str | None = None) -> list["Segments"]:
        """One text per sentence, with the spaces that `tgt_lang` has between sentences; see `join`."""
        between = list(self.gaps)
        if tgt_lang is not None and has_spaces_between_sentences(tgt_lang):
            between[1:-1] = [gap or " " for gap in between[1:-1]]
        after = [""] * (len(self.sentences) - 1) + between[-1:]
        return [
            Segments((sentence,), (before, end))
            for sentence, before, end in zip(self.sentences, between[:-1], after[: len(self.sentences)], strict=True)
        ]


def is_installed() -> bool:
    """Whether `split_sentences` can find the ends of sentences."""
    return find_spec("sentencex") is not None


def split_sentences(text: str, language: str | None) -> Segments:
    """The sentences of a text. A line end always ends a sentence, too.

    Args:
        text: any number of lines.
        language: a code of its language in any form (`"de"`, `"deu_Latn"`); `sentencex` finds the ends of sentences by
            the rules of this language. `None` takes each line as one sentence.

    Raises:
        ValueError: sentencex is not installed.
    """
    lines = text.splitlines(keepends=True)
    if language is None:
        return _segments(lines)
    try:
        import sentencex
    except ImportError as error:
        raise ValueError(
            "splitting text into sentences needs sentencex: `pip install sentencex`; or translate each line as one "
            "sentence (split=False)"
        ) from error
    try:
        code = parse_language(language).language
    except ValueError:
        code = "en"  # sentencex does the same for languages without rules
    return _segments(piece for line in lines for piece in (sentencex.segment(code, line) if line.strip() else [line]))


def split_long(sentence: str, max_tokens: int, count_tokens: CountTokens) -> Segments:
    """Split a sentence into parts of at most `max_tokens`, of about equal lengths; nothing is left out.

    Args:
        sentence: a sentence of any length.
        max_tokens: most tokens of a part.
        count_tokens: function that counts the tokens of each text.
    """
    return _segments(_parts(sentence, max_tokens, count_tokens, [_CLAUSE, _WORD]))


def _segments(pieces: Iterable[str]) -> Segments:
    sentences: list[str] = []
    gaps = [""]
    for piece in pieces:
        sentence = piece.strip()
        if not sentence:
            gaps[-1] += piece
            continue
        start = piece.index(sentence)
        gaps[-1] += piece[:start]
        sentences.append(sentence)
        gaps.append(piece[start + len(sentence) :])
    return Segments(tuple(sentences), tuple(gaps))


def _parts(text: str, max_tokens: int, count_tokens: CountTokens, marks: list[re.Pattern[str]]) -> list[str]:
    num_tokens = count_tokens([text])[0]
    if num_tokens <= max_tokens or len(text) < 2:
        return [text]
    if not marks:
        middle = _cut_near(text, len(text) // 2)
        halves = [text[:middle], text[middle:]]
        return [part for half in halves for part in _parts(half, max_tokens, count_tokens, [])]
    pieces = _split_after(text, marks[0])
    lengths = count_tokens(pieces)
    target = num_tokens / math.ceil(num_tokens / max_tokens)
    groups: list[str] = []
    in_group = math.inf
    for piece, length in zip(pieces, lengths, strict=True):
        if in_group + length / 2 > target or in_group + length > max_tokens:
            groups.append("")
            in_group = 0
        groups[-1] += piece
        in_group += length
    if len(groups) == 1:
        return _parts(text, max_tokens, count_tokens, marks[1:])
    return [part for group in groups for part in _parts(group, max_tokens, count_tokens, marks)]


def _split_after(text: str, mark: re.Pattern[str]) -> list[str]:
    ends = [match.end() for match in mark.finditer(text)]
    return [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True) if start < end]


def _cut_near(text: str, index: int) -> int:
    """The first place from `index` on that does not separate a letter from its accents; `index` if there is none."""
    return next((i for i in range(index, len(text)) if not unicodedata.combining(text[i])), index)


__all__ = ["Segments", "is_installed", "split_long", "split_sentences"]
