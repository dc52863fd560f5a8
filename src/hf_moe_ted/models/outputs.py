"""The outputs of the model."""

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import MoEModelOutput, Seq2SeqMoEModelOutput, Seq2SeqMoEOutput

from .configuration_zcode_m3 import ZCodeM3Config
from .router import Routing

# transformers 5.24 renamed `past_key_values`, in arguments and in outputs
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(Seq2SeqMoEOutput)} else "past_key_values"


@dataclass
class ZCodeM3ModelOutput(Seq2SeqMoEModelOutput):
    """`Seq2SeqMoEModelOutput` with the [`Routing`] of each sparse layer if `output_routings=True` is given."""

    encoder_routings: tuple[Routing, ...] | None = None
    decoder_routings: tuple[Routing, ...] | None = None


@dataclass
class ZCodeM3Output(Seq2SeqMoEOutput):
    """`Seq2SeqMoEOutput` with the [`Routing`] of each sparse layer if `output_routings=True` is given.

    `encoder_aux_loss`, `decoder_aux_loss`, `encoder_z_loss` and `decoder_z_loss` are means over the sparse layers of
    a side, without coefficients; `None` unless the router losses are computed, 0 for a side without sparse layers.
    """

    encoder_routings: tuple[Routing, ...] | None = None
    decoder_routings: tuple[Routing, ...] | None = None


class RouterOutputs:
    """Collects what the routers of an encoder or a decoder decide in a call, as far as the call requests it.

    Args:
        config: gives the default of `output_router_logits`.
        output_router_logits, output_routings: arguments of the call.
    """

    def __init__(self, config: ZCodeM3Config, output_router_logits: bool | None, output_routings: bool):
        self.with_logits = config.output_router_logits if output_router_logits is None else output_router_logits
        self.with_routings = output_routings
        self._routings: list[Routing] = []

    def keep(self, routing: Routing | None) -> None:
        """Take the router output of a layer; `None` for a dense one."""
        if routing is not None and (self.with_logits or self.with_routings):
            self._routings.append(routing)

    def add_to(self, output: Any) -> Any:
        """Add `router_logits` and `routings` after the other fields of an output."""
        if self.with_logits:
            output["router_logits"] = tuple(routing.logits for routing in self._routings)
        if self.with_routings:
            output["routings"] = tuple(self._routings)
        return output


def encoder_outputs_of(encoder_outputs: Any) -> Any:
    """The encoder's outputs by name; a tuple has the last hidden state, hidden states and attentions."""
    if hasattr(encoder_outputs, "last_hidden_state"):
        return encoder_outputs
    return MoEModelOutput(
        last_hidden_state=encoder_outputs[0],
        hidden_states=encoder_outputs[1] if len(encoder_outputs) > 1 else None,
        attentions=encoder_outputs[2] if len(encoder_outputs) > 2 else None,
    )


def model_output(encoder_outputs: Any, decoder_outputs: Any) -> ZCodeM3ModelOutput:
    """The output of the model, made from those of encoder and decoder."""
    return ZCodeM3ModelOutput(
        last_hidden_state=decoder_outputs.last_hidden_state,
        **{CACHE_NAME: decoder_outputs.get(CACHE_NAME)},
        decoder_hidden_states=decoder_outputs.hidden_states,
        decoder_attentions=decoder_outputs.attentions,
        cross_attentions=decoder_outputs.cross_attentions,
        encoder_last_hidden_state=encoder_outputs.last_hidden_state,
        encoder_hidden_states=encoder_outputs.hidden_states,
        encoder_attentions=encoder_outputs.attentions,
        encoder_router_logits=encoder_outputs.get("router_logits"),
        decoder_router_logits=decoder_outputs.get("router_logits"),
        encoder_routings=encoder_outputs.get("routings"),
        decoder_routings=decoder_outputs.get("routings"),
    )


def output_with_head(
    outputs: ZCodeM3ModelOutput, logits: Tensor, losses: dict[str, Tensor], with_routings: bool
) -> ZCodeM3Output:
    """The output of the model with a head; `losses` has the names of its fields as keys."""
    return ZCodeM3Output(
        **losses,  # type: ignore[arg-type]
        logits=logits,
        **{CACHE_NAME: outputs.get(CACHE_NAME)},
        decoder_hidden_states=outputs.decoder_hidden_states,
        decoder_attentions=outputs.decoder_attentions,
        decoder_router_logits=outputs.decoder_router_logits,
        cross_attentions=outputs.cross_attentions,
        encoder_last_hidden_state=outputs.encoder_last_hidden_state,
        encoder_hidden_states=outputs.encoder_hidden_states,
        encoder_attentions=outputs.encoder_attentions,
        encoder_router_logits=outputs.encoder_router_logits,
        encoder_routings=outputs.encoder_routings if with_routings else None,
        decoder_routings=outputs.decoder_routings if with_routings else None,
    )


__all__ = [
    "CACHE_NAME",
    "RouterOutputs",
    "ZCodeM3ModelOutput",
    "ZCodeM3Output",
    "encoder_outputs_of",
    "model_output",
    "output_with_head",
]
