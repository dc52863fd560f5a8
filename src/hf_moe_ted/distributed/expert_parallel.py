"""Expert parallelism: tokens go to the ranks of their experts and back.

Shape letters: T tokens of this rank, K experts per token, R rows sent, V rows received, E local experts, D model width.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface, ExpertParallelLayer
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES

from ..kernels.permutation import CombineRows, SpreadTokens, sort_slots
from .collectives import (
    FinishExchange,
    KeptResults,
    StartExchange,
    copy_to_group,
    even_shares,
    exchange_even,
    gather_even,
    gather_rows,
    join_shares,
    scatter_sum,
    sum_over_group,
    take_share,
)
from .expert_load import ExpertLoadOverflow, experts_of_rows, rows_within_bound
from .layout import Layout, layout_of
from .local_shard import LocalShard
from .mesh import expert_mesh, fold_mesh
from .private_torch import StridedShard, assert_async, parameter_table
from .random_state import is_capturing, seed_generators


class TedExpertShard(ExpertParallelLayer):
    """Style of the parameters of stacked experts: whole experts over `ted_ep`, their inner width over `etp`."""

    def shard_param(self, module: Any, param: str, mesh: DeviceMesh) -> None:
        full = getattr(module, param, None)
        if full is None:
            return
        axes = expert_mesh(mesh, layout_of_experts(module).expert_tensor_parallel_size)
        ep_size, etp_size = int(axes.size(0)), int(axes.size(1))
        if full.shape[0] % ep_size:
            raise ValueError(f"num_experts ({full.shape[0]}) must be divisible by expert_parallel_size ({ep_size})")
        inner = inner_placement(module, param, full.ndim)
        parts = inner.split_factor if isinstance(inner, StridedShard) else 1
        if isinstance(inner, Shard | StridedShard) and full.shape[inner.dim] % (parts * etp_size):
            raise ValueError(
                f"the inner width of the experts ({full.shape[inner.dim] // parts}, {param}) must be divisible by "
                f"expert_tensor_parallel_size ({etp_size})"
            )
        module.num_experts = full.shape[0] // ep_size
        module._is_expert_parallel = module.is_spread_over_ranks = True
        placements = [Shard(0), inner if etp_size > 1 else Replicate()]
        sharded = distribute_tensor(full, axes, placements, src_data_rank=None)
        setattr(module, param, nn.Parameter(sharded, requires_grad=full.requires_grad))


def layout_of_experts(experts: nn.Module) -> Layout:
    """The layout with which the model of these experts is loaded."""
    layout = layout_of(experts)
    if layout is None:
        raise ValueError(
            f"{type(experts).__name__} has no configuration with a TedConfig: load the model with "
            "from_pretrained(distributed_config=plugin.distributed_config)"
        )
    return layout


def expert_modules(model: nn.Module) -> list[nn.Module]:
    """The modules whose experts are spread over ranks."""
    return [module for module in model.modules() if getattr(module, "is_spread_over_ranks", False)]


def inner_placement(experts: Any, param: str, ndim: int) -> Placement:
    """How a parameter of experts is split over `etp`: the first projection by columns, the second by rows.

    The contract of transformers (`use_experts_implementation`): up_proj [E, F, D] or gate_up_proj [E, 2F, D], down_proj
    [E, D, F], the last two dimensions swapped if `is_transposed`, gate and up one behind the other or interleaved;
    biases [E, F or 2F] and [E, D]. The bias of the second projection is added once, so every rank holds all of it.
    """
    if param.startswith("down_proj"):
        if ndim == 2:
            return Replicate()
        return Shard(1 if experts.is_transposed else 2)
    dim = 2 if ndim == 3 and experts.is_transposed else 1
    if param.startswith("gate_up_proj") and experts.is_concatenated:
        return StridedShard(dim, split_factor=2)
    return Shard(dim)


@dataclass(frozen=True)
class Dispatch:
    """The destinations of the (token, expert) pairs of one chunk.

    Attributes:
        slot_R: integer[R], the slot, `token * K + k`, of each row that is sent; -1 for a row that is only padding up to
            the capacity or the bound. Rows are ordered by rank and expert.
        row_TK: integer[T, K], the row of each slot; -1 for a slot that no expert computes or that found no row.
        send_sizes, receive_sizes: rows to and from each rank of the expert-parallel group.
        received_sizes: rows that each rank of the expert-tensor-parallel group received.
        expert_ids_V: int64[V], the local expert of each received row; the number of local experts for a row without
            one.
    """

    slot_R: Tensor
    row_TK: Tensor
    send_sizes: list[int]
    receive_sizes: list[int]
    received_sizes: list[int]
    expert_ids_V: Tensor


class TedExpertParallel(EPImplementation):
    """Expert parallelism times expert tensor parallelism, with duplicate token dropping.

    Ranks of a tensor-parallel group hold the same tokens. With duplicate token dropping
    (https://huggingface.co/papers/2303.06318, section 4.1) each rank sends only its share of them. The ranks that split
    an expert gather their shares where it runs, so all-to-all bytes fall by the tensor-parallel size. Without it every
    rank sends all tokens, except between ranks that hold different slices (`etp` smaller than `tp`), because no token
    may be computed twice. Slots without an expert (padding and dropped tokens) are not sent.

    With `pad_expert_input_to_capacity` each rank sends as many rows to each expert as its capacity allows, padded with
    zeros, so the host need not know how many are real. Ranks with the same tokens then divide the queue of each expert
    instead of the tokens: they take its slots in turn, so each has its part of the capacity.

    While `overflow` is set ([`bounded_expert_load`]) each rank sends the same number of rows to each rank, whose
    experts share them. An expert then gets the same rows as without a bound, in the same order. Slots that find no row
    are not sent, and `overflow` records this.

    Attributes:
        overflow: the bound and its record; `None` for exchanges without a bound.
        adapters: name of a parameter -> function that turns this rank's part into the adapted weight in each forward;
            it takes the factor for its own gradients.
        can_be_bounded: whether a bound is possible.
    """

    can_be_bounded = True

    def __init__(self, experts: Any, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh):
        super().__init__(experts, ep_mesh, tp_mesh)
        self.num_local_experts: Any  # an int that the parent reads from a module
        layout = layout_of_experts(experts)
        axes = expert_mesh(ep_mesh, layout.expert_tensor_parallel_size)
        self.experts = experts
        experts.ted_exchange = self  # for `bounded_expert_load`
        self.ep_group, self.etp_group = axes["ted_ep"].get_group(), axes["etp"].get_group()
        self.num_experts = self.num_local_experts * self.ep_group.size()
        self.overlap_chunks = layout.overlap_chunks
        self.overflow: ExpertLoadOverflow | None = None
        self.adapters: dict[str, Callable[[Tensor, float], Tensor]] = {}
        self.pads_to_capacity = layout.pad_expert_input_to_capacity and self.ep_group.size() > 1
        if self.pads_to_capacity and not hasattr(experts, "max_tokens_per_expert"):
            raise ValueError(
                f"pad_expert_input_to_capacity (True) needs experts with a capacity, but {type(experts).__name__} has "
                "none: leave pad_expert_input_to_capacity False"
            )
        self.num_batches = layout.data_parallel_size
        is_exchanged = self.ep_group.size() > 1
        self.drops_duplicates = layout.duplicate_token_dropping and is_exchanged and self.etp_group.size() > 1
        # ranks that hold the same tokens and divide them among themselves
        if self.drops_duplicates or self.etp_group.size() == 1:
            self.share_group: ProcessGroup = tp_mesh.get_group()
        else:
            self.share_group = fold_mesh(tp_mesh, self.etp_group.size())["fold"].get_group()
        # ranks that split an expert compute the same rows, so they draw the same numbers; other ranks of the group do
        # not
        self.part_of_group = tp_mesh.get_local_rank() // self.etp_group.size()

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """
        Args:
            hidden_states: float[T, D].
            top_k_index: int64[T, K], global expert of each slot; `num_experts` for one that no expert computes.
            top_k_weights: float[T, K].

        Returns:
            float[T, D].
        """
        if self.ep_group.size() == 1:
            return self._run_split_experts(hidden_states, top_k_index, top_k_weights)
        capacity = self._capacity(hidden_states.shape[0])
        max_rows = self._max_rows(top_k_index, capacity)
        if capacity is not None and (self.pads_to_capacity or self._capacity_is_smaller(capacity, max_rows)):
            return self._run_experts_to_capacity(hidden_states, top_k_index, top_k_weights, capacity)
        if self.share_group.size() == 1:
            return self._run_experts(hidden_states, top_k_index, top_k_weights, max_rows)
        sizes = even_shares(hidden_states.shape[0], self.share_group.size())
        rank = self.share_group.rank()
        with self._random_numbers_apart():
            output = self._run_experts(
                take_share(hidden_states, sizes, self.share_group),
                top_k_index.split(sizes)[rank],
                take_share(top_k_weights, sizes, self.share_group),
                max_rows,
            )
        return join_shares(output, sizes, self.share_group)

    def reads_sizes(self) -> bool:
        """Whether the host waits for the routing in training, to know how many rows are exchanged."""
        if self.ep_group.size() == 1 or self.overflow is not None:
            return False
        return not (self.pads_to_capacity and self._capacity(1) is not None)

    def _capacity(self, num_tokens: int) -> int | None:
        """Capacity of an expert for the tokens of this rank's batch, if exchanges may depend on it."""
        if not (self.pads_to_capacity or self.overflow is not None) or not hasattr(
            self.experts, "max_tokens_per_expert"
        ):
            return None
        return self.experts.max_tokens_per_expert(num_tokens)

    def _max_rows(self, expert_ids_TK: Tensor, capacity: int | None) -> int | None:
        """Rows of one chunk for each rank if there is a bound; never more than the possible slots."""
        if self.overflow is None:
            return None
        num_tokens = -(-expert_ids_TK.shape[0] // self.share_group.size())
        num_slots = -(-num_tokens // self.overlap_chunks) * expert_ids_TK.shape[1]
        max_rows = self.overflow.max_rows(num_slots, self.ep_group.size())
        return max_rows if capacity is None else min(max_rows, max(1, self.num_local_experts * capacity))

    def _capacity_is_smaller(self, capacity: int, max_rows: int | None) -> bool:
        """Whether rows up to the capacity are at most those within the bound; then nothing can overflow."""
        if max_rows is None or self.overlap_chunks > 1:
            return False
        return self.num_local_experts * -(-capacity // self.share_group.size()) <= max_rows

    def _run_split_experts(self, hidden_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Every rank holds a slice of all experts: no token moves, and the ranks of the group add up their outputs."""
        inputs = copy_to_group(hidden_TD, self.etp_group), copy_to_group(weights_TK, self.etp_group)
        with self._own_view_of_parameters():
            output_TD = self.experts_forward(inputs[0], expert_ids_TK, inputs[1])
        return sum_over_group(output_TD, self.etp_group)

    def _run_experts(
        self, hidden_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, max_rows: int | None
    ) -> Tensor:
        """Exchange chunk by chunk: all are sent at once, and each returns while the experts work on the next."""
        num_chunks = self.overlap_chunks
        sizes = even_shares(hidden_TD.shape[0], num_chunks)
        chunks = expert_ids_TK.split(sizes)
        dispatches = self._plan(chunks) if max_rows is None else self._plan_within_bound(chunks, max_rows)
        sent = [
            StartExchange.apply(
                SpreadTokens.apply(chunk, d.slot_R, d.row_TK), d.send_sizes, d.receive_sizes, self.ep_group
            )
            for chunk, d in zip(hidden_TD.split(sizes), dispatches, strict=True)
        ]
        returning = []
        for rows, d in zip(sent, dispatches, strict=True):
            received = FinishExchange.apply(*rows, d.send_sizes, d.receive_sizes, self.ep_group)
            computed = self._compute(received, d)
            returning.append(StartExchange.apply(computed, d.receive_sizes, d.send_sizes, self.ep_group))
        outputs = []
        for computed, d, weights in zip(returning, dispatches, weights_TK.split(sizes), strict=True):
            rows = FinishExchange.apply(*computed, d.receive_sizes, d.send_sizes, self.ep_group)
            outputs.append(CombineRows.apply(rows, weights.to(rows.dtype), d.slot_R, d.row_TK))
        return outputs[0] if num_chunks == 1 else torch.cat(outputs)

    def _run_experts_to_capacity(
        self, hidden_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, capacity: int
    ) -> Tensor:
        """Exchange a number of rows that depends on shapes only; nothing is read back to the host."""
        num_shares = self.share_group.size()
        d = self._plan_to_capacity(expert_ids_TK, -(-capacity // num_shares))
        shares = [sum(d.send_sizes)] * num_shares
        rows_RD = SpreadTokens.apply(hidden_TD, d.slot_R, d.row_TK)
        if num_shares > 1:
            rows_RD = take_share(rows_RD, shares, self.share_group)
        with self._random_numbers_apart() if num_shares > 1 else contextlib.nullcontext():
            sent = StartExchange.apply(rows_RD, d.send_sizes, d.receive_sizes, self.ep_group)
            received = FinishExchange.apply(*sent, d.send_sizes, d.receive_sizes, self.ep_group)
            computed = self._compute(received, d)
            returning = StartExchange.apply(computed, d.receive_sizes, d.send_sizes, self.ep_group)
            rows_RD = FinishExchange.apply(*returning, d.receive_sizes, d.send_sizes, self.ep_group)
        if num_shares > 1:
            rows_RD = join_shares(rows_RD, shares, self.share_group)
        return CombineRows.apply(rows_RD, weights_TK.to(rows_RD.dtype), d.slot_R, d.row_TK)

    def _plan_to_capacity(self, expert_ids_TK: Tensor, capacity: int) -> Dispatch:
        """Rows of all shares of the tokens, with `capacity` rows per expert and share; sizes are those of one share."""
        num_local, ep_size, num_shares = self.num_local_experts, self.ep_group.size(), self.share_group.size()
        num_rows = num_shares * self.num_experts * capacity
        _, sorted_row_TK, counts_E = sort_slots(expert_ids_TK, self.num_experts)
        first_E = counts_E.cumsum(0) - counts_E
        expert_TK = expert_ids_TK.clamp(max=self.num_experts - 1)
        place_TK = sorted_row_TK - first_E[expert_TK]  # in the queue of the expert
        row_TK = (place_TK % num_shares * self.num_experts + expert_TK) * capacity + place_TK // num_shares
        row_TK = row_TK.masked_fill(sorted_row_TK < 0, -1)
        slot_of_row = row_TK.new_full((num_rows + 1,), -1)  # the last row is for slots without a row
        slots = torch.arange(row_TK.numel(), device=row_TK.device, dtype=row_TK.dtype)
        slot_of_row.scatter_(0, row_TK.flatten().where(row_TK.flatten() >= 0, num_rows), slots)

        own_counts_E = (counts_E - self.share_group.rank() + num_shares - 1) // num_shares
        received_PE = self._exchange_counts(own_counts_E.view(ep_size, num_local), capacity)
        is_row_PEC = torch.arange(capacity, device=row_TK.device) < received_PE.unsqueeze(-1)
        experts_E1 = torch.arange(num_local, device=row_TK.device).unsqueeze(-1)
        sizes = [num_local * capacity] * ep_size
        return Dispatch(
            slot_R=slot_of_row[:-1],
            row_TK=row_TK,
            send_sizes=sizes,
            receive_sizes=sizes,
            received_sizes=[sum(sizes)] * (self.etp_group.size() if self.drops_duplicates else 1),
            expert_ids_V=torch.where(is_row_PEC, experts_E1, num_local).flatten(),
        )

    def _exchange_counts(self, counts_PN: Tensor, max_rows: int) -> Tensor:
        """Send row `i` of integer[P, N] to rank `i`; return what this rank's group received, integer[P or etp * P, N].

        `max_rows` is sent, too, because exchanges whose size differs between ranks would hang.
        """
        max_rows_P1 = counts_PN.new_full((counts_PN.shape[0], 1), max_rows)
        received_PN = exchange_even(torch.cat([counts_PN, max_rows_P1], 1), self.ep_group)
        assert_async(
            (received_PN[:, -1] == max_rows).all(),
            "an exchange whose size follows from shapes needs batches of the same shape on all data-parallel ranks",
        )
        if self.drops_duplicates:
            received_PN = gather_even(received_PN, self.etp_group)
        return received_PN[:, :-1]

    def _plan_within_bound(self, chunks: tuple[Tensor, ...], max_rows: int) -> list[Dispatch]:
        """Plan `max_rows` for each rank in each chunk; nothing is read back to the host."""
        ep_size, num_groups = self.ep_group.size(), self.etp_group.size() if self.drops_duplicates else 1
        rows = [rows_within_bound(ids_TK, self.num_experts, ep_size, max_rows) for ids_TK in chunks]
        if self.overflow is not None:
            self.overflow.note(torch.stack([chunk.num_slots_P for chunk in rows]), max_rows)
        received = self._exchange_counts(torch.cat([chunk.ends_PE for chunk in rows], 1), max_rows)
        sizes = [max_rows] * ep_size
        return [
            Dispatch(
                slot_R=chunk.slot_R,
                row_TK=chunk.row_TK,
                send_sizes=sizes,
                receive_sizes=sizes,
                received_sizes=[sum(sizes)] * num_groups,
                expert_ids_V=experts_of_rows(ends_PE, max_rows),
            )
            for chunk, ends_PE in zip(rows, received.split(self.num_local_experts, dim=1), strict=True)
        ]

    def _plan(self, chunks: tuple[Tensor, ...]) -> list[Dispatch]:
        """Rows and sizes of each chunk; all sizes are read back to the host at once."""
        num_local, ep_size = self.num_local_experts, self.ep_group.size()
        sorted_chunks = [sort_slots(ids_TK, self.num_experts) for ids_TK in chunks]
        sent_PCE = torch.stack([counts.view(ep_size, num_local) for _, _, counts in sorted_chunks], dim=1)  # P ranks
        received_PCE = exchange_even(sent_PCE, self.ep_group)
        all_received = received_PCE
        if self.drops_duplicates:
            all_received = gather_even(received_PCE, self.etp_group)  # [etp * P, C, E]
        # recomputation does not wait for the device again
        on_host = KeptResults.of(torch.cat([sent_PCE.sum(-1), all_received.sum(-1)]).tolist)
        by_chunk = [[row[index] for row in on_host] for index in range(len(chunks))]
        return [
            self._dispatch(order, row_TK, sizes[:ep_size], sizes[ep_size:], all_received[:, index])
            for index, ((order, row_TK, _), sizes) in enumerate(zip(sorted_chunks, by_chunk, strict=True))
        ]

    def _dispatch(
        self, order: Tensor, row_TK: Tensor, send_sizes: list[int], received: list[int], received_SE: Tensor
    ) -> Dispatch:
        """Send rows in the order of [`sort_slots`], each to the rank of its expert.

        Args:
            received: rows from each rank of the group; if ranks gather their rows, for all of those ranks.
            received_SE: integer[S, E], received rows for each local expert.
        """
        ep_size = self.ep_group.size()
        received_sizes = [sum(received[first : first + ep_size]) for first in range(0, len(received), ep_size)]
        first = self.etp_group.rank() * ep_size if self.drops_duplicates else 0
        experts = torch.arange(self.num_local_experts, device=order.device).repeat(len(received))
        return Dispatch(
            slot_R=order[: sum(send_sizes)],
            row_TK=row_TK,
            send_sizes=send_sizes,
            receive_sizes=received[first : first + ep_size],
            received_sizes=received_sizes,
            expert_ids_V=experts.repeat_interleave(received_SE.flatten(), output_size=sum(received_sizes)),
        )

    def _compute(self, rows_VD: Tensor, dispatch: Dispatch) -> Tensor:
        """Run this rank's experts on the rows of its group, between the collectives of expert tensor parallelism."""
        etp_group = self.etp_group
        if self.drops_duplicates:
            rows_VD = gather_rows(rows_VD, dispatch.received_sizes, etp_group)
        elif etp_group.size() > 1:
            rows_VD = copy_to_group(rows_VD, etp_group)
        output_VD = self._run_on_rows(rows_VD, dispatch)
        if self.drops_duplicates:
            return scatter_sum(output_VD, dispatch.received_sizes, etp_group)
        return sum_over_group(output_VD, etp_group) if etp_group.size() > 1 else output_VD

    def _run_on_rows(self, rows_VD: Tensor, dispatch: Dispatch) -> Tensor:
        with self._own_view_of_parameters():
            return self._run_own_experts(rows_VD, dispatch.expert_ids_V)

    def _run_own_experts(self, rows_VD: Tensor, expert_ids_V: Tensor) -> Tensor:
        if expert_ids_V.shape[0] == 0:  # a row of zeros, cut off later, so that every parameter gets a gradient
            row = torch.cat([rows_VD, rows_VD.new_zeros(1, rows_VD.shape[1])])
            return self.experts_forward(row, expert_ids_V.new_zeros(1, 1), row.new_ones(1, 1))[:0]
        return self.experts_forward(rows_VD, expert_ids_V[:, None], rows_VD.new_ones(expert_ids_V.shape[0], 1))

    @contextlib.contextmanager
    def _random_numbers_apart(self) -> Iterator[None]:
        """Ranks that share a batch have rows of different tokens here, so they draw different numbers for them.

        After the experts all of them draw the same numbers again, whatever number of rows they had. Recomputation in
        backward draws the numbers of forward, because all seeds come from the generator that it restores.
        """
        if not (self.experts.training and _draws_random_numbers(self.experts)) or is_capturing():
            # in a graph seeds cannot change; all ranks have the same number of rows and draw the same numbers
            yield
            return
        seed = int(torch.randint(2**62, ()))
        seed_generators(seed, self.part_of_group)
        yield
        torch.manual_seed(seed)

    @contextlib.contextmanager
    def _own_view_of_parameters(self) -> Iterator[None]:
        """The experts' parameters as this rank's forward needs them.

        Every rank of an expert adds the second bias, so each adds only its part. Gradients are divided by the number of
        batches if FSDP does not do that.
        """
        parameters = parameter_table(self.experts)
        originals = dict(parameters)
        etp_size = self.etp_group.size()
        gradient_factor = 1.0 if isinstance(self.experts, FSDPModule) else 1.0 / self.num_batches
        for name, param in originals.items():
            if param is None:
                continue
            forward_factor = 1.0 / etp_size if name == "down_proj_bias" else 1.0
            local = LocalShard.apply(param, forward_factor, gradient_factor)
            parameters[name] = self.adapters[name](local, gradient_factor) if name in self.adapters else local
        try:
            yield
        finally:
            parameters.update(originals)


def _draws_random_numbers(experts: nn.Module) -> bool:
    return any(getattr(module, rate, 0) for module in experts.modules() for rate in ("dropout", "p"))


EPImplementationInterface.register("ted", TedExpertParallel)
_STYLES: Any = ALL_PARALLEL_STYLES
_STYLES.register("ted_experts", TedExpertShard())

__all__ = ["Dispatch", "TedExpertParallel", "TedExpertShard", "expert_modules", "inner_placement", "layout_of_experts"]
