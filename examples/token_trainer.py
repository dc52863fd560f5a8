"""Training on `TokenPairs`, and held-out losses that are exact for each direction.

Shape letters: B rows, L positions, V words, T tokens, E experts, G components.
"""

import time
from collections.abc import Iterator, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
import torch
from multitask_runs import eval_capacity
from token_pairs import TokenPairs
from torch import Tensor, nn
from torch.nn import functional as F

from hf_moe_ted import MultitaskSeq2SeqTrainer


class TokenPairsTrainer(MultitaskSeq2SeqTrainer):
    """[`MultitaskSeq2SeqTrainer`] on `TokenPairs`, whose evaluation is exact for each direction.

    `evaluate` gives `eval_loss`, nats per target token of all held-out examples together, tag and end counted, and
    leaves in the log history `direction_losses`, the same of each direction ("en-de"). The Trainer's own is a mean of
    the means of batches. Of sparse models it has `expert_load`, a list for each sparse layer ("encoder.1"), 1 being an
    even share, and the means over layers of the busiest expert and of the share of tokens that no expert computes.
    Training has no hooks: nothing that is not part of it counts into its seconds.

    Args:
        eval_capacities: values of `eval_capacity_factor`, with which sparse models are evaluated besides:
            `eval_capacity_1_25_loss`, for `None` `eval_no_capacity_loss`.
        first_step: of a training whose optimizer is new there. The schedule goes on from this step, after another
            warmup, as the first moments are those of few gradients.
    """

    def __init__(
        self, *args: Any, eval_capacities: Sequence[float | None] = (), first_step: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.eval_capacities = eval_capacities
        self.first_step = first_step

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        scheduler: Any = super().create_scheduler(num_training_steps, optimizer)
        if self.first_step:
            warmup = self.args.get_warmup_steps(num_training_steps)
            scheduler.lr_lambdas = [
                partial(_factor_behind, factor, self.first_step, warmup) for factor in scheduler.lr_lambdas
            ]
        return scheduler

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        data: TokenPairs = self.eval_dataset if eval_dataset is None else eval_dataset
        seconds = -_now(data.device)
        with self.compute_loss_context_manager(), ExpertLoad(self.model) as load:
            nats_G, tokens_G = self._held_out_nats(data)
        metrics = {f"{metric_key_prefix}_loss": float(nats_G.sum() / tokens_G.sum()), **load.means()}
        for capacity in self.eval_capacities if metrics.keys() & {"router/dropped"} else ():
            name = "no_capacity" if capacity is None else f"capacity_{capacity}".replace(".", "_")
            with self.compute_loss_context_manager(), eval_capacity(self.model, capacity):
                nats, _ = self._held_out_nats(data)
            metrics[f"{metric_key_prefix}_{name}_loss"] = float(nats.sum() / tokens_G.sum())
        metrics[f"{metric_key_prefix}_runtime"] = seconds + _now(data.device)
        self.log(metrics)
        self.state.log_history[-1]["expert_load"] = load.shares()
        losses = dict(zip(data.directions, (nats_G / tokens_G).tolist(), strict=True))
        self.state.log_history[-1]["direction_losses"] = losses
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _held_out_nats(self, data: TokenPairs) -> tuple[np.ndarray, np.ndarray]:
        """Routers that drop tokens at random draw in evaluation, too: training has the same numbers with or without."""
        with torch.random.fork_rng([data.device] if data.device.type == "cuda" else []):
            torch.manual_seed(0)
            return held_out_nats(self.model, data, self.args.max_tokens_per_batch)


def _factor_behind(factor: Any, first_step: int, warmup: int, step: int) -> float:
    """Of the learning rate, `step` steps behind `first_step`."""
    return float(min(1.0, step / max(1, warmup)) * factor(first_step + step))


class ExpertLoad:
    """Counts what the experts of each sparse layer get while it is entered."""

    def __init__(self, model: nn.Module):
        self._routers = {
            ".".join(name.split(".")[-5:-2:2]): module
            for name, module in model.named_modules()
            if name.endswith(".ffn.router")
        }
        self._counts: dict[str, Tensor] = {}
        self._num_tokens: dict[str, Tensor] = {}

    def __enter__(self) -> "ExpertLoad":
        self._handles = [
            router.register_forward_hook(partial(self._count, layer)) for layer, router in self._routers.items()
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _count(self, layer: str, router: nn.Module, args: Any, output: Any) -> None:
        routing = output[1]
        mask_T = torch.ones_like(routing.expert_ids[:, 0]) if routing.token_mask is None else routing.token_mask
        self._counts[layer] = self._counts.get(layer, 0) + routing.num_tokens_per_expert()
        self._num_tokens[layer] = self._num_tokens.get(layer, 0) + mask_T.sum() * routing.expert_ids.shape[1]

    def shares(self) -> dict[str, list[float]]:
        """Tokens of each expert by layer, in parts of an even share."""
        return {
            layer: (counts_E / counts_E.sum().clamp(min=1) * len(counts_E)).tolist()
            for layer, counts_E in self._counts.items()
        }

    def means(self) -> dict[str, float]:
        """Means over the layers: busiest expert, and share of the tokens that no expert computes; none if dense."""
        if not self._counts:
            return {}
        kept = [float(counts_E.sum() / self._num_tokens[layer]) for layer, counts_E in self._counts.items()]
        busiest = [max(of_layer) for of_layer in self.shares().values()]
        return {"router/load_max": fmean(busiest), "router/dropped": 1 - fmean(kept)}


@torch.no_grad()
def held_out_nats(model: nn.Module, data: TokenPairs, max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Cross-entropy without smoothing of the targets of each component, in nats, and their tokens, float64[G] each."""
    was_training = model.training
    model.eval()
    sums_G2 = torch.zeros(len(data.components), 2, dtype=torch.float64, device=data.device)
    components_N = torch.from_numpy(data.component_numbers.astype(np.int64)).to(data.device)
    for examples, lengths in _batches_by_length(data, max_tokens):
        batch = data.batch(examples, lengths)
        labels_BL = batch.pop("labels")
        logits_BLV = model(**batch, decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels_BL)).logits
        # `cross_entropy` gives 0 where there is padding
        nats_B = F.cross_entropy(logits_BLV.float().mT, labels_BL, reduction="none").double().sum(dim=1)
        found_B2 = torch.stack([nats_B, (labels_BL != -100).sum(dim=1).double()], dim=1)
        sums_G2.index_add_(0, components_N[torch.from_numpy(examples).to(data.device)], found_B2)
    model.train(was_training)
    nats_G, tokens_G = sums_G2.T.cpu().numpy()
    return nats_G, tokens_G


def _batches_by_length(data: TokenPairs, max_tokens: int) -> Iterator[tuple[np.ndarray, tuple[int, int]]]:
    """Numbers of examples of similar length, and what they are padded to."""
    random = np.random.default_rng(0)
    order = np.argsort(data.lengths.max(axis=1), kind="stable")
    start = 0
    while start < len(order):
        longest = np.maximum.accumulate(data.lengths[order[start:]], axis=0).sum(axis=1)
        num_rows = max(1, int(np.searchsorted(longest * np.arange(1, len(longest) + 1), max_tokens, side="right")))
        examples = order[start : start + num_rows]
        # as in training: who is behind in a batch, and goes without a full expert, has no certain length or direction
        yield random.permutation(examples), tuple(data.lengths[examples].max(axis=0).tolist())
        start += num_rows


def _now(device: torch.device) -> float:
    """Seconds, when the device is done with what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
