"""A compression report for a reader, as Markdown: in full, and as a section of a model card."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from ...evaluation.translation_quality import DirectionQuality, TranslationQuality
from ...models.language_codes import LanguagePair
from ...models.layer_names import SIDES
from .compression_report import AggregationReport, CompressionReport, FewerExpertsReport, PruningReport
from .markdown_text import as_code, as_text
from .model_card import display_name
from .report_pictures import PICTURES, has_matplotlib, short_name

REPORT_MARKDOWN = "report.md"
PICTURE_FOLDER = "compression_report"

TOO_LONG = 1.1  # length ratio; as in the metric
NUM_WORST = 5

_COLUMN = {"before": "before", "after": "after", "trained": "after training"}


@dataclass(frozen=True)
class ReportContents:
    """What a report is made of.

    Attributes:
        report: of the operation.
        qualities: `"before"`, `"after"` and maybe `"trained"` -> quality of the model; empty if it was not measured.
        nearest_languages: of `nearest_languages`; empty without statistics.
        pictures: names of those that there are.
    """

    report: CompressionReport
    qualities: Mapping[str, TranslationQuality] = field(default_factory=dict)
    nearest_languages: Mapping[str, Mapping[str, tuple[str, float]]] = field(default_factory=dict)
    pictures: Sequence[str] = ()


def full_report(contents: ReportContents) -> str:
    """The text of `report.md`."""
    parts = [
        f"# Compression report: {contents.report.title.lower()}",
        *_overview(contents),
        *_all_directions(contents),
        *_experts(contents),
        *_languages(contents),
        *_details(contents),
    ]
    return "\n\n".join(parts) + "\n"


def card_section(contents: ReportContents) -> str:
    """The text for a model card: the overview, without the tables of all directions, layers and languages."""
    parts = [
        f"## {contents.report.title}",
        f"Numbers outside of this section are of the model that this one was made of. The whole report: "
        f"[{REPORT_MARKDOWN}]({REPORT_MARKDOWN}).",
        *_overview(contents),
        *(_picture(contents, name) for name in PICTURES if name in contents.pictures),
    ]
    return "\n\n".join(parts) + "\n"


def _overview(contents: ReportContents) -> list[str]:
    report = contents.report
    sources = report.checkpoints if isinstance(report, AggregationReport) else (report.source,)
    names = ", ".join(as_code(display_name(source)) for source in sources)
    parts = [f"Made of {names} by `{report.operation}` of hf_moe_ted.", _sizes_and_means(contents)]
    if warnings := [*report.warnings, *_quality_warnings(contents.qualities)]:
        parts.append("\n".join(f"- **{as_text(warning)}**" for warning in warnings))
    if not contents.qualities:
        return [*parts, _HOW_TO_MEASURE]
    pairs = _by_loss(contents.qualities)[:NUM_WORST]
    parts += [f"**The {len(pairs)} directions that lost most, by chrF:**", _directions(contents.qualities, pairs)]
    return parts


_HOW_TO_MEASURE = f"""\
What it costs in quality was not measured. With text in the model's languages that it was not trained on:

```bash
hf-moe-ted evaluate SOURCE TEXT --output before.json
hf-moe-ted evaluate MODEL TEXT --output after.json
hf-moe-ted report MODEL --before before.json --after after.json    # puts it here and into {REPORT_MARKDOWN}
```"""


def _sizes_and_means(contents: ReportContents) -> str:
    report, qualities = contents.report, contents.qualities
    labels = [*qualities] or ["before", "after"]
    rows = [
        ["parameters", f"{report.num_parameters_before:,}", f"{report.num_parameters_after:,}"],
        ["weights, MB", f"{report.num_bytes_before / 1e6:,.1f}", f"{report.num_bytes_after / 1e6:,.1f}"],
    ]
    if isinstance(report, FewerExpertsReport):
        counts = (report.num_experts_before, report.num_experts_after)
        rows.append(["experts, all layers", *(f"{sum(count.values()):,}" for count in counts)])
    for group, pairs in _groups(qualities).items():
        means = [quality.mean(pairs) for quality in qualities.values()]
        rows += [
            [f"BLEU, {group}", *(f"{mean.bleu:.1f}" for mean in means)],
            [f"chrF, {group}", *(f"{mean.chrf:.1f}" for mean in means)],
            [f"length ratio, {group}", *(f"{mean.length_ratio:.2f}" for mean in means)],
            [f"off target, {group}", *(_percent(mean.off_target) for mean in means)],
        ]
    if qualities:
        rows += [
            ["sentences per second", *(f"{quality.sentences_per_s:,.1f}" for quality in qualities.values())],
            ["weights in memory, MB", *(f"{quality.num_bytes / 1e6:,.1f}" for quality in qualities.values())],
        ]
        peaks = [quality.peak_memory_bytes for quality in qualities.values()]
        if any(peaks):
            rows.append(["most memory of the GPU, MB", *("" if p is None else f"{p / 1e6:,.1f}" for p in peaks)])
    return _table(["", *(_COLUMN[label] for label in labels)], rows)


def _groups(qualities: Mapping[str, TranslationQuality]) -> dict[str, list[LanguagePair]]:
    if not qualities:
        return {}
    (everything, pairs), *parts = next(iter(qualities.values())).groups().items()
    return dict(parts) or {everything: pairs}


def _quality_warnings(qualities: Mapping[str, TranslationQuality]) -> list[str]:
    if not qualities:
        return []
    warnings = []
    both = qualities["before"], qualities["after"]
    too_long = [sum(d.length_ratio > TOO_LONG for d in quality.directions.values()) for quality in both]
    if too_long[1] > too_long[0]:
        warnings.append(
            f"In {too_long[1]} of {len(both[1].directions)} directions, before in {too_long[0]}, translations are more "
            f"than {TOO_LONG - 1:.0%} longer than the references"
        )
    num_cut = [sum(direction.num_cut for direction in quality.directions.values()) for quality in both]
    if num_cut[1] > num_cut[0]:
        warnings.append(
            f"{num_cut[1]:,} of {both[1].num_sentences:,} translations, before {num_cut[0]:,}, did not end within "
            f"{both[1].max_new_tokens} tokens and were cut; without the cut they would be longer"
        )
    settings = dict.fromkeys((quality.device, quality.dtype, quality.batch_size) for quality in qualities.values())
    if len(settings) > 1:
        listed = "; ".join(f"{device}, {dtype}, batches of {size}" for device, dtype, size in settings)
        warnings.append(f"Speed and memory were not measured in the same way ({listed}) and cannot be compared")
    return warnings


def _by_loss(qualities: Mapping[str, TranslationQuality]) -> list[LanguagePair]:
    """The directions, those with the largest loss of chrF first."""
    before, after = qualities["before"].directions, qualities["after"].directions
    return sorted(before, key=lambda pair: after[pair].chrf - before[pair].chrf)


def _directions(qualities: Mapping[str, TranslationQuality], pairs: Sequence[LanguagePair]) -> str:
    columns = {
        "chrF": lambda d: f"{d.chrf:.1f}",
        "BLEU": lambda d: f"{d.bleu:.1f}",
        "length ratio": lambda d: f"{d.length_ratio:.2f}",
        "off target": lambda d: _percent(d.off_target),
    }
    rows = []
    for pair in pairs:
        directions: list[DirectionQuality] = [quality.directions[pair] for quality in qualities.values()]
        cells = [" → ".join(map(show, directions)) for show in columns.values()]
        rows.append(["-".join(pair), str(directions[0].num_sentences), *cells])
    return _table(["direction", "sentences", *columns], rows)


def _all_directions(contents: ReportContents) -> list[str]:
    if not (qualities := contents.qualities):
        return []
    after = qualities["after"]
    labels = " → ".join(_COLUMN[label] for label in qualities)
    tokenizers = ", ".join(sorted({as_text(direction.bleu_tokenizer) for direction in after.directions.values()}))
    floors = [d.reference_off_target for d in after.directions.values() if d.reference_off_target is not None]
    how = [
        f"- {labels}. BLEU (tokenizers: {tokenizers}) and chrF are sacreBLEU's; the length ratio counts characters; "
        "off target is the share of translations whose detected language is not the target language"
        + (f", which is also said of {_percent(fmean(floors))} of the references." if floors else "."),
        f"- {after.num_sentences:,} sentences, beams: {after.num_beams}, at most {after.max_new_tokens} new tokens.",
        *(
            f"- {_COLUMN[label]}: {as_code(display_name(quality.model))}, {as_text(quality.dtype)}, batches of "
            f"{quality.batch_size}, {as_text(quality.device)}"
            for label, quality in qualities.items()
        ),
    ]
    return [
        "## Every direction",
        "\n".join(how),
        _directions(qualities, sorted(after.directions)),
        *_picture_if_there(contents, "quality.png"),
    ]


def _experts(contents: ReportContents) -> list[str]:
    layers = contents.report.layers()
    columns = [*next(iter(layers.values()))]
    rows = [[short_name(layer), *values.values()] for layer, values in layers.items()]
    table = _table(["layer", *columns], rows)
    return ["## Experts", table, *_picture_if_there(contents, "experts_per_layer.png")]


def _languages(contents: ReportContents) -> list[str]:
    report, nearest = contents.report, contents.nearest_languages
    kept = report.routed_share_kept if isinstance(report, PruningReport) else {}
    if not nearest and not kept:
        return ["## Languages", "No expert statistics: `hf-moe-ted report MODEL --statistics STATISTICS` adds them."]
    rows = []
    for side in SIDES:
        shares, neighbours = kept.get(side, {}), nearest.get(side, {})
        for language in sorted({*shares, *neighbours}):
            neighbour, overlap = neighbours.get(language, ("", None))
            row = [side, language, neighbour, _percent(overlap)]
            rows.append([*row, _percent(shares.get(language))] if kept else row)
    header = ["", "language", "nearest by routing", "tokens to the same experts"]
    if kept:
        header.append("routed tokens whose expert is kept")
    pictures = ("routing_by_language.png", "language_similarity.png")
    return [
        "## Languages",
        _table(header, rows),
        *(part for name in pictures for part in _picture_if_there(contents, name)),
    ]


def _details(contents: ReportContents) -> list[str]:
    arguments = {
        name: [display_name(str(path)) for path in value]
        if name == "checkpoints" and isinstance(value, list | tuple)
        else value
        for name, value in contents.report.arguments.items()
    }
    parts = [
        "## Arguments",
        "\n".join(f"- {as_code(name)}: {as_text(str(value))}" for name, value in arguments.items()),
    ]
    if not has_matplotlib():
        parts.append(
            "Pictures were not drawn, as matplotlib was not installed: `pip install 'hf-moe-ted[viz]'`, then "
            "`hf-moe-ted report MODEL`, with `--statistics` for those of the languages."
        )
    return parts


def _picture_if_there(contents: ReportContents, name: str) -> list[str]:
    return [_picture(contents, name)] if name in contents.pictures else []


def _picture(contents: ReportContents, name: str) -> str:
    alternative = Path(name).stem.replace("_", " ")
    return f"![{alternative}]({PICTURE_FOLDER}/{name})\n\n*{PICTURES[name]}*"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; rows may be shorter than the header."""
    filled = [[*row, *[""] * (len(header) - len(row))] for row in rows]
    escaped = [[as_text(cell) for cell in row] for row in filled]
    lines = [header, ["---"] * len(header), *escaped]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


__all__ = ["PICTURE_FOLDER", "REPORT_MARKDOWN", "ReportContents", "card_section", "full_report"]
