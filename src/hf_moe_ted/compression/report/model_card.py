"""The model card of a compressed model: the card of its source, with a section on the compression."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from ...evaluation.translation_card import CARD_NAME, hub_languages
from .markdown_text import as_text

_BEGIN = "<!-- compression report of hf_moe_ted: begin -->"
_END = "<!-- compression report of hf_moe_ted: end -->"
_SECTION = re.compile(rf"{_BEGIN}.*?{_END}\n*", re.DOTALL)
# parts of an older section, which stays as the source's history, that name files that are not copied; early sections,
# with descriptions without capitals, have a line in italics below
_LINKS = re.compile(
    r"^!\[[a-z ]*\]\(compression_report/.*\)\n+\*.*\*\n+|^!\[.*\]\(compression_report/.*\)\n+"
    r"| The whole report: \[report.md\]\(report.md\)\.",
    re.M,
)
_SCORES = re.compile(
    r"^(#{2,6} (?:scores|results|metrics|benchmarks?|evaluation(?: results)?|translation quality))[ \t]*$",
    re.MULTILINE | re.IGNORECASE,
)
_METADATA_AND_TITLE = re.compile(r"\A(?:---\n.*?\n---\n)?\s*(?:# [^\n]*\n)?", re.DOTALL)
_IN_HUB_CACHE = re.compile(r"models--(?P<name>[^/]+)/snapshots/[^/]+/?$")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def hub_id(source: str) -> str | None:
    """The id of a model on the Hub; `None` if it has none.

    Args:
        source: what `from_pretrained` was given: an id, a folder, or a folder in the cache of the Hub.
    """
    if found := _IN_HUB_CACHE.search(source):
        return found["name"].replace("--", "/")
    return source if _HUB_ID.fullmatch(source) and not Path(source).exists() else None


def display_name(source: str) -> str:
    """The id on the Hub, or the name of the folder."""
    return hub_id(source) or Path(source).name


def derived_card(sources: Sequence[str], relation: str | None = None) -> ModelCard:
    """The card of a model that is made from others; `with_section` adds a description of the compression.

    Text and metadata come from the first source; `base_model` lists the ids of sources on the Hub. Scores in the
    metadata are left out, and headings of scores say which model they describe. If the source has no card, the new one
    has the metadata of a translation model and a title.

    Args:
        sources: what `from_pretrained` was given.
        relation: `base_model_relation` of the Hub, such as `"quantized"` or `"merge"`.

    Raises:
        ValueError: the metadata of the first source's card cannot be read.
    """
    path = Path(sources[0]) / CARD_NAME
    if path.is_file():
        try:
            card = ModelCard.load(path)
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"the metadata of {path} cannot be read: {error}; correct or remove the file") from error
        text = _LINKS.sub("", card.text.replace(_BEGIN, "").replace(_END, ""))
        card.text = _SCORES.sub(r"\1 of the model from which this one was made", text)
        card.data.eval_results = card.data.model_name = None
    else:
        metadata = ModelCardData(library_name="transformers", pipeline_tag="translation")
        card = ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n# Made of {as_text(display_name(sources[0]))}\n")
    if ids := [identity for identity in map(hub_id, sources) if identity is not None]:
        card.data.base_model = ids[0] if len(ids) == 1 else ids
        card.data.base_model_relation = relation
    return card


def with_languages(card: str, languages: Sequence[str]) -> str:
    """Add to a card from `derived_card` the languages that its model serves.

    Args:
        card: text from `derived_card`; the text of a card that has a section already is returned unchanged.
        languages: codes in any form; without any, the card is returned unchanged.
    """
    if not languages or _SECTION.search(card):
        return card
    derived = ModelCard(card)
    metadata: Any = derived.data
    metadata.language = hub_languages(languages)
    return str(derived)


def with_section(card: str, section: str) -> str:
    """Put the section behind the title of a card; it replaces an earlier one."""
    card = card.replace("\r\n", "\n")
    marked = f"{_BEGIN}\n{section.strip()}\n{_END}\n\n"
    if _SECTION.search(card):
        return _SECTION.sub(lambda _: marked, card, count=1)
    head = _METADATA_AND_TITLE.match(card)
    assert head is not None
    return f"{head[0].rstrip()}\n\n{marked}{card[head.end() :].lstrip()}".lstrip()


__all__ = ["CARD_NAME", "derived_card", "display_name", "hub_id", "with_languages", "with_section"]
