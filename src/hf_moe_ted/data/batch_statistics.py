"""BatchStatistics: the batch shapes of an epoch, how often each comes, and their share of padding."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .bucketed_batches import PADDING, Batch
from .length_buckets import BatchSignature


@dataclass(frozen=True)
class ShapeStatistics:
    """Batches of one shape.

    Attributes:
        signature: the shape.
        num_batches: number of batches of all data-parallel ranks.
        num_tokens: tokens of source and target without padding.
    """

    signature: BatchSignature
    num_batches: int
    num_tokens: int

    @property
    def padding_share(self) -> float:
        """Share of padding in the tokens of these batches."""
        return 1 - self.num_tokens / (self.num_batches * self.signature.num_tokens)


@dataclass(frozen=True)
class BatchStatistics:
    """Batches of an epoch.

    Attributes:
        signatures: the chosen signatures that occur, those with fewer tokens per row first.
        leftovers: other shapes; without `length_buckets` all shapes.
        num_ranks: data-parallel ranks; each takes one batch in a step (of forward and backward).
    """

    signatures: tuple[ShapeStatistics, ...]
    leftovers: tuple[ShapeStatistics, ...]
    num_ranks: int

    @property
    def num_batches(self) -> int:
        """Number of batches, of all ranks together."""
        return sum(shape.num_batches for shape in self.signatures + self.leftovers)

    @property
    def num_steps(self) -> int:
        """Number of steps; each rank has a batch in each."""
        return -(-self.num_batches // self.num_ranks)

    @property
    def num_tokens(self) -> int:
        """Tokens of source and target without padding."""
        return sum(shape.num_tokens for shape in self.signatures + self.leftovers)

    @property
    def num_padded_tokens(self) -> int:
        """Tokens of source, target and padding."""
        return sum(shape.num_batches * shape.signature.num_tokens for shape in self.signatures + self.leftovers)

    @property
    def padding_share(self) -> float:
        """Share of padding in the tokens of all batches."""
        return 1 - self.num_tokens / self.num_padded_tokens

    @property
    def leftover_share(self) -> float:
        """Share of steps whose shape is not a signature."""
        return sum(shape.num_batches for shape in self.leftovers) / self.num_batches

    def rows(self) -> list[dict[str, int | float | str]]:
        """Rows of a table: one per signature, and one for all other shapes."""
        rows: list[dict[str, int | float | str]] = [
            {**shape.signature._asdict(), **self._counts([shape])} for shape in self.signatures
        ]
        if self.leftovers:
            other = f"{len(self.leftovers)} other shapes"
            rows.append({"num_rows": other, "source_length": "", "target_length": "", **self._counts(self.leftovers)})
        return rows

    def _counts(self, shapes: Iterable[ShapeStatistics]) -> dict[str, int | float]:
        shapes = list(shapes)
        num_batches = sum(shape.num_batches for shape in shapes)
        num_padded = sum(shape.num_batches * shape.signature.num_tokens for shape in shapes)
        return {
            "num_batches": num_batches,
            "share_of_steps": num_batches / self.num_batches,
            "padding_share": 1 - sum(shape.num_tokens for shape in shapes) / num_padded,
        }

    def __str__(self) -> str:
        """A table as text."""
        lines = [f"{'rows':>16}{'source':>8}{'target':>8}{'batches':>10}{'steps':>8}{'padding':>9}"]
        for row in self.rows():
            rows, source, target, num_batches, share, padding = row.values()
            lines.append(f"{rows:>16}{source:>8}{target:>8}{num_batches:>10,}{share:>8.1%}{padding:>9.1%}")
        lines.append(
            f"{len(self.signatures)} signatures, {self.padding_share:.1%} padding, {self.num_steps:,} steps of "
            f"{self.num_ranks} data-parallel ranks, {self.leftover_share:.1%} of them of other shapes"
        )
        return "\n".join(lines)


def batch_statistics(
    batches: Iterable[Batch], lengths_N2: np.ndarray, signatures: Iterable[BatchSignature], num_ranks: int
) -> BatchStatistics:
    """Statistics of batches of examples with these lengths; without padded lengths, of the longest in a batch."""
    num_batches, num_tokens = Counter[BatchSignature](), Counter[BatchSignature]()
    for batch in batches:
        of_batch = lengths_N2[batch.places[batch.places != PADDING]]
        lengths = batch.padded_lengths or of_batch.max(axis=0).tolist()
        signature = BatchSignature(len(batch.places), *lengths)
        num_batches[signature] += 1
        num_tokens[signature] += int(of_batch.sum())
    chosen = [signature for signature in signatures if signature in num_batches]
    others = sorted(num_batches.keys() - {*chosen})
    of_chosen, of_others = (
        tuple(ShapeStatistics(each, num_batches[each], num_tokens[each]) for each in shapes)
        for shapes in (chosen, others)
    )
    return BatchStatistics(of_chosen, of_others, num_ranks)


__all__ = ["BatchStatistics", "ShapeStatistics", "batch_statistics"]
