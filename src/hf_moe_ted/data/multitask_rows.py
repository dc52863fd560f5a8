"""Rows of datasets -> examples of tasks.

An example is what the collator takes: a dictionary of `task`, `source`, `target`, `src_lang` and `tgt_lang`. Source and
target of denoising are the same text; its noise comes with the batch.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

TRANSLATION = "translation"
DENOISING = "denoising"
TASKS = (TRANSLATION, DENOISING)
_TEXT_COLUMNS = ("source", "target", "src_lang", "tgt_lang")

Example = dict[str, Any]


class Component(NamedTuple):
    """What a mixture draws from: the examples of a task in one direction.

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


def component_of(example: Mapping[str, Any]) -> Component:
    """The component that an example belongs to."""
    return Component(example["task"], example["src_lang"], example["tgt_lang"])


def examples_of_row(row: Any, task: str, *, both_directions: bool, where: str) -> list[Example]:
    """The examples that a row of a dataset makes.

    Args:
        row: for translation the strings `source`, `target`, `src_lang` and `tgt_lang`, or `translation`, a dictionary
            of texts by language, where each language is translated into those after it; for denoising the strings
            `text` and `lang`.
        task: of the dataset.
        both_directions: whether translations go backwards, too.
        where: how an error names the row.

    Raises:
        ValueError: a row of another form.
    """
    if task == DENOISING:
        if _has_strings(row, ("text", "lang")):
            return [Component(task, row["lang"], row["lang"]).example(row["text"], row["text"])]
        raise ValueError(f"{where} must have the strings text and lang, got {repr(row)[:300]}")
    return [
        Component(task, src_lang, tgt_lang).example(source, target)
        for src_lang, source, tgt_lang, target in _translations(row, both_directions, where)
    ]


def _translations(row: Any, both_directions: bool, where: str) -> list[tuple[str, str, str, str]]:
    if _has_strings(row, _TEXT_COLUMNS):
        pairs = [(row["src_lang"], row["source"], row["tgt_lang"], row["target"])]
    elif (
        isinstance(row, Mapping) and isinstance(texts := row.get("translation"), Mapping) and _has_strings(texts, texts)
    ):
        in_order = list(texts.items())
        pairs = [(*first, *second) for place, first in enumerate(in_order) for second in in_order[place + 1 :]]
    else:
        raise ValueError(
            f"{where} must have the strings {', '.join(_TEXT_COLUMNS)}, or 'translation' with a string for each "
            f"language, got {repr(row)[:300]}"
        )
    backwards = [(tgt_lang, target, src_lang, source) for src_lang, source, tgt_lang, target in pairs]
    return pairs + backwards if both_directions else pairs


def _has_strings(row: Any, columns: Any) -> bool:
    return isinstance(row, Mapping) and all(isinstance(row.get(column), str) for column in columns)


def is_empty(example: Example) -> bool:
    """Whether there is no text on one side."""
    return not (example["source"].strip() and example["target"].strip())


__all__ = ["DENOISING", "TASKS", "TRANSLATION", "Component", "Example", "component_of", "examples_of_row", "is_empty"]
