"""The feed-forward of a transformer block: dense, or route -> experts -> combine."""

from torch import Tensor, nn

from .configuration_zcode_m3 import ZCodeM3Config
from .experts import ActivationWithDropout, ZCodeM3Experts
from .router import ZCodeM3Router


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
    """Feed-forward of a sparse layer: a router and its experts."""

    def __init__(self, config: ZCodeM3Config, num_experts: int, ffn_dim: int):
        super().__init__()
        self.router = ZCodeM3Router(config, num_experts)
        self.experts = ZCodeM3Experts(config, num_experts, ffn_dim)
        # the switch of transformers' experts functions that makes them skip ids of `num_experts` and above,
        # which here are dropped and padding tokens
        self.experts._is_expert_parallel = True

    def forward(self, hidden_states: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """
        Args:
            hidden_states: float[batch, length, d_model].
            token_mask: bool[batch, length], *optional*, False for tokens that go to no expert.

        Returns:
            float[batch, length, d_model]; zeros for tokens that went to no expert.
        """
        tokens_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        mask_T = None if token_mask is None else token_mask.reshape(-1)
        _, routing = self.router(tokens_TD, mask_T)
        output_TD = self.experts(tokens_TD, routing.expert_ids, routing.weights.to(tokens_TD.dtype))
        return output_TD.view_as(hidden_states)
