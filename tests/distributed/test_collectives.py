"""Each collective and its transpose, against autograd over the tensors of all ranks in one process."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hf_moe_ted.distributed import collectives as c
from hf_moe_ted.testing import run_distributed_test

WORLD = 4
WIDTH = 3
SIZES = {"even": [2, 2, 2, 2], "uneven": [3, 0, 5, 1], "none": [0, 0, 0, 0]}
# rows from each rank (first index) to each; some send nothing, some receive nothing
ROUTES = [[1, 0, 2, 0], [0, 0, 0, 0], [3, 0, 1, 2], [0, 0, 4, 1]]


@dataclass(frozen=True)
class Definition:
    """A collective on all ranks, in one process.

    Attributes:
        run: what one rank calls, from its input and the sizes.
        reference: outputs of all ranks from the inputs of all.
        num_rows: of the input of a rank.
        is_input_shared, is_output_shared: whether all ranks hold the same, which then counts once.
    """

    run: Callable[[Tensor, list[int]], Tensor]
    reference: Callable[[list[Tensor], list[int]], list[Tensor]]
    num_rows: Callable[[list[int], int], int]
    is_input_shared: bool = False
    is_output_shared: bool = False


def world() -> Any:
    return dist.group.WORLD


def all_rows(sizes: list[int], rank: int) -> int:
    return sum(sizes)


def own_rows(sizes: list[int], rank: int) -> int:
    return sizes[rank]


def sent_rows(sizes: list[int], rank: int) -> int:
    return sum(ROUTES[rank])


def exchange(x: Tensor, sizes: list[int]) -> Tensor:
    send = ROUTES[dist.get_rank()]
    receive = [route[dist.get_rank()] for route in ROUTES]
    started = c.StartExchange.apply(x, send, receive, world())
    return c.FinishExchange.apply(*started, send, receive, world())


def exchange_reference(inputs: list[Tensor], sizes: list[int]) -> list[Tensor]:
    pieces = [x.split(route) for x, route in zip(inputs, ROUTES, strict=True)]
    return [torch.cat([pieces[source][rank] for source in range(WORLD)]) for rank in range(WORLD)]


DEFINITIONS = {
    "copy_to_group": Definition(
        lambda x, sizes: c.copy_to_group(x, world()), lambda xs, sizes: xs, all_rows, is_input_shared=True
    ),
    "sum_over_group": Definition(
        lambda x, sizes: c.sum_over_group(x, world()),
        lambda xs, sizes: [sum(xs)] * WORLD,
        all_rows,
        is_output_shared=True,
    ),
    "take_share": Definition(
        lambda x, sizes: c.take_share(x, sizes, world()),
        lambda xs, sizes: [x.split(sizes)[rank] for rank, x in enumerate(xs)],
        all_rows,
        is_input_shared=True,
    ),
    "join_shares": Definition(
        lambda x, sizes: c.join_shares(x, sizes, world()),
        lambda xs, sizes: [torch.cat(xs)] * WORLD,
        own_rows,
        is_output_shared=True,
    ),
    "gather_rows": Definition(
        lambda x, sizes: c.gather_rows(x, sizes, world()), lambda xs, sizes: [torch.cat(xs)] * WORLD, own_rows
    ),
    "scatter_sum": Definition(
        lambda x, sizes: c.scatter_sum(x, sizes, world()),
        lambda xs, sizes: list(sum(xs).split(sizes)),
        all_rows,
    ),
    "exchange": Definition(exchange, exchange_reference, sent_rows),
}


def inputs_of(definition: Definition, sizes: list[int]) -> list[Tensor]:
    """Leaves, one per rank or one that all share."""
    generator = torch.Generator().manual_seed(0)
    num_inputs = 1 if definition.is_input_shared else WORLD
    inputs = [torch.randn(definition.num_rows(sizes, r), WIDTH, generator=generator) for r in range(num_inputs)]
    return [x.requires_grad_() for x in inputs]


def gradient_of(output: Tensor, rank: int, definition: Definition) -> Tensor:
    """What comes back to an output: the same on all ranks for one that all hold."""
    generator = torch.Generator().manual_seed(0 if definition.is_output_shared else rank)
    return torch.randn(output.shape, generator=generator)


def run_all() -> dict[Any, tuple[Tensor, ...]]:
    """Output and gradient of the input, on this rank; and what is not differentiable."""
    x = torch.arange(4.0).view(4, 1) + 10 * dist.get_rank()
    plain = c.sum_over(x, world()), c.max_over(x, world()), c.gather_even(x, world()), c.exchange_even(x, world())
    results: dict[Any, tuple[Tensor, ...]] = {"plain": plain}
    for name, definition in DEFINITIONS.items():
        for kind, sizes in SIZES.items():
            inputs = inputs_of(definition, sizes)
            x = inputs[0 if definition.is_input_shared else dist.get_rank()]
            output = definition.run(x, sizes)
            (gradient,) = torch.autograd.grad(output, x, gradient_of(output, dist.get_rank(), definition))
            results[name, kind] = output.detach(), gradient
    return results


@pytest.fixture(scope="module")
def by_rank() -> list[dict[Any, tuple[Tensor, ...]]]:
    return run_distributed_test(run_all, WORLD)


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("name", DEFINITIONS)
def test_output_and_gradient(by_rank: list, name: str, kind: str) -> None:
    definition, sizes = DEFINITIONS[name], SIZES[kind]
    inputs = inputs_of(definition, sizes)
    outputs = definition.reference(inputs * WORLD if definition.is_input_shared else inputs, sizes)
    counted = outputs[:1] if definition.is_output_shared else outputs
    gradients = torch.autograd.grad(
        counted, inputs, [gradient_of(output, rank, definition) for rank, output in enumerate(counted)]
    )
    for rank, results in enumerate(by_rank):
        output, gradient = results[name, kind]
        torch.testing.assert_close(output, outputs[rank].detach(), rtol=1e-6, atol=1e-6)
        expected = gradients[0 if definition.is_input_shared else rank]
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6)


def test_plain_collectives(by_rank: list) -> None:
    columns = [torch.arange(4.0).view(4, 1) + 10 * rank for rank in range(WORLD)]
    for rank, results in enumerate(by_rank):
        total, largest, gathered, exchanged = results["plain"]
        assert torch.equal(total, sum(columns))
        assert torch.equal(largest, columns[-1])
        assert torch.equal(gathered, torch.cat(columns))
        assert torch.equal(exchanged, torch.stack([column[rank] for column in columns]))


@pytest.mark.parametrize(
    ("num_rows", "shares"), [(8, [2, 2, 2, 2]), (7, [2, 2, 2, 1]), (2, [1, 1, 0, 0]), (0, [0, 0, 0, 0])]
)
def test_even_shares(num_rows: int, shares: list[int]) -> None:
    assert c.even_shares(num_rows, 4) == shares


def test_kept_results_come_again_in_their_order() -> None:
    calls: list[int] = []

    def run(number: int) -> int:
        calls.append(number)
        return number

    def of(*numbers: int) -> list[int]:
        return [c.KeptResults.of(functools.partial(run, number)) for number in numbers]

    outer, inner = c.KeptResults(), c.KeptResults()
    with outer.keep():
        assert of(1, 2) == [1, 2]
        with inner.keep():
            assert of(3) == [3]
        assert of(4) == [4]
    with inner.reuse():
        assert of(-1) == [3]
    for _ in range(2):
        with outer.reuse():
            assert of(-1, -1, -1) == [1, 2, 4]
    assert calls == [1, 2, 3, 4]
    assert of(5) == calls[-1:] == [5]
