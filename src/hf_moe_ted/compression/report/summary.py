"""The content of a compression report, computed once; JSON, Markdown, model card and pictures are made from it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from ...evaluation.translation_quality import TranslationQuality
from ...files.json_file import read_json_object
from ...files.typed_fields import of_type
from ...models.language_codes import LanguagePair
from ...routing.expert_statistics import ExpertStatistics
from ...routing.routing_similarity import nearest_languages
from .compression_report import AggregationReport, CompressionReport, FewerExpertsReport, report_from_dict

STAGES = {"before": "before", "after": "after", "trained": "after training"}
TOO_LONG = 1.1  # length ratio; as in the metric
COPIED_LESS = 0.01  # of the numbers, placeholders or names, and
NUM_COPIED_LESS = 3  # of them: less can be chance
REPEATS_MORE = 0.01  # of the translations
LOSES_MORE = 0.05  # of the chrF before, from one text to the other
TRANSLATES = 5.0  # chrF above that of a copy of the source
OTHER_TEXT = "The other text: "

Nearest = Mapping[str, Mapping[str, tuple[str, float]]]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """
    Attributes:
        report: report of the operation.
        qualities: `"before"`, `"after"` and maybe `"trained"` -> quality of the model; empty if it was not measured.
        nearest: what `nearest_languages` returned; empty without statistics.
        statistics: expert statistics, for the pictures of languages.
        by_loss: the directions, the largest loss of chrF first.
        also: the same for the other text of the qualities (`also`); `None` without one.
        warnings: warnings of the report and of the qualities.
    """

    report: CompressionReport
    qualities: Mapping[str, TranslationQuality] = field(default_factory=dict)
    nearest: Nearest = field(default_factory=dict)
    statistics: ExpertStatistics | None = None
    by_loss: tuple[LanguagePair, ...] = ()
    warnings: tuple[str, ...] = ()
    also: "Summary | None" = None

    @classmethod
    def of(
        cls,
        report: CompressionReport,
        statistics: ExpertStatistics | None = None,
        qualities: Mapping[str, TranslationQuality] | None = None,
        nearest: Nearest | None = None,
    ) -> "Summary":
        """Compute the other fields; with statistics also `nearest`.

        Raises:
            ValueError: one of the qualities before and after is missing, they are of other text, or the statistics are
                of another model.
        """
        qualities = {stage: qualities[stage] for stage in STAGES if stage in qualities} if qualities else {}
        _check_qualities(qualities)
        others = {stage: quality.also for stage, quality in qualities.items() if quality.also is not None}
        if statistics is not None:
            _check_statistics(report, statistics)
            nearest = nearest_languages(statistics)
        return cls(
            report=report,
            qualities=qualities,
            nearest=nearest or {},
            statistics=statistics,
            by_loss=_by_loss(qualities),
            warnings=(
                *report.warnings,
                *_quality_warnings(qualities),
                *_domain_warnings(qualities, others),
                *_setting_warnings(qualities),
            ),
            also=cls(report=report, qualities=others, by_loss=_by_loss(others)) if others else None,
        )

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain values for JSON; `read_summary` reads them."""
        qualities = {stage: quality.to_dict() for stage, quality in self.qualities.items()}
        return self.report.to_dict() | {"quality": qualities, "nearest_languages": self.nearest}


def read_summary(path: Path) -> tuple[CompressionReport, dict[str, TranslationQuality], Nearest]:
    """Read the parts of an earlier `Summary`, except the statistics.

    Raises:
        ValueError: the file does not exist or is corrupted.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; output_dir must be the folder of a compressed model")
    fields = read_json_object(path, "compression report")
    try:
        report = report_from_dict(fields)
        of_stages = of_type(dict[str, dict[str, Any]], fields.get("quality", {}), "quality")
        qualities = {stage: TranslationQuality.from_dict(quality) for stage, quality in of_stages.items()}
        nearest = fields.get("nearest_languages", {})
        return report, qualities, of_type(dict[str, dict[str, tuple[str, float]]], nearest, "nearest_languages")
    except ValueError as error:
        raise ValueError(f"{path} is corrupted: {error}") from error


def _check_qualities(qualities: Mapping[str, TranslationQuality]) -> None:
    if qualities and not {"before", "after"} <= qualities.keys():
        missing = sorted({"before", "after"} - qualities.keys())
        raise ValueError(f"the quality {' and '.join(missing)} is missing; give the qualities before and after")
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
            f"the statistics are of another model than this report, of one with {num_experts}; give those of "
            + ("the aggregated model" if isinstance(report, AggregationReport) else report.source)
        )


def _by_loss(qualities: Mapping[str, TranslationQuality]) -> tuple[LanguagePair, ...]:
    if not qualities:
        return ()
    before, after = qualities["before"].directions, qualities["after"].directions
    return tuple(sorted(before, key=lambda pair: after[pair].chrf - before[pair].chrf))


def _quality_warnings(qualities: Mapping[str, TranslationQuality]) -> list[str]:
    if not qualities:
        return []
    warnings = []
    both = qualities["before"], qualities["after"]
    too_long = [sum(d.length_ratio > TOO_LONG for d in quality.directions.values()) for quality in both]
    if too_long[1] > too_long[0]:
        warnings.append(
            f"Translations are more than {TOO_LONG - 1:.0%} longer than the references in {too_long[1]} of "
            f"{len(both[1].directions)} directions; before, in {too_long[0]}"
        )
    num_cut = [sum(direction.num_cut for direction in quality.directions.values()) for quality in both]
    if num_cut[1] > num_cut[0]:
        warnings.append(
            f"{num_cut[1]:,} of {both[1].num_sentences:,} translations, before {num_cut[0]:,}, did not end within "
            f"{both[1].max_new_tokens} tokens and were cut; their real length is greater"
        )
    return warnings + _copying_warnings(qualities)


def _setting_warnings(qualities: Mapping[str, TranslationQuality]) -> list[str]:
    settings = dict.fromkeys((quality.device, quality.dtype, quality.batch_size) for quality in qualities.values())
    if len(settings) < 2:
        return []
    listed = "; ".join(f"{device}, {dtype}, batches of {size}" for device, dtype, size in settings)
    return [f"Speed and memory were not measured in the same way ({listed}) and cannot be compared"]


def _copying_warnings(qualities: Mapping[str, TranslationQuality]) -> list[str]:
    before, after = (qualities[stage].mean([*qualities[stage].directions]) for stage in ("before", "after"))
    warnings = [
        f"Of the {kind} that must not change in a translation, {after.copied[kind]:.1%} are copied, before {share:.1%}"
        for kind, share in before.copied.items()
        if share - after.copied.get(kind, share) >= COPIED_LESS
        and _num_copied(qualities["before"], kind) - _num_copied(qualities["after"], kind) >= NUM_COPIED_LESS
    ]
    if before.repeating is None or after.repeating is None or after.repeating - before.repeating < REPEATS_MORE:
        return warnings
    return [
        *warnings,
        f"{after.repeating:.1%} of the translations repeat themselves, before {before.repeating:.1%}",
    ]


def _num_copied(quality: TranslationQuality, kind: str) -> int:
    return sum(direction.copied.get(kind, (0, 0))[1] for direction in quality.directions.values())


def _domain_warnings(
    qualities: Mapping[str, TranslationQuality], others: Mapping[str, TranslationQuality]
) -> list[str]:
    """Warnings about the other text, also whether it loses more than the first text."""
    if not others:
        return []
    warnings = [OTHER_TEXT + warning[0].lower() + warning[1:] for warning in _quality_warnings(others)]
    before = [*others["before"].directions.values()]
    chrf, of_copy = fmean(each.chrf for each in before), fmean(each.source_chrf for each in before)
    if chrf < of_copy + TRANSLATES:
        return [
            *warnings,
            f"{OTHER_TEXT}the model before has a chrF of {chrf:.1f}, a copy of the source has {of_copy:.1f}: the "
            "model does not translate this text, so there is no quality to lose",
        ]
    kept = [_chrf_kept(qualities), _chrf_kept(others)]
    if kept[0] - kept[1] >= LOSES_MORE:
        warnings.append(
            f"{OTHER_TEXT}{kept[1]:.0%} of the chrF before are left, but {kept[0]:.0%} in the first text: quality "
            "that holds in one domain does not hold in the other"
        )
    return warnings


def _chrf_kept(qualities: Mapping[str, TranslationQuality]) -> float:
    before, after = (fmean(each.chrf for each in qualities[stage].directions.values()) for stage in ("before", "after"))
    return after / before if before else 1.0


__all__ = ["STAGES", "Summary", "read_summary"]
