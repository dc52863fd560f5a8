"""Positions of tokens, and the three ways in which the model uses them.

Shape letters: B batch, L tokens of this call, Q queries, K keys, H heads, D model width.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .configuration_zcode_m3 import Side, ZCodeM3Config


@dataclass(frozen=True)
class Tokens:
    """Which inputs of this call are tokens, and their positions.

    Attributes:
        mask: bool[B, L], False for padding.
        positions: int64[B, L], 1 for the first token of a sequence, 0 for padding.
        key_positions: int64[B, K], the same for all tokens to which these may attend, past ones included; `None` with a
            static cache, whose keys are in order.
        total_length: length of the sequence so far, with padding; a tensor with a static cache.
    """

    mask: Tensor
    positions: Tensor
    key_positions: Tensor | None
    total_length: int | Tensor


def tokens_of(
    config: ZCodeM3Config,
    input_ids: Tensor | None,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    num_past: int | Tensor = 0,
) -> Tokens:
    """Tokens according to the attention mask, past ones included; without a mask, all except padding ids.

    `attention_mask` is [B, K] with one entry per token. From `generate` with a static cache it is [B, 1, L, K], bool or
    additive; then the position of a token is the number of tokens to which it attends.
    """
    batch_size, length = inputs_embeds.shape[:2]
    total_length = length + num_past
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 4:
        attends = attention_mask[:, 0] if attention_mask.dtype == torch.bool else attention_mask[:, 0] == 0
        mask = attends.any(dim=-1)
        if input_ids is not None:
            mask = mask & input_ids.ne(config.pad_token_id)  # type: ignore[arg-type]  # the config requires it
        last = attends[:, -1].long()
        return Tokens(mask, attends.sum(dim=-1) * mask, last.cumsum(dim=1) * last, total_length)
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 and attention_mask.shape[1] == total_length:
        key_mask = attention_mask.to(inputs_embeds.device).bool()
        key_positions = key_mask.long().cumsum(dim=1) * key_mask
        return Tokens(key_mask[:, -length:], key_positions[:, -length:], key_positions, total_length)
    if input_ids is None:
        mask = torch.ones((batch_size, length), dtype=torch.bool, device=inputs_embeds.device)
    else:
        mask = input_ids.ne(config.pad_token_id)  # type: ignore[arg-type]  # the config requires it
    positions = (mask.long().cumsum(dim=1) + num_past) * mask
    if not isinstance(num_past, int):
        return Tokens(mask, positions, None, total_length)
    past = torch.arange(1, num_past + 1, device=mask.device).expand(batch_size, -1)
    return Tokens(mask, positions, torch.cat([past, positions], dim=1), total_length)


class ZCodeM3SinusoidalPositionalEmbedding(nn.Module):
    """Sinusoidal positions in M2M100's layout: row `pad_token_id` is zero, the first token has the next row."""

    weights: Tensor

    def __init__(self, config: ZCodeM3Config):
        super().__init__()
        self.embedding_dim = config.d_model
        self.padding_idx: int = config.pad_token_id  # type: ignore[assignment]  # the config requires it
        self.num_rows = config.max_position_embeddings + self.padding_idx + 1
        self.register_buffer("weights", self.table().to(torch.get_default_dtype()), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        # no checkpoint holds the table: `to_empty` would leave it undefined, `half().float()` would leave it rounded
        try:
            super()._apply(fn, recurse)
        except NotImplementedError:  # moved from the meta device, after `load_state_dict(assign=True)`
            self.weights = fn(self.table("cpu").to(self.weights.dtype))
        if not self.weights.is_meta:
            self.weights = self.table("cpu").to(self.weights)
        return self

    def table(self, device: str | None = None) -> Tensor:
        """float32[num_rows, D], by default on the device of new tensors."""
        half_dim = self.embedding_dim // 2
        frequencies = torch.exp(torch.arange(half_dim, device=device).float() * -(math.log(10000) / (half_dim - 1)))
        angles = torch.arange(self.num_rows, device=device).float().unsqueeze(1) * frequencies
        table = torch.cat([angles.sin(), angles.cos()], dim=1)
        table[self.padding_idx] = 0
        return table

    def forward(self, positions_BL: Tensor) -> Tensor:
        """float[B, L, D] of `Tokens.positions`, zeros for padding."""
        if self.weights.is_meta and not positions_BL.is_meta:  # after `load_state_dict(assign=True)`
            self.weights = self.table("cpu").to(positions_BL.device)
        return nn.functional.embedding(positions_BL + self.padding_idx, self.weights)


class ZCodeM3LearnedPositionalEmbedding(nn.Embedding):
    """Learned positions in the layout of the sinusoidal ones."""

    def __init__(self, config: ZCodeM3Config):
        padding_idx: int = config.pad_token_id  # type: ignore[assignment]  # the config requires it
        super().__init__(config.max_position_embeddings + padding_idx + 1, config.d_model, padding_idx)
        self.first_row = padding_idx

    def forward(self, positions_BL: Tensor) -> Tensor:
        """float[B, L, D] of `Tokens.positions`, zeros for padding."""
        return super().forward(positions_BL + self.first_row)


class ZCodeM3UntiedPositions(nn.Module):
    """Untied positional attention (TUPE, https://huggingface.co/papers/2006.15595, section 3.1, without relative bias).

    Nothing is added to the embeddings. Instead positions have their own query and key projections. Their scores are
    added to those of the content, equally in every self-attention of a stack; both are divided by `sqrt(2 * head_dim)`.
    """

    def __init__(self, config: ZCodeM3Config, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.scaling = (2 * config.d_model // num_heads) ** -0.5
        self.embedding = nn.Embedding(config.max_position_embeddings + 1, config.d_model)
        self.layer_norm = nn.LayerNorm(config.d_model)
        self.q_proj = nn.Linear(config.d_model, config.d_model)
        self.k_proj = nn.Linear(config.d_model, config.d_model)

    def forward(self, positions_BQ: Tensor, key_positions_BK: Tensor) -> Tensor:
        """Attention bias float[B, H, Q, K]."""
        query = self._split_heads(self.q_proj(self.layer_norm(self.embedding(positions_BQ))))
        key = self._split_heads(self.k_proj(self.layer_norm(self.embedding(key_positions_BK))))
        return torch.matmul(query, key.transpose(2, 3)) * self.scaling

    def add_to_mask(self, attention_mask: Tensor | None, tokens: Tokens, is_causal: bool) -> Tensor:
        """The bias, float[B, H, Q, K], with the smallest number where `attention_mask` forbids attention.

        Args:
            attention_mask: bool (True to attend) or additive float [B, 1, Q, K]; `None` without padding; then attention
                is causal if `is_causal`.
        """
        key_positions = tokens.key_positions
        if key_positions is None:
            if attention_mask is None:
                raise ValueError("untied positions with a static cache need an attention mask; pass attention_mask")
            num_keys = attention_mask.shape[-1]
            limit = self.embedding.num_embeddings - 1
            in_order = torch.arange(1, num_keys + 1, device=tokens.positions.device).clamp(max=limit)
            key_positions = in_order.expand(tokens.positions.shape[0], -1)
        bias = self(tokens.positions, key_positions)
        if attention_mask is None:
            if not is_causal:
                return bias
            num_queries, num_keys = bias.shape[-2:]
            allowed = torch.ones(num_queries, num_keys, dtype=torch.bool, device=bias.device)
            attention_mask = allowed.tril(diagonal=num_keys - num_queries)
        if attention_mask.dtype == torch.bool:
            return bias.masked_fill(~attention_mask, torch.finfo(bias.dtype).min)
        return bias + attention_mask

    def _split_heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def positional_embedding(config: ZCodeM3Config, side: Side) -> nn.Module:
    """The module that `config.position_embedding_type` names."""
    if config.position_embedding_type == "tupe":
        return ZCodeM3UntiedPositions(config, getattr(config, f"{side}_attention_heads"))
    if config.position_embedding_type == "learned":
        return ZCodeM3LearnedPositionalEmbedding(config)
    return ZCodeM3SinusoidalPositionalEmbedding(config)
