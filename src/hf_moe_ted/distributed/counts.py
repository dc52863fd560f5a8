"""Make a Trainer count the tokens of ranks that share a batch once."""

import math
from typing import Any

import torch
from transformers import Trainer


class CountsOnceMixin(Trainer):
    """A [`Trainer`] adds up tokens over all processes, but ranks of a tensor-parallel group see the same tokens."""

    _num_evaluated: int | None = None

    @property
    def _ranks_per_batch(self) -> int:
        return int(self.get_tp_size()) if self.is_distributed_loading_by_transformers else 1

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Correct the parent: it divides by the ranks that share a batch even if it did not add up their items."""
        num_items = super()._get_num_items_in_batch(batch_samples, device)
        is_own = self._ranks_per_batch > 1 and not self.args.average_tokens_across_devices
        return (num_items * self._ranks_per_batch).round() if is_own and torch.is_tensor(num_items) else num_items

    def _track_num_input_tokens(self, inputs: Any) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        self.state.num_input_tokens_seen = before + (self.state.num_input_tokens_seen - before) // self._ranks_per_batch

    def store_flos(self) -> None:
        before = self.state.total_flos
        super().store_flos()
        self.state.total_flos = before + (self.state.total_flos - before) / self._ranks_per_batch

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        output = super().evaluation_loop(*args, **kwargs)
        self._num_evaluated = output.num_samples
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        self._correct_steps_per_second(logs)
        super().log(logs, *args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        output = super().predict(*args, **kwargs)
        self._correct_steps_per_second(output.metrics)
        return output

    def _correct_steps_per_second(self, metrics: dict[str, float] | None) -> None:
        """Correct an evaluation's steps per second; the parent assumes one batch at once per process."""
        if self._ranks_per_batch == 1 or metrics is None or self._num_evaluated is None:
            return
        num_batches = self.args.world_size // self._ranks_per_batch
        for name in [name for name in metrics if name.endswith("_steps_per_second")]:
            runtime = metrics.get(name.removesuffix("steps_per_second") + "runtime")
            if runtime and not name.startswith("train_"):
                num_steps = math.ceil(self._num_evaluated / (self.args.eval_batch_size * num_batches))
                metrics[name] = round(num_steps / runtime, 3)


__all__ = ["CountsOnceMixin"]
