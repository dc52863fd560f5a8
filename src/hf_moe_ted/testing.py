"""Helpers for tests of this package and of code that builds on it."""

from typing import Any

from .models.configuration_zcode_m3 import ZCodeM3Config


def tiny_config(**overrides: Any) -> ZCodeM3Config:
    """A model of 101,152 parameters without dropout: 4 + 2 layers, every other one with 4 experts."""
    fields: dict[str, Any] = {
        "vocab_size": 96,
        "max_position_embeddings": 64,
        "d_model": 32,
        "encoder_layers": 4,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "num_experts": 4,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    }
    return ZCodeM3Config(**{**fields, **overrides})
