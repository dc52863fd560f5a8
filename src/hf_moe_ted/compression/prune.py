"""Fewer experts: the ones that matter for some languages, with their rows of the router, as a smaller model."""

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

# weights of a dense feed-forward -> those of experts, stacked
_STACKED = {dense: stacked for stacked, dense in DENSE_OF_STACKED.items()}


@dataclass(frozen=True)
class PruningResult(CompressionResult):
    """A pruned model.

    Attributes:
        report: sizes before and after, and what was kept of each language.
    """

    report: PruningReport

    @property
    def kept_experts(self) -> KeptExperts:
        """Name of each MoE layer, as in `model.named_modules()` of the full model -> ids of the experts it keeps.

        They ascend: expert `i` of the pruned layer was expert `kept_experts[layer][i]`.
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
    """Remove experts from a model, and with them their rows of the routers; nothing is trained.

    The pruned model computes what the full one does if the router logits of the removed experts are minus infinity:
    the router's probabilities are those of the kept experts among each other. This holds for every routing option
    without a capacity. With `eval_capacity_factor`, an expert's capacity is a share of the tokens among fewer experts
    and therefore larger, so that the pruned model drops fewer tokens; what routing draws at random
    (`second_expert_policy="sampling"`) it draws from the same distribution, with other numbers.

    A layer with one expert left becomes a dense one (`encoder_sparse_layers`, `decoder_sparse_layers`), as the weight
    of its expert is always 1. It stays a MoE layer of one expert under `use_residual` and `moe_token_dropout`, which a
    dense layer does not have.

    For NLLB-MoE, https://huggingface.co/papers/2212.09811 recommends to keep 36 of 128 experts in the encoder's layers
    and 12 in the decoder's: `keep=24, criterion="activity_confidence", scope="language", encoder_decoder_ratio=3.0` and
    the languages. Its translations into English came out too long by a sixth, so compare length ratios, not only BLEU.

    Args:
        model_or_folder: a model in memory, which is left as it is, or a folder with `config.json` and weights of
            ZCodeM3, sharded or not, of which only the kept experts are read.
        statistics: of `collect_expert_statistics` for this model; `None` for `criterion="random"` only.
        keep: a fraction of the experts (a float up to 1.0), a number of experts per layer (an int), or the size of the
            weights in the dtype they have (`"8GB"`, `"7.5GiB"`): as many experts as fit. Rounded to whole experts per
            layer.
        criterion: `"random"`; `"utilization"`, the tokens an expert computes; `"activity_confidence"`, the share of
            first choices times `exp` of their mean probability; `"reap"`, the mean of weight times norm of the output;
            or a function of the [`LayerStatistics`] of some language pairs that returns number[E], higher for experts
            to keep.
        scope: for what the criterion is computed: `"global"`, all pairs together; `"language_pair"`, each for itself;
            `"language"`, per source language in the encoder and per target language in the decoder. The last two add up
            the shares of the importance within each, so that a language with much text does not push others aside.
        languages: the languages to keep, `["en", "de"]`, in all directions between them, or the pairs,
            `[("en", "de")]`; by default all that the statistics have.
        per_layer: `"equal"`, as many experts in each layer, or the same share of them; or `"adaptive"`: at least
            `min_experts` in each layer, and beyond that those with the highest share of their layer's importance, in
            whatever layer. The total is the same.
        min_experts: the fewest that a layer keeps; by default `num_experts_per_tok`, which is also the least.
        encoder_decoder_ratio: so many experts in a layer of the encoder per expert in a layer of the decoder, with the
            same total.
        renormalize: whether the probabilities of the router are those of the kept experts among each other. With
            `False` they stay those over all experts, so that a token whose experts were removed gets little of another
            one: the router keeps the removed experts' rows, which are never chosen (`expert_map` of
            [`ZCodeM3Config`]), and no layer becomes dense.
        output_dir: a new folder for the pruned model, which appears when everything is in it. From a folder, tokenizer
            and generation config come along; from a model, the generation config. Required for a folder.
        seed: of `criterion="random"`.
        max_shard_size: of the weight files, bytes or a string such as `"5GB"`.
        overwrite: whether to replace an `output_dir` that is not empty.

    Returns:
        [`PruningResult`] with the model, or with `output_dir`, in which are `compression_report.json` and `report.md`.

    Raises:
        ValueError: before anything is written: statistics of another model, or without one of `languages`; `keep`
            rounds to zero experts, leaves fewer than `min_experts` or is less than the smallest model; an unknown
            option; a folder that is no ZCodeM3 model or `output_dir` not empty; a model that is spread over processes.
    """
    source = open_source(model_or_folder, output_dir, overwrite=overwrite, purpose="prune a folder")
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
            f"criterion ({selection.criterion_name}) needs statistics (collect_expert_statistics); only 'random' can "
            "do without"
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
    """What can be said about languages without statistics: that the model's tokenizer has them."""
    if languages is None:
        return
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.path, local_files_only=True)
    except Exception:  # what is damaged may raise anything
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
            f"min_experts ({min_experts}) must be at least num_experts_per_tok ({config.num_experts_per_tok}): a token "
            "needs so many different experts"
        )
    return min_experts or config.num_experts_per_tok


def _is_dense(config: ZCodeM3Config, num_experts: int) -> bool:
    """Whether a layer with so many experts left becomes dense: it has one, and does nothing that a dense one cannot."""
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
    """Row of the router -> expert of the pruned layer, `len(kept)` for those of removed experts."""
    new_of_old = {old: new for new, old in enumerate(kept)}
    return [new_of_old.get(old, len(kept)) for old in range(num_experts)]


def _stored_as(name: str, kept: KeptExperts, config: ZCodeM3Config) -> tuple[str, list[int] | None]:
    """Name of the weight of the full model that a weight of the pruned one is made of, and which rows; `None`: all."""
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
    """The weights of the pruned model; of the experts' weights only the rows that are kept are read."""
    specs = {
        name: spec.to(source.specs[_stored_as(name, kept, config)[0]].dtype)
        for name, spec in stored_specs(meta_model(config)).items()
    }

    def read_into(name: str, out: Tensor) -> None:
        stored, experts = _stored_as(name, kept, config)
        if experts is None:
            source.into(stored, out)
            return
        rows = out if out.ndim == source.specs[stored].ndim else out.unsqueeze(0)  # of a dense layer, the one row
        for row, expert in zip(rows, experts, strict=True):
            row.copy_(source.row(stored, expert))

    return LazyTensors(specs, read_into=read_into)


def _pruned_model(
    model: ZCodeM3ForConditionalGeneration, config: ZCodeM3Config, kept: KeptExperts
) -> ZCodeM3ForConditionalGeneration:
    """A copy of the model, on its devices and in its dtypes; of the experts only those that are kept are copied."""
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
    pruned = copy.deepcopy(model, copies)  # takes what is in `copies` in place of a copy
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
            f"eval_capacity_factor={config.eval_capacity_factor}: with fewer experts each takes more tokens, so the "
            "pruned model drops fewer than the full one would without the removed experts"
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
