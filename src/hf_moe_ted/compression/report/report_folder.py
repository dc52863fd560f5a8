"""Write the compression report into a model's folder: JSON, Markdown with pictures, a section of the model card."""

import json
import os
from collections.abc import Collection
from pathlib import Path

from transformers.utils import logging

from ...evaluation.translation_quality import TranslationQuality
from ...files.output import files_into
from ...routing.expert_statistics import ExpertStatistics
from .compression_report import REPORT_NAME
from .markdown_report import PICTURE_FOLDER, REPORT_MARKDOWN, card_section, full_report
from .model_card import CARD_NAME, with_languages, with_section
from .report_pictures import PICTURES, draw_pictures
from .summary import Summary, read_summary

logger = logging.get_logger(__name__)


def describe(folder: Path, summary: Summary, card: str, earlier_pictures: Collection[str] = ()) -> None:
    """Write the files of a report.

    Args:
        folder: folder of the model, or the temporary one with its new files.
        summary: content of the report.
        card: the text of the model card; its section is added or replaced.
        earlier_pictures: names of `PICTURES` that the model has already and that are shown, too.
    """
    drawn = draw_pictures(summary)
    pictures = [name for name in PICTURES if name in drawn or name in earlier_pictures]
    texts = {
        REPORT_NAME: json.dumps(summary.to_dict(), indent=1, ensure_ascii=False) + "\n",
        REPORT_MARKDOWN: full_report(summary, pictures),
        CARD_NAME: with_section(with_languages(card, _languages_of(summary)), card_section(summary, pictures)),
    }
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode("utf-8"))
    for name, content in drawn.items():
        (folder / PICTURE_FOLDER).mkdir(exist_ok=True)
        (folder / PICTURE_FOLDER / name).write_bytes(content)


def _languages_of(summary: Summary) -> list[str]:
    """The languages for which a model was made, given as codes or as pairs; empty if it has all of its source."""
    chosen = summary.report.arguments.get("languages") or ()
    return [code for item in chosen for code in ([item] if isinstance(item, str) else item)]


def write_compression_report(
    output_dir: str | os.PathLike[str],
    *,
    before: TranslationQuality | None = None,
    after: TranslationQuality | None = None,
    trained: TranslationQuality | None = None,
    statistics: ExpertStatistics | None = None,
) -> Path:
    """Add the quality of translations before and after a compression to its report.

    It writes `compression_report.json`, `report.md` with its pictures, and the section in the model card (`README.md`)
    again, each file as a whole. The rest of the card does not change. What an earlier call added stays unless it is
    given again.

    Args:
        output_dir: the folder from `prune_experts`, `merge_experts`, `aggregate_experts`, `quantize_experts` or
            `trim_vocabulary`.
        before: what `evaluate_translation` returned for the model before compression.
        after: the same for this model, on the same text.
        trained: the same for this model after further training, to show how much it recovers.
        statistics: expert statistics for the pictures of languages and experts: of the model before compression or,
            after an aggregation, of the new one. Not needed if the operation had them.

    Returns:
        the path of `report.md`.

    Raises:
        ValueError: before anything is written: `output_dir` has no `compression_report.json`, or a corrupted one;
            `before` or `after` is missing; the qualities are of different text; the statistics are of another model.
    """
    folder = Path(output_dir)
    report, qualities, nearest = read_summary(folder / REPORT_NAME)
    given = {"before": before, "after": after, "trained": trained}
    qualities |= {stage: quality for stage, quality in given.items() if quality is not None}
    if after is not None and after.is_of_other_folder(folder):
        logger.warning("after was measured with %s, not with the model in %s", after.model, folder)
    if before is not None and Path(before.model).is_dir() and not before.is_of_other_folder(folder):
        logger.warning("before was measured with the model in %s, which is the one after compression", folder)
    summary = Summary.of(report, statistics, qualities, nearest)
    card = (folder / CARD_NAME).read_text(encoding="utf-8") if (folder / CARD_NAME).is_file() else ""
    earlier_pictures = [name for name in PICTURES if (folder / PICTURE_FOLDER / name).is_file()]
    with files_into(folder) as staged:
        describe(staged, summary, card, earlier_pictures)
    return folder / REPORT_MARKDOWN


__all__ = ["describe", "write_compression_report"]
