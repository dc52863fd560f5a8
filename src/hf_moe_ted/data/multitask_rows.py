"""Rows of datasets -> examples of tasks.

An example is an input of the collator: a dictionary of `task`, `source`, `target`, `src_lang` and `tgt_lang`. For
denoising, source and target are the same text; the batch adds the noise.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

TRANSLATION = "translation"
DENOISING = "denoising"
TASKS = (TRANSLATION, DENOISING)
PADDING = "padding"  # instead of a task: a row of a batch that is no example
_TEXT_COLUMNS = ("source", "target", "src_lang", "tgt_lang")

Example = dict[str, Any]
Side = tuple[str, str]  # a language and a text in it


class Component(NamedTuple):
    """A component of a mixture: the examples of a task in one direction.

    Attributes:
        task: `"translation"` or `"denoising"`.
        src_lang, tgt_lang: codes of the tokenizer; equal for denoising.
    """

    task: str
    src_lang: str
    tgt_lang: str

    def __str__(self) -> str:
        return f"{self.task} {self.src_lang}-{self.tgt_lang}"

    def example(self, source: str, target: str) -> Example:
        """An example of this component."""
        return {**self._asdict(), "source": source, "target": target}


PADDING_ROW: Example = {"task": PADDING, "source": "", "target": "", "src_lang": "", "tgt_lang": ""}


def examples_of_row(row: Any, task: str, *, both_directions: bool, where: str) -> list[Example]:
    """The examples of a row.

    Args:
        row: for translation the strings `source`, `target`, `src_lang` and `tgt_lang`, or `translation`, a dictionary
            of texts by language, and each language is translated into those after it; for denoising the strings `text`
            and `lang`.
        task: task of the dataset.
        both_directions: whether to translate in the reverse direction, too.
        where: name of the row in errors.

    Raises:
        ValueError: the row has another form.
    """
    directions = directions_of(sides_of_row(row, task, where), task, both_directions=both_directions)
    return [
        Component(task, src_lang, tgt_lang).example(source, target)
        for (src_lang, source), (tgt_lang, target) in directions
    ]


def directions_of(sides: Sequence[Side], task: str, *, both_directions: bool) -> list[tuple[Side, Side]]:
    """Source and target of each example of a row, from its sides."""
    if task == DENOISING:
        return [(side, side) for side in sides]
    forwards = list(combinations(sides, 2))
    return forwards + [(target, source) for source, target in forwards] if both_directions else forwards


def sides_of_row(row: Any, task: str, where: str) -> list[Side]:
    """The language and the text of each side of a row; errors are those of `examples_of_row`."""
    if task == DENOISING:
        if _has_strings(row, ("text", "lang")):
            return [(row["lang"], row["text"])]
        raise ValueError(f"{where} must have the strings text and lang, got {repr(row)[:300]}")
    if _has_strings(row, _TEXT_COLUMNS):
        return [(row["src_lang"], row["source"]), (row["tgt_lang"], row["target"])]
    if isinstance(row, Mapping) and isinstance(texts := row.get("translation"), Mapping) and _has_strings(texts, texts):
        return list(texts.items())
    raise ValueError(
        f"{where} must have the strings {', '.join(_TEXT_COLUMNS)}, or 'translation' with a string for each "
        f"language, got {repr(row)[:300]}"
    )


def sides_of_columns(columns: Mapping[str, list[Any]], task: str) -> list[list[Side]] | None:
    """A column for each side of many rows with one schema; `None` if rows must be read one by one."""
    by_language = columns.get("translation", [None])
    if task == DENOISING:
        sides = [(columns.get("lang", []), columns.get("text", []))]
    elif {*_TEXT_COLUMNS} <= columns.keys():
        sides = [(columns["src_lang"], columns["source"]), (columns["tgt_lang"], columns["target"])]
    elif all(isinstance(texts, Mapping) for texts in by_language):
        sides = [([lang] * len(by_language), [texts[lang] for texts in by_language]) for lang in by_language[0]]
    else:
        return None
    if any({*map(type, column)} != {str} for side in sides for column in side):
        return None
    return [list(zip(langs, texts, strict=True)) for langs, texts in sides]


def _has_strings(row: Any, columns: Any) -> bool:
    return isinstance(row, Mapping) and all(isinstance(row.get(column), str) for column in columns)


def is_empty(source: str, target: str) -> bool:
    """Whether one side has no text."""
    return not (source.strip() and target.strip())


__all__ = [
    *("DENOISING", "TASKS", "TRANSLATION", "Component", "Example", "Side"),
    *("directions_of", "examples_of_row", "is_empty", "sides_of_columns", "sides_of_row"),
]
