"""The source of a compression: a model in memory, or a folder whose weights are read one by one."""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard

from ..files.json_file import read_json_object
from ..files.output import check_output_dir
from ..models.configuration_zcode_m3 import ZCodeM3Config
from ..models.family import NLLB_MOE
from ..models.layer_names import SIDES, ffn_name, moe_layers
from ..models.modeling_zcode_m3 import ZCodeM3ForConditionalGeneration
from ..routing.expert_statistics import ModelFingerprint
from ..tensors.byte_sizes import num_bytes_of
from ..tensors.config_file import config_path, read_zcode_m3_config
from ..tensors.lazy_tensors import LazyTensors
from ..tensors.model_folder import copy_tokenizer_and_generation_config, drop_tied_copies, meta_model, stored_specs
from ..tensors.model_in_memory import tensors_of_model
from ..tensors.nllb_moe_folder import nllb_moe_tensors, read_nllb_moe_config
from ..tensors.safetensors_io import check_tensors, open_pretrained_tensors, write_pretrained_tensors
from ..tensors.whole_model import check_no_adapter
from .report.compression_report import CompressionReport
from .report.model_card import derived_card


@dataclass(frozen=True)
class ModelSource:
    """Config and weights of a ZCodeM3 model.

    Attributes:
        path: the folder, or the name of the model's class; for messages.
        config: of the model.
        tensors: its weights, tied ones once.
        save_others: writes the generation config, and the tokenizer if the source is a folder, into another folder.
        card: model card for a model that is made of this one.
        model: the model itself, if it is one in memory.
    """

    path: Path
    config: ZCodeM3Config
    tensors: LazyTensors
    save_others: Callable[[Path], Any]
    card: ModelCard
    model: ZCodeM3ForConditionalGeneration | None = None

    @classmethod
    def open(
        cls,
        model_or_folder: ZCodeM3ForConditionalGeneration | str | os.PathLike[str],
        *,
        allow_merged: bool = False,
        allow_nllb_moe: bool = False,
    ) -> "ModelSource":
        """Open the source and check it: names, shapes and dtypes at once, numbers when they are read.

        Args:
            model_or_folder: a model in memory, or a folder of one.
            allow_merged: whether it may have an `expert_map`.
            allow_nllb_moe: whether a folder may be one of NLLB-MoE, which is read as ZCodeM3.

        Raises:
            ValueError: `model_or_folder` is something else; the model has weights that are not in this process, has an
                adapter or is quantized; the weights do not fit the config. When a weight is read: it has NaN or
                infinite numbers.
        """
        if isinstance(model_or_folder, str | os.PathLike):
            source = _open_folder(Path(model_or_folder), allow_nllb_moe)
        elif isinstance(model_or_folder, ZCodeM3ForConditionalGeneration):
            source = _open_model(model_or_folder)
        else:
            raise ValueError(
                "model_or_folder must be a ZCodeM3ForConditionalGeneration or the folder of one, got "
                f"{type(model_or_folder).__name__}"
            )
        if getattr(source.config, "quantization_config", None) or getattr(source.model, "hf_quantizer", None):
            raise ValueError(
                f"{source.path} is quantized already (quantization_config); compress the model before you quantize it"
            )
        if source.config.expert_map is not None and not allow_merged:
            raise ValueError(
                f"{source.path} has an expert_map: its experts were merged, or pruned with renormalize=False; "
                "compress the model from which it was made"
            )
        tensors = drop_tied_copies(source.tensors, meta_model(source.config).all_tied_weights_keys)
        check_tensors(tensors.specs, stored_specs(meta_model(source.config)), str(source.path))
        return dataclasses.replace(source, tensors=tensors)

    def fingerprint(self) -> ModelFingerprint:
        """What tells whether expert statistics belong to this model."""
        weights = {layer: self.tensors[f"{layer}.router.weight"] for layer in moe_layers(self.config)}
        return ModelFingerprint.of(self.config, weights)

    def write(self, folder: Path, tensors: LazyTensors, config: ZCodeM3Config, max_shard_size: int | str) -> None:
        """Write a model that is made of this one, with its config and tokenizer, into an existing folder."""
        write_pretrained_tensors(tensors, folder, max_shard_size=max_shard_size)
        # the dtype in a folder's config may differ from the dtype of the stored weights: it stays
        dtype = self.config.dtype if self.model is None else None
        config.dtype = dtype or tensors.specs["model.shared.weight"].dtype
        config.architectures = [ZCodeM3ForConditionalGeneration.__name__]
        config.save_pretrained(folder)
        self.save_others(folder)


@dataclass(frozen=True)
class CompressionResult:
    """A smaller model.

    Attributes:
        report: sizes before and after, and what became of the experts.
        model: the smaller model, if it was not written to a folder.
        output_dir: the folder that it was written to.
    """

    report: CompressionReport
    model: ZCodeM3ForConditionalGeneration | None = None
    output_dir: Path | None = None


def open_source(
    model_or_folder: ZCodeM3ForConditionalGeneration | str | os.PathLike[str],
    output_dir: str | os.PathLike[str] | None,
    *,
    overwrite: bool,
    max_shard_size: int | str,
    purpose: str,
    allow_merged: bool = False,
) -> ModelSource:
    """Open the source for a purpose, such as `"prune a folder"`, after a check of where the result goes, and how.

    `allow_merged` as in `ModelSource.open`.

    Raises:
        ValueError: see `check_output_dir` and `ModelSource.open`; the source is a folder and `output_dir` is missing;
            or `max_shard_size` is no size.
    """
    num_bytes_of(max_shard_size, "max_shard_size")
    if output_dir is not None:
        check_output_dir(output_dir, overwrite=overwrite, sources=[model_or_folder])
    source = ModelSource.open(model_or_folder, allow_merged=allow_merged)
    if output_dir is None and source.model is None:
        raise ValueError(f"output_dir is required to {purpose} ({source.path})")
    return source


def set_num_experts(model: ZCodeM3ForConditionalGeneration) -> None:
    """Set up the MoE layers of a model in memory as its config says; weights and config were replaced before."""
    for side in SIDES:
        expert_map = model.config.expert_map_per_layer(side)
        for index, num_experts in model.config.num_experts_per_layer(side).items():
            layer: Any = model.get_submodule(ffn_name(side, index))
            layer.router.num_experts = layer.experts.num_experts = num_experts
            if index in expert_map:
                layer.router.expert_map = tuple(expert_map[index])
                layer.router.expert_of_row = torch.tensor(expert_map[index], device=layer.router.weight.device)


def _open_folder(folder: Path, allow_nllb_moe: bool) -> ModelSource:
    fields = read_json_object(config_path(folder, "model"), "config")
    is_nllb_moe = allow_nllb_moe and fields.get("model_type") == NLLB_MOE
    config = read_nllb_moe_config(folder, "model") if is_nllb_moe else read_zcode_m3_config(folder, "model")
    check_no_adapter(folder)
    save_others = copy_tokenizer_and_generation_config(folder)
    tensors = open_pretrained_tensors(folder)
    if is_nllb_moe:
        tensors = nllb_moe_tensors(tensors)
    return ModelSource(folder, config, tensors, save_others, derived_card([str(folder)]))


def _open_model(model: ZCodeM3ForConditionalGeneration) -> ModelSource:
    tensors = tensors_of_model(model)
    path = Path(type(model).__name__)

    def save_generation_config(folder: Path) -> None:
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)

    card = derived_card([model.name_or_path or str(path)])
    return ModelSource(path, model.config, tensors, save_generation_config, card, model)


__all__ = ["CompressionResult", "ModelSource", "open_source", "set_num_experts"]
