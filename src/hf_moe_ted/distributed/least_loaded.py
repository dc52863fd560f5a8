"""Decide from numbers alone which rank computes which rows of which expert, if the load of ranks is very uneven.

Least-Loaded Expert Parallelism (https://huggingface.co/papers/2601.17111): while the largest load is under a bound, the
rank that holds an expert computes it. Above the bound, a rank keeps rows up to the mean. The rest goes to the ranks
with the least load, from the largest expert first, in chunks that are large enough for an efficient product. Every rank
computes the same answer from the same counts.

Shape letters: S ranks that rows come from, P ranks that they go to, E experts of all ranks together.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]

LEAST_LOADED = "ted_least_loaded"  # name as an `ep_implementation`
LEAST_LOADED_BOUND = 1.3
LEAST_LOADED_MIN_TOKENS = 1024


def check_least_loaded(bound: Any, min_tokens: Any) -> None:
    """
    Raises:
        ValueError: the bound is below 1 or not a number, or chunks have less than one token.
    """
    if not (isinstance(bound, int | float) and 1.0 <= bound < math.inf):
        raise ValueError(
            f"least_loaded_bound ({bound!r}) must be a number of at least 1; 1 is the load if all ranks get the same "
            f"number of tokens; the default is {LEAST_LOADED_BOUND}"
        )
    if not (isinstance(min_tokens, int) and min_tokens >= 1):
        raise ValueError(
            f"least_loaded_min_tokens ({min_tokens!r}) must be a whole number of at least 1; the default is "
            f"{LEAST_LOADED_MIN_TOKENS}"
        )


def share_loads(loads_E: Counts, num_ranks: int, *, bound: float, min_tokens: int) -> Counts | None:
    """Rows of each expert that each rank computes.

    Args:
        loads_E: int64[E], rows of each expert; rank `p` of P holds the experts from `p * E / P` on.
        num_ranks: P.
        bound: largest load of a rank, as a multiple of the mean, up to which nothing moves.
        min_tokens: fewest rows of an expert that go to another rank.

    Returns:
        int64[P, E]; its sum over ranks is `loads_E`. `None` if each rank computes its own experts.
    """
    num_local = len(loads_E) // num_ranks
    shares_PE = np.zeros((num_ranks, len(loads_E)), dtype=np.int64)
    for expert, load in enumerate(loads_E):
        shares_PE[expert // num_local, expert] = load
    load_P = shares_PE.sum(axis=1).tolist()
    total = sum(load_P)
    if max(load_P) * num_ranks <= bound * total:
        return None
    limit = -(-total // num_ranks)
    is_moved = False
    for expert in np.argsort(-loads_E, kind="stable").tolist():
        home = expert // num_local
        while (excess := min(load_P[home] - limit, int(shares_PE[home, expert]))) >= min_tokens:
            helper = load_P.index(min(load_P))
            num_rows = min(excess, max(limit - load_P[helper], min_tokens))
            if load_P[helper] + num_rows >= load_P[home]:
                break  # all ranks would wait for the helper
            for rank, change in ((home, -num_rows), (helper, num_rows)):
                shares_PE[rank, expert] += change
                load_P[rank] += change
            is_moved = True
    return shares_PE if is_moved else None


class RowShares:
    """The destinations of rows. Rows of an expert form one queue, ordered by source rank; ranks take consecutive parts.

    Args:
        counts_SE: int64[S, E], rows of each expert that a rank has.
        shares_PE: int64[P, E] from [`share_loads`].
    """

    def __init__(self, counts_SE: Counts, shares_PE: Counts):
        self._counts_SE, self._shares_PE = counts_SE, shares_PE
        self._starts_SE = counts_SE.cumsum(axis=0) - counts_SE
        self._starts_PE = shares_PE.cumsum(axis=0) - shares_PE

    def sent_by(self, source: int) -> tuple[Counts, Counts]:
        """int64[P, E] twice: the first row for each rank among the source's rows of the expert; the number of rows."""
        return _overlap(self._starts_SE[source], self._counts_SE[source], self._starts_PE, self._shares_PE)

    def received_by(self, rank: int) -> Counts:
        """int64[S, E], rows that come from each rank."""
        return _overlap(self._starts_PE[rank], self._shares_PE[rank], self._starts_SE, self._counts_SE)[1]


def _overlap(start_E: Counts, size_E: Counts, starts_XE: Counts, sizes_XE: Counts) -> tuple[Counts, Counts]:
    """Where the second intervals begin in the first ones (0 outside), and the length of the overlap."""
    firsts_XE = np.maximum(starts_XE - start_E, 0)
    ends_XE = np.minimum(starts_XE + sizes_XE - start_E, size_E)
    overlaps_XE = np.maximum(ends_XE - firsts_XE, 0)
    return firsts_XE * (overlaps_XE > 0), overlaps_XE


@dataclass(frozen=True)
class ExpertVisits:
    """Experts that go from the rank that holds them to ranks that help it, as seen by one rank.

    Attributes:
        sent: local numbers of this rank's experts in sending order; an expert may go to several ranks.
        send_sizes: number of experts sent to each rank.
        received: global numbers of the experts that arrive, in their order.
        receive_sizes: number of experts from each rank.
    """

    sent: list[int]
    send_sizes: list[int]
    received: list[int]
    receive_sizes: list[int]

    @classmethod
    def of(cls, shares_PE: Counts, rank: int) -> "ExpertVisits":
        num_ranks, num_experts = shares_PE.shape
        num_local = num_experts // num_ranks
        own = slice(rank * num_local, (rank + 1) * num_local)
        to_rank = [[] if p == rank else np.flatnonzero(shares_PE[p, own]).tolist() for p in range(num_ranks)]
        received = [e for e in np.flatnonzero(shares_PE[rank]).tolist() if e // num_local != rank]
        return cls(
            sent=[expert for experts in to_rank for expert in experts],
            send_sizes=[len(experts) for experts in to_rank],
            received=received,
            receive_sizes=np.bincount(np.array(received, dtype=np.int64) // num_local, minlength=num_ranks).tolist(),
        )


__all__ = [
    "LEAST_LOADED",
    "LEAST_LOADED_BOUND",
    "LEAST_LOADED_MIN_TOKENS",
    "ExpertVisits",
    "RowShares",
    "check_least_loaded",
    "share_loads",
]
