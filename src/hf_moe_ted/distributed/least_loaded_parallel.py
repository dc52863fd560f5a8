"""Expert parallelism in which ranks with few tokens help ranks with many: tokens and experts move.

Shape letters: T tokens of this rank, K experts per token, R rows sent, V rows received, S ranks that rows come from,
P ranks of the expert-parallel group, E experts of all of them, G experts that visit this rank, N numbers of an expert,
D model width.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers.distributed.expert_parallel import EPImplementationInterface

from ..kernels.permutation import sort_slots
from .collectives import FinishExchange, KeptResults, StartExchange, gather_even
from .expert_parallel import Dispatch, TedExpertParallel, layout_of_experts
from .least_loaded import LEAST_LOADED, Counts, ExpertVisits, RowShares, share_loads
from .private_torch import parameter_table


@dataclass(frozen=True)
class SharedDispatch(Dispatch):
    """A dispatch that sends some rows to a rank that does not hold their expert. All ranks of a group have one.

    Attributes:
        visits: the experts that move, too.
        guest_ids_V: int64[V], for each row that this rank gets, the index of its expert among the arriving experts; the
            number of arriving experts for a row of a local expert.
    """

    visits: ExpertVisits
    guest_ids_V: Tensor


class LeastLoadedExpertParallel(TedExpertParallel):
    """Like its parent, but the least loaded ranks compute what others have above the mean load.

    Source: https://huggingface.co/papers/2601.17111. The host reads the number of rows of each expert once per layer;
    the parent reads those of each rank. Experts are sent while ranks compute their own experts. In backward the
    gradients return at the same time, and are added to those of the rank that holds the expert.
    """

    can_be_bounded = False

    def __init__(self, experts: Any, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh):
        super().__init__(experts, ep_mesh, tp_mesh)
        layout = layout_of_experts(experts)
        self.bound, self.min_tokens = layout.least_loaded_bound, layout.least_loaded_min_tokens

    def _plan(self, chunks: tuple[Tensor, ...]) -> list[Dispatch]:
        (expert_ids_TK,) = chunks  # the layout allows only one chunk
        order, row_TK, counts_E = sort_slots(expert_ids_TK, self.num_experts)
        rank, ep_size, num_local = self.ep_group.rank(), self.ep_group.size(), self.num_local_experts
        received_SE = gather_even(counts_E, self.ep_group)
        source = rank
        if self.drops_duplicates:
            received_SE = gather_even(received_SE, self.etp_group)
            source += self.etp_group.rank() * ep_size
        received_SE = received_SE.view(-1, self.num_experts)
        counts_SE = np.array(KeptResults.of(received_SE.tolist), dtype=np.int64)
        shares_PE = share_loads(counts_SE.sum(axis=0), ep_size, bound=self.bound, min_tokens=self.min_tokens)
        if shares_PE is not None:
            return [self._shared_dispatch(order, row_TK, counts_SE, shares_PE, source)]
        own = slice(rank * num_local, (rank + 1) * num_local)
        sent = counts_SE[source].reshape(ep_size, -1).sum(axis=1).tolist()
        received = counts_SE[:, own].sum(axis=1).tolist()
        return [self._dispatch(order, row_TK, sent, received, received_SE[:, own])]

    def _shared_dispatch(
        self, order: Tensor, row_TK: Tensor, counts_SE: Counts, shares_PE: Counts, source: int
    ) -> SharedDispatch:
        """Send rows in the order of [`sort_slots`], each to a rank that computes its expert.

        Args:
            source: index of this rank among the S.
        """
        rank, ep_size, num_local = self.ep_group.rank(), self.ep_group.size(), self.num_local_experts
        # ranks that gather their rows are neighbours in a queue, so each brings about the same number
        rows = RowShares(swap_axes(counts_SE, len(counts_SE) // ep_size), shares_PE)
        visits = ExpertVisits.of(shares_PE, rank)
        own_E = np.full(self.num_experts, num_local)
        own_E[rank * num_local : (rank + 1) * num_local] = np.arange(num_local)
        guest_E = np.full(self.num_experts, len(visits.received))
        guest_E[visits.received] = np.arange(len(visits.received))

        num_sources, num_together = len(counts_SE), len(counts_SE) // ep_size
        first_PE, sent_PE = rows.sent_by(source % ep_size * num_together + source // ep_size)
        first_PE = first_PE + counts_SE[source].cumsum() - counts_SE[source]
        received_SE = swap_axes(rows.received_by(rank), ep_size)
        first, sent, received, own, guest = on_device(
            [first_PE, sent_PE, received_SE, np.tile(own_E, num_sources), np.tile(guest_E, num_sources)], order.device
        )
        num_sent, num_received = int(sent_PE.sum()), int(received_SE.sum())
        place_R = ranges(first, sent, num_sent)
        row_of_place = row_TK.new_full((num_sent + 1,), -1)  # the last belongs to -1, a slot without a row
        row_of_place[place_R] = torch.arange(num_sent, device=order.device, dtype=row_TK.dtype)
        received_S = received_SE.sum(axis=1)
        of_group = received_S.reshape(-1, ep_size)
        return SharedDispatch(
            slot_R=order[place_R],
            row_TK=row_of_place[row_TK.long()],
            send_sizes=sent_PE.sum(axis=1).tolist(),
            receive_sizes=of_group[source // ep_size].tolist(),
            received_sizes=of_group.sum(axis=1).tolist(),
            expert_ids_V=own.repeat_interleave(received, output_size=num_received),
            visits=visits,
            guest_ids_V=guest.repeat_interleave(received, output_size=num_received),
        )

    def _run_on_rows(self, rows_VD: Tensor, dispatch: Dispatch) -> Tensor:
        if not isinstance(dispatch, SharedDispatch):
            return super()._run_on_rows(rows_VD, dispatch)
        visits = dispatch.visits
        sizes = visits.send_sizes, visits.receive_sizes, self.ep_group
        with self._own_view_of_parameters():
            parameters = {name: param for name, param in parameter_table(self.experts).items() if param is not None}
            traveling = StartExchange.apply(TakeExperts.apply(visits.sent, *parameters.values()), *sizes)
            output_VD = self._run_on_some(rows_VD, dispatch.expert_ids_V, self.num_local_experts)
        guests_GN = FinishExchange.apply(*traveling, *sizes)
        if guests_GN.requires_grad:
            output_VD, guests_GN = ReturnFirst.apply(output_VD, guests_GN)
        if not visits.received:
            return output_VD
        with self._as_parameters(guests_GN, parameters):
            return output_VD + self._run_on_some(rows_VD, dispatch.guest_ids_V, len(visits.received))

    def _run_on_some(self, rows_VD: Tensor, expert_ids_V: Tensor, num_experts: int) -> Tensor:
        """Zeros for rows without an expert here; not every experts function returns zeros for them."""
        if expert_ids_V.shape[0] == 0:
            return self._run_own_experts(rows_VD, expert_ids_V)
        is_here_V1 = (expert_ids_V < num_experts).to(rows_VD.dtype).unsqueeze(1)
        return self.experts_forward(rows_VD, expert_ids_V.unsqueeze(1), is_here_V1)

    @contextlib.contextmanager
    def _as_parameters(self, guests_GN: Tensor, like: dict[str, Tensor]) -> Iterator[None]:
        """Compute with the experts that [`TakeExperts`] returns for parameters such as these."""
        table = parameter_table(self.experts)
        originals, num_experts = dict(table), self.experts.num_experts
        parts = guests_GN.split([param[0].numel() for param in like.values()], dim=1)
        for (name, param), part_GN in zip(like.items(), parts, strict=True):
            table[name] = part_GN.to(param.dtype).reshape(-1, *param.shape[1:]).contiguous()
        self.experts.num_experts = len(guests_GN)
        try:
            yield
        finally:
            table.update(originals)
            self.experts.num_experts = num_experts


class TakeExperts(torch.autograd.Function):
    """Take some experts, possibly repeated, from parameters [E / P, ...]; backward adds up the returning gradients.

    The result has one row per expert, one parameter after the other. Sums are in the order of the ranks that helped. A
    rank that sent no expert takes no part.
    """

    @staticmethod
    def forward(ctx: Any, experts: list[int], *parameters: Tensor) -> Tensor:
        ctx.experts = experts
        ctx.shapes, ctx.dtypes = [param.shape for param in parameters], [param.dtype for param in parameters]
        if not experts:
            return torch.cat([param[:0].flatten(1) for param in parameters], dim=1)
        return torch.stack([torch.cat([param[expert].flatten() for param in parameters]) for expert in experts])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        totals: list[Tensor | None] = [None] * len(ctx.shapes)
        parts = grad.split([shape[1:].numel() for shape in ctx.shapes], dim=1)
        for index, (shape, part) in enumerate(zip(ctx.shapes, parts, strict=True)):
            if ctx.experts and ctx.needs_input_grad[index + 1]:
                total = part.new_zeros(shape)
                for expert, returned in zip(ctx.experts, part, strict=True):
                    total[expert] += returned.view(shape[1:])
                totals[index] = total.to(ctx.dtypes[index])
        return None, *totals


class ReturnFirst(torch.autograd.Function):
    """Identity of the outputs of local experts and of guest experts; backward sends the gradients of guests first.

    So all ranks run their collectives in the same order, with or without guests, and gradients travel while those of
    local experts are computed. The reason: of all nodes that are ready, autograd runs the last created one first.
    """

    @staticmethod
    def forward(ctx: Any, output_VD: Tensor, guests_GN: Tensor) -> tuple[Tensor, Tensor]:
        return output_VD.view_as(output_VD), guests_GN.view_as(guests_GN)

    @staticmethod
    def backward(ctx: Any, grad_VD: Tensor, grad_GN: Tensor) -> tuple[Tensor, Tensor]:
        return grad_VD, grad_GN


def swap_axes(counts_SE: Counts, num_outer: int) -> Counts:
    """Reorder rows: from (outer, inner) order to (inner, outer) order."""
    return counts_SE.reshape(num_outer, -1, counts_SE.shape[1]).swapaxes(0, 1).reshape(counts_SE.shape)


def on_device(numbers: list[Counts], device: torch.device) -> list[Tensor]:
    """Move each list to a device as int64[n], in one copy for which the host does not wait."""
    flat = torch.from_numpy(np.concatenate([part.ravel() for part in numbers]))
    if device.type == "cuda":
        flat = flat.pin_memory().to(device, non_blocking=True)
    return list(flat.split([part.size for part in numbers]))


def ranges(firsts: Tensor, sizes: Tensor, total: int) -> Tensor:
    """int64[total], `first, first + 1, ...` of each range, one after the other; nothing is read back to the host."""
    before = sizes.cumsum(0) - sizes
    offsets = (firsts - before).repeat_interleave(sizes, output_size=total)
    return torch.arange(total, device=firsts.device) + offsets


EPImplementationInterface.register(LEAST_LOADED, LeastLoadedExpertParallel)

__all__ = [
    "LeastLoadedExpertParallel",
    "ReturnFirst",
    "SharedDispatch",
    "TakeExperts",
    "on_device",
    "ranges",
    "swap_axes",
]
