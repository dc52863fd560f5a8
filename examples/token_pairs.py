"""Parallel text as arrays of token ids: read from one file, kept on the device, cut into batches there.

A file of `prepare_tokens.py` holds each text once, without tags. `TokenPairs` makes the batches of a `MultitaskDataset`
from it with a few operations on the device, in well under a millisecond, where tokenizing the same batch takes longer
than a training step of a small model. Sampler, trainer and collator are those of text.

Shape letters: P pairs, N examples (2 P, both directions), X texts, S tokens of all texts, B rows, L positions, G
components.
"""

import io
import json
import lzma
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from multitask_data import Row
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from hf_moe_ted import DataCollatorForMultitaskSeq2Seq, MultitaskDataset, MultitaskSeq2SeqTrainer

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
    """

    ids: np.ndarray
    starts: np.ndarray
    english: np.ndarray
    languages: np.ndarray
    tags: dict[str, int]
    special_ids: dict[str, int]
    vocab_size: int

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
        )

    def save(self, path: Path) -> None:
        """Write one xz file, as small as the text compressed by xz."""
        about = {"tags": self.tags, "special_ids": self.special_ids, "vocab_size": self.vocab_size}
        buffer = io.BytesIO()
        np.savez(
            buffer,
            about=np.array(json.dumps(about)),
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
        with np.load(io.BytesIO(lzma.decompress(Path(path).read_bytes()))) as arrays:
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

    Example `n` is pair `n` from English for `n` below P, and pair `n - P` into English from there on.

    Args:
        arrays: the tokens.
        device: where batches are made.
        pairs: int64[P], numbers of the pairs to take, all by default.
    """

    def __init__(self, arrays: TokenArrays, device: torch.device | str, pairs: np.ndarray | None = None):
        self.arrays = arrays
        self.epoch = 0
        self.device = torch.device(device)
        pairs_P = np.arange(len(arrays.english)) if pairs is None else pairs
        codes = list(arrays.tags)
        present = np.unique(arrays.languages[pairs_P])
        place = np.searchsorted(present, arrays.languages[pairs_P])
        self.components = [Component("translation", "en", codes[number]) for number in present]
        self.components += [Component("translation", codes[number], "en") for number in present]
        self.component_numbers = np.concatenate([place, place + len(present)]).astype(np.uint16)
        english_P, other_P = arrays.english[pairs_P], arrays.num_english + pairs_P
        texts_N2 = np.stack([np.concatenate([english_P, other_P]), np.concatenate([other_P, english_P])], axis=1)
        tag_ids = np.array(list(arrays.tags.values()))
        tags_P = tag_ids[arrays.languages[pairs_P]]
        english_tags_P = np.full_like(tags_P, tag_ids[0])
        tags_N2 = np.stack([np.concatenate([english_tags_P, tags_P]), np.concatenate([tags_P, english_tags_P])], axis=1)
        lengths_X = np.diff(arrays.starts)
        self.lengths = (lengths_X[texts_N2] + SPECIAL_TOKENS).astype(np.int32)
        self._ids = torch.from_numpy(arrays.ids.astype(np.int32)).to(self.device)
        self._starts_N2 = torch.from_numpy(arrays.starts[:-1][texts_N2].astype(np.int32)).to(self.device)
        self._lengths_N2 = torch.from_numpy(lengths_X[texts_N2].astype(np.int32)).to(self.device)
        self._tags_N2 = torch.from_numpy(tags_N2.astype(np.int32)).to(self.device)

    def __len__(self) -> int:
        return len(self.component_numbers)

    @property
    def directions(self) -> list[str]:
        """Of each component, such as "en-de"."""
        return [f"{component.src_lang}-{component.tgt_lang}" for component in self.components]

    def __getitems__(self, indices: Sequence[Any]) -> Any:
        """The batch of draws of one length, as `batch` makes it."""
        numbers = np.array([draw.example for draw in indices], dtype=np.int32)
        lengths = indices[0].padded_lengths or tuple(self.lengths[numbers].max(axis=0).tolist())
        return self.batch(numbers, lengths)

    def batch(self, examples: np.ndarray, lengths: tuple[int, int]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask`, `labels`: int64[B, L] of examples, padded to lengths of source and target."""
        rows_B = torch.from_numpy(np.ascontiguousarray(examples, dtype=np.int32)).to(self.device, non_blocking=True)
        pad, eos = self.arrays.special_ids["pad"], self.arrays.special_ids["eos"]
        input_ids_BL, mask_BL = self._side(rows_B, 0, lengths[0], pad, eos)
        labels_BL, _ = self._side(rows_B, 1, lengths[1], -100, eos)
        return {"input_ids": input_ids_BL, "attention_mask": mask_BL.long(), "labels": labels_BL}

    def _side(self, rows_B: Tensor, side: int, length: int, filler: int, eos: int) -> tuple[Tensor, Tensor]:
        """Tag, text and end of each row, and where they are."""
        place_L = torch.arange(length, dtype=torch.int32, device=self.device)
        start_B1, length_B1, tag_B1 = (
            of_examples[rows_B, side, None] for of_examples in (self._starts_N2, self._lengths_N2, self._tags_N2)
        )
        ids_BL = self._ids[(start_B1 + place_L - 1).clamp(0, len(self._ids) - 1)]
        ids_BL = torch.where(place_L == 0, tag_B1, ids_BL)
        ids_BL = torch.where(place_L == length_B1 + 1, eos, ids_BL)
        mask_BL = place_L <= length_B1 + 1
        return torch.where(mask_BL, ids_BL, filler).long(), mask_BL


class BatchCollator(DataCollatorForMultitaskSeq2Seq):
    """Hands on the batches of `TokenPairs`; rows of text are collated as always."""

    def __call__(self, features: Any) -> Any:
        return features if isinstance(features, dict) else super().__call__(features)


class TokenPairsTrainer(MultitaskSeq2SeqTrainer):
    """[`MultitaskSeq2SeqTrainer`] on `TokenPairs`, whose evaluation is exact for each direction.

    `evaluate` gives `eval_loss`, nats per target token of all held-out examples together, tag and end counted, and
    leaves in the log history `direction_losses`, the same of each direction ("en-de"). The Trainer's own is a mean of
    the means of batches. Of sparse models it has `expert_load`, a list for each sparse layer ("encoder.1"), 1 being an
    even share, and the means over layers of the busiest expert and of the share of tokens that no expert computes.
    Training has no hooks: nothing that is not part of it counts into its seconds.
    """

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        data: TokenPairs = self.eval_dataset if eval_dataset is None else eval_dataset
        seconds = -_now(data.device)
        devices = [data.device] if data.device.type == "cuda" else []
        # routers that drop tokens at random draw in evaluation, too: training has the same numbers with or without it
        with (
            torch.random.fork_rng(devices),
            self.compute_loss_context_manager(),
            ExpertLoad(self.model) as load,
        ):
            torch.manual_seed(0)
            nats_G, tokens_G = held_out_nats(self.model, data, self.args.max_tokens_per_batch)
        seconds += _now(data.device)
        metrics = {
            f"{metric_key_prefix}_loss": float(nats_G.sum() / tokens_G.sum()),
            f"{metric_key_prefix}_runtime": seconds,
            **load.means(),
        }
        self.log(metrics)
        self.state.log_history[-1]["expert_load"] = load.shares()
        losses = dict(zip(data.directions, (nats_G / tokens_G).tolist(), strict=True))
        self.state.log_history[-1]["direction_losses"] = losses
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class ExpertLoad:
    """Counts what the experts of each sparse layer get while it is entered."""

    def __init__(self, model: nn.Module):
        self._routers = {
            ".".join(name.split(".")[-5:-2:2]): module
            for name, module in model.named_modules()
            if name.endswith(".ffn.router")
        }
        self._counts: dict[str, Tensor] = {}
        self._num_tokens: dict[str, Tensor] = {}

    def __enter__(self) -> "ExpertLoad":
        self._handles = [
            router.register_forward_hook(partial(self._count, layer)) for layer, router in self._routers.items()
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _count(self, layer: str, router: nn.Module, args: Any, output: Any) -> None:
        routing = output[1]
        mask_T = torch.ones_like(routing.expert_ids[:, 0]) if routing.token_mask is None else routing.token_mask
        self._counts[layer] = self._counts.get(layer, 0) + routing.num_tokens_per_expert()
        self._num_tokens[layer] = self._num_tokens.get(layer, 0) + mask_T.sum() * routing.expert_ids.shape[1]

    def shares(self) -> dict[str, list[float]]:
        """Tokens of each expert by layer, in parts of an even share."""
        return {
            layer: (counts_E / counts_E.sum().clamp(min=1) * len(counts_E)).tolist()
            for layer, counts_E in self._counts.items()
        }

    def means(self) -> dict[str, float]:
        """Means over the layers: busiest expert, and share of the tokens that no expert computes; none if dense."""
        if not self._counts:
            return {}
        kept = [float(counts_E.sum() / self._num_tokens[layer]) for layer, counts_E in self._counts.items()]
        busiest = [max(of_layer) for of_layer in self.shares().values()]
        return {"router/load_max": fmean(busiest), "router/dropped": 1 - fmean(kept)}


@torch.no_grad()
def held_out_nats(model: nn.Module, data: TokenPairs, max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Cross-entropy without smoothing of the targets of each component, in nats, and their tokens, float64[G] each."""
    was_training = model.training
    model.eval()
    sums_G2 = torch.zeros(len(data.components), 2, dtype=torch.float64, device=data.device)
    components_N = torch.from_numpy(data.component_numbers.astype(np.int64)).to(data.device)
    for examples, lengths in _batches_by_length(data, max_tokens):
        batch = data.batch(examples, lengths)
        labels_BL = batch.pop("labels")
        logits_BLV = model(**batch, decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels_BL)).logits
        # `cross_entropy` gives 0 where there is padding
        nats_B = F.cross_entropy(logits_BLV.float().mT, labels_BL, reduction="none").double().sum(dim=1)
        found_B2 = torch.stack([nats_B, (labels_BL != -100).sum(dim=1).double()], dim=1)
        sums_G2.index_add_(0, components_N[torch.from_numpy(examples).to(data.device)], found_B2)
    model.train(was_training)
    nats_G, tokens_G = sums_G2.T.cpu().numpy()
    return nats_G, tokens_G


def _batches_by_length(data: TokenPairs, max_tokens: int) -> Iterator[tuple[np.ndarray, tuple[int, int]]]:
    order = np.argsort(data.lengths.max(axis=1), kind="stable")
    start = 0
    while start < len(order):
        longest = np.maximum.accumulate(data.lengths[order[start:]], axis=0).sum(axis=1)
        num_rows = max(1, int(np.searchsorted(longest * np.arange(1, len(longest) + 1), max_tokens, side="right")))
        examples = order[start : start + num_rows]
        yield examples, tuple(data.lengths[examples].max(axis=0).tolist())
        start += num_rows


def _now(device: torch.device) -> float:
    """Seconds, when the device is done with what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
