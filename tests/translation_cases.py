"""A tiny model whose routers choose differently, a tokenizer of bytes, and sentences in three languages."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hf_moe_ted import DirectionQuality, TranslationQuality, ZCodeM3ForConditionalGeneration, ZCodeM3Tokenizer
from hf_moe_ted.testing import tiny_config

MakeModel = Callable[..., ZCodeM3ForConditionalGeneration]

TEXTS = {
    "en": ("close all tabs", "save", "the disk is full, so nothing was saved", "yes"),
    "de": ("alle Tabs schließen", "speichern", "nichts gespeichert: die Festplatte ist voll", "ja"),
    "fr": ("fermer tous les onglets", "enregistrer", "le disque est plein", "oui, bien sûr"),
}


def parallel_rows() -> list[dict[str, str]]:
    """Four sentences in each of the six directions, pairs mixed."""
    return [
        {"source": TEXTS[src][i], "target": TEXTS[tgt][i], "src_lang": src, "tgt_lang": tgt}
        for i in range(4)
        for src in TEXTS
        for tgt in TEXTS
        if src != tgt
    ]


def tiny_model(**overrides: Any) -> ZCodeM3ForConditionalGeneration:
    """Weights, biases and norms that all matter, and routers that send tokens to every expert."""
    model = ZCodeM3ForConditionalGeneration(
        tiny_config(**{"vocab_size": 272, "max_position_embeddings": 96, **overrides})
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if name.endswith("layer_norm.weight") else 0.0
            parameter.copy_(mean + 0.15 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def quality_of(chrf: dict[tuple[str, str], float], **others: Any) -> TranslationQuality:
    """A quality of these directions; other values are those of all of them, or by direction, or of the model."""
    of_model = {
        "model": "a",
        "batch_size": 32,
        "num_beams": 1,
        "max_new_tokens": 128,
        "device": "cpu",
        "dtype": "float32",
        "num_bytes": 1000,
        "peak_memory_bytes": None,
        "also": None,
    }
    of_model |= {name: others.pop(name) for name in [*others] if name in of_model}
    directions = {}
    for pair, value in chrf.items():
        fields = {
            "num_sentences": 10,
            "bleu": value / 2,
            "bleu_tokenizer": "13a",
            "chrf": value,
            "source_chrf": 3.0,
            "length_ratio": 1.0,
            "off_target": 0.0,
            "reference_off_target": 0.0,
            "num_cut": 0,
            "seconds": 0.5,
            "text_sha256": "x",
        }
        given = {
            name: o.get(pair, fields.get(name)) if isinstance(o, dict) and isinstance(next(iter(o)), tuple) else o
            for name, o in others.items()
        }
        directions[pair] = DirectionQuality(**{**fields, **given})
    return TranslationQuality(directions=directions, **of_model)


@pytest.fixture
def make_quality() -> Callable[..., TranslationQuality]:
    return quality_of


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    return tiny_model


@pytest.fixture
def tokenizer() -> ZCodeM3Tokenizer:
    return ZCodeM3Tokenizer(languages=[*TEXTS])


@pytest.fixture
def rows() -> list[dict[str, str]]:
    return parallel_rows()
