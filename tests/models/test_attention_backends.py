import pytest
import torch

from hf_moe_ted import ZCodeM3ForConditionalGeneration
from hf_moe_ted.models import attention_backends
from hf_moe_ted.models.attention_backends import (
    has_faulty_cudnn_backward,
    warn_of_cudnn_backward,
    without_cudnn_attention,
)
from hf_moe_ted.testing import tiny_config

QUERY = torch.zeros(1, 1, 2, 8, dtype=torch.bfloat16, requires_grad=True)
MASK = torch.ones(1, 1, 2, 2, dtype=torch.bool)


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is warned of on a device with the fault, where cuDNN is enabled."""
    messages: list[str] = []
    monkeypatch.setattr(attention_backends, "has_faulty_cudnn_backward", lambda device: True)
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: True)
    monkeypatch.setattr(attention_backends.logger, "warning_once", messages.append)
    return messages


def test_training_with_a_mask_is_warned_of(warnings):
    warn_of_cudnn_backward(QUERY, MASK)
    (message,) = warnings
    assert "enable_cudnn_sdp(False)" in message and torch.__version__ in message


@pytest.mark.parametrize(
    ("query", "mask"),
    [(QUERY, None), (QUERY.detach(), MASK), (QUERY.detach().float().requires_grad_(), MASK)],
    ids=["no mask", "no gradient", "float32"],
)
def test_no_warning_of_what_works(warnings, query, mask):
    warn_of_cudnn_backward(query, mask)
    assert warnings == []


def test_no_warning_where_it_is_switched_off(warnings, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: False)
    warn_of_cudnn_backward(QUERY, MASK)
    assert warnings == []


@pytest.mark.parametrize(
    ("capability", "torch_has_it", "faulty"),
    [((9, 0), True, True), ((9, 0), False, False), ((8, 0), True, False), ((10, 0), True, False)],
)
def test_only_hopper_since_torch_2_11(monkeypatch, capability, torch_has_it, faulty):
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(
        attention_backends, "is_torch_greater_or_equal", lambda *args, **kwargs: asked.append(args[0]) or torch_has_it
    )
    assert has_faulty_cudnn_backward.__wrapped__(torch.device("cuda", 0)) == faulty
    assert asked in ([], ["2.11"])
    assert not has_faulty_cudnn_backward.__wrapped__(torch.device("cpu"))


def test_models_warn_in_training_only(warnings):
    model = ZCodeM3ForConditionalGeneration(tiny_config()).to(torch.bfloat16)
    model.set_attn_implementation("sdpa")
    ids = torch.tensor([[5, 6, 2], [7, 2, 1]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 1).long(), "labels": ids}
    with torch.no_grad():
        model(**inputs)
    assert warnings == []
    model.train()(**inputs)
    assert warnings
    warnings.clear()
    model.set_attn_implementation("eager")
    model(**inputs)
    assert warnings == []


@pytest.mark.parametrize("was_enabled", [True, False])
def test_cudnn_is_switched_off_while_somebody_generates(was_enabled):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(was_enabled)
    try:
        first, second = without_cudnn_attention(), without_cudnn_attention()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)  # threads end in any order
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        second.__exit__(None, None, None)
        assert torch.backends.cuda.cudnn_sdp_enabled() == was_enabled
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_generation_does_without_cudnn(monkeypatch):
    model = ZCodeM3ForConditionalGeneration(tiny_config()).eval()
    seen = []
    monkeypatch.setattr(model.model, "forward", record_cudnn(model.model.forward, seen))
    model.generate(torch.tensor([[5, 6, 2]]), max_new_tokens=3)
    assert seen and not any(seen)


def record_cudnn(forward, seen):
    def recorded(*args, **kwargs):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return forward(*args, **kwargs)

    return recorded
