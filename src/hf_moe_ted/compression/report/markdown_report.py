"""A compression report for a reader, as Markdown: in full, and as a section of a model card."""

from collections.abc import Sequence
from statistics import fmean

from ...evaluation.copied_parts import KINDS
from ...evaluation.translation_quality import DirectionQuality, MeanQuality, TranslationQuality, copied_shares
from ...models.language_detection import MIN_DETECTED_LETTERS
from ...models.layer_names import SIDES
from ...routing.pictures import has_matplotlib, short_name
from .compression_report import AggregationReport, FewerExpertsReport, PruningReport, TrimmingReport
from .markdown_text import as_code, as_text
from .model_card import display_name
from .report_pictures import PICTURES
from .summary import STAGES, Summary

REPORT_MARKDOWN = "report.md"
PICTURE_FOLDER = "compression_report"

NUM_WORST = 5

_HOW_TO_MEASURE = f"""\
The loss of quality was not measured. To measure it, take text in the model's languages that it was not trained on:

```bash
hf-moe-ted evaluate SOURCE TEXT --output before.json
hf-moe-ted evaluate MODEL TEXT --output after.json
hf-moe-ted report MODEL --before before.json --after after.json    # puts it here and into {REPORT_MARKDOWN}
```

Add `--also OTHER` to both `evaluate` for a second text of another domain: quality may hold in the domain whose text
chose the experts, and break in others."""

_WITHOUT_PICTURES = (
    "Pictures were not drawn because matplotlib was not installed: `pip install 'hf-moe-ted[viz]'`, then `hf-moe-ted "
    "report MODEL`; add `--statistics` for the pictures of languages."
)


def full_report(summary: Summary, pictures: Sequence[str]) -> str:
    """The text of `report.md`.

    Args:
        summary: what there is to say.
        pictures: names of the pictures that exist.
    """
    report = summary.report
    arguments = [
        f"{as_code(name)} {as_text(str(value))}"
        for name, value in report.arguments.items()
        if name != "checkpoints"  # the line before has them
    ]
    parts = [
        f"# Compression report: {report.title.lower()}",
        *_overview(summary),
        *([f"Arguments: {', '.join(arguments)}."] if arguments else []),
        *(["## Every direction", _how_measured(summary), _directions(summary)] if summary.qualities else []),
        *(["## The other text", _directions(summary.also)] if summary.also else []),
        *(["## Vocabulary", _vocabulary(report)] if isinstance(report, TrimmingReport) else []),
        *(["## Experts", _experts(summary)] if report.layers() else []),
        "## Languages",
        _languages(summary),
        *_pictures(pictures),
        *([] if has_matplotlib() else [_WITHOUT_PICTURES]),
    ]
    return "\n\n".join(parts) + "\n"


def card_section(summary: Summary, pictures: Sequence[str]) -> str:
    """The section for a model card. It leaves out the tables of all directions, layers and languages."""
    parts = [
        f"## {summary.report.title}",
        "Numbers outside of this section describe the model from which this one was made. The whole report: "
        f"[{REPORT_MARKDOWN}]({REPORT_MARKDOWN}).",
        *_overview(summary),
    ]
    if summary.qualities:
        num_worst = min(NUM_WORST, len(summary.by_loss))
        parts += [f"**The {num_worst} directions with the largest loss of chrF:**", _directions(summary, num_worst)]
    if summary.also:
        num_worst = min(NUM_WORST, len(summary.also.by_loss))
        parts += [
            f"**The {num_worst} directions with the largest loss in the other text:**",
            _directions(summary.also, num_worst),
        ]
    return "\n\n".join([*parts, *_pictures(pictures)]) + "\n"


def _overview(summary: Summary) -> list[str]:
    report = summary.report
    sources = report.checkpoints if isinstance(report, AggregationReport) else (report.source,)
    names = ", ".join(as_code(display_name(source)) for source in sources)
    warnings = "\n".join(f"- **{as_text(warning)}**" for warning in summary.warnings)
    return [
        f"Made of {names} by `{report.operation}` of hf_moe_ted.",
        _sizes(summary),
        *([warnings] if warnings else []),
        *([] if summary.qualities else [_HOW_TO_MEASURE]),
    ]


def _sizes(summary: Summary) -> str:
    report, qualities = summary.report, summary.qualities.values()
    rows = [
        ["parameters", f"{report.num_parameters_before:,}", f"{report.num_parameters_after:,}"],
        ["weights, MB", _megabytes(report.num_bytes_before), _megabytes(report.num_bytes_after)],
    ]
    if isinstance(report, FewerExpertsReport):
        counts = (report.num_experts_before, report.num_experts_after)
        rows.append(["experts, all layers", *(f"{sum(count.values()):,}" for count in counts)])
    if isinstance(report, TrimmingReport):
        rows.append(["tokens", f"{report.num_tokens_before:,}", f"{report.num_tokens_after:,}"])
    if qualities:
        rows.append(["sentences per second", *(f"{quality.sentences_per_s:,.1f}" for quality in qualities)])
        rows.append(["weights in memory, MB", *(_megabytes(quality.num_bytes) for quality in qualities)])
    if any(quality.peak_memory_bytes for quality in qualities):
        rows.append(["most memory of the GPU, MB", *(_megabytes(quality.peak_memory_bytes) for quality in qualities)])
    return _table(["", *(STAGES[stage] for stage in summary.qualities or ("before", "after"))], rows)


def _how_measured(summary: Summary) -> str:
    after = summary.qualities["after"]
    tokenizers = ", ".join(sorted({as_text(direction.bleu_tokenizer) for direction in after.directions.values()}))
    floors = [d.reference_off_target for d in after.directions.values() if d.reference_off_target is not None]
    models = [
        f"{STAGES[stage]}: {as_code(display_name(quality.model))}, {as_text(quality.dtype)}, batches of "
        f"{quality.batch_size}, {as_text(quality.device)}"
        for stage, quality in summary.qualities.items()
    ]
    return (
        f"{' → '.join(STAGES[stage] for stage in summary.qualities)}. BLEU (tokenizers: {tokenizers}) and chrF are "
        "sacreBLEU's; the length ratio counts characters; off target is the share of translations with "
        f"{MIN_DETECTED_LETTERS} letters or more whose detected language is not the target language"
        + (f", which is also said of {_percent(fmean(floors))} of the references" if floors else "")
        + ". Copied: the share of numbers, placeholders and names common to source and reference that translations "
        f"have, too; repeating: translations that say something three times in a row{_repeating_floor(after)}"
        + f". Beams: {after.num_beams}, at most {after.max_new_tokens} new tokens. {'; '.join(models)}."
    )


def _repeating_floor(quality: TranslationQuality) -> str:
    shares = [d.reference_repeating for d in quality.directions.values() if d.reference_repeating is not None]
    return f", as {_percent(fmean(shares))} of the references do" if shares else ""


def _directions(summary: Summary, num_worst: int | None = None) -> str:
    """Means, then the directions, those with the largest loss first."""
    qualities = [*summary.qualities.values()]
    (everything, all_pairs), *groups = qualities[0].groups().items()
    rows = []
    for name, pairs in groups or [(everything, all_pairs)]:
        num_sentences = sum(qualities[0].directions[pair].num_sentences for pair in pairs)
        rows.append([f"mean, {name}", f"{num_sentences:,}", *_scores([quality.mean(pairs) for quality in qualities])])
    for pair in summary.by_loss[:num_worst]:
        directions = [quality.directions[pair] for quality in qualities]
        rows.append(["-".join(pair), str(directions[0].num_sentences), *_scores(directions)])
    header = ["direction", "sentences", "chrF", "BLEU", "length ratio", "off target"]
    header += [*(f"{kind} copied" for kind in KINDS), "repeating"]
    # a text may have no 4-grams or placeholders, and files of older versions lack the last four
    columns = [column for column in range(len(header)) if any(row[column] for row in rows)]
    return _table([header[column] for column in columns], [[row[column] for column in columns] for row in rows])


def _scores(stages: Sequence[DirectionQuality | MeanQuality]) -> list[str]:
    """A cell for each score, with its values in all stages."""
    rows = []
    for scores in stages:
        copied = scores.copied if isinstance(scores, MeanQuality) else copied_shares([scores])
        shares = [scores.off_target, *(copied.get(kind) for kind in KINDS), scores.repeating]
        bleu = "" if scores.bleu is None else f"{scores.bleu:.1f}"
        numbers = [f"{scores.chrf:.1f}", bleu, f"{scores.length_ratio:.2f}"]
        rows.append([*numbers, *map(_percent, shares)])
    return [" → ".join(cells) if any(cells) else "" for cells in zip(*rows, strict=True)]


def _vocabulary(report: TrimmingReport) -> str:
    """How the texts of the dataset are encoded, before and after, by language."""
    rows = report.encodings()
    columns = next(iter(rows.values()), {})
    return _table(["language", *columns], [[language, *row.values()] for language, row in rows.items()])


def _experts(summary: Summary) -> str:
    layers = summary.report.layers()
    columns = next(iter(layers.values()))
    return _table(["layer", *columns], [[short_name(layer), *values.values()] for layer, values in layers.items()])


def _languages(summary: Summary) -> str:
    kept = summary.report.routed_share_kept if isinstance(summary.report, PruningReport) else {}
    if not summary.nearest and not kept:
        return "No expert statistics: `hf-moe-ted report MODEL --statistics STATISTICS` adds them."
    rows = []
    for language in sorted({name for of_side in (*summary.nearest.values(), *kept.values()) for name in of_side}):
        rows.append([language])
        for side in SIDES:
            neighbour, overlap = summary.nearest.get(side, {}).get(language, ("", None))
            share = [_percent(kept.get(side, {}).get(language))] if kept else []
            rows[-1] += [f"{neighbour} {_percent(overlap)}".strip(), *share]
    columns = ["nearest", "kept"] if kept else ["nearest"]
    how = (
        "Source languages in the encoder, target languages in the decoder; nearest by routing, with the share of "
        "tokens to the same experts" + ("; kept: share of routed tokens whose expert is kept." if kept else ".")
    )
    return f"{how}\n\n{_table(['language', *(f'{side}: {column}' for side in SIDES for column in columns)], rows)}"


def _pictures(names: Sequence[str]) -> list[str]:
    return ["\n".join(f"![{PICTURES[name]}]({PICTURE_FOLDER}/{name})" for name in names)] if names else []


def _megabytes(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / 1e6:,.1f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; rows may be shorter than the header."""
    filled = [[*map(as_text, row), *[""] * (len(header) - len(row))] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *filled))


__all__ = ["PICTURE_FOLDER", "REPORT_MARKDOWN", "card_section", "full_report"]
