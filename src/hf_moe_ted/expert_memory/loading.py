"""Load a model from a folder; an [`ExpertCache`] loads its experts when they are needed."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.quantizers.auto import AutoQuantizationConfig

from ..compression.expert_selection import ExpertSelection
from ..compression.importance import expert_importance
from ..compression.quantized_experts import ExpertQuantizationConfig, ExpertQuantizer
from ..files.json_file import read_json_object
from ..kernels.int8_linear import packed_bytes_per_weight
from ..models.configuration_zcode_m3 import ZCodeM3Config
from ..models.family import NLLB_MOE
from ..models.layer_names import moe_layers
from ..routing.expert_statistics import ExpertStatistics, ModelFingerprint
from ..tensors.config_file import config_path, read_zcode_m3_config
from ..tensors.lazy_tensors import LazyTensors, check_weight, copy_rounded
from ..tensors.model_folder import drop_tied_copies, parse_dtype, read_generation_config, stored_dtype, stored_specs
from ..tensors.nllb_moe_folder import nllb_moe_tensors, read_nllb_moe_config, sources_by_target
from ..tensors.safetensors_io import check_tensors, open_pretrained_tensors
from ..tensors.whole_model import check_no_adapter
from .cached_experts import CachedExperts
from .expert_cache import ExpertCache
from .expert_files import ExpertFiles, Span
from .expert_sources import ExpertsInFiles, ExpertsInMemory, ExpertSource, HostStacks
from .memory_options import MemoryOptions
from .residence_plan import LayerSize, plan_residence

# options that Auto classes pass on and that have no effect for a folder
_ABOUT_THE_HUB = {"adapter_kwargs", "code_revision", "local_files_only", "revision", "token", "trust_remote_code"}


def load_with_expert_memory(
    model_class: Any,
    folder: str | os.PathLike[str],
    memory: MemoryOptions,
    *,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    attn_implementation: str | None = None,
    experts_implementation: str | None = None,
    config: ZCodeM3Config | None = None,
    output_loading_info: bool = False,
    **unknown: Any,
) -> Any:
    """Load a ZCodeM3 or NLLB-MoE from a folder, in evaluation mode.

    Args:
        model_class: [`ZCodeM3ForConditionalGeneration`].
        folder: folder with config and weights; they must be safetensors if experts stay in files.
        memory: options that say how many experts the device holds.
        dtype: dtype of the weights, and of a quantized model's scales; by default that of the config.
        device_map: one device; by default a GPU if there is one.
        attn_implementation, experts_implementation: as in `from_pretrained`; the default for experts on CPUs is
            `"zcode_cpu"`.
        config: replaces the config of the folder; Auto classes give it.
        output_loading_info: whether to also return missing weights; the list is always empty, because missing weights
            raise.

    Raises:
        ValueError: the folder does not exist; weights are missing, of another shape or dtype, or not finite; statistics
            are of another model or lack a language; the memory is too small; an option is unknown.
    """
    if others := unknown.keys() - _ABOUT_THE_HUB:
        raise ValueError(f"with expert_memory, from_pretrained has no option {', '.join(sorted(others))}")
    source = _Folder.open(Path(folder), config)
    device, config = _device(device_map), source.config
    if experts_implementation is None and device.type == "cpu":
        experts_implementation = "zcode_cpu"
    with torch.device("meta"):
        model = model_class._from_config(
            config,
            dtype=_dtype(dtype, source),
            attn_implementation=attn_implementation,
            experts_implementation=experts_implementation,
        )
    if source.quantization is not None:
        quantizer = ExpertQuantizer(source.quantization, pre_quantized=True)
        quantizer.preprocess_model(model)
        model.hf_quantizer = quantizer
        quantizer.postprocess_model(model)
    tensors = drop_tied_copies(source.tensors, model.all_tied_weights_keys)
    specs = stored_specs(model)
    _check_specs(tensors, specs, source.path)
    experts = {layer: model.get_submodule(f"{layer}.experts") for layer in moe_layers(config)}
    if not experts:
        raise ValueError(f"{folder} has no MoE layer, so it has no experts for expert_memory; leave expert_memory out")
    cache = _cache(source, tensors, experts, memory, device)
    for layer, module in experts.items():
        model.set_submodule(f"{layer}.experts", CachedExperts(cache, layer, module.num_experts, model.dtype))
    _load_the_rest(model, tensors, specs, device)
    _finish(model, source, cache)
    return (model, {"missing_keys": set(), "unexpected_keys": set()}) if output_loading_info else model


@dataclass(frozen=True)
class _Folder:
    """Config and weights of a folder; `names` maps our names to those in the files (one, or one per expert)."""

    path: Path
    config: ZCodeM3Config
    quantization: ExpertQuantizationConfig | None
    tensors: LazyTensors
    names: dict[str, list[str]]

    @classmethod
    def open(cls, path: Path, config: ZCodeM3Config | None) -> "_Folder":
        fields = read_json_object(config_path(path, "model"), "config")
        check_no_adapter(path)
        is_nllb_moe = fields.get("model_type") == NLLB_MOE
        config = config or (read_nllb_moe_config if is_nllb_moe else read_zcode_m3_config)(path, "model")
        tensors = open_pretrained_tensors(path, may_be_quantized="quantization_config" in fields)
        names = {name: [name] for name in tensors}
        if is_nllb_moe:
            names, _ = sources_by_target(tensors)
            tensors = nllb_moe_tensors(tensors)
        return cls(path, config, _quantization(path, fields), tensors, names)


def _quantization(path: Path, fields: Mapping[str, Any]) -> ExpertQuantizationConfig | None:
    if "quantization_config" not in fields:
        return None
    quantization = AutoQuantizationConfig.from_dict(dict(fields["quantization_config"]))
    if not isinstance(quantization, ExpertQuantizationConfig):
        raise ValueError(
            f"{path} is quantized by {quantization.quant_method}; expert_memory needs a model that hf-moe-ted "
            "quantize made, or one that is not quantized"
        )
    return quantization


def _dtype(dtype: torch.dtype | str, source: _Folder) -> torch.dtype:
    if dtype != "auto" and (parsed := parse_dtype(dtype)) is not None:
        return parsed
    return stored_dtype(source.config, source.tensors.specs)


def _device(device_map: Any) -> torch.device:
    if isinstance(device_map, Mapping) and len(set(device_map.values())) == 1:
        device_map = next(iter(device_map.values()))
    if device_map is None:
        device_map = "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(device_map, int):
        device_map = f"cuda:{device_map}"
    try:
        device = torch.device(device_map)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device_map ({device_map!r}) must be one device with expert_memory, such as 'cuda'"
        ) from error
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f"device_map ({device_map!r}) must be a GPU of CUDA or the CPU with expert_memory")
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= num_gpus:
        choice = "choose one of these, or 'cpu'" if num_gpus else "choose 'cpu'"
        raise ValueError(
            f"device_map ({device_map!r}) is no GPU that PyTorch can use here (it finds {num_gpus}); {choice}"
        )
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def _check_specs(tensors: LazyTensors, specs: Mapping[str, Tensor], path: Path) -> None:
    check_tensors(tensors.specs, specs, str(path))
    for name, spec in specs.items():
        if not spec.is_floating_point() and tensors.specs[name].dtype != spec.dtype:
            raise ValueError(f"{name} in {path} is {tensors.specs[name].dtype}, but must be {spec.dtype}")


def _cache(
    source: _Folder, tensors: LazyTensors, experts: Mapping[str, Any], memory: MemoryOptions, device: torch.device
) -> ExpertCache:
    shapes: dict[Any, int] = {}
    kinds, sizes = {}, {}
    for layer, module in experts.items():
        stacks = dict(module.named_parameters())
        shape = tuple((name, stack.shape[1:], stack.dtype) for name, stack in stacks.items())
        kinds[layer] = shapes.setdefault(shape, len(shapes))
        num_experts = module.num_experts
        slot_bytes = sum(stack.nbytes for stack in stacks.values()) // num_experts
        if device.type == "cpu" and getattr(module, "sums_in_float32", False):
            numel = sum(stack.numel() for stack in stacks.values() if not stack.is_floating_point())
            slot_bytes += numel // num_experts * packed_bytes_per_weight()
        sizes[layer] = LayerSize(num_experts, slot_bytes, kinds[layer])
    plan = plan_residence(sizes, memory.num_bytes, _importance(source, tensors, memory))
    in_files = memory.experts_in == "files" or (memory.experts_in == "auto" and device.type == "cpu")
    expert_source: ExpertSource = _in_files(source, experts) if in_files else _in_memory(tensors, experts, device)
    return ExpertCache(source.path, experts, kinds, plan, expert_source, device, memory.max_cpu_slots)


def _importance(source: _Folder, tensors: LazyTensors, memory: MemoryOptions) -> Mapping[str, Tensor] | None:
    """Shares of the languages' tokens, by source language in the encoder and target language in the decoder.

    Raises:
        ValueError: the statistics are of another model or lack a language.
    """
    statistics = memory.statistics
    if statistics is None:
        return None
    if not isinstance(statistics, ExpertStatistics):
        statistics = ExpertStatistics.load(statistics)
    routers = {layer: tensors[f"{layer}.router.weight"] for layer in moe_layers(source.config)}
    fingerprint = ModelFingerprint.of(source.config, routers)
    statistics.fingerprint.require_equal(fingerprint, f"the statistics and {source.path}")
    return expert_importance(statistics, ExpertSelection(keep=1.0, scope="language", languages=memory.languages))


def _in_memory(tensors: LazyTensors, experts: Mapping[str, Any], device: torch.device) -> ExpertsInMemory:
    layers = {}
    for layer, module in tqdm(experts.items(), desc="Loading experts", unit="layer"):
        layers[layer] = HostStacks(dict(module.named_parameters()))
        for name, stack in layers[layer].tensors.items():
            _read(tensors, f"{layer}.experts.{name}", stack)
    return ExpertsInMemory(layers, device)


def _in_files(source: _Folder, experts: Mapping[str, Any]) -> ExpertsInFiles:
    """
    Raises:
        ValueError: the numbers in the files may be too large for the dtype of the model.
    """
    files = ExpertFiles(source.path)
    spans: dict[str, dict[str, Sequence[Span]]] = {}
    dtypes: dict[str, dict[str, torch.dtype]] = {}
    for layer, module in experts.items():
        spans[layer], dtypes[layer] = {}, {}
        for name, spec in module.named_parameters():
            full_name = f"{layer}.experts.{name}"
            stored = dtypes[layer][name] = source.tensors.specs[full_name].dtype
            if spec.dtype == torch.float16 != stored:
                raise ValueError(
                    f"{full_name} in {source.path} is {stored}, which torch.float16 may not be able to hold, and "
                    "experts in files cannot be checked before they are used; use dtype='bfloat16', "
                    "experts_in='memory', or hf-moe-ted quantize with --dtype float16"
                )
            names = source.names[full_name]
            if len(names) == 1:
                indices = range(module.num_experts)
                spans[layer][name] = [files.span(names[0], index, module.num_experts) for index in indices]
            else:
                spans[layer][name] = [files.span(of_expert) for of_expert in names]
    return ExpertsInFiles(files, spans, dtypes)


def _read(tensors: LazyTensors, name: str, out: Tensor) -> None:
    """
    Raises:
        ValueError: a number is not finite, or too large for the dtype of `out`.
    """
    if out.dtype != tensors.specs[name].dtype:
        source = tensors[name]
        check_weight(name, source, tensors.where(name))
        copy_rounded(name, source, out)
        return
    tensors.into(name, out)
    if out.is_floating_point():
        check_weight(name, out, tensors.where(name))


def _load_the_rest(model: nn.Module, tensors: LazyTensors, specs: Mapping[str, Tensor], device: torch.device) -> None:
    state = {}
    for name, spec in specs.items():
        if ".ffn.experts." not in name:
            weight = torch.empty(spec.shape, dtype=spec.dtype)
            _read(tensors, name, weight)
            state[name] = weight.to(device)
    model.load_state_dict(state, strict=False, assign=True)


def _finish(model: Any, source: _Folder, cache: ExpertCache) -> None:
    """The remaining steps of `from_pretrained`."""
    model.tie_weights()
    model.to(cache.device)  # tables of positions and of merged rows, which checkpoints do not hold
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not missing, missing
    for module in model.modules():
        module._is_hf_initialized = True  # for `init_weights`, which would make new weights
    model.requires_grad_(False)
    model.eval()
    generation_config = read_generation_config(source.path)
    if generation_config is not None and hasattr(model, "_set_default_length"):
        model.generation_config = generation_config
        model._set_default_length(generation_config)
    model.name_or_path = model.config._name_or_path = str(source.path)
    model.expert_memory = cache


__all__ = ["load_with_expert_memory"]
