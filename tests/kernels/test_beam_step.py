"""The kernels behind the logits of a step of beam search, against the operations of PyTorch that they stand for."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")

import triton

from hf_moe_ted.kernels.beam_step import advance_beams, best_words, can_take
from hf_moe_ted.models.beam_hypotheses import Ranking
from hf_moe_ted.models.beam_search import best_of_sentences
from hf_moe_ted.models.decoding_step import advance
from hf_moe_ted.models.search_memory import KeySize, MemorySize, SearchMemory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not triton.knobs.runtime.interpret, reason="needs a GPU or Triton's interpreter"
)
ENDS = [7, 300]


def settings(forbids: bool = False, forced: tuple[int, ...] = (-1, -1, -1)) -> tuple[Tensor, ...]:
    return (
        torch.tensor(ENDS, device=DEVICE),
        torch.tensor([forbids], device=DEVICE),
        torch.tensor(forced, device=DEVICE),
        torch.zeros(1, dtype=torch.bool, device=DEVICE),
    )


@pytest.mark.usefixtures("poisoned_buffers")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_words", [1024, 2500, 5001])
@pytest.mark.parametrize("num_candidates", [2, 8, 15])
def test_best_words(dtype: torch.dtype, num_words: int, num_candidates: int) -> None:
    if not can_take(num_words, num_candidates, len(ENDS)):
        pytest.skip("fewer blocks than candidates")
    logits = torch.randn(6, num_words, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    logits[1, -1] = logits[2, 0] = logits[3, 7] = logits[4, 300] = 9.0
    logits[5, 128:] = -torch.inf
    for forbids in (False, True):
        *options, has_nan = settings(forbids)
        best, words = best_words(logits, num_candidates, *options, has_nan)
        expected = logits.float().log_softmax(dim=-1)
        if forbids:
            expected[:, ENDS] = -torch.inf
        assert torch.equal(expected.gather(1, words), best) or torch.allclose(
            expected.gather(1, words), best, atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(best, expected.topk(num_candidates).values, atol=1e-5, rtol=1e-5)
        assert all(len(row.unique()) == num_candidates for row in words)
        assert not has_nan


def test_forced_words_and_numbers_that_are_not_numbers() -> None:
    logits = torch.randn(6, 2500, device=DEVICE)
    *options, has_nan = settings(forbids=True, forced=(5, -1, 7))
    best, words = best_words(logits, 4, *options, has_nan)
    assert words[:, 0].tolist()[:2] == [5, 5] and words[4:, 0].tolist() == [7, 7]
    for row in (0, 1, 4, 5):
        assert best[row].tolist() == [0.0, *[-torch.inf] * 3]
    torch.testing.assert_close(best[2], logits[2].log_softmax(dim=-1).topk(4).values, atol=1e-5, rtol=1e-5)
    assert not has_nan
    logits[3, 2400] = torch.nan
    best_words(logits, 4, *options, has_nan)
    assert has_nan


def test_room() -> None:
    assert can_take(128_000, 8, 1)
    assert not can_take(128_000, 100, 1)
    assert not can_take(128_000, 8, 20)
    assert not can_take(500, 8, 1)


def started(num_sentences: int, num_beams: int, num_candidates: int, ranking: Ranking, ends: list[int]) -> SearchMemory:
    """A memory behind its prompts, whose last sentence fills the batch."""
    size = MemorySize(num_sentences + 1, num_beams, 32, 16, num_candidates, len(ends))
    keys = KeySize(1, 2, 8, torch.float32, torch.device(DEVICE))
    whole = SearchMemory.allocate(size, keys)
    whole.settings.write(ranking, ends)
    memory = whole.view(num_sentences, 32, 16, keys.allocate(num_sentences + 1, 32 * num_beams))
    prompts = torch.arange(3, 3 + num_sentences * ranking.prompt_length, device=DEVICE).view(num_sentences, -1)
    memory.start(prompts, num_sentences - 1, None, 5, fill=1)
    return memory


def assert_same(memory: SearchMemory, expected: SearchMemory) -> None:
    mine, theirs = memory.hypotheses, expected.hypotheses
    assert torch.equal(memory.is_done_B, expected.is_done_B)
    assert torch.equal(memory.last_BN, expected.last_BN)
    assert torch.equal(memory.mask_B1NK, expected.mask_B1NK)
    for name in ("may_improve_B1", "has_ended_BN", "running_BNL", "running_rows_BNL"):
        assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
    torch.testing.assert_close(mine.running_scores_BN, theirs.running_scores_BN, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(mine.ended_scores_BN, theirs.ended_scores_BN, atol=1e-5, rtol=1e-6)
    for name in ("ended_BNL", "ended_rows_BNL"):  # what stands in empty places is not told
        assert torch.equal(getattr(mine, name)[mine.has_ended_BN], getattr(theirs, name)[mine.has_ended_BN]), name


@pytest.mark.parametrize(
    ("num_beams", "early_stopping", "length_penalty", "prompt_length"),
    [(4, False, 1.0, 1), (4, True, 0.7, 1), (5, "never", 2.0, 1), (2, "never", -1.0, 3), (1, True, 0.0, 1)],
)
def test_advance(num_beams: int, early_stopping: bool | str, length_penalty: float, prompt_length: int) -> None:
    ranking = Ranking(length_penalty, early_stopping, prompt_length, prompt_length + 6)
    num_candidates, ends = 3 * num_beams, [0, 1]
    memory, expected = (started(3, num_beams, num_candidates, ranking, ends) for _ in range(2))
    generator = torch.Generator().manual_seed(num_beams)
    num_done = []
    for _ in range(6):
        rows = 3 * num_beams
        best = -3 * torch.rand(rows, num_candidates, generator=generator)
        best = best.sort(dim=1, descending=True).values.to(DEVICE)
        words = torch.stack([torch.randperm(18, generator=generator)[:num_candidates] for _ in range(rows)]).to(DEVICE)
        advance_beams(best, words, memory)
        advance(expected, best_of_sentences(expected.hypotheses, best, words, num_candidates))
        for either in (memory, expected):
            either.counters.add_(either.steps)
        if memory.place_1 < prompt_length + 6:
            expected.mask_B1NK.scatter_(3, expected.keys_N.view(1, 1, -1, 1).expand(3, -1, -1, -1), 0.0)
            assert_same(memory, expected)
        num_done.append(int(memory.is_done_B.sum()))
    assert num_done[0] < 3 and expected.hypotheses.has_ended_BN[:2].any()


def test_all_are_done_where_nothing_goes_on() -> None:
    """A step later than the operations of PyTorch say it; what has ended stays as it is."""
    memory = started(2, 2, 6, Ranking(1.0, False, 1, 9), [0, 1])
    found = []
    for words in ([0, 1, 0, 1, 0, 1], [5, 6, 7, 8, 9, 10], [5, 0, 7, 1, 9, 10]):
        best = torch.arange(-1.0, -7.0, -1.0, device=DEVICE).expand(4, -1).contiguous()
        advance_beams(best, torch.tensor(words, device=DEVICE).expand(4, -1).contiguous(), memory)
        memory.counters.add_(memory.steps)
        found.append((memory.hypotheses.ended_BNL[0].tolist(), memory.hypotheses.ended_scores_BN[0].tolist()))
    assert found[0] == found[1] == found[2]
    assert memory.is_done_B.all()
    assert found[0][1] == [-1.0, -2.0]
