"""Experts on CPUs, against a dense float64 reference on random inputs."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_moe_ted import ZCodeM3ForConditionalGeneration
from hf_moe_ted.kernels import cpu_ffn
from hf_moe_ted.kernels.cpu_ffn import cpu_ffn_experts_forward
from hf_moe_ted.testing import tiny_config

NAMES = ("up_proj", "up_proj_bias", "down_proj", "down_proj_bias")


@pytest.fixture(params=["oneDNN for large products", "oneDNN for all products"])
def _both_products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "oneDNN for all products":
        monkeypatch.setattr(cpu_ffn, "MIN_PRODUCTS_FOR_ONEDNN", 0)


def make_experts(num_experts: int, d_model: int, ffn_dim: int, dtype: torch.dtype, generator: torch.Generator) -> Any:
    shapes = ((ffn_dim, d_model), (ffn_dim,), (d_model, ffn_dim), (d_model,))
    parameters = {
        name: nn.Parameter((torch.randn(num_experts, *shape, generator=generator) * shape[-1] ** -0.5).to(dtype))
        for name, shape in zip(NAMES, shapes, strict=True)
    }
    return SimpleNamespace(num_experts=num_experts, act_fn=torch.relu, **parameters)


def in_float64(experts: Any) -> Any:
    parameters = {name: getattr(experts, name).detach().double().requires_grad_() for name in NAMES}
    return SimpleNamespace(num_experts=experts.num_experts, **parameters)


def dense_reference(experts: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Every token through every expert, weighted by what its slots say."""
    inner = torch.einsum("td,efd->tef", hidden, experts.up_proj) + experts.up_proj_bias
    outputs = torch.einsum("tef,edf->ted", inner.relu(), experts.down_proj) + experts.down_proj_bias
    factor = torch.zeros(len(hidden), experts.num_experts + 1, dtype=hidden.dtype).scatter_add(1, ids, weights)
    return (outputs * factor[:, :-1, None]).sum(dim=1)


def relative_error(value: Tensor, expected: Tensor) -> float:
    return ((value.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


# tokens, experts per token, experts, d_model, inner width
SHAPES = [(1, 1, 4, 32, 64), (7, 2, 3, 20, 33), (64, 1, 16, 48, 96), (65, 3, 5, 17, 9), (130, 2, 8, 64, 128)]


def random_case(shape: tuple[int, ...], dtype: torch.dtype, seed: int, drop: float = 0.2) -> tuple[Any, ...]:
    num_tokens, top_k, num_experts, d_model, ffn_dim = shape
    generator = torch.Generator().manual_seed(seed)
    experts = make_experts(num_experts, d_model, ffn_dim, dtype, generator)
    hidden = torch.randn(num_tokens, d_model, generator=generator).to(dtype)
    ids = torch.rand(num_tokens, num_experts, generator=generator).topk(top_k).indices
    weights = torch.rand(num_tokens, top_k, generator=generator).to(dtype)
    is_dropped = torch.rand(num_tokens, top_k, generator=generator) < drop
    return experts, hidden, ids.masked_fill(is_dropped, num_experts), weights.masked_fill(is_dropped, 0.0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("_both_products")
def test_equals_the_dense_reference(shape: tuple[int, ...], seed: int, dtype: torch.dtype, tolerance: float) -> None:
    experts, hidden, ids, weights = random_case(shape, dtype, seed)
    expected = dense_reference(in_float64(experts), hidden.double(), ids, weights.double())
    with torch.no_grad():
        output = cpu_ffn_experts_forward(experts, hidden, ids, weights)
    assert output.dtype == dtype and output.shape == hidden.shape
    assert relative_error(output, expected) < tolerance
    assert output[(ids == experts.num_experts).all(dim=1)].count_nonzero() == 0
    with_gradients = cpu_ffn_experts_forward(experts, hidden, ids, weights)
    assert relative_error(with_gradients, expected) < tolerance


@pytest.mark.usefixtures("_both_products")
@pytest.mark.parametrize("which", ["one expert", "no expert"])
def test_all_tokens_at_one_expert_or_none(which: str) -> None:
    experts, hidden, ids, weights = random_case((33, 2, 4, 24, 40), torch.float32, 0, drop=0.0)
    ids = torch.full_like(ids, experts.num_experts if which == "no expert" else 2)
    with torch.no_grad():
        output = cpu_ffn_experts_forward(experts, hidden, ids, weights)
    expected = dense_reference(in_float64(experts), hidden.double(), ids, weights.double())
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    assert (output.count_nonzero() == 0) == (which == "no expert")


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(shape: tuple[int, ...]) -> None:
    experts, hidden, ids, weights = random_case(shape, torch.float32, 5)
    ids[ids == 0] = 1  # an expert without tokens
    reference = in_float64(experts)
    inputs = [hidden.requires_grad_(), weights.requires_grad_()]
    expected_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    output = cpu_ffn_experts_forward(experts, inputs[0], ids, inputs[1])
    expected = dense_reference(reference, expected_inputs[0], ids, expected_inputs[1])
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    output.backward(cotangent)
    expected.backward(cotangent.double())
    is_used = ids < experts.num_experts
    pairs = [(getattr(experts, name).grad, getattr(reference, name).grad) for name in NAMES]
    pairs += [
        (inputs[0].grad, expected_inputs[0].grad),
        (inputs[1].grad[is_used], expected_inputs[1].grad[is_used]),  # type: ignore[index]
    ]
    for gradient, expected_gradient in pairs:
        assert relative_error(gradient, expected_gradient) < 1e-5
    assert experts.up_proj.grad[0].count_nonzero() == 0


@pytest.mark.usefixtures("_both_products")
def test_autocast() -> None:
    experts, hidden, ids, weights = random_case(SHAPES[2], torch.float32, 0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = cpu_ffn_experts_forward(experts, hidden, ids, weights)
    expected = dense_reference(in_float64(experts), hidden.double(), ids, weights.double())
    assert 1e-4 < relative_error(output, expected) < 1e-2


class LargestResult(TorchDispatchMode):
    """How many numbers the largest new tensor of any operation has."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(results):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in self.known:
                self.numel = max(self.numel, leaf.numel())
        return results


@pytest.mark.usefixtures("_both_products")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_not_copied(dtype: torch.dtype) -> None:
    experts, hidden, ids, weights = random_case((8, 1, 4, 64, 128), dtype, 0)
    with torch.no_grad(), LargestResult([getattr(experts, name) for name in NAMES]) as largest:
        cpu_ffn_experts_forward(experts, hidden, ids, weights)
    assert largest.numel <= 8 * 128  # the inner activations of all tokens


@pytest.mark.usefixtures("_both_products")
@pytest.mark.parametrize("num_experts_per_tok", [1, 2])
def test_model_generates_what_the_loop_does(num_experts_per_tok: int) -> None:
    torch.manual_seed(0)
    config = tiny_config(num_experts_per_tok=num_experts_per_tok, init_std=0.3)
    model = ZCodeM3ForConditionalGeneration(config).eval()
    ids = torch.randint(3, 96, (4, 11))
    mask = torch.ones_like(ids)
    mask[1, 6:] = mask[3, 2:] = 0
    options = {"attention_mask": mask, "num_beams": 3, "max_new_tokens": 12, "do_sample": False}
    model.set_experts_implementation("eager")
    expected = model.generate(ids, **options)
    model.set_experts_implementation("zcode_cpu")
    assert torch.equal(model.generate(ids, **options), expected)
