"""Reports of compressions: sizes before and after, what happened to the experts, and warnings."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ...files.messages import printable, shorten
from ...files.typed_fields import from_fields

REPORT_NAME = "compression_report.json"


@dataclass(frozen=True, kw_only=True)
class CompressionReport:
    """The arguments of a compression and its result.

    Attributes:
        operation: name of the function.
        title: what it did to the experts, as a title.
        source: the model that was compressed.
        arguments: name -> value, for the arguments that change the result.
        num_parameters_before, num_parameters_after: number of parameters; shared weights count once.
        num_bytes_before, num_bytes_after: bytes of the weights.
        warnings: what a user should know.
    """

    operation: ClassVar[str]
    title: ClassVar[str]

    source: str
    arguments: dict[str, Any]
    num_parameters_before: int
    num_parameters_after: int
    num_bytes_before: int
    num_bytes_after: int
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values for JSON; `report_from_dict` reads them."""
        return {"operation": self.operation, **dataclasses.asdict(self)}

    def lines(self) -> list[str]:
        """The report for a reader, without the warnings."""
        return [
            f"{self.num_parameters_before:,} -> {self.num_parameters_after:,} parameters, "
            f"{self.num_bytes_before / 1e6:,.1f} -> {self.num_bytes_after / 1e6:,.1f} MB",
        ]

    def layers(self) -> dict[str, dict[str, str]]:
        """Name of each MoE layer -> facts about its experts, by column."""
        raise NotImplementedError

    def __str__(self) -> str:
        lines = [*self.lines(), *(f"warning: {warning}" for warning in self.warnings)]
        return "\n".join(map(printable, lines))


@dataclass(frozen=True, kw_only=True)
class FewerExpertsReport(CompressionReport):
    """What a pruning or merging did.

    Attributes:
        outcome: a format string with `before` and `after`, the numbers of experts in all layers.
        num_experts_before, num_experts_after: name of each MoE layer -> number of experts.
    """

    outcome: ClassVar[str]

    num_experts_before: dict[str, int]
    num_experts_after: dict[str, int]

    def lines(self) -> list[str]:
        before, after = (sum(counts.values()) for counts in (self.num_experts_before, self.num_experts_after))
        counts = zip(self.num_experts_after.values(), self.num_experts_before.values(), strict=True)
        each = [f"{num_after} of {num_before}" for num_after, num_before in counts]
        return [
            f"{self.source}: {self.outcome.format(before=before, after=after)}",
            *super().lines(),
            f"experts of the MoE layers: {f'{each[0]} in each' if len({*each}) == 1 else ', '.join(each)}",
        ]

    def layers(self) -> dict[str, dict[str, str]]:
        return {
            layer: {"experts before": str(num_before), "after": str(self.num_experts_after[layer])}
            for layer, num_before in self.num_experts_before.items()
        }


@dataclass(frozen=True, kw_only=True)
class PruningReport(FewerExpertsReport):
    """The arguments of a pruning and its result.

    Attributes:
        kept_experts: name of each MoE layer -> ids of the experts that it keeps.
        dense_layers: names of the layers that have one expert left and are dense now.
        routed_share_kept: `"encoder"` -> source language, or `"decoder"` -> target language -> share of the language's
            routed (token, expert) slots whose expert is kept, over all MoE layers of that side. Empty without
            statistics.
    """

    operation: ClassVar[str] = "prune_experts"
    title: ClassVar[str] = "Pruned experts"
    outcome: ClassVar[str] = "{after:,} of {before:,} experts kept"

    kept_experts: dict[str, list[int]]
    dense_layers: tuple[str, ...]
    routed_share_kept: dict[str, dict[str, float]]

    def lines(self) -> list[str]:
        lines = super().lines()
        for side, shares in self.routed_share_kept.items():
            shown = [f"{language} {share:.1%}" for language, share in sorted(shares.items(), key=lambda x: x[1])]
            lines.append(f"routed tokens whose expert is kept, {side}: {', '.join(shown)}")
        return lines

    def layers(self) -> dict[str, dict[str, str]]:
        return {
            layer: {**columns, "kept": "dense" if layer in self.dense_layers else _ranges(self.kept_experts[layer])}
            for layer, columns in super().layers().items()
        }


@dataclass(frozen=True, kw_only=True)
class MergingReport(FewerExpertsReport):
    """What was merged.

    Attributes:
        expert_map: name of each MoE layer -> the new expert that each old one is part of.
    """

    operation: ClassVar[str] = "merge_experts"
    title: ClassVar[str] = "Merged experts"
    outcome: ClassVar[str] = "{before:,} experts merged to {after:,}"

    expert_map: dict[str, list[int]]


@dataclass(frozen=True, kw_only=True)
class AggregationReport(CompressionReport):
    """What was aggregated. `source` is the first checkpoint; sizes before are those of all checkpoints together.

    Attributes:
        checkpoints: the folders, in the order of their experts.
        num_experts: name of each MoE layer -> number of experts in each checkpoint.
    """

    operation: ClassVar[str] = "aggregate_experts"
    title: ClassVar[str] = "Aggregated experts"

    checkpoints: tuple[str, ...]
    num_experts: dict[str, list[int]]

    def lines(self) -> list[str]:
        return [
            f"{len(self.checkpoints)} checkpoints -> one: " + ", ".join(self.checkpoints),
            *super().lines(),
            "experts of the MoE layers: " + ", ".join(str(sum(counts)) for counts in self.num_experts.values()),
        ]

    def layers(self) -> dict[str, dict[str, str]]:
        return {
            layer: {"experts of the checkpoints": " + ".join(map(str, counts)), "together": str(sum(counts))}
            for layer, counts in self.num_experts.items()
        }


@dataclass(frozen=True, kw_only=True)
class QuantizationReport(CompressionReport):
    """What a quantization did. The number of parameters counts weights, in whatever form they are stored.

    Attributes:
        bits: bits per expert weight.
        group_size: weights per scale; `None` for a row.
        relative_errors: name of each MoE layer -> `||rounded - exact|| / ||exact||` of its experts' weight matrices.
        errors_of_parts: the same for the other parts that have 8 bits now; empty if only experts were rounded.
    """

    operation: ClassVar[str] = "quantize_experts"
    title: ClassVar[str] = "Quantized experts"

    bits: int
    group_size: int | None
    relative_errors: dict[str, float]
    errors_of_parts: dict[str, float] = dataclasses.field(default_factory=dict)

    def lines(self) -> list[str]:
        groups = "per channel" if self.group_size is None else f"in groups of {self.group_size}"
        errors = ", ".join(f"{error:.2%}" for error in self.relative_errors.values())
        lines = [
            f"{self.source}: experts in {self.bits} bits, {groups}",
            *super().lines(),
            f"relative error of the experts' weights, by layer: {errors}",
        ]
        if self.errors_of_parts:
            parts = ", ".join(f"{part} {error:.2%}" for part, error in self.errors_of_parts.items())
            lines[0] += "; all else in 8 bits, per channel"
            lines.append(f"of the other weights: {parts}")
        return lines

    def layers(self) -> dict[str, dict[str, str]]:
        return {layer: {"relative error of the weights": f"{e:.2%}"} for layer, e in self.relative_errors.items()}


@dataclass(frozen=True, kw_only=True)
class TrimmingReport(CompressionReport):
    """What a trim of the vocabulary kept.

    Attributes:
        num_tokens_before, num_tokens_after: rows of the embeddings.
        num_experts: name of each MoE layer -> number of experts, which does not change.
        texts: language -> `num_texts`; over all these texts, `num_tokens_before` and `num_tokens_after`,
            `num_unknown_before` and `num_unknown_after`; and `num_changed`, the texts that are encoded differently.
    """

    operation: ClassVar[str] = "trim_vocabulary"
    title: ClassVar[str] = "Trimmed vocabulary"

    num_tokens_before: int
    num_tokens_after: int
    num_experts: dict[str, int]
    texts: dict[str, dict[str, int]]

    def lines(self) -> list[str]:
        encodings = self.encodings()
        return [
            f"{self.source}: {self.num_tokens_after:,} of {self.num_tokens_before:,} tokens kept",
            *super().lines(),
            *(
                f"{language}: {row['texts']} texts, {row['tokens']} tokens, {row['unknown']} unknown, "
                f"{row['encoded otherwise']} texts encoded otherwise"
                for language, row in encodings.items()
            ),
        ]

    def layers(self) -> dict[str, dict[str, str]]:
        return {layer: {"experts": str(num_experts)} for layer, num_experts in self.num_experts.items()}

    def encodings(self) -> dict[str, dict[str, str]]:
        """Language -> how its texts are encoded, "before -> after", by column."""
        return {
            language: {
                "texts": f"{text['num_texts']:,}",
                "tokens": f"{text['num_tokens_before']:,} -> {text['num_tokens_after']:,}",
                "unknown": " -> ".join(
                    f"{text[f'num_unknown_{stage}'] / max(1, text[f'num_tokens_{stage}']):.2%}"
                    for stage in ("before", "after")
                ),
                "encoded otherwise": f"{text['num_changed']:,}",
            }
            for language, text in self.texts.items()
        }


_KINDS = {
    kind.operation: kind
    for kind in (PruningReport, MergingReport, AggregationReport, QuantizationReport, TrimmingReport)
}


def report_from_dict(fields: Mapping[str, Any]) -> CompressionReport:
    """Make a report from what `to_dict` returned.

    Raises:
        ValueError: the operation is unknown, a field is missing or of another type, or fields are not of the same
            layers.
    """
    operation = fields.get("operation")
    if not isinstance(operation, str) or operation not in _KINDS:
        raise ValueError(f"operation ({shorten(operation, 80)}) must be one of {', '.join(_KINDS)}")
    kind = _KINDS[operation]
    names = {field.name for field in dataclasses.fields(kind)}
    known = {name: value for name, value in fields.items() if name in names}
    if kind is QuantizationReport:
        known.setdefault("errors_of_parts", {})  # older reports lack it
    report: CompressionReport = from_fields(kind, known)
    try:
        num_lines, num_layers = len(report.lines()), len(report.layers())
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"its fields are not of the same MoE layers: {error}") from error
    if not (num_lines and (num_layers or kind is TrimmingReport)):  # a dense model has none, too
        raise ValueError("there is no MoE layer in it")
    return report


def _ranges(numbers: list[int]) -> str:
    """`[0, 1, 2, 5]` -> `"0-2, 5"`."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1][1:] = [number]
        else:
            ranges.append([number])
    return ", ".join("-".join(map(str, both)) for both in ranges)


__all__ = [
    "REPORT_NAME",
    "AggregationReport",
    "CompressionReport",
    "FewerExpertsReport",
    "MergingReport",
    "PruningReport",
    "QuantizationReport",
    "TrimmingReport",
    "report_from_dict",
]
