"""DataCollatorForMultitaskSeq2Seq: examples of translation and denoising -> a batch for a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from transformers import BatchEncoding, DataCollatorForSeq2Seq

from ..models.language_codes import encode_in, language_ids, parse_language, resolve_language
from ..models.vocabulary import check_vocabulary
from .denoising import DenoisingNoise
from .multitask_rows import DENOISING, PADDING, TRANSLATION, Example, examples_of_row


class _Affixes(NamedTuple):
    """The ids that a tokenizer puts around the ids of a text."""

    prefix: list[int]
    suffix: list[int]

    @property
    def num_tokens(self) -> int:
        return len(self.prefix) + len(self.suffix)


@dataclass
class DataCollatorForMultitaskSeq2Seq:
    """Encodes, noises and pads the examples of a [`MultitaskDataset`], or rows in a form that the dataset takes.

    The tokenizer adds the tags of source and target languages (`src_lang`, `tgt_lang`); codes may have any form that
    means one of its languages (`zh-CN` for `zh`). For denoising, the source is the text with noise, cut to the number
    of tokens without noise, and the target is the text. Texts of more than `max_length` tokens are truncated; tags and
    the end of the sequence stay.

    Args:
        tokenizer: a tokenizer with `src_lang` and `tgt_lang`, such as [`ZCodeM3Tokenizer`] or `NllbTokenizer`; with a
            mask token for denoising.
        model: makes `decoder_input_ids` from the labels.
        noise: noise for denoising.
        max_length: most tokens of a source or a target, tags included; by default the limit of tokenizer and model.
        pad_to_multiple_of: padded lengths are multiples of it.
        label_pad_token_id: padding of labels, which gives no loss.

    Raises:
        ValueError: the tokenizer has no languages or more tokens than the model, a language is unknown, `max_length`
            exceeds the model's positions or is too short for a text, or a row has another form.

    Example:

    ```python
    >>> collator = DataCollatorForMultitaskSeq2Seq(tokenizer, model, noise=DenoisingNoise(mask_ratio=0.35))
    >>> batch = collator([dataset[0], dataset[1]])  # input_ids, attention_mask, labels, decoder_input_ids
    ```
    """

    tokenizer: Any
    model: Any = None
    noise: DenoisingNoise = field(default_factory=DenoisingNoise)
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    label_pad_token_id: int = -100

    def __post_init__(self) -> None:
        if not (hasattr(self.tokenizer, "src_lang") and hasattr(self.tokenizer, "tgt_lang")):
            raise ValueError(
                f"{type(self.tokenizer).__name__} has no src_lang and tgt_lang, so it has no language tags; use a "
                "tokenizer for translation"
            )
        self.max_length = self._checked_max_length()
        self._affixes: dict[tuple[str, bool], _Affixes] = {}
        self._num_checked_tokens: int | None = None
        language_ids(self.tokenizer)  # raises if it is invalid
        self._padding = DataCollatorForSeq2Seq(
            self.tokenizer,
            model=self.model,
            pad_to_multiple_of=self.pad_to_multiple_of,
            label_pad_token_id=self.label_pad_token_id,
        )

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> BatchEncoding:
        """Make a batch of examples, or of the output of `encode`."""
        self._check_vocabulary()
        is_encoded = bool(features) and "input_ids" in features[0]
        encoded = [dict(feature) for feature in features] if is_encoded else self.encode(features)
        batch = self._padding([self._padded(example) for example in encoded])
        is_padding = [not example["labels"] for example in encoded]
        if any(is_padding) and "decoder_input_ids" in batch:
            # else the start token of decoding would count as a token, also for the routers
            batch["decoder_input_ids"][is_padding] = self.tokenizer.pad_token_id
        return batch

    def encode(self, features: Sequence[Mapping[str, Any]]) -> list[dict[str, list[int]]]:
        """`input_ids`, `attention_mask` and `labels` of each example, as lists without padding.

        The seed of noise is the example's `noise_seed`, or else its place in the batch. Examples from a sampler with
        `length_buckets` also have `padded_lengths`; rows of padding (`PADDING_ROW`) have no tokens.
        """
        examples = [self._example(feature, place) for place, feature in enumerate(features)]
        sources = [
            self.noise(example["source"], seed=example.get("noise_seed", place), mask_token=self._mask_token)
            if example["task"] == DENOISING
            else example["source"]
            for place, example in enumerate(examples)
        ]
        ids = self._ids(sources + [example["target"] for example in examples])
        encoded: list[dict[str, list[int]]] = []
        for example, source, target in zip(examples, ids[: len(examples)], ids[len(examples) :], strict=True):
            if example["task"] == DENOISING:
                # masks split tokens, so the text could become longer than the batch allows
                source = source[: len(target)]
            is_padding = example["task"] == PADDING
            input_ids = [] if is_padding else self._tagged(source, example["src_lang"], is_target=False)
            labels = [] if is_padding else self._tagged(target, example["tgt_lang"], is_target=True)
            encoded.append({"input_ids": input_ids, "attention_mask": [1] * len(input_ids), "labels": labels})
            if "padded_lengths" in example:
                encoded[-1]["padded_lengths"] = list(example["padded_lengths"])
        return encoded

    def lengths(self, examples: Sequence[Example]) -> list[tuple[int, int]]:
        """Tokens of source and target of each example, without noise and after truncation."""
        texts = [example["source"] for example in examples] + [example["target"] for example in examples]
        unique = list(dict.fromkeys(texts))
        num_ids = dict(zip(unique, map(len, self._ids(unique)), strict=True))

        def length(text: str, lang: str, is_target: bool) -> int:
            num_tokens = num_ids[text] + self._affixes_of(lang, is_target=is_target).num_tokens
            return num_tokens if self.max_length is None else min(num_tokens, self.max_length)

        return [
            (
                length(example["source"], example["src_lang"], False),
                length(example["target"], example["tgt_lang"], True),
            )
            for example in examples
        ]

    @property
    def max_positions(self) -> int | None:
        """Number of the model's positions; `None` if unknown."""
        return getattr(getattr(self.model, "config", None), "max_position_embeddings", None)

    def _padded(self, example: Mapping[str, list[int]]) -> dict[str, list[int]]:
        """Model inputs of an example, padded to the lengths that were drawn with it."""
        columns = {"input_ids": self.tokenizer.pad_token_id, "attention_mask": 0, "labels": self.label_pad_token_id}
        if "padded_lengths" not in example:
            return {name: example[name] for name in columns}
        source, target = example["padded_lengths"]
        padded = {}
        for (name, filler), length in zip(columns.items(), (source, source, target), strict=True):
            num_missing = length - len(example[name])
            if num_missing < 0:
                raise ValueError(
                    f"{name} of an example has {len(example[name])} tokens in a batch of {length}; token_lengths must "
                    "be counted with the tokenizer and max_length of this collator"
                )
            missing = [filler] * num_missing
            padded[name] = missing + example[name] if self.tokenizer.padding_side == "left" else example[name] + missing
        return padded

    def _checked_max_length(self) -> int | None:
        max_positions = self.max_positions
        multiple = self.pad_to_multiple_of or 1
        if max_positions is not None:
            max_positions -= max_positions % multiple  # padding takes positions, too
        if self.max_length is None:
            limits = [self.tokenizer.model_max_length, *([max_positions] if max_positions else [])]
            return min(limits) if min(limits) < 1e9 else None  # a tokenizer without limit says 1e30
        if max_positions is not None and self.max_length > max_positions:
            raise ValueError(
                f"max_length ({self.max_length}) must be at most {max_positions}, the model's positions "
                f"(max_position_embeddings, rounded down to a multiple of pad_to_multiple_of, {multiple})"
            )
        return self.max_length

    def _check_vocabulary(self) -> None:
        """Check in the first batch, and in the first after tokens were added, that the model has embeddings for all.

        A token without one is an `IndexError` inside the model.
        """
        num_tokens = len(self.tokenizer)
        if num_tokens == self._num_checked_tokens:
            return
        check_vocabulary(self.model, self.tokenizer)
        self._num_checked_tokens = num_tokens

    def _example(self, feature: Mapping[str, Any], place: int) -> Mapping[str, Any]:
        if "task" in feature and "source" in feature:
            return feature
        task = DENOISING if "text" in feature else TRANSLATION
        examples = examples_of_row(feature, task, both_directions=False, where=f"row {place} of the batch")
        if len(examples) != 1:
            raise ValueError(
                f"row {place} of the batch has {len(examples)} directions, but must have one; a MultitaskDataset "
                "makes an example per direction"
            )
        return examples[0]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        # `encode_in` without a language does not help: transformers' tokenizers restore their tag in each call
        options: dict[str, Any] = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        return encode_in(self.tokenizer, texts, **options)["input_ids"]

    @property
    def _mask_token(self) -> str:
        if self.tokenizer.mask_token is None:
            raise ValueError(
                f"denoising needs a mask token: set tokenizer.mask_token of {type(self.tokenizer).__name__}"
            )
        return self.tokenizer.mask_token

    def _tagged(self, ids: list[int], lang: str, *, is_target: bool) -> list[int]:
        affixes = self._affixes_of(lang, is_target=is_target)
        if self.max_length is not None:
            ids = ids[: self.max_length - affixes.num_tokens]
        return [*affixes.prefix, *ids, *affixes.suffix]

    def _affixes_of(self, lang: str, *, is_target: bool) -> _Affixes:
        key = (lang, is_target)
        if key not in self._affixes:
            affixes = _find_affixes(self.tokenizer, lang, is_target)
            if self.max_length is not None and self.max_length <= affixes.num_tokens:
                raise ValueError(
                    f"max_length ({self.max_length}) leaves no token besides the {affixes.num_tokens} special ones; "
                    "raise it"
                )
            self._affixes[key] = affixes
        return self._affixes[key]


def _find_affixes(tokenizer: Any, lang: str, is_target: bool) -> _Affixes:
    """Find the ids that the tokenizer puts around a source or a target in a language."""
    probe = "a"
    lang = resolve_language(lang, language_ids(tokenizer), owner="this tokenizer", hint=_how_to_add(tokenizer, lang))
    bare = list(encode_in(tokenizer, probe, add_special_tokens=False)["input_ids"])
    if is_target:
        ids = list(encode_in(tokenizer, text_target=probe, tgt_lang=lang)["input_ids"])
    else:
        ids = list(encode_in(tokenizer, probe, src_lang=lang)["input_ids"])
    start = next((place for place in range(len(ids)) if ids[place : place + len(bare)] == bare), None)
    if start is None:
        raise ValueError(f"{type(tokenizer).__name__} encodes {probe!r} as {bare} alone, but as {ids} in {lang!r}")
    return _Affixes(ids[:start], ids[start + len(bare) :])


def _how_to_add(tokenizer: Any, lang: str) -> str:
    """What to do about an unknown language, for an error; nothing if it is no language."""
    try:
        parse_language(lang)
    except ValueError:
        return ""
    if not hasattr(tokenizer, "add_languages"):
        return ""
    return f"; to train it: tokenizer.add_languages([{lang!r}]), then model.resize_token_embeddings(len(tokenizer))"


__all__ = ["DataCollatorForMultitaskSeq2Seq"]
