"""Pictures of routing, and helpers for all pictures; matplotlib is imported when one is drawn.

Shape letters: L languages, E experts.
"""

import importlib.util
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..files.messages import printable
from ..models.layer_names import SIDES, side_of
from .expert_statistics import ExpertStatistics
from .routing_similarity import routed_shares, routing_similarity

MAX_PANELS_PER_ROW = 6
MAX_LABEL = 24


def has_matplotlib() -> bool:
    """Whether pictures can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def new_figure(width: float, height: float) -> Any:
    """A figure of this size in inches, without a window or global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def as_png(figure: Any, dpi: int = 100, title: str | None = None) -> bytes:
    """The figure as the bytes of a PNG file; its title in the metadata identifies such files."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi, metadata=None if title is None else {"Title": title})
    return file.getvalue()


def label(name: str) -> str:
    """A name on one line, cut so that it leaves room for the picture."""
    line = printable(name)
    return line if len(line) <= MAX_LABEL else f"{line[: MAX_LABEL - 1]}…"


def short_name(layer: str) -> str:
    """`model.encoder.layers.1.ffn` -> `encoder 1`."""
    return f"{side_of(layer)} {layer.split('.')[3]}"


def draw_expert_shares(shares: Mapping[str, Tensor], languages: Sequence[str]) -> bytes:
    """Heat maps of the share of each language's tokens that goes to each expert; all layers have one scale.

    Args:
        shares: layer -> float64[L, E].
        languages: L names.
    """
    widths = [max(1.5, 0.12 * shares_LE.shape[1]) for shares_LE in shares.values()]
    figure = new_figure(1.5 + sum(widths), 1.2 + 0.2 * len(languages))
    axes = figure.subplots(1, len(shares), sharey=True, squeeze=False, width_ratios=widths)[0]
    largest = max(shares_LE.max().item() for shares_LE in shares.values())
    for axis, (layer, shares_LE) in zip(axes, shares.items(), strict=True):
        image = _heat_map(axis, shares_LE, languages, aspect="auto", vmin=0.0, vmax=largest)
        axis.set_title(layer, fontsize=8)
        axis.set_xlabel("expert", fontsize=7)
    bar = figure.colorbar(image, ax=axes.tolist())
    bar.set_label("share of tokens", fontsize=7)
    bar.ax.tick_params(labelsize=6)
    return as_png(figure, dpi=120)


def draw_routing_by_language(statistics: ExpertStatistics, kept: Mapping[str, Sequence[int]]) -> bytes:
    """The same for statistics, with a scale per layer, because shares are small if there are many experts.

    Args:
        statistics: expert statistics.
        kept: layer -> experts that a pruning keeps; empty for other operations.
    """
    most_languages = max(len(statistics.languages(side)) for side in SIDES)
    num_columns = min(len(statistics.layers), MAX_PANELS_PER_ROW)
    num_rows = math.ceil(len(statistics.layers) / num_columns)
    figure = new_figure(1.0 + 2.2 * num_columns, num_rows * (1.2 + 0.16 * most_languages))
    axes = figure.subplots(num_rows, num_columns, squeeze=False).flat
    for axis, layer in zip(axes, statistics.layers, strict=False):
        shares_LE = routed_shares(statistics, layer)
        _heat_map(axis, shares_LE, [*statistics.languages(side_of(layer))], aspect="auto", vmin=0.0)
        axis.set_title(f"{short_name(layer)}, 0 to {shares_LE.max().item():.0%}", fontsize=8, pad=10)
        if experts := kept.get(layer):
            above = {"clip_on": False, "transform": axis.get_xaxis_transform()}
            axis.plot(experts, [1.02] * len(experts), "v", color="tab:red", markersize=3, **above)
    for axis in axes[len(statistics.layers) :]:
        axis.set_axis_off()
    figure.supxlabel("share of tokens by expert" + (" (triangle: kept)" if kept else ""), fontsize=8)
    return as_png(figure)


def draw_language_similarity(statistics: ExpertStatistics) -> bytes:
    """Heat maps of `routing_similarity` for the sides with MoE layers."""
    similarities = {side: found for side in SIDES if (found := routing_similarity(statistics, side)) is not None}
    size = 1.5 + 0.2 * max(len(statistics.languages(side)) for side in similarities)
    figure = new_figure(1.0 + size * len(similarities), size)
    axes = figure.subplots(1, len(similarities), squeeze=False)[0]
    for axis, (side, similarity_LL) in zip(axes, similarities.items(), strict=True):
        languages = [*statistics.languages(side)]
        image = _heat_map(axis, similarity_LL, languages, vmax=1.0)
        axis.set_title(f"{side}, {'source' if side == 'encoder' else 'target'} languages", fontsize=9)
        axis.set_xticks(range(len(languages)), [*map(label, languages)], fontsize=6, rotation=90, parse_math=False)
        bar = figure.colorbar(image, ax=axis, fraction=0.046)
    bar.set_label("share of tokens to the same experts", fontsize=7)
    return as_png(figure)


def _heat_map(axis: Any, numbers: Tensor, languages: Sequence[str], **options: Any) -> Any:
    """Draw a row for each language; return the image for a color bar."""
    image = axis.imshow(numbers.numpy(), interpolation="nearest", **options)
    axis.tick_params(labelsize=6)
    axis.set_yticks(range(len(languages)), [*map(label, languages)], parse_math=False)
    return image


__all__ = [
    "as_png",
    "draw_expert_shares",
    "draw_language_similarity",
    "draw_routing_by_language",
    "has_matplotlib",
    "label",
    "new_figure",
    "short_name",
]
