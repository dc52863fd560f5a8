"""Sizes of axes, and layouts as `TedConfig` has them."""

from dataclasses import fields
from typing import Any

import pytest

from hf_moe_ted import TedConfig
from hf_moe_ted.distributed.layout import Layout, replicas_of, sizes_of_axes


@pytest.mark.parametrize(
    ("world_size", "sizes", "expected"),
    [
        (4, (1, 4, None, None), (1, 4, 1, 4)),
        (4, (2, 2, None, None), (2, 2, 2, 2)),
        (8, (2, 2, None, None), (2, 2, 2, 4)),
        (8, (4, 2, 2, 2), (4, 2, 2, 2)),
        (8, (4, 1, None, None), (4, 1, 4, 2)),
        (8, (2, 4, 1, None), (2, 4, 1, 4)),
        (1, (2, 4, 2, 3), (1, 1, 1, 1)),
    ],
)
def test_sizes_are_inferred(world_size: int, sizes: tuple[Any, ...], expected: tuple[int, ...]) -> None:
    assert sizes_of_axes(world_size, *sizes) == expected


@pytest.mark.parametrize(
    ("world_size", "sizes", "message"),
    [
        (8, (3, 1, None, None), "the world size (8 processes) must be divisible by tensor_parallel_size (3)"),
        (8, (2, 1, None, 3), "tensor_parallel_size (2) x data_parallel_size (3) = 6 must be the world size (8)"),
        (8, (2, 1, 4, None), "expert_tensor_parallel_size (4) must divide tensor_parallel_size (2)"),
        (
            8,
            (2, 3, None, None),
            "expert_parallel_size (3) x expert_tensor_parallel_size (2) = 6 must divide the world size (8 processes)",
        ),
        (
            8,
            (2, 8, None, None),
            "expert_parallel_size (8) x expert_tensor_parallel_size (2) = 16 must divide the world size (8 processes)",
        ),
        (
            8,
            (4, 1, 2, None),
            "expert_parallel_size (1) x expert_tensor_parallel_size (2) = 2 must be a multiple of "
            "tensor_parallel_size (4)",
        ),
        (8, (0, 1, None, None), "tensor_parallel_size (0) must be at least 1"),
        (8, (1, -2, None, None), "expert_parallel_size (-2) must be at least 1"),
        (8, (1, 1, -1, None), "expert_tensor_parallel_size (-1) must be at least 1"),
        (8, (1, 1, 0, None), "expert_tensor_parallel_size (0) must be at least 1"),
        (8, (1, 1, None, 0), "data_parallel_size (0) must be at least 1"),
        (1, (0, 1, None, None), "tensor_parallel_size (0) must be at least 1"),
    ],
)
def test_layouts_that_cannot_be(world_size: int, sizes: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError) as error:
        sizes_of_axes(world_size, *sizes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("sizes", "replicas", "message"),
    [
        ((1, 8, 2, 1), 3, "dp_replicate_size (3) must divide data_parallel_size (8)"),
        (
            (2, 4, 2, 2),
            4,
            "dp_replicate_size (4) must be less than data_parallel_size (4): with one data-parallel rank",
        ),
        (
            (1, 12, 4, 1),
            2,
            "expert_parallel_size (4) x expert_tensor_parallel_size (1) = 4 must divide the 6 ranks of a replica "
            "(tensor_parallel_size 1 x data_parallel_size 12 / dp_replicate_size 2), or be a multiple of them",
        ),
        ((1, 8, 2, 1), 0, "dp_replicate_size (0) must be at least 1"),
        ((1, 8, 2, 1), -2, "dp_replicate_size (-2) must be at least 1"),
    ],
)
def test_replicas_that_cannot_be(sizes: tuple[int, ...], replicas: int, message: str) -> None:
    with pytest.raises(ValueError) as error:
        Layout(*sizes, dp_replicate_size=replicas)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("sizes", "replicas", "of_dense", "of_experts"),
    [
        ((2, 8, 2, 2), 1, (1, 8), (1, 4)),
        ((2, 8, 2, 2), 2, (2, 4), (2, 2)),
        ((2, 8, 2, 2), 4, (4, 2), (4, 1)),  # each replica has each expert once
        ((1, 16, 8, 1), 4, (4, 4), (1, 2)),  # experts on two replicas
        ((1, 8, 8, 1), 2, (2, 4), (1, 1)),  # and on all
    ],
)
def test_what_is_replicated(
    sizes: tuple[int, ...], replicas: int, of_dense: tuple[int, int], of_experts: tuple[int, int]
) -> None:
    layout = Layout(*sizes, dp_replicate_size=replicas)
    assert (layout.dp_replicate_size, layout.zero_size) == of_dense
    assert (layout.expert_dp_replicate_size, layout.expert_zero_size) == of_experts
    config = TedConfig.of_layout(layout)
    assert (config.tp_size, config.dp_size) == sizes[:2]
    assert config.dp_replicate_size == layout.expert_dp_replicate_size  # the axis of transformers' meshes


def test_one_process_has_one_replica() -> None:
    assert replicas_of(1, 2) == replicas_of(8, 1) == 1
    assert replicas_of(8, 2) == 2
    with pytest.raises(ValueError, match=r"dp_replicate_size \(0\) must be at least 1"):
        replicas_of(1, 0)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(2, 4, 2, 2, zero_stage=3, offload="cpu", mixed_precision=True),
        Layout(2, 2, 4, 1, duplicate_token_dropping=False, pad_expert_input_to_capacity=True),
        Layout(1, 4, 4, 1, overlap_chunks=2, ep_implementation="all_to_all"),
        Layout(1, 4, 4, 1, ep_implementation="ted_least_loaded", least_loaded_bound=1.5, least_loaded_min_tokens=64),
        Layout(2, 8, 2, 2, dp_replicate_size=2, zero_stage=2),
        Layout(1, 16, 8, 1, dp_replicate_size=4, zero_stage=3),
    ],
)
def test_a_config_has_the_layout_that_it_is_made_of(layout: Layout) -> None:
    config = TedConfig.of_layout(layout)
    assert config.layout == layout
    assert TedConfig.from_dict(config.to_dict()).layout == layout


def test_a_config_has_every_field_of_a_layout() -> None:
    missing = {field.name for field in fields(Layout)} - {field.name for field in fields(TedConfig)}
    # which transformers has under other names
    assert missing == {
        "tensor_parallel_size",
        "data_parallel_size",
        "expert_parallel_size",
        "offload",
        "mixed_precision",
    }
