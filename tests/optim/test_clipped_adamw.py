"""ClippedAdamW in Triton's interpreter, or on the GPU, against torch's clipping and its fused AdamW."""

import copy
import io
import math
from typing import Any

import pytest
import torch
from clipped_adamw_cases import (
    BETAS,
    DTYPES,
    InInterpreter,
    assert_close_to_torch,
    params_of,
    set_gradients,
    train,
)
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import ExponentialLR

from hf_moe_ted import ClippedAdamW

pytest.importorskip("triton", reason="needs Triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# of the last place: each step may round otherwise, and Triton's interpreter cuts what torch rounds to bfloat16
UNITS = {torch.float32: 8, torch.bfloat16: 8}
OPTIONS: dict[str, Any] = {"lr": 0.1, "betas": BETAS, "fused": True}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "max_norms",
    [[None] * 2, [1.0] * 3, [1e9, 0.3, math.inf, None]],
    ids=["not clipped", "clipped", "in turn"],
)
def test_steps_are_those_of_torch(dtype: torch.dtype, max_norms: list[float | None]) -> None:
    actual, norms = train(InInterpreter, dtype, DEVICE, max_norms)
    expected, expected_norms = train(AdamW, dtype, DEVICE, max_norms)
    assert_close_to_torch(actual, expected, UNITS[dtype])
    torch.testing.assert_close(norms, expected_norms, rtol=1e-6, atol=0)
    assert uses_kernels(actual)


def uses_kernels(optimizer: Any) -> bool:
    tables = [*optimizer._step_tables.values(), *optimizer._norm_tables.values()]
    return bool(tables) and None not in tables


def small(*sizes: int, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.linspace(-1, 1, size, device=DEVICE).to(dtype)) for size in sizes]


def steps(optimizer: torch.optim.Optimizer, first: int, num_steps: int, max_norm: float = 0.5) -> None:
    for step in range(first, first + num_steps):
        set_gradients(params_of(optimizer), 2 * step)
        if isinstance(optimizer, ClippedAdamW):
            optimizer.clip_grad_norm_(max_norm)
        else:
            nn.utils.clip_grad_norm_(params_of(optimizer), max_norm)
        optimizer.step()


@pytest.mark.parametrize("is_tensor", [False, True])
def test_learning_rate_of_a_schedule(is_tensor: bool) -> None:
    optimizers = []
    for kind in (InInterpreter, AdamW):
        optimizer = kind(small(40, 3), **OPTIONS | {"lr": torch.tensor(0.1) if is_tensor else 0.1})
        scheduler = ExponentialLR(optimizer, gamma=0.5)
        for step in range(3):
            steps(optimizer, step, 1)
            scheduler.step()
        optimizers.append(optimizer)
    assert_close_to_torch(*optimizers, 8)


def test_norm_of_many_low_precision_numbers_is_exact() -> None:
    """torch's, of bfloat16 gradients, is bfloat16: 64.0 or 64.5."""
    (param,) = small(40_000, dtype=torch.bfloat16)
    param.grad = torch.full_like(param, 0.322265625)
    norms = [InInterpreter([param]).clip_grad_norm_(1.0) for _ in range(3)]
    assert norms[0].dtype == torch.float32
    assert norms[0].item() == pytest.approx(200 * 0.322265625, rel=1e-6)
    assert norms[0] == norms[1] == norms[2]


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_gradients_that_are_not_finite(bad: float) -> None:
    optimizers = []
    for kind in (InInterpreter, AdamW):
        optimizer = kind(small(40, 3), **OPTIONS)
        set_gradients(params_of(optimizer), 0)
        params_of(optimizer)[0].grad[7] = bad
        if kind is AdamW:
            nn.utils.clip_grad_norm_(params_of(optimizer), 1.0)
        else:
            assert optimizer.clip_grad_norm_(1.0).isfinite() == math.isfinite(bad)
        optimizer.step()
        optimizers.append(optimizer)
    for param, wanted in zip(*map(params_of, optimizers), strict=True):
        torch.testing.assert_close(param, wanted, equal_nan=True)


# ---- a factor is for one step


def test_factor_is_for_one_step() -> None:
    optimizers = [kind(small(40, 3), **OPTIONS) for kind in (InInterpreter, AdamW)]
    for optimizer in optimizers:
        steps(optimizer, 0, 1, max_norm=1e-3)
        set_gradients(params_of(optimizer), 8)
        optimizer.step()
    assert_close_to_torch(*optimizers, 8)


@pytest.mark.parametrize("forget", ["zero_grad", "norm only", "load_state_dict"])
def test_factor_of_a_step_that_was_skipped_is_forgotten(forget: str) -> None:
    optimizers = [kind(small(40, 3), **OPTIONS) for kind in (InInterpreter, AdamW)]
    for optimizer in optimizers:
        steps(optimizer, 0, 1)
        set_gradients(params_of(optimizer), 8)
        if isinstance(optimizer, ClippedAdamW):
            optimizer.clip_grad_norm_(1e-3)  # and no step
            if forget == "zero_grad":
                optimizer.zero_grad()
            elif forget == "norm only":
                optimizer.clip_grad_norm_(math.inf)
            else:
                optimizer.load_state_dict(optimizer.state_dict())
        set_gradients(params_of(optimizer), 10)
        optimizer.step()
    assert_close_to_torch(*optimizers, 8)


# ---- what torch does


class OfTorch(InInterpreter):
    """Counts steps of each kind."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.num_own = 0
        super().__init__(*args, **kwargs)

    def _step_at_once(self, factor: Tensor | None) -> bool:
        is_own = super()._step_at_once(factor)
        self.num_own += is_own
        return is_own


@pytest.mark.parametrize("options", [{"amsgrad": True}, {"maximize": True}])
def test_options_of_torch(options: dict[str, Any]) -> None:
    optimizers = [kind(small(40, 3), **OPTIONS, **options) for kind in (OfTorch, AdamW)]
    for optimizer in optimizers:
        steps(optimizer, 0, 3)
    assert_close_to_torch(*optimizers, 0)
    assert optimizers[0].num_own == 0


def test_tensors_of_torch() -> None:
    """Another dtype, and a parameter in another order."""
    for params in (lambda: small(40, dtype=torch.float16), lambda: [nn.Parameter(torch.ones(4, 6, device=DEVICE).t())]):
        optimizers = [kind(params(), **OPTIONS) for kind in (OfTorch, AdamW)]
        for optimizer in optimizers:
            steps(optimizer, 0, 3)
        assert_close_to_torch(*optimizers, 0)
        assert optimizers[0].num_own == 0


def test_step_of_torch_after_a_norm_of_ours() -> None:
    """Clips gradients now, by the factor of the norm."""
    optimizers = [kind(small(40, 3), **OPTIONS) for kind in (OfTorch, AdamW)]
    for optimizer in optimizers:
        set_gradients(params_of(optimizer), 0)
        if isinstance(optimizer, ClippedAdamW):
            optimizer.clip_grad_norm_(0.5)
        else:
            nn.utils.clip_grad_norm_(params_of(optimizer), 0.5)
        optimizer.param_groups[0]["maximize"] = True
        optimizer.step()
    assert_close_to_torch(*optimizers, 8)
    assert optimizers[0].num_own == 0


def test_cpu_is_torchs() -> None:
    params = [nn.Parameter(torch.linspace(-1, 1, 40))]
    optimizers = [kind(copy.deepcopy(params), **OPTIONS) for kind in (ClippedAdamW, AdamW)]
    for optimizer in optimizers:
        steps(optimizer, 0, 3)
    assert_close_to_torch(*optimizers, 0)


def test_grad_scaler_skips_a_step() -> None:
    optimizers = []
    for kind in (InInterpreter, AdamW):
        optimizer = kind(small(40), **OPTIONS)
        scaler = torch.amp.GradScaler(DEVICE, init_scale=4.0)
        (param,) = params_of(optimizer)
        for step, bad in enumerate((1.0, math.inf, 1.0)):
            set_gradients([param], 2 * step)
            param.grad[3] *= bad
            param.grad *= scaler.scale(torch.ones((), device=DEVICE))
            scaler.unscale_(optimizer)
            if kind is AdamW:
                nn.utils.clip_grad_norm_(param, 0.5)
            else:
                optimizer.clip_grad_norm_(0.5)
            scaler.step(optimizer)
            scaler.update()
        optimizers.append(optimizer)
    assert_close_to_torch(*optimizers, 8)
    assert optimizers[0].state[params_of(optimizers[0])[0]]["step"] == 2


def test_refused_without_fused() -> None:
    with pytest.raises(ValueError, match=r"fused \(False\) must be True"):
        ClippedAdamW(small(3), fused=False)


# ---- states


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("goes_to_torch", [True, False])
def test_either_loads_the_state_of_the_other(goes_to_torch: bool, is_fused: bool) -> None:
    whole = AdamW(small(40, 3), **OPTIONS)
    steps(whole, 0, 4)
    of_torch = OPTIONS | {"fused": is_fused}
    first = InInterpreter(small(40, 3), **OPTIONS) if goes_to_torch else AdamW(small(40, 3), **of_torch)
    steps(first, 0, 2)
    second = AdamW(params_of(first), **of_torch) if goes_to_torch else InInterpreter(params_of(first), lr=3.0)
    second.load_state_dict(saved(first.state_dict()))
    steps(second, 2, 2)
    for param, wanted in zip(params_of(second), params_of(whole), strict=True):
        torch.testing.assert_close(param, wanted)
        for name, value in whole.state[wanted].items():
            torch.testing.assert_close(second.state[param][name], value)
    if not goes_to_torch:
        assert uses_kernels(second)


def saved(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_parameters_and_states_may_move() -> None:
    """Tables are of where tensors are."""
    optimizers = [kind(small(40, 3), **OPTIONS) for kind in (OfTorch, AdamW)]
    for optimizer in optimizers:
        steps(optimizer, 0, 1)
        kept = []
        for param in params_of(optimizer):
            kept.append(param.data)
            param.data = param.data.clone()
            optimizer.state[param]["exp_avg"] = optimizer.state[param]["exp_avg"].clone()
        for old in kept:
            old.fill_(math.nan)
        steps(optimizer, 1, 1)
        optimizer.add_param_group({"params": small(9)})
        steps(optimizer, 2, 2)
    assert_close_to_torch(*optimizers, 8)
    assert optimizers[0].num_own == 4


def test_gradients_of_others_where_those_of_a_parameter_were() -> None:
    """As an allocator puts them there, when layers are frozen in turn."""
    memory = torch.ones(256, device=DEVICE)
    params = small(64, 256, 16)
    optimizer = InInterpreter(params, **OPTIONS)
    for param in params:
        param.grad = memory[: len(param)]
        assert optimizer.clip_grad_norm_(1.0) == len(param) ** 0.5
        param.grad = None


def test_copies_and_hooks() -> None:
    optimizer = InInterpreter(small(40, 3), **OPTIONS)
    steps(optimizer, 0, 2)
    again = copy.deepcopy(optimizer)
    for one in (optimizer, again):
        steps(one, 2, 1)
    assert_close_to_torch(optimizer, again, 0)
    calls: list[str] = []
    on_cpu = ClippedAdamW([nn.Parameter(torch.ones(3))])
    AdamW([nn.Parameter(torch.ones(3))])  # from here on torch wraps AdamW.step, too
    for one in (again, on_cpu):
        one.register_step_pre_hook(lambda *_: calls.append("before"))
        one.register_step_post_hook(lambda *_: calls.append("after"))
        steps(one, 3, 1)
    assert calls == ["before", "after"] * 2


def test_no_gradients() -> None:
    optimizer = InInterpreter(small(40, 3), **OPTIONS)
    assert optimizer.clip_grad_norm_(1.0) == 0
    assert optimizer.step(lambda: 3.0) == 3.0
    assert not optimizer.state
