"""Clustering, assignment to dominant experts and the order of neurons, against slow ways to find them."""

import itertools

import pytest
import torch
from torch import Tensor

from hf_moe_ted.compression.expert_groups import assigned_to, clustered, neuron_order


def slowly_clustered(points_ED: Tensor, num_groups: int) -> list[list[int]]:
    """Average linkage by its definition."""
    groups = [[expert] for expert in range(len(points_ED))]

    def mean_distance(pair: tuple[list[int], list[int]]) -> float:
        return sum((points_ED[a] - points_ED[b]).norm().item() for a in pair[0] for b in pair[1]) / (
            len(pair[0]) * len(pair[1])
        )

    while len(groups) > num_groups:
        first, second = min(itertools.combinations(groups, 2), key=mean_distance)
        groups = [group for group in groups if group not in (first, second)] + [first + second]
    return sorted(sorted(group) for group in groups)


@pytest.mark.parametrize("seed", range(4))
def test_average_linkage(seed: int) -> None:
    points = torch.randn(12, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for num_groups in range(1, 13):
        assert clustered(points, num_groups) == slowly_clustered(points, num_groups)


def test_equal_points_are_joined_first() -> None:
    points = torch.tensor([[0.0, 1.0], [5.0, 5.0], [0.0, 1.0], [0.1, 1.0], [5.0, 5.0]])
    assert clustered(points, 3) == [[0, 2], [1, 4], [3]]
    assert clustered(points, 2) == [[0, 2, 3], [1, 4]]


def test_assigned_to_the_most_similar_direction() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 9.0], [0.1, 0.0], [-1.0, 0.5], [1.0, 1.1]])
    assert assigned_to([0, 1], rows) == [[0, 2], [1, 3, 4]]
    assert assigned_to([4, 2], rows) == [[4, 1, 3], [2, 0]]


def order_of_least(cost_FF: Tensor) -> Tensor:
    """The order of neurons whose similarities are these costs, negated."""
    num = len(cost_FF)
    unit, nothing = torch.eye(num), torch.zeros(num, num)
    return neuron_order((-cost_FF, torch.zeros(num), nothing), (unit, torch.zeros(num), nothing))


@pytest.mark.parametrize("seed", range(20))
def test_assignment_against_all_permutations(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    num = 1 + seed % 6
    # whole numbers, so that there are ties
    cost = torch.randint(-3, 4, (num, num), generator=generator).float() if seed % 2 else torch.randn(num, num)
    columns = order_of_least(cost)
    assert sorted(columns.tolist()) == list(range(num))
    rows = torch.arange(num)
    best = min(cost[rows, list(order)].sum().item() for order in itertools.permutations(range(num)))
    assert cost[rows, columns].sum().item() == pytest.approx(best)


@pytest.mark.parametrize("rank", [2, 60])
def test_assignment_cannot_be_improved(rank: int) -> None:
    """No cycle of exchanges lowers the cost: Bellman and Ford find no negative cycle in the graph of exchanges."""
    generator = torch.Generator().manual_seed(rank)
    num = 120
    factors = torch.randn(2, num, rank, generator=generator, dtype=torch.float64)
    cost = (factors[0] @ factors[1].T).float().double()
    columns = order_of_least(cost)
    assert sorted(columns.tolist()) == list(range(num))
    # row i takes the column of row j
    change = cost[:, columns] - cost[torch.arange(num), columns].unsqueeze(1)
    length = torch.zeros(num, dtype=torch.float64)
    for _ in range(num + 1):
        before, length = length, torch.minimum(length, (length.unsqueeze(1) + change).amin(dim=0))
    torch.testing.assert_close(length, before, rtol=0.0, atol=1e-9)


def test_neuron_order_undoes_a_permutation() -> None:
    generator = torch.Generator().manual_seed(0)
    up, bias, down = (torch.randn(shape, generator=generator) for shape in ((40, 8), (40,), (8, 40)))
    order = torch.randperm(40, generator=generator)
    noisy = [weight + 0.1 * torch.randn(weight.shape, generator=generator) for weight in (up, bias, down)]
    shuffled = noisy[0][order], noisy[1][order], noisy[2][:, order]
    assert torch.equal(order[neuron_order((up, bias, down), shuffled)], torch.arange(40))


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_are_refused(wrong: float) -> None:
    points = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    points[3, 1] = wrong
    with pytest.raises(ValueError, match=r"mean outputs .* the rows \[3\] have NaN or infinity"):
        clustered(points, 2)
    with pytest.raises(ValueError, match=r"router's weight .* rows \[3\]"):
        assigned_to([0, 1], points)
    fine = torch.ones(5, 5), torch.ones(5), torch.ones(5, 5)
    with pytest.raises(ValueError, match="cost must be finite"):
        neuron_order(fine, (points, torch.ones(5), torch.ones(5, 5)))


def test_number_of_groups() -> None:
    for num_groups in (0, 4):
        with pytest.raises(ValueError, match=rf"num_groups \({num_groups}\) must be from 1 to the 3 experts"):
            clustered(torch.ones(3, 2), num_groups)
