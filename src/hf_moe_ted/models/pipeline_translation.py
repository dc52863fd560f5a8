"""Translation pipeline: sentences in, translations out. transformers 5 has none of its own any more."""

import copy
import os
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, GenerationConfig, Pipeline, PreTrainedModel
from transformers.utils import logging

from .language_codes import language_ids, languages_kept, resolve_language
from .nllb_moe import MODEL_TYPE as NLLB_MOE

logger = logging.get_logger(__name__)

DEFAULT_MAX_NEW_TOKENS = 256

# Where the Auto classes find the code in a saved folder.
MODEL_CODE = {
    "AutoConfig": "configuration_zcode_m3.ZCodeM3Config",
    "AutoModelForSeq2SeqLM": "modeling_zcode_m3.ZCodeM3ForConditionalGeneration",
}
TOKENIZER_CODE = {"AutoTokenizer": ["tokenization_zcode_m3.ZCodeM3Tokenizer", None]}


class ZCodeM3TranslationPipeline(Pipeline):
    """
    Translates sentences with a multilingual encoder-decoder model.

    The tokenizer is a [`ZCodeM3Tokenizer`] or one of transformers for translation (`NllbTokenizer`, `M2M100Tokenizer`).
    Languages are named as it names them or in another form: `zh-CN`, `zho_Hans` and `ZH` are `zh` where there is no
    closer one. Threads may share a pipeline.

    Example:

    ```python
    >>> translator = ZCodeM3TranslationPipeline(model=model, tokenizer=tokenizer, src_lang="en", tgt_lang="de")
    >>> translator("Hello")
    [{'translation_text': 'Hallo'}]
    >>> translator(["Hello", "Good night"], tgt_lang="fr", batch_size=2, num_beams=5)
    [{'translation_text': 'Bonjour'}, {'translation_text': 'Bonne nuit'}]
    ```

    `src_lang` and `tgt_lang` are taken from the call, then from the pipeline, then from the tokenizer. Other keyword
    arguments, of the pipeline or of the call, go to `generate()`; what neither they nor the generation config of the
    model set is as `generate()` has it. A [`ZCodeM3ForConditionalGeneration`] has a `max_length` of 256, or as many as
    it has positions; for a model without one `max_new_tokens` is as many.

    A source longer than the model's positions or the tokenizer's `model_max_length` is truncated, with a warning.
    The translation of an empty or blank sentence is empty.
    """

    model: Any
    tokenizer: Any
    _pipeline_calls_generate = True
    _load_processor: Any = False
    _load_image_processor: Any = False
    _load_video_processor: Any = False
    _load_feature_extractor: Any = False
    _load_tokenizer: Any = True

    def __init__(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        if model.config.model_type == NLLB_MOE:
            raise ValueError(
                f"{type(model).__name__} of transformers sends all tokens to two experts and cannot translate; "
                "load the checkpoint with ZCodeM3ForConditionalGeneration.from_pretrained"
            )
        max_new_tokens = min(DEFAULT_MAX_NEW_TOKENS, _max_positions(model))
        self._default_generation_config = GenerationConfig(max_new_tokens=max_new_tokens)
        super().__init__(model, *args, **kwargs)

    @property
    def languages(self) -> list[str]:
        """The languages of the tokenizer, by the names that `src_lang` and `tgt_lang` take."""
        if not hasattr(self.tokenizer, "_build_translation_inputs"):
            raise ValueError(f"{type(self.tokenizer).__name__} has no languages: use a ZCodeM3Tokenizer")
        return list(language_ids(self.tokenizer))

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> list[Any] | Iterator[Any]:
        """
        Translates sentences.

        Args:
            inputs (`str`, `list[str]`, dataset or generator of `str`):
                The sentences.
            src_lang (`str`, *optional*):
                Language of the sentences.
            tgt_lang (`str`, *optional*):
                Language to translate to.
            batch_size (`int`, *optional*, defaults to 1):
                How many sentences are translated at once.
            kwargs:
                Arguments of `generate()`.

        Returns:
            `list[dict[str, str]]`: one `{"translation_text": ...}` per sentence; with `num_return_sequences` above 1,
            one list of them per sentence of a list. A dataset or a generator gives an iterator over one list per
            sentence.

        Raises:
            ValueError: for a sentence that is not a string, an unknown language or a missing one.
        """
        if isinstance(inputs, (list, tuple)) and len(inputs) == 0:
            return []
        translations = super().__call__(list(inputs) if isinstance(inputs, tuple) else inputs, *args, **kwargs)
        if isinstance(translations, list) and all(isinstance(item, list) and len(item) == 1 for item in translations):
            return [item[0] for item in translations]
        return translations

    def _sanitize_parameters(
        self, src_lang: str | None = None, tgt_lang: str | None = None, **generate_kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        named = {"src_lang": src_lang, "tgt_lang": tgt_lang}
        languages = {name: self._checked(name, lang) for name, lang in named.items() if lang is not None}
        return languages, generate_kwargs, {}

    def _checked(self, name: str, language: str | None) -> str:
        """The language of the tokenizer that a code means; `name` is `src_lang` or `tgt_lang`.

        Raises:
            ValueError: it is missing, unknown or ambiguous.
        """
        known = self.languages
        if language is None:
            raise ValueError(f"missing {name}: pass `{name}=`, one of: {', '.join(known)}")
        return resolve_language(language, known, name=name)

    def preprocess(self, input_: Any, **languages: Any) -> dict[str, Any]:
        """The inputs of the model for one sentence, with a batch axis: `input_ids` is (1, L)."""
        if not isinstance(input_, str):
            raise ValueError(f"a sentence to translate must be a string, got {type(input_).__name__}: {input_!r}")
        for name in ("src_lang", "tgt_lang"):
            languages[name] = self._checked(name, languages.get(name, getattr(self.tokenizer, name, None)))

        def encode(**kwargs: Any) -> dict[str, Any]:
            with languages_kept(self.tokenizer):
                return self.tokenizer._build_translation_inputs(input_, return_tensors="pt", **languages, **kwargs)

        inputs = encode(verbose=False)
        num_tokens = inputs["input_ids"].shape[1]
        max_tokens = min(_max_positions(self.model), self.tokenizer.model_max_length)
        if num_tokens > max_tokens:
            logger.warning(f"source truncated: kept {max_tokens} of {num_tokens} tokens of {input_[:40]!r}...")
            inputs = encode(truncation=True, max_length=max_tokens)
        return {**inputs, "is_blank": torch.tensor([not input_.strip()])}

    def _forward(self, input_tensors: dict[str, Any], **generate_kwargs: Any) -> Any:
        """Translates B sentences: `output_ids` is (B, `num_return_sequences`, L), `is_blank` is (B,)."""
        is_blank = input_tensors.pop("is_blank")
        forced_bos_token_id = input_tensors.pop("forced_bos_token_id")
        if isinstance(forced_bos_token_id, list):  # one per sentence of the batch, all of the same target language
            forced_bos_token_id = forced_bos_token_id[0]
        generate_kwargs = self._prepare_generate_kwargs(
            generate_kwargs, forced_bos_token_id=forced_bos_token_id, return_dict_in_generate=False
        )
        output_ids = self.model.generate(**input_tensors, **generate_kwargs)
        return {"output_ids": output_ids.unflatten(0, (is_blank.numel(), -1)), "is_blank": is_blank}

    def postprocess(self, model_outputs: Any, **postprocess_parameters: Any) -> list[dict[str, str]]:
        """The translations of one sentence, one per returned sequence."""
        texts = self.tokenizer.batch_decode(model_outputs["output_ids"][0], skip_special_tokens=True)
        return [{"translation_text": "" if model_outputs["is_blank"] else text} for text in texts]

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """
        Saves model, tokenizer and their code, so that people without this package translate with
        `pipeline("translation", model=save_directory, trust_remote_code=True)`. `push_to_hub` does the same.

        The languages of the pipeline become those of the saved tokenizer, and so of a pipeline that is loaded.
        A model with experts quantized by this package still needs the package; there is a warning.
        """
        impl = {"impl": type(self), "pt": (AutoModelForSeq2SeqLM,), "type": "text"}
        self._registered_impl = {"translation": impl}
        if _is_of_package(self.model):
            auto_map = getattr(self.model.config, "auto_map", None) or {}
            self.model.config.auto_map = {**auto_map, **MODEL_CODE}
        if _is_of_package(self.tokenizer):
            self.tokenizer._auto_map = TOKENIZER_CODE
        if getattr(self.model.config, "quantization_config", None) is not None:
            logger.warning(
                "this model is quantized: whoever loads it needs the package that reads its weights (hf_moe_ted for "
                "experts that `quantize_experts` made); code in the folder does not do it"
            )
        tokenizer, self.tokenizer = self.tokenizer, copy.deepcopy(self.tokenizer)
        try:
            for name in self._preprocess_params.keys() & {"src_lang", "tgt_lang"}:
                setattr(self.tokenizer, name, self._preprocess_params[name])
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.tokenizer = tokenizer


def _is_of_package(item: Any) -> bool:
    """Whether its class is in the folder of this file, which is what can be saved as code."""
    return type(item).__module__.rpartition(".")[0] == __name__.rpartition(".")[0]


def _max_positions(model: PreTrainedModel) -> int:
    """The longest sequence, in tokens, that the positions of the model allow."""
    return getattr(model.config, "max_position_embeddings", None) or torch.iinfo(torch.long).max


__all__ = ["ZCodeM3TranslationPipeline"]
