"""Fewer experts: several that are alike become one, and the router keeps its rows."""

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..files.output import new_folder
from ..files.writing import keeping_places
from ..models.configuration_zcode_m3 import ZCodeM3Config
from ..models.language_codes import LanguagePair
from ..models.layer_names import moe_layers
from ..models.modeling_zcode_m3 import ZCodeM3ForConditionalGeneration
from ..routing.expert_statistics import ExpertStatistics
from ..tensors.lazy_tensors import LazyTensors, check_all, num_bytes, num_parameters
from ..tensors.model_folder import meta_model, stored_specs
from .expert_groups import ExpertGroups, assigned_to, clustered, neuron_order, require_scipy
from .expert_selection import ExpertSelection
from .importance import expert_importance
from .model_source import CompressionResult, ModelSource, open_source, set_num_experts
from .pruning_plan import KeptExperts, PruningPlan
from .report.compression_report import MergingReport
from .report.report_folder import describe
from .report.summary import Summary

METHODS = ("clustering", "frequency")

# dimension of the inner neurons, in the weights of one expert
_NEURON_DIM = {"up_proj": 0, "up_proj_bias": 0, "down_proj": 1}


@dataclass(frozen=True)
class MergingResult(CompressionResult):
    """A merged model."""

    report: MergingReport

    @property
    def expert_map(self) -> dict[str, list[int]]:
        """Name of each MoE layer -> for each old expert, and so for its row of the router, the new expert."""
        return self.report.expert_map


@keeping_places()
def merge_experts(
    model_or_folder: ZCodeM3ForConditionalGeneration | str | os.PathLike[str],
    statistics: ExpertStatistics,
    *,
    keep: float | int | str,
    method: str = "clustering",
    scope: str = "global",
    languages: Sequence[str] | Sequence[LanguagePair] | None = None,
    per_layer: str = "equal",
    min_experts: int = 1,
    encoder_decoder_ratio: float | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> MergingResult:
    """Average experts that are alike; nothing is trained.

    A token is routed as before, over all rows of the router. Each row leads to the new expert that its old expert is
    part of (`expert_map` of [`ZCodeM3Config`]). In the average, an expert counts by its share of the tokens of
    `languages`, as `criterion="utilization"` of `prune_experts` counts them for the `scope`.

    `"clustering"` is HC-SMoE (https://huggingface.co/papers/2410.08589): hierarchical clustering, with average linkage,
    of the experts' mean outputs. The paper runs every expert on all tokens. Here the mean is over the tokens that were
    routed to the expert, in all languages of the statistics. An expert without tokens joins the one whose router row is
    most similar to its own.

    `"frequency"` is MC-SMoE (https://huggingface.co/papers/2310.01334) without its low-rank compression: the most used
    experts are dominant. Each other expert is merged into the dominant one with the most similar router row, after its
    inner neurons were aligned with those of that expert. With `per_layer="adaptive"` dominant experts are chosen over
    all layers, as in the paper. Time and memory of the ordering grow fast with the inner width: it solves an assignment
    problem of that size per merged expert.

    Args:
        model_or_folder: a model in memory, which does not change, or a folder with `config.json` and weights of
            ZCodeM3, sharded or not, which are read expert by expert.
        statistics: what `collect_expert_statistics` returned for this model.
        keep: a fraction of the experts (a float up to 1.0), a number of experts per layer (an int), or a size of the
            weights in their dtype (`"8GB"`, `"7.5GiB"`): as many experts as fit.
        method: `"clustering"` or `"frequency"`.
        scope, languages, per_layer, encoder_decoder_ratio: as in `prune_experts`; they say how much each expert is used
            and how many experts each layer gets.
        min_experts: the fewest experts that a layer keeps. It may be less than `num_experts_per_tok`: a token that goes
            to an expert twice gets the sum of both weights.
        output_dir: a new folder for the merged model; it appears once it is complete. It gets the generation config,
            and from a folder the tokenizer, too. Required for a folder.
        max_shard_size: largest size of a weight file, in bytes or as a string such as `"5GB"`.
        overwrite: whether to replace an `output_dir` that is not empty.

    Returns:
        [`MergingResult`] with the model, or with `output_dir`, which holds `compression_report.json` and `report.md`.

    Raises:
        ValueError: before anything is written: statistics are missing, of another model, or without one of `languages`;
            `keep` rounds to zero experts, leaves fewer than `min_experts` or is less than the smallest model; an
            unknown option; a folder that is no ZCodeM3 model or `output_dir` not empty; a model that is spread over
            processes, merged or quantized; SciPy is not installed (`pip install 'hf-moe-ted[merge]'`).
    """
    if method not in METHODS:
        raise ValueError(f"method ({method!r}) must be one of {METHODS}")
    if min_experts < 1:
        raise ValueError(f"min_experts ({min_experts}) must be at least 1")
    require_scipy()
    source = open_source(
        model_or_folder,
        output_dir,
        overwrite=overwrite,
        max_shard_size=max_shard_size,
        purpose="merge the experts of a folder",
    )
    selection = ExpertSelection(
        keep=keep,
        min_experts=min_experts,
        scope=scope,
        languages=languages,
        per_layer=per_layer,
        encoder_decoder_ratio=encoder_decoder_ratio,
    )
    usage = _usage(source, statistics, selection)
    most_used = PruningPlan(usage, selection, lambda kept: _num_bytes_with(source.tensors, kept)).choose()
    groups = {layer: _groups(source.tensors, statistics, method, layer, most_used[layer]) for layer in most_used}
    config = _merged_config(source.config, groups)
    tensors = _Merging(source.tensors, groups, usage, is_ordered=method == "frequency").tensors(config)
    report = _report(source, tensors, groups, statistics, {"method": method} | _arguments(selection))
    if output_dir is None:
        assert source.model is not None
        check_all(source.tensors)
        return MergingResult(report, model=_merged_model(source.model, config, tensors, groups))

    summary = Summary.of(report, statistics)
    with new_folder(output_dir, overwrite=overwrite) as folder:
        source.write(folder, tensors, config, max_shard_size)
        describe(folder, summary, str(source.card))
    return MergingResult(report, output_dir=Path(output_dir))


def _arguments(selection: ExpertSelection) -> dict[str, Any]:
    """The options of merging; the criterion is always utilization."""
    return {name: value for name, value in selection.arguments().items() if name not in ("criterion", "seed")}


def _usage(source: ModelSource, statistics: ExpertStatistics, selection: ExpertSelection) -> dict[str, Tensor]:
    """Name of each MoE layer -> float64[E], shares of the tokens."""
    if not moe_layers(source.config):
        raise ValueError(f"{source.path} has no MoE layer whose experts could be merged")
    if not isinstance(statistics, ExpertStatistics):
        raise ValueError(f"merging needs statistics from collect_expert_statistics, got {type(statistics).__name__}")
    statistics.fingerprint.require_equal(source.fingerprint(), f"the statistics and {source.path}")
    return expert_importance(statistics, selection)


def _groups(
    tensors: LazyTensors, statistics: ExpertStatistics, method: str, layer: str, most_used: list[int]
) -> ExpertGroups:
    """The groups of a layer, one for each of its most used experts."""
    router_weight = tensors[f"{layer}.router.weight"]
    if method == "frequency":
        return assigned_to(most_used, router_weight)
    outputs = statistics.layers[layer].centroids.clone()
    has_output = statistics.layers[layer].num_computed.sum(dim=0) > 0
    with_output = has_output.nonzero().flatten().tolist()
    for expert, *others in assigned_to(with_output, router_weight) if with_output else ():
        outputs[others] = outputs[expert].clone()
    return clustered(outputs, len(most_used))


def _num_bytes_with(tensors: LazyTensors, kept: KeptExperts) -> int:
    """Size of the weights with so many experts, without merging them."""
    total = 0
    for name, spec in tensors.specs.items():
        layer, _, _ = name.rpartition(".experts.")
        total += spec.nbytes // spec.shape[0] * len(kept[layer]) if layer in kept else spec.nbytes
    return total


def _merged_config(source: ZCodeM3Config, groups: dict[str, ExpertGroups]) -> ZCodeM3Config:
    config = copy.deepcopy(source)
    counts = [len(of_layer) for of_layer in groups.values()]
    config.num_experts = counts[0] if len({*counts}) == 1 else counts
    if counts != [*moe_layers(source).values()]:
        config.expert_map = [_map_of(of_layer) for of_layer in groups.values()]
    config.validate_router()
    return config


def _map_of(groups: ExpertGroups) -> list[int]:
    """Old expert -> new expert."""
    new_of_old = {expert: new for new, group in enumerate(groups) for expert in group}
    return [new_of_old[expert] for expert in range(len(new_of_old))]


class _Merging:
    """The weights of the merged model; one group of the source's experts is in memory at a time."""

    def __init__(
        self, source: LazyTensors, groups: dict[str, ExpertGroups], usage: dict[str, Tensor], *, is_ordered: bool
    ):
        self._source, self._groups, self._usage = source, groups, usage
        self._order: dict[tuple[str, int], Tensor] = {}
        if is_ordered:
            pairs = [(layer, group[0], expert) for layer in groups for group in groups[layer] for expert in group[1:]]
            for layer, like, expert in tqdm(pairs, desc="Ordering the neurons of experts", unit="expert"):
                self._order[layer, expert] = neuron_order(self._weights(layer, like), self._weights(layer, expert))

    def _weights(self, layer: str, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        up, bias, down = (self._source.row(f"{layer}.experts.{kind}", expert) for kind in _NEURON_DIM)
        return up, bias, down

    def tensors(self, config: ZCodeM3Config) -> LazyTensors:
        """The tensors of the model with this config, each made when it is read."""
        specs = {
            name: spec.to(self._source.specs[name].dtype) for name, spec in stored_specs(meta_model(config)).items()
        }
        return LazyTensors(specs, read_into=self._read_into)

    def _read_into(self, name: str, out: Tensor) -> None:
        layer, _, kind = name.rpartition(".experts.")
        if layer not in self._groups:
            self._source.into(name, out)
            return
        for new, group in enumerate(self._groups[layer]):
            usage = self._usage[layer][group]
            shares = usage / usage.sum() if usage.any() else torch.full_like(usage, 1 / len(group))
            total = torch.zeros(out.shape[1:], dtype=torch.float64)  # rounded once
            for share, expert in zip(shares.tolist(), group, strict=True):
                weight = self._source.row(name, expert)
                if (layer, expert) in self._order and kind in _NEURON_DIM:
                    weight = weight.index_select(_NEURON_DIM[kind], self._order[layer, expert])
                total += share * weight.double()
            out[new] = total


def _merged_model(
    model: ZCodeM3ForConditionalGeneration, config: ZCodeM3Config, tensors: LazyTensors, groups: dict[str, ExpertGroups]
) -> ZCodeM3ForConditionalGeneration:
    """A copy of the model, on its devices and in its dtypes, with the merged experts."""
    copies: dict[int, Any] = {id(model.config): config}
    for layer in groups:
        for name, parameter in model.get_submodule(f"{layer}.experts").named_parameters():
            merged_weight = tensors[f"{layer}.experts.{name}"].to(parameter.device)
            copies[id(parameter)] = nn.Parameter(merged_weight, parameter.requires_grad)
    merged = copy.deepcopy(model, copies)  # deepcopy takes what is in `copies` instead of making a copy
    set_num_experts(merged)
    return merged


def _report(
    source: ModelSource,
    tensors: LazyTensors,
    groups: dict[str, ExpertGroups],
    statistics: ExpertStatistics,
    arguments: dict[str, Any],
) -> MergingReport:
    warnings = []
    if source.config.eval_capacity_factor is not None:
        warnings.append(
            f"eval_capacity_factor={source.config.eval_capacity_factor}: the router rows of a merged expert share its "
            "capacity, which is computed for fewer experts; the merged model drops other tokens than the full one"
        )
    unused = {
        layer: count for layer in groups if (count := int((statistics.layers[layer].num_computed.sum(0) == 0).sum()))
    }
    if unused:
        listed = ", ".join(f"{layer}: {count}" for layer, count in unused.items())
        warnings.append(f"these experts have no token in the statistics, so their weights do not count: {listed}")
    return MergingReport(
        source=str(source.path),
        arguments=arguments,
        num_parameters_before=num_parameters(source.tensors.specs),
        num_parameters_after=num_parameters(tensors.specs),
        num_bytes_before=num_bytes(source.tensors.specs),
        num_bytes_after=num_bytes(tensors.specs),
        warnings=tuple(warnings),
        num_experts_before=moe_layers(source.config),
        num_experts_after={layer: len(of_layer) for layer, of_layer in groups.items()},
        expert_map={layer: _map_of(of_layer) for layer, of_layer in groups.items()},
    )


__all__ = ["MergingResult", "merge_experts"]
