"""Differentiable collectives, each beside its transpose.

Their results can be kept for a recomputation ([`KeptResults`]). All of them are functional operations of
`torch.ops._c10d_functional`, which selective activation checkpointing can keep, too. Rows are the first dimension. If
ranks of a group have different numbers of rows, rows are padded for the exchange.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .private_torch import c10d

_wait = c10d.wait_tensor
_T = TypeVar("_T")


class KeptResults:
    """The results of a forward's collectives, in order, for use when that forward is computed again.

    `keep` and `reuse` are context managers. They apply to the collectives of this file, not to those of other code.
    """

    _of_thread = threading.local()

    def __init__(self) -> None:
        self.results: list[Any] = []
        self._next: int | None = None

    @contextlib.contextmanager
    def keep(self) -> Iterator[None]:
        """Context of the first forward: keep results."""
        with self._active():
            yield

    @contextlib.contextmanager
    def reuse(self) -> Iterator[None]:
        """Context of the recomputation: use kept results."""
        self._next = 0
        with self._active():
            yield

    @contextlib.contextmanager
    def _active(self) -> Iterator[None]:
        outer = getattr(self._of_thread, "kept", None)
        self._of_thread.kept = self
        try:
            yield
        finally:
            self._of_thread.kept = outer

    @classmethod
    def of(cls, run: Callable[[], _T]) -> _T:
        """The result of `run`, or its kept result from the first forward."""
        kept: KeptResults | None = getattr(cls._of_thread, "kept", None)
        if kept is None:
            return run()
        if kept._next is None:
            kept.results.append(run())
            return kept.results[-1]
        kept._next += 1
        return kept.results[kept._next - 1]


def sum_over(x: Tensor, group: ProcessGroup) -> Tensor:
    """Sum of `x` over the group; not differentiable."""
    return KeptResults.of(lambda: _wait(c10d.all_reduce(x.contiguous(), "sum", group.group_name)))


def max_over(x: Tensor, group: ProcessGroup) -> Tensor:
    """Elementwise maximum of `x` over the group; not differentiable."""
    return KeptResults.of(lambda: _wait(c10d.all_reduce(x.contiguous(), "max", group.group_name)))


def gather_even(x: Tensor, group: ProcessGroup) -> Tensor:
    """The `x` of all ranks, one after another; all have the same shape. Not differentiable."""
    return KeptResults.of(lambda: _wait(c10d.all_gather_into_tensor(x.contiguous(), group.size(), group.group_name)))


def exchange_even(x: Tensor, group: ProcessGroup) -> Tensor:
    """Send row `i` of `x` to rank `i`, and receive its row for this rank; not differentiable."""
    ones = [1] * group.size()
    return KeptResults.of(lambda: _wait(c10d.all_to_all_single(x.contiguous(), ones, ones, group.group_name)))


class _WithTranspose(torch.autograd.Function):
    """A function of a tensor whose backward is another function with the same arguments."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Any, transpose: Any, *args: Any) -> Tensor:
        ctx.transpose, ctx.args = transpose, args
        return run(x, *args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.transpose(grad, *ctx.args), None, None, *[None] * len(ctx.args)


def copy_to_group(x: Tensor, group: ProcessGroup) -> Tensor:
    """Identity, backward the sum over the group: the input of a column-parallel layer."""
    return _WithTranspose.apply(x, _same, sum_over, group)


def sum_over_group(x: Tensor, group: ProcessGroup) -> Tensor:
    """Sum over the group, backward identity: the output of a row-parallel layer."""
    return _WithTranspose.apply(x, sum_over, _same, group)


def take_share(x: Tensor, sizes: Sequence[int], group: ProcessGroup) -> Tensor:
    """This rank's share of rows that all ranks of the group hold; backward joins the shares of all ranks."""
    return _WithTranspose.apply(x, _own_rows, _gather_rows, sizes, group)


def join_shares(x: Tensor, sizes: Sequence[int], group: ProcessGroup) -> Tensor:
    """The rows of all ranks of the group, for a computation that all repeat; backward takes this rank's share."""
    return _WithTranspose.apply(x, _gather_rows, _own_rows, sizes, group)


def gather_rows(x: Tensor, sizes: Sequence[int], group: ProcessGroup) -> Tensor:
    """The rows of all ranks, for a layer that is split over the group; backward sums the gradients of each row."""
    return _WithTranspose.apply(x, _gather_rows, _scatter_sum, sizes, group)


def scatter_sum(x: Tensor, sizes: Sequence[int], group: ProcessGroup) -> Tensor:
    """The sum over the group, scattered by rows over its ranks: the output of a split layer; backward gathers."""
    return _WithTranspose.apply(x, _scatter_sum, _gather_rows, sizes, group)


class StartExchange(torch.autograd.Function):
    """Start an all-to-all of rows; [`FinishExchange`] takes both results and gives the received rows.

    The backward exchange starts in the backward of `FinishExchange` and is waited for here. So the work between the two
    overlaps with the exchange in both directions. The first result is `x`; it carries the gradient from one to the
    other.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], group: ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        pending = KeptResults.of(
            lambda: c10d.all_to_all_single(x.contiguous(), receive_sizes, send_sizes, group.group_name)
        )
        ctx.mark_non_differentiable(pending)
        return x.view_as(x), pending

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None, None, None]:
        return _wait(grad), None, None, None


class FinishExchange(torch.autograd.Function):
    """Wait for the exchange that [`StartExchange`] started; it takes the same sizes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        pending: Tensor,
        send_sizes: Sequence[int],
        receive_sizes: Sequence[int],
        group: ProcessGroup,
    ) -> Tensor:
        ctx.send_sizes, ctx.receive_sizes, ctx.group = send_sizes, receive_sizes, group
        return _wait(pending)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        # StartExchange waits for it
        sizes = ctx.send_sizes, ctx.receive_sizes
        return c10d.all_to_all_single(grad.contiguous(), *sizes, ctx.group.group_name), None, None, None, None


def even_shares(num_rows: int, num_ranks: int) -> list[int]:
    """Rows of each rank when `num_rows` are divided as evenly as possible; the first ranks may take one more."""
    share, rest = divmod(num_rows, num_ranks)
    return [share + (rank < rest) for rank in range(num_ranks)]


def _same(x: Tensor, group: ProcessGroup) -> Tensor:
    return x.view_as(x)


def _own_rows(x: Tensor, sizes: Sequence[int], group: ProcessGroup) -> Tensor:
    return x.split(sizes)[group.rank()].contiguous()


def _gather_rows(x: Tensor, sizes: Sequence[int], group: ProcessGroup) -> Tensor:
    longest = max(sizes)
    if min(sizes) == longest:
        return gather_even(x, group)
    padded = torch.nn.functional.pad(x, (0, 0) * (x.ndim - 1) + (0, longest - x.shape[0]))
    pieces = gather_even(padded, group).split(longest)
    return torch.cat([piece[:size] for piece, size in zip(pieces, sizes, strict=True)])


def _scatter_sum(x: Tensor, sizes: Sequence[int], group: ProcessGroup) -> Tensor:
    longest = max(sizes)
    if min(sizes) != longest:
        padding = (0, 0) * (x.ndim - 1)
        x = torch.cat([torch.nn.functional.pad(piece, (*padding, 0, longest - len(piece))) for piece in x.split(sizes)])
    rows = x.contiguous()
    share = KeptResults.of(lambda: _wait(c10d.reduce_scatter_tensor(rows, "sum", group.size(), group.group_name)))
    return share[: sizes[group.rank()]]


__all__ = [
    "FinishExchange",
    "KeptResults",
    "StartExchange",
    "copy_to_group",
    "even_shares",
    "exchange_even",
    "gather_even",
    "gather_rows",
    "join_shares",
    "max_over",
    "scatter_sum",
    "sum_over",
    "sum_over_group",
    "take_share",
]
