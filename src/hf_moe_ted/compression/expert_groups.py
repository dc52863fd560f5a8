"""Pure functions that put similar experts of a layer into groups, and align the neurons of two experts.

Shape letters: E experts, D model width, F inner width.
"""

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

ExpertGroups = list[list[int]]
"""The experts of a layer, each in one group. The others of a group are similar to its first."""


def require_scipy() -> None:
    """
    Raises:
        ValueError: SciPy is not installed.
    """
    if importlib.util.find_spec("scipy") is None:
        raise ValueError("merging experts needs SciPy: pip install 'hf-moe-ted[merge]'")


def clustered(outputs_ED: Tensor, num_groups: int) -> ExpertGroups:
    """Hierarchical clustering with average linkage and Euclidean distances (https://huggingface.co/papers/2410.08589).

    It starts with groups of one expert. Then the two groups with the smallest mean distance between their members
    become one, until `num_groups` are left. Among groups that are equally near, SciPy chooses, always in the same way.

    Args:
        outputs_ED: float[E, D], the mean output of each expert.
        num_groups: from 1 to E.

    Returns:
        groups, ordered by their lowest member, with members in ascending order.

    Raises:
        ValueError: an output is not finite, or `num_groups` is out of range.
    """
    _require_finite(outputs_ED, "the mean outputs of the experts")
    if not 1 <= num_groups <= len(outputs_ED):
        raise ValueError(f"num_groups ({num_groups}) must be from 1 to the {len(outputs_ED)} experts")
    groups = {expert: [expert] for expert in range(len(outputs_ED))}
    # do as many merges as are needed: SciPy's own cut is by height, and cannot separate merges of equal height
    merges = _average_linkage(outputs_ED)[: len(outputs_ED) - num_groups]
    for new, (first, second) in enumerate(merges, start=len(outputs_ED)):
        groups[new] = groups.pop(first) + groups.pop(second)
    return sorted(sorted(group) for group in groups.values())


def _average_linkage(outputs_ED: Tensor) -> list[list[int]]:
    """The two groups of each merge. Single experts have the numbers 0 to E - 1; each merge gets the next number."""
    from scipy.cluster.hierarchy import linkage

    if len(outputs_ED) < 2:
        return []
    merges: list[list[int]] = linkage(outputs_ED.double().numpy(force=True), "average")[:, :2].astype(int).tolist()
    return merges


def _require_finite(numbers: Tensor, what: str) -> None:
    """Raise with a clear message; SciPy's messages do not say what is wrong."""
    is_finite = numbers.isfinite()
    if not is_finite.all():
        rows = (~is_finite).flatten(1).any(dim=1).nonzero().flatten().tolist()
        raise ValueError(
            f"{what} must be finite, but the rows {rows} have NaN or infinity; check the weights and the statistics"
        )


def assigned_to(dominant: Sequence[int], router_weight_ED: Tensor) -> ExpertGroups:
    """Put each other expert with the dominant one whose router row is most similar, by the cosine.

    Source: https://huggingface.co/papers/2310.01334. It compares router logits, which are products with these rows.

    Returns:
        groups in the order of `dominant`; the dominant expert is the first of its group.

    Raises:
        ValueError: a router weight is not finite.
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
    """The order of an expert's inner neurons that makes them most similar to those of another expert.

    An expert computes the same in any order of its neurons, so they are aligned before weights are averaged: the sum of
    the products of the weights of neurons in the same place is made as large as possible
    (https://huggingface.co/papers/2310.01334, section 3.1).

    Args:
        like, expert: `up_proj` float[F, D], `up_proj_bias` float[F] and `down_proj` float[D, F] of the two.

    Returns:
        int64[F]: for each neuron of `like`, the neuron of `expert`. SciPy chooses among equally good orders.

    Raises:
        ValueError: weights or their products are not finite.
    """
    from scipy.optimize import linear_sum_assignment

    (up_FD, bias_F, down_DF), (other_up_FD, other_bias_F, other_down_DF) = (
        [weight.float() for weight in weights] for weights in (like, expert)
    )
    similarity_FF = up_FD @ other_up_FD.T + torch.outer(bias_F, other_bias_F) + down_DF.T @ other_down_DF
    _require_finite(similarity_FF, "cost")
    return torch.from_numpy(linear_sum_assignment(similarity_FF.numpy(force=True), maximize=True)[1])


__all__ = ["ExpertGroups", "assigned_to", "clustered", "neuron_order", "require_scipy"]
