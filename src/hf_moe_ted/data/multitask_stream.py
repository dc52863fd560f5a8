"""MultitaskStream: batches with a token budget from streamed datasets."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from .bucketed_batches import PADDING, bucketed_batches
from .collator import DataCollatorForMultitaskSeq2Seq
from .length_buckets import MAX_SIGNATURES, BatchSignature, choose_signatures
from .mixture import Mixture
from .multitask_rows import PADDING_ROW, TASKS, Example, examples_of_row, is_empty
from .number_checks import require_integer, require_number
from .token_budget import batches_by_length, checked_buckets, padded_lengths

Encoded = dict[str, list[int]]


@dataclass(frozen=True)
class StreamSource:
    """A stream of rows of one task.

    Attributes:
        task: `"translation"` or `"denoising"`.
        dataset: rows in the form of [`MultitaskDataset`], from a [`datasets.IterableDataset`] or any iterable that can
            be iterated again. If it has `set_epoch`, that is called before each pass, with the number of the pass.
        size: its number of rows for the mixture; a guess if unknown.

    Raises:
        ValueError: the task is unknown, or the size is not positive and finite.
    """

    task: str
    dataset: Iterable[Any]
    size: int

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task ({self.task!r}) must be one of {TASKS}")
        if not 0 < require_number("size", self.size) < math.inf:
            raise ValueError(f"size ({self.size}) must be positive and finite")


class MultitaskStream(IterableDataset):
    """Endless batches of streamed translation and denoising, drawn at a temperature.

    Each item is a batch: a list of examples that the collator has encoded, for a `DataLoader` with `batch_size=None`
    and the collator as `collate_fn`. A buffer of rows is drawn from the sources, sorted by length and cut into batches
    of at most `max_tokens_per_batch` tokens, which come in random order. A source that ends starts again, so ranks
    never run out of batches; `max_steps` sets the length of training. Examples without text on one side are left out.

    With `length_buckets` batches have few shapes, the best for the first buffer, and in each step all ranks have the
    same shape, as with [`TokenBudgetBatchSampler`]. Every rank then counts the tokens of all rows. Remaining examples
    of a buffer are in batches of other shapes, so large buffers have fewer of these.

    Draws follow from `seed` and the sources alone. After `state_dict()` and `load_state_dict()` the next batch comes;
    the rows of the current pass are read again for this, because streams that shuffle in a buffer would lose the buffer
    otherwise. The state belongs to the object that was iterated: with a worker, its copy in the worker; with a Trainer,
    the shard of its data loader. The Trainer resumes by skipping batches.

    Args:
        sources: the streams.
        collator: the collator of the data loader.
        max_tokens_per_batch: most tokens of one batch of one data-parallel rank: source, target and padding.
        mixture: says how often sources are drawn; sizes define the epochs of a temperature's warmup.
        both_directions: whether to translate in the reverse direction, too.
        buffer_rows: number of rows that are sorted by length at once.
        seed: seed of all random choices.
        length_buckets: lengths in tokens, ascending, to which sources and targets are padded; by default they are
            padded to the longest of a batch.
        max_signatures: largest number of batch shapes with `length_buckets`, without those of remaining examples.

    Raises:
        ValueError: there is no source; see also [`Mixture`]. During iteration: a source has no rows, rows have no text,
            an example is longer than a batch or the last bucket, or there is more than one worker.

    Example:

    ```python
    >>> stream = MultitaskStream(
    ...     [StreamSource("translation", en_de, size=2_000_000), StreamSource("denoising", swahili, size=40_000)],
    ...     collator, max_tokens_per_batch=8192, mixture=Mixture(temperature=5.0), both_directions=True,
    ... )
    ```
    """

    def __init__(
        self,
        sources: Sequence[StreamSource],
        collator: DataCollatorForMultitaskSeq2Seq,
        max_tokens_per_batch: int,
        *,
        mixture: Mixture | None = None,
        both_directions: bool = False,
        buffer_rows: int = 10_000,
        seed: int = 0,
        length_buckets: Sequence[int] | None = None,
        max_signatures: int = MAX_SIGNATURES,
    ):
        if not sources:
            raise ValueError("sources is empty: a stream needs at least one StreamSource")
        for name, value, minimum in (
            ("buffer_rows", buffer_rows, 1),
            ("max_tokens_per_batch", max_tokens_per_batch, 1),
            ("seed", seed, 0),
            ("max_signatures", max_signatures, 1),
        ):
            require_integer(name, value, minimum)
        self.sources = list(sources)
        self.collator = collator
        self.max_tokens_per_batch = max_tokens_per_batch
        self.mixture = Mixture() if mixture is None else mixture
        self.both_directions = both_directions
        self.buffer_rows = buffer_rows
        self.seed = seed
        self.length_buckets = checked_buckets(length_buckets, collator)
        self.max_signatures = max_signatures
        self.num_shards, self.shard_index = 1, 0
        self._probabilities(0)  # raises if it is invalid
        self._start: dict[str, Any] = {
            "num_draws": 0,
            "passes": [(0, 0)] * len(self.sources),
            "num_batches": 0,
            "signatures": None,  # until the first buffer is read
        }
        self._state = self._start

    def shard(self, num_shards: int, index: int) -> "MultitaskStream":
        """The stream for one of `num_shards` data-parallel ranks: every `num_shards`-th drawn row.

        It starts where this stream does, also after a loaded state.

        Raises:
            ValueError: there is no shard of this index, or the loaded state is of another number of shards.
        """
        if not 0 <= index < num_shards:
            raise ValueError(f"index ({index}) must be at least 0 and less than num_shards ({num_shards})")
        if self._start["num_draws"] + self._start["num_batches"] and num_shards != self.num_shards:
            raise ValueError(
                f"the loaded state is of a stream with {self.num_shards} shards, not {num_shards}, so it has no "
                "position for each of these; load the state of a shard into that shard"
            )
        shard = MultitaskStream(
            self.sources,
            self.collator,
            self.max_tokens_per_batch,
            mixture=self.mixture,
            both_directions=self.both_directions,
            buffer_rows=self.buffer_rows,
            seed=self.seed,
            length_buckets=self.length_buckets,
            max_signatures=self.max_signatures,
        )
        shard.num_shards, shard.shard_index = num_shards, index
        shard._start = shard._state = self._start
        return shard

    def state_dict(self) -> dict[str, Any]:
        """The position of the last iteration: draws before its buffer, and finished batches of the buffer."""
        return {**self._state, "num_shards": self.num_shards}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Make iterations start after a saved state, which must have the same sources and options.

        Raises:
            ValueError: it is no state, or has another number of sources or shards.
        """
        _check_state(state_dict)
        for name, of_state, ours in (
            ("sources", len(state_dict["passes"]), len(self.sources)),
            ("shards", state_dict["num_shards"], self.num_shards),
        ):
            if of_state != ours:
                raise ValueError(f"the state is of a stream with {of_state} {name}, but this one has {ours}")
        signatures = state_dict.get("signatures")
        is_begun = state_dict["num_draws"] + state_dict["num_batches"] > 0
        if is_begun and (signatures is None) != (self.length_buckets is None):
            has = "without" if signatures is None else "with"
            raise ValueError(f"the state is of a stream {has} length_buckets, but this one has {self.length_buckets}")
        self._start = self._state = {**{name: state_dict.get(name) for name in self._state}, "signatures": signatures}

    def __iter__(self) -> Iterator[list[Encoded]]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ValueError(
                f"dataloader_num_workers ({worker.num_workers}) must be 0 or 1 for a stream: every worker would read "
                "and return all of it"
            )
        places, num_draws, num_done = self._start["passes"], self._start["num_draws"], self._start["num_batches"]
        readers = [_Reader(source, *place) for source, place in zip(self.sources, places, strict=True)]
        signatures = self._start["signatures"]
        while True:
            before = {"num_draws": num_draws, "passes": [reader.place for reader in readers]}
            random = np.random.default_rng([self.seed, num_draws])
            examples = self._draw(readers, num_draws, random)
            if self.length_buckets is None:
                batches = self._batches(examples, random)
            else:
                batches, signatures = self._bucketed_batches(examples, signatures, random)
            for number in range(num_done, len(batches)):
                self._state = {**before, "num_batches": number + 1, "signatures": signatures}
                yield batches[number] if self.length_buckets is None else self.collator.encode(batches[number])
            num_draws += self.buffer_rows * self.num_shards
            num_done = 0

    def _probabilities(self, num_draws: int) -> np.ndarray:
        sizes = [source.size for source in self.sources]
        return self.mixture.probabilities([source.task for source in self.sources], sizes, num_draws / sum(sizes))

    def _draw(self, readers: list["_Reader"], num_draws: int, random: np.random.Generator) -> list[Example]:
        """Fill the buffer. Equal shapes on all ranks need the rows of all ranks."""
        num_rows = self.buffer_rows * self.num_shards
        drawn = random.choice(len(readers), size=num_rows, p=self._probabilities(num_draws)).tolist()
        noise_seeds = random.integers(2**63, size=num_rows).tolist()
        examples: list[Example] = []
        for number, (source, noise_seed) in enumerate(zip(drawn, noise_seeds, strict=True)):
            row, where = readers[source].next_row()
            if number % self.num_shards == self.shard_index or self.length_buckets is not None:
                task = self.sources[source].task
                of_row = examples_of_row(row, task, both_directions=self.both_directions, where=where)
                with_text = [example for example in of_row if not is_empty(example["source"], example["target"])]
                examples += [{**example, "noise_seed": noise_seed} for example in with_text]
        if not examples:
            raise ValueError(
                f"{self.buffer_rows} rows in succession have no text on one side; check the columns of the sources"
            )
        return examples

    def _batches(self, examples: list[Example], random: np.random.Generator) -> list[list[Encoded]]:
        """Cut the buffer into batches."""
        encoded = self.collator.encode(examples)
        lengths = np.array([(len(example["input_ids"]), len(example["labels"])) for example in encoded])
        lengths = padded_lengths(lengths, self.collator, self.max_tokens_per_batch)
        batches = batches_by_length(lengths, self.max_tokens_per_batch, random)
        return [[encoded[place] for place in batch] for batch in batches]

    def _bucketed_batches(
        self, examples: list[Example], signatures: Sequence[Any] | None, random: np.random.Generator
    ) -> tuple[list[list[Example]], list[BatchSignature]]:
        """The batches of this shard, before encoding, and the signatures, which the first buffer sets."""
        lengths = np.array(self.collator.lengths(examples))
        padded = padded_lengths(lengths, self.collator, self.max_tokens_per_batch, self.length_buckets)
        if signatures is None:
            signatures = choose_signatures(
                padded, self.max_tokens_per_batch, max_signatures=self.max_signatures, num_ranks=self.num_shards
            )
        chosen = [BatchSignature(*signature) for signature in signatures]
        batches = bucketed_batches(padded, chosen, self.max_tokens_per_batch, self.num_shards, random)
        return [
            [
                {**(PADDING_ROW if place == PADDING else examples[place]), "padded_lengths": batch.padded_lengths}
                for place in batch.places.tolist()
            ]
            for batch in batches[self.shard_index :: self.num_shards]
        ], chosen


def _check_state(state: Any) -> None:
    fields = {"num_draws": 0, "num_batches": 0, "num_shards": 1}
    if not isinstance(state, Mapping) or {*fields, "passes"} - state.keys():
        raise ValueError(f"the state must have {', '.join([*fields, 'passes'])}, got {repr(state)[:200]}")
    for name, minimum in fields.items():
        require_integer(f"{name} of the state", state[name], minimum)
    for place in state["passes"]:
        if not isinstance(place, Sequence) or len(place) != 2:
            raise ValueError(f"passes of the state has {place!r}, but must have a pass and a row of each source")
        for number in place:
            require_integer("passes of the state", number, 0)
    for signature in state.get("signatures") or ():
        if not isinstance(signature, Sequence) or len(signature) != 3:
            raise ValueError(f"signatures of the state has {signature!r}, but must have rows and two lengths of each")
        for number in signature:
            require_integer("signatures of the state", number, 1)


class _Reader:
    """Reads rows of a source, pass after pass, from a given place.

    Args:
        source: the source to read.
        num_passes: number of finished passes.
        num_rows: number of rows that were read in the current pass.
    """

    def __init__(self, source: StreamSource, num_passes: int, num_rows: int):
        self.source = source
        self.place = (int(num_passes), int(num_rows))
        self._rows = self._start()

    def _start(self) -> Iterator[Any]:
        if hasattr(self.source.dataset, "set_epoch"):
            self.source.dataset.set_epoch(self.place[0])
        return itertools.islice(iter(self.source.dataset), self.place[1], None)

    def next_row(self) -> tuple[Any, str]:
        """The next row, and its name in errors."""
        for _ in range(2):
            num_passes, num_rows = self.place
            for row in self._rows:
                self.place = (num_passes, num_rows + 1)
                return row, f"row {num_rows} of a {self.source.task} stream"
            self.place = (num_passes + 1, 0)
            self._rows = self._start()
        raise ValueError(
            f"a {self.source.task} stream of size {self.source.size} has no row; can it be iterated again?"
        )


__all__ = ["MultitaskStream", "StreamSource"]
