"""The module that replaces experts in a model with expert memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .expert_cache import ExpertCache


class CachedExperts(nn.Module):
    """Experts of an MoE layer, of which an [`ExpertCache`] holds some; the module has no parameters.

    It cannot be trained, saved, copied or moved.
    """

    cannot_be_moved = True  # a model asks it before it moves anything

    def __init__(self, cache: ExpertCache, layer: str, num_experts: int, dtype: torch.dtype):
        """
        Args:
            cache: cache of the model.
            layer: name of the MoE layer.
            num_experts: number of experts of the layer.
            dtype: dtype of the model.
        """
        super().__init__()
        self.num_experts = num_experts
        self._cache, self._layer = cache, layer
        self._probe = torch.empty(0, dtype=dtype, device=cache.device)

    @torch.compiler.disable  # the copied experts depend on the routing
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """See [`ZCodeM3Experts`].

        Raises:
            ValueError: in training, or if gradients are needed.
        """
        if torch.is_grad_enabled() and (self.training or hidden_states.requires_grad or top_k_weights.requires_grad):
            raise ValueError(
                "a model with expert_memory cannot be trained or give gradients, because its experts are loaded and "
                "removed; call model.eval() and use torch.no_grad(), or load the model without expert_memory"
            )
        if hidden_states.numel() == 0:
            return torch.zeros_like(hidden_states)
        return self._cache.forward(self._layer, hidden_states, top_k_index, top_k_weights)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        probe = fn(self._probe)
        if probe.device != self._probe.device or probe.dtype != self._probe.dtype:
            self._cache.refuse(f"moving the model to {probe.device} or another dtype")
        return self

    def _save_to_state_dict(self, *args: Any) -> None:
        self._cache.refuse("a state_dict")

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, in {self._cache.folder}"


__all__ = ["CachedExperts"]
