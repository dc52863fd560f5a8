"""Names of the layers whose feed-forward may be sparse, and of the weights in it."""

from .configuration_zcode_m3 import Side, ZCodeM3Config

SIDES: tuple[Side, ...] = ("encoder", "decoder")

FFN_PATTERN = r"(encoder|decoder)\.layers\.(\d+)\.ffn"
"""Regular expression for the name of a feed-forward in [`ZCodeM3Model`]; it captures side and layer number."""

# weight of a sparse feed-forward -> weight of a dense one of the same width
DENSE_OF_STACKED = {
    "experts.up_proj": "fc1.weight",
    "experts.up_proj_bias": "fc1.bias",
    "experts.down_proj": "fc2.weight",
    "experts.down_proj_bias": "fc2.bias",
}


def ffn_name(side: Side, layer: int) -> str:
    """Name of a feed-forward in [`ZCodeM3ForConditionalGeneration`]."""
    return f"model.{side}.layers.{layer}.ffn"


def moe_layers(config: ZCodeM3Config) -> dict[str, int]:
    """Name of each MoE layer in [`ZCodeM3ForConditionalGeneration`] -> number of experts; the encoder's come first."""
    return {
        ffn_name(side, layer): num_experts
        for side in SIDES
        for layer, num_experts in config.num_experts_per_layer(side).items()
    }


def side_of(layer: str) -> Side:
    """Whether the MoE layer of this name belongs to the encoder or the decoder."""
    return "encoder" if layer.startswith("model.encoder.") else "decoder"


__all__ = ["DENSE_OF_STACKED", "FFN_PATTERN", "SIDES", "ffn_name", "moe_layers", "side_of"]
