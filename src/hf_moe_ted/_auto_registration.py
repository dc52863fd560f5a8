"""Registration with the Auto* classes of transformers, without importing torch before it is needed.

To register with the Auto classes one must load them, which imports torch: `import hf_moe_ted` would take 2.3 s longer
than `import transformers` (processor time, transformers 5.23 and 5.24), but only 0.3 s are allowed. So a registration
with a module happens at once if the module is loaded, and otherwise at the end of its loading, as a part of it. If
either fails, the import fails, Python forgets the module, and the next import does both again.

Code that is imported at that time imports neither the module nor another that does, and models are loaded on use. So
the order of these imports, and their threads, do not matter.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def _register_config(configuration_auto: Any) -> None:
    from .models.configuration_zcode_m3 import ZCodeM3Config

    configuration_auto.AutoConfig.register(ZCodeM3Config.model_type, ZCodeM3Config, exist_ok=True)


def _register_tokenizer(tokenization_auto: Any) -> None:
    from .models.configuration_zcode_m3 import ZCodeM3Config
    from .models.tokenization_zcode_m3 import ZCodeM3Tokenizer

    tokenization_auto.AutoTokenizer.register(ZCodeM3Config, tokenizer_class=ZCodeM3Tokenizer, exist_ok=True)


def _register_quantizer(_: Any) -> None:
    from .compression import quantized_experts  # noqa: F401  # registers itself


def _register_pipeline(pipelines: Any) -> None:
    # `register_pipeline` accepts only a class; dotted paths, as in transformers, leave modules unloaded. The task
    # cannot be named "translation": docs/upstream/transformers_translation_task.md
    pipelines.PIPELINE_REGISTRY.supported_tasks["zcode-m3-translation"] = {
        "impl": "hf_moe_ted.models.pipeline_translation.ZCodeM3TranslationPipeline",
        "pt": (pipelines.AutoModelForSeq2SeqLM,),
        "type": "text",
    }


def _register_models(modeling_auto: Any) -> None:
    from transformers import NllbMoeConfig

    from .models.configuration_zcode_m3 import ZCodeM3Config

    for auto_class, name in (
        (modeling_auto.AutoModel, "ZCodeM3Model"),
        (modeling_auto.AutoModelForPreTraining, "ZCodeM3ForConditionalGeneration"),
        (modeling_auto.AutoModelForSeq2SeqLM, "ZCodeM3ForConditionalGeneration"),
    ):
        auto_class.register(ZCodeM3Config, type(name, (_LoadedWhenUsed,), {}), exist_ok=True)
        auto_class.register(NllbMoeConfig, type(name, (_ForNllbMoe,), {}), exist_ok=True)


class _LoadedWhenUsed:
    """The Auto classes call this instead of the model class of the same name, which it loads."""

    @classmethod
    def _model_class(cls) -> Any:
        return getattr(importlib.import_module(".models.modeling_zcode_m3", __package__), cls.__name__)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._model_class().from_pretrained(*args, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        return cls._model_class()._from_config(config, **kwargs)


class _ForNllbMoe(_LoadedWhenUsed):
    """The Auto classes call this for an NLLB-MoE checkpoint, instead of transformers' own class.

    transformers' `NllbMoeExperts` treats the one-hot mask of its router as expert numbers, so all tokens go to the
    first two experts and no translation is right. Code that imports `NllbMoeForConditionalGeneration` still gets that
    class.
    """

    @classmethod
    def from_pretrained(cls, *args: Any, config: Any, **kwargs: Any) -> Any:
        from .models.configuration_zcode_m3 import ZCodeM3Config

        # arguments that NllbMoeConfig does not have, such as `num_experts_per_tok=1`
        fields = {name: kwargs.pop(name) for name in [*kwargs] if name in ZCodeM3Config.__annotations__}
        return super().from_pretrained(*args, config=cls._converted(config, fields), **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        return super()._from_config(cls._converted(config, {}), **kwargs)

    @staticmethod
    def _converted(config: Any, fields: dict[str, Any]) -> Any:
        from .models.configuration_zcode_m3 import ZCodeM3Config
        from .models.nllb_moe import config_fields

        ours = ZCodeM3Config.from_dict(config_fields(config.to_dict()), **fields)
        ours._attn_implementation = config._attn_implementation  # arguments that the Auto class consumed
        ours._experts_implementation = config._experts_implementation
        return ours


_WITH_MODULE: dict[str, Callable[[Any], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.tokenization_auto": _register_tokenizer,
    "transformers.models.auto.modeling_auto": _register_models,
    "transformers.modeling_utils": _register_quantizer,  # not `quantizers.auto`, which that imports
    "transformers.pipelines": _register_pipeline,
}


# Those whose loading began with the finder there. Nobody else may wait for them: what is registered with them waits in
# turn for the import of this package.
_BEGUN: set[str] = set()


class _ThenRegister(Loader):
    """The loader of a module; it registers our classes when the module is loaded."""

    def __init__(self, loader: Loader, register: Callable[[Any], None]):
        self.loader = loader
        self.register = register

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        _BEGUN.add(spec.name)  # before it is in `sys.modules`
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = module.__spec__.loader = self.loader  # type: ignore[union-attr]
        self.loader.exec_module(module)
        self.register(module)


class _Finder(MetaPathFinder):
    """Finds the modules of `_WITH_MODULE` with the other finders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _WITH_MODULE:
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, others), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader, _WITH_MODULE[fullname])
        return spec


_FINDER = _Finder()


def register_auto_classes() -> None:
    """Register ZCodeM3 with the Auto classes, also for checkpoints of NLLB-MoE."""
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    for name in _WITH_MODULE.keys() & sys.modules.keys() - _BEGUN:
        _WITH_MODULE[name](importlib.import_module(name))  # waits for a thread that loads it
