"""Parallel text as arrays of token ids: read from one file, kept on the device, cut into batches there.

A file of `prepare_tokens.py` holds each text once, without tags. `TokenPairs` makes the batches of a `MultitaskDataset`
from it with a few operations on the device, in well under a millisecond, where tokenizing the same batch takes longer
than a training step of a small model. Sampler, trainer and collator are those of text.

Shape letters: P pairs, N examples (2 P, both directions), X texts, S tokens of all texts, B rows, L positions, G
components.
"""

import hashlib
import io
import json
import lzma
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from multitask_data import Row, backwards
from token_noise import TokenNoise
from torch import Tensor
from tqdm.auto import tqdm

from hf_moe_ted import DataCollatorForMultitaskSeq2Seq, MultitaskDataset

# 16-bit numbers: two bytes are one symbol
_XZ_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 2, "lp": 1, "pb": 1}]
_CHUNK = 20_000  # texts that are tokenized at once
SPECIAL_TOKENS = 2  # of each text in a batch: tag of its language, end of the sequence


@dataclass(frozen=True)
class TokenArrays:
    """English and other languages as token ids.

    Attributes:
        ids: uint16[S], all texts one behind the other without tags, the English ones first.
        starts: int64[X + 1], where each text begins, and the end.
        english: int64[P], number of the English text of each pair; the other text of pair `p` is the `p`-th that is
            not English.
        languages: int64[P], number of the other language of each pair, in `tags`.
        tags: id of the tag of each language by its code, "en" first.
        special_ids: ids of `eos` and `pad`.
        vocab_size: of the tokenizer.
        vocabulary: hash of its tokens and their ids; `None` in files of before, which are not compared.
    """

    ids: np.ndarray
    starts: np.ndarray
    english: np.ndarray
    languages: np.ndarray
    tags: dict[str, int]
    special_ids: dict[str, int]
    vocab_size: int
    vocabulary: str | None = None

    @classmethod
    def of(cls, pairs: Sequence[Row], tokenizer: Any, max_length: int) -> "TokenArrays":
        """Pairs of `read_pairs`, tokenized; those with a text of more than `max_length` tokens are left out.

        Raises:
            ValueError: a vocabulary of more than 65,536 tokens, a tokenizer that does not put one tag in front of a
                text and one token behind it, or no pair that is short enough.
        """
        if len(tokenizer) > 2**16:
            raise ValueError(f"the vocabulary ({len(tokenizer):,} tokens) must be at most 65,536: ids are 16 bits wide")
        english = list(dict.fromkeys(row["source"] for row in pairs))
        ids_of_english = dict(zip(english, _ids(english, tokenizer), strict=True))
        ids_of_other = _ids([row["target"] for row in pairs], tokenizer)
        longest = max_length - SPECIAL_TOKENS
        kept = [
            (row, ids)
            for row, ids in zip(pairs, ids_of_other, strict=True)
            if 0 < len(ids) <= longest and 0 < len(ids_of_english[row["source"]]) <= longest
        ]
        if not kept:
            raise ValueError(f"none of {len(pairs):,} pairs has at most max_length ({max_length}) tokens on both sides")
        languages = ["en", *sorted({row["tgt_lang"] for row, _ in kept})]
        english = list(dict.fromkeys(row["source"] for row, _ in kept))
        texts = [ids_of_english[text] for text in english] + [ids for _, ids in kept]
        number_of = {text: number for number, text in enumerate(english)}
        return cls(
            ids=np.concatenate(texts),
            starts=np.cumsum([0, *map(len, texts)]),
            english=np.array([number_of[row["source"]] for row, _ in kept]),
            languages=np.array([languages.index(row["tgt_lang"]) for row, _ in kept]),
            tags={lang: _tag_of(tokenizer, lang) for lang in languages},
            special_ids={"eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id},
            vocab_size=len(tokenizer),
            vocabulary=_hash_of_vocabulary(tokenizer),
        )

    @classmethod
    def joined(cls, several: Sequence["TokenArrays"]) -> "TokenArrays":
        """Pairs of several arrays, which have the same languages, as pairs of one.

        Raises:
            ValueError: other languages or another tokenizer in one of them.
        """
        first = several[0]
        for other in several[1:]:
            if differences := first.differences(other) or other.differences(first):
                raise ValueError(f"the arrays have other languages or tokenizers: they differ in {differences}")
        ids = [np.split(each.ids, [each.starts[each.num_english]]) for each in several]
        lengths = [np.split(np.diff(each.starts), [each.num_english]) for each in several]
        offsets = np.cumsum([0, *(each.num_english for each in several[:-1])])
        return replace(
            first,
            ids=_english_first(ids),
            starts=np.cumsum([0, *_english_first(lengths)]),
            english=np.concatenate([each.english + offset for each, offset in zip(several, offsets, strict=True)]),
            languages=np.concatenate([each.languages for each in several]),
        )

    @property
    def about(self) -> dict[str, Any]:
        """What arrays of one tokenizer and the same languages have in common."""
        names = ("tags", "special_ids", "vocab_size", "vocabulary")
        return {name: getattr(self, name) for name in names}

    def differences(self, other: "TokenArrays") -> dict[str, Any]:
        """What of `about` is not the same in arrays with at least these languages; empty if all is.

        Of tags and special tokens those that `other` lacks, of all else both values.
        """
        return _differences(self.about, other.about)

    def differences_to(self, tokenizer: Any) -> dict[str, Any]:
        """What of `about` is not the same in a tokenizer; empty if it can be the one that made the ids."""
        known = {*tokenizer.lang_code_to_id}
        return _differences(
            self.about,
            {
                "tags": {lang: tokenizer.get_lang_id(lang) for lang in self.tags if lang in known},
                "special_ids": {"eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id},
                "vocab_size": len(tokenizer),
                "vocabulary": _hash_of_vocabulary(tokenizer),
            },
        )

    def save(self, path: Path) -> None:
        """Write one xz file, as small as the text compressed by xz."""
        buffer = io.BytesIO()
        np.savez(
            buffer,
            about=np.array(json.dumps(self.about)),
            ids=self.ids,
            text_lengths=np.diff(self.starts).astype(np.uint16),
            english=self.english.astype(np.uint32),
            languages=self.languages.astype(np.uint8),
        )
        staged = path.with_name(f".{path.name}")
        staged.write_bytes(lzma.compress(buffer.getvalue(), filters=_XZ_FILTERS))
        staged.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "TokenArrays":
        """Read what `save` has written."""
        try:
            content = lzma.decompress(Path(path).read_bytes())
        except lzma.LZMAError as error:
            raise ValueError(f"{path} is no file of prepare_tokens.py: {error}") from None
        with np.load(io.BytesIO(content)) as arrays:
            about = json.loads(str(arrays["about"]))
            return cls(
                ids=arrays["ids"],
                starts=np.cumsum([0, *arrays["text_lengths"].tolist()]),
                english=arrays["english"].astype(np.int64),
                languages=arrays["languages"].astype(np.int64),
                **about,
            )

    @property
    def num_english(self) -> int:
        """Texts in English, which stand before the others."""
        return len(self.starts) - 1 - len(self.english)

    def first_pairs(self, num_pairs: int | None, languages: list[str] | None = None) -> np.ndarray:
        """int64[P'], numbers of the first pairs of each language, or of those that are named, in their order."""
        order = np.argsort(self.languages, kind="stable")
        of_language = self.languages[order]
        place = np.arange(len(order)) - np.searchsorted(of_language, of_language)
        is_kept = place < (len(order) if num_pairs is None else num_pairs)
        if languages is not None:
            is_kept &= np.isin(of_language, [list(self.tags).index(lang) for lang in languages])
        return np.sort(order[is_kept])

    def with_few(self, pairs_P: np.ndarray, languages: list[str], num_pairs: int) -> np.ndarray:
        """int64[P'], these pairs without what some languages have beyond their first ones."""
        is_few = np.isin(self.languages[pairs_P], [list(self.tags).index(lang) for lang in languages])
        return pairs_P[~is_few | np.isin(pairs_P, self.first_pairs(num_pairs))]

    def share_of_each_language(self, pairs_P: np.ndarray, share: float, seed: int = 0) -> np.ndarray:
        """int64[P'], a share of the pairs of each language, at least one unless the share is 0."""
        order = np.random.default_rng(seed).permutation(pairs_P)
        languages, num_pairs = np.unique(self.languages[pairs_P], return_counts=True)
        wanted = np.round(num_pairs * share).astype(int).clip(min=1 if share else 0)
        kept = [order[self.languages[order] == lang][:num] for lang, num in zip(languages, wanted, strict=True)]
        return np.sort(np.concatenate([pairs_P[:0], *kept]))

    def one_of_each_english(self, pairs_P: np.ndarray, seed: int = 0) -> np.ndarray:
        """int64[P'], one of the pairs of each English text."""
        order = np.random.default_rng(seed).permutation(pairs_P)
        _, first = np.unique(self.english[order], return_index=True)
        return np.sort(order[first])

    def pivoted(self, pairs_P: np.ndarray, num_examples: int, seed: int = 0) -> np.ndarray:
        """int64[Q, 2], numbers of two of these pairs, in different languages, whose English text is the same.

        So multi-parallel text has translations between any two languages, not only with English (complete multilingual
        translation, 2020.wmt-1.66). Each pair is a source at most once.

        Raises:
            ValueError: there are not so many.
        """
        generator = np.random.default_rng(seed)
        order = pairs_P[np.lexsort([generator.random(len(pairs_P)), self.english[pairs_P]])]
        of_group = self.english[order]
        is_last = np.append(of_group[1:] != of_group[:-1], True)
        behind = np.where(is_last, np.searchsorted(of_group, of_group), np.arange(1, len(order) + 1))
        pivots_Q2 = np.stack([order, order[behind]], axis=1)
        pivots_Q2 = pivots_Q2[np.not_equal(*self.languages[pivots_Q2].T)]  # one language can have two translations
        if num_examples > len(pivots_Q2):
            raise ValueError(
                f"{num_examples:,} pivoted examples are wanted, but only {len(pivots_Q2):,} texts share their English "
                "text with one in another language: lower pivoted_share"
            )
        return pivots_Q2[np.sort(generator.choice(len(pivots_Q2), num_examples, replace=False))]

    def text(self, number: int, tokenizer: Any) -> str:
        """One of the texts."""
        return str(tokenizer.decode(self.ids[self.starts[number] : self.starts[number + 1]].tolist()))


def _differences(about: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    differences: dict[str, Any] = {}
    for name, mine in about.items():
        its = other[name]
        if isinstance(mine, dict):
            if missing := sorted(mine.items() - its.items()):
                differences[name] = missing
        elif mine != its and None not in (mine, its):
            differences[name] = (mine, its)
    return differences


def _hash_of_vocabulary(tokenizer: Any) -> str:
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def _english_first(parts: Sequence[list[np.ndarray]]) -> np.ndarray:
    """The English part of each, then the other part of each."""
    return np.concatenate([english for english, _ in parts] + [others for _, others in parts])


def _ids(texts: list[str], tokenizer: Any) -> list[np.ndarray]:
    """uint16 ids of each text, without tags."""
    ids: list[np.ndarray] = []
    for start in tqdm(range(0, len(texts), _CHUNK), desc="Tokenizing", unit=f"{_CHUNK} texts"):
        chunk = tokenizer(texts[start : start + _CHUNK], add_special_tokens=False, return_attention_mask=False)
        ids += [np.array(of_text, dtype=np.uint16) for of_text in chunk["input_ids"]]
    return ids


def _tag_of(tokenizer: Any, lang: str) -> int:
    source = tokenizer("a", src_lang=lang)["input_ids"]
    target = tokenizer(text_target="a", tgt_lang=lang)["input_ids"]
    tag = tokenizer.get_lang_id(lang)
    for ids in (source, target):
        if ids[:1] != [tag] or ids[-1:] != [tokenizer.eos_token_id]:
            raise ValueError(f"{type(tokenizer).__name__} encodes 'a' as {ids} in {lang!r}: not tag, text, and end")
    return int(tag)


class Component(NamedTuple):
    """What a mixture draws from, as of [`MultitaskDataset`]."""

    task: str
    src_lang: str
    tgt_lang: str

    def __str__(self) -> str:
        return f"{self.task} {self.src_lang}-{self.tgt_lang}"


class TokenPairs(MultitaskDataset):
    """Pairs of `TokenArrays` in both directions, as a [`MultitaskDataset`] whose batches are tensors on a device.

    Example `n` is pair `n` from English for `n` below P; then come those into English, translations between two other
    languages, and the texts that are denoised.

    Args:
        arrays: the tokens.
        device: where batches are made.
        pairs: int64[P], numbers of the pairs to take, all by default.
        into_english: int64[P'], numbers of the pairs that are translated into English, too; by default all of these.
        pivots: int64[Q, 2], numbers of the pairs whose other texts are source and target of translations without
            English (`TokenArrays.pivoted`); none by default.
        denoised_pairs: int64[...], numbers of the pairs whose texts are denoised, each text once; none by default.
        noise: that of denoising; a batch has the noise of its first draw's seed.
    """

    def __init__(
        self,
        arrays: TokenArrays,
        device: torch.device | str,
        pairs: np.ndarray | None = None,
        *,
        into_english: np.ndarray | None = None,
        pivots: np.ndarray | None = None,
        denoised_pairs: np.ndarray | None = None,
        noise: TokenNoise | None = None,
    ):
        self.arrays = arrays
        self.epoch = 0
        self.device = torch.device(device)
        self.noise = noise
        self._pairs_P = pairs_P = np.arange(len(arrays.english)) if pairs is None else pairs
        pivots_Q2 = np.empty((0, 2), dtype=np.int64) if pivots is None else pivots
        denoised = pairs_P[:0] if denoised_pairs is None else denoised_pairs
        self._into_P = into_P = pairs_P if into_english is None else into_english
        from_english = np.stack([arrays.english[pairs_P], arrays.num_english + pairs_P], axis=1)
        to_english = np.stack([arrays.num_english + into_P, arrays.english[into_P]], axis=1)
        denoised_texts = np.concatenate([np.unique(arrays.english[denoised]), arrays.num_english + denoised])
        parts = (from_english, to_english, arrays.num_english + pivots_Q2, np.stack(2 * [denoised_texts], axis=1))
        self.num_translated = sum(map(len, parts[:3]))
        texts_N2 = np.concatenate(parts)
        languages_X = np.concatenate([np.zeros(arrays.num_english, dtype=np.int64), arrays.languages])
        languages_N2 = languages_X[texts_N2]
        # the components have the order of the parts, and in each of them that of the languages
        part_N = np.repeat(np.arange(len(parts)), [*map(len, parts)])
        shape = (len(parts), len(arrays.tags), len(arrays.tags))
        keys = np.ravel_multi_index((part_N, *languages_N2.T), shape)
        present, self.component_numbers = np.unique(keys, return_inverse=True)
        self.component_numbers = self.component_numbers.astype(np.uint16)
        self.components = [
            self._component(*map(int, each)) for each in zip(*np.unravel_index(present, shape), strict=True)
        ]
        tags_N2 = np.array(list(arrays.tags.values()))[languages_N2]
        lengths_X = np.diff(arrays.starts)
        self.lengths = (lengths_X[texts_N2] + SPECIAL_TOKENS).astype(np.int32)
        self._ids = torch.from_numpy(arrays.ids.astype(np.int32)).to(self.device)
        self._starts_N2 = torch.from_numpy(arrays.starts[:-1][texts_N2].astype(np.int32)).to(self.device)
        self._lengths_N2 = torch.from_numpy(lengths_X[texts_N2].astype(np.int32)).to(self.device)
        self._eos, self._pad = (arrays.special_ids[name] for name in ("eos", "pad"))
        self._generator = torch.Generator(self.device)
        self._tags_N2 = torch.from_numpy(tags_N2.astype(np.int32)).to(self.device)

    def __len__(self) -> int:
        return len(self.component_numbers)

    def first_rows(self, tokenizer: Any, num_pairs: int) -> list[Row]:
        """The text of the first pairs of each direction that is translated, as rows of `read_pairs`."""
        codes = list(self.arrays.tags)
        from_english, to_english = (
            [
                {
                    "source": self.arrays.text(int(self.arrays.english[pair]), tokenizer),
                    "target": self.arrays.text(int(self.arrays.num_english + pair), tokenizer),
                    "src_lang": "en",
                    "tgt_lang": codes[self.arrays.languages[pair]],
                }
                for pair in np.intersect1d(pairs, self.arrays.first_pairs(num_pairs))
            ]
            for pairs in (self._pairs_P, self._into_P)
        )
        return from_english + backwards(to_english)

    def _component(self, part: int, source: int, target: int) -> Component:
        codes = list(self.arrays.tags)
        return Component("denoising" if part == 3 else "translation", codes[source], codes[target])

    @property
    def directions(self) -> list[str]:
        """Of each component, such as "en-de"."""
        return [f"{component.src_lang}-{component.tgt_lang}" for component in self.components]

    def __getitems__(self, indices: Sequence[Any]) -> Any:
        """The batch of draws of one length, as `batch` makes it."""
        numbers = np.array([draw.example for draw in indices], dtype=np.int32)
        lengths = indices[0].padded_lengths or tuple(self.lengths[numbers].max(axis=0).tolist())
        return self.batch(numbers, lengths, indices[0].noise_seed)

    def batch(self, examples: np.ndarray, lengths: tuple[int, int], noise_seed: int = 0) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask`, `labels`: int64[B, L] of examples, padded to lengths of source and target."""
        rows_B = torch.from_numpy(np.ascontiguousarray(examples, dtype=np.int32)).to(self.device, non_blocking=True)
        texts_BL, lengths_B1 = self._texts(rows_B, 0, lengths[0])
        if self.noise is not None:
            noised_BL, shorter_B1 = self.noise(texts_BL, lengths_B1, self._generator.manual_seed(noise_seed))
            is_denoised_B1 = (rows_B >= self.num_translated)[:, None]
            texts_BL = torch.where(is_denoised_B1, noised_BL, texts_BL)
            lengths_B1 = torch.where(is_denoised_B1, shorter_B1, lengths_B1)
        input_ids_BL, mask_BL = self._sequences(texts_BL, lengths_B1, self._tags_N2[rows_B, 0, None], self._pad)
        labels_BL, _ = self._sequences(*self._texts(rows_B, 1, lengths[1]), self._tags_N2[rows_B, 1, None], -100)
        return {"input_ids": input_ids_BL, "attention_mask": mask_BL.long(), "labels": labels_BL}

    def _texts(self, rows_B: Tensor, side: int, length: int) -> tuple[Tensor, Tensor]:
        """Texts of one side from position 0 on, in batches of `length` with what comes before and behind them."""
        place_L = torch.arange(length - SPECIAL_TOKENS, dtype=torch.int32, device=self.device)
        start_B1, length_B1 = (of_examples[rows_B, side, None] for of_examples in (self._starts_N2, self._lengths_N2))
        return self._ids[(start_B1 + place_L).clamp(max=len(self._ids) - 1)], length_B1

    def _sequences(self, texts_BL: Tensor, length_B1: Tensor, tag_B1: Tensor, filler: int) -> tuple[Tensor, Tensor]:
        """Tag, text and end of each row, and where they are."""
        place_L = torch.arange(texts_BL.shape[1] + SPECIAL_TOKENS, dtype=torch.int32, device=self.device)
        ids_BL = torch.cat([tag_B1, texts_BL, torch.full_like(tag_B1, self._eos)], dim=1)
        ids_BL = torch.where(place_L == length_B1 + 1, self._eos, ids_BL)
        mask_BL = place_L <= length_B1 + 1
        return torch.where(mask_BL, ids_BL, filler).long(), mask_BL


class BatchCollator(DataCollatorForMultitaskSeq2Seq):
    """Hands on the batches of `TokenPairs`; rows of text are collated as always."""

    def __call__(self, features: Any) -> Any:
        return features if isinstance(features, dict) else super().__call__(features)
