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
    assert mixture.probabilities(TASKS, SIZES) == pytest.approx(np.array(SIZES) / 4000)
    assert mixture.probabilities(TASKS, SIZES, epoch=0) == pytest.approx(np.array(SIZES) / 4000)
    assert mixture.probabilities(TASKS, SIZES, epoch=4) == pytest.approx(Mixture(5.0).probabilities(TASKS, SIZES))
    assert Mixture(5.0).temperature_of(0) == 5.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"temperature \(0.0\) must be positive"),
        ({"temperature": float("nan")}, r"temperature \(nan\) must be a number"),
        ({"temperature": "5"}, r"temperature \('5'\) must be a number"),
        ({"temperature": float("inf"), "temperature_warmup_epochs": 2}, r"temperature \(inf\) must be finite to rise"),
        ({"temperature_warmup_epochs": float("nan")}, r"temperature_warmup_epochs \(nan\) must be a number"),
        (
            {"temperature_warmup_epochs": float("inf")},
            r"temperature_warmup_epochs \(inf\) must be at least 0 and finite",
        ),
        ({"task_weights": {"translation": float("nan"), "denoising": 0.5}}, r"task_weights of translation \(nan\)"),
        ({"task_weights": {"translation": "1"}}, r"task_weights of translation \('1'\) must be a number"),
        ({"task_weights": [0.5, 0.5]}, r"task_weights \(\[0.5, 0.5\]\) must be a dictionary"),
        ({"temperature": -2.0}, r"temperature \(-2.0\) must be positive"),
        ({"temperature_warmup_epochs": -1}, r"temperature_warmup_epochs \(-1\) must be at least 0"),
        ({"task_weights": {"translation": 0.7, "denoising": 0.7}}, r"must be at least 0 and sum to 1, but sum to 1.4"),
        ({"task_weights": {"translation": 1.5, "denoising": -0.5}}, r"must be at least 0 and sum to 1"),
        ({"task_weights": {}}, r"sum to 1, but sum to 0"),
        ({"task_weights": {"translate": 1.0}}, r"unknown tasks \['translate'\]"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixture(**options)


def test_tasks_and_weights_must_fit() -> None:
    for weights in ({"translation": 1.0}, {"translation": 1.0, "denoising": 0.0}):
        with pytest.raises(ValueError, match=r"for exactly the tasks with examples, \['denoising', 'translation'\]"):
            Mixture(task_weights=weights).probabilities(TASKS, SIZES)
    with pytest.raises(ValueError, match=r"for exactly the tasks with examples, \['translation'\]"):
        Mixture(task_weights={"translation": 0.5, "denoising": 0.5}).probabilities(TASKS[:2], SIZES[:2])
    unused = Mixture(task_weights={"translation": 1.0, "denoising": 0.0})
    assert unused.probabilities(TASKS[:2], SIZES[:2]) == pytest.approx([0.9, 0.1])
    assert unused.probabilities(TASKS[:1], SIZES[:1]).tolist() == [1.0]


@pytest.mark.parametrize("total", [0, 1, 7, 1000])
def test_apportioned_numbers_sum_and_are_off_by_less_than_one(total: int) -> None:
    probabilities = np.random.default_rng(0).dirichlet(np.ones(13))
    counts = apportion(probabilities, total)
    assert counts.sum() == total
    assert abs(counts - probabilities * total).max() < 1


def test_what_holds_for_all_temperatures() -> None:
    """Probabilities are finite and sum to 1, larger components are not drawn less often, weights are those of tasks."""
    random = np.random.default_rng(0)
    for _ in range(300):
        temperature = random.choice([np.inf, 1e-300, 1e300, 10.0 ** random.uniform(-6, 6)])
        warmup = 0 if temperature == np.inf else random.choice([0, 3])
        share = random.choice([1e-12, random.random()])
        weights = random.choice(np.array([None, {"translation": 1 - share, "denoising": share}]))
        tasks = ["translation", "denoising", *random.choice(["translation", "denoising"], size=5).tolist()]
        sizes = 10 ** random.integers(0, 15, size=7)
        mixture = Mixture(temperature, warmup, weights)
        for epoch in (0, 1.5, 3, 1e9):
            probabilities = mixture.probabilities(tasks, sizes, epoch)
            assert np.isfinite(probabilities).all() and (probabilities >= 0).all()
            assert probabilities.sum() == pytest.approx(1)
            for task in ("translation", "denoising"):
                of_task = np.array(tasks) == task
                in_order = probabilities[of_task][np.argsort(sizes[of_task], kind="stable")]
                assert (np.diff(in_order) >= -1e-15).all()
                if weights is not None:
                    assert probabilities[of_task].sum() == pytest.approx(weights[task])


def test_the_ends_of_temperatures() -> None:
    assert Mixture(np.inf).probabilities(TASKS, SIZES) == pytest.approx([1 / 3] * 3)
    assert Mixture(1e-6).probabilities(TASKS, SIZES) == pytest.approx([0, 0, 1])


@pytest.mark.parametrize("sizes", [[1, 2], [1, 0, 3], [1, -1, 3], [1, np.nan, 3], [1, np.inf, 3]])
def test_bad_sizes(sizes: list) -> None:
    with pytest.raises(ValueError, match="sizes"):
        Mixture().probabilities(TASKS, sizes)


def test_what_is_left_goes_to_the_largest_remainders() -> None:
    # exactly 0.45, 5.6 and 2.95 of 9; and 0.4 and 5.6 of 6
    assert apportion(np.array([0.45, 5.6, 2.95]) / 9, 9).tolist() == [0, 6, 3]
    assert apportion(np.array([0.4, 5.6]) / 6, 6).tolist() == [0, 6]
