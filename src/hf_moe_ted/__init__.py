"""Multilingual Mixture-of-Experts sequence-to-sequence models for Hugging Face Transformers."""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from ._auto_registration import register_auto_classes

if TYPE_CHECKING:
    from .models.configuration_zcode_m3 import ZCodeM3Config
    from .models.modeling_zcode_m3 import ZCodeM3ForConditionalGeneration, ZCodeM3Model, ZCodeM3PreTrainedModel
    from .models.pipeline_translation import ZCodeM3TranslationPipeline
    from .models.tokenization_zcode_m3 import ZCodeM3Tokenizer

__version__ = version("hf-moe-ted")

_MODULE_OF_NAME = {
    "ZCodeM3Config": "models.configuration_zcode_m3",
    "ZCodeM3ForConditionalGeneration": "models.modeling_zcode_m3",
    "ZCodeM3Model": "models.modeling_zcode_m3",
    "ZCodeM3PreTrainedModel": "models.modeling_zcode_m3",
    "ZCodeM3Tokenizer": "models.tokenization_zcode_m3",
    "ZCodeM3TranslationPipeline": "models.pipeline_translation",
}

__all__ = [
    "ZCodeM3Config",
    "ZCodeM3ForConditionalGeneration",
    "ZCodeM3Model",
    "ZCodeM3PreTrainedModel",
    "ZCodeM3Tokenizer",
    "ZCodeM3TranslationPipeline",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF_NAME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


register_auto_classes()
