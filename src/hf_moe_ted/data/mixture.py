"""How often each component of a multitask mixture is drawn: task weights and a temperature over languages."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .multitask_rows import TASKS


@dataclass(frozen=True)
class Mixture:
    """Temperature sampling over languages and tasks.

    A component of `n` examples is drawn with a probability in proportion to `n ** (1 / T)` among those of its task, and
    a task with its weight; without weights all components stand against each other, whatever their task. A temperature
    of 1 draws by size, a higher one draws small components more often (https://huggingface.co/papers/1907.05019,
    section 4.1). With `temperature_warmup_epochs` it rises linearly from 1 in the first epoch.

    Args:
        temperature: `T`, after its warmup.
        temperature_warmup_epochs: epochs until the temperature is reached, 0 for at once.
        task_weights: share of the examples by task, summing to 1.

    Raises:
        ValueError: a number out of its range, an unknown task, or weights that do not sum to 1.
    """

    temperature: float = 1.0
    temperature_warmup_epochs: float = 0.0
    task_weights: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature ({self.temperature}) must be positive")
        if self.temperature_warmup_epochs < 0:
            raise ValueError(f"temperature_warmup_epochs ({self.temperature_warmup_epochs}) must not be negative")
        if self.task_weights is None:
            return
        weights = dict(self.task_weights)
        if unknown := {*weights} - {*TASKS}:
            raise ValueError(f"task_weights ({weights}) has the unknown tasks {sorted(unknown)}; there are {TASKS}")
        if min(weights.values(), default=0.0) < 0 or not math.isclose(sum(weights.values()), 1.0, abs_tol=1e-6):
            raise ValueError(f"task_weights ({weights}) must not be negative and sum to 1, not {sum(weights.values())}")

    def temperature_of(self, epoch: float) -> float:
        """The temperature in an epoch, the first being 0."""
        if epoch >= self.temperature_warmup_epochs:
            return self.temperature
        return 1.0 + (self.temperature - 1.0) * epoch / self.temperature_warmup_epochs

    def probabilities(self, tasks: Sequence[str], sizes: Any, epoch: float = 0.0) -> np.ndarray:
        """float64[num_components], summing to 1.

        Args:
            tasks: of each component.
            sizes: int[num_components], examples of each component.
            epoch: see `temperature_of`.

        Raises:
            ValueError: a weight for a task without examples, or a task without a weight.
        """
        scores = np.asarray(sizes, dtype=np.float64) ** (1.0 / self.temperature_of(epoch))
        if self.task_weights is None:
            return scores / scores.sum()
        if {task for task, weight in self.task_weights.items() if weight > 0} != {*tasks}:
            raise ValueError(
                f"task_weights ({dict(self.task_weights)}) must have a positive weight for the tasks with examples, "
                f"{sorted({*tasks})}, and for no other"
            )
        task_of_component = np.array(tasks)
        for task in {*tasks}:
            is_of_task = task_of_component == task
            scores[is_of_task] *= self.task_weights[task] / scores[is_of_task].sum()
        return scores / scores.sum()


def apportion(probabilities: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers in the given proportions that sum to `total`, by largest remainders; int64."""
    exact = probabilities * total
    counts = np.floor(exact).astype(np.int64)
    left = total - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:left]] += 1
    return counts


__all__ = ["Mixture", "apportion"]
