"""Multilingual Mixture-of-Experts sequence-to-sequence models for Hugging Face Transformers."""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from ._auto_registration import register_auto_classes

if TYPE_CHECKING:
    from .checkpoint.conversion_report import ConversionReport
    from .checkpoint.conversion_rules import RuleSet
    from .checkpoint.deepspeed_converter import convert_deepspeed_checkpoint
    from .checkpoint.deepspeed_reader import DeepSpeedLayout, inspect_deepspeed_checkpoint, read_deepspeed_state_dict
    from .checkpoint.deepspeed_writer import export_deepspeed_checkpoint
    from .checkpoint.initialization import initialize_checkpoint
    from .checkpoint.nllb_moe import convert_nllb_moe_checkpoint
    from .checkpoint.upcycling import upcycle_dense_checkpoint
    from .compression.aggregate import AggregationReport, aggregate_experts
    from .compression.expert_statistics import ExpertStatistics, LayerStatistics
    from .compression.merge import MergingReport, MergingResult, merge_experts
    from .compression.prune import PruningResult, prune_experts
    from .compression.quantize import QuantizationReport, quantize_experts
    from .compression.quantized_experts import ExpertQuantizationConfig
    from .compression.statistics_collection import collect_expert_statistics
    from .distributed.accelerate_plugin import TedPlugin
    from .distributed.activation_checkpoint import communication_aware_context_fn
    from .distributed.ted_config import TedConfig
    from .distributed.trainer import TedSeq2SeqTrainer, TedTrainer
    from .models.configuration_zcode_m3 import ZCodeM3Config
    from .models.modeling_zcode_m3 import ZCodeM3ForConditionalGeneration, ZCodeM3Model, ZCodeM3PreTrainedModel
    from .models.pipeline_translation import ZCodeM3TranslationPipeline
    from .models.tokenization_zcode_m3 import ZCodeM3Tokenizer
    from .optim.tiled_adamw import TiledAdamW
    from .training.router_statistics import RouterStatisticsCallback

__version__ = version("hf-moe-ted")

_MODULE_OF_NAME = {
    "AggregationReport": "compression.aggregate",
    "ConversionReport": "checkpoint.conversion_report",
    "DeepSpeedLayout": "checkpoint.deepspeed_reader",
    "ExpertQuantizationConfig": "compression.quantized_experts",
    "ExpertStatistics": "compression.expert_statistics",
    "LayerStatistics": "compression.expert_statistics",
    "MergingReport": "compression.merge",
    "MergingResult": "compression.merge",
    "PruningResult": "compression.prune",
    "QuantizationReport": "compression.quantize",
    "RouterStatisticsCallback": "training.router_statistics",
    "RuleSet": "checkpoint.conversion_rules",
    "TedConfig": "distributed.ted_config",
    "TedPlugin": "distributed.accelerate_plugin",
    "TedSeq2SeqTrainer": "distributed.trainer",
    "TedTrainer": "distributed.trainer",
    "TiledAdamW": "optim.tiled_adamw",
    "ZCodeM3Config": "models.configuration_zcode_m3",
    "ZCodeM3ForConditionalGeneration": "models.modeling_zcode_m3",
    "ZCodeM3Model": "models.modeling_zcode_m3",
    "ZCodeM3PreTrainedModel": "models.modeling_zcode_m3",
    "ZCodeM3Tokenizer": "models.tokenization_zcode_m3",
    "ZCodeM3TranslationPipeline": "models.pipeline_translation",
    "aggregate_experts": "compression.aggregate",
    "collect_expert_statistics": "compression.statistics_collection",
    "communication_aware_context_fn": "distributed.activation_checkpoint",
    "convert_deepspeed_checkpoint": "checkpoint.deepspeed_converter",
    "convert_nllb_moe_checkpoint": "checkpoint.nllb_moe",
    "export_deepspeed_checkpoint": "checkpoint.deepspeed_writer",
    "initialize_checkpoint": "checkpoint.initialization",
    "inspect_deepspeed_checkpoint": "checkpoint.deepspeed_reader",
    "merge_experts": "compression.merge",
    "prune_experts": "compression.prune",
    "quantize_experts": "compression.quantize",
    "read_deepspeed_state_dict": "checkpoint.deepspeed_reader",
    "upcycle_dense_checkpoint": "checkpoint.upcycling",
}

__all__ = [
    "AggregationReport",
    "ConversionReport",
    "DeepSpeedLayout",
    "ExpertQuantizationConfig",
    "ExpertStatistics",
    "LayerStatistics",
    "MergingReport",
    "MergingResult",
    "PruningResult",
    "QuantizationReport",
    "RouterStatisticsCallback",
    "RuleSet",
    "TedConfig",
    "TedPlugin",
    "TedSeq2SeqTrainer",
    "TedTrainer",
    "TiledAdamW",
    "ZCodeM3Config",
    "ZCodeM3ForConditionalGeneration",
    "ZCodeM3Model",
    "ZCodeM3PreTrainedModel",
    "ZCodeM3Tokenizer",
    "ZCodeM3TranslationPipeline",
    "aggregate_experts",
    "collect_expert_statistics",
    "communication_aware_context_fn",
    "convert_deepspeed_checkpoint",
    "convert_nllb_moe_checkpoint",
    "export_deepspeed_checkpoint",
    "initialize_checkpoint",
    "inspect_deepspeed_checkpoint",
    "merge_experts",
    "prune_experts",
    "quantize_experts",
    "read_deepspeed_state_dict",
    "upcycle_dense_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF_NAME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


register_auto_classes()
