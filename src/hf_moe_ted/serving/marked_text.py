"""Text with marks in it, such as `Click <b>Save</b> now`: translated as one, with the marks put back in their places.

A passage is translated whole, and each part that marks enclose once more on its own. Where the translation of a part is
found in that of the whole, in the order of the source, the marks go around it there. Where one is not found, all parts
are translated on their own: the marks are right, the words around them less so, and that is reported.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

_WHITE = " \t\n\r\f"
_SPACES = re.compile(f"[{_WHITE}]+")

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

    def render(self, translations: Sequence[str]) -> tuple[str, bool]:
        """The passage with `translations` of its `texts`, and whether it is in one translation, not in parts."""
        if not self.texts:
            return self.source, True
        if self._is_plain:
            return self._around(self._escape(translations[0])), True
        own = iter(translations[1:])
        parts = [next(own) if piece.is_translated else self._clean(piece.text or "") for piece in self._pieces]
        placed = self._place(translations[0], parts)
        if placed is None:
            return self._around("".join(map(self._alone, self._pieces, parts))), False
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

    def _place(self, whole: str, parts: Sequence[str]) -> list[str] | None:
        """Each piece as it is written in a translated whole, `None` where that cannot be told.

        A piece inside of marks, or one that is kept, is found by its own translation; the others have what is between.
        """
        outermost = min(piece.depth for piece in self._pieces if piece.text is not None)
        placed = [piece.raw for piece in self._pieces]
        start, waiting = 0, None  # where the rest begins, and the piece that has what comes before the next one found
        last = 0
        for index, piece in enumerate(self._pieces):
            is_outside = piece.depth == outermost and not piece.is_kept
            if piece.text is None or (not parts[index] and not (is_outside and waiting is None)):
                continue
            last = index
            if is_outside:
                if waiting is not None:
                    return None
                waiting = index
                continue
            found = _find(parts[index], whole, start)
            between = whole[start : found.start()] if found else ""
            if found is None or (waiting is None and between.strip()):
                return None
            placed[index] = piece.raw.strip(_WHITE) if piece.is_kept else self._escape(found.group())
            if waiting is None:
                placed[index] = between + placed[index]
            else:
                placed[waiting] = self._escape(between)
            start, waiting = found.end(), None
        rest = self._escape(whole[start:])
        if waiting is None and any(map(str.isalnum, whole[start:])):
            return None
        placed[last] = rest if waiting is not None else placed[last] + rest
        return placed


def _find(part: str, whole: str, start: int) -> re.Match[str] | None:
    """Words in a text from `start` on, in any case; only whole words, where words have spaces between them."""
    words = part.strip(_WHITE)
    words = words.rstrip(".,;:!?") or words
    if not words:
        return None
    exact = re.escape(words)
    found = re.compile(rf"(?<!\w){exact}(?!\w)", re.IGNORECASE).search(whole, start)
    if found is None and ord(words[0]) >= 0x0E00:  # Thai, Chinese, Japanese, ...
        found = re.compile(exact, re.IGNORECASE).search(whole, start)
    return found


__all__ = ["IN_PARTS", "Passage", "Piece"]
