"""Registration with the Auto* classes of transformers, without importing torch before it is needed.

`AutoModel.register` needs the model class, so calling it at import would load torch and the Auto classes, which costs
a second that `hf-moe-ted --help` and every process that imports the package would pay. Instead registration runs at
once if the Auto classes are loaded already, and otherwise right after they are.
"""

import copy
import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def _register_config() -> None:
    from transformers import AutoConfig

    from .models.configuration_zcode_m3 import ZCodeM3Config

    AutoConfig.register(ZCodeM3Config.model_type, ZCodeM3Config, exist_ok=True)


def _register_tokenizer() -> None:
    from transformers import AutoTokenizer

    from .models.configuration_zcode_m3 import ZCodeM3Config
    from .models.tokenization_zcode_m3 import ZCodeM3Tokenizer

    AutoTokenizer.register(ZCodeM3Config, tokenizer_class=ZCodeM3Tokenizer, exist_ok=True)


def _register_quantizer() -> None:
    from .compression import quantized_experts  # noqa: F401  # registers itself


def _register_pipeline() -> None:
    from transformers import AutoModelForSeq2SeqLM
    from transformers.pipelines import PIPELINE_REGISTRY

    # `register_pipeline` takes only a class; the dotted path leaves the module unloaded until the task is used
    PIPELINE_REGISTRY.supported_tasks["zcode-m3-translation"] = {
        "impl": "hf_moe_ted.models.pipeline_translation.ZCodeM3TranslationPipeline",
        "pt": (AutoModelForSeq2SeqLM,),
        "type": "text",
    }


# What must be loaded completely before the model classes can be registered, in this order. Any of them may be what
# imports another, so registration is tried after each.
_MODELS_NEED = (
    "transformers.models.auto.modeling_auto",
    "transformers.modeling_utils",
    "transformers.modeling_layers",
    "hf_moe_ted.models.modeling_zcode_m3",
)
_loaded: set[str] = set()


def _register_models() -> None:
    for name in _MODELS_NEED:
        if name not in _loaded:
            if name not in sys.modules:
                importlib.import_module(name)  # comes back here when it is loaded
            return  # if not loaded by now, it is being imported further up the stack

    from transformers import AutoModel, AutoModelForPreTraining, AutoModelForSeq2SeqLM, NllbMoeConfig

    from .models.configuration_zcode_m3 import ZCodeM3Config
    from .models.modeling_zcode_m3 import ZCodeM3ForConditionalGeneration, ZCodeM3Model

    for auto_class, model_class in (
        (AutoModel, ZCodeM3Model),
        (AutoModelForPreTraining, ZCodeM3ForConditionalGeneration),
        (AutoModelForSeq2SeqLM, ZCodeM3ForConditionalGeneration),
    ):
        auto_class.register(ZCodeM3Config, model_class, exist_ok=True)
        auto_class.register(NllbMoeConfig, _for_nllb_moe(model_class), exist_ok=True)


def _for_nllb_moe(model_class: Any) -> type:
    """What the Auto classes call for an NLLB-MoE checkpoint, instead of transformers' own class: `model_class`.

    transformers' `NllbMoeExperts` takes the one-hot mask of its router for numbers of experts, so that all tokens go to
    the first two experts and no translation is right. Who imports `NllbMoeForConditionalGeneration` still gets it.
    """
    from .models.configuration_zcode_m3 import ZCodeM3Config
    from .models.nllb_moe import config_fields

    def converted(config: Any, fields: dict[str, Any]) -> ZCodeM3Config:
        if isinstance(config, ZCodeM3Config):
            ours = copy.deepcopy(config)
            ours.update(fields)
            return ours
        ours = ZCodeM3Config.from_dict(config_fields(config.to_dict()), **fields)
        ours._attn_implementation = config._attn_implementation  # what the Auto class took of its arguments
        ours._experts_implementation = config._experts_implementation
        return ours

    class ForNllbMoe:
        @classmethod
        def from_pretrained(cls, name_or_path: Any, *args: Any, config: Any, **kwargs: Any) -> Any:
            # what NllbMoeConfig does not have comes here, such as `num_experts_per_tok=1`
            fields = {name: kwargs.pop(name) for name in [*kwargs] if name in ZCodeM3Config.__annotations__}
            return model_class.from_pretrained(name_or_path, *args, config=converted(config, fields), **kwargs)

        @classmethod
        def _from_config(cls, config: Any, **kwargs: Any) -> Any:
            return model_class._from_config(converted(config, {}), **kwargs)

    return ForNllbMoe


_AFTER_IMPORT: dict[str, Callable[[], None]] = {
    "transformers.quantizers.auto": _register_quantizer,
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.tokenization_auto": _register_tokenizer,
    "transformers.pipelines": _register_pipeline,
    **dict.fromkeys(_MODELS_NEED, _register_models),
}


class _ThenCall(Loader):
    """The loader of a module, and a function to call when the module is loaded."""

    def __init__(self, loader: Loader, then: Callable[[], None]):
        self.loader = loader
        self.then = then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        module.__loader__ = module.__spec__.loader = self.loader  # type: ignore[union-attr]
        _loaded.add(module.__name__)
        self.then()


class _AfterImportFinder(MetaPathFinder):
    """Finds the modules of `after_import`, once each, so that their function runs when they are loaded."""

    def __init__(self, after_import: dict[str, Callable[[], None]]):
        self.after_import = dict(after_import)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        then = self.after_import.pop(fullname, None)
        spec = find_spec(fullname) if then is not None else None
        if spec is not None and spec.loader is not None and then is not None:
            spec.loader = _ThenCall(spec.loader, then)
        return spec


def register_auto_classes() -> None:
    """Make the Auto classes know ZCodeM3, and give it for checkpoints of NLLB-MoE, too."""
    _loaded.update(name for name in _AFTER_IMPORT if name in sys.modules)
    waiting = {name: then for name, then in _AFTER_IMPORT.items() if name not in _loaded}
    sys.meta_path.insert(0, _AfterImportFinder(waiting))
    for name in _AFTER_IMPORT.keys() & _loaded:
        _AFTER_IMPORT[name]()
