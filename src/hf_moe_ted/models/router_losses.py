"""The router losses that are added to a model's loss."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .losses import load_balancing_loss, router_z_loss
from .outputs import ZCodeM3ModelOutput
from .router import Routing


def router_losses(outputs: ZCodeM3ModelOutput, device: torch.device) -> dict[str, Tensor]:
    """Load-balancing and z-loss of encoder and decoder, float32 scalars by the names of [`ZCodeM3Output`].

    They are means over the sparse layers of a side, without coefficients; 0 on `device` for a side without sparse
    layers.
    """
    losses = {}
    for side, routings in (("encoder", outputs.encoder_routings), ("decoder", outputs.decoder_routings)):
        losses[f"{side}_aux_loss"], losses[f"{side}_z_loss"] = _mean_losses(routings or (), device)
    return losses


def _mean_losses(routings: Sequence[Routing], device: torch.device) -> tuple[Tensor, Tensor]:
    if not routings:
        zero = torch.zeros((), device=device)
        return zero, zero
    layers_alike: dict[torch.Size, list[Routing]] = {}  # the same operations for all layers at once
    for routing in routings:
        layers_alike.setdefault(routing.logits.shape, []).append(routing)
    aux, z = [], []
    for layers in layers_alike.values():
        logits_LTE, token_mask = torch.stack([layer.logits for layer in layers]), layers[0].token_mask
        choices_LTK = torch.stack([layer.choices for layer in layers])
        aux.append(load_balancing_loss(logits_LTE, choices_LTK, token_mask))
        z.append(router_z_loss(logits_LTE, token_mask))
    return torch.cat(aux).mean(), torch.cat(z).mean()


__all__ = ["router_losses"]
