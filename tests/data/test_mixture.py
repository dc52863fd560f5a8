"""Probabilities of a mixture against the formula, and whole numbers in proportion."""

import numpy as np
import pytest

from hf_moe_ted import Mixture
from hf_moe_ted.data.mixture import apportion

TASKS = ["translation", "translation", "denoising"]
SIZES = [900, 100, 3000]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0, 0.5])
def test_without_weights_all_components_stand_against_each_other(temperature: float) -> None:
    scores = [size ** (1 / temperature) for size in SIZES]
    expected = [score / sum(scores) for score in scores]
    assert Mixture(temperature).probabilities(TASKS, SIZES) == pytest.approx(expected)


def test_weights_are_those_of_tasks_and_the_temperature_acts_within() -> None:
    mixture = Mixture(2.0, task_weights={"translation": 0.8, "denoising": 0.2})
    assert mixture.probabilities(TASKS, SIZES) == pytest.approx([0.8 * 30 / 40, 0.8 * 10 / 40, 0.2])


def test_temperature_rises_from_one() -> None:
    mixture = Mixture(5.0, temperature_warmup_epochs=4)
    assert [mixture.temperature_of(epoch) for epoch in (0, 1, 2, 3.5, 4, 9)] == [1, 2, 3, 4.5, 5, 5]
    assert mixture.probabilities(TASKS, SIZES, epoch=0) == pytest.approx(np.array(SIZES) / 4000)
    assert mixture.probabilities(TASKS, SIZES, epoch=4) == pytest.approx(Mixture(5.0).probabilities(TASKS, SIZES))
    assert Mixture(5.0).temperature_of(0) == 5.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"temperature \(0.0\) must be positive"),
        ({"temperature_warmup_epochs": -1}, r"temperature_warmup_epochs \(-1\) must not be negative"),
        ({"task_weights": {"translation": 0.7, "denoising": 0.7}}, r"must not be negative and sum to 1, not 1.4"),
        ({"task_weights": {"translation": 1.5, "denoising": -0.5}}, r"must not be negative and sum to 1"),
        ({"task_weights": {}}, r"sum to 1, not 0"),
        ({"task_weights": {"translate": 1.0}}, r"unknown tasks \['translate'\]"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixture(**options)


def test_tasks_and_weights_must_fit() -> None:
    for weights in ({"translation": 1.0}, {"translation": 1.0, "denoising": 0.0}):
        with pytest.raises(ValueError, match=r"for the tasks with examples, \['denoising', 'translation'\]"):
            Mixture(task_weights=weights).probabilities(TASKS, SIZES)
    with pytest.raises(ValueError, match=r"for the tasks with examples, \['translation'\]"):
        Mixture(task_weights={"translation": 0.5, "denoising": 0.5}).probabilities(TASKS[:2], SIZES[:2])
    unused = Mixture(task_weights={"translation": 1.0, "denoising": 0.0})
    assert unused.probabilities(TASKS[:2], SIZES[:2]) == pytest.approx([0.9, 0.1])


@pytest.mark.parametrize("total", [0, 1, 7, 1000])
def test_apportioned_numbers_sum_and_are_off_by_less_than_one(total: int) -> None:
    probabilities = np.random.default_rng(0).dirichlet(np.ones(13))
    counts = apportion(probabilities, total)
    assert counts.sum() == total
    assert abs(counts - probabilities * total).max() < 1
