"""Markers that replace the placeholders and numbers of a sentence."""

import re

from ..evaluation.placeholders import placeholder_spans

_MARKER = re.compile(r"\$\d(?!\d)")
# "404", "10:30", "12/05/2026", "F5", "4K"; none with a separator, which languages write in their own way ("7,500"), and
# no ordinals ("2nd"); letters of other scripts may follow ("24時間")
_NUMBER_WORD = re.compile(
    r"(?<![A-Za-z0-9_$.,'\u2019\u00a0\u202f:/-])[A-Za-z]*[0-9]+(?:[:/-][0-9]+)*[A-Z]*"
    r"(?![A-Za-z0-9_]|[.,'\u2019\u00a0\u202f:/-][0-9])"
)


class Markers:
    """A sentence with `$1`, `$2`, ... instead of its placeholders, because models copy these more often.

    Args:
        text: text of the sentence.
        numbers: whether numbers have markers, too.
    """

    MAX = 9

    def __init__(self, text: str, *, numbers: bool = False):
        spans = placeholder_spans(text)
        if numbers:
            found = [match.span() for match in _NUMBER_WORD.finditer(text)]
            spans = sorted([*spans, *(span for span in found if not any(_overlap(span, other) for other in spans))])
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


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] < other[1] and other[0] < one[1]


__all__ = ["Markers"]
