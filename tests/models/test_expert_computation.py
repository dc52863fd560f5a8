"""The table of computations: what it says in the docs, what it refuses, and whether its claims hold."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_moe_ted import ZCodeM3ForConditionalGeneration
from hf_moe_ted.models import expert_computation
from hf_moe_ted.models.expert_computation import (
    COMPUTATIONS,
    ExpertComputation,
    check_computation,
    default_computation,
)
from hf_moe_ted.models.experts import ZCodeM3Experts
from hf_moe_ted.testing import tiny_config

WIDTHS = {"d_model": 32, "ffn_dim": 24}
NAMES = list(COMPUTATIONS)


def experts_of(name: str, ffn_dim: int = 24, dtype: torch.dtype = torch.float32, **overrides: Any) -> ZCodeM3Experts:
    config = tiny_config(**overrides)
    config._experts_implementation = name
    experts = ZCodeM3Experts(config, 3, ffn_dim).to(dtype)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    return experts


def inputs_of(experts: ZCodeM3Experts, num_tokens: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(num_tokens, 32, dtype=experts.up_proj.dtype, requires_grad=True)
    return hidden, torch.arange(num_tokens)[:, None] % 3, torch.ones(num_tokens, 1, dtype=hidden.dtype)


def line_of(row: ExpertComputation) -> str:
    steps = row.width_steps or {}
    first = row.cuda_capability and "from compute capability {}.{}".format(*row.cuda_capability)
    cells = [
        f"`{row.name}`",
        row.how,
        ", ".join(row.default_on) or "-",
        f"cuda, {first}" if row.uses_triton else f"any; cuda {first}" if first else "any",
        ", ".join(str(dtype).removeprefix("torch.") for dtype in steps) or "any",
        f"multiples of {max(steps.values())}" if steps else "any",
        "ReLU without dropout" if row.only_relu else "any",
        f"`{row.instead}`" if row.instead else "an error" if steps else "-",
        "yes" if row.compiles else "no",
        row.cuda_graphs,
        "yes" if row.second_derivatives else "no",
    ]
    return f"| {' | '.join(cells)} |"


def test_docs_quote_the_table() -> None:
    docs = (Path(__file__).parents[2] / "docs/experts.md").read_text()
    assert [line for line in docs.splitlines() if line.startswith("| `")] == list(map(line_of, COMPUTATIONS.values()))


@pytest.mark.parametrize(
    ("device", "width", "dtype", "expected"),
    [
        ("cuda", 24, torch.float32, "zcode_fused"),
        ("cuda", 24, torch.bfloat16, "zcode_fused"),
        ("cpu", 24, torch.float32, "grouped_mm"),
        ("cpu", 20, torch.float32, "eager"),
        ("cuda", 20, torch.float32, "eager"),
        ("cuda", 24, torch.float64, "eager"),
        ("cpu", 24, torch.float64, "eager"),
    ],
)
def test_default(device: str, width: int, dtype: torch.dtype, expected: str) -> None:
    assert default_computation(device, {"d_model": 32, "ffn_dim": width}, dtype) == expected


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    messages: list[str] = []
    monkeypatch.setattr(expert_computation.logger, "warning_once", messages.append)
    return messages


def test_slow_default_says_why(warnings: list[str]) -> None:
    default_computation("cuda", WIDTHS, torch.float32)
    default_computation("cuda", {}, torch.float32)
    assert warnings == []
    default_computation("cuda", {"d_model": 32, "ffn_dim": 20}, torch.float32)
    assert warnings == [
        "experts are computed by a slow loop (experts_implementation='eager'), because 'grouped_mm' needs widths that "
        "are multiples of 8, got {'ffn_dim': 20}"
    ]


def test_slow_loop_of_a_share_says_why(warnings: list[str]) -> None:
    experts_of("zcode_grouped")(*inputs_of(experts_of("zcode_grouped")))
    assert warnings == []
    experts = experts_of("zcode_fused", ffn_dim=20)  # as no config may have it
    experts(*inputs_of(experts))
    assert warnings == [
        "experts are computed one after the other, which is slow on GPUs, because 'zcode_grouped' needs widths that "
        "are multiples of 8, got {'ffn_dim': 20}"
    ]


def test_a_model_without_experts_takes_the_defaults_of_any_widths() -> None:
    assert default_computation("cpu", {}, torch.float64) == "grouped_mm"
    for name in NAMES:
        check_computation(name, {}, torch.float64)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_computation, "kernels", None)
    assert default_computation("cuda", WIDTHS, torch.float32) == "grouped_mm"
    message = "'zcode_cpu' needs the package hf_moe_ted, which is not installed; use 'batched_mm' or 'eager'"
    with pytest.raises(ValueError, match=message):
        check_computation("zcode_cpu", WIDTHS, torch.float32)
    with pytest.raises(ValueError, match=r"got {'ffn_dim': 20}; use 'batched_mm' or 'eager'"):
        check_computation("grouped_mm", {"ffn_dim": 20}, torch.float32)


def test_weights_that_became_float64_are_refused_before_the_products() -> None:
    model = ZCodeM3ForConditionalGeneration(tiny_config(experts_implementation="grouped_mm")).double()
    ids = torch.full((1, 5), 7)
    with pytest.raises(ValueError, match=re.escape("'grouped_mm' needs at most float32, got torch.float64; use 'zc")):
        model(input_ids=ids, decoder_input_ids=ids)
    model.set_experts_implementation("eager")
    assert model(input_ids=ids, decoder_input_ids=ids).logits.dtype == torch.float64


@pytest.mark.parametrize(
    ("ffn_dim", "dtype", "reason"),
    [
        (12, torch.float32, None),
        (12, torch.bfloat16, "widths that are multiples of 8, got {'ffn_dim': 12}"),
        (10, torch.float32, "widths that are multiples of 4, got {'ffn_dim': 10}"),
        (24, torch.bfloat16, None),
        (24, torch.float64, "at most float32, got torch.float64"),
    ],
)
def test_shares_that_no_config_foretells(ffn_dim: int, dtype: torch.dtype, reason: str | None) -> None:
    """What the row says is what PyTorch's products do."""
    experts = experts_of("grouped_mm", ffn_dim, dtype)
    assert COMPUTATIONS["grouped_mm"].why_not_now(experts) == reason
    products = expert_computation.ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    if reason is None:
        experts(*inputs_of(experts)).sum().backward()
    else:
        with pytest.raises((RuntimeError, ValueError)):
            products(experts, *inputs_of(experts))
        with pytest.raises(ValueError, match=re.escape(reason)):
            experts(*inputs_of(experts))


@pytest.mark.parametrize(
    ("name", "case", "reason"),
    [
        ("zcode_grouped", {"ffn_dim": 12}, "widths that are multiples of 8, got {'ffn_dim': 12}"),
        ("zcode_grouped", {"dtype": torch.float64}, "at most float32, got torch.float64"),
        ("zcode_grouped", {"activation_function": "gelu", "activation_dropout": 0.1}, None),
        ("zcode_cpu", {"ffn_dim": 13, "dtype": torch.float64}, None),
        ("eager", {"ffn_dim": 13, "dtype": torch.float64}, None),
    ],
)
def test_reasons(name: str, case: dict[str, Any], reason: str | None) -> None:
    assert COMPUTATIONS[name].why_not_now(experts_of(name, **case)) == reason


def test_reasons_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU before Hopper has grouped products, one before Ampere has none."""

    class OnGPU:
        up_proj = torch.empty(3, 24, 32, device="meta")
        act_fn = nn.ReLU()

    monkeypatch.setattr(Tensor, "device", torch.device("cuda", 0), raising=False)
    lacking = {}
    for capability in ((7, 5), (8, 0), (9, 0)):
        monkeypatch.setattr(expert_computation, "_capability", lambda _, capability=capability: capability)
        lacking[capability] = [name for name, row in COMPUTATIONS.items() if row.why_not_now(OnGPU())]
    assert lacking == {(7, 5): ["zcode_fused", "zcode_grouped"], (8, 0): [], (9, 0): []}


@pytest.fixture
def _compiles_anew() -> Iterator[None]:
    """All experts share the code of `forward`, of which Dynamo compiles only so many."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_compiles_anew")
@pytest.mark.parametrize("name", NAMES)
def test_compiles_into_one_graph(name: str) -> None:
    experts = experts_of(name).requires_grad_(False)
    inputs = [tensor.detach() for tensor in inputs_of(experts)]
    compiled = torch.compile(experts, backend="eager", fullgraph=True)
    if COMPUTATIONS[name].compiles:
        torch.testing.assert_close(compiled(*inputs), experts(*inputs))
    else:
        with pytest.raises(torch._dynamo.exc.Unsupported):
            compiled(*inputs)


@pytest.mark.usefixtures("_compiles_anew")
@pytest.mark.parametrize(
    ("overrides", "is_one_graph"), [({"activation_function": "gelu"}, True), ({"ffn_dim": 20}, False)]
)
def test_what_runs_instead_compiles_as_well(overrides: dict[str, Any], is_one_graph: bool) -> None:
    """Experts with a width of 20 end at `zcode_cpu`."""
    experts = experts_of("zcode_fused", **overrides)
    compiled = torch.compile(experts, backend="eager", fullgraph=is_one_graph)
    inputs = inputs_of(experts)
    torch.testing.assert_close(compiled(*inputs), experts(*inputs))


@pytest.mark.parametrize("name", [name for name, row in COMPUTATIONS.items() if row.second_derivatives])
def test_second_derivatives(name: str) -> None:
    gradients = []
    for implementation in (name, "eager"):
        torch.manual_seed(0)
        experts = experts_of(implementation, activation_function="silu")
        hidden, ids, weights = inputs_of(experts)
        (gradient,) = torch.autograd.grad(experts(hidden, ids, weights).square().sum(), hidden, create_graph=True)
        gradients.append(torch.autograd.grad(gradient.square().sum(), experts.up_proj)[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-3)
