"""Stacked expert feed-forward networks under the experts contract of transformers.

Shape letters: T tokens, K experts per token, E experts, D model width, F inner width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

from .configuration_zcode_m3 import ZCodeM3Config
from .expert_computation import COMPUTATIONS, ExpertsWithReasons
from .field_of_config import FieldOfConfig


class ActivationWithDropout(nn.Module):
    """Activation and dropout of a feed-forward: one module, so that every experts function runs both."""

    dropout = FieldOfConfig("activation_dropout")

    def __init__(self, config: ZCodeM3Config):
        super().__init__()
        if config.activation_function not in ACT2FN:
            raise ValueError(f"activation_function ({config.activation_function!r}) must be one of {sorted(ACT2FN)}")
        self.config = config
        self.activation = ACT2FN[config.activation_function]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return nn.functional.dropout(self.activation(hidden_states), p=self.dropout, training=self.training)


@use_experts_implementation(experts_interface=ExpertsWithReasons(), has_gate=False, has_bias=True)
class ZCodeM3Experts(nn.Module):
    """E ungated feed-forward networks with biases, `down(act(up(x)))`, stacked along the first dimension.

    `experts_implementation` of `from_pretrained` or `model.set_experts_implementation` chooses how they run, by a name
    of `COMPUTATIONS` in expert_computation.py. The loop below is `"eager"`, the reference for the others.

    Parameters: `up_proj` [E, F, D], `up_proj_bias` [E, F], `down_proj` [E, D, F], `down_proj_bias` [E, D].
    """

    _is_expert_parallel: bool

    def __init__(self, config: ZCodeM3Config, num_experts: int, ffn_dim: int):
        super().__init__()
        self.num_experts = num_experts
        self.up_proj = nn.Parameter(torch.empty(num_experts, ffn_dim, config.d_model))
        self.up_proj_bias = nn.Parameter(torch.empty(num_experts, ffn_dim))
        self.down_proj = nn.Parameter(torch.empty(num_experts, config.d_model, ffn_dim))
        self.down_proj_bias = nn.Parameter(torch.empty(num_experts, config.d_model))
        self.act_fn = ActivationWithDropout(config)

    @property
    def can_be_captured(self) -> bool:
        """Whether a CUDA graph can hold a call: true if the chosen computation does not wait for the device."""
        config: Any = self.config
        row = COMPUTATIONS.get(config._experts_implementation)
        return row is None or row.cuda_graphs in ("yes", str(self.up_proj.dtype).removeprefix("torch."))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """
        Args:
            hidden_states: float[T, D].
            top_k_index: int64[T, K], expert of each slot; `num_experts` for a slot that no expert computes.
            top_k_weights: float[T, K], factor of each expert's output, 0 for such a slot.

        Returns:
            float[T, D], the weighted sum over a token's experts; zeros for a token that none computes.
        """
        output = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):  # experts without tokens, too: then their gradients are zeros, not None
            token, slot = torch.where(top_k_index == expert)
            up = nn.functional.linear(hidden_states[token], self.up_proj[expert], self.up_proj_bias[expert])
            down = nn.functional.linear(self.act_fn(up), self.down_proj[expert], self.down_proj_bias[expert])
            output = output.index_add(0, token, (down * top_k_weights[token, slot, None]).to(output.dtype))
        return output
