"""What transformers' own common suites check of every model, checked of ours: one model per kind of architecture."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from trainer_cases import rows, tokenizer, trainers

from hf_moe_ted import ZCodeM3Config, ZCodeM3ForConditionalGeneration
from hf_moe_ted.testing import tiny_config

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "dense": {"encoder_sparse_step": 0, "decoder_sparse_step": 0},
    "top1": {"num_experts_per_tok": 1},
    "top2": {"num_experts_per_tok": 2, "normalize_router_weights": "after_dropping"},
    "residual": {"num_experts_per_tok": 1, "use_residual": True},
    "pyramid": {"num_experts_per_tok": 2, "num_experts": [2, 4, 4], "normalize_router_weights": "before_dropping"},
}


@pytest.fixture(params=ARCHITECTURES)
def config(request: pytest.FixtureRequest) -> ZCodeM3Config:
    return tiny_config(init_std=0.2, **ARCHITECTURES[request.param])


@pytest.fixture
def model(config: ZCodeM3Config) -> ZCodeM3ForConditionalGeneration:
    torch.manual_seed(0)
    return ZCodeM3ForConditionalGeneration(config).eval()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Four sources of 9, 4, 7 and 5 tokens, padded right to 9, and targets of 6 tokens."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([9, 4, 7, 5])
    attention_mask = (torch.arange(9) < lengths[:, None]).long()
    input_ids = torch.randint(4, 96, (4, 9), generator=generator).where(attention_mask.bool(), 1)
    labels = torch.randint(4, 96, (4, 6), generator=generator)
    labels[1, 4:] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


@pytest.fixture
def forward_inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch with decoder inputs instead of labels."""
    decoder_input_ids = batch["labels"].clamp(min=1)
    return {**{name: batch[name] for name in ("input_ids", "attention_mask")}, "decoder_input_ids": decoder_input_ids}


Gradients = Callable[[torch.nn.Module], dict[str, torch.Tensor]]


@pytest.fixture
def gradients() -> Gradients:
    """The gradients of all trainable parameters of a model by name, `None` where there is none."""
    return lambda model: {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


__all__ = ["batch", "config", "forward_inputs", "gradients", "model", "rows", "tokenizer", "trainers"]
