"""The compression report in the folder of a model: JSON, Markdown with pictures, and a section of the model card."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ...evaluation.translation_quality import TranslationQuality
from ...files.json_file import read_json_object
from ...files.output import files_into
from ...files.typed_fields import of_type
from ...routing.expert_statistics import ExpertStatistics
from ...routing.routing_similarity import nearest_languages
from .compression_report import REPORT_NAME, AggregationReport, CompressionReport, FewerExpertsReport, report_from_dict
from .markdown_report import PICTURE_FOLDER, REPORT_MARKDOWN, ReportContents, card_section, full_report
from .model_card import CARD_NAME, with_section
from .report_pictures import PICTURES, draw_pictures


def save_report(
    report: CompressionReport, card: ModelCard, statistics: ExpertStatistics | None = None
) -> Callable[[Path], None]:
    """Writes the report and the model card to the new folder of a model, for `save_others`.

    Args:
        report: of the operation.
        card: of the model, to which a section is added.
        statistics: that the operation had.
    """

    def save(folder: Path) -> None:
        (folder / CARD_NAME).write_text(str(card), encoding="utf-8")
        _write(folder, folder, report, {}, {}, statistics)

    return save


def write_compression_report(
    output_dir: str | os.PathLike[str],
    *,
    before: TranslationQuality | None = None,
    after: TranslationQuality | None = None,
    trained: TranslationQuality | None = None,
    statistics: ExpertStatistics | None = None,
) -> Path:
    """Add to the report of a compression how well the model translated before and translates after it.

    `compression_report.json`, `report.md` with its pictures, and the section in the model card (`README.md`) are
    written again, each file as a whole; the rest of the card stays as it is. What an earlier call has added stays, too,
    unless it is given again.

    Args:
        output_dir: of `prune_experts`, `merge_experts`, `aggregate_experts` or `quantize_experts`.
        before: of `evaluate_translation` for the model that was compressed.
        after: the same for this model, on the same text.
        trained: the same for this model after further training, to show how much it recovers.
        statistics: of the model that was compressed, or after an aggregation of the new one, for the pictures of
            languages and experts; not needed if the operation had them.

    Returns:
        the path of `report.md`.

    Raises:
        ValueError: before anything is written: `output_dir` has no `compression_report.json`, or a corrupted one; one
            of `before` and `after` without the other, or `trained` without them; qualities of other text; statistics
            of another model.
    """
    folder = Path(output_dir)
    fields = _read(folder / REPORT_NAME)
    try:
        report = report_from_dict(fields)
        of_labels = of_type(dict[str, dict[str, Any]], fields.get("quality", {}), "quality")
        qualities = {label: TranslationQuality.from_dict(quality) for label, quality in of_labels.items()}
        nearest = of_type(
            dict[str, dict[str, tuple[str, float]]], fields.get("nearest_languages", {}), "nearest_languages"
        )
    except ValueError as error:
        raise ValueError(f"{folder / REPORT_NAME} is corrupted: {error}") from error
    given = {"before": before, "after": after, "trained": trained}
    qualities |= {label: quality for label, quality in given.items() if quality is not None}
    _check_qualities(qualities)
    if statistics is not None:
        _check_statistics(report, statistics)
    qualities = {label: qualities[label] for label in given if label in qualities}
    with files_into(folder) as staged:
        _write(staged, folder, report, qualities, nearest, statistics)
    return folder / REPORT_MARKDOWN


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; output_dir must be the folder of a compressed model")
    return read_json_object(path, "compression report")


def _check_qualities(qualities: Mapping[str, TranslationQuality]) -> None:
    if qualities and not {"before", "after"} <= qualities.keys():
        missing = sorted({"before", "after"} - qualities.keys())
        raise ValueError(f"the quality {' and '.join(missing)} is missing: there must be those before and after")
    for quality in [*qualities.values()][1:]:
        qualities["before"].require_comparable(quality)


def _check_statistics(report: CompressionReport, statistics: ExpertStatistics) -> None:
    num_experts = statistics.fingerprint.num_experts
    if isinstance(report, FewerExpertsReport):
        fits = num_experts == report.num_experts_before
    elif isinstance(report, AggregationReport):
        fits = num_experts == {layer: sum(counts) for layer, counts in report.num_experts.items()}
    else:
        fits = num_experts.keys() == report.layers().keys()
    if not fits:
        raise ValueError(
            f"the statistics are of another model than this report: of one with {num_experts}; give those of "
            + ("the aggregated model" if isinstance(report, AggregationReport) else report.source)
        )


def _write(
    staged: Path,
    folder: Path,
    report: CompressionReport,
    qualities: Mapping[str, TranslationQuality],
    nearest: Mapping[str, Mapping[str, tuple[str, float]]],
    statistics: ExpertStatistics | None,
) -> None:
    """Write the files of a report into `staged`, for `folder`, whose card and pictures they go on with."""
    if statistics is not None:
        nearest = nearest_languages(statistics)
    fields = report.to_dict() | {
        "quality": {label: quality.to_dict() for label, quality in qualities.items()},
        "nearest_languages": nearest,
    }
    pictures = draw_pictures(report, qualities, statistics)
    for name, content in pictures.items():
        (staged / PICTURE_FOLDER).mkdir(exist_ok=True)
        (staged / PICTURE_FOLDER / name).write_bytes(content)
    there = [name for name in PICTURES if name in pictures or (folder / PICTURE_FOLDER / name).is_file()]
    contents = ReportContents(report, qualities, nearest, there)
    card = folder / CARD_NAME
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    texts = {
        REPORT_NAME: json.dumps(fields, indent=1, ensure_ascii=False) + "\n",
        REPORT_MARKDOWN: full_report(contents),
        CARD_NAME: with_section(text, card_section(contents)),
    }
    for name, content_of_file in texts.items():
        (staged / name).write_bytes(content_of_file.encode("utf-8"))


__all__ = ["save_report", "write_compression_report"]
