"""Noise for denoising auto-encoding: a text -> the noised source from which the model writes the text.

Noise changes words and sentences of the text, so it does not depend on a tokenizer. In writing systems without spaces
every character is a word.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from .number_checks import require_integer, require_number

_LARGEST_MEAN = 1e9  # largest mean of a span; numpy accepts no much larger one

# Thai, Lao, Myanmar, Khmer; kana and Han characters with their extensions; no Hangul, which has spaces
_UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    r"\uf900-\ufaff\U00020000-\U0003ffff"
)
# vowel signs and tone marks, which stay with the preceding character
_MARKS = (
    r"\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ece\u102b-\u103e\u1056-\u1059\u17b4-\u17d3"
    r"\u3099\u309a"
)
_WORD = re.compile(rf"\s*(?:[{_UNSPACED}][{_MARKS}]*|[^\s{_UNSPACED}]+)")
_SENTENCE_END = re.compile(r"(?<=[.!?\u2026\u061f\u06d4\u0964\u1362])\s+|(?<=[\u3002\uff01\uff1f])\s*(?=\S)|\n+")


@dataclass(frozen=True)
class DenoisingNoise:
    """Noise in this order: sentences change places, words are left out, spans of words are masked.

    The defaults of `mask_ratio` and `poisson_lambda` are those of mBART (https://huggingface.co/papers/2001.08210,
    section 2.2).

    Args:
        mask_ratio: share of the words that are masked; each span becomes one mask token.
        poisson_lambda: mean length of a span, in words. A span of length 0 is a mask token between two words; their
            number is limited to that of masked words, which a mean below 1 would exceed.
        sentence_distance: most places that a sentence moves, 0 for none, as for words in
            https://huggingface.co/papers/1711.00043, section 2.3.
        word_dropout: probability that a word is left out.

    Raises:
        ValueError: a value is not a number or is out of its range.

    Example:

    ```python
    >>> noise = DenoisingNoise(sentence_distance=3, word_dropout=0.1)
    >>> noise("Close the tab. Then open it again.", seed=0, mask_token="<mask>")
    ```
    """

    mask_ratio: float = 0.35
    poisson_lambda: float = 3.5
    sentence_distance: int = 0
    word_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("mask_ratio", "word_dropout"):
            if not 0.0 <= require_number(name, getattr(self, name)) < 1.0:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 0 and less than 1")
        if not 0.0 < require_number("poisson_lambda", self.poisson_lambda) < math.inf:
            raise ValueError(f"poisson_lambda ({self.poisson_lambda}) must be positive and finite")
        if require_integer("sentence_distance", self.sentence_distance) < 0:
            raise ValueError(f"sentence_distance ({self.sentence_distance}) must be 0 or more places")

    def __call__(self, text: str, *, seed: int, mask_token: str) -> str:
        """The text with noise; equal seeds give equal noise. It is empty only if `text` is."""
        random = np.random.default_rng(seed)
        if self.sentence_distance:
            text = shuffle_sentences(text, self.sentence_distance, random)
        words = split_words(text)
        if self.word_dropout:
            words = drop_words(words, self.word_dropout, random)
        return "".join(mask_spans(words, self.mask_ratio, self.poisson_lambda, mask_token, random)).strip()


def split_words(text: str) -> list[str]:
    """The words of a text, each with the white space before it; joined they give the text without its last spaces."""
    return _WORD.findall(text)


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, by the punctuation of most scripts."""
    return [sentence for sentence in _SENTENCE_END.split(text) if sentence.strip()]


def shuffle_sentences(text: str, distance: int, random: np.random.Generator) -> str:
    """Move sentences by up to `distance` places; scripts with spaces get one space between sentences."""
    sentences = split_sentences(text)
    if len(sentences) < 2:
        return text
    # order plus noise can swap two sentences only if they are at most `distance` apart
    order = np.argsort(np.arange(len(sentences)) + random.uniform(0, distance + 1, len(sentences)), kind="stable")
    separator = " " if re.search(r"\s", text.strip()) else ""
    return separator.join(sentences[index].strip() for index in order)


def drop_words(words: Sequence[str], probability: float, random: np.random.Generator) -> list[str]:
    """Drop words at random; one stays if all would be dropped."""
    is_kept = random.random(len(words)) >= probability
    if len(words) and not is_kept.any():
        is_kept[random.integers(len(words))] = True
    return [word for word, keep in zip(words, is_kept, strict=True) if keep]


def mask_spans(
    words: Sequence[str], ratio: float, poisson_lambda: float, mask_token: str, random: np.random.Generator
) -> list[str]:
    """Replace spans of words by one mask token each (text infilling of BART, paper 1910.13461, section 2.2).

    `len(words) * ratio` words are masked, rounded up or down at random so that short texts are masked, too.
    """
    num_masked = int(len(words) * ratio + random.random())
    spans: list[int] = []
    num_left, num_between = num_masked, 0
    while num_left > 0:
        length = int(random.poisson(min(poisson_lambda, _LARGEST_MEAN)))
        if length == 0 and num_between == num_masked:
            length = 1
        num_between += length == 0
        spans.append(min(length, num_left))
        num_left -= spans[-1]
    num_kept = len(words) - num_masked
    # spans and kept words in random order: a uniform choice among all placements of the spans
    is_span = random.permutation(np.arange(num_kept + len(spans)) < len(spans))
    lengths = iter(random.permutation(spans).astype(int).tolist())  # the last span may be cut
    sizes = [next(lengths) if span else 1 for span in is_span]
    noised = []
    for span, end, size in zip(is_span, accumulate(sizes), sizes, strict=True):
        if not span:
            noised.append(words[end - 1])
            continue
        first = words[min(end - size, len(words) - 1)]
        noised.append(first[: len(first) - len(first.lstrip())] + mask_token)  # after the same space
    return noised


__all__ = ["DenoisingNoise", "drop_words", "mask_spans", "shuffle_sentences", "split_sentences", "split_words"]
