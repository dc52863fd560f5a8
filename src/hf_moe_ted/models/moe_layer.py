"""The feed-forward of a transformer block: dense, or route -> experts -> combine."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .configuration_zcode_m3 import ZCodeM3Config
from .experts import ActivationWithDropout, ZCodeM3Experts
from .field_of_config import FieldOfConfig
from .router import Routing, ZCodeM3Router


class ZCodeM3DenseFFN(nn.Module):
    """Feed-forward of a dense layer, `fc2(act(fc1(x)))`."""

    def __init__(self, config: ZCodeM3Config, ffn_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(config.d_model, ffn_dim)
        self.act_fn = ActivationWithDropout(config)
        self.fc2 = nn.Linear(ffn_dim, config.d_model)

    def forward(self, hidden_states: Tensor, token_mask: Tensor | None = None) -> Tensor:
        return self.fc2(self.act_fn(self.fc1(hidden_states)))


class ZCodeM3MoELayer(nn.Module):
    """Feed-forward of a sparse layer: a router and its experts, and with `use_residual` a dense branch."""

    output_masking = FieldOfConfig("moe_token_dropout")

    def __init__(self, config: ZCodeM3Config, num_experts: int, ffn_dim: int, expert_map: Sequence[int] | None = None):
        super().__init__()
        self.config = config
        self.router = ZCodeM3Router(config, num_experts, expert_map)
        self.experts = ZCodeM3Experts(config, num_experts, ffn_dim)
        # makes transformers' experts functions skip ids of `num_experts` and above; here these are dropped tokens and
        # padding
        self.experts._is_expert_parallel = True
        self.residual = ZCodeM3ResidualBranch(config, ffn_dim) if config.use_residual else None

    def forward(self, hidden_states: Tensor, token_mask: Tensor | None = None) -> tuple[Tensor, Routing]:
        """
        Args:
            hidden_states: float[batch, length, d_model].
            token_mask: bool[batch, length], *optional*, False for tokens that go to no expert.

        Returns:
            float[batch, length, d_model], and what the router decided. Without a dense branch, tokens that went to no
            expert get zeros.
        """
        tokens_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        mask_T = None if token_mask is None else token_mask.reshape(-1)
        _, routing = self.router(tokens_TD, mask_T)
        weights_TK = self._mask_outputs(routing.weights).to(tokens_TD.dtype)
        output_TD = self.experts(tokens_TD, routing.expert_ids, weights_TK)
        if self.residual is not None:
            output_TD = self.residual(tokens_TD, output_TD)
        return output_TD.view_as(hidden_states), routing

    def _mask_outputs(self, weights_TK: Tensor) -> Tensor:
        """Expert output masking (NLLB, https://huggingface.co/papers/2207.04672, section 6.2.1), on the weights."""
        if self.output_masking == 0.0:
            return weights_TK
        if self.training:
            return weights_TK * (torch.rand_like(weights_TK) >= self.output_masking)
        return weights_TK * (1.0 - self.output_masking)


class ZCodeM3ResidualBranch(nn.Module):
    """Dense branch of PR-MoE (https://huggingface.co/papers/2201.05596, section 4.1; `deepspeed/moe/layer.py`).

    `experts(x) * c[0] + mlp(x) * c[1]` with `c = softmax(coefficient(x))`.
    """

    def __init__(self, config: ZCodeM3Config, ffn_dim: int):
        super().__init__()
        self.mlp = ZCodeM3DenseFFN(config, ffn_dim)
        self.coefficient = nn.Linear(config.d_model, 2)

    def forward(self, tokens_TD: Tensor, expert_output_TD: Tensor) -> Tensor:
        coefficients_T2 = self.coefficient(tokens_TD).softmax(dim=-1)
        return expert_output_TD * coefficients_T2[:, :1] + self.mlp(tokens_TD) * coefficients_T2[:, 1:]
