"""Inputs of a translation pipeline: texts in many containers, their languages, and arguments of older pipelines."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from torch.utils.data import Dataset

LANGUAGES = ("src_lang", "tgt_lang")

_TASK = re.compile(r"translation_(.+)_to_(.+)")

# argument of transformers 4's translation pipelines -> the only value that changes nothing here, and what to use
_NO_TOKENS = (
    "a text is translated sentence by sentence, so it has no single row of tokens; use model.generate for tokens"
)
_OLD_ARGUMENTS: dict[str, tuple[tuple[Any, ...], str]] = {
    "return_tensors": ((None, False), _NO_TOKENS),
    "return_type": ((None, 1), _NO_TOKENS),
    "return_text": ((None, True), "this pipeline always returns text; leave it out"),
    "stop_sequence": ((None,), "use stop_strings=[...], an argument of generate"),
    "framework": ((None, "pt"), "all models are PyTorch models; leave it out"),
    "modelcard": ((None,), "it has no effect; leave it out"),
    "forced_bos_token_id": ((None,), "name the language instead, with tgt_lang"),
}


@dataclass(frozen=True)
class TextInLanguages:
    """A text with its own languages, by their names in the tokenizer."""

    text: Any
    languages: Mapping[str, str]


def languages_of_task(task: str | None) -> dict[str, str]:
    """`"translation_en_to_de"` -> `src_lang` and `tgt_lang`; empty for other tasks."""
    match = _TASK.fullmatch(task or "")
    return {} if match is None else dict(zip(LANGUAGES, match.groups(), strict=True))


def without_old_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments without those of transformers 4 that request the standard behaviour.

    Raises:
        ValueError: an argument requests something else; the error says what to use.
    """
    for name, (allowed, instead) in _OLD_ARGUMENTS.items():
        value = getattr(arguments.get(name), "value", arguments.get(name))  # `return_type` was an enum
        if value not in allowed:
            raise ValueError(f"{name} ({arguments[name]!r}) is not an argument of this pipeline: {instead}")
    return {name: value for name, value in arguments.items() if name not in _OLD_ARGUMENTS}


def as_pipeline_input(inputs: Any) -> Any:
    """Texts in a container that pipelines support: a string, list, PyTorch dataset, or generator.

    Args:
        inputs: one of these, or a tuple, a column of *datasets*, another sequence, or any iterator.

    Raises:
        ValueError: the input is a table, whose items are rows.
    """
    if isinstance(inputs, (str, bytes, list, Dataset)) or not isinstance(inputs, Iterable):
        return inputs
    columns = getattr(inputs, "column_names", getattr(inputs, "columns", None))  # tables of datasets, tables of pandas
    if columns is not None and len(columns):
        raise ValueError(
            f"a {type(inputs).__name__} has rows, not texts: give one of its columns ({', '.join(columns)}), such as "
            f"dataset[{columns[0]!r}], or KeyDataset(dataset, {columns[0]!r}) of transformers.pipelines.pt_utils"
        )
    if isinstance(inputs, Mapping):
        return inputs  # preprocessing reports that it is no text
    return list(inputs) if isinstance(inputs, Sized) else (text for text in inputs)


def with_languages(inputs: Any, languages: Mapping[str, Sequence[str]]) -> Any:
    """Texts, each with its own languages.

    Args:
        inputs: see `as_pipeline_input`.
        languages: `src_lang`, `tgt_lang` or both -> the languages of the texts, one for each.

    Raises:
        ValueError: the numbers of languages and texts differ; for a generator this is raised at its end.
    """
    if isinstance(inputs, str):
        inputs = [inputs]
    if isinstance(inputs, Sized):
        for name, codes in languages.items():
            _check_number(name, len(codes), len(inputs))
    pairs = _in_languages(inputs, languages)
    return list(pairs) if isinstance(inputs, list) else pairs


def _in_languages(texts: Any, languages: Mapping[str, Sequence[str]]) -> Iterator[TextInLanguages]:
    if isinstance(texts, Dataset) and isinstance(texts, Sized):
        texts = map(texts.__getitem__, range(len(texts)))
    missing = object()
    rows = zip_longest(texts, *languages.values(), fillvalue=missing)
    for count, (text, *codes) in enumerate(rows):
        for name, code in zip(languages, codes, strict=True):
            if text is missing or code is missing:
                _check_number(name, len(languages[name]), count + (text is not missing))
        yield TextInLanguages(text, dict(zip(languages, codes, strict=True)))


def _check_number(name: str, num_languages: int, num_texts: int) -> None:
    if num_languages != num_texts:
        raise ValueError(
            f"{name} has {num_languages} languages for {num_texts} texts: give one for all, or one for each text"
        )


__all__ = [
    "LANGUAGES",
    "TextInLanguages",
    "as_pipeline_input",
    "languages_of_task",
    "with_languages",
    "without_old_arguments",
]
