"""Kernels of quantized experts on a GPU against a float64 loop over their rounded weights."""

import copy
from collections.abc import Callable

import pytest
import torch
from fused_experts_cases import CASES, assert_near, on_gpu
from quantized_experts_cases import expected_output, make_quantized, random_inputs
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")

from hf_moe_ted import ZCodeM3Config, ZCodeM3ForConditionalGeneration, quantize_experts
from hf_moe_ted.compression import quantized_experts
from hf_moe_ted.kernels import quantized_ffn

pytestmark = [pytest.mark.gpu, on_gpu]

# bits, weights per scale, d_model, inner width, dtype
FORMATS = [
    (8, None, 1024, 2048, torch.bfloat16),
    (8, 64, 256, 512, torch.bfloat16),
    (8, 11, 22, 33, torch.bfloat16),
    (4, 128, 1024, 2048, torch.bfloat16),
    (4, 64, 256, 512, torch.bfloat16),
    (4, 32, 288, 480, torch.bfloat16),
    (4, None, 250, 506, torch.bfloat16),
    (4, 6, 36, 42, torch.bfloat16),
    (4, 128, 256, 512, torch.float16),
    (8, None, 256, 512, torch.float16),
    (4, 32, 256, 512, torch.float32),
]
WAYS = {"few": (9, 2), "some": (60, 2), "many": (900, 2)}  # tokens, experts per token; of 8 experts


@pytest.fixture(autouse=True)
def kernels_on_gpus(monkeypatch):
    monkeypatch.setattr(quantized_experts, "TRITON_ON_GPUS", True)


@torch.no_grad()
def run(experts: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [experts(*inputs)]


def tolerance(dtype: torch.dtype) -> float:
    return {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("bits", "group_size", "d_model", "ffn_dim", "dtype"), FORMATS)
def test_each_format_equals_the_reference(bits, group_size, d_model, ffn_dim, dtype, way, poisoned_buffers):
    quantized, experts = make_quantized(bits, group_size, 8, d_model, ffn_dim, dtype)
    for case in CASES:
        inputs = random_inputs(case, *WAYS[way], experts, dtype)
        output = run(quantized, inputs)
        assert_near(output, expected_output(experts, inputs), tolerance(dtype))
        assert torch.equal(run(quantized, inputs)[0], output[0]), "not deterministic"


def test_each_number_of_slots(poisoned_buffers):
    quantized, experts = make_quantized(4, 128, 16, 256, 512, torch.bfloat16)
    for num_tokens in (*range(1, 67), 255, 2048):
        inputs = random_inputs("random", num_tokens, 1, experts, torch.bfloat16)
        assert_near(run(quantized, inputs), expected_output(experts, inputs), 1e-2)


@pytest.mark.parametrize("num_tokens", [8, 200])
def test_replayed_with_other_routing(num_tokens):
    quantized, experts = make_quantized(4, 128, 16, 256, 512, torch.bfloat16)
    inputs = random_inputs("random", num_tokens, 2, experts, torch.bfloat16)
    run(quantized, inputs)  # Triton compiles and loads kernels, which a graph cannot record
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run(quantized, inputs)
    for case in CASES:
        for buffer, value in zip(inputs, random_inputs(case, num_tokens, 2, experts, torch.bfloat16), strict=True):
            buffer.copy_(value)
        graph.replay()
        assert_near(output, expected_output(experts, inputs), 1e-2)


@pytest.mark.parametrize("num_tokens", [4, 200])
def test_compiled_and_under_autocast(num_tokens):
    quantized, experts = make_quantized(4, 32, 8, 64, 128, torch.float32)
    inputs = random_inputs("some dropped", num_tokens, 2, experts, torch.float32)
    expected = expected_output(experts, inputs)
    assert_near(run(torch.compile(quantized, fullgraph=True), inputs), expected, 1e-5)
    with torch.autocast("cuda", torch.bfloat16):
        assert_near(run(quantized, inputs), expected, 1e-2)


@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (4, None)])
@torch.no_grad()
def test_model_takes_the_kernels_by_itself(bits, group_size, monkeypatch):
    config = ZCodeM3Config(
        vocab_size=300, d_model=128, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=256, decoder_ffn_dim=256,
        num_experts=4, num_experts_per_tok=2, encoder_attention_heads=2, decoder_attention_heads=2,
    )  # fmt: skip
    with torch.device("cuda"):
        model = ZCodeM3ForConditionalGeneration(config).to(torch.bfloat16).eval()
    quantized = quantize_experts(model, bits, group_size)
    reference = copy.deepcopy(quantized)
    reference.set_experts_implementation("eager")
    calls, linear = [], quantized_ffn.quantized_linear

    def recorded(*args):
        calls.append(args[1].numel())
        return linear(*args)

    monkeypatch.setattr(quantized_ffn, "quantized_linear", recorded)
    ids = torch.randint(4, 300, (8, 16), device="cuda")
    inputs = {"input_ids": ids, "decoder_input_ids": ids[:, :2]}
    logits = quantized(**inputs).logits
    assert {8 * 16 * 2, 8 * 2 * 2} <= set(calls)
    expected = reference(**inputs).logits
    assert (logits - expected).norm() / expected.norm() < 0.03
    assert torch.equal(quantized(**inputs).logits, logits)
