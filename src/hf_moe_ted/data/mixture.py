"""How often each component of a multitask mixture is drawn: task weights and a temperature over languages."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .multitask_rows import TASKS
from .number_checks import require_number


@dataclass(frozen=True)
class Mixture:
    """Temperature sampling over languages and tasks.

    A task is drawn by its weight, and a component of `n` examples in proportion to `n ** (1 / T)` among those of its
    task. Without weights all components compete, whatever their task. A temperature of 1 draws by size; a higher one
    draws small components more often (https://huggingface.co/papers/1907.05019, section 4.1). With
    `temperature_warmup_epochs` it rises linearly from 1 in the first epoch.

    Args:
        temperature: `T` after its warmup. Without warmup it may be infinite, which draws all components equally often.
        temperature_warmup_epochs: epochs until the temperature is reached, 0 for at once.
        task_weights: share of the examples by task; shares sum to 1.

    Raises:
        ValueError: a number is out of its range, a task is unknown, or weights do not sum to 1.
    """

    temperature: float = 1.0
    temperature_warmup_epochs: float = 0.0
    task_weights: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if not require_number("temperature", self.temperature) > 0:
            raise ValueError(f"temperature ({self.temperature}) must be positive")
        warmup = require_number("temperature_warmup_epochs", self.temperature_warmup_epochs)
        if not 0 <= warmup < math.inf:
            raise ValueError(f"temperature_warmup_epochs ({warmup:g}) must be at least 0 and finite")
        if warmup and self.temperature == math.inf:
            raise ValueError(f"temperature ({self.temperature}) must be finite to rise in {warmup:g} epochs")
        if self.task_weights is None:
            return
        if not isinstance(self.task_weights, Mapping):
            raise ValueError(f"task_weights ({self.task_weights!r}) must be a dictionary of the share of each task")
        weights = {task: require_number(f"task_weights of {task}", w) for task, w in self.task_weights.items()}
        if unknown := {*weights} - {*TASKS}:
            raise ValueError(f"task_weights ({weights}) has the unknown tasks {sorted(unknown)}; tasks are {TASKS}")
        if min(weights.values(), default=0.0) < 0 or not math.isclose(sum(weights.values()), 1.0, abs_tol=1e-6):
            raise ValueError(
                f"task_weights ({weights}) must be at least 0 and sum to 1, but sum to {sum(weights.values())}"
            )

    def temperature_of(self, epoch: float) -> float:
        """The temperature in an epoch; the first epoch is 0."""
        if epoch >= self.temperature_warmup_epochs:
            return self.temperature
        return 1.0 + (self.temperature - 1.0) * epoch / self.temperature_warmup_epochs

    def probabilities(self, tasks: Sequence[str], sizes: Any, epoch: float = 0.0) -> np.ndarray:
        """Probabilities float64[num_components] that sum to 1.

        Args:
            tasks: task of each component.
            sizes: int[num_components], number of examples of each component, at least 1.
            epoch: see `temperature_of`.

        Raises:
            ValueError: the numbers of sizes and tasks differ, a size is not positive, a task without examples has a
                weight, or a task with examples has none.
        """
        log_sizes = _log_sizes(sizes, len(tasks))
        temperature = self.temperature_of(epoch)
        if self.task_weights is None:
            return _powers(log_sizes, temperature)
        if {task for task, weight in self.task_weights.items() if weight > 0} != {*tasks}:
            raise ValueError(
                f"task_weights ({dict(self.task_weights)}) must have positive weights for exactly the tasks with "
                f"examples, {sorted({*tasks})}"
            )
        task_of_component = np.array(tasks)
        probabilities = np.zeros_like(log_sizes)
        for task in sorted({*tasks}):
            is_of_task = task_of_component == task
            probabilities[is_of_task] = self.task_weights[task] * _powers(log_sizes[is_of_task], temperature)
        return probabilities / probabilities.sum()


def _log_sizes(sizes: Any, num_components: int) -> np.ndarray:
    numbers = np.asarray(sizes, dtype=np.float64)
    if numbers.shape != (num_components,) or not num_components:
        raise ValueError(f"sizes has the shape {numbers.shape}, but must have one for each of {num_components} tasks")
    if not (np.isfinite(numbers) & (numbers > 0)).all():
        raise ValueError(f"sizes ({numbers.tolist()}) must be positive")
    return np.log(numbers)


def _powers(log_sizes: np.ndarray, temperature: float) -> np.ndarray:
    """`sizes ** (1 / temperature)` divided by their sum, for any temperature; sizes are relative to the largest."""
    with np.errstate(over="ignore"):  # a very low temperature leaves only the largest
        scores = np.exp((log_sizes - log_sizes.max()) / temperature)
    return scores / scores.sum()


def apportion(probabilities: np.ndarray, total: int) -> np.ndarray:
    """Integers in the given proportions that sum to `total`, by largest remainders; int64."""
    exact = probabilities * total
    counts = np.floor(exact).astype(np.int64)
    left = total - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:left]] += 1
    return counts


__all__ = ["Mixture", "apportion"]
