"""`zcode_grouped` where its values are not all there is: tests/models compares it with the other implementations."""

import pytest
import torch
from fused_experts_cases import make_experts, routing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 2])
def test_compiled_in_one_graph_equals_eager(top_k, dtype):
    experts = make_experts(4, 32, 64, dtype).cpu()
    experts.config._experts_implementation = "zcode_grouped"
    hidden, cotangent = torch.randn(2, 20, 32, dtype=dtype)
    ids, weights = routing("some dropped", 20, top_k, 4).cpu(), torch.rand(20, top_k, dtype=dtype)

    def outputs(function):
        inputs = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
        output = function(inputs[0], ids, inputs[1])
        return [output.detach(), *torch.autograd.grad(output, [*inputs, *experts.parameters()], cotangent)]

    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(outputs(compiled), outputs(experts))
