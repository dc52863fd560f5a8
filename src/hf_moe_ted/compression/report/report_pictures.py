"""The pictures of a compression report; matplotlib is needed for them, and for nothing else."""

import importlib.util
import io
import math
from collections.abc import Mapping
from typing import Any

from ...evaluation.translation_quality import TranslationQuality
from ...models.layer_names import SIDES, side_of
from ...routing.expert_statistics import ExpertStatistics
from ...routing.routing_similarity import routed_shares, routing_similarity
from .compression_report import CompressionReport, FewerExpertsReport, PruningReport
from .markdown_text import printable

# file name -> what it shows, in the order of the report
PICTURES = {
    "quality.png": "chrF and length ratio of each direction",
    "experts_per_layer.png": "Experts of each MoE layer",
    "routing_by_language.png": "Share of each language's tokens that is routed to each expert, by layer: source "
    "languages in the encoder, target languages in the decoder",
    "language_similarity.png": "How much of two languages' tokens goes to the same experts",
}

MAX_PANELS_PER_ROW = 6
MAX_LABEL = 24
_DPI = 100


def has_matplotlib() -> bool:
    """Whether pictures can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_pictures(
    report: CompressionReport, qualities: Mapping[str, TranslationQuality], statistics: ExpertStatistics | None
) -> dict[str, bytes]:
    """Those of `PICTURES` that there are data for, as PNG, by file name; none without matplotlib."""
    if not has_matplotlib():
        return {}
    pictures = {}
    if qualities:
        pictures["quality.png"] = _quality(qualities)
    if isinstance(report, FewerExpertsReport):
        pictures["experts_per_layer.png"] = _experts_per_layer(report)
    if statistics is not None:
        pictures["routing_by_language.png"] = _routing_by_language(report, statistics)
        pictures["language_similarity.png"] = _language_similarity(statistics)
    return pictures


def short_name(layer: str) -> str:
    """`model.encoder.layers.1.ffn` -> `encoder 1`."""
    return f"{side_of(layer)} {layer.split('.')[3]}"


def _figure(width: float, height: float) -> Any:
    """A figure of this many inches that belongs to no window and no global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _label(name: str) -> str:
    """A name on one line, of a length that leaves room for the picture."""
    line = printable(name)
    return line if len(line) <= MAX_LABEL else f"{line[: MAX_LABEL - 1]}…"


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DPI)
    return file.getvalue()


def _quality(qualities: Mapping[str, TranslationQuality]) -> bytes:
    pairs = list(next(iter(qualities.values())).directions)
    figure = _figure(9, 1.2 + 0.18 * len(pairs))
    axes = figure.subplots(1, 2, sharey=True)
    for axis, name, title in zip(axes, ("chrf", "length_ratio"), ("chrF", "length ratio"), strict=True):
        values = {
            label: [getattr(quality.directions[pair], name) for pair in pairs] for label, quality in qualities.items()
        }
        for row, of_direction in enumerate(zip(*values.values(), strict=True)):
            axis.plot(of_direction, [row] * len(of_direction), color="lightgray", zorder=1)
        for (label, of_label), marker in zip(values.items(), "osD", strict=False):
            axis.scatter(of_label, range(len(pairs)), s=14, marker=marker, label=label, zorder=2)
        axis.set(title=title, ylim=(len(pairs) - 0.5, -0.5))
    axes[0].set_yticks(range(len(pairs)), [_label("-".join(pair)) for pair in pairs], fontsize=7, parse_math=False)
    axes[1].axvline(1.0, color="gray", linewidth=0.8)
    axes[1].legend(fontsize=8)
    return _png(figure)


def _experts_per_layer(report: FewerExpertsReport) -> bytes:
    layers = list(report.num_experts_before)
    figure = _figure(2.5 + 0.6 * len(layers), 2.8)
    axis = figure.subplots()
    axis.bar(range(len(layers)), report.num_experts_before.values(), color="lightgray", label="before")
    bars = axis.bar(range(len(layers)), report.num_experts_after.values(), width=0.5, label="after")
    axis.bar_label(bars, fontsize=8)
    axis.set_xticks(range(len(layers)), [short_name(layer) for layer in layers], rotation=45, ha="right", fontsize=8)
    axis.set(ylabel="experts")
    figure.legend(fontsize=8, loc="outside right upper")
    return _png(figure)


def _routing_by_language(report: CompressionReport, statistics: ExpertStatistics) -> bytes:
    kept = report.kept_experts if isinstance(report, PruningReport) else {}
    most_languages = max(len(statistics.languages(side)) for side in SIDES)
    num_columns = min(len(statistics.layers), MAX_PANELS_PER_ROW)
    num_rows = math.ceil(len(statistics.layers) / num_columns)
    figure = _figure(1.0 + 2.2 * num_columns, num_rows * (1.2 + 0.16 * most_languages))
    axes = figure.subplots(num_rows, num_columns, squeeze=False).flat
    for axis, layer in zip(axes, statistics.layers, strict=False):
        shares_LE = routed_shares(statistics, layer)
        languages = list(statistics.languages(side_of(layer)))
        # each with its own scale: shares are small where there are many experts
        axis.imshow(shares_LE.numpy(), aspect="auto", cmap="viridis", vmin=0.0, interpolation="nearest")
        axis.set_title(f"{short_name(layer)}, 0 to {shares_LE.max().item():.0%}", fontsize=8, pad=10)
        axis.set_yticks(range(len(languages)), [*map(_label, languages)], fontsize=6, parse_math=False)
        axis.tick_params(axis="x", labelsize=6)
        if layer in kept:
            heights = [1.02] * len(kept[layer])
            axis.plot(
                kept[layer],
                heights,
                "v",
                color="tab:red",
                markersize=3,
                clip_on=False,
                transform=axis.get_xaxis_transform(),
            )
    for axis in axes[len(statistics.layers) :]:
        axis.set_axis_off()
    figure.supxlabel("expert (triangle: kept)" if kept else "expert", fontsize=8)
    return _png(figure)


def _language_similarity(statistics: ExpertStatistics) -> bytes:
    similarities = {side: routing_similarity(statistics, side) for side in SIDES}
    sides = [side for side in SIDES if similarities[side] is not None]
    size = 1.5 + 0.2 * max(len(statistics.languages(side)) for side in sides)
    figure = _figure(1.0 + size * len(sides), size)
    axes = figure.subplots(1, len(sides), squeeze=False)[0]
    for axis, side in zip(axes, sides, strict=True):
        similarity_LL, languages = similarities[side], [*map(_label, statistics.languages(side))]
        assert similarity_LL is not None
        image = axis.imshow(similarity_LL.numpy(), cmap="viridis", vmax=1.0, interpolation="nearest")
        axis.set_title(f"{side}, {'source' if side == 'encoder' else 'target'} languages", fontsize=9)
        axis.set_xticks(range(len(languages)), languages, fontsize=6, rotation=90, parse_math=False)
        axis.set_yticks(range(len(languages)), languages, fontsize=6, parse_math=False)
        figure.colorbar(image, ax=axis, fraction=0.046)
    return _png(figure)


__all__ = ["PICTURES", "draw_pictures", "has_matplotlib", "short_name"]
