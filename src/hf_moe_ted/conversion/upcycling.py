"""Dense checkpoints -> ZCodeM3 with copied experts: Sparse Upcycling (https://huggingface.co/papers/2212.05055)."""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from ..files.json_file import read_json_object
from ..files.named_seed import named_seed
from ..files.writing import keeping_places
from ..models.configuration_zcode_m3 import Side, ZCodeM3Config, changed_fields
from ..models.layer_names import DENSE_OF_STACKED, SIDES, moe_layers
from ..models.modeling_zcode_m3 import ZCodeM3ForConditionalGeneration
from ..tensors.config_file import checked_overrides, config_errors, read_config_fields
from ..tensors.conversion_report import ConversionReport
from ..tensors.lazy_tensors import LazyTensors, copy_rounded
from ..tensors.model_folder import (
    copy_tokenizer_and_generation_config,
    drop_tied_copies,
    meta_model,
    model_folder_writer,
    parse_dtype,
    stored_specs,
)
from ..tensors.safetensors_io import check_tensors, open_pretrained_tensors
from .m2m100 import MODEL_TYPE as M2M100
from .m2m100 import m2m100_config_fields, m2m100_name

_ARGUMENTS = ("num_experts", "encoder_sparse_step", "decoder_sparse_step")
_ROUTING = {"num_experts_per_tok": 2, "normalize_router_weights": "after_dropping"}

# fields that decide how a model uses the source's weights, and their shapes
_FIXED = (
    "vocab_size",
    "max_position_embeddings",
    "d_model",
    *(f"{side}_{name}" for side in SIDES for name in ("layers", "attention_heads", "ffn_dim")),
    "activation_function",
    "scale_embedding",
    "position_embedding_type",
    "pad_token_id",
    "tie_word_embeddings",
)

_COPIED = {f"residual.mlp.{name}": name for name in DENSE_OF_STACKED.values()}
# biases get no noise, as in every initialization
_NOISY = ("experts.up_proj", "experts.down_proj")


@keeping_places()
def upcycle_dense_checkpoint(
    source: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    num_experts: int | Sequence[int],
    encoder_sparse_step: int = 2,
    decoder_sparse_step: int = 2,
    noise_std: float = 0.0,
    seed: int = 0,
    config_overrides: Mapping[str, Any] | None = None,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> ConversionReport:
    """Make a ZCodeM3 model with experts from a dense model, to train it further.

    This is Sparse Upcycling (https://huggingface.co/papers/2212.05055): every `*_sparse_step`-th feed-forward becomes
    `num_experts` copies of itself, behind a new router with weights of standard deviation `config.init_std`. All other
    weights are copied. A ZCodeM3 source may have sparse layers already: they stay.

    By default a token goes to two experts whose weights are normalized to sum to 1. So the new model computes the same
    as the dense one as long as no expert is full, as in evaluation (appendix B.7; the paper's language models ended
    slightly better without normalization, `{"normalize_router_weights": None}`, from a worse start). While experts are
    equal, these weights change nothing, and the router learns from its own losses only. Training on different tokens,
    or `noise_std`, makes the experts different. With one expert per token the normalized weight is always 1 and never
    has a gradient; `{"num_experts_per_tok": 1, "normalize_router_weights": None}` has one, but scales the feed-forward
    by the router's probability, at first not much more than `1 / num_experts`. The report warns of settings that change
    the outputs.

    At most one output shard and the largest tensor are in memory. Tokenizer files and the generation config are copied.

    Args:
        source: a folder with `config.json` and safetensors or bin weights, sharded or not, of M2M100 or dense NLLB-200
            (both `"m2m_100"`), or of ZCodeM3.
        output_dir: the new folder; it appears once it is complete.
        num_experts: experts of each new sparse layer, at least 2, or one number per new sparse layer: the encoder's
            layers first, then the decoder's.
        encoder_sparse_step, decoder_sparse_step: layer `i` becomes sparse when `(i + 1) % step == 0`; 0 for none.
        noise_std: standard deviation of Gaussian noise on the weight matrices of the experts, not on their biases, in
            units of the weights. It depends on `seed`, the name and the expert, not on shards. A 16-bit dtype rounds
            away noise that is much smaller than the weight.
        seed: seed of the routers and the noise.
        config_overrides: other fields of [`ZCodeM3Config`], such as those of the router. `encoder_sparse_layers` and
            `decoder_sparse_layers` override the step. Other fields come from the source; if it is dense, the two
            routing fields above have the defaults described there.
        dtype: of the floating-point weights, `torch.bfloat16` or `"bfloat16"`; as in the source by default.
        max_shard_size: largest size of a weight file, in bytes or as a string such as `"5GB"`.
        overwrite: whether to replace an `output_dir` that is not empty.

    Returns:
        What was converted.

    Raises:
        ValueError: before anything is written: `source` is no folder of these models, or a weight is missing, unknown
            or of a wrong shape (the message names all of them); `num_experts` does not fit the sparse layers, or there
            are none; `noise_std` is negative; an override is unknown or contradicts the weights; `output_dir` is not
            empty; `dtype` is unknown.
    """
    source = Path(source)
    write = model_folder_writer(
        output_dir, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite, sources=[source]
    )
    if not 0 <= noise_std < math.inf:
        raise ValueError(f"noise_std ({noise_std}) must be a finite number of at least 0; 0 keeps experts equal")
    overrides = checked_overrides(config_overrides)
    dense = _open_source(source)
    steps = {"encoder_sparse_step": encoder_sparse_step, "decoder_sparse_step": decoder_sparse_step}
    config = _sparse_config(dense.config, num_experts, steps, overrides)
    return write(
        _sparse_tensors(dense.tensors, config, noise_std, seed, parse_dtype(dtype)),
        config,
        source=source,
        save_others=[copy_tokenizer_and_generation_config(source), _legacy_generation_config(source)],
        warnings=(*dense.warnings, *_warnings(config)),
    )


@dataclasses.dataclass(frozen=True)
class _Source:
    """The model that is upcycled.

    Attributes:
        config: config of the source, as ZCodeM3.
        tensors: all weights of that model under our names, tied ones once.
        warnings: features of the source that ZCodeM3 lacks.
    """

    config: ZCodeM3Config
    tensors: LazyTensors
    warnings: tuple[str, ...]


def _open_source(folder: Path) -> _Source:
    ours = ZCodeM3Config.model_type
    otherwise = f"; it must be {M2M100!r} (M2M100, dense NLLB-200) or {ours!r}"
    path, fields = read_config_fields(folder, "source", (M2M100, ours), otherwise)
    if fields.get("quantization_config"):
        raise ValueError(f"{path} has a quantization_config; upcycle the model before you quantize it")
    warnings = []
    name_in_source: Callable[[str], str] = str
    if fields["model_type"] == M2M100:
        warnings = [
            f"{name} ({fields[name]}) is left out: ZCodeM3 has no layer drop"
            for name in ("encoder_layerdrop", "decoder_layerdrop")
            if fields.get(name)
        ]
        name_in_source = m2m100_name
        with config_errors(path):
            fields = m2m100_config_fields(fields) | {"encoder_sparse_step": 0, "decoder_sparse_step": 0}
    with config_errors(path):
        config = ZCodeM3Config.from_dict(fields)
        model = meta_model(config)
    return _Source(config, _dense_tensors(folder, model, name_in_source), tuple(warnings))


def _dense_tensors(
    folder: Path, model: ZCodeM3ForConditionalGeneration, name_in_source: Callable[[str], str]
) -> LazyTensors:
    """The weights of the source under our names, tied ones once. Error messages use the source's names."""
    stored = open_pretrained_tensors(folder)
    # old versions of transformers stored the sinusoidal positions
    names = {name: name for name in stored if not name.endswith("embed_positions.weights")}
    stored = drop_tied_copies(stored.under_names(names), model.all_tied_weights_keys)
    expected = stored_specs(model)
    check_tensors(stored.specs, {name_in_source(name): spec for name, spec in expected.items()}, str(folder))
    return stored.under_names({name: name_in_source(name) for name in expected})


def _sparse_config(
    source: ZCodeM3Config, num_experts: int | Sequence[int], steps: Mapping[str, int], overrides: dict[str, Any]
) -> ZCodeM3Config:
    """The config of the new model. Sparse layers of the source stay; the new config chooses the others."""
    was_sparse = {side: source.num_experts_per_layer(side) for side in SIDES}
    is_dense = not any(was_sparse.values())
    _check_overrides(source, overrides, is_dense)
    counts = list(num_experts) if isinstance(num_experts, Sequence) else [num_experts]
    if min(counts, default=0) < 2:
        raise ValueError(
            f"num_experts ({num_experts}) must be at least 2 in every layer: with one expert the router has no choice"
        )

    fields = {**source.to_dict(), **(_ROUTING if is_dense else {})}
    fields |= {f"{side}_sparse_layers": None for side in SIDES}
    fields = changed_fields(fields, overrides) | dict(steps)
    requested = _config({**fields, "num_experts": max(counts)})
    new = {side: [i for i in requested.sparse_layers(side) if i not in was_sparse[side]] for side in SIDES}
    _check_new_layers(source, steps, num_experts, new)
    if is_dense:
        return _config({**fields, "num_experts": counts if isinstance(num_experts, Sequence) else num_experts})

    count = cycle(counts)  # one for each new layer, or the same for all
    is_sparse = {side: was_sparse[side] | {i: next(count) for i in new[side]} for side in SIDES}
    fields |= {f"{side}_sparse_layers": sorted(is_sparse[side]) for side in SIDES}
    return _config({**fields, "num_experts": [is_sparse[side][i] for side in SIDES for i in sorted(is_sparse[side])]})


def _check_new_layers(
    source: ZCodeM3Config, steps: Mapping[str, int], num_experts: int | Sequence[int], new: Mapping[Side, list[int]]
) -> None:
    """Raise unless there are dense layers to make sparse (`new`), as many as `num_experts` has numbers."""
    num_new = sum(map(len, new.values()))
    if not num_new:
        raise ValueError(
            ", ".join(f"{name} ({step})" for name, step in steps.items())
            + " make no dense layer sparse: of "
            + ", ".join(f"{getattr(source, f'{side}_layers')} {side} layers" for side in SIDES)
            + f", {len(moe_layers(source))} are sparse already; choose a step from 1 to the number of layers"
        )
    if isinstance(num_experts, Sequence) and len(num_experts) != num_new:
        raise ValueError(
            f"num_experts ({list(num_experts)}) lists {len(num_experts)} layers, but {num_new} become sparse: "
            f"encoder {new['encoder']}, decoder {new['decoder']}"
        )


def _config(fields: dict[str, Any]) -> ZCodeM3Config:
    with config_errors("num_experts, sparse steps and config_overrides do not fit the source"):
        return ZCodeM3Config.from_dict(fields)


def _check_overrides(source: ZCodeM3Config, overrides: Mapping[str, Any], is_dense: bool) -> None:
    arguments = sorted({*overrides} & {*_ARGUMENTS})
    if arguments:
        raise ValueError(f"config_overrides has {', '.join(arguments)}; pass it as a separate argument")
    unknown = sorted({*overrides} - {field.name for field in dataclasses.fields(ZCodeM3Config)})
    if unknown:
        raise ValueError(
            f"config_overrides has {', '.join(unknown)}, which ZCodeM3Config does not have; correct the name"
        )
    for name in _FIXED if is_dense else (*_FIXED, "router_bias", "use_residual"):
        if name in overrides and overrides[name] != getattr(source, name):
            raise ValueError(
                f"config_overrides sets {name} to {overrides[name]!r}, but the source's weights were made for "
                f"{getattr(source, name)!r}; leave it out"
            )


def _warnings(config: ZCodeM3Config) -> list[str]:
    """Warnings about settings that make equal experts differ from the dense model, or stop the router from learning."""
    top_k, normalize = config.num_experts_per_tok, config.normalize_router_weights
    counts = [count for side in SIDES for count in config.num_experts_per_layer(side).values()]
    differ = []
    if normalize is None and top_k < max(counts):
        differ.append("normalize_router_weights=None: the weights of a token's experts sum to less than 1")
    if config.second_expert_policy == "random" and normalize != "after_dropping":
        differ.append("second_expert_policy='random' leaves second experts out and does not rescale the first")
    if config.eval_capacity_factor is not None:
        differ.append(f"eval_capacity_factor={config.eval_capacity_factor} drops tokens of full experts")
    if config.moe_token_dropout:
        differ.append(f"moe_token_dropout={config.moe_token_dropout} scales the experts' outputs in evaluation")
    warnings = [f"the new sparse layers do not compute the same as the dense ones: {reason}" for reason in differ]
    if top_k == 1 and normalize is not None:
        warnings.append(
            f"num_experts_per_tok=1 with normalize_router_weights={normalize!r}: the one weight is always 1, so the "
            "router learns from the load-balancing and z-loss only; use num_experts_per_tok=2"
        )
    return warnings


def _sparse_tensors(
    dense: LazyTensors, config: ZCodeM3Config, noise_std: float, seed: int, dtype: torch.dtype | None
) -> LazyTensors:
    """The weights of the new model, each made when it is read.

    Args:
        dense: weights of the source.
        config: of the new model.
        noise_std: standard deviation of the noise on the experts.
        seed: seed of noise and routers.
        dtype: dtype of the new weights, so that noise is rounded once; by default the source's dtype.
    """

    def origin(name: str) -> str | None:
        """The weight from which `name` is made."""
        prefix, _, kind = name.partition(".ffn.")
        dense_kind = DENSE_OF_STACKED.get(kind) or _COPIED.get(kind)
        return name if name in dense else dense_kind and f"{prefix}.ffn.{dense_kind}"

    def read_into(name: str, out: Tensor) -> None:
        source, kind = origin(name), name.partition(".ffn.")[2]
        if source is None:  # weights of the router, or coefficients of a residual branch
            new = torch.zeros(out.shape)
            if name.endswith(".weight"):
                new.normal_(std=config.init_std, generator=_generator(seed, name))
            out.copy_(new)
        elif source == name or kind in _COPIED:
            copy_rounded(name, dense[source], out)
        else:
            _fill_experts(out, dense[source], noise_std if kind in _NOISY else 0.0, seed, name)

    specs = {
        name: spec.to(dtype or dense.specs[origin(name) or "model.shared.weight"].dtype)
        for name, spec in stored_specs(meta_model(config)).items()
    }
    return LazyTensors(specs, read_into=read_into)


def _fill_experts(experts: Tensor, weight: Tensor, noise_std: float, seed: int, name: str) -> None:
    """Fill `experts`, float[num_experts, *weight.shape], with copies of `weight`, each with its own noise."""
    for expert in range(len(experts)):
        copy = weight
        if noise_std:
            copy = torch.empty(weight.shape, dtype=torch.promote_types(weight.dtype, torch.float32))
            copy.normal_(std=noise_std, generator=_generator(seed, f"{name}.{expert}")).add_(weight)
        copy_rounded(name, copy, experts[expert])


def _generator(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(named_seed(seed, name))


def _legacy_generation_config(source: Path) -> Callable[[Path], None]:
    """Read generation options that old versions of transformers stored in the config; new configs do not have them."""

    if (source / "generation_config.json").is_file():
        return lambda folder: None
    with config_errors(source / "config.json"):
        fields: Any = read_json_object(source / "config.json", "config")
        return GenerationConfig.from_model_config(fields).save_pretrained


__all__ = ["upcycle_dense_checkpoint"]
