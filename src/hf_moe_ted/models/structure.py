"""Check that config fields that made the layers of a model have not changed."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from .configuration_zcode_m3 import Side, ZCodeM3Config
from .router import ZCodeM3Router

# config fields that must not change after the layers were made; numbers of experts are compared with the layers
_FIXED_FIELDS = (
    "d_model",
    "encoder_layers",
    "decoder_layers",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "activation_function",
    "scale_embedding",
    "position_embedding_type",
    "router_bias",
    "use_residual",
    "max_position_embeddings",
)


def fixed_fields(config: ZCodeM3Config) -> dict[str, Any]:
    """The fields that made the layers, for a later comparison."""
    return {name: getattr(config, name) for name in _FIXED_FIELDS}


def refuse_changed_structure(
    config: ZCodeM3Config, built_with: dict[str, Any], layers: Mapping[Side, Iterable[nn.Module]]
) -> None:
    """
    Raises:
        ValueError: fields of the config that made the model's layers were changed later.
    """
    now = fixed_fields(config)
    changed = [name for name, value in built_with.items() if now[name] != value]
    if config.max_position_embeddings < built_with["max_position_embeddings"]:  # a limit, which is still respected
        changed.remove("max_position_embeddings")
    for side in layers if not changed else ():
        changed += _changed_sparse_layers(config, side, layers[side])
    if changed:
        raise ValueError(
            "model.config was changed after the model was built, in fields from which layers are made: "
            f"{', '.join(changed)}; change it back, or build a new model from the config"
        )


def _changed_sparse_layers(config: ZCodeM3Config, side: Side, layers: Iterable[Any]) -> list[str]:
    modules = {i: [*layer.ffn.modules()] for i, layer in enumerate(layers)}  # PEFT wraps routers
    routers = {i: m for i, of_layer in modules.items() for m in of_layer if isinstance(m, ZCodeM3Router)}
    changed = []
    if {i: router.num_experts for i, router in routers.items()} != config.num_experts_per_layer(side):
        changed.append(f"num_experts or the sparse layers of the {side}")
    maps = {i: [*router.expert_map] for i, router in routers.items() if router.expert_map is not None}
    if maps != config.expert_map_per_layer(side):
        changed.append(f"expert_map of the {side}")
    return changed


__all__ = ["fixed_fields", "refuse_changed_structure"]
