"""Text with marks, such as `Click <b>Save</b> now`: translated as a whole, with the marks restored.

A passage is translated as a whole, and each part is translated separately, too. If the translation of a marked part is
found in that of the whole, in the order of the source, the marks go around it there. Otherwise the separately
translated parts are joined: the marks are right, the words less so, and a problem is reported.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

_WHITE = " \t\n\r\f"
_SPACES = re.compile(f"[{_WHITE}]+")

MAX_PLACED_PIECES = 200  # most marks of a passage; a passage with more is translated in parts

_MIN_SHARE = 0.5  # of the letters of a part that have to be found
_WINDOW_CHARACTERS = 2_000  # in which words that are like those of a part are looked for
_WORD = re.compile(r"\w+")

IN_PARTS = "translated in parts, because its tags have no clear place in the whole"


@dataclass(frozen=True)
class Piece:
    """
    Attributes:
        raw: as it stands in the source.
        text: its text; `None` for a mark.
        depth: number of open marks around it that began in the passage; for a mark, after it.
        is_kept: it must not be translated.
    """

    raw: str
    text: str | None = None
    depth: int = 0
    is_kept: bool = False

    @property
    def says_something(self) -> bool:
        return self.text is not None and not _is_white(self.text)

    @property
    def is_translated(self) -> bool:
        return self.text is not None and not self.is_kept and any(map(str.isalpha, self.text))

    @property
    def white_start(self) -> str:
        return self.raw[: len(self.raw) - len(self.raw.lstrip(_WHITE))]

    @property
    def white_end(self) -> str:
        return self.raw[len(self.raw.rstrip(_WHITE)) :]


class Passage:
    """Pieces that are one text.

    Args:
        pieces: in the order of the source.
        escape: function that escapes a translation between marks.
        has_lines: whether line ends have a meaning; otherwise all white space is equal.

    Attributes:
        texts: texts to translate. If several pieces have text, the first is the whole passage. Empty if there is no
            text.
    """

    def __init__(self, pieces: Sequence[Piece], escape: Callable[[str], str], *, has_lines: bool = False):
        self._pieces, self._escape, self._has_lines = list(pieces), escape, has_lines
        self._has_whole = sum(piece.says_something for piece in pieces) > 1

    @cached_property
    def texts(self) -> list[str]:
        translated = [self._clean(piece.text or "") for piece in self._pieces if piece.is_translated]
        whole = self._clean("".join(piece.text or "" for piece in self._pieces))
        return [whole, *translated] if translated and self._has_whole else translated

    def render(self, translations: Sequence[Sequence[str]]) -> tuple[str, bool]:
        """The passage, and whether it is a translation of the whole and not joined from parts.

        Args:
            translations: translations of each of its `texts`, the best first. The others help to find a part in the
                whole.
        """
        is_whole = self._has_whole and bool(self.texts)
        own = iter(translations[1:] if is_whole else translations)
        parts = [next(own) if piece.is_translated else [self._clean(piece.text or "")] for piece in self._pieces]
        if is_whole and len(parts) <= MAX_PLACED_PIECES:
            placed = _Placing(self._pieces, translations[0][0], self._escape).written(parts)
            if placed is not None:
                return placed, True
        return "".join(map(self._alone, self._pieces, (part[0] for part in parts))), not is_whole

    def _clean(self, text: str) -> str:
        return (text if self._has_lines else _SPACES.sub(" ", text)).strip(_WHITE)

    def _alone(self, piece: Piece, part: str) -> str:
        if not piece.is_translated:
            return piece.raw
        return f"{piece.white_start}{self._escape(part)}{piece.white_end}"


class _Placing:
    """Places the marks of a source in the translation of the whole.

    Text inside of marks, and kept text, is found by its own translation. Text between such parts goes to the unmarked
    text at that place in the source; if there is none, to a place where marks have ended or not yet begun.
    """

    def __init__(self, pieces: Sequence[Piece], whole: str, escape: Callable[[str], str]):
        says = [index for index, piece in enumerate(pieces) if piece.says_something]
        self._pieces, self._whole, self._escape = pieces, whole, escape
        self._first, self._last = says[0], says[-1]
        self._outermost = min(pieces[index].depth for index in says)
        self._written = [piece.raw for piece in pieces]
        self._head = ""  # before all pieces
        self._start = 0  # of what has no place yet
        self._holder = -1 if self._outermost == 0 else None  # the piece that gets what is between; -1: the head
        self._holder_is_text = False

    def written(self, parts: Sequence[Sequence[str]]) -> str | None:
        """The whole with its marks; `None` if their places are not clear."""
        for index, piece in enumerate(self._pieces):
            if not piece.says_something:
                self._pass(index, piece)
            elif not (self._begin(index) if self._is_outside(piece) else self._find(index, piece, parts[index])):
                return None
        rest = self._whole[self._start :]
        if self._holder is None and any(map(str.isalnum, rest)):
            return None
        self._put(rest, self._last if self._holder is None else self._holder)
        self._written[self._last] += self._pieces[self._last].white_end
        return self._head + "".join(self._written)

    def _is_outside(self, piece: Piece) -> bool:
        return piece.depth == self._outermost and not piece.is_kept

    def _put(self, text: str, index: int) -> None:
        if index < 0:
            self._head += self._escape(text)
        else:
            self._written[index] += self._escape(text)

    def _pass(self, index: int, piece: Piece) -> None:
        """Handle a mark or white space; white space between texts comes with the translation."""
        is_between = self._first < index < self._last
        if piece.text is not None and is_between:
            self._written[index] = ""
        is_start = piece.text is not None and index < self._first and not self._holder_is_text
        if piece.depth == self._outermost and (self._holder is None or is_start):
            self._holder = index

    def _begin(self, index: int) -> bool:
        """Handle text outside of marks: it gets everything before the next piece that is found."""
        if self._holder_is_text:
            return False
        self._holder, self._holder_is_text = index, True
        self._written[index] = self._pieces[index].white_start if index == self._first else ""
        return True

    def _find(self, index: int, piece: Piece, candidates: Sequence[str]) -> bool:
        """Handle text inside of marks, or kept text."""
        found = _find(candidates, self._whole, self._start, is_exact=piece.is_kept)
        if found is None:
            return False
        between = self._whole[self._start : found[0]]
        if self._holder is None and between.strip():
            return False
        self._written[index] = piece.white_start if index == self._first else ""
        self._put(between, index if self._holder is None else self._holder)
        self._written[index] += piece.raw.strip(_WHITE) if piece.is_kept else self._escape(self._whole[slice(*found)])
        self._start = found[1]
        self._holder, self._holder_is_text = (index if piece.depth == self._outermost else None), False
        return True


def _is_white(text: str) -> bool:
    return not text.strip(_WHITE)


def _find(candidates: Sequence[str], whole: str, start: int, *, is_exact: bool) -> tuple[int, int] | None:
    """The place of one of several translations of a part in a text, from `start` on."""
    for find in (_find_words,) if is_exact else (_find_words, _find_like):
        for candidate in candidates:
            if (found := find(candidate, whole, start)) is not None:
                return found
    return None


def _find_words(part: str, whole: str, start: int) -> tuple[int, int] | None:
    """Find words in any case; only whole words, if the script has spaces between words."""
    words = part.strip(_WHITE)
    words = words.rstrip(".,;:!?") or words
    if not words:
        return None
    exact = re.escape(words)
    found = re.compile(rf"(?<!\w){exact}(?!\w)", re.IGNORECASE).search(whole, start)
    if found is None and ord(words[0]) >= 0x0E00:  # Thai, Chinese, Japanese, ...
        found = re.compile(exact, re.IGNORECASE).search(whole, start)
    return None if found is None else found.span()


def _find_like(part: str, whole: str, start: int) -> tuple[int, int] | None:
    """The consecutive words most similar to those of a part, if they match at least half of it."""
    wanted = [word.casefold() for word in _WORD.findall(part)]
    best, best_share, run = None, _MIN_SHARE, 0
    first = end = start
    for word in _WORD.finditer(whole, start, start + _WINDOW_CHARACTERS):
        if not any(_is_like(word.group().casefold(), other) for other in wanted):
            run = 0
            continue
        if run == 0 or not whole[end : word.start()].isspace():
            first, run = word.start(), 0
        end, run = word.end(), run + len(word.group())
        share = run / sum(map(len, wanted))
        if share >= best_share and (best is None or share > best_share):
            best, best_share = (first, end), share
    return best


def _is_like(word: str, other: str) -> bool:
    """Whether words are equal, or equal except at the end, which may be another form of the word."""
    differs = [a != b for a, b in zip(word, other, strict=False)]
    num_same = differs.index(True) if True in differs else len(differs)
    return word == other or num_same >= max(4, 0.7 * max(len(word), len(other)))


__all__ = ["IN_PARTS", "Passage", "Piece"]
