"""Ungated experts with biases on CPUs: tokens are sorted once, then each expert runs on its own rows.

Weights are not copied. In float32 without gradients, oneDNN computes the products; PyTorch's own `linear` uses oneDNN
only for 16-bit numbers. oneDNN is as exact as MKL and up to twice as fast, with few rows and, on AMD's processors, also
with many.

Shape letters: T tokens, K experts per token, R rows, E experts, D model width, F inner width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .private_torch import onednn_linear

MIN_PRODUCTS_FOR_ONEDNN = 2**21  # with fewer, oneDNN's start costs more than MKL's slower products

Network = Callable[[int, Tensor], Tensor]
Networks = Callable[[Tensor, list[int], Tensor], Tensor]


def cpu_ffn_experts_forward(experts: Any, hidden_TD: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts function under the contract of transformers, for experts without a gate and with biases.

    It is meant for inference. Training works, too, and so does any device, but it waits for the device.

    Args:
        experts: module with `up_proj` [E, F, D], `up_proj_bias` [E, F], `down_proj` [E, D, F], `down_proj_bias` [E, D],
            `act_fn`, `num_experts`; any D and F.
        hidden_TD: float[T, D].
        top_k_index: int64[T, K]; `num_experts` for a slot that no expert computes.
        top_k_weights: float[T, K].

    Returns:
        float[T, D].
    """
    up_proj, up_bias = experts.up_proj, experts.up_proj_bias
    down_proj, down_bias = experts.down_proj, experts.down_proj_bias
    if torch.is_grad_enabled():
        # the gradient of one `unbind` is one stack; each gradient of a single expert would be as large as all experts
        up_proj, up_bias, down_proj, down_bias = (p.unbind() for p in (up_proj, up_bias, down_proj, down_bias))

    def network(expert: int, rows_RD: Tensor) -> Tensor:
        inner_RF = experts.act_fn(_linear(rows_RD, up_proj[expert], up_bias[expert]))
        return _linear(inner_RF, down_proj[expert], down_bias[expert])

    return run_expert_by_expert(hidden_TD, top_k_index, top_k_weights, experts.num_experts, network)


def run_expert_by_expert(
    hidden_TD: Tensor, top_k_index: Tensor, top_k_weights: Tensor, num_experts: int, network: Network
) -> Tensor:
    """Like [`run_on_sorted_rows`], with the network of one expert, `(expert, float[R, D]) -> float[R, D]`."""

    def networks(rows_RD: Tensor, num_rows_E: list[int], _: Tensor) -> Tensor:
        outputs = [
            network(expert, of_expert_RD)
            for expert, of_expert_RD in enumerate(rows_RD.split(num_rows_E))
            if len(of_expert_RD) or torch.is_grad_enabled()  # an expert without tokens has gradients, too: zeros
        ]
        return torch.cat(outputs)

    return run_on_sorted_rows(hidden_TD, top_k_index, top_k_weights, num_experts, networks)


@torch.compiler.disable  # a graph cannot treat an expert's number of rows as a constant
def run_on_sorted_rows(
    hidden_TD: Tensor, top_k_index: Tensor, top_k_weights: Tensor, num_experts: int, networks: Networks
) -> Tensor:
    """The weighted sum, for each token, of its experts' outputs.

    Args:
        hidden_TD: float[T, D].
        top_k_index: int64[T, K]; `num_experts` and above for a slot that no expert computes.
        top_k_weights: float[T, K].
        num_experts: E.
        networks: function of all experts, `(float[R, D], number of rows of each expert, int64[R]) -> float[R, D]`; rows
            are in the order of their experts, and int64[R] has the expert of each row.

    Returns:
        float[T, D] in the dtype of `hidden_TD`; zeros for a token that no expert computes.
    """
    num_tokens, top_k = top_k_index.shape
    sorted_R, slot_R = top_k_index.flatten().sort(stable=True)
    num_rows_E = torch.bincount(sorted_R, minlength=num_experts).tolist()[:num_experts]
    num_rows = sum(num_rows_E)
    if not num_rows and not torch.is_grad_enabled():
        return torch.zeros_like(hidden_TD)
    slot_R = slot_R[:num_rows]
    token_R = slot_R if top_k == 1 else slot_R // top_k
    outputs_RD = networks(hidden_TD.index_select(0, token_R), num_rows_E, sorted_R[:num_rows])
    weighted_RD = outputs_RD * top_k_weights.flatten().index_select(0, slot_R).unsqueeze(-1)
    slots_RD = weighted_RD.new_zeros(num_tokens * top_k, hidden_TD.shape[1]).index_copy(0, slot_R, weighted_RD)
    if top_k > 1:
        slots_RD = slots_RD.view(num_tokens, top_k, hidden_TD.shape[1]).sum(dim=1)
    return slots_RD.to(hidden_TD.dtype)


def _linear(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    is_for_onednn = (
        inputs.dtype == weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and not torch.is_grad_enabled()  # the product has no gradient
        and not torch.is_autocast_enabled("cpu")  # it would not see it
        and len(inputs) * weight.numel() >= MIN_PRODUCTS_FOR_ONEDNN
    )
    if is_for_onednn:
        return onednn_linear(inputs, weight, bias)
    return torch.nn.functional.linear(inputs, weight, bias)


__all__ = ["cpu_ffn_experts_forward", "run_expert_by_expert", "run_on_sorted_rows"]
