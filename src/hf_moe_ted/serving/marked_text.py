"""Text with marks in it, such as `Click <b>Save</b> now`: translated as one, with the marks put back in their places.

A passage is translated whole, and each part of it once more on its own. Where a translation of what marks enclose is
found in that of the whole, in the order of the source, the marks go around it there. Where none is found, the parts are
put together as they were translated on their own: the marks are right, the words less so, and that is reported.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

_WHITE = " \t\n\r\f"
_SPACES = re.compile(f"[{_WHITE}]+")

MAX_PLACED_PIECES = 200  # of a passage; one with more marks is translated in parts

_MIN_SHARE = 0.5  # of the letters of a part that have to be found
_WINDOW_CHARACTERS = 2_000  # in which words that are like those of a part are looked for
_WORD = re.compile(r"\w+")

IN_PARTS = "translated in parts, as its tags have no place in the whole"


@dataclass(frozen=True)
class Piece:
    """
    Attributes:
        raw: as it stands in the source.
        text: what it says; `None` for a mark.
        depth: of the marks around it that began in the passage.
        is_kept: it must not be translated.
    """

    raw: str
    text: str | None = None
    depth: int = 0
    is_kept: bool = False

    @property
    def is_translated(self) -> bool:
        return self.text is not None and not self.is_kept and any(map(str.isalpha, self.text))


class Passage:
    """Pieces that are one text.

    Args:
        pieces: in the order of the source.
        escape: how a translation is written among marks.
        has_lines: whether line ends mean something; otherwise white space is all the same.

    Attributes:
        texts: to translate; the first is the whole. None: there is nothing to translate.
    """

    def __init__(self, pieces: Sequence[Piece], escape: Callable[[str], str], *, has_lines: bool = False):
        says = [index for index, piece in enumerate(pieces) if piece.text is not None and piece.text.strip(_WHITE)]
        first, last = (says[0], says[-1] + 1) if says else (0, 0)
        self._before = "".join(piece.raw for piece in pieces[:first])
        self._after = "".join(piece.raw for piece in pieces[last:])
        self._pieces = list(pieces[first:last])
        self._escape, self._has_lines = escape, has_lines

    @cached_property
    def texts(self) -> list[str]:
        translated = [piece for piece in self._pieces if piece.is_translated]
        if not translated:
            return []
        whole = self._clean("".join(piece.text or "" for piece in self._pieces))
        return [whole] if self._is_plain else [whole, *(self._clean(piece.text or "") for piece in translated)]

    @property
    def source(self) -> str:
        """As it stands in the source."""
        return f"{self._before}{''.join(piece.raw for piece in self._pieces)}{self._after}"

    @property
    def _is_plain(self) -> bool:
        return len(self._pieces) == 1

    def _clean(self, text: str) -> str:
        return (text if self._has_lines else _SPACES.sub(" ", text)).strip(_WHITE)

    def render(self, translations: Sequence[Sequence[str]]) -> tuple[str, bool]:
        """The passage, and whether it is one translation, not put together of parts.

        Args:
            translations: of each of its `texts`, the best first. The others help to find a part in the whole.
        """
        if not self.texts:
            return self.source, True
        if self._is_plain:
            return self._around(self._escape(translations[0][0])), True
        own = iter(translations[1:])
        parts = [next(own) if piece.is_translated else [self._clean(piece.text or "")] for piece in self._pieces]
        placed = self._place(translations[0][0], parts)
        if placed is None:
            return self._around("".join(map(self._alone, self._pieces, (part[0] for part in parts)))), False
        return self._around("".join(placed)), True

    def _around(self, middle: str) -> str:
        """With the white space at both ends of the source."""
        first, last = self._pieces[0].raw, self._pieces[-1].raw
        start = first[: len(first) - len(first.lstrip(_WHITE))]
        return f"{self._before}{start}{middle}{last[len(last.rstrip(_WHITE)) :]}{self._after}"

    def _alone(self, piece: Piece, part: str) -> str:
        """A piece translated on its own, with its white space; that at the ends of the passage comes from `_around`."""
        raw = piece.raw
        if piece.is_translated:
            start, end = raw[: len(raw) - len(raw.lstrip(_WHITE))], raw[len(raw.rstrip(_WHITE)) :]
            raw = f"{start}{self._escape(part)}{end}"
        if piece.text is None:
            return raw
        raw = raw.lstrip(_WHITE) if piece is self._pieces[0] else raw
        return raw.rstrip(_WHITE) if piece is self._pieces[-1] else raw

    def _place(self, whole: str, parts: Sequence[Sequence[str]]) -> list[str] | None:
        """Each piece as it is written in a translated whole, `None` where that cannot be told.

        A piece inside of marks, or one that is kept, is found by its own translation; the others have what is between.
        """
        if len(self._pieces) > MAX_PLACED_PIECES:
            return None
        outermost = min(piece.depth for piece in self._pieces if piece.text is not None)
        placed = [piece.raw for piece in self._pieces]
        start, waiting = 0, None  # where the rest begins, and the piece that has what comes before the next one found
        last = 0
        for index, piece in enumerate(self._pieces):
            is_outside = piece.depth == outermost and not piece.is_kept
            if piece.text is None or (not parts[index][0] and not (is_outside and waiting is None)):
                continue
            last = index
            if is_outside:
                if waiting is not None:
                    return None
                waiting = index
                continue
            found = _find(parts[index], whole, start, is_exact=piece.is_kept)
            between = whole[start : found[0]] if found else ""
            if found is None or (waiting is None and between.strip()):
                return None
            placed[index] = piece.raw.strip(_WHITE) if piece.is_kept else self._escape(whole[slice(*found)])
            if waiting is None:
                placed[index] = between + placed[index]
            else:
                placed[waiting] = self._escape(between)
            start, waiting = found[1], None
        rest = self._escape(whole[start:])
        if waiting is None and any(map(str.isalnum, whole[start:])):
            return None
        placed[last] = rest if waiting is not None else placed[last] + rest
        return placed


def _find(candidates: Sequence[str], whole: str, start: int, *, is_exact: bool) -> tuple[int, int] | None:
    """Where one of several translations of a part stands in a text, from `start` on."""
    for find in (_find_words,) if is_exact else (_find_words, _find_like):
        for candidate in candidates:
            if (found := find(candidate, whole, start)) is not None:
                return found
    return None


def _find_words(part: str, whole: str, start: int) -> tuple[int, int] | None:
    """In any case; only whole words, where words have spaces between them."""
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
    """The words next to each other that are most like those of a part, if they are at least half of it."""
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
    """The same, or the same to the end, which may be another form of the word."""
    differs = [a != b for a, b in zip(word, other, strict=False)]
    num_same = differs.index(True) if True in differs else len(differs)
    return word == other or num_same >= max(4, 0.7 * max(len(word), len(other)))


__all__ = ["IN_PARTS", "Passage", "Piece"]
