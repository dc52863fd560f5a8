"""Markers that replace the placeholders and numbers of a sentence."""

import re
from collections.abc import Sequence

from ..evaluation.placeholders import placeholder_spans
from .phrases import Phrase

_MARKER = re.compile(r"\$\d(?!\d)")
_DOLLARS = re.compile(r"\$ ?\d+")
# "404", "10:30", "12/05/2026", "2.5", "1.2.3", "F5", "4K"; none that is read as another number elsewhere ("7,500"), and
# no ordinals ("2nd"); letters of other scripts may follow ("24時間")
_NUMBER_WORD = re.compile(
    r"(?<![A-Za-z0-9_$.,'\u2019\u00a0\u202f:/-])[A-Za-z]*[0-9]+(?:(?:\.[0-9]{1,2})+|(?:[:/-][0-9]+)*)[A-Z]*"
    r"(?![A-Za-z0-9_]|[.,'\u2019\u00a0\u202f:/-][0-9])"
)


class Markers:
    """A sentence with `$1`, `$2`, ... instead of its placeholders, because models copy these more often.

    Args:
        text: text of the sentence.
        phrases: what its translation must have: its placeholders, and terms, whose parts have no markers.
        numbers: whether numbers have markers, too.
    """

    MAX = 9

    def __init__(self, text: str, phrases: Sequence[Phrase], *, numbers: bool = False):
        wanted = {phrase.text for phrase in phrases if not phrase.is_term}
        spans = placeholder_spans(text)
        if numbers:
            of_terms = {word for p in phrases if p.source is not None for word in _NUMBER_WORD.findall(p.source)}
            inside = {place for span in spans for place in range(*span)}
            found = [match.span() for match in _NUMBER_WORD.finditer(text) if match[0] not in of_terms]
            found = [span for span in found if inside.isdisjoint(range(*span))]
            spans = sorted([*spans, *found])
            wanted |= {text[start:end] for start, end in found}
        spans = [(start, end) for start, end in spans if text[start:end] in wanted]
        names = [name for name in dict.fromkeys(text[a:b] for a, b in spans) if not _MARKER.fullmatch(name)]
        free = [mark for number in range(1, self.MAX + 1) if (mark := f"${number}") not in text]
        self._names = dict(zip(free, names, strict=False))
        marks = {name: mark for mark, name in self._names.items()}
        ends = [0, *(end for _, end in spans)]
        between = [text[end:start] for end, (start, _) in zip(ends, spans, strict=False)]
        marked = [marks.get(text[a:b], text[a:b]) for a, b in spans]
        self.text = "".join(part for pair in zip(between, marked, strict=True) for part in pair) + text[ends[-1] :]

    @property
    def is_other(self) -> bool:
        """Whether the sentence with markers differs from the original."""
        return bool(self._names)

    def restored(self, translation: str) -> str:
        """A translation with its markers replaced by the placeholders."""
        return _MARKER.sub(lambda match: self._names.get(match[0], match[0]), translation)


def invented_markers(source: str, translation: str) -> list[str]:
    """Markers and amounts of dollars that a translation has and its source has not: a model takes one for the other."""
    return [found for found in _DOLLARS.findall(translation) if found not in source]


__all__ = ["Markers", "invented_markers"]
