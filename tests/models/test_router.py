"""The router by hand and against DeepSpeed's gates: choices, capacity, who is dropped, weights, noise, precision."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_moe_ted.models.losses import load_balancing_loss
from hf_moe_ted.models.router import Routing, ZCodeM3Router, expert_capacity, rank_in_expert
from hf_moe_ted.testing import tiny_config

CPU = torch.device("cpu")


def _router(num_experts: int, d_model: int, **overrides: Any) -> ZCodeM3Router:
    """A router whose logits are exactly the first `num_experts` numbers of each hidden state."""
    config = tiny_config(
        d_model=d_model, encoder_attention_heads=1, decoder_attention_heads=1, num_experts=num_experts, **overrides
    )
    router = ZCodeM3Router(config, num_experts)
    torch.nn.init.eye_(router.weight)
    if router.bias is not None:
        torch.nn.init.zeros_(router.bias)
    return router.train()


def _route(logits_TE: Tensor, mask_T: Tensor | None = None, train: bool = True, **overrides: Any) -> Routing:
    num_tokens, num_experts = logits_TE.shape
    d_model = max(4, num_experts)
    router = _router(num_experts, d_model, **overrides).train(train)
    hidden_TD = torch.zeros(num_tokens, d_model)
    hidden_TD[:, :num_experts] = logits_TE
    returned_logits, routing = router(hidden_TD, mask_T)
    assert returned_logits is routing.logits
    torch.testing.assert_close(routing.logits, logits_TE, atol=0.0, rtol=0.0)
    return routing


# --- ranks and capacity, by hand


def test_rank_in_expert_is_the_order_in_the_batch() -> None:
    expert_ids = torch.tensor([[1], [0], [1], [1], [2], [0]])
    assert rank_in_expert(expert_ids, num_experts=3).tolist() == [[0], [0], [1], [2], [0], [1]]


def test_rank_in_expert_first_choices_stand_before_second_choices() -> None:
    expert_ids = torch.tensor([[0, 1], [1, 0], [0, 1], [2, 0]])
    # expert 0: first choices of tokens 0 and 2, then second choices of tokens 1 and 3; expert 1: token 1, then 0 and 2
    assert rank_in_expert(expert_ids, num_experts=3).tolist() == [[0, 1], [0, 2], [1, 2], [0, 3]]


def test_rank_in_expert_by_priority_within_a_choice() -> None:
    expert_ids = torch.tensor([[0, 1], [0, 1], [0, 1], [1, 0]])
    priority = torch.tensor([[0.1, 0.9], [0.7, 0.2], [0.4, 0.3], [0.5, 0.99]])
    # expert 0: tokens 1, 2, 0 and then the second choice of 3; expert 1: token 3, then second choices of 0, 2, 1
    assert rank_in_expert(expert_ids, num_experts=2, priority_TK=priority).tolist() == [[2, 1], [0, 3], [1, 2], [0, 3]]


def test_rank_in_expert_equal_priority_falls_back_to_the_order_in_the_batch() -> None:
    expert_ids = torch.tensor([[0], [0], [0], [0]])
    priority = torch.tensor([[0.5], [0.9], [0.5], [0.5]])
    assert rank_in_expert(expert_ids, num_experts=1, priority_TK=priority).tolist() == [[1], [0], [2], [3]]


def test_rank_in_expert_slots_in_no_queue_take_no_place() -> None:
    expert_ids = torch.tensor([[2, 2], [0, 1], [2, 2], [0, 1]])
    ranks = rank_in_expert(expert_ids, num_experts=2)
    assert ranks[[1, 3]].tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "factor", "min_capacity", "expected"),
    [
        (6, 3, 1.0, 0, 2),
        (7, 3, 1.0, 0, 3),  # ceil(7 / 3)
        (6, 3, 1.25, 0, 3),  # ceil(2.5)
        (6, 3, 0.5, 0, 1),
        (6, 3, 0.5, 4, 4),  # the minimum
        (50, 4, 1.2, 0, 16),  # 12.5 * 1.2 is 15 in float64, and a little more in float32, where DeepSpeed computes
        (128, 64, 2 * 1.0, 0, 4),
        (0, 4, 1.0, 4, 4),
        (0, 4, 1.0, 0, 0),
    ],
)
def test_expert_capacity(num_tokens: int, num_experts: int, factor: float, min_capacity: int, expected: int) -> None:
    assert expert_capacity(num_tokens, num_experts, factor, min_capacity).item() == expected
    assert expert_capacity(torch.tensor(num_tokens), num_experts, factor, min_capacity).item() == expected


# --- routing of a few tokens, by hand

# probabilities, in eighths: [4 2 1 1], [4 1 2 1], [1 1 4 2], [4 1 1 2], [2 4 1 1]
LOGITS = math.log(2.0) * torch.tensor(
    [[2.0, 1.0, 0.0, 0.0], [2.0, 0.0, 1.0, 0.0], [0.0, 0.0, 2.0, 1.0], [2.0, 0.0, 0.0, 1.0], [1.0, 2.0, 0.0, 0.0]]
)


def test_top_1_without_capacity() -> None:
    routing = _route(LOGITS, capacity_factor=None)
    assert routing.expert_ids.tolist() == [[0], [0], [2], [0], [1]]
    torch.testing.assert_close(routing.weights, torch.full((5, 1), 0.5))
    assert routing.choices.tolist() == routing.expert_ids.tolist()
    assert routing.num_experts == 4
    assert routing.num_tokens_per_expert().tolist() == [3, 1, 1, 0]
    assert routing.dropped_share().item() == 0.0
    assert (routing.weights.dtype, routing.expert_ids.dtype) == (torch.float32, torch.int64)


def test_top_2_position_order_drops_late_first_choices_and_then_second_choices() -> None:
    # capacity max(ceil(5 * 2 / 4 * 0.8), 0) = 2
    routing = _route(LOGITS, capacity_factor=0.8, min_capacity=0, num_experts_per_tok=2, token_drop_policy="position")
    assert routing.choices.tolist() == [[0, 1], [0, 2], [2, 3], [0, 3], [1, 0]]
    assert routing.expert_ids.tolist() == [[0, 1], [0, 2], [2, 3], [4, 3], [1, 4]]
    expected = torch.tensor([[4.0, 2.0], [4.0, 2.0], [4.0, 2.0], [0.0, 2.0], [4.0, 0.0]]) / 8
    torch.testing.assert_close(routing.weights, expected)
    assert routing.num_tokens_per_expert().tolist() == [2, 2, 2, 2]
    torch.testing.assert_close(routing.dropped_share(), torch.tensor(0.2))


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (None, [[4 / 8, 2 / 8], [4 / 8, 2 / 8], [4 / 8, 2 / 8], [0.0, 2 / 8], [4 / 8, 0.0]]),
        ("before_dropping", [[2 / 3, 1 / 3], [2 / 3, 1 / 3], [2 / 3, 1 / 3], [0.0, 1 / 3], [2 / 3, 0.0]]),
        ("after_dropping", [[2 / 3, 1 / 3], [2 / 3, 1 / 3], [2 / 3, 1 / 3], [0.0, 1.0], [1.0, 0.0]]),
    ],
)
def test_normalize_router_weights(mode: str | None, expected: list[list[float]]) -> None:
    routing = _route(
        LOGITS,
        capacity_factor=0.8,
        min_capacity=0,
        num_experts_per_tok=2,
        token_drop_policy="position",
        normalize_router_weights=mode,
    )
    torch.testing.assert_close(routing.weights, torch.tensor(expected))


def test_token_without_any_expert_weighs_zero_and_not_nan() -> None:
    routing = _route(
        LOGITS,
        capacity_factor=0.1,
        min_capacity=1,
        token_drop_policy="position",
        normalize_router_weights="after_dropping",
    )
    assert routing.expert_ids.tolist() == [[0], [4], [2], [4], [1]]
    assert routing.weights.tolist() == [[1.0], [0.0], [1.0], [0.0], [1.0]]


@pytest.mark.parametrize("capacity_factor", [None, 0.5])
def test_padding_goes_to_no_expert_and_takes_no_capacity(capacity_factor: float | None) -> None:
    mask = torch.tensor([False, True, True, True, True])
    routing = _route(LOGITS, mask, capacity_factor=capacity_factor, min_capacity=0, token_drop_policy="position")
    # capacity ceil(4 / 4 * 0.5) = 1 from four tokens: token 1 has expert 0, as token 0 takes no place, and 3 is dropped
    dropped = 0 if capacity_factor is None else 4
    assert routing.choices.tolist() == [[0], [0], [2], [0], [1]]
    assert routing.expert_ids.tolist() == [[4], [0], [2], [dropped], [1]]
    assert routing.weights[0].item() == 0.0
    assert routing.num_tokens_per_expert().sum().item() == (4 if capacity_factor is None else 3)
    assert routing.dropped_share().item() == (0.0 if capacity_factor is None else 0.25)
    assert routing.token_mask is mask


def test_capacity_counts_real_tokens_only() -> None:
    logits = torch.zeros(8, 4)
    logits[:, 0] = 1.0
    mask = torch.tensor([True] * 4 + [False] * 4)
    routing = _route(logits, mask, capacity_factor=2.0, min_capacity=0, token_drop_policy="position")
    assert routing.num_tokens_per_expert().tolist() == [2, 0, 0, 0]  # ceil(4 / 4 * 2), and not ceil(8 / 4 * 2)


def test_batch_of_padding_only() -> None:
    for capacity_factor in (None, 1.0):
        routing = _route(LOGITS, torch.zeros(5, dtype=torch.bool), capacity_factor=capacity_factor)
        assert routing.expert_ids.tolist() == [[4]] * 5
        assert routing.weights.count_nonzero() == 0
        assert routing.dropped_share().item() == 0.0
        assert routing.num_tokens_per_expert().tolist() == [0, 0, 0, 0]


def test_capacity_of_training_and_of_evaluation() -> None:
    logits = torch.zeros(16, 4)
    logits[:, 1] = 1.0
    kwargs: dict[str, Any] = {"capacity_factor": 1.0, "min_capacity": 0}

    def num_kept(train: bool, **overrides: Any) -> int:
        return int(_route(logits, train=train, **{**kwargs, **overrides}).num_tokens_per_expert().sum())

    assert num_kept(train=True) == 4
    assert num_kept(train=False) == 16, "evaluation drops nothing by default"
    assert num_kept(train=False, eval_capacity_factor=2.0) == 8
    assert num_kept(train=True, eval_capacity_factor=2.0) == 4
    assert num_kept(train=True, capacity_factor=None, eval_capacity_factor=2.0) == 16
    assert num_kept(train=True, min_capacity=6) == 6


def test_max_tokens_per_expert() -> None:
    router = _router(4, 8, num_experts_per_tok=2, capacity_factor=1.5, eval_capacity_factor=1.0, min_capacity=3)
    assert router.max_tokens_per_expert(8) == 6  # ceil(8 * 2 / 4 * 1.5)
    assert router.max_tokens_per_expert(3) == 3  # the minimum
    assert router.max_tokens_per_expert(1) == 2  # there are no more slots
    assert router.eval().max_tokens_per_expert(8) == 4
    assert _router(4, 8, capacity_factor=None).max_tokens_per_expert(8) is None


def test_forward_leaves_no_trace() -> None:
    router = _router(4, 8, capacity_factor=1.0, min_capacity=0, eval_capacity_factor=0.5)
    hidden = torch.randn(16, 8)
    before = dict(vars(router))
    router.eval()(hidden)
    router.train()(hidden)
    assert dict(vars(router)) == before


# --- DeepSpeed's gates


def _one_hot(index_T: Tensor, num_experts: int) -> Tensor:
    return torch.nn.functional.one_hot(index_T, num_experts)


def _deepspeed_capacity(num_tokens: int, num_experts: int, capacity_factor: float, min_capacity: int) -> int:
    return max(int(torch.ceil((num_tokens / num_experts) * torch.tensor(capacity_factor))), min_capacity)


def _deepspeed_top1(logits: Tensor, capacity_factor: float, min_capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Auxiliary loss, expert of each token, whether it is kept, and its weight, with Random Token Selection.

    Restates `top1gating` of deepspeed/moe/sharded_moe.py (Apache-2.0).
    """
    num_tokens, num_experts = logits.shape
    gates = logits.softmax(dim=1)
    expert = gates.argmax(dim=1)
    mask = _one_hot(expert, num_experts)
    aux_loss = (gates.mean(dim=0) * mask.float().mean(dim=0)).sum() * num_experts

    capacity = _deepspeed_capacity(num_tokens, num_experts, capacity_factor, min_capacity)
    random_mask = mask * torch.rand(num_tokens, num_experts)
    selected = torch.topk(random_mask, min(capacity, num_tokens), dim=0)[1]
    mask = mask * torch.zeros_like(mask).scatter_(0, selected, 1)
    return aux_loss, expert, mask.sum(dim=1) > 0, (gates * mask).sum(dim=1)


def _deepspeed_top2(logits: Tensor, capacity_factor: float, min_capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Auxiliary loss, and [T, 2] experts, whether they are kept, and their weights, normalised after dropping.

    Restates `top2gating` of deepspeed/moe/sharded_moe.py (Apache-2.0) without second expert sampling.
    """
    num_tokens, num_experts = logits.shape
    gates = logits.softmax(dim=1)
    first = gates.argmax(dim=1)
    mask_1 = _one_hot(first, num_experts)
    second = logits.masked_fill(mask_1.bool(), float("-inf")).argmax(dim=1)
    mask_2 = _one_hot(second, num_experts)
    location_1 = mask_1.cumsum(dim=0) - 1
    location_2 = mask_2.cumsum(dim=0) - 1 + mask_1.sum(dim=0, keepdim=True)
    aux_loss = (gates.mean(dim=0) * mask_1.float().mean(dim=0)).mean() * num_experts * num_experts

    capacity = _deepspeed_capacity(num_tokens, num_experts, capacity_factor * 2, min_capacity)
    mask_1, mask_2 = mask_1 * (location_1 < capacity), mask_2 * (location_2 < capacity)
    gate_1, gate_2 = (gates * mask_1).sum(dim=1), (gates * mask_2).sum(dim=1)
    weights = torch.stack([gate_1, gate_2], dim=1)
    weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).eps)
    kept = torch.stack([mask_1.any(dim=1), mask_2.any(dim=1)], dim=1)
    return aux_loss, torch.stack([first, second], dim=1), kept, weights


def _random_case(seed: int) -> tuple[Tensor, float]:
    generator = torch.Generator().manual_seed(seed)
    num_tokens = int(torch.randint(8, 200, (1,), generator=generator))
    num_experts = [2, 4, 8, 16][seed % 4]
    return torch.randn(num_tokens, num_experts, generator=generator) * 2, [0.5, 1.0, 1.2, 2.0][seed // 4 % 4]


@pytest.mark.parametrize("seed", range(32))
def test_top_1_with_random_token_selection_equals_deepspeed(seed: int) -> None:
    logits, capacity_factor = _random_case(seed)
    torch.manual_seed(seed)
    aux_loss, expert, kept, weights = _deepspeed_top1(logits, capacity_factor, min_capacity=4)
    torch.manual_seed(seed)
    routing = _route(logits, capacity_factor=capacity_factor, min_capacity=4, token_drop_policy="random")

    assert torch.equal(routing.choices[:, 0], expert)
    assert torch.equal(routing.expert_ids[:, 0], torch.where(kept, expert, logits.shape[1]))
    assert torch.equal(routing.weights[:, 0], weights)
    assert torch.equal(load_balancing_loss(routing.logits, routing.choices), aux_loss)


@pytest.mark.parametrize("seed", range(32))
def test_top_2_in_position_order_equals_deepspeed(seed: int) -> None:
    logits, capacity_factor = _random_case(seed)
    aux_loss, experts, kept, weights = _deepspeed_top2(logits, capacity_factor, min_capacity=4)
    routing = _route(
        logits,
        num_experts_per_tok=2,
        capacity_factor=capacity_factor,
        min_capacity=4,
        token_drop_policy="position",
        normalize_router_weights="after_dropping",
    )
    assert torch.equal(routing.choices, experts)
    assert torch.equal(routing.expert_ids, torch.where(kept, experts, logits.shape[1]))
    assert torch.equal(routing.weights, weights)
    torch.testing.assert_close(load_balancing_loss(routing.logits, routing.choices), aux_loss, rtol=1e-6, atol=0.0)


def _gumbel(shape: torch.Size) -> Tensor:
    return torch.distributions.Gumbel(torch.tensor(0.0), torch.tensor(1.0)).rsample(shape)


@pytest.mark.parametrize("seed", range(8))
def test_top_1_with_rsample_equals_deepspeed(seed: int) -> None:
    """`top1gating` with `noisy_gate_policy="RSample"`: noise chooses, the weight is the probability without noise."""
    logits, capacity_factor = _random_case(seed)
    torch.manual_seed(seed)
    expert = (logits + _gumbel(logits.shape)).argmax(dim=1)
    torch.manual_seed(seed)
    options = {"router_noise_policy": "rsample", "capacity_factor": capacity_factor, "token_drop_policy": "random"}
    routing = _route(logits, **options)
    assert torch.equal(routing.choices[:, 0], expert)
    assert (expert != logits.argmax(dim=1)).any()
    kept = routing.expert_ids[:, 0] < logits.shape[1]
    assert kept.any()
    assert torch.equal(routing.weights[:, 0], logits.softmax(dim=1).gather(1, expert[:, None])[:, 0] * kept)
    assert torch.equal(_route(logits, train=False, **options).choices[:, 0], logits.argmax(dim=1))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_top_2_with_second_expert_sampling_equals_deepspeed(seed: int, train: bool) -> None:
    """`top2gating` with `top2_2nd_expert_sampling=True`, its default, which samples in evaluation, too."""
    logits, capacity_factor = _random_case(seed)
    torch.manual_seed(seed)
    first = logits.argmax(dim=1)
    noisy = (logits + _gumbel(logits.shape)).masked_fill(_one_hot(first, logits.shape[1]).bool(), float("-inf"))
    torch.manual_seed(seed)
    options = {"num_experts_per_tok": 2, "second_expert_policy": "sampling", "token_drop_policy": "position"}
    routing = _route(
        logits, train=train, capacity_factor=capacity_factor, eval_capacity_factor=capacity_factor, **options
    )
    assert torch.equal(routing.choices, torch.stack([first, noisy.argmax(dim=1)], dim=1))


def _deepspeed_topk(
    logits: Tensor, k: int, capacity_factor: float, min_capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Auxiliary loss, and [T, k] experts, whether they are kept, and their weights, normalised after dropping.

    Restates `topkgating` of deepspeed/moe/sharded_moe.py (Apache-2.0), whose drop policy is "probs".
    """
    num_tokens, num_experts = logits.shape
    gates = logits.softmax(dim=1)
    top_gates, experts = torch.topk(gates, k, dim=1)
    mask = torch.zeros_like(gates, dtype=torch.bool).scatter_(1, experts, True)
    aux_loss = (gates.mean(dim=0) * mask.float().mean(dim=0)).mean() * num_experts * num_experts / k

    capacity = _deepspeed_capacity(num_tokens, num_experts, capacity_factor * k, min_capacity)
    chosen_gates = torch.zeros_like(gates).scatter(1, experts, top_gates)
    selected = torch.topk(chosen_gates, min(capacity, num_tokens), dim=0)[1]
    mask &= torch.zeros_like(mask).scatter_(0, selected, True)
    weights = gates * mask
    weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).eps)
    return aux_loss, experts, mask.gather(1, experts), weights.gather(1, experts)


@pytest.mark.parametrize("k", [3, 4])
@pytest.mark.parametrize("seed", [seed for seed in range(32) if seed % 4])
def test_top_k_by_probability_equals_deepspeed(seed: int, k: int) -> None:
    logits, capacity_factor = _random_case(seed)
    aux_loss, experts, kept, weights = _deepspeed_topk(logits, k, capacity_factor, min_capacity=4)
    routing = _route(
        logits,
        num_experts_per_tok=k,
        capacity_factor=capacity_factor,
        min_capacity=4,
        token_drop_policy="probability",
        normalize_router_weights="after_dropping",
    )
    assert torch.equal(routing.choices, experts)
    assert torch.equal(routing.expert_ids, torch.where(kept, experts, logits.shape[1]))
    # DeepSpeed adds up the weights of all experts, zeros among them, which rounds differently
    torch.testing.assert_close(routing.weights, weights, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(load_balancing_loss(routing.logits, routing.choices), aux_loss, rtol=1e-6, atol=0.0)


# --- NLLB-MoE's gate


def _nllb_top2(
    logits: Tensor, capacity: int, *, policy: str, batch_prioritized: bool, normalize_before: bool
) -> tuple[Tensor, Tensor]:
    """Masks bool[2, T, E] and weights float[2, T] of first and second experts.

    Restates `NllbMoeTop2Router.route_tokens` of transformers 4.57.6 (Apache-2.0).
    """
    probs = logits.softmax(dim=-1)
    first = _one_hot(probs.argmax(dim=-1), logits.shape[1])
    noisy = logits + _gumbel(logits.shape) if policy == "sampling" else logits
    second = _one_hot(noisy.masked_fill(first.bool(), float("-inf")).argmax(dim=-1), logits.shape[1])
    gate_1, gate_2 = (probs * first).sum(dim=1), (probs * second).sum(dim=1)
    before = torch.stack([gate_1, gate_2]) / (gate_1 + gate_2).clamp(min=torch.finfo(torch.float32).eps)
    if policy == "random":
        second = second * (2 * gate_2 > torch.rand_like(gate_2)).unsqueeze(1)

    order = (-probs.amax(dim=1)).argsort(stable=True) if batch_prioritized else torch.arange(len(logits))
    back = order.argsort()
    location_1 = (first[order].cumsum(dim=0) - 1)[back]
    location_2 = (second[order].cumsum(dim=0) - 1)[back] + first.sum(dim=0, keepdim=True)
    first, second = first * (location_1 < capacity), second * (location_2 < capacity)
    gate_1, gate_2 = (probs * first).sum(dim=1), (probs * second).sum(dim=1)
    after = torch.stack([gate_1, gate_2]) / (gate_1 + gate_2).clamp(min=torch.finfo(torch.float32).eps)
    masks = torch.stack([first, second]).bool()
    return masks, (before if normalize_before else after) * masks.any(dim=-1)


@pytest.mark.parametrize("normalize_before", [True, False])
@pytest.mark.parametrize("batch_prioritized", [True, False])
@pytest.mark.parametrize("policy", ["all", "sampling", "random"])
@pytest.mark.parametrize("seed", range(4, 12))
def test_top_2_equals_nllb_moe(seed: int, policy: str, batch_prioritized: bool, normalize_before: bool) -> None:
    logits, capacity_factor = _random_case(seed)
    capacity = _deepspeed_capacity(*logits.shape, capacity_factor * 2, 4)
    torch.manual_seed(seed)
    masks, weights = _nllb_top2(
        logits, capacity, policy=policy, batch_prioritized=batch_prioritized, normalize_before=normalize_before
    )
    torch.manual_seed(seed)
    routing = _route(
        logits,
        num_experts_per_tok=2,
        capacity_factor=capacity_factor,
        min_capacity=4,
        token_drop_policy="position",
        second_expert_policy=policy,
        batch_prioritized_routing=batch_prioritized,
        normalize_router_weights="before_dropping" if normalize_before else "after_dropping",
    )
    kept = masks.any(dim=-1).T
    assert torch.equal(routing.expert_ids < logits.shape[1], kept)
    assert torch.equal(routing.expert_ids[kept], masks.int().argmax(dim=-1).T[kept])
    torch.testing.assert_close(routing.weights, weights.T, rtol=1e-6, atol=0.0)


def test_second_choice_left_out_at_random_takes_no_capacity() -> None:
    """Its place in the queue goes to the next token: without that, fewer tokens than the capacity would be computed."""
    torch.manual_seed(0)
    logits = torch.tensor([[1.0, 0.9, -9.0]]).repeat(400, 1)
    routing = _route(
        logits,
        num_experts_per_tok=2,
        second_expert_policy="random",
        token_drop_policy="position",
        capacity_factor=0.3,
        min_capacity=0,
    )
    # 2 * p2 is 0.95: about 20 of 400 second choices are left out, and the queue of expert 1 is full all the same
    assert routing.num_tokens_per_expert().tolist() == [80, 80, 0]
    assert 0 < (routing.expert_ids[:80, 1] == 3).sum() < 15


def test_deepspeed_cases_drop_tokens() -> None:
    """The two tests above compare nothing about dropping unless tokens are dropped."""
    shares = []
    for seed in range(32):
        logits, capacity_factor = _random_case(seed)
        shares.append(_route(logits, capacity_factor=capacity_factor).dropped_share().item())
    assert sum(share > 0.1 for share in shares) >= 10


def test_random_token_selection_is_fair_and_depends_on_the_seed() -> None:
    logits = torch.zeros(16, 4)
    logits[:, 2] = 1.0
    num_kept = torch.zeros(16)
    for seed in range(200):
        torch.manual_seed(seed)
        routing = _route(logits, capacity_factor=1.0, min_capacity=0, token_drop_policy="random")
        assert routing.num_tokens_per_expert().tolist() == [0, 0, 4, 0]
        num_kept += (routing.expert_ids[:, 0] == 2).float()
    # binomial(200, 1/4): mean 50, standard deviation 6.1
    assert num_kept.min() > 25
    assert num_kept.max() < 75


# --- noise and precision


def test_jitter_multiplies_the_input_in_training_only_and_within_its_bounds() -> None:
    router = _router(32, 32, router_noise_policy="jitter", router_jitter_noise=0.25, capacity_factor=None)
    ones = torch.ones(512, 32)
    torch.manual_seed(0)
    noise = router(ones)[0]  # the weight is the identity: logits are the noise itself
    assert 0.75 <= noise.min() < 0.752
    assert 1.248 < noise.max() <= 1.25
    torch.testing.assert_close(noise.mean(), torch.tensor(1.0), atol=0.01, rtol=0.0)
    torch.testing.assert_close(noise.std(), torch.tensor(0.5 / math.sqrt(12)), atol=0.01, rtol=0.0)
    assert torch.equal(ones, torch.ones(512, 32)), "in place"
    assert torch.equal(router.eval()(ones)[0], ones)


@pytest.mark.parametrize("policy", [None, "jitter"])
def test_no_noise_without_the_policy_or_at_width_zero(policy: str | None) -> None:
    noise = 0.0 if policy else 0.25
    router = _router(32, 32, router_noise_policy=policy, router_jitter_noise=noise, capacity_factor=None)
    hidden = torch.randn(8, 32)
    assert torch.equal(router(hidden)[0], hidden)


def test_jitter_may_change_the_choice_but_weights_come_from_the_noisy_logits() -> None:
    router = _router(4, 4, router_noise_policy="jitter", router_jitter_noise=0.5, capacity_factor=None)
    torch.manual_seed(0)
    _, routing = router(torch.ones(64, 4))
    assert len(routing.choices.unique()) == 4
    probs = routing.logits.softmax(dim=-1)
    torch.testing.assert_close(routing.weights, probs.max(dim=-1, keepdim=True).values)


def _random_router(**overrides: Any) -> ZCodeM3Router:
    torch.manual_seed(3)
    router = ZCodeM3Router(tiny_config(capacity_factor=None, **overrides), 4)
    torch.nn.init.normal_(router.weight)
    return router


def test_logits_are_float32_under_autocast() -> None:
    router = _random_router()
    hidden = torch.randn(64, 32)
    expected = hidden @ router.weight.T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = hidden @ router.weight.T
        logits, routing = router(hidden)
    assert rounded.dtype == torch.bfloat16, "autocast is on"
    assert logits.dtype == routing.weights.dtype == torch.float32
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0.0)
    assert (rounded.float() - expected).abs().max() > 1e-2, "bfloat16 would show"


def test_logits_are_float32_for_bfloat16_models() -> None:
    router = _random_router().bfloat16()
    hidden = torch.randn(64, 32).bfloat16()
    logits, routing = router(hidden)
    assert logits.dtype == routing.weights.dtype == torch.float32
    torch.testing.assert_close(logits, hidden.float() @ router.weight.float().T, atol=1e-5, rtol=0.0)
    assert (logits - (hidden @ router.weight.T).float()).abs().max() > 1e-2, "bfloat16 would show"


def test_router_dtype() -> None:
    router = _random_router(router_dtype="bfloat16")
    hidden = torch.randn(64, 32)
    logits, routing = router(hidden)
    assert logits.dtype == routing.weights.dtype == torch.float32
    assert torch.equal(logits, (hidden.bfloat16() @ router.weight.bfloat16().T).float())


def test_router_bias() -> None:
    assert _random_router().bias is None
    router = _random_router(router_bias=True)
    assert router.bias is not None
    with torch.no_grad():
        router.bias.copy_(torch.tensor([0.0, 0.0, 100.0, -100.0]))
    hidden = torch.randn(64, 32)
    logits, routing = router(hidden)
    torch.testing.assert_close(logits, hidden @ router.weight.T + router.bias)
    assert routing.expert_ids.unique().tolist() == [2]
    routing.weights.sum().backward()
    assert router.bias.grad is not None


def test_weights_carry_gradient_to_the_router() -> None:
    router = _random_router()
    router(torch.randn(16, 32))[1].weights.sum().backward()
    assert router.weight.grad is not None
    assert router.weight.grad.abs().max() > 1e-3
