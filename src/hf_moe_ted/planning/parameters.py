"""Parameters of a ZCodeM3, and how many of them a rank of a layout holds: numbers only, no tensors."""

import functools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from ..distributed.layout import Layout
from ..models.configuration_zcode_m3 import Side, ZCodeM3Config

Kind = Literal["dense", "expert", "embedding"]
SIDES: tuple[Side, Side] = ("encoder", "decoder")


@dataclass(frozen=True)
class ParameterShape:
    """One parameter of the whole model.

    Attributes:
        shape: shape of the whole parameter.
        kind: "expert" for stacked experts, "embedding" for parameters with a row per word, "dense" for the rest.
        layer: side and index of its layer; `None` outside of layers.
        split_dim: the dimension that tensor parallelism divides (experts: expert-tensor parallelism); `None` if all
            ranks of the group hold the whole parameter.
    """

    shape: tuple[int, ...]
    kind: Kind = "dense"
    layer: tuple[Side, int] | None = None
    split_dim: int | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


_FIELDS = (
    *("vocab_size", "d_model", "encoder_layers", "decoder_layers", "encoder_ffn_dim", "decoder_ffn_dim"),
    *("encoder_sparse_step", "decoder_sparse_step", "encoder_sparse_layers", "decoder_sparse_layers", "num_experts"),
    *("expert_map", "router_bias", "use_residual", "position_embedding_type", "max_position_embeddings"),
    *("pad_token_id", "tie_word_embeddings"),
)


@dataclass(frozen=True)
class HashableConfig:
    """A config, hashed by the fields on which parameters depend, so that repeated results are cached."""

    key: str
    config: ZCodeM3Config = field(compare=False)

    @classmethod
    def of(cls, config: ZCodeM3Config) -> "HashableConfig":
        return cls(repr([getattr(config, name) for name in _FIELDS]), config)


def parameter_shapes(config: ZCodeM3Config) -> tuple[ParameterShape, ...]:
    """All parameters of a `ZCodeM3ForConditionalGeneration`, tied ones once."""
    return _parameter_shapes(HashableConfig.of(config))


@functools.lru_cache(maxsize=16)
def _parameter_shapes(hashable: HashableConfig) -> tuple[ParameterShape, ...]:
    return tuple(_all_shapes(hashable.config))


def layer_groups(config: ZCodeM3Config) -> tuple[tuple[Side, int | None, int], ...]:
    """Side, experts (`None` for a dense layer), and number of such layers."""
    return _layer_groups(HashableConfig.of(config))


@functools.lru_cache(maxsize=16)
def _layer_groups(hashable: HashableConfig) -> tuple[tuple[Side, int | None, int], ...]:
    counts: Counter[tuple[Side, int | None]] = Counter()
    for side in SIDES:
        sparse = hashable.config.num_experts_per_layer(side)
        counts.update((side, sparse.get(layer)) for layer in range(getattr(hashable.config, f"{side}_layers")))
    return tuple((side, num_experts, count) for (side, num_experts), count in counts.items())


def _all_shapes(config: ZCodeM3Config) -> Iterator[ParameterShape]:
    num_embeddings = 1 if config.tie_word_embeddings else 4  # names in the model, in both stacks and the head
    for _ in range(num_embeddings):
        yield ParameterShape((config.vocab_size, config.d_model), "embedding", split_dim=0)
    for side in SIDES:
        yield from _outside_of_layers(config)
        num_experts = config.num_experts_per_layer(side)
        num_rows = {layer: len(rows) for layer, rows in config.expert_map_per_layer(side).items()}
        for layer in range(getattr(config, f"{side}_layers")):
            shapes = _layer(config, side, num_experts.get(layer), num_rows.get(layer))
            yield from (replace(shape, layer=(side, layer)) for shape in shapes)


def _linear(outputs: int, inputs: int, split: Literal["columns", "rows"] | None = None) -> list[ParameterShape]:
    """Weight and bias of a linear layer; split by columns means by outputs."""
    weight_dim = {"columns": 0, "rows": 1, None: None}[split]
    bias_dim = 0 if split == "columns" else None
    return [ParameterShape((outputs, inputs), split_dim=weight_dim), ParameterShape((outputs,), split_dim=bias_dim)]


def _layer_norm(width: int) -> list[ParameterShape]:
    return [ParameterShape((width,)), ParameterShape((width,))]


def _outside_of_layers(config: ZCodeM3Config) -> list[ParameterShape]:
    """Positions and the last LayerNorm of a stack."""
    width, positions = config.d_model, config.max_position_embeddings
    shapes = _layer_norm(width)
    if config.position_embedding_type == "learned":
        shapes.append(ParameterShape((positions + (config.pad_token_id or 0) + 1, width)))
    elif config.position_embedding_type == "tupe":
        shapes += [ParameterShape((positions + 1, width)), *_layer_norm(width)]
        shapes += 2 * _linear(width, width, "columns")
    return shapes


def _layer(config: ZCodeM3Config, side: Side, num_experts: int | None, num_rows: int | None) -> list[ParameterShape]:
    width, ffn_dim = config.d_model, getattr(config, f"{side}_ffn_dim")
    attention = 3 * _linear(width, width, "columns") + _linear(width, width, "rows") + _layer_norm(width)
    shapes = attention * (1 if side == "encoder" else 2) + _layer_norm(width)
    dense_ffn = _linear(ffn_dim, width, "columns") + _linear(width, ffn_dim, "rows")
    if num_experts is None:
        return shapes + dense_ffn
    rows = num_experts if num_rows is None else num_rows
    shapes.append(ParameterShape((rows, width)))
    if config.router_bias:
        shapes.append(ParameterShape((rows,)))
    if config.use_residual:
        shapes += [*dense_ffn, *_linear(2, width)]
    shapes += [
        ParameterShape((num_experts, ffn_dim, width), "expert", split_dim=1),
        ParameterShape((num_experts, ffn_dim), "expert", split_dim=1),
        ParameterShape((num_experts, width, ffn_dim), "expert", split_dim=2),
        ParameterShape((num_experts, width), "expert"),
    ]
    return shapes


# ---- of one rank ----


def is_spread_expert(parameter: ParameterShape, layout: Layout) -> bool:
    """Whether a parameter is on the expert axes; experts that are not spread are sharded like dense layers."""
    return parameter.kind == "expert" and layout.experts_are_spread


def gathered_shape(parameter: ParameterShape, layout: Layout) -> tuple[int, ...]:
    """Shape that a rank computes with: its slice by tensor and expert parallelism, not divided by ZeRO."""
    shape = list(parameter.shape)
    if is_spread_expert(parameter, layout):
        shape[0] //= layout.expert_parallel_size
        split = layout.expert_tensor_parallel_size
    else:
        split = 1 if parameter.kind == "expert" else layout.tensor_parallel_size
    if parameter.split_dim is not None:
        shape[parameter.split_dim] //= split
    return tuple(shape)


def shard_shape(parameter: ParameterShape, layout: Layout, rank: int | None = None) -> tuple[int, ...]:
    """Shape that a rank stores, also divided by ZeRO.

    Args:
        rank: rank in the world; by default the first of each group, which has the most if sizes do not divide. FSDP2
            pads the shards of all ranks to that size in its collectives.
    """
    shape = list(gathered_shape(parameter, layout))
    if is_spread_expert(parameter, layout):
        num_shards, stride = layout.expert_zero_size, layout.expert_parallel_size
        stride *= layout.expert_tensor_parallel_size
        dim = next((dim for dim, size in enumerate(shape) if size % num_shards == 0), 0)
    else:
        num_shards, stride, dim = layout.zero_size, layout.tensor_parallel_size, 0
    rows = -(-shape[dim] // num_shards)
    index = 0 if rank is None else rank // stride % num_shards
    shape[dim] = max(0, min(rows, shape[dim] - index * rows))
    return tuple(shape)


@dataclass(frozen=True)
class RankParameters:
    """Numbers of parameters, by kind.

    Attributes:
        dense, expert, embedding: parameters that a rank stores.
        gathered_dense, gathered_expert, gathered_embedding: parameters that it computes with, not divided by ZeRO.
    """

    dense: int
    expert: int
    embedding: int
    gathered_dense: int
    gathered_expert: int
    gathered_embedding: int

    @property
    def total(self) -> int:
        return self.dense + self.expert + self.embedding

    @property
    def gathered(self) -> int:
        return self.gathered_dense + self.gathered_expert + self.gathered_embedding


def parameters_of_rank(config: ZCodeM3Config, layout: Layout, rank: int | None = None) -> RankParameters:
    """Exact number of parameters of one rank of a layout; `rank` as in `shard_shape`."""
    return _parameters_of_rank(HashableConfig.of(config), layout, rank)


@functools.lru_cache(maxsize=4096)
def _parameters_of_rank(hashable: HashableConfig, layout: Layout, rank: int | None) -> RankParameters:
    stored = {"dense": 0, "expert": 0, "embedding": 0}
    gathered = dict(stored)
    for parameter in _parameter_shapes(hashable):
        stored[parameter.kind] += math.prod(shard_shape(parameter, layout, rank))
        gathered[parameter.kind] += math.prod(gathered_shape(parameter, layout))
    return RankParameters(**stored, **{f"gathered_{kind}": numel for kind, numel in gathered.items()})


def num_parameters(config: ZCodeM3Config, kind: Kind | None = None) -> int:
    """Number of parameters of the whole model, of one kind or all."""
    return sum(p.numel for p in parameter_shapes(config) if kind is None or p.kind == kind)


__all__ = [
    "SIDES",
    "HashableConfig",
    "Kind",
    "ParameterShape",
    "RankParameters",
    "gathered_shape",
    "is_spread_expert",
    "layer_groups",
    "num_parameters",
    "parameter_shapes",
    "parameters_of_rank",
    "shard_shape",
]
