"""Token embedding and layers of encoder and decoder."""

import math
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import ZCodeM3Attention
from .configuration_zcode_m3 import Side, ZCodeM3Config
from .field_of_config import FieldOfConfig
from .moe_layer import ZCodeM3DenseFFN, ZCodeM3MoELayer
from .router import Routing


class ZCodeM3ScaledWordEmbedding(nn.Embedding):
    """Token embedding multiplied by `embed_scale`."""

    def __init__(self, config: ZCodeM3Config):
        super().__init__(config.vocab_size, config.d_model, config.pad_token_id)
        self.embed_scale: float = math.sqrt(config.d_model) if config.scale_embedding else 1.0

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids) * self.embed_scale


def _feed_forward(config: ZCodeM3Config, side: Side, layer_idx: int) -> ZCodeM3DenseFFN | ZCodeM3MoELayer:
    ffn_dim = getattr(config, f"{side}_ffn_dim")
    num_experts = config.num_experts_per_layer(side).get(layer_idx)
    if num_experts is None:
        return ZCodeM3DenseFFN(config, ffn_dim)
    return ZCodeM3MoELayer(config, num_experts, ffn_dim, config.expert_map_per_layer(side).get(layer_idx))


class ZCodeM3Layer(GradientCheckpointingLayer):
    """Base class of encoder and decoder layers: a branch is added to the hidden states with dropout.

    A layer returns what its router decided, because hooks that record it would break the graph of a compiled layer.
    """

    dropout = FieldOfConfig()
    final_layer_norm: nn.LayerNorm
    ffn: nn.Module

    def _feed_forward(self, hidden_states: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Routing | None]:
        output = self.ffn(self.final_layer_norm(hidden_states), token_mask)
        branch, routing = output if isinstance(output, tuple) else (output, None)
        return self._add(hidden_states, branch), routing

    def _add(self, hidden_states: Tensor, branch: Tensor) -> Tensor:
        return hidden_states + nn.functional.dropout(branch, p=self.dropout, training=self.training)


class ZCodeM3EncoderLayer(ZCodeM3Layer):
    def __init__(self, config: ZCodeM3Config, layer_idx: int):
        super().__init__()
        self.config = config
        self.self_attn = ZCodeM3Attention(config, config.encoder_attention_heads, layer_idx)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.ffn = _feed_forward(config, "encoder", layer_idx)
        self.final_layer_norm = nn.LayerNorm(config.d_model)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, token_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Routing | None]:
        """hidden_states float[batch, length, d_model]; token_mask bool[batch, length], False for no expert.

        Returns:
            float[batch, length, d_model], and for a sparse layer what its router decided.
        """
        attended, _ = self.self_attn(self.self_attn_layer_norm(hidden_states), attention_mask, **kwargs)
        hidden_states = self._add(hidden_states, attended)
        return self._feed_forward(hidden_states, token_mask)


class ZCodeM3DecoderLayer(ZCodeM3Layer):
    def __init__(self, config: ZCodeM3Config, layer_idx: int):
        super().__init__()
        self.config = config
        self.self_attn = ZCodeM3Attention(config, config.decoder_attention_heads, layer_idx, is_causal=True)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.encoder_attn = ZCodeM3Attention(config, config.decoder_attention_heads, layer_idx, is_cross_attention=True)
        self.encoder_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.ffn = _feed_forward(config, "decoder", layer_idx)
        self.final_layer_norm = nn.LayerNorm(config.d_model)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        token_mask: Tensor | None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Routing | None]:
        """Like the encoder's; encoder_hidden_states float[batch, source_length, d_model]."""
        attended, _ = self.self_attn(self.self_attn_layer_norm(hidden_states), attention_mask, cache=cache, **kwargs)
        hidden_states = self._add(hidden_states, attended)
        if encoder_hidden_states is not None:
            attended, _ = self.encoder_attn(
                self.encoder_attn_layer_norm(hidden_states),
                encoder_attention_mask,
                key_value_states=encoder_hidden_states,
                cache=cache,
                **kwargs,
            )
            hidden_states = self._add(hidden_states, attended)
        return self._feed_forward(hidden_states, token_mask)
