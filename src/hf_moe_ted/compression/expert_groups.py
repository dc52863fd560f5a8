"""Which experts are alike: pure functions that put the experts of a layer into groups, and their neurons in order.

Shape letters: E experts, D model width, F inner width.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

ExpertGroups = list[list[int]]
"""The experts of a layer, each in one group; the first of a group is the one that the others are like."""


def clustered(outputs_ED: Tensor, num_groups: int) -> ExpertGroups:
    """Hierarchical clustering with average linkage and Euclidean distances (https://huggingface.co/papers/2410.08589).

    Starting from groups of one, the two groups with the smallest mean distance between their members become one, until
    `num_groups` are left.

    Args:
        outputs_ED: float[E, D], the mean output of each expert.
        num_groups: from 1 to E.

    Returns:
        groups by their lowest member, members ascending.

    Raises:
        ValueError: outputs that are not finite, or another number of groups.
    """
    _require_finite(outputs_ED, "the mean outputs of the experts")
    if not 1 <= num_groups <= len(outputs_ED):
        raise ValueError(f"num_groups ({num_groups}) must be from 1 to the {len(outputs_ED)} experts")
    groups = [[expert] for expert in range(len(outputs_ED))]
    # not the faster way over products, which takes equal rows for slightly different ones
    distance = torch.cdist(outputs_ED.double(), outputs_ED.double(), compute_mode="donot_use_mm_for_euclid_dist")
    distance.fill_diagonal_(torch.inf)
    while len(groups) > num_groups:
        first, second = sorted(divmod(int(distance.argmin()), len(groups)))
        sizes = len(groups[first]), len(groups[second])
        # the mean over pairs of members follows from those of the two parts (Lance and Williams)
        joined = (sizes[0] * distance[first] + sizes[1] * distance[second]) / sum(sizes)
        distance[first], distance[:, first] = joined, joined
        distance[first, first] = torch.inf
        rest = torch.arange(len(groups)) != second
        distance = distance[rest][:, rest]
        groups[first] += groups.pop(second)
    return sorted(sorted(group) for group in groups)


def _require_finite(numbers: Tensor, what: str) -> None:
    """Comparisons with NaN are all false: groups would follow from nothing, and an assignment would never end."""
    is_finite = numbers.isfinite()
    if not is_finite.all():
        rows = (~is_finite).flatten(1).any(dim=1).nonzero().flatten().tolist()
        raise ValueError(f"{what} must be finite, there is NaN or infinity in the rows {rows}")


def assigned_to(dominant: Sequence[int], router_weight_ED: Tensor) -> ExpertGroups:
    """Each other expert with the dominant one whose router row is most similar, by the cosine.

    Of https://huggingface.co/papers/2310.01334, which compares router logits: these are products with the rows.

    Returns:
        groups in the order of `dominant`, which come first in them.

    Raises:
        ValueError: a router weight that is not finite.
    """
    _require_finite(router_weight_ED, "the router's weight")
    rows_ED = torch.nn.functional.normalize(router_weight_ED.double(), dim=-1)
    nearest_E = (rows_ED @ rows_ED[list(dominant)].T).argmax(dim=-1).tolist()
    groups = [[expert] for expert in dominant]
    for expert, group in enumerate(nearest_E):
        if expert not in dominant:
            groups[group].append(expert)
    return groups


def neuron_order(like: tuple[Tensor, Tensor, Tensor], expert: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The order of an expert's inner neurons in which they are most similar to those of another one.

    An expert computes the same in any order of its neurons, so they are put side by side before weights are averaged:
    the sum of the products of the weights of neurons in the same place is as large as possible
    (https://huggingface.co/papers/2310.01334, section 3.1).

    Args:
        like, expert: `up_proj` float[F, D], `up_proj_bias` float[F] and `down_proj` float[D, F] of the two.

    Returns:
        int64[F], for each neuron of `like` the one of `expert`.

    Raises:
        ValueError: weights that are not finite, or whose products are not.
    """
    (up_FD, bias_F, down_DF), (other_up_FD, other_bias_F, other_down_DF) = (
        [weight.float() for weight in weights] for weights in (like, expert)
    )
    similarity_FF = up_FD @ other_up_FD.T + torch.outer(bias_F, other_bias_F) + down_DF.T @ other_down_DF
    return linear_assignment(-similarity_FF)


def linear_assignment(cost: Tensor) -> Tensor:
    """The assignment of rows to columns of the smallest total cost: shortest augmenting paths with dual variables.

    The algorithm of Jonker and Volgenant (1987) in the form of Crouse (2016), which `scipy.optimize` has, too; it is
    here because scipy is no dependency. O(n) numpy operations on n numbers per row in the worst case.

    Args:
        cost: float[n, n], finite.

    Returns:
        int64[n], the column of each row.

    Raises:
        ValueError: a cost that is not finite.
    """
    _require_finite(cost, "cost")
    costs = cost.double().numpy(force=True)
    num = len(costs)
    row_dual = costs.min(axis=1, initial=np.inf)
    reduced = costs - row_dual[:, None]
    column_dual = reduced.min(axis=0, initial=np.inf)
    column_of_row, row_of_column = np.full(num, -1), np.full(num, -1)
    for row, is_tight in enumerate(reduced - column_dual == 0):  # most rows find their column at once
        if len(free := np.flatnonzero(is_tight & (row_of_column < 0))):
            column_of_row[row], row_of_column[free[0]] = free[0], row
    for row in np.flatnonzero(column_of_row < 0).tolist():
        shortest, previous_row, is_reached = np.full(num, np.inf), np.full(num, -1), np.zeros(num, dtype=bool)
        current, length = row, 0.0
        while True:
            lengths = length + costs[current] - row_dual[current] - column_dual
            is_shorter = ~is_reached & (lengths < shortest)
            shortest[is_shorter], previous_row[is_shorter] = lengths[is_shorter], current
            column = int(np.where(is_reached, np.inf, shortest).argmin())
            length, is_reached[column] = shortest[column], True
            if row_of_column[column] < 0:
                break
            current = int(row_of_column[column])
        matched = np.flatnonzero(is_reached & (row_of_column >= 0))
        row_dual[row] += length
        row_dual[row_of_column[matched]] += length - shortest[matched]
        column_dual[is_reached] -= length - shortest[is_reached]
        while True:
            current = int(previous_row[column])
            row_of_column[column] = current
            column, column_of_row[current] = column_of_row[current], column
            if current == row:
                break
    return torch.from_numpy(column_of_row)


__all__ = ["ExpertGroups", "assigned_to", "clustered", "linear_assignment", "neuron_order"]
