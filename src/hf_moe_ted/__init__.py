"""Multilingual Mixture-of-Experts sequence-to-sequence models for Hugging Face Transformers."""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from ._auto_registration import register_auto_classes

if TYPE_CHECKING:
    from .compression.aggregate import aggregate_experts as aggregate_experts
    from .compression.merge import MergingResult as MergingResult
    from .compression.merge import merge_experts as merge_experts
    from .compression.prune import PruningResult as PruningResult
    from .compression.prune import prune_experts as prune_experts
    from .compression.quantize import quantize_experts as quantize_experts
    from .compression.quantized_experts import ExpertQuantizationConfig as ExpertQuantizationConfig
    from .compression.report.compression_report import AggregationReport as AggregationReport
    from .compression.report.compression_report import MergingReport as MergingReport
    from .compression.report.compression_report import PruningReport as PruningReport
    from .compression.report.compression_report import QuantizationReport as QuantizationReport
    from .compression.report.compression_report import TrimmingReport as TrimmingReport
    from .compression.report.report_folder import write_compression_report as write_compression_report
    from .compression.trim import TrimmingResult as TrimmingResult
    from .compression.trim import trim_vocabulary as trim_vocabulary
    from .conversion.conversion_rules import RuleSet as RuleSet
    from .conversion.deepspeed.converter import convert_deepspeed_checkpoint as convert_deepspeed_checkpoint
    from .conversion.deepspeed.reader import DeepSpeedLayout as DeepSpeedLayout
    from .conversion.deepspeed.reader import inspect_deepspeed_checkpoint as inspect_deepspeed_checkpoint
    from .conversion.deepspeed.reader import read_deepspeed_state_dict as read_deepspeed_state_dict
    from .conversion.deepspeed.writer import export_deepspeed_checkpoint as export_deepspeed_checkpoint
    from .conversion.initialization import initialize_checkpoint as initialize_checkpoint
    from .conversion.m2m100_export import export_m2m100 as export_m2m100
    from .conversion.nllb_moe import convert_nllb_moe_checkpoint as convert_nllb_moe_checkpoint
    from .conversion.upcycling import upcycle_dense_checkpoint as upcycle_dense_checkpoint
    from .cuda_graphs.trainer_mixin import CudaGraphArguments as CudaGraphArguments
    from .cuda_graphs.trainer_mixin import CudaGraphSeq2SeqTrainingArguments as CudaGraphSeq2SeqTrainingArguments
    from .cuda_graphs.trainer_mixin import CudaGraphsTrainerMixin as CudaGraphsTrainerMixin
    from .data.batch_sampler import TokenBudgetBatchSampler as TokenBudgetBatchSampler
    from .data.batch_sampler import token_lengths as token_lengths
    from .data.batch_statistics import BatchStatistics as BatchStatistics
    from .data.collator import DataCollatorForMultitaskSeq2Seq as DataCollatorForMultitaskSeq2Seq
    from .data.denoising import DenoisingNoise as DenoisingNoise
    from .data.length_buckets import propose_length_buckets as propose_length_buckets
    from .data.mixture import Mixture as Mixture
    from .data.multitask_dataset import MultitaskDataset as MultitaskDataset
    from .data.multitask_stream import MultitaskStream as MultitaskStream
    from .data.multitask_stream import StreamSource as StreamSource
    from .distributed.accelerate_plugin import TedPlugin as TedPlugin
    from .distributed.activation_checkpoint import communication_aware_context_fn as communication_aware_context_fn
    from .distributed.adapters import shard_adapters as shard_adapters
    from .distributed.bounded_exchange import bounded_expert_load as bounded_expert_load
    from .distributed.layout import Layout as Layout
    from .distributed.step_snapshot import StepSnapshot as StepSnapshot
    from .distributed.ted_config import TedConfig as TedConfig
    from .distributed.trainer import TedSeq2SeqTrainer as TedSeq2SeqTrainer
    from .distributed.trainer import TedTrainer as TedTrainer
    from .evaluation.text_file import open_parallel_text as open_parallel_text
    from .evaluation.translation_card import write_translation_card as write_translation_card
    from .evaluation.translation_evaluation import evaluate_translation as evaluate_translation
    from .evaluation.translation_quality import DirectionQuality as DirectionQuality
    from .evaluation.translation_quality import TranslationQuality as TranslationQuality
    from .evaluation.translation_scores import TranslationScores as TranslationScores
    from .evaluation.translation_scores import score_translations as score_translations
    from .expert_memory.expert_memory import ExpertMemory as ExpertMemory
    from .expert_memory.memory_statistics import ExpertMemoryStatistics as ExpertMemoryStatistics
    from .models.configuration_zcode_m3 import ZCodeM3Config as ZCodeM3Config
    from .models.language_codes import parse_languages as parse_languages
    from .models.language_codes import resolve_language as resolve_language
    from .models.modeling_zcode_m3 import ZCodeM3ForConditionalGeneration as ZCodeM3ForConditionalGeneration
    from .models.modeling_zcode_m3 import ZCodeM3Model as ZCodeM3Model
    from .models.pipeline_translation import ZCodeM3TranslationPipeline as ZCodeM3TranslationPipeline
    from .models.pretrained_model import ZCodeM3PreTrainedModel as ZCodeM3PreTrainedModel
    from .models.tokenization_zcode_m3 import ZCodeM3Tokenizer as ZCodeM3Tokenizer
    from .optim.clipped_adamw import ClippedAdamW as ClippedAdamW
    from .optim.tiled_adamw import TiledAdamW as TiledAdamW
    from .planning.communication import collectives_of_step as collectives_of_step
    from .planning.gpus import Gpu as Gpu
    from .planning.memory import memory_of_rank as memory_of_rank
    from .planning.model_config import read_planned_config as read_planned_config
    from .planning.parameters import parameters_of_rank as parameters_of_rank
    from .planning.serving_plan import ServingPlan as ServingPlan
    from .planning.serving_plan import plan_serving as plan_serving
    from .planning.serving_time import zipf_of_experts as zipf_of_experts
    from .planning.simulation import local_numels_of_rank as local_numels_of_rank
    from .planning.simulation import simulated_step as simulated_step
    from .planning.training_plan import TrainingPlan as TrainingPlan
    from .planning.training_plan import plan_training as plan_training
    from .planning.workload import Workload as Workload
    from .routing.expert_statistics import ExpertStatistics as ExpertStatistics
    from .routing.expert_statistics import LayerStatistics as LayerStatistics
    from .routing.language_routing import LanguageRoutingCallback as LanguageRoutingCallback
    from .routing.router_statistics import RouterStatisticsCallback as RouterStatisticsCallback
    from .routing.statistics_collection import collect_expert_statistics as collect_expert_statistics
    from .routing.token_routing import TokenRouting as TokenRouting
    from .routing.token_routing import token_routing as token_routing
    from .serving.api_keys import ApiKeys as ApiKeys
    from .serving.app import create_app as create_app
    from .serving.batched_translator import BatchedTranslator as BatchedTranslator
    from .serving.page import mount_page as mount_page
    from .serving.server import bind_address as bind_address
    from .serving.server import run_server as run_server
    from .serving.settings import ServerSettings as ServerSettings
    from .tensors.conversion_report import ConversionReport as ConversionReport
    from .tensors.whole_model import load_model_and_tokenizer as load_model_and_tokenizer
    from .training.multitask_trainer import MultitaskSeq2SeqTrainer as MultitaskSeq2SeqTrainer
    from .training.multitask_trainer import MultitaskTrainerMixin as MultitaskTrainerMixin
    from .training.multitask_trainer import MultitaskTrainingArguments as MultitaskTrainingArguments
    from .translation.glossary import Glossary as Glossary
    from .translation.glossary import GlossaryEntry as GlossaryEntry
    from .translation.text_translator import TextTranslator as TextTranslator
    from .translation.text_translator import TranslatedSentence as TranslatedSentence
    from .translation.text_translator import TranslatedText as TranslatedText
    from .translation.translated_file import FileTranslation as FileTranslation
    from .translation.translated_file import translate_file as translate_file

try:
    __version__ = version("hf-moe-ted")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

_MODULE_OF_NAME = {
    "AggregationReport": "compression.report.compression_report",
    "ApiKeys": "serving.api_keys",
    "BatchStatistics": "data.batch_statistics",
    "BatchedTranslator": "serving.batched_translator",
    "ClippedAdamW": "optim.clipped_adamw",
    "ConversionReport": "tensors.conversion_report",
    "CudaGraphArguments": "cuda_graphs.trainer_mixin",
    "CudaGraphSeq2SeqTrainingArguments": "cuda_graphs.trainer_mixin",
    "CudaGraphsTrainerMixin": "cuda_graphs.trainer_mixin",
    "DataCollatorForMultitaskSeq2Seq": "data.collator",
    "DeepSpeedLayout": "conversion.deepspeed.reader",
    "DenoisingNoise": "data.denoising",
    "DirectionQuality": "evaluation.translation_quality",
    "ExpertMemory": "expert_memory.expert_memory",
    "ExpertMemoryStatistics": "expert_memory.memory_statistics",
    "ExpertQuantizationConfig": "compression.quantized_experts",
    "ExpertStatistics": "routing.expert_statistics",
    "FileTranslation": "translation.translated_file",
    "Glossary": "translation.glossary",
    "GlossaryEntry": "translation.glossary",
    "Gpu": "planning.gpus",
    "LanguageRoutingCallback": "routing.language_routing",
    "LayerStatistics": "routing.expert_statistics",
    "Layout": "distributed.layout",
    "MergingReport": "compression.report.compression_report",
    "MergingResult": "compression.merge",
    "Mixture": "data.mixture",
    "MultitaskDataset": "data.multitask_dataset",
    "MultitaskSeq2SeqTrainer": "training.multitask_trainer",
    "MultitaskStream": "data.multitask_stream",
    "MultitaskTrainerMixin": "training.multitask_trainer",
    "MultitaskTrainingArguments": "training.multitask_trainer",
    "PruningReport": "compression.report.compression_report",
    "PruningResult": "compression.prune",
    "QuantizationReport": "compression.report.compression_report",
    "RouterStatisticsCallback": "routing.router_statistics",
    "RuleSet": "conversion.conversion_rules",
    "ServerSettings": "serving.settings",
    "ServingPlan": "planning.serving_plan",
    "StepSnapshot": "distributed.step_snapshot",
    "StreamSource": "data.multitask_stream",
    "TedConfig": "distributed.ted_config",
    "TedPlugin": "distributed.accelerate_plugin",
    "TedSeq2SeqTrainer": "distributed.trainer",
    "TedTrainer": "distributed.trainer",
    "TextTranslator": "translation.text_translator",
    "TiledAdamW": "optim.tiled_adamw",
    "TokenBudgetBatchSampler": "data.batch_sampler",
    "TokenRouting": "routing.token_routing",
    "TrainingPlan": "planning.training_plan",
    "TranslatedSentence": "translation.text_translator",
    "TranslatedText": "translation.text_translator",
    "TranslationQuality": "evaluation.translation_quality",
    "TranslationScores": "evaluation.translation_scores",
    "TrimmingReport": "compression.report.compression_report",
    "TrimmingResult": "compression.trim",
    "Workload": "planning.workload",
    "ZCodeM3Config": "models.configuration_zcode_m3",
    "ZCodeM3ForConditionalGeneration": "models.modeling_zcode_m3",
    "ZCodeM3Model": "models.modeling_zcode_m3",
    "ZCodeM3PreTrainedModel": "models.pretrained_model",
    "ZCodeM3Tokenizer": "models.tokenization_zcode_m3",
    "ZCodeM3TranslationPipeline": "models.pipeline_translation",
    "aggregate_experts": "compression.aggregate",
    "bind_address": "serving.server",
    "bounded_expert_load": "distributed.bounded_exchange",
    "collect_expert_statistics": "routing.statistics_collection",
    "collectives_of_step": "planning.communication",
    "communication_aware_context_fn": "distributed.activation_checkpoint",
    "convert_deepspeed_checkpoint": "conversion.deepspeed.converter",
    "convert_nllb_moe_checkpoint": "conversion.nllb_moe",
    "create_app": "serving.app",
    "evaluate_translation": "evaluation.translation_evaluation",
    "export_deepspeed_checkpoint": "conversion.deepspeed.writer",
    "export_m2m100": "conversion.m2m100_export",
    "initialize_checkpoint": "conversion.initialization",
    "inspect_deepspeed_checkpoint": "conversion.deepspeed.reader",
    "load_model_and_tokenizer": "tensors.whole_model",
    "local_numels_of_rank": "planning.simulation",
    "memory_of_rank": "planning.memory",
    "merge_experts": "compression.merge",
    "mount_page": "serving.page",
    "open_parallel_text": "evaluation.text_file",
    "parameters_of_rank": "planning.parameters",
    "parse_languages": "models.language_codes",
    "plan_serving": "planning.serving_plan",
    "plan_training": "planning.training_plan",
    "propose_length_buckets": "data.length_buckets",
    "prune_experts": "compression.prune",
    "quantize_experts": "compression.quantize",
    "read_deepspeed_state_dict": "conversion.deepspeed.reader",
    "read_planned_config": "planning.model_config",
    "resolve_language": "models.language_codes",
    "run_server": "serving.server",
    "score_translations": "evaluation.translation_scores",
    "shard_adapters": "distributed.adapters",
    "simulated_step": "planning.simulation",
    "token_lengths": "data.batch_sampler",
    "token_routing": "routing.token_routing",
    "translate_file": "translation.translated_file",
    "trim_vocabulary": "compression.trim",
    "upcycle_dense_checkpoint": "conversion.upcycling",
    "write_compression_report": "compression.report.report_folder",
    "write_translation_card": "evaluation.translation_card",
    "zipf_of_experts": "planning.serving_time",
}

__all__ = list(_MODULE_OF_NAME)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF_NAME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


register_auto_classes()
