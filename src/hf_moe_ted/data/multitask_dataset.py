"""MultitaskDataset: the examples of all tasks from map-style datasets, by number."""

import operator
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset
from transformers.utils import logging

from .multitask_rows import (
    DENOISING,
    PADDING_ROW,
    TRANSLATION,
    Component,
    Example,
    Side,
    directions_of,
    examples_of_row,
    is_empty,
    sides_of_columns,
    sides_of_row,
)
from .progress import progress_bar

logger = logging.get_logger(__name__)

_CHUNK = 1000  # number of table rows that are read at once


class Draw(NamedTuple):
    """An example that a sampler has drawn.

    Attributes:
        example: its number in the [`MultitaskDataset`]; `None` for a row of padding that fills a batch.
        noise_seed: seed of its noise in this draw.
        padded_lengths: tokens to which source and target of its batch are padded, if the sampler sets them.
    """

    example: int | None
    noise_seed: int
    padded_lengths: tuple[int, int] | None = None


class MultitaskDataset(Dataset):
    """Translation and denoising examples from map-style datasets: [`datasets.Dataset`] or any sequence of rows.

    A row of a dataset makes one example, or several with `both_directions` or more than two languages. Examples without
    text on one side are left out; a warning gives their number.

    Args:
        translation: rows with the strings `source`, `target`, `src_lang` and `tgt_lang`, or with `translation`, a
            dictionary of texts by language. Rows may have different languages; `None` is a language without text.
        denoising: rows with the strings `text` and `lang`.
        both_directions: whether a pair is translated in both directions.
        languages: codes of the languages to keep; by default all.

    Raises:
        ValueError: there is no dataset, a row has another form, there is no example, or a language has none.

    Example:

    ```python
    >>> dataset = MultitaskDataset(translation=load_dataset("opus100", "de-en", split="train"), both_directions=True)
    >>> dataset[0]
    {'task': 'translation', 'src_lang': 'de', 'tgt_lang': 'en', 'source': ..., 'target': ..., 'noise_seed': 0}
    ```
    """

    def __init__(
        self,
        translation: Sequence[Any] | None = None,
        denoising: Sequence[Any] | None = None,
        *,
        both_directions: bool = False,
        languages: Iterable[str] | None = None,
    ):
        self.both_directions = both_directions
        self.epoch = 0
        self._datasets = {TRANSLATION: translation, DENOISING: denoising}
        if translation is None and denoising is None:
            raise ValueError("give at least one of translation and denoising")
        self._read(None if languages is None else list(languages))

    def _read(self, languages: list[str] | None) -> None:
        numbers: dict[Component, int] = {}
        unwanted: set[Component] = set()
        num_empty = 0
        rows, places, components = array("Q"), array("I"), array("I")
        for row, place, component in self._components_of_examples():
            if component is None:
                num_empty += 1
            elif languages is not None and not {component.src_lang, component.tgt_lang} <= {*languages}:
                unwanted.add(component)
            else:
                rows.append(row)
                places.append(place)
                components.append(numbers.setdefault(component, len(numbers)))
        if num_empty:
            logger.warning(f"{num_empty} examples without text on one side are left out")
        in_use = _languages_of(numbers)
        if missing := [lang for lang in languages or () if lang not in in_use]:
            raise ValueError(
                f"there is no example in {missing} with the other languages of {languages}; there is text in "
                f"{sorted(in_use | _languages_of(unwanted))}"
            )
        if not rows:
            raise ValueError(f"no example in {' and '.join(t for t, d in self._datasets.items() if d is not None)}")
        self.components = list(numbers)
        self._row, self._place, self.component_numbers = map(_compact, (rows, places, components))

    def _components_of_examples(self) -> Iterator[tuple[int, int, Component | None]]:
        """Row, place among the row's examples, and component of each example; `None` if a side has no text."""
        for task, dataset in self._datasets.items():
            sides_of_rows = progress_bar(_sides_of_rows(dataset, task), desc=f"Reading {task}", total=_length(dataset))
            for row, sides in enumerate(sides_of_rows):
                directions = directions_of(sides, task, both_directions=self.both_directions)
                for place, ((src_lang, source), (tgt_lang, target)) in enumerate(directions):
                    component = Component(task, src_lang, tgt_lang)
                    yield row, place, None if is_empty(source, target) else component

    def _examples(self, task: str, row_number: int, row: Any) -> list[Example]:
        return examples_of_row(row, task, both_directions=self.both_directions, where=_where(row_number, task))

    def __len__(self) -> int:
        return len(self._row)

    @property
    def sizes(self) -> np.ndarray:
        """int64[num_components], number of examples of each of `components`."""
        return np.bincount(self.component_numbers, minlength=len(self.components))

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; Accelerate's data loaders call it, and samplers read it."""
        self.epoch = epoch

    def __getitem__(self, index: Any) -> Any:
        """The example of a number (a negative one counts from the end) or of a [`Draw`]; for a slice a list.

        Raises:
            IndexError: there is no example of this number.
            TypeError: it is not a number.
        """
        if isinstance(index, slice):
            return self.__getitems__(range(*index.indices(len(self))))
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int | Draw]) -> list[Example]:
        """Examples by number, each with a `noise_seed`: that of the draw, or else the number itself."""
        draws = [self._draw(index) for index in indices]
        task_of = {
            d.example: self.components[self.component_numbers[d.example]].task for d in draws if d.example is not None
        }
        texts: dict[tuple[str, int], Any] = {}
        for task in {*task_of.values()}:
            rows = sorted({int(self._row[example]) for example, of_task in task_of.items() if of_task == task})
            texts |= {(task, row): text for row, text in zip(rows, _rows(self._datasets[task], rows), strict=True)}
        return [self._drawn(draw, task_of, texts) for draw in draws]

    def _drawn(self, draw: Draw, task_of: dict[int, str], texts: dict[tuple[str, int], Any]) -> Example:
        """An example with the values that were drawn with it."""
        lengths = {} if draw.padded_lengths is None else {"padded_lengths": draw.padded_lengths}
        if draw.example is None:
            return {**PADDING_ROW, **lengths}
        task, row_number = task_of[draw.example], int(self._row[draw.example])
        of_row = self._examples(task, row_number, texts[task, row_number])
        return {**of_row[self._place[draw.example]], "noise_seed": draw.noise_seed, **lengths}

    def _draw(self, index: int | Draw) -> Draw:
        """A [`Draw`] as it is, or one made from a number, which is then the seed of the noise."""
        example: Any = index.example if isinstance(index, Draw) else index
        if isinstance(index, Draw) and example is None:
            return index
        asked = operator.index(example)
        if not -len(self) <= asked < len(self):
            raise IndexError(f"there is no example {asked}: the dataset has {len(self)}")
        number = asked % len(self)
        return index._replace(example=number) if isinstance(index, Draw) else Draw(number, number)


def _sides_of_rows(dataset: Any, task: str) -> Iterator[Sequence[Side]]:
    """The sides of each row. Many rows of a table are read at once, which is over ten times as fast as one by one."""
    num_rows = _length(dataset)
    if not _is_table(dataset):
        for number, row in enumerate(islice(dataset or (), num_rows)):
            yield sides_of_row(row, task, _where(number, task))
        return
    for start in range(0, num_rows, _CHUNK):
        numbers = range(start, min(start + _CHUNK, num_rows))
        of_rows = sides_of_columns(dataset[numbers.start : numbers.stop], task)
        if of_rows is not None:
            yield from of_rows
        else:  # a row may be invalid; the error names it
            for number, row in zip(numbers, _rows(dataset, numbers), strict=True):
                yield sides_of_row(row, task, _where(number, task))


def _is_table(dataset: Any) -> bool:
    """Whether it is a [`datasets.Dataset`] that returns rows as stored, without a format or transform."""
    return isinstance(form := getattr(dataset, "format", None), dict) and form.get("type", "") is None


def _where(row_number: int, task: str) -> str:
    return f"row {row_number} of the {task} dataset"


def _languages_of(components: Iterable[Component]) -> set[str]:
    return {lang for component in components for lang in (component.src_lang, component.tgt_lang)}


def _compact(numbers: array) -> np.ndarray:
    """The numbers in the smallest dtype that holds the largest of them."""
    values = np.asarray(numbers)
    return values.astype(np.min_scalar_type(values.max()))


def _length(dataset: Any) -> int:
    """Number of rows of a dataset; 0 without a dataset.

    Raises:
        ValueError: it is a stream or a dictionary of columns.
    """
    if dataset is None:
        return 0
    if isinstance(dataset, dict):
        lengths = {name: len(column) for name, column in dataset.items()}
        raise ValueError(
            f"a dataset is a sequence of rows, got a dictionary of columns of the lengths {lengths}; "
            "datasets.Dataset.from_dict makes one of columns of equal length"
        )
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ValueError(f"{type(dataset).__name__} is not a map-style dataset; use MultitaskStream for streams")
    return len(dataset)


def _rows(dataset: Any, rows: Sequence[int]) -> list[Any]:
    if hasattr(dataset, "__getitems__"):  # a method of datasets.Dataset, faster than one by one
        return dataset.__getitems__(rows)
    return [dataset[row] for row in rows]


__all__ = ["Draw", "MultitaskDataset"]
