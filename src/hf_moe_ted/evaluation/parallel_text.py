"""Parallel text for a model: rows -> sentences of one language pair -> batches of similar length."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from tqdm.auto import tqdm

from ..models.language_codes import LanguagePair, encode_in, find_language, language_ids, resolve_language

MAX_WAITING_BUCKETS = 64
MAX_WAITING_CHARACTERS = 2**26
TEXT_COLUMNS = ("source", "target", "src_lang", "tgt_lang")


@dataclass(frozen=True)
class Sentence:
    """A text and its translation."""

    source: str
    target: str

    @property
    def num_characters(self) -> int:
        return len(self.source) + len(self.target)


@dataclass(frozen=True)
class EncodedSentence:
    """Token ids of one sentence; `target` holds the labels."""

    source: list[int]
    target: list[int]

    @property
    def num_tokens(self) -> int:
        return len(self.source) + len(self.target)


def progress_over(dataset: Any, description: str) -> Any:
    """A progress bar over a dataset's sentences, for `read_sentences`; without a total if the dataset is streamed."""
    try:
        total = len(dataset)
    except TypeError:
        total = None
    return tqdm(total=total, desc=description, unit="sentence")


def read_sentences(dataset: Iterable[Mapping[str, Any]], progress: Any) -> Iterator[tuple[LanguagePair, Sentence]]:
    """Read the sentences of all rows.

    Args:
        dataset: rows like those of `collect_expert_statistics`.
        progress: progress bar; its total becomes the number of sentences.

    Raises:
        ValueError: a row has another form.
    """
    for index, row in enumerate(dataset):
        in_row = sentences_of_row(row, f"row {index} of the dataset")
        if progress.total is not None:
            progress.total += len(in_row) - 1
        yield from in_row


def sentences_of_row(row: Any, where: str) -> list[tuple[LanguagePair, Sentence]]:
    """The sentences of a row, one in each direction between its languages.

    Raises:
        ValueError: a row has another form; `where` names it.
    """
    if isinstance(row, Mapping) and isinstance(texts := row.get("translation"), Mapping):
        if all(isinstance(text, str) for text in texts.values()):
            return [
                ((source, target), Sentence(texts[source], texts[target]))
                for source in texts
                for target in texts
                if source != target
            ]
    elif isinstance(row, Mapping) and all(isinstance(row.get(column), str) for column in TEXT_COLUMNS):
        return [((row["src_lang"], row["tgt_lang"]), Sentence(row["source"], row["target"]))]
    raise ValueError(
        f"{where} must have the strings {', '.join(TEXT_COLUMNS)}, or 'translation' with a "
        f"string for each language, got {repr(row)[:300]}"
    )


def in_known_languages(
    sentences: Iterable[tuple[LanguagePair, Sentence]],
    known: Sequence[str],
    languages: Sequence[str] | None,
    progress: Any,
) -> Iterator[tuple[LanguagePair, Sentence]]:
    """The sentences between `languages`; their codes are replaced by those of a tokenizer.

    Args:
        sentences: sentences from `read_sentences`.
        known: languages of the tokenizer.
        languages: some of `known`; `None` is all.
        progress: progress bar over sentences; skipped ones count as done.

    Raises:
        ValueError: a sentence that is not skipped has a language that the tokenizer does not have.
    """
    wanted = None if languages is None else {*languages}
    meaning = cache(lambda code: find_language(code, known))
    for codes, sentence in sentences:
        if wanted is None or {*map(meaning, codes)} <= wanted:
            source, target = (meaning(code) or resolve_language(code, known) for code in codes)
            yield (source, target), sentence
        else:
            progress.update(1)


def check_languages(counted: Iterable[LanguagePair], languages: Sequence[str] | None) -> None:
    """
    Args:
        counted: the pairs with sentences.
        languages: the requested languages.

    Raises:
        ValueError: there are no sentences, or none in one of `languages`.
    """
    known = {language for pair in counted for language in pair}
    if missing := sorted({*(languages or ())} - known):
        raise ValueError(
            f"the dataset has no sentence in {', '.join(missing)} that is paired with another of the requested "
            f"languages; it has sentences in {', '.join(sorted(known)) or 'none of them'}"
        )
    if not known:
        raise ValueError("the dataset has no sentence")


def buckets(
    sentences: Iterable[tuple[LanguagePair, Sentence]], bucket_size: int
) -> Iterator[tuple[LanguagePair, list[Sentence]]]:
    """Groups of `bucket_size` sentences of one pair.

    Groups are smaller at the end. When `MAX_WAITING_BUCKETS` times as many sentences, or `MAX_WAITING_CHARACTERS` of
    text, wait over all pairs, the pair with the most sentences gives a group.
    """
    waiting: dict[LanguagePair, list[Sentence]] = {}
    num_waiting = num_characters = 0
    for pair, sentence in sentences:
        waiting.setdefault(pair, []).append(sentence)
        num_waiting += 1
        num_characters += sentence.num_characters
        is_too_much = num_waiting >= bucket_size * MAX_WAITING_BUCKETS or num_characters >= MAX_WAITING_CHARACTERS
        if len(waiting[pair]) >= bucket_size or is_too_much:
            fullest = max(waiting, key=lambda pair: len(waiting[pair])) if is_too_much else pair
            num_waiting -= len(waiting[fullest])
            num_characters -= sum(sentence.num_characters for sentence in waiting[fullest])
            yield fullest, waiting.pop(fullest)
    yield from waiting.items()


def choose_languages(tokenizer: Any, languages: Sequence[str] | None) -> tuple[list[str], list[str] | None]:
    """All languages of a tokenizer, and those that `languages` mean; `None` without `languages`.

    Raises:
        ValueError: the tokenizer has no languages or lacks one of `languages`, or `languages` is not a list.
    """
    if isinstance(languages, str):
        raise ValueError(f"languages ({languages!r}) must be a list of codes, such as ['en', 'de']")
    if not (hasattr(tokenizer, "src_lang") and hasattr(tokenizer, "tgt_lang")):
        raise ValueError(f"{type(tokenizer).__name__} has no src_lang and tgt_lang; give a tokenizer for translation")
    known = list(language_ids(tokenizer))
    if languages is None:
        return known, None
    return known, [resolve_language(code, known, name="languages") for code in languages]


def encode(tokenizer: Any, pair: LanguagePair, sentences: Sequence[Sentence], max_length: int) -> list[EncodedSentence]:
    """Encode sources and targets with their language tags, truncated to `max_length` tokens."""
    encoded = encode_in(
        tokenizer,
        [sentence.source for sentence in sentences],
        text_target=[sentence.target for sentence in sentences],
        src_lang=pair[0],
        tgt_lang=pair[1],
        truncation=True,
        max_length=max_length,
    )
    return [EncodedSentence(*ids) for ids in zip(encoded["input_ids"], encoded["labels"], strict=True)]


def first_tokens(sentences: list[EncodedSentence], max_tokens: int | None, num_tokens: int) -> list[EncodedSentence]:
    """The first sentences, as many as are needed to get from `num_tokens` to `max_tokens`."""
    if max_tokens is None:
        return sentences
    taken = []
    for sentence in sentences:
        if num_tokens >= max_tokens:
            break
        taken.append(sentence)
        num_tokens += sentence.num_tokens
    return taken


def batches(sentences: Sequence[EncodedSentence], batch_size: int) -> Iterator[list[EncodedSentence]]:
    """Batches of `batch_size` sentences, the longest first, so that a lack of memory shows at once."""
    by_length = sorted(sentences, key=lambda sentence: (len(sentence.source), len(sentence.target)), reverse=True)
    for start in range(0, len(by_length), batch_size):
        yield by_length[start : start + batch_size]


__all__ = [
    "EncodedSentence",
    "Sentence",
    "batches",
    "buckets",
    "check_languages",
    "choose_languages",
    "encode",
    "first_tokens",
    "in_known_languages",
    "progress_over",
    "read_sentences",
    "sentences_of_row",
]
