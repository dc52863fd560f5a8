"""DistributedDataParallel over two processes: with the Seq2SeqTrainer, with accelerate and bare."""

from pathlib import Path
from typing import Any

import ddp_worker
import pytest
import torch

from hf_moe_ted.testing import run_distributed_test

pytestmark = pytest.mark.slow

WORLD_SIZE = 2
Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    """What each of the two processes got: one launch for all tests."""
    return run_distributed_test(ddp_worker.results_of, WORLD_SIZE, tmp_path_factory.mktemp("ranks"))


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("run", ddp_worker.TRAINER_RUNS)
def test_trainer_on_two_ranks_equals_one(ranks: list[Results], run: str, tmp_path: Path) -> None:
    config, options = ddp_worker.TRAINER_RUNS[run]
    expected = ddp_worker.by_trainer(config, tmp_path, **options)
    assert not expected["wrapped"]
    assert expected["loss"][-1] < expected["loss"][0]
    for results in ranks:
        assert results[run]["wrapped"]
        assert results[run]["find_unused_parameters"] == (run in ("dense", "top1", "accumulating"))
        assert results[run]["predictions"].tolist() == expected["predictions"].tolist()
        assert_close(results[run]["weights"], expected["weights"])
    # only the first rank logs
    for name in ("loss", "grad_norm"):
        assert ranks[0][run][name] == pytest.approx(expected[name], rel=1e-5)


@pytest.mark.parametrize("run", [*ddp_worker.TRAINER_RUNS, "noisy", "accelerate", "idle_grouped_mm"])
def test_ranks_end_with_the_same_weights(ranks: list[Results], run: str) -> None:
    first, second = (results[run]["weights"] for results in ranks)
    assert [name for name, tensor in first.items() if not torch.equal(tensor, second[name])] == []


def test_router_losses_and_dropping(ranks: list[Results]) -> None:
    """Of each rank's own tokens; a rank's router losses count by its share of the labels, once."""
    losses = ranks[0]["noisy"]["loss"]
    plain = ranks[0]["top1"]["loss"]
    assert 1.5 < losses[0] - plain[0] < 4.0
    assert losses[-1] < losses[0]


def test_resume(ranks: list[Results]) -> None:
    for results in ranks:
        whole, resumed = results["noisy"], results["resumed"]
        assert resumed["loss"] == whole["loss"]
        assert [n for n, tensor in whole["weights"].items() if not torch.equal(tensor, resumed["weights"][n])] == []


def test_accelerate_on_two_ranks_equals_one(ranks: list[Results]) -> None:
    expected = ddp_worker.by_accelerate(ddp_worker.ADDITIVE)
    assert not expected["wrapped"]
    for results in ranks:
        assert results["accelerate"]["wrapped"]
        assert results["accelerate"]["find_unused_parameters"] is False
        assert results["accelerate"]["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert_close(results["accelerate"]["weights"], expected["weights"])


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_without_tokens(ranks: list[Results], implementation: str) -> None:
    """The default DistributedDataParallel neither waits for their gradients nor raises: they are zeros."""
    num_experts = 0
    for name, gradient in ranks[0][f"idle_{implementation}"]["gradients"].items():
        assert gradient is not None, name
        if ".experts." in name:
            used = [bool(expert.abs().sum() > 0) for expert in gradient]
            assert used == [True, True, False, False], name
            num_experts += 1
        torch.testing.assert_close(ranks[1][f"idle_{implementation}"]["gradients"][name], gradient, atol=0, rtol=0)
    assert num_experts == 12
