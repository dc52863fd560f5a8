"""Pruning: a smaller model with only the experts that matter for some languages, and their rows of the router."""

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from ..files.output import new_folder
from ..files.writing import keeping_places
from ..models.configuration_zcode_m3 import ZCodeM3Config
from ..models.language_codes import LanguagePair, language_ids, resolve_language
from ..models.layer_names import DENSE_OF_STACKED, SIDES, ffn_name, moe_layers, side_of
from ..models.modeling_zcode_m3 import ZCodeM3ForConditionalGeneration
from ..models.moe_layer import ZCodeM3DenseFFN, ZCodeM3MoELayer
from ..routing.expert_statistics import ExpertStatistics
from ..tensors.lazy_tensors import LazyTensors, check_all, num_bytes, num_parameters
from ..tensors.model_folder import meta_model, stored_specs
from .expert_selection import Criterion, ExpertSelection
from .importance import check_languages_of, expert_importance, random_importance
from .model_source import CompressionResult, ModelSource, open_source, set_num_experts
from .pruning_plan import KeptExperts, PruningPlan
from .report.compression_report import PruningReport
from .report.report_folder import describe
from .report.summary import Summary

# weight of a dense feed-forward -> stacked weight of the experts
_STACKED = {dense: stacked for stacked, dense in DENSE_OF_STACKED.items()}


@dataclass(frozen=True)
class PruningResult(CompressionResult):
    """A pruned model.

    Attributes:
        report: sizes before and after, and the share of each language's routed tokens that was kept.
    """

    report: PruningReport

    @property
    def kept_experts(self) -> KeptExperts:
        """Name of each MoE layer, as in `model.named_modules()` of the full model -> ids of the experts it keeps.

        The ids ascend: expert `i` of the pruned layer was expert `kept_experts[layer][i]`.
        """
        return self.report.kept_experts


@keeping_places()
def prune_experts(
    model_or_folder: ZCodeM3ForConditionalGeneration | str | os.PathLike[str],
    statistics: ExpertStatistics | None,
    *,
    keep: float | int | str,
    criterion: str | Criterion = "utilization",
    scope: str = "global",
    languages: Sequence[str] | Sequence[LanguagePair] | None = None,
    per_layer: str = "equal",
    min_experts: int | None = None,
    encoder_decoder_ratio: float | None = None,
    renormalize: bool = True,
    output_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> PruningResult:
    """Remove experts and their rows of the routers from a model; nothing is trained.

    The pruned model computes what the full one would compute if the router logits of the removed experts were minus
    infinity: the router's softmax is over the kept experts only. This holds for every routing option without a
    capacity. With `eval_capacity_factor`, fewer experts share the tokens, so each has a larger capacity and the pruned
    model drops fewer tokens. Random choices of routing (`second_expert_policy="sampling"`) have the same distribution,
    but are drawn with other random numbers.

    A layer with one expert left becomes dense (`encoder_sparse_layers`, `decoder_sparse_layers`), because the weight of
    its expert is always 1. With `use_residual` or `moe_token_dropout`, which a dense layer does not have, it stays an
    MoE layer of one expert.

    For NLLB-MoE, https://huggingface.co/papers/2212.09811 recommends to keep 36 of 128 experts in each encoder layer
    and 12 in each decoder layer: `keep=24, criterion="activity_confidence", scope="language",
    encoder_decoder_ratio=3.0`, with `languages`. Its translations into English were too long by a sixth, so compare
    length ratios, not only BLEU.

    Args:
        model_or_folder: a model in memory, which does not change, or a folder with `config.json` and weights of
            ZCodeM3, sharded or not; removed experts are not read.
        statistics: what `collect_expert_statistics` returned for this model; `None` for `criterion="random"` only.
        keep: a fraction of the experts (a float up to 1.0), a number of experts per layer (an int), or a size of the
            weights in their dtype (`"8GB"`, `"7.5GiB"`): as many experts as fit. It is rounded to whole experts per
            layer.
        criterion: `"random"`; `"utilization"`, the tokens an expert computes; `"activity_confidence"`, the share of
            first choices times `exp` of their mean probability; `"reap"`, the mean of weight times norm of the output;
            or a function that takes the [`LayerStatistics`] of some language pairs and returns number[E], higher for
            experts to keep.
        scope: the groups for which the criterion is computed: `"global"`, all pairs together; `"language_pair"`, each
            pair; `"language"`, each source language in the encoder and each target language in the decoder. The last
            two add up shares of importance within each group, so a language with much text does not count more than
            others.
        languages: the languages to keep, such as `["en", "de"]`, in all directions between them; or pairs, such as
            `[("en", "de")]`. By default all that the statistics have.
        per_layer: `"equal"`: each layer keeps the same number of experts, or the same share of them. `"adaptive"`: each
            layer keeps at least `min_experts`; the rest go to the experts with the highest share of their layer's
            importance, in any layer. The total is the same.
        min_experts: the fewest experts that a layer keeps; by default `num_experts_per_tok`, which is also the lowest
            value.
        encoder_decoder_ratio: experts of an encoder layer per expert of a decoder layer; the total stays the same.
        renormalize: whether the router's softmax is over the kept experts only. With `False` it stays over all experts,
            so a token whose experts were removed gets only a small output from another one. The router then keeps the
            removed experts' rows, which are never chosen (`expert_map` of [`ZCodeM3Config`]), and no layer becomes
            dense.
        output_dir: a new folder for the pruned model; it appears once it is complete. It gets the generation config,
            and from a folder the tokenizer, too. Required for a folder.
        seed: seed of `criterion="random"`.
        max_shard_size: largest size of a weight file, in bytes or as a string such as `"5GB"`.
        overwrite: whether to replace an `output_dir` that is not empty.

    Returns:
        [`PruningResult`] with the model, or with `output_dir`, which holds `compression_report.json` and `report.md`.

    Raises:
        ValueError: before anything is written: statistics of another model, or without one of `languages`; `keep`
            rounds to zero experts, leaves fewer than `min_experts` or is less than the smallest model; an unknown
            option; a folder that is no ZCodeM3 model or `output_dir` not empty; a model that is spread over processes.
    """
    source = open_source(
        model_or_folder, output_dir, overwrite=overwrite, max_shard_size=max_shard_size, purpose="prune a folder"
    )
    selection = ExpertSelection(
        keep=keep,
        min_experts=_min_experts(source.config, min_experts),
        criterion=criterion,
        scope=scope,
        languages=languages,
        per_layer=per_layer,
        encoder_decoder_ratio=encoder_decoder_ratio,
        seed=seed,
    )
    importance = _importance(source, statistics, selection)
    kept = PruningPlan(importance, selection, lambda kept: _num_bytes_with(source, kept, renormalize)).choose()
    config = _pruned_config(source.config, kept, renormalize)
    tensors = _pruned_tensors(source.tensors, config, kept)
    arguments = selection.arguments() | {"renormalize": renormalize}
    report = _report(source, config, tensors, kept, statistics, arguments)
    if output_dir is None:
        assert source.model is not None
        check_all(source.tensors)
        return PruningResult(report, model=_pruned_model(source.model, config, kept))

    summary = Summary.of(report, statistics)
    with new_folder(output_dir, overwrite=overwrite) as folder:
        source.write(folder, tensors, config, max_shard_size)
        describe(folder, summary, str(source.card))
    return PruningResult(report, output_dir=Path(output_dir))


def _importance(
    source: ModelSource, statistics: ExpertStatistics | None, selection: ExpertSelection
) -> dict[str, Tensor]:
    layers = moe_layers(source.config)
    if not layers:
        raise ValueError(f"{source.path} has no MoE layer to prune")
    if statistics is None and selection.criterion != "random":
        raise ValueError(
            f"criterion ({selection.criterion_name}) needs statistics (collect_expert_statistics); only 'random' does "
            "not"
        )
    if statistics is None:
        _check_known_to_tokenizer(source, selection.languages)
        return random_importance(layers, selection.seed)
    statistics.fingerprint.require_equal(source.fingerprint(), f"the statistics and {source.path}")
    if selection.criterion == "random":
        check_languages_of(statistics, selection)
        return random_importance(layers, selection.seed)
    return expert_importance(statistics, selection)


def _check_known_to_tokenizer(source: ModelSource, languages: Sequence[str] | Sequence[LanguagePair] | None) -> None:
    """Check languages without statistics: the model's tokenizer must have them."""
    if languages is None:
        return
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.path, local_files_only=True)
    except Exception:  # damaged files may raise any exception
        raise ValueError(
            f"languages ({languages}) cannot be checked: {source.path} has no tokenizer; "
            "give statistics, or no languages"
        ) from None
    known = list(language_ids(tokenizer))
    for item in languages:
        for code in (item,) if isinstance(item, str) else item:
            resolve_language(code, known, name="languages")


def _min_experts(config: ZCodeM3Config, min_experts: int | None) -> int:
    if min_experts is not None and min_experts < config.num_experts_per_tok:
        raise ValueError(
            f"min_experts ({min_experts}) must be at least num_experts_per_tok ({config.num_experts_per_tok}): each "
            "token needs so many different experts"
        )
    return min_experts or config.num_experts_per_tok


def _is_dense(config: ZCodeM3Config, num_experts: int) -> bool:
    """Whether a layer with so many experts left becomes dense: it has one, and no option needs an MoE layer."""
    return num_experts == 1 and not config.use_residual and config.moe_token_dropout == 0.0


def _pruned_config(source: ZCodeM3Config, kept: KeptExperts, renormalize: bool) -> ZCodeM3Config:
    config = copy.deepcopy(source)
    if not renormalize:
        num_experts = moe_layers(source)
        if any(len(experts) < num_experts[layer] for layer, experts in kept.items()):
            config.expert_map = [_map_of(experts, num_experts[layer]) for layer, experts in kept.items()]
    counts: list[int] = []
    for side in SIDES:
        layers = {index: len(kept[ffn_name(side, index)]) for index in source.sparse_layers(side)}
        sparse = {index: count for index, count in layers.items() if not (renormalize and _is_dense(source, count))}
        counts += sparse.values()
        if sparse.keys() != layers.keys():
            setattr(config, f"{side}_sparse_layers", [*sparse])
    config.num_experts = counts[0] if len({*counts}) == 1 else counts
    config.validate_architecture()
    config.validate_router()
    return config


def _map_of(kept: list[int], num_experts: int) -> list[int]:
    """Row of the router -> expert of the pruned layer; `len(kept)` for the row of a removed expert."""
    new_of_old = {old: new for new, old in enumerate(kept)}
    return [new_of_old.get(old, len(kept)) for old in range(num_experts)]


def _stored_as(name: str, kept: KeptExperts, config: ZCodeM3Config) -> tuple[str, list[int] | None]:
    """The weight of the full model from which a weight of the pruned one is taken, and which rows; `None` is all."""
    prefix, _, kind = name.partition(".ffn.")
    layer = f"{prefix}.ffn"
    if layer not in kept or kind.startswith("residual."):
        return name, None
    if kind.startswith("router.") and config.expert_map is not None:
        return name, None
    return f"{layer}.{_STACKED.get(kind, kind)}", kept[layer]


def _num_bytes_with(source: ModelSource, kept: KeptExperts, renormalize: bool) -> int:
    """Size of the weights with the experts that are kept, without making the model."""
    total = 0
    for name, spec in source.tensors.specs.items():
        prefix, _, kind = name.partition(".ffn.")
        experts = kept.get(f"{prefix}.ffn")
        if experts is None or kind.startswith("residual.") or (kind.startswith("router.") and not renormalize):
            total += spec.nbytes
        elif kind.startswith("experts.") or not _is_dense(source.config, len(experts)):
            total += spec.nbytes // spec.shape[0] * len(experts)
    return total


def _pruned_tensors(source: LazyTensors, config: ZCodeM3Config, kept: KeptExperts) -> LazyTensors:
    """The weights of the pruned model; removed experts are not read."""
    specs = {
        name: spec.to(source.specs[_stored_as(name, kept, config)[0]].dtype)
        for name, spec in stored_specs(meta_model(config)).items()
    }

    def read_into(name: str, out: Tensor) -> None:
        stored, experts = _stored_as(name, kept, config)
        if experts is None:
            source.into(stored, out)
            return
        rows = out if out.ndim == source.specs[stored].ndim else out.unsqueeze(0)  # a dense layer takes the one row
        for row, expert in zip(rows, experts, strict=True):
            row.copy_(source.row(stored, expert))

    return LazyTensors(specs, read_into=read_into)


def _pruned_model(
    model: ZCodeM3ForConditionalGeneration, config: ZCodeM3Config, kept: KeptExperts
) -> ZCodeM3ForConditionalGeneration:
    """A copy of the model, on its devices and in its dtypes; removed experts are not copied."""
    copies: dict[int, Any] = {id(model.config): config}
    sparse = {layer: experts for layer, experts in kept.items() if layer in moe_layers(config)}
    for layer, experts in kept.items():
        full: Any = model.get_submodule(layer)
        if layer not in sparse:
            copies[id(full)] = _dense_layer(full, config, experts)
            continue
        cut = [full.experts] if config.expert_map is not None else [full.experts, full.router]
        for parameter in (parameter for module in cut for parameter in module.parameters()):
            copies[id(parameter)] = nn.Parameter(parameter.detach()[experts], parameter.requires_grad)
    pruned = copy.deepcopy(model, copies)  # deepcopy takes what is in `copies` instead of making a copy
    set_num_experts(pruned)
    return pruned


def _dense_layer(layer: ZCodeM3MoELayer, config: ZCodeM3Config, experts: list[int]) -> ZCodeM3DenseFFN:
    with torch.device("meta"):
        dense = ZCodeM3DenseFFN(config, ffn_dim=layer.experts.up_proj.shape[1])
    for name, stacked in _STACKED.items():
        module, _, kind = name.partition(".")
        weight = layer.get_parameter(stacked)
        parameter = nn.Parameter(weight.detach()[experts].squeeze(0), weight.requires_grad)
        setattr(dense.get_submodule(module), kind, parameter)
    return dense.train(layer.training)


def _report(
    source: ModelSource,
    config: ZCodeM3Config,
    tensors: LazyTensors,
    kept: KeptExperts,
    statistics: ExpertStatistics | None,
    arguments: dict[str, Any],
) -> PruningReport:
    warnings = []
    if config.eval_capacity_factor is not None:
        warnings.append(
            f"eval_capacity_factor={config.eval_capacity_factor}: fewer experts have a larger capacity each, so the "
            "pruned model drops fewer tokens than the full one would without the removed experts"
        )
    sparse = moe_layers(config)
    if 1 in sparse.values() and config.expert_map is None:
        reason = "use_residual" if config.use_residual else "moe_token_dropout"
        warnings.append(f"layers with one expert stay MoE layers because of {reason}")
    return PruningReport(
        source=str(source.path),
        arguments=arguments,
        num_parameters_before=num_parameters(source.tensors.specs),
        num_parameters_after=num_parameters(tensors.specs),
        num_bytes_before=num_bytes(source.tensors.specs),
        num_bytes_after=num_bytes(tensors.specs),
        num_experts_before=moe_layers(source.config),
        num_experts_after={layer: len(experts) for layer, experts in kept.items()},
        kept_experts=kept,
        dense_layers=tuple(layer for layer in kept if layer not in sparse),
        routed_share_kept=_routed_share_kept(statistics, kept),
        warnings=tuple(warnings),
    )


def _routed_share_kept(statistics: ExpertStatistics | None, kept: KeptExperts) -> dict[str, dict[str, float]]:
    """See [`PruningReport`]."""
    if statistics is None:
        return {}
    shares: dict[str, dict[str, float]] = {}
    for side in SIDES:
        layers = [layer for layer in kept if side_of(layer) == side]
        for language, pairs in statistics.languages(side).items() if layers else ():
            num_routed = {layer: statistics.layers[layer].num_routed[pairs].sum(dim=(0, 1)) for layer in layers}
            num_kept = sum(num_routed[layer][kept[layer]].sum().item() for layer in layers)
            num_all = sum(of_layer.sum().item() for of_layer in num_routed.values())
            if num_all:
                shares.setdefault(side, {})[language] = num_kept / num_all
    return shares


__all__ = ["PruningResult", "prune_experts"]
