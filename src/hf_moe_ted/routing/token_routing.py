"""The experts of each token of a sentence and of its translation.

Shape letters: T tokens of a side, K experts per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..evaluation.evaluation_mode import evaluation_mode
from ..evaluation.parallel_text import EncodedSentence
from ..models.configuration_zcode_m3 import Side
from ..models.language_codes import encode_in, language_ids, resolve_language
from ..models.layer_names import SIDES
from ..models.router import Routing
from .teacher_forcing import TeacherForcedBatch

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # at the end of a decoded text: bytes of an incomplete character


@dataclass(frozen=True, eq=False)
class LayerTokenRouting:
    """The routing of one MoE layer for the tokens of its side.

    Attributes:
        layer: index among all layers of the side.
        num_experts: number of experts of the layer.
        expert_ids: int64[T, K], the experts that computed each token, in order of preference; `num_experts` in a slot
            that no expert computed, because it was full.
        weights: float32[T, K], the factor of each expert's output; 0 in such a slot.
        chosen_ids: int64[T, K], the experts that the router chose, whether they were full or not.
    """

    layer: int
    num_experts: int
    expert_ids: Tensor
    weights: Tensor
    chosen_ids: Tensor


@dataclass(frozen=True, eq=False)
class SideRouting:
    """
    Attributes:
        side: `"encoder"`, whose tokens are those of the source, or `"decoder"`, whose are those of the translation.
        language: its name in the tokenizer.
        tokens: T pieces of the text; special tokens as the tokenizer writes them. A character of several tokens is at
            its last token; the other tokens are empty.
        layers: the MoE layers, the lowest first; empty if all layers of the side are dense.
    """

    side: Side
    language: str
    tokens: tuple[str, ...]
    layers: tuple[LayerTokenRouting, ...]


@dataclass(frozen=True, eq=False)
class TokenRouting:
    """The routing of a sentence and its translation."""

    encoder: SideRouting
    decoder: SideRouting


def has_experts(model: Any) -> bool:
    """Whether a model has an MoE layer whose routing can be shown."""
    sparse_layers = getattr(model.config, "sparse_layers", None)  # only a ZCodeM3Config has this, also for NLLB-MoE
    return sparse_layers is not None and any(sparse_layers(side) for side in SIDES)


def token_routing(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    translation: str,
    src_lang: str,
    tgt_lang: str,
) -> TokenRouting:
    """Run a sentence and its translation through a model, and return the experts of each token.

    The decoder gets the translation (teacher forcing), so tokens may differ from those that generation used. The last
    token, which ends the text, is only predicted. The model runs as in evaluation, with `eval_capacity_factor`: here
    dropped tokens depend on these two texts alone, but in a batch they depend on the whole batch.

    Threads may call this while others use the model.

    Args:
        model: a [`ZCodeM3ForConditionalGeneration`] with at least one MoE layer.
        tokenizer: its tokenizer.
        source, translation: one sentence each.
        src_lang, tgt_lang: codes in any form that means a language of the tokenizer.

    Raises:
        ValueError: the model is dense, a language is unknown, or a text is blank or longer than the model's positions.
    """
    if not has_experts(model):
        raise ValueError(f"{type(model).__name__} is dense: it has no experts for tokens")
    known = language_ids(tokenizer)
    src_lang = resolve_language(src_lang, known, name="src_lang")
    tgt_lang = resolve_language(tgt_lang, known, name="tgt_lang")
    for name, text in (("source", source), ("translation", translation)):
        if not text.strip():
            raise ValueError(f"{name} ({text!r}) is blank: it has no tokens")
    ids = encode_in(tokenizer, source, text_target=translation, src_lang=src_lang, tgt_lang=tgt_lang, verbose=False)
    limit = model.config.max_position_embeddings
    for name, row in (("source", ids["input_ids"]), ("translation", ids["labels"])):
        if len(row) > limit:
            raise ValueError(
                f"{name} has {len(row)} tokens, but the model has positions for {limit}: give one sentence"
            )
    batch = TeacherForcedBatch.of([EncodedSentence(ids["input_ids"], ids["labels"])], model)
    with evaluation_mode(model):
        output = batch.run(model, output_routings=True)
    return TokenRouting(
        _side(model, tokenizer, "encoder", src_lang, batch.source_ids[0], output.encoder_routings),
        _side(model, tokenizer, "decoder", tgt_lang, batch.target_ids[0], output.decoder_routings),
    )


def _side(
    model: Any, tokenizer: Any, side: Side, language: str, ids_T: Tensor, routings: Sequence[Routing]
) -> SideRouting:
    layers = model.config.num_experts_per_layer(side)
    maps = model.config.expert_map_per_layer(side)
    return SideRouting(
        side,
        language,
        tuple(token_texts(tokenizer, ids_T.tolist())),
        tuple(
            LayerTokenRouting(
                layer,
                routing.num_experts,
                routing.expert_ids.cpu(),
                routing.weights.float().cpu(),
                _chosen(routing.choices.cpu(), maps.get(layer)),
            )
            for layer, routing in zip(layers, routings, strict=True)
        ),
    )


def _chosen(choices_TK: Tensor, expert_of_row: Sequence[int] | None) -> Tensor:
    return choices_TK if expert_of_row is None else torch.tensor(expert_of_row)[choices_TK]


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The piece of text that each token adds, special tokens by their names."""
    special = {*tokenizer.all_special_ids, *language_ids(tokenizer).values()}
    texts: list[str] = []
    for is_special, run in groupby(ids, special.__contains__):
        of_run = list(run)
        texts += tokenizer.convert_ids_to_tokens(of_run) if is_special else _pieces(tokenizer, of_run)
    return texts


def _pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text that each token adds to the decoded text; a single token may be a part of a character."""
    pieces, before = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        if end < len(ids):
            text = text.rstrip(_INCOMPLETE)
        pieces.append(text[len(before) :])
        before = text
    return pieces


__all__ = ["LayerTokenRouting", "SideRouting", "TokenRouting", "has_experts", "token_routing", "token_texts"]
