"""A model card with translation quality: a table of directions, and metadata for the Hub."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from transformers.utils import logging

from ..files.output import files_into
from ..models.language_codes import parse_language
from ..models.language_detection import MIN_DETECTED_LETTERS
from .translation_quality import DirectionQuality, MeanQuality, TranslationQuality

logger = logging.get_logger(__name__)

CARD_NAME = "README.md"

_BEGIN = "<!-- translation quality of hf_moe_ted: begin -->"
_END = "<!-- translation quality of hf_moe_ted: end -->"
_SECTION = re.compile(rf"{_BEGIN}.*?{_END}\n*", re.DOTALL)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def hub_languages(languages: Iterable[str]) -> list[str]:
    """Language codes in the form of Hub cards: ISO 639, without script and country, each once.

    Args:
        languages: codes such as `"en"`, `"zh-CN"` and `"deu_Latn"`; codes that are not in ISO 639 are left out.
    """
    codes = []
    for language in languages:
        try:
            codes.append(parse_language(language).language)
        except ValueError:
            logger.warning("language %r is left out of the model card: it is not an ISO 639 code", language)
    return list(dict.fromkeys(codes))


def write_translation_card(
    model_dir: str | os.PathLike[str], quality: TranslationQuality, *, base_model: str | None = None
) -> Path:
    """Write the translation quality of a model into its model card, `README.md`.

    An existing card keeps its text and other metadata; a section from an earlier call is replaced. The card lists the
    languages of the measured directions.

    Args:
        model_dir: folder of the model, with its `config.json`.
        quality: what `evaluate_translation` returned for this model.
        base_model: Hub id of the model that was fine-tuned.

    Returns:
        the path of the card.

    Raises:
        ValueError: before anything is written: `model_dir` is not the folder of a model, the metadata of its card
            cannot be read, or `base_model` is not a Hub id.
    """
    folder = Path(model_dir)
    if not (folder / "config.json").is_file():
        raise ValueError(f"model_dir ({folder}) has no config.json; give the folder that save_pretrained wrote")
    if base_model is not None and not _HUB_ID.fullmatch(base_model):
        raise ValueError(f"base_model ({base_model!r}) must be an id on the Hub, such as 'organization/name', or None")
    if quality.is_of_other_folder(folder):
        logger.warning("the quality was measured with %s, and is written into the card of %s", quality.model, folder)
    card = _card_of(folder)
    metadata: Any = card.data
    metadata.language = hub_languages(language for pair in quality.directions for language in pair)
    if base_model is not None:
        metadata.base_model = base_model
    section = f"{_BEGIN}\n{_section(quality)}\n{_END}\n"
    text = card.text
    card.text = _SECTION.sub(lambda _: section, text) if _SECTION.search(text) else f"{text.rstrip()}\n\n{section}"
    with files_into(folder) as staged:
        (staged / CARD_NAME).write_bytes(str(card).encode("utf-8"))
    return folder / CARD_NAME


def _card_of(folder: Path) -> ModelCard:
    path = folder / CARD_NAME
    if not path.is_file():
        data = ModelCardData(library_name="transformers", pipeline_tag="translation")
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {folder.resolve().name}\n")
    try:
        return ModelCard.load(path)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"the metadata of {path} cannot be read: {error}; correct or remove the file") from error


def _section(quality: TranslationQuality) -> str:
    rows = [_row("-".join(pair), one.num_sentences, one) for pair, one in quality.directions.items()]
    for name, pairs in quality.groups().items() if len(rows) > 1 else ():
        num_sentences = sum(quality.directions[pair].num_sentences for pair in pairs)
        rows.append(_row(f"**{name}**", num_sentences, quality.mean(pairs)))
    directions = quality.directions.values()
    tokenizers = ", ".join(sorted({direction.bleu_tokenizer for direction in directions}))
    is_bleu_known = all(direction.bleu is not None for direction in directions)
    return "\n".join(
        [
            "## Translation quality",
            "",
            "| direction | sentences | chrF | BLEU | length ratio | off target |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            f"BLEU (tokenizers: {tokenizers}) and chrF are sacreBLEU's. The length ratio counts characters. Off target",
            f"is the share of translations with {MIN_DETECTED_LETTERS} letters or more whose detected language is not",
            "the target language.",
            *([] if is_bleu_known else ["BLEU is empty where no reference has four tokens."]),
            f"Beams: {quality.num_beams}, at most {quality.max_new_tokens} new tokens.",
        ]
    )


def _row(name: str, num_sentences: int, scores: DirectionQuality | MeanQuality) -> str:
    off_target = "" if scores.off_target is None else f"{scores.off_target:.1%}"
    bleu = "" if scores.bleu is None else f"{scores.bleu:.1f}"
    numbers = f"{scores.chrf:.1f} | {bleu} | {scores.length_ratio:.2f} | {off_target}"
    return f"| {name} | {num_sentences:,} | {numbers} |"


__all__ = ["CARD_NAME", "hub_languages", "write_translation_card"]
