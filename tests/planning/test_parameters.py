"""Numbers of parameters against models: whole ones, and those that a rank holds of a really sharded one."""

import math
from typing import Any

import pytest
import torch

from hf_moe_ted import ZCodeM3ForConditionalGeneration
from hf_moe_ted.distributed.layout import Layout
from hf_moe_ted.planning.parameters import num_parameters, parameter_shapes, parameters_of_rank, shard_shape
from hf_moe_ted.planning.simulation import local_numels_of_rank
from hf_moe_ted.testing import tiny_config

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"tie_word_embeddings": False, "position_embedding_type": "tupe"},
    "residual": {"position_embedding_type": "learned", "use_residual": True, "router_bias": True},
    "merged": {"num_experts_per_tok": 2, "expert_map": [[0, 3, 1, 2, 3, 0], [1, 1, 2, 0, 3, 1], [0, 1, 2, 3]]},
    "pyramid": {"num_experts": [2, 4, 8]},
    "dense": {"encoder_sparse_step": 0, "decoder_sparse_step": 0},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_whole_model(name: str) -> None:
    config = tiny_config(**CONFIGS[name])
    with torch.device("meta"):
        model = ZCodeM3ForConditionalGeneration(config)
    assert sorted(p.shape for p in parameter_shapes(config)) == sorted(tuple(p.shape) for p in model.parameters())
    in_experts = sum(p.numel() for key, p in model.named_parameters() if ".experts." in key)
    assert num_parameters(config, "expert") == in_experts


@pytest.mark.parametrize(
    ("name", "layout", "ranks"),
    [
        ("plain", Layout(1, 64, 4, 1), (0, 1, 37, 63)),  # 32 rows over 64 ranks: half of them hold nothing
        ("untied", Layout(2, 3, 2, 1, zero_stage=3), range(6)),
        ("residual", Layout(4, 2, 2, 2), range(8)),
        ("merged", Layout(4, 1, 4, 1), range(4)),
        ("pyramid", Layout(2, 4, 2, 2), (0, 7)),
        ("dense", Layout(1, 5, 1, 1), (0, 4)),
        ("plain", Layout(1, 4, 4, 1, offload="cpu"), (0, 3)),
        ("residual", Layout(2, 8, 2, 2, dp_replicate_size=2), (0, 5, 15)),  # an expert twice in each replica
        ("plain", Layout(1, 16, 4, 1, dp_replicate_size=8), (0, 5, 15)),  # experts spread over two replicas
    ],
)
def test_sharded_model(name: str, layout: Layout, ranks: Any) -> None:
    config = tiny_config(**CONFIGS[name])
    for rank in ranks:
        numels = local_numels_of_rank(config, layout, rank)
        planned = [math.prod(shard_shape(parameter, layout, rank)) for parameter in parameter_shapes(config)]
        assert sorted(numels.values()) == sorted(planned)
        assert parameters_of_rank(config, layout, rank).total == sum(numels.values())


def test_ranks_hold_the_model_once() -> None:
    """But for what tensor parallelism does not divide."""
    config, layout = tiny_config(), Layout(1, 8, 4, 1)
    total = sum(parameters_of_rank(config, layout, rank).total for rank in range(8))
    assert total == num_parameters(config) == 101_152
