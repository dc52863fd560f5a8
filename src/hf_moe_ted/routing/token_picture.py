"""HTML pictures of routing: tokens in the colour of their expert, and similar languages.

Every text is escaped; the pictures need no script, no style sheet and no network.
"""

from collections.abc import Sequence
from colorsys import hls_to_rgb
from html import escape
from typing import NamedTuple

from ..models.configuration_zcode_m3 import Side
from ..models.language_codes import is_right_to_left
from .expert_statistics import ExpertStatistics
from .routing_similarity import routing_similarity
from .token_routing import LayerTokenRouting, SideRouting, TokenRouting

GOLDEN_ANGLE = 0.381966  # part of a full turn of the hue: neighbours differ clearly, for any number of experts
NUM_EVEN_HUES = 12  # more cannot be distinguished by hue alone
_LIGHTNESSES = (0.82, 0.32, 0.6, 0.45)
_BOX = "display:inline-block;margin:1px;padding:1px 5px;border-radius:4px;white-space:pre;line-height:1.5;"
_INK = "color:inherit;"  # overrides style sheets around the picture
_FULL = "background:transparent;color:inherit;border:1px dashed currentColor;"
_CAPTION = (
    "<p>Each token has the number and the colour of its expert; point at a token to see the router's weights.</p>"
)
_TEXT_OF_SIDE = {"encoder": "Source, in the encoder", "decoder": "Translation, in the decoder"}


class ExpertColour(NamedTuple):
    """
    Attributes:
        background: `#rrggbb`.
        ink: black or white, whichever is easier to read on it.
    """

    background: str
    ink: str


def expert_colours(num_experts: int) -> list[ExpertColour]:
    """A colour for each expert: hue and lightness both change from one to the next."""
    colours = []
    for expert in range(num_experts):
        hue = expert / num_experts if num_experts <= NUM_EVEN_HUES else expert * GOLDEN_ANGLE % 1.0
        red, green, blue = hls_to_rgb(hue, _LIGHTNESSES[expert % len(_LIGHTNESSES)], 0.65)
        background = "#" + "".join(f"{round(255 * value):02x}" for value in (red, green, blue))
        luminance = relative_luminance(background)
        is_light = (luminance + 0.05) / 0.05 >= 1.05 / (luminance + 0.05)
        colours.append(ExpertColour(background, "#000000" if is_light else "#ffffff"))
    return colours


def relative_luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2) of a color `#rrggbb`, from 0 for black to 1 for white."""
    values = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def token_picture(routing: TokenRouting) -> str:
    """HTML: for each MoE layer a row with the tokens of its side, in the colour and with the number of their expert.

    A token with several experts has the colour of the first, and a line in the colour of the second; its title lists
    all of them with their weights. A token that no expert computed, because its experts were full, has a dashed border
    and no colour.
    """
    return _CAPTION + "".join(_side(side) for side in (routing.encoder, routing.decoder))


def _side(side: SideRouting) -> str:
    heading = f"<h4>{_TEXT_OF_SIDE[side.side]} ({escape(side.language)})</h4>"
    if not side.layers:
        return f"{heading}<p>All layers of the {side.side} are dense: it has no experts.</p>"
    direction = "rtl" if is_right_to_left(side.language) else "ltr"
    rows = "".join(
        f'<tr><th scope="row" style="text-align:start;vertical-align:top;white-space:nowrap;padding-inline-end:8px;">'
        f'layer {layer.layer}</th><td dir="{direction}">{_boxes(side.tokens, layer)}</td></tr>'
        for layer in side.layers
    )
    return f'{heading}<table class="token-routing" data-side="{side.side}"><tbody>{rows}</tbody></table>'


def _boxes(tokens: Sequence[str], layer: LayerTokenRouting) -> str:
    colours = expert_colours(layer.num_experts)
    rows = zip(tokens, layer.expert_ids.tolist(), layer.chosen_ids.tolist(), layer.weights.tolist(), strict=True)
    return "".join(_box(*row, colours) for row in rows)


def _box(
    token: str, computed: list[int], chosen: list[int], weights: list[float], colours: Sequence[ExpertColour]
) -> str:
    experts = [expert for expert in computed if expert < len(colours)]
    if experts:
        colour = colours[experts[0]]
        style = f"background:{colour.background};color:{colour.ink};"
        if len(experts) > 1:
            style += f"box-shadow:inset 0 -4px {colours[experts[1]].background};"
        numbers = "+".join(map(str, experts))
    else:
        style, numbers = _FULL, "full"
    text = escape(token.replace("\n", "⏎").replace("\r", "")) or "·"
    title = _title(computed, chosen, weights)
    return (
        f'<span class="token" data-experts="{numbers}" style="{_BOX}{style}" title="{title}">'
        f'<bdi style="{_INK}">{text}</bdi><sub style="{_INK}margin-inline-start:3px;">{numbers}</sub></span>'
    )


def _title(computed: Sequence[int], chosen: Sequence[int], weights: Sequence[float]) -> str:
    """`expert 3: 0.82, expert 5: full`."""
    return ", ".join(
        f"expert {expert}: {weight:.3f}" if expert == by else f"expert {expert}: full, not computed"
        for by, expert, weight in zip(computed, chosen, weights, strict=True)
    )


def similar_languages(
    statistics: ExpertStatistics, side: Side, language: str, limit: int = 5
) -> list[tuple[str, float]]:
    """The languages with the most similar routing, and the share of their tokens that goes to the same experts.

    Args:
        statistics: expert statistics of the model.
        side: source languages of the encoder, or target languages of the decoder.
        language: the language, by its name in the statistics.
        limit: largest number of languages.

    Returns:
        Languages and `routing_similarity`, the highest first; empty if the statistics lack the language, or the side
        has no experts.
    """
    languages = list(statistics.languages(side))
    similarity_LL = routing_similarity(statistics, side)
    if similarity_LL is None or language not in languages:
        return []
    values = similarity_LL[languages.index(language)].tolist()
    others = [(other, value) for other, value in zip(languages, values, strict=True) if other != language]
    return sorted(others, key=lambda pair: -pair[1])[:limit]


def similar_languages_picture(statistics: ExpertStatistics, src_lang: str, tgt_lang: str) -> str:
    """HTML: languages similar to the source language in the encoder, and to the target language in the decoder."""
    sides: list[tuple[Side, str]] = [("encoder", src_lang), ("decoder", tgt_lang)]
    return "".join(
        f"<h4>Languages routed like {escape(language)}, in the {side}</h4>"
        f"{_bars(similar_languages(statistics, side, language))}"
        for side, language in sides
    )


def _bars(languages: Sequence[tuple[str, float]]) -> str:
    if not languages:
        return "<p>The statistics have no other language to compare.</p>"
    rows = "".join(
        f'<tr><th scope="row" style="text-align:start;padding-inline-end:8px;">{escape(language)}</th>'
        f'<td style="width:12em;"><div style="background:currentColor;opacity:0.6;height:0.7em;width:{value:.1%};">'
        f"</div></td><td>{value:.2f}</td></tr>"
        for language, value in languages
    )
    return f'<table class="similar-languages"><tbody>{rows}</tbody></table>'


__all__ = [
    "ExpertColour",
    "expert_colours",
    "relative_luminance",
    "similar_languages",
    "similar_languages_picture",
    "token_picture",
]
