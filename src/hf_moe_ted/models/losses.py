"""Router losses: pure functions of what the router computed.

Shape letters: T tokens, K experts per token, E experts.
"""

import torch
from torch import Tensor


def load_balancing_loss(logits_TE: Tensor, choices_TK: Tensor, token_mask_T: Tensor | None = None) -> Tensor:
    """Load-balancing loss of one sparse layer: 1 when tokens spread evenly, up to `num_experts` when they do not.

    `E * sum_e(mean router probability of e * share of tokens that chose e)`, as in Switch Transformers
    (https://huggingface.co/papers/2101.03961, section 2.2) and DeepSpeed's gates. With two experts per token only
    first choices count (GShard, https://huggingface.co/papers/2006.16668); with three or more all choices do, divided
    by K. The share is a constant to the gradient.

    Args:
        logits_TE: float[T, E], router logits.
        choices_TK: int[T, K], chosen experts in order of preference, before any is dropped for lack of capacity.
        token_mask_T: bool[T], *optional*, False for tokens that do not count (padding).

    Returns:
        float32 scalar; 0 when no token counts.
    """
    num_experts = logits_TE.shape[-1]
    counted_TK = choices_TK if choices_TK.shape[-1] > 2 else choices_TK[:, :1]
    probs_TE = logits_TE.float().softmax(dim=-1)
    chosen_TE = torch.zeros_like(probs_TE).scatter_(1, counted_TK, 1.0)
    mean_prob_E = _masked_mean(probs_TE, token_mask_T)
    share_E = _masked_mean(chosen_TE, token_mask_T) / counted_TK.shape[-1]
    return num_experts * (mean_prob_E * share_E).sum()


def router_z_loss(logits_TE: Tensor, token_mask_T: Tensor | None = None) -> Tensor:
    """Mean squared log-partition of the router logits, which keeps them small (ST-MoE, paper 2202.08906, eq. 5).

    Args and result as in [`load_balancing_loss`].
    """
    return _masked_mean(logits_TE.float().logsumexp(dim=-1, keepdim=True) ** 2, token_mask_T).squeeze()


def _masked_mean(values: Tensor, mask_T: Tensor | None) -> Tensor:
    if mask_T is None:
        return values.mean(dim=0)
    weight = mask_T.to(values.dtype).unsqueeze(-1)
    return (values * weight).sum(dim=0) / weight.sum().clamp(min=1.0)
