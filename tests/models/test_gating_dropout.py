"""Gating dropout: how often a layer passes its experts over, and that nothing else changes."""

from typing import Any

import pytest
import torch

from hf_moe_ted import ZCodeM3Config, ZCodeM3ForConditionalGeneration
from hf_moe_ted.models.router import ZCodeM3Router
from hf_moe_ted.testing import tiny_config


@pytest.mark.parametrize("options", [{}, {"capacity_factor": None}, {"num_experts_per_tok": 2, "min_capacity": 0}])
def test_the_whole_batch_is_passed_over_at_the_rate(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    router = ZCodeM3Router(tiny_config(gating_dropout=0.3, **options), num_experts=4)
    torch.nn.init.normal_(router.weight)
    hidden_TD, mask_T = torch.randn(16, 32), torch.arange(16) < 12
    num_passed_over = 0
    for _ in range(500):
        _, routing = router(hidden_TD, mask_T)
        is_computed_T = (routing.expert_ids < 4).any(dim=1)
        assert not is_computed_T[12:].any()
        assert (routing.weights[~is_computed_T] == 0).all()
        num_passed_over += not is_computed_T.any()
    assert num_passed_over / 500 == pytest.approx(0.3, abs=0.06)
    router.eval()
    assert all((router(hidden_TD, mask_T)[1].expert_ids[:12] < 4).all() for _ in range(20))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm", "zcode_grouped"])
def test_a_step_without_experts_has_gradients(implementation: str) -> None:
    torch.manual_seed(0)
    model = ZCodeM3ForConditionalGeneration(tiny_config(gating_dropout=0.999999, router_aux_loss_coef=0.01))
    model.set_experts_implementation(implementation)
    ids = torch.randint(3, 96, (2, 8))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert torch.isfinite(loss)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.isfinite(parameter.grad).all(), name
        if ".experts." in name:
            assert parameter.grad is None or (parameter.grad == 0).all()
        elif "router" not in name:
            assert parameter.grad is not None and (parameter.grad != 0).any(), name


def test_bad_probability() -> None:
    with pytest.raises(ValueError, match=r"gating_dropout \(1.0\) must be at least 0 and less than 1"):
        ZCodeM3Config(gating_dropout=1.0)
