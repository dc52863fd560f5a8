"""The pictures of a compression report; they need matplotlib."""

from collections.abc import Mapping

from ...evaluation.translation_quality import TranslationQuality
from ...routing.pictures import (
    as_png,
    draw_language_similarity,
    draw_routing_by_language,
    has_matplotlib,
    label,
    new_figure,
    short_name,
)
from .compression_report import FewerExpertsReport, PruningReport
from .summary import Summary

# file name -> what it shows, in the order of the report
PICTURES = {
    "quality.png": "chrF and length ratio of each direction",
    "experts_per_layer.png": "Experts of each MoE layer",
    "routing_by_language.png": "Share of each language's tokens that is routed to each expert",
    "language_similarity.png": "Share of two languages' tokens that goes to the same experts",
}


def draw_pictures(summary: Summary) -> dict[str, bytes]:
    """Draw the pictures of `PICTURES` for which there are data: file name -> PNG; empty without matplotlib."""
    report, statistics = summary.report, summary.statistics
    if not has_matplotlib():
        return {}
    pictures = {}
    if summary.qualities:
        pictures["quality.png"] = _quality(summary.qualities)
    if isinstance(report, FewerExpertsReport):
        pictures["experts_per_layer.png"] = _experts_per_layer(report)
    if statistics is not None:
        kept = report.kept_experts if isinstance(report, PruningReport) else {}
        pictures["routing_by_language.png"] = draw_routing_by_language(statistics, kept)
        pictures["language_similarity.png"] = draw_language_similarity(statistics)
    return pictures


def _quality(qualities: Mapping[str, TranslationQuality]) -> bytes:
    pairs = list(next(iter(qualities.values())).directions)
    figure = new_figure(9, 1.2 + 0.18 * len(pairs))
    axes = figure.subplots(1, 2, sharey=True)
    for axis, name, title in zip(axes, ("chrf", "length_ratio"), ("chrF", "length ratio"), strict=True):
        values = {
            stage: [getattr(quality.directions[pair], name) for pair in pairs] for stage, quality in qualities.items()
        }
        for row, of_direction in enumerate(zip(*values.values(), strict=True)):
            axis.plot(of_direction, [row] * len(of_direction), color="lightgray", zorder=1)
        for (stage, of_stage), marker in zip(values.items(), "osD", strict=False):
            axis.scatter(of_stage, range(len(pairs)), s=14, marker=marker, label=stage, zorder=2)
        axis.set(title=title, ylim=(len(pairs) - 0.5, -0.5))
    axes[0].set_yticks(range(len(pairs)), [label("-".join(pair)) for pair in pairs], fontsize=7, parse_math=False)
    axes[1].axvline(1.0, color="gray", linewidth=0.8)
    axes[1].legend(fontsize=8)
    return as_png(figure)


def _experts_per_layer(report: FewerExpertsReport) -> bytes:
    layers = list(report.num_experts_before)
    figure = new_figure(2.5 + 0.6 * len(layers), 2.8)
    axis = figure.subplots()
    axis.bar(range(len(layers)), report.num_experts_before.values(), color="lightgray", label="before")
    bars = axis.bar(range(len(layers)), report.num_experts_after.values(), width=0.5, label="after")
    axis.bar_label(bars, fontsize=8)
    axis.set_xticks(range(len(layers)), [short_name(layer) for layer in layers], rotation=45, ha="right", fontsize=8)
    axis.set(ylabel="experts")
    figure.legend(fontsize=8, loc="outside right upper")
    return as_png(figure)


__all__ = ["PICTURES", "draw_pictures"]
