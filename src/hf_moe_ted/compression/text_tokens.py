"""The texts of a dataset by language, and the tokens into which a tokenizer splits them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..evaluation.parallel_text import progress_over, sentences_of_row
from ..models.language_codes import find_language, resolve_language

WITHOUT_LANGUAGE = "text"  # key of texts without a language
_TEXTS_PER_BATCH = 1000
_CHARACTERS_PER_BATCH = 2**20


class TextsByLanguage:
    """The texts of a dataset in batches, each text with its language. Each iteration reads the dataset again.

    Args:
        dataset: strings, or rows like those of `collect_expert_statistics`; each side counts for its own language.
        known: languages that the tokenizer knows.
        languages: those to read; texts in other languages are skipped. `None` is all.

    Raises:
        ValueError: the dataset can be read only once. During iteration: a row has another form, or a language that is
            neither known nor skipped.
    """

    def __init__(self, dataset: Iterable[Any], known: Sequence[str], languages: Sequence[str] | None):
        if isinstance(dataset, str) or not isinstance(dataset, Iterable):
            raise ValueError(f"dataset ({dataset!r}) must be rows or texts; hf_moe_ted.open_parallel_text opens a file")
        if isinstance(dataset, Iterator):
            raise ValueError(
                f"dataset is a {type(dataset).__name__}, which can be read only once, but it is read twice; give a "
                "list, an opened file or a dataset"
            )
        self._dataset, self._known, self._languages = dataset, known, languages

    def batches(self, description: str) -> Iterator[tuple[list[str], list[str]]]:
        """Batches of languages and texts, with a progress bar over the rows."""
        languages: list[str] = []
        texts: list[str] = []
        num_characters = 0
        for language, text in self._texts(description):
            languages.append(language)
            texts.append(text)
            num_characters += len(text)
            if len(texts) == _TEXTS_PER_BATCH or num_characters > _CHARACTERS_PER_BATCH:
                yield languages, texts
                languages, texts, num_characters = [], [], 0
        if texts:
            yield languages, texts

    def _texts(self, description: str) -> Iterator[tuple[str, str]]:
        meaning = cache(self._meaning)
        with progress_over(self._dataset, description) as progress:
            for index, row in enumerate(self._dataset):
                for code, text in _texts_of_row(row, f"row {index} of the dataset"):
                    language = WITHOUT_LANGUAGE if code is None else meaning(code)
                    if language is not None:
                        yield language, text
                progress.update(1)

    def _meaning(self, code: str) -> str | None:
        """The language of a code; `None` if its texts are skipped."""
        if self._languages is None:
            return resolve_language(code, self._known)
        language = find_language(code, self._known)
        return language if language in self._languages else None


def _texts_of_row(row: Any, where: str) -> list[tuple[str | None, str]]:
    if isinstance(row, str):
        return [(None, row)]
    sentences = sentences_of_row(row, where)
    sides = [((source, s.source), (target, s.target)) for (source, target), s in sentences]
    return [*dict.fromkeys(side for both in sides for side in both)]  # a text that is in several pairs counts once


@dataclass(frozen=True)
class TokenCounts:
    """Counts of the tokens in the texts of one language.

    Attributes:
        num_texts: number of texts.
        counts: int64[V], how often each token occurs.
    """

    num_texts: int
    counts: Tensor


@dataclass
class Comparison:
    """The same texts, encoded with another tokenizer.

    Attributes:
        num_tokens: number of tokens in all texts.
        num_unknown: how many of these are the unknown token.
        num_changed: number of texts that are encoded differently.
    """

    num_tokens: int = 0
    num_unknown: int = 0
    num_changed: int = 0


def count_tokens(tokenizer: Any, texts: TextsByLanguage, num_ids: int) -> dict[str, TokenCounts]:
    """Count tokens per language, without language tags and end-of-text tokens.

    Args:
        tokenizer: the tokenizer that encodes.
        texts: at least one.
        num_ids: V, more than the largest id of a token.

    Raises:
        ValueError: there is no text.
    """
    found: dict[str, TokenCounts] = {}
    for languages, batch in texts.batches("Counting tokens"):
        ids = encode_plainly(tokenizer, batch)
        for language in dict.fromkeys(languages):
            of_language = [i for i, name in zip(ids, languages, strict=True) if name == language]
            flat = torch.tensor([token for text in of_language for token in text], dtype=torch.long)
            before = found.get(language, TokenCounts(0, torch.zeros(num_ids, dtype=torch.long)))
            counts = before.counts + torch.bincount(flat, minlength=num_ids)
            found[language] = TokenCounts(before.num_texts + len(of_language), counts)
    if not found:
        raise ValueError("the dataset has no text, so no token would be kept; give texts in the languages to keep")
    return found


def compare_encodings(
    before: Any, after: Any, texts: TextsByLanguage, new_of_old: Mapping[int, int]
) -> dict[str, Comparison]:
    """Encode every text with two tokenizers.

    Args:
        before, after: the tokenizers.
        texts: what they encode.
        new_of_old: id before -> id after, for the tokens that are kept.

    Returns:
        Language -> counts for `after`.

    Raises:
        ValueError: a text is encoded differently although all its tokens are kept and known.
    """
    found: dict[str, Comparison] = {}
    for languages, batch in texts.batches("Comparing encodings"):
        encoded = zip(languages, batch, encode_plainly(before, batch), encode_plainly(after, batch), strict=True)
        for language, text, old, new in encoded:
            expected = [new_of_old.get(token) for token in old]
            if new != expected and not {None, after.unk_token_id} & {*expected}:
                raise ValueError(
                    f"tokenizer ({type(before).__name__}) encodes {text[:80]!r} differently once other tokens are "
                    "removed; a tokenizer that encodes at random (dropout, sampling) cannot be trimmed: turn that off"
                )
            of_language = found.setdefault(language, Comparison())
            of_language.num_tokens += len(new)
            of_language.num_unknown += new.count(after.unk_token_id)
            of_language.num_changed += new != expected
    return found


def encode_plainly(tokenizer: Callable[..., Any], texts: list[str]) -> list[list[int]]:
    """Ids of each text alone, without special tokens and without truncation."""
    return tokenizer(texts, add_special_tokens=False, truncation=False, padding=False, verbose=False)["input_ids"]


__all__ = ["WITHOUT_LANGUAGE", "Comparison", "TextsByLanguage", "TokenCounts", "compare_encodings", "count_tokens"]
