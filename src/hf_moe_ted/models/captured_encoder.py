"""The encoder of a search as CUDA graphs: one per number of sentences and of source tokens, from a few fixed sizes.

Shape letters: B sentences, S source tokens, D model width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .graph_store import GraphStore, on_device, recorded, rung

_NAME = ("encoder",)
_LEAST_SOURCE = 16
_MAX_TOKENS = 16_384  # of a batch; with more tokens the device computes for longer than the host needs to start it
_KNOWN_ARGUMENTS = {"attention_mask", "use_cache", "past_key_values", "cache"}


@dataclass(frozen=True)
class _EncoderMemory:
    """The memory that the encoder reads, int64[B, S], and writes, float[B, S, D]."""

    ids: Tensor
    mask: Tensor
    hidden: Tensor

    def view(self, num_sentences: int, length: int) -> "_EncoderMemory":
        return _EncoderMemory(*(x[:num_sentences, :length] for x in (self.ids, self.mask, self.hidden)))


def why_not_encoded(config: Any, inputs: Tensor, input_name: str | None, model_kwargs: dict[str, Any]) -> str | None:
    """Why an encoder call cannot be captured, in addition to the reasons of `store_of`; `None` if it can."""
    mask = model_kwargs.get("attention_mask")
    others = {n for n, value in model_kwargs.items() if value is not None and not n.startswith("decoder_")}
    reasons = {
        "other inputs": input_name != "input_ids" or bool(others - _KNOWN_ARGUMENTS),
        "no attention mask": not isinstance(mask, Tensor) or mask.shape != inputs.shape,
        "an empty batch": 0 in inputs.shape,
        "many tokens": inputs.numel() > _MAX_TOKENS or _length_of(inputs) > config.max_position_embeddings,
        "outputs of layers": config.output_attentions or config.output_hidden_states,
        "attention other than sdpa and eager": config._attn_implementation not in ("sdpa", "eager"),
        "a capacity of experts": config.eval_capacity_factor is not None,
        "second experts by chance": config.second_expert_policy != "all",
        "untied positions": config.position_embedding_type == "tupe",
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def _length_of(ids_BS: Tensor) -> int:
    """Length for a graph: at least one more, because transformers leaves out a full mask, but not in a graph."""
    return rung(ids_BS.shape[1] + 1, _LEAST_SOURCE)


def captured_encoding(model: Any, store: GraphStore, ids_BS: Tensor, mask_BS: Tensor) -> Tensor | None:
    """Hidden states float[B, S, D] of the last layer; `None` if nothing can be recorded."""
    with on_device(ids_BS.device):
        return recorded(store, "encoder", lambda: _encoded(model, store, ids_BS, mask_BS))


def _encoded(model: Any, store: GraphStore, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
    num_sentences, length = ids_BS.shape
    shape = rung(num_sentences), _length_of(ids_BS)
    view = _memory(model, store, shape).view(*shape)
    view.ids.fill_(model.config.pad_token_id)
    view.mask.zero_()
    view.mask[:, :1].fill_(1)  # queries of sentences that only pad the batch need a key, too
    view.ids[:num_sentences, :length].copy_(ids_BS)
    view.mask[:num_sentences, :length].copy_(mask_BS)
    store.run((_NAME, *shape), lambda: _encode(model, view))
    return view.hidden[:num_sentences, :length].clone()


def _encode(model: Any, memory: _EncoderMemory) -> None:
    encoded = model.model.encoder(input_ids=memory.ids, attention_mask=memory.mask, return_dict=True)
    memory.hidden.copy_(encoded.last_hidden_state)


@torch.inference_mode(False)
def _memory(model: Any, store: GraphStore, shape: tuple[int, int]) -> _EncoderMemory:
    known = store.memories.get(_NAME)
    size = shape if known is None else tuple(map(max, shape, known.ids.shape))
    if known is None or size != known.ids.shape:
        del known
        store.forget(_NAME)
        weight = model.model.encoder.layer_norm.weight
        ids = torch.zeros(size, dtype=torch.int64, device=weight.device)
        hidden = torch.zeros(*size, model.config.d_model, dtype=weight.dtype, device=weight.device)
        store.memories[_NAME] = _EncoderMemory(ids, torch.zeros_like(ids), hidden)
    return store.memories[_NAME]


__all__ = ["captured_encoding", "why_not_encoded"]
