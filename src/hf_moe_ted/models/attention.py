"""Attention of a transformer block, self or cross, through the attention implementations of transformers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_backends import warn_of_cudnn_backward
from .configuration_zcode_m3 import ZCodeM3Config
from .field_of_config import FieldOfConfig


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in plain operations: query, key, value float[batch, heads, length, head_dim], additive mask."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class ZCodeM3Attention(nn.Module):
    """Multi-head attention, self or cross."""

    dropout = FieldOfConfig("attention_dropout")

    def __init__(
        self,
        config: ZCodeM3Config,
        num_heads: int,
        layer_idx: int,
        is_causal: bool = False,
        is_cross_attention: bool = False,
    ):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = is_causal
        self.head_dim = config.d_model // num_heads
        self.scaling = self.head_dim**-0.5
        if config.position_embedding_type == "tupe" and not is_cross_attention:
            self.scaling = (2 * self.head_dim) ** -0.5  # scores of the positions are the other half
        self.q_proj = nn.Linear(config.d_model, config.d_model)
        self.k_proj = nn.Linear(config.d_model, config.d_model)
        self.v_proj = nn.Linear(config.d_model, config.d_model)
        self.out_proj = nn.Linear(config.d_model, config.d_model)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            hidden_states: float[batch, length, d_model].
            attention_mask: mask in the form of the attention implementation, or `None`.
            key_value_states: float[batch, source_length, d_model], *optional*, for cross-attention.
            cache: past keys and values, which are read and extended. A cache with a method `attend` also computes the
                attention: to its keys of the source, or to past and new keys.

        Returns:
            float[batch, length, d_model], and the attention weights if the implementation returns them.
        """
        attend = getattr(cache, "attend", None)
        if attend is not None:
            added = (self.k_proj, self.v_proj) if key_value_states is None else ()
            projected = self._projected(hidden_states, self.q_proj, *added)
            output = attend(self.layer_idx, attention_mask, self.scaling, *projected)
            return self.out_proj(output.reshape(*hidden_states.shape[:-1], -1)), None
        if key_value_states is None:
            query, key, value = self._projected(hidden_states, self.q_proj, self.k_proj, self.v_proj)
            own_cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
            if own_cache is not None:
                key, value = own_cache.update(key, value, self.layer_idx)
        else:
            [query] = self._projected(hidden_states, self.q_proj)
            key, value = self.keys_and_values_of_source(key_value_states, cache)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        if self.config._attn_implementation == "sdpa":
            warn_of_cudnn_backward(query, attention_mask)
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.out_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights

    def _split_heads(self, states: Tensor) -> Tensor:
        return states.view(*states.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def _projected(self, states: Tensor, first: nn.Module, *others: nn.Module) -> list[Tensor]:
        """float[batch, heads, length, head_dim] of each projection; quantized projections need one product for all."""
        with_others = getattr(first, "with_others", None) if others else None
        projected = with_others(others, states) if with_others else [layer(states) for layer in (first, *others)]
        return [self._split_heads(states) for states in projected]

    def keys_and_values_of_source(self, states: Tensor, cache: Cache | None) -> tuple[Tensor, Tensor]:
        """Keys and values of cross-attention, float[batch, heads, source_length, head_dim], cached if possible."""
        own_cache = cache
        if isinstance(cache, EncoderDecoderCache):
            own_cache = cache.cross_attention_cache
            if cache.is_updated.get(self.layer_idx):
                layer: Any = own_cache.layers[self.layer_idx]
                return layer.keys, layer.values
        key, value = self._projected(states, self.k_proj, self.v_proj)
        if own_cache is not None:
            key, value = own_cache.update(key, value, self.layer_idx)
            if isinstance(cache, EncoderDecoderCache):
                cache.is_updated[self.layer_idx] = True
        return key, value


__all__ = ["ZCodeM3Attention", "eager_attention_forward"]
