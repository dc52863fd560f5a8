"""Routing: hidden states -> the experts of each token, and their weights.

Shape letters: T tokens, K experts per token, E rows of the router (one per expert, unless there is a
`config.expert_map`), D model width.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import maybe_autocast

from .configuration_zcode_m3 import ZCodeM3Config
from .field_of_config import FieldOfConfig

try:
    from hf_moe_ted.kernels import fused_router
except ImportError:  # without Triton, which comes with PyTorch for GPUs, or remote code without the package
    fused_router = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Routing:
    """What the router decided for one batch of tokens.

    Attributes:
        expert_ids: int64[T, K], the experts that compute each token, in order of preference; `num_experts` in a slot
            that no expert computes, because the expert was full or the token is padding.
        weights: float32[T, K], the factor of each expert's output; 0 in such a slot.
        logits: float32[T, E], router logits, after noise.
        choices: int64[T, K], the rows of the router that were chosen; without `config.expert_map`, like `expert_ids`
            before anything was dropped.
        num_experts: number of experts of the layer.
        token_mask: bool[T] or `None`, False for padding.
    """

    expert_ids: Tensor
    weights: Tensor
    logits: Tensor
    choices: Tensor
    num_experts: int
    token_mask: Tensor | None = None

    def num_tokens_per_expert(self) -> Tensor:
        """int64[num_experts], tokens that each expert computes."""
        ids = self.expert_ids.flatten()
        # `bincount` would wait for the device and break compiled graphs
        return ids.new_zeros(self.num_experts + 1).scatter_add_(0, ids, torch.ones_like(ids))[: self.num_experts]

    def dropped_share(self) -> Tensor:
        """float32 scalar, the share of the chosen slots of real tokens that no expert computes."""
        dropped_TK = self.expert_ids == self.num_experts
        if self.token_mask is None:
            return dropped_TK.float().mean()
        mask_T1 = self.token_mask.unsqueeze(-1)
        return (dropped_TK & mask_T1).sum() / (mask_T1.sum() * dropped_TK.shape[-1]).clamp(min=1)


class ZCodeM3Router(nn.Module):
    """Linear top-k router with capacity, for the gates of DeepSpeed (`deepspeed/moe/sharded_moe.py`) and NLLB-MoE.

    Parameters: `weight` [E, d_model], and `bias` [E] if `config.router_bias`.

    With an `expert_map`, choices, probabilities and losses are those of rows. If several rows of a token lead to the
    same expert, the token goes there once per row, and the weights add up. The rows of an expert share its capacity.

    | gate | config |
    |---|---|
    | DeepSpeed, k = 1 | `token_drop_policy="random"` (RTS) or `"position"`, `router_noise_policy` |
    | DeepSpeed, k = 2 | `"position"`, `normalize_router_weights="after_dropping"`, `second_expert_policy="sampling"` |
    | DeepSpeed, k >= 3 | `"probability"`, `normalize_router_weights="after_dropping"` |
    | NLLB-MoE | k = 2, `"position"`, optionally `batch_prioritized_routing`, any `second_expert_policy` |
    """

    expert_of_row: Tensor | None

    top_k = FieldOfConfig("num_experts_per_tok")
    noise_policy = FieldOfConfig("router_noise_policy")
    jitter_noise = FieldOfConfig("router_jitter_noise")
    capacity_factor = FieldOfConfig()
    eval_capacity_factor = FieldOfConfig()
    min_capacity = FieldOfConfig()
    gating_dropout = FieldOfConfig()
    token_drop_policy = FieldOfConfig()
    batch_prioritized_routing = FieldOfConfig()
    second_expert_policy = FieldOfConfig()
    normalize_router_weights = FieldOfConfig()

    def __init__(self, config: ZCodeM3Config, num_experts: int, expert_map: Sequence[int] | None = None):
        super().__init__()
        self.config = config
        self.num_experts = num_experts
        self.expert_map = None if expert_map is None else tuple(expert_map)
        num_rows = num_experts if expert_map is None else len(expert_map)
        self.weight = nn.Parameter(torch.empty(num_rows, config.d_model))
        self.bias = nn.Parameter(torch.empty(num_rows)) if config.router_bias else None
        # int64[E], the expert of each row; `num_experts` for a row that is never chosen
        expert_of_row = None if expert_map is None else torch.tensor(self.expert_map)
        self.register_buffer("expert_of_row", expert_of_row, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        # no checkpoint holds the map: `to_empty` would leave it undefined
        if self.expert_of_row is not None and self.expert_of_row.is_meta and not self.weight.is_meta:
            self.expert_of_row = torch.tensor(self.expert_map)  # after `load_state_dict(assign=True)`
        super()._apply(fn, recurse)
        if self.expert_of_row is not None and not self.expert_of_row.is_meta:
            self.expert_of_row = torch.tensor(self.expert_map, device=self.expert_of_row.device)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which logits are computed."""
        return getattr(torch, self.config.router_dtype)

    def forward(self, hidden_states_TD: Tensor, token_mask_T: Tensor | None = None) -> tuple[Tensor, Routing]:
        """Route a batch of tokens.

        Args:
            hidden_states_TD: float[T, D].
            token_mask_T: bool[T], *optional*, False for tokens that go to no expert.

        Returns:
            The logits float32[T, E], which come first so that `output_router_logits` finds them, and the [`Routing`].
        """
        if self.expert_of_row is not None and self.expert_of_row.is_meta and not hidden_states_TD.is_meta:
            # after `load_state_dict(assign=True)`
            self.expert_of_row = torch.tensor(self.expert_map, device=hidden_states_TD.device)
        logits_TE, probs_TK, choices_TK = self._choose(hidden_states_TD)
        expert_ids_TK = choices_TK if self.expert_of_row is None else self.expert_of_row[choices_TK]
        weights_TK = _normalize(probs_TK) if self.normalize_router_weights == "before_dropping" else probs_TK

        used_TK = self._used(probs_TK, token_mask_T)
        kept_TK = self._within_capacity(expert_ids_TK, choices_TK, probs_TK, used_TK)
        if kept_TK is not None:
            expert_ids_TK = expert_ids_TK.masked_fill(~kept_TK, self.num_experts)
            weights_TK = weights_TK * kept_TK
        if self.normalize_router_weights == "after_dropping":
            weights_TK = _normalize(weights_TK)
        return logits_TE, Routing(expert_ids_TK, weights_TK, logits_TE, choices_TK, self.num_experts, token_mask_T)

    def max_tokens_per_expert(self, num_tokens: int) -> int | None:
        """Most slots of `num_tokens` tokens that an expert computes, padding included; `None` without a capacity."""
        capacity_factor = self.capacity_factor if self.training else self.eval_capacity_factor
        if capacity_factor is None:
            return None
        capacity = expert_capacity(num_tokens, self.num_experts, capacity_factor * self.top_k, self.min_capacity)
        return min(int(capacity), num_tokens * self.top_k)

    def _choose(self, hidden_states_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits float32[T, E], the chosen rows' probabilities float32[T, K], and the chosen rows int64[T, K].

        On GPUs plain top-k is one kernel; its noise differs from what the operations below would draw.
        """
        if fused_router is not None and fused_router.can_fuse_router(self, hidden_states_TD):
            jitter_noise = self.jitter_noise if self._has_jitter else 0.0
            return fused_router.fused_route(hidden_states_TD, self.weight, self.bias, self.top_k, jitter_noise)
        logits_TE = self._logits(hidden_states_TD)
        probs_TE = logits_TE.softmax(dim=-1)
        if self.expert_of_row is None:
            choices_TK = self._choices(logits_TE, probs_TE)
        else:
            is_never_chosen_E = self.expert_of_row == self.num_experts
            choices_TK = self._choices(
                logits_TE.masked_fill(is_never_chosen_E, -torch.inf), probs_TE.masked_fill(is_never_chosen_E, -1.0)
            )
        return logits_TE, probs_TE.gather(1, choices_TK), choices_TK

    @property
    def _has_jitter(self) -> bool:
        return self.training and self.noise_policy == "jitter"

    def _logits(self, hidden_states_TD: Tensor) -> Tensor:
        """float32[T, E], computed in `router_dtype` even under autocast, because rounding would change the experts."""
        inputs_TD = hidden_states_TD.to(self.dtype)
        if self._has_jitter:
            noise = torch.empty_like(inputs_TD).uniform_(1.0 - self.jitter_noise, 1.0 + self.jitter_noise)
            inputs_TD = inputs_TD * noise
        bias = None if self.bias is None else self.bias.to(self.dtype)
        with maybe_autocast(device_type=hidden_states_TD.device.type, enabled=False):
            return nn.functional.linear(inputs_TD, self.weight.to(self.dtype), bias).float()

    def _choices(self, logits_TE: Tensor, probs_TE: Tensor) -> Tensor:
        """int64[T, K], the rows that each token chooses, in order of preference.

        Noise changes the choice, never the weight, which is the router's probability. RSample (DeepSpeed) samples the
        one expert in training. Sampling of the second expert (GShard, DeepSpeed, NLLB-MoE) is on in evaluation, too, as
        in those implementations.
        """
        if self.noise_policy == "rsample" and self.training:
            return (logits_TE + _gumbel_like(logits_TE)).argmax(dim=-1, keepdim=True)
        if self.second_expert_policy == "sampling":
            first_T1 = probs_TE.argmax(dim=-1, keepdim=True)
            noisy_TE = (logits_TE + _gumbel_like(logits_TE)).scatter(1, first_T1, -torch.inf)
            return torch.cat([first_T1, noisy_TE.argmax(dim=-1, keepdim=True)], dim=-1)
        return probs_TE.topk(self.top_k, dim=-1).indices

    def _used(self, probs_TK: Tensor, token_mask_T: Tensor | None) -> Tensor | None:
        """bool[T, K], False for slots that go to no expert, whatever its capacity; `None` if all slots are used.

        These are padding, second choices that are left out at random, and sometimes all slots, with gating dropout.
        """
        used = [] if token_mask_T is None else [token_mask_T.unsqueeze(-1).expand_as(probs_TK)]
        if self.second_expert_policy == "random":
            # GShard, section 2.2: dispatch to the second expert with probability proportional to its weight
            second_T = 2 * probs_TK[:, 1] > torch.rand_like(probs_TK[:, 1])
            used.append(torch.stack([torch.ones_like(second_T), second_T], dim=-1))
        if self.training and self.gating_dropout > 0:
            # one draw per batch on the device, which waits for nothing and is equal in a tensor-parallel group
            used.append((torch.rand((), device=probs_TK.device) >= self.gating_dropout).expand_as(probs_TK))
        return functools.reduce(torch.logical_and, used) if used else None

    def _within_capacity(
        self, expert_ids_TK: Tensor, choices_TK: Tensor, probs_TK: Tensor, used_TK: Tensor | None
    ) -> Tensor | None:
        """bool[T, K], True for used slots that are computed; `None` if all slots are."""
        capacity_factor = self.capacity_factor if self.training else self.eval_capacity_factor
        if capacity_factor is None:
            return used_TK

        num_tokens = choices_TK.shape[0]
        slots_TK = expert_ids_TK if used_TK is None else expert_ids_TK.masked_fill(~used_TK, self.num_experts)
        num_routed = num_tokens if used_TK is None else used_TK[:, 0].sum()
        capacity = expert_capacity(num_routed, self.num_experts, capacity_factor * self.top_k, self.min_capacity)
        rank_TK = rank_in_expert(
            slots_TK,
            self.num_experts,
            self._priority(choices_TK, probs_TK),
            by_choice=self.token_drop_policy != "probability",
        )
        kept_TK = rank_TK < capacity
        return kept_TK if used_TK is None else kept_TK & used_TK

    def _priority(self, choices_TK: Tensor, probs_TK: Tensor) -> Tensor | None:
        """float[T, K], priority in an expert's queue; `None` for the order in the batch."""
        if self.token_drop_policy == "random":
            # one number per token and expert, as DeepSpeed draws them: equal seeds keep equal tokens
            random_TE = torch.rand(choices_TK.shape[0], self.weight.shape[0], device=choices_TK.device)
            return random_TE.gather(1, choices_TK)
        if self.token_drop_policy == "probability":
            return probs_TK
        if self.batch_prioritized_routing:
            return probs_TK.amax(dim=-1, keepdim=True).expand_as(probs_TK)
        return None


def modules_in_use(module: Any, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Like `named_modules`, but if PEFT trains a copy of a module (`modules_to_save`), it gives the one that runs."""
    copies = getattr(module, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict) and hasattr(module, "original_module"):
        active = [] if module.disable_adapters else [copies[adapter] for adapter in module.active_adapters]
        yield from modules_in_use(active[0] if active else module.original_module, name)
        return
    yield name, module
    for child_name, child in module.named_children():
        yield from modules_in_use(child, f"{name}.{child_name}" if name else child_name)


def require_finite_routers(model: nn.Module) -> None:
    """Check the weights of all routers; it waits for their device once.

    With NaN or infinity in a router's weights, tokens go to arbitrary experts, and every text is garbage.

    Raises:
        ValueError: weights of a router are not finite; the message names the router.
    """
    names, flags = [], []
    for name, router in model.named_modules():
        for kind, tensor in router.named_parameters(recurse=False) if isinstance(router, ZCodeM3Router) else ():
            if tensor.device.type != "meta":  # else the weights are offloaded
                whole: Any = tensor.detach()
                whole = whole.full_tensor() if hasattr(whole, "full_tensor") else whole  # sharded
                names.append(f"{name}.{kind}")
                flags.append(whole.isfinite().all())
    is_finite = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist() if flags else []
    wrong = [name for name, finite in zip(names, is_finite, strict=True) if not finite]
    if wrong:
        raise ValueError(f"NaN or infinity in {', '.join(wrong)}: the router is damaged; load an undamaged checkpoint")


@contextlib.contextmanager
def refused_if_not_finite(model: nn.Module) -> Iterator[None]:
    """Check the logits of each router in each call; it waits for their device each time.

    Raises:
        ValueError: logits of a router are not finite; the message names the router.
    """

    def look(name: str, output: tuple[Tensor, Routing]) -> None:
        if not output[0].isfinite().all():
            raise ValueError(
                f"NaN or infinity in the logits of {name}: weights before it are damaged, or numbers are too large "
                "for the dtype of the model; load an undamaged checkpoint, or use bfloat16 or float32"
            )

    routers = [(name, module) for name, module in model.named_modules() if isinstance(module, ZCodeM3Router)]
    hooks = [
        router.register_forward_hook(lambda _module, _args, output, name=name: look(name, output))
        for name, router in routers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def expert_capacity(num_tokens: int | Tensor, num_experts: int, factor: float, min_capacity: int) -> Tensor:
    """Most tokens of an expert, `max(ceil(num_tokens / num_experts * factor), min_capacity)`, as a float32 scalar.

    It is on the device of `num_tokens`, or on the CPU for an int, so nothing waits for a GPU. The product is computed
    in float32 as in DeepSpeed.
    """
    tokens = torch.as_tensor(num_tokens, dtype=torch.float64)
    return torch.ceil((tokens / num_experts).float() * factor).clamp(min=min_capacity)


def rank_in_expert(
    expert_ids_TK: Tensor, num_experts: int, priority_TK: Tensor | None = None, by_choice: bool = True
) -> Tensor:
    """Place of each slot in the queue of its expert.

    Args:
        expert_ids_TK: int64[T, K]; `num_experts` for slots in no queue.
        priority_TK: float[T, K], *optional*: higher goes first; by default lower token indices go first.
        by_choice: whether all first choices come before second choices, whatever their priority.

    Returns:
        int64[T, K], 0 for the first in the queue.
    """
    num_tokens, top_k = expert_ids_TK.shape
    slots_TK = torch.arange(num_tokens * top_k, device=expert_ids_TK.device).view(num_tokens, top_k)
    if not by_choice and priority_TK is not None:
        in_order = priority_TK.flatten().argsort(descending=True, stable=True)
    else:
        if priority_TK is not None:
            slots_TK = slots_TK.gather(0, priority_TK.argsort(dim=0, descending=True, stable=True))
        in_order = slots_TK.t().flatten()  # all first choices, then all second choices
    queue, by_expert = expert_ids_TK.flatten()[in_order].sort(stable=True)
    start_of_expert = torch.searchsorted(queue, torch.arange(num_experts + 1, device=queue.device))
    rank = torch.arange(queue.numel(), device=queue.device) - start_of_expert[queue]
    return torch.empty_like(queue).scatter_(0, in_order[by_expert], rank).view(num_tokens, top_k)


def _normalize(weights_TK: Tensor) -> Tensor:
    return weights_TK / weights_TK.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(weights_TK.dtype).eps)


def _gumbel_like(logits: Tensor) -> Tensor:
    """Gumbel(0, 1) noise, bit for bit that of `torch.distributions.Gumbel`, which DeepSpeed and NLLB-MoE use."""
    info = torch.finfo(logits.dtype)
    uniform = torch.rand_like(logits) * ((1 - info.eps) - info.tiny) + info.tiny
    return -torch.log(-torch.log(uniform))
