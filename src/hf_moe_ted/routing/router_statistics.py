"""Statistics of routers during training, in the Trainer's logs."""

from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from transformers import TrainingArguments

from ..models.losses import load_balancing_loss, router_z_loss
from ..models.router import Routing
from .router_callback import RouterCallback, sparse_routers


@dataclass
class _Sums:
    """Sums over the forwards since the last log, kept on the device so that additions wait for nothing.

    They stay in the same memory, because additions may be part of a CUDA graph.

    Attributes:
        slots_per_expert: float64[E], slots that each expert computed.
        others: float64[6], slots of real tokens, slots that no expert computed, entropies, tokens, and the router
            losses aux and z, weighted by tokens.
    """

    slots_per_expert: Tensor | None = None
    others: Tensor | None = None

    def add(self, routing: Routing) -> None:
        mask_T1 = None if routing.token_mask is None else routing.token_mask.unsqueeze(-1)
        probs_TE = routing.logits.softmax(dim=-1)
        entropy_T1 = torch.special.entr(probs_TE).sum(dim=-1, keepdim=True)
        num_tokens = torch.full((), routing.logits.shape[0], device=probs_TE.device)
        if mask_T1 is not None:
            entropy_T1, num_tokens = entropy_T1 * mask_T1, mask_T1.sum()
        num_slots = num_tokens * routing.expert_ids.shape[-1]
        computed_E = routing.num_tokens_per_expert().double()
        aux_loss = load_balancing_loss(routing.logits, routing.choices, routing.token_mask)
        z_loss = router_z_loss(routing.logits, routing.token_mask)
        others = torch.stack(
            [
                num_slots.double(),
                num_slots.double() - computed_E.sum(),
                entropy_T1.sum().double(),
                num_tokens.double(),
                aux_loss.double() * num_tokens,
                z_loss.double() * num_tokens,
            ]
        )
        if self.slots_per_expert is None or self.others is None:
            self.slots_per_expert, self.others = computed_E, others
        else:
            self.slots_per_expert += computed_E
            self.others += others

    def reset(self) -> None:
        for total in (self.slots_per_expert, self.others):
            if total is not None:
                total.zero_()

    def statistics(self) -> dict[str, Any]:
        """Means over the tokens of all processes."""
        load = reduce(self.slots_per_expert, reduction="sum")
        num_slots, num_dropped, entropy, num_tokens, aux_loss, z_loss = reduce(self.others, reduction="sum").tolist()
        load = (load / load.sum().clamp(min=1) * load.numel()).tolist()
        return {
            "load": load,
            "load_max": max(load),
            "load_min": min(load),
            "dropped": num_dropped / max(num_slots, 1),
            "entropy": entropy / max(num_tokens, 1),
            "aux_loss": aux_loss / max(num_tokens, 1),
            "z_loss": z_loss / max(num_tokens, 1),
        }


@dataclass
class _Watched:
    """A router, and its sums since the last log."""

    router: nn.Module
    sums: _Sums = field(default_factory=_Sums)


class RouterStatisticsCallback(RouterCallback):
    """Adds statistics of the routers since the last log to each training log.

    ```python
    trainer = Seq2SeqTrainer(model, args, ...)
    RouterStatisticsCallback().add_to(trainer)
    ```

    `callbacks=[RouterStatisticsCallback()]` works, too, but the reporters of `report_to` run before such a callback and
    get the logs without its numbers; `add_to` puts it before them.

    The numbers are means over all tokens without padding, of all processes, for each sparse layer, such as `encoder.3`:

    | key | |
    |---|---|
    | `router/encoder.3/load_max`, `load_min` | tokens of the most and the least used expert; 1 is an even share |
    | `router/encoder.3/dropped` | share of the chosen slots that no expert computed |
    | `router/encoder.3/entropy` | of the router's probabilities, in nats, between 0 and log(num_experts) |
    | `router/encoder.3/aux_loss`, `z_loss` | load-balancing and z-loss, before their coefficients |
    | `router/encoder.3/load` | a list: the load of every expert; in `trainer.state.log_history` only |

    In addition, each number except `load` is logged as a mean over layers, without a layer name (`router/dropped`).

    Evaluation is not counted. The hooks on the routers cost some small operations per sparse layer and step, and one
    graph break each with `torch.compile`.

    Args:
        per_expert: whether reporters get the load of every expert, `router/encoder.3/load/0` and so on.
    """

    def __init__(self, per_expert: bool = False):
        super().__init__()
        self.per_expert = per_expert
        self._watched: dict[str, _Watched] = {}

    def watch(self, model: nn.Module, args: TrainingArguments) -> list[Any]:
        self._watched = {layer: _Watched(router.module) for layer, router in sparse_routers(model).items()}
        return [watched.router.register_forward_hook(self._hook(watched)) for watched in self._watched.values()]

    @staticmethod
    def _hook(watched: _Watched) -> Any:
        @torch.compiler.disable  # otherwise there would be a graph for each layer
        @torch.no_grad()
        def add(router: nn.Module, args: Any, output: tuple[Tensor, Routing]) -> None:
            if router.training:
                watched.sums.add(output[1])

        return add

    def numbers(self) -> dict[str, Any]:
        if any(watched.sums.others is None for watched in self._watched.values()):
            return {}
        layers = {layer: watched.sums.statistics() for layer, watched in self._watched.items()}
        for watched in self._watched.values():
            watched.sums.reset()
        numbers = {f"router/{layer}/{name}": value for layer, of in layers.items() for name, value in of.items()}
        for layer, of in layers.items() if self.per_expert else ():
            numbers |= {f"router/{layer}/load/{expert}": load for expert, load in enumerate(of["load"])}
        for name in next(iter(layers.values())):
            if name != "load":
                numbers[f"router/{name}"] = sum(of[name] for of in layers.values()) / len(layers)
        return numbers


__all__ = ["RouterStatisticsCallback"]
