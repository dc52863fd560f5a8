"""Markers that replace the placeholders of a sentence."""

import re

from ..evaluation.placeholders import placeholders, replace_placeholders

_MARKER = re.compile(r"\$\d(?!\d)")


class Markers:
    """A sentence with `$1`, `$2`, ... instead of its placeholders, because models copy these more often.

    Args:
        text: text of the sentence.
    """

    MAX = 9

    def __init__(self, text: str):
        names = [name for name in dict.fromkeys(placeholders(text)) if not _MARKER.fullmatch(name)]
        free = [mark for number in range(1, self.MAX + 1) if (mark := f"${number}") not in text]
        self._names = dict(zip(free, names, strict=False))
        marks = {name: mark for mark, name in self._names.items()}
        self.text = replace_placeholders(text, lambda name: marks.get(name, name))

    @property
    def is_other(self) -> bool:
        """Whether the sentence with markers differs from the original."""
        return bool(self._names)

    def restored(self, translation: str) -> str:
        """A translation with its markers replaced by the placeholders."""
        return _MARKER.sub(lambda match: self._names.get(match[0], match[0]), translation)


__all__ = ["Markers"]
