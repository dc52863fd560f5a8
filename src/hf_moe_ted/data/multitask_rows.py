"""Rows of datasets -> examples of tasks.

An example is an input of the collator: a dictionary of `task`, `source`, `target`, `src_lang` and `tgt_lang`. For
denoising, source and target are the same text; the batch adds the noise.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, combinations
from types import NoneType
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
            of texts by language, and each language is translated into those after it (`None` is no text); for denoising
            the strings `text` and `lang`.
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
    texts = row.get("translation") if isinstance(row, Mapping) else None
    if isinstance(texts, Mapping) and all(isinstance(text, str | None) for text in texts.values()):
        return _sides_with_text(texts)
    raise ValueError(
        f"{where} must have the strings {', '.join(_TEXT_COLUMNS)}, or 'translation' with a string for each "
        f"language, got {repr(row)[:300]}{_way_out(texts)}"
    )


def _way_out(texts: Any) -> str:
    """The end of an error message: what to do with a row of `datasets.TranslationVariableLanguages`."""
    if not (isinstance(texts, Mapping) and texts.keys() == {"language", "translation"}):
        return ""
    return "; for two lists in 'translation', make a dictionary: dict(zip(texts['language'], texts['translation']))"


def sides_of_columns(columns: Mapping[str, list[Any]], task: str) -> Iterator[Sequence[Side]] | None:
    """What `sides_of_row` gives for each row of a table; `None` if rows must be read one by one.

    It is an iterator because a list of all sides costs the garbage collector more time than reading them.
    """
    by_language = columns.get("translation", [None])
    if task == DENOISING:
        sides = [(columns.get("lang", []), columns.get("text", []))]
    elif {*_TEXT_COLUMNS} <= columns.keys():
        sides = [(columns["src_lang"], columns["source"]), (columns["tgt_lang"], columns["target"])]
    elif all(isinstance(texts, Mapping) for texts in by_language):
        return _sides_by_language(by_language)
    else:
        return None
    if any({*map(type, column)} != {str} for side in sides for column in side):
        return None
    return zip(*(zip(langs, texts, strict=True) for langs, texts in sides), strict=True)


def _sides_by_language(rows: Sequence[Mapping[str, Any]]) -> Iterator[list[Side]] | None:
    """The sides of rows, each with languages of its own: a column of the type `Json` has no common ones."""
    types = {*map(type, chain.from_iterable(texts.values() for texts in rows))}
    if not types <= {str, NoneType}:
        return None
    return map(_sides_with_text, rows) if NoneType in types else (list(texts.items()) for texts in rows)


def _sides_with_text(texts: Mapping[str, str | None]) -> list[Side]:
    return [(lang, text) for lang, text in texts.items() if text is not None]


def _has_strings(row: Any, columns: Any) -> bool:
    return isinstance(row, Mapping) and all(isinstance(row.get(column), str) for column in columns)


def is_empty(source: str, target: str) -> bool:
    """Whether one side has no text."""
    return not (source.strip() and target.strip())


__all__ = [
    *("DENOISING", "TASKS", "TRANSLATION", "Component", "Example", "Side"),
    *("directions_of", "examples_of_row", "is_empty", "sides_of_columns", "sides_of_row"),
]
