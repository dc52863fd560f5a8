"""Translation pipeline: texts in, translations out. transformers 5 has none of its own any more."""

import copy
import os
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, GenerationConfig, PreTrainedModel
from transformers.pipelines.base import ChunkPipeline
from transformers.utils import logging

from .language_codes import language_ids, languages_kept, resolve_language
from .nllb_moe import MODEL_TYPE as NLLB_MOE
from .segments import Segments, is_installed, split_long, split_sentences

logger = logging.get_logger(__name__)

DEFAULT_MAX_NEW_TOKENS = 256

# Where the Auto classes find the code in a saved folder.
MODEL_CODE = {
    "AutoConfig": "configuration_zcode_m3.ZCodeM3Config",
    "AutoModelForSeq2SeqLM": "modeling_zcode_m3.ZCodeM3ForConditionalGeneration",
}
TOKENIZER_CODE = {"AutoTokenizer": ["tokenization_zcode_m3.ZCodeM3Tokenizer", None]}


class ZCodeM3TranslationPipeline(ChunkPipeline):
    """
    Translates texts with a multilingual encoder-decoder model, sentence by sentence.

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

    A text is split into sentences (by `sentencex`, if it is installed), and their translations stand in its white space
    and lines. A sentence longer than the model's positions or the tokenizer's `model_max_length` is translated in
    parts, so nothing of a text is left out. `split=False` takes each text as one sentence. A blank text stays empty.
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
        Translates texts.

        Args:
            inputs (`str`, `list[str]`, dataset or generator of `str`):
                The texts.
            src_lang (`str`, *optional*):
                Language of the texts.
            tgt_lang (`str`, *optional*):
                Language to translate to.
            batch_size (`int`, *optional*, defaults to 1):
                How many sentences are translated at once.
            split (`bool`, *optional*):
                Whether texts are split into sentences. By default they are, if `sentencex` is installed; without it
                each line is a sentence. `False` for texts that are one sentence each.
            kwargs:
                Arguments of `generate()`.

        Returns:
            `list[dict[str, str]]`: one `{"translation_text": ...}` per text; with `num_return_sequences` above 1,
            one list of them per text of a list, where each sentence has its first, second, ... sequence. A dataset or a
            generator gives an iterator over one list per text.

        Raises:
            ValueError: for a text that is not a string, an unknown language or a missing one, or `split=True` without
                `sentencex`.
        """
        if isinstance(inputs, (list, tuple)) and len(inputs) == 0:
            return []
        translations = super().__call__(list(inputs) if isinstance(inputs, tuple) else inputs, *args, **kwargs)
        if isinstance(translations, list) and all(isinstance(item, list) and len(item) == 1 for item in translations):
            return [item[0] for item in translations]
        return translations

    def _sanitize_parameters(
        self,
        src_lang: str | None = None,
        tgt_lang: str | None = None,
        split: bool | None = None,
        truncation: Any = None,
        clean_up_tokenization_spaces: bool | None = None,
        **generate_kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if truncation:
            logger.warning_once("truncation has no effect: what the model has no positions for is translated in parts")
        for name in generate_kwargs.keys() & {"return_tensors", "return_text"}:
            raise ValueError(f"{name} is not an argument of this pipeline, which returns text; leave it out")
        named = {"src_lang": src_lang, "tgt_lang": tgt_lang}
        languages = {name: self._checked(name, lang) for name, lang in named.items() if lang is not None}
        splitting = {} if split is None else {"split": split}
        cleaning = {"clean_up_tokenization_spaces": clean_up_tokenization_spaces}
        return {**languages, **splitting}, generate_kwargs, {} if clean_up_tokenization_spaces is None else cleaning

    def _checked(self, name: str, language: str | None) -> str:
        """The language of the tokenizer that a code means; `name` is `src_lang` or `tgt_lang`.

        Raises:
            ValueError: it is missing, unknown or ambiguous.
        """
        known = self.languages
        if language is None:
            raise ValueError(f"missing {name}: pass `{name}=`, one of: {', '.join(known)}")
        return resolve_language(language, known, name=name)

    def preprocess(  # type: ignore[override]  # of a chunk pipeline it yields
        self, input_: Any, split: bool | None = None, **languages: Any
    ) -> Iterator[dict[str, Any]]:
        """The inputs of the model for each sentence of a text, with a batch axis: `input_ids` is (1, L).

        `gaps` are what stands before the sentence and, of the last one, after it.
        """
        if not isinstance(input_, str):
            raise ValueError(f"a sentence to translate must be a string, got {type(input_).__name__}: {input_!r}")
        for name in ("src_lang", "tgt_lang"):
            languages[name] = self._checked(name, languages.get(name, getattr(self.tokenizer, name, None)))

        def encode(text: str) -> dict[str, Any]:
            with languages_kept(self.tokenizer):
                return self.tokenizer._build_translation_inputs(text, return_tensors="pt", **languages, verbose=False)

        text = self._segments(input_, split, languages["src_lang"])
        max_tokens = min(_max_positions(self.model), self.tokenizer.model_max_length)
        parts = [
            split_long(sentence, max_tokens, lambda texts: [encode(text)["input_ids"].shape[1] for text in texts])
            for sentence in text.sentences
        ]
        text = text.with_parts(parts)
        sentences = text.sentences or ("",)
        for index, sentence in enumerate(sentences):
            is_last = index == len(sentences) - 1
            gaps = [text.gaps[index], text.gaps[-1] if is_last and text.sentences else ""]
            is_blank = torch.tensor([not sentence])
            own = {"is_blank": is_blank, "is_last": is_last, "gaps": gaps, "tgt_lang": languages["tgt_lang"]}
            yield {**encode(sentence), **own}

    def _segments(self, text: str, split: bool | None, src_lang: str) -> Segments:
        if split is False:
            return Segments.whole(text)
        if split is None and not is_installed():
            logger.warning_once(
                "sentencex is not installed, so each line is translated as one sentence: `pip install sentencex`"
            )
            return split_sentences(text, None)
        return split_sentences(text, src_lang)

    def _forward(self, input_tensors: dict[str, Any], **generate_kwargs: Any) -> Any:
        """Translates B sentences: `output_ids` is (B, `num_return_sequences`, L), `is_blank` is (B,)."""
        kept = {name: input_tensors.pop(name) for name in ("is_blank", "is_last", "gaps", "tgt_lang")}
        forced_bos_token_id = input_tensors.pop("forced_bos_token_id")
        if isinstance(forced_bos_token_id, list):  # one per sentence of the batch, all of the same target language
            forced_bos_token_id = forced_bos_token_id[0]
        generate_kwargs = self._prepare_generate_kwargs(
            generate_kwargs, forced_bos_token_id=forced_bos_token_id, return_dict_in_generate=False
        )
        output_ids = self.model.generate(**input_tensors, **generate_kwargs)
        return {"output_ids": output_ids.unflatten(0, (kept["is_blank"].numel(), -1)), **kept}

    def postprocess(self, model_outputs: Any, **postprocess_parameters: Any) -> list[dict[str, str]]:
        """The translations of one text, one per returned sequence."""
        if all(bool(output["is_blank"]) for output in model_outputs):
            return [{"translation_text": ""} for _ in range(model_outputs[0]["output_ids"].shape[1])]
        gaps = [*(output["gaps"][0] for output in model_outputs), model_outputs[-1]["gaps"][1]]
        ranked = [
            self.tokenizer.batch_decode(output["output_ids"][0], skip_special_tokens=True, **postprocess_parameters)
            for output in model_outputs
        ]
        text = Segments(("",) * len(ranked), tuple(gaps))
        return [
            {"translation_text": text.join(translations, model_outputs[0]["tgt_lang"])}
            for translations in zip(*ranked, strict=True)
        ]

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
