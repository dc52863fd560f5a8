"""Router losses on cases small enough to compute by hand."""

import functools
import math

import pytest
import torch

from hf_moe_ted.models import losses
from hf_moe_ted.models.losses import load_balancing_loss, router_z_loss, row_chunks, summed_cross_entropy

# probabilities of the four tokens, in eighths: [4 2 1 1], [1 4 2 1], [1 1 4 2], [4 2 1 1]; their mean: [10 9 8 5] / 32
LOGITS = math.log(2.0) * torch.tensor(
    [[2.0, 1.0, 0.0, 0.0], [0.0, 2.0, 1.0, 0.0], [0.0, 0.0, 2.0, 1.0], [2.0, 1.0, 0.0, 0.0]]
)
TOP_1 = torch.tensor([[0], [1], [2], [0]])
TOP_2 = torch.tensor([[0, 1], [1, 2], [2, 3], [0, 1]])
TOP_3 = torch.tensor([[0, 1, 2], [1, 2, 0], [2, 3, 0], [0, 1, 3]])
TOP_4 = torch.tensor([[0, 1, 2, 3], [1, 2, 0, 3], [2, 3, 0, 1], [0, 1, 2, 3]])


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        (TOP_1, 37 / 32),  # shares [2 1 1 0] / 4: 4 * (10 * 2 + 9 + 8) / (32 * 4)
        (torch.zeros(4, 1, dtype=torch.int64), 10 / 8),  # all on the first expert: 4 * 10 / 32
        (TOP_2, 37 / 32),  # first choices only
        (torch.stack([TOP_1[:, 0], torch.full((4,), 3)], dim=1), 37 / 32),  # so other second choices change nothing
        (TOP_3, 101 / 96),  # shares of all choices, [4 3 3 2] / 12: 4 * (40 + 27 + 24 + 10) / (32 * 12)
        (TOP_4, 1.0),  # every expert has the same share
    ],
)
def test_load_balancing_loss(choices: torch.Tensor, expected: float) -> None:
    torch.testing.assert_close(load_balancing_loss(LOGITS, choices), torch.tensor(expected))


def test_load_balancing_loss_is_one_when_balanced_and_num_experts_when_collapsed() -> None:
    balanced = 50.0 * torch.eye(4)
    torch.testing.assert_close(load_balancing_loss(balanced, torch.arange(4).unsqueeze(1)), torch.tensor(1.0))
    collapsed = 50.0 * torch.eye(4)[[2, 2, 2]]
    torch.testing.assert_close(load_balancing_loss(collapsed, torch.full((3, 1), 2)), torch.tensor(4.0))


def test_load_balancing_loss_ignores_masked_tokens() -> None:
    # tokens 0 and 2: mean probabilities [5 3 5 3] / 16, shares [1 0 1 0] / 2
    mask = torch.tensor([True, False, True, False])
    torch.testing.assert_close(load_balancing_loss(LOGITS, TOP_1, mask), torch.tensor(4 * (5 + 5) / (16 * 2)))


def test_losses_of_one_token() -> None:
    mask = torch.tensor([False, False, True, False])  # probabilities [1 1 4 2] / 8, the third expert
    torch.testing.assert_close(load_balancing_loss(LOGITS, TOP_1, mask), torch.tensor(4 * 4 / 8))
    torch.testing.assert_close(router_z_loss(LOGITS, mask), router_z_loss(LOGITS))  # that of each token is the same


def test_load_balancing_loss_has_no_gradient_through_the_shares() -> None:
    logits = LOGITS.clone().requires_grad_()
    load_balancing_loss(logits, TOP_1).backward()
    # d/d logits of E * sum_e(share_e * mean_t p_te) = E / T * p_te * (share_e - sum_j(share_j * p_tj))
    probs, share = LOGITS.softmax(dim=-1), torch.tensor([0.5, 0.25, 0.25, 0.0])
    expected = probs * (share - (probs * share).sum(dim=-1, keepdim=True))
    torch.testing.assert_close(logits.grad, expected)


def test_router_z_loss() -> None:
    # log sum exp of the rows: ln 2, ln 2 + 1, 0 (as -inf counts nothing), ln 4
    logits = torch.tensor([[0.0, 0.0, -math.inf], [1.0, 1.0, -math.inf], [-math.inf, -math.inf, 0.0]])
    ln2 = math.log(2.0)
    torch.testing.assert_close(router_z_loss(logits), torch.tensor((ln2**2 + (ln2 + 1) ** 2) / 3))
    # every row of LOGITS sums to 8: (3 ln 2)^2 = 4.3241
    torch.testing.assert_close(router_z_loss(LOGITS), torch.tensor(4.324077), atol=1e-5, rtol=0.0)


def test_router_z_loss_ignores_masked_tokens() -> None:
    logits = torch.tensor([[0.0, 0.0], [3.0, 3.0], [0.0, 0.0]])
    mask = torch.tensor([True, False, True])
    torch.testing.assert_close(router_z_loss(logits, mask), torch.tensor(0.480453), atol=1e-6, rtol=0.0)


@pytest.mark.parametrize("loss", ["balance", "z"])
def test_masked_tokens_have_no_gradient_and_no_token_no_loss(loss: str) -> None:
    def compute(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return load_balancing_loss(logits, TOP_1, mask) if loss == "balance" else router_z_loss(logits, mask)

    logits = LOGITS.clone().requires_grad_()
    compute(logits, torch.tensor([True, False, True, True])).backward()
    assert logits.grad is not None
    assert logits.grad[1].tolist() == [0.0] * 4
    assert (logits.grad[[0, 2, 3]].abs().sum(dim=1) > 0.01).all()

    logits = LOGITS.clone().requires_grad_()
    value = compute(logits, torch.zeros(4, dtype=torch.bool))
    value.backward()
    assert value.item() == 0.0
    assert logits.grad is not None
    assert logits.grad.count_nonzero() == 0


@pytest.mark.parametrize("choices", [TOP_1, TOP_2, TOP_3])
@pytest.mark.parametrize("mask", [None, torch.tensor([True, False, True, True])])
def test_losses_of_several_layers_at_once(choices: torch.Tensor, mask: torch.Tensor | None) -> None:
    logits, chosen = torch.stack([LOGITS, 2 * LOGITS.flip(0)]), torch.stack([choices, choices.flip(0)])
    each = [load_balancing_loss(*layer, mask) for layer in zip(logits, chosen, strict=True)]
    torch.testing.assert_close(load_balancing_loss(logits, chosen, mask), torch.stack(each))
    torch.testing.assert_close(
        router_z_loss(logits, mask), torch.stack([router_z_loss(layer, mask) for layer in logits])
    )


def test_losses_are_float32_scalars_for_half_logits() -> None:
    for value in (load_balancing_loss(LOGITS.bfloat16(), TOP_1), router_z_loss(LOGITS.bfloat16())):
        assert value.dtype == torch.float32
        assert value.shape == ()


# half a unit in the last place of what is stored, and what float32 sums and exponentials round
RELATIVE_ERROR = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8}


@pytest.mark.parametrize("vocab_size", [7, 2**17])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_in_chunks_is_the_plain_one(
    dtype: torch.dtype, smoothing: float, vocab_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With many words a gradient is about as small as one word's share of the smoothing, and so is the tolerance."""
    monkeypatch.setattr(losses, "row_chunks", functools.partial(row_chunks, numel=2 * vocab_size + 1))
    logits = torch.randn(1, 5, vocab_size).to(dtype).requires_grad_()
    labels = torch.randint(vocab_size, (1, 5))
    labels[0, 3] = -100
    loss = summed_cross_entropy(logits, labels, smoothing)
    (gradient,) = torch.autograd.grad(loss / 3, logits)
    assert (loss.dtype, gradient.dtype) == (torch.float32, dtype)
    assert smoothing or torch.equal(summed_cross_entropy(logits, labels), loss)

    plain = logits.detach().double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(plain[0], labels[0], reduction="sum", label_smoothing=smoothing)
    (expected_gradient,) = torch.autograd.grad(expected / 3, plain)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=RELATIVE_ERROR[dtype], atol=1e-5 / vocab_size)


def test_chunks_are_all_rows_in_order_with_few_logits_each() -> None:
    def bounds(num_rows: int, vocab_size: int, **options: int) -> list[tuple[int, int]]:
        chunks = row_chunks(torch.empty(num_rows, vocab_size, device="meta"), **options)
        return [(chunk.start, chunk.stop) for chunk in chunks]

    assert bounds(5, 7, numel=15) == [(0, 2), (2, 4), (4, 6)]
    assert bounds(2, 7, numel=6) == [(0, 1), (1, 2)]  # one row is the least
    assert bounds(3, 0) == [(0, 2**26)]
    assert bounds(530, 2**17) == [(0, 512), (512, 1024)]  # 256 MiB in float32
