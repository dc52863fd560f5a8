"""Translation pipeline: texts in, translations out. transformers 5 no longer has one."""

import copy
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, GenerationConfig, PreTrainedModel
from transformers.pipelines.base import ChunkPipeline
from transformers.utils import logging

from .execution_device import offloaded_device
from .family import check_family
from .generation import FirstTokens
from .language_codes import language_ids, languages_kept, resolve_language
from .language_detection import AUTO, language_finder
from .pipeline_inputs import (
    LANGUAGES,
    TextInLanguages,
    as_pipeline_input,
    languages_of_task,
    with_languages,
    without_old_arguments,
)
from .segments import Segments, is_installed, split_long, split_sentences
from .vocabulary import check_vocabulary

logger = logging.get_logger(__name__)

DEFAULT_MAX_NEW_TOKENS = 256

# The code that Auto classes load from a saved folder.
MODEL_CODE = {
    "AutoConfig": "configuration_zcode_m3.ZCodeM3Config",
    "AutoModelForSeq2SeqLM": "modeling_zcode_m3.ZCodeM3ForConditionalGeneration",
}
TOKENIZER_CODE = {"AutoTokenizer": ["tokenization_zcode_m3.ZCodeM3Tokenizer", None]}


class ZCodeM3TranslationPipeline(ChunkPipeline):
    """
    Translates texts with a multilingual encoder-decoder model, sentence by sentence.

    The model is a [`ZCodeM3ForConditionalGeneration`], also of an NLLB-MoE checkpoint, or transformers' own
    `M2M100ForConditionalGeneration` (M2M100 and NLLB); the tokenizer is a [`ZCodeM3Tokenizer`] or one of transformers
    for translation (`NllbTokenizer`, `M2M100Tokenizer`). Languages have the tokenizer's names or another form: `zh-CN`,
    `zho_Hans` and `ZH` are `zh` if there is no closer one. Threads may share a pipeline.

    Example:

    ```python
    >>> translator = ZCodeM3TranslationPipeline(model=model, tokenizer=tokenizer, src_lang="en", tgt_lang="de")
    >>> translator("Hello")
    [{'translation_text': 'Hallo'}]
    >>> translator(["Hello", "Good night"], tgt_lang=["fr", "de"], batch_size=2, num_beams=5)
    [{'translation_text': 'Bonjour'}, {'translation_text': 'Gute Nacht'}]
    >>> translator("Hello", num_beams=3, num_return_sequences=2, return_scores=True)
    [{'translation_text': 'Hallo', 'score': -0.21}, {'translation_text': 'Guten Tag', 'score': -0.58}]
    >>> for piece in translator.stream(document):
    ...     print(piece, end="", flush=True)
    ```

    `src_lang` and `tgt_lang` are taken from the call, then from the pipeline, then from the tokenizer; a call may give
    one per text. With `src_lang="auto"` py3langid detects the language of each text. Other keyword arguments, of the
    pipeline or of the call, go to `generate()`; options that neither they nor the model's generation config set have
    the defaults of `generate()`. A [`ZCodeM3ForConditionalGeneration`] has a `max_length` of 256, or of its number of
    positions if that is smaller; for a model without one, this number is `max_new_tokens`.

    A text is split into sentences (by `sentencex`, if it is installed), and white space and lines of the text are kept.
    A sentence longer than the model's positions or the tokenizer's `model_max_length` is translated in parts, so
    nothing of a text is left out. `split=False` takes each text as one sentence. A blank text stays empty.

    Arguments of transformers 4's translation pipelines work, or are refused with an error that says what to use
    instead; `task` may be `"translation_en_to_de"`. Those pipelines had four beams by default (`num_beams=4`); here the
    default is that of `generate()`.
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
        check_family(model)
        max_new_tokens = min(DEFAULT_MAX_NEW_TOKENS, _max_positions(model))
        self._default_generation_config = GenerationConfig(max_new_tokens=max_new_tokens)
        given = {name: value for name, value in kwargs.items() if value is not None or name not in LANGUAGES}
        given = {**languages_of_task(kwargs.get("task")), **without_old_arguments(given), **_where_it_is(model)}
        super().__init__(model, *args, **given)
        device = offloaded_device(model)
        if model.device.type == "meta" and device is not None:
            self.device = device

    @property
    def languages(self) -> list[str]:
        """The languages of the tokenizer, by the names for `src_lang` and `tgt_lang`."""
        if not hasattr(self.tokenizer, "_build_translation_inputs"):
            raise ValueError(f"{type(self.tokenizer).__name__} has no languages: use a ZCodeM3Tokenizer")
        return list(language_ids(self.tokenizer))

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> list[Any] | Iterator[Any]:
        """
        Translates texts.

        Args:
            inputs (`str`, `list[str]`, column of *datasets*, dataset of PyTorch (`KeyDataset`) or iterator of `str`):
                The texts.
            src_lang (`str` or `list[str]`, *optional*): Language of all texts, or of each text; with `"auto"` py3langid
                detects it among those of the tokenizer.
            tgt_lang (`str` or `list[str]`, *optional*): Language to translate to, one for all texts or one per text.
            batch_size (`int`, *optional*, defaults to 1): How many sentences are translated at once; they may have
                different languages.
            split (`bool`, *optional*): Whether texts are split into sentences. By default they are, if `sentencex` is
                installed; without it each line is a sentence. Use `False` for texts of one sentence each.
            return_scores (`bool`, *optional*, defaults to `False`): Whether each translation has its `score`: the
                log-probability per token by which beam search ranks it; for a text, the mean over its sentences.
            kwargs:
                Arguments of `generate()`.

        Returns:
            `list[dict[str, Any]]`: one `{"translation_text": ...}` per text; with `num_return_sequences` above 1, one
            list of them per text of a list, made of the first, second, ... sequences of its sentences. A dataset or an
            iterator gives an iterator over one list per text.

        Raises:
            ValueError: a text is not a string; a language is unknown or missing; the numbers of languages and texts
                differ; `split=True` without `sentencex`, `"auto"` without `py3langid`, or `return_scores=True` without
                beam search; an argument of transformers 4 that is not supported here.
        """
        if args:
            raise ValueError(f"{len(args) + 1} positional arguments: give several texts as one list")
        check_vocabulary(self.model, self.tokenizer)
        inputs = as_pipeline_input(inputs)
        of_each = {name: kwargs.pop(name) for name in LANGUAGES if _is_list(kwargs.get(name))}
        if of_each:
            inputs = with_languages(inputs, {name: self._resolved(name, codes) for name, codes in of_each.items()})
        if isinstance(inputs, list) and not inputs:
            return []
        translations = super().__call__(inputs, **kwargs)
        if isinstance(translations, list) and all(isinstance(item, list) and len(item) == 1 for item in translations):
            return [item[0] for item in translations]
        return translations

    def stream(self, text: str, **kwargs: Any) -> Iterator[str]:
        """Translates a text and yields its sentences when they are finished, each with the white space before it.
        Together they are the `translation_text` of a call; with `batch_size=8` eight are translated at a time.

        Args:
            text (`str`):
                The text.
            kwargs: As in a call; one sequence is returned, without scores.

        Raises:
            ValueError: see `__call__`.
        """
        check_vocabulary(self.model, self.tokenizer)
        options = {**self._preprocess_params, **self._sanitize_parameters(**kwargs)[0]}
        languages = self._languages_of(text, options)
        segments = self._segments(text, options.get("split"), languages["src_lang"])
        if not segments.sentences:
            return
        each = self((sentence for sentence in segments.sentences), **{**kwargs, **languages, "split": False})
        yield from segments.joined((self._only_one(item) for item in each), languages["tgt_lang"])

    @staticmethod
    def _only_one(sequences: list[dict[str, Any]]) -> str:
        if len(sequences) > 1:
            raise ValueError(f"num_return_sequences ({len(sequences)}) must be 1 to stream a text")
        return sequences[0]["translation_text"]

    def _sanitize_parameters(
        self,
        src_lang: str | None = None,
        tgt_lang: str | None = None,
        split: bool | None = None,
        return_scores: bool = False,
        truncation: Any = None,
        clean_up_tokenization_spaces: bool | None = None,
        **generate_kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if truncation not in (None, False, "do_not_truncate"):
            logger.warning_once(
                "truncation has no effect: a text longer than the model's positions is translated in parts"
            )
        generate_kwargs = without_old_arguments(generate_kwargs)
        named = {"src_lang": src_lang, "tgt_lang": tgt_lang}
        languages = {name: self._checked(name, lang) for name, lang in named.items() if lang is not None}
        splitting = {} if split is None else {"split": split}
        scoring = {"return_scores": True} if return_scores else {}
        cleaning = {"clean_up_tokenization_spaces": clean_up_tokenization_spaces}
        forward = {**generate_kwargs, **scoring}
        return {**languages, **splitting}, forward, {} if clean_up_tokenization_spaces is None else cleaning

    def _checked(self, name: str, language: Any) -> str:
        """The tokenizer's language for a code, or `"auto"`; `name` is `src_lang` or `tgt_lang`.

        Raises:
            ValueError: the language is missing, unknown or ambiguous.
        """
        known = self.languages
        if language is None:
            raise ValueError(f"missing {name}: pass `{name}=`, one of: {', '.join(known)}")
        if _is_list(language):
            raise ValueError(
                f"{name} ({list(language)!r}) has one language per text: give it to the call, with the texts"
            )
        if name == "src_lang" and language == AUTO:
            return AUTO
        return resolve_language(language, known, name=name)

    def _resolved(self, name: str, codes: Any) -> list[str]:
        meaning = {code: self._checked(name, code) for code in dict.fromkeys(codes)}
        return [meaning[code] for code in codes]

    def _languages_of(self, text: Any, languages: dict[str, Any]) -> dict[str, str]:
        """`src_lang` and `tgt_lang` of a text, by their names in the tokenizer."""
        if not isinstance(text, str):
            hint = (
                "; for a dataset of rows give a column, KeyDataset(dataset, 'text')" if isinstance(text, dict) else ""
            )
            raise ValueError(f"a sentence to translate must be a string, got {type(text).__name__}: {text!r}{hint}")
        codes = {name: languages.get(name, getattr(self.tokenizer, name, None)) for name in LANGUAGES}
        checked = {name: self._checked(name, code) for name, code in codes.items()}
        if checked["src_lang"] == AUTO:
            checked["src_lang"] = language_finder(tuple(self.languages)).find(text)
        return checked

    def preprocess(  # type: ignore[override]  # of a chunk pipeline it yields
        self, input_: Any, split: bool | None = None, **languages: Any
    ) -> Iterator[dict[str, Any]]:
        """The inputs of the model for each sentence of a text, with a batch axis: `input_ids` is (1, L).

        `gaps` are the text before the sentence and, for the last one, also after it.
        """
        if isinstance(input_, TextInLanguages):
            input_, languages = input_.text, {**languages, **input_.languages}
        languages = self._languages_of(input_, languages)

        @functools.cache  # a sentence is first counted, then translated
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
        """Translates B sentences: `output_ids` is (B, `num_return_sequences`, L), `is_blank` is (B,).

        With `return_scores` `scores` is (B, `num_return_sequences`).
        """
        kept = {name: input_tensors.pop(name) for name in ("is_blank", "is_last", "gaps", "tgt_lang")}
        return_scores = generate_kwargs.pop("return_scores", False)
        forced = input_tensors.pop("forced_bos_token_id")
        forced = forced if isinstance(forced, list) else [forced]
        processors = list(generate_kwargs.pop("logits_processor", None) or [])
        if len(set(forced)) > 1:
            processors.append(FirstTokens(forced))
        generate_kwargs = self._prepare_generate_kwargs(
            generate_kwargs,
            forced_bos_token_id=forced[0],
            return_dict_in_generate=return_scores,
            output_scores=return_scores,
        )
        if generate_kwargs.get("stop_strings"):
            generate_kwargs.setdefault("tokenizer", self.tokenizer)
        outputs = self.model.generate(**input_tensors, **generate_kwargs, logits_processor=processors or None)
        num_sentences = kept["is_blank"].numel()
        if not return_scores:
            return {"output_ids": outputs.unflatten(0, (num_sentences, -1)), **kept}
        if outputs.get("sequences_scores") is None:
            raise ValueError("return_scores needs beam search: set num_beams above 1")
        scores = outputs.sequences_scores.unflatten(0, (num_sentences, -1))
        return {"output_ids": outputs.sequences.unflatten(0, (num_sentences, -1)), "scores": scores, **kept}

    def postprocess(self, model_outputs: Any, **postprocess_parameters: Any) -> list[dict[str, Any]]:
        """The translations of one text, one per returned sequence."""
        scores: list[dict[str, float]] = [{}] * model_outputs[0]["output_ids"].shape[1]
        if "scores" in model_outputs[0]:
            mean_S = torch.cat([output["scores"] for output in model_outputs]).float().mean(dim=0)
            scores = [{"score": score} for score in mean_S.tolist()]
        if all(bool(output["is_blank"]) for output in model_outputs):
            return [{"translation_text": "", **score} for score in scores]
        gaps = [*(output["gaps"][0] for output in model_outputs), model_outputs[-1]["gaps"][1]]
        ranked = [
            self.tokenizer.batch_decode(output["output_ids"][0], skip_special_tokens=True, **postprocess_parameters)
            for output in model_outputs
        ]
        text = Segments(("",) * len(ranked), tuple(gaps))
        return [
            {"translation_text": text.join(translations, model_outputs[0]["tgt_lang"]), **score}
            for translations, score in zip(zip(*ranked, strict=True), scores, strict=True)
        ]

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Saves model, tokenizer and their code. So users without this package can translate with
        `pipeline("translation", model=save_directory, trust_remote_code=True)`. `push_to_hub` does the same.

        The saved tokenizer gets the languages of the pipeline, and so does a pipeline that is loaded from it. A model
        with experts quantized by this package still needs the package; then there is a warning.
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
                "this model is quantized: to load it, users need the package that reads its weights (hf_moe_ted for "
                "experts from `quantize_experts`); the code in the folder is not enough"
            )
        tokenizer, self.tokenizer = self.tokenizer, copy.deepcopy(self.tokenizer)
        try:
            for name in self._preprocess_params.keys() & {*LANGUAGES}:
                if self._preprocess_params[name] != AUTO:  # no tokenizer has this one
                    setattr(self.tokenizer, name, self._preprocess_params[name])
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.tokenizer = tokenizer


def _is_of_package(item: Any) -> bool:
    """Whether its class is in the folder of this file, and so can be saved as code."""
    return type(item).__module__.rpartition(".")[0] == __name__.rpartition(".")[0]


def _where_it_is(model: PreTrainedModel) -> dict[str, Any]:
    """Keep the place of models whose weights Accelerate loads when needed; the base class moves others to a GPU."""
    if model.device.type != "meta":
        return {}
    device_map = getattr(model, "hf_device_map", None)
    if device_map is None:
        return {"device": model.device}
    if next(iter(device_map.values())) == "disk":
        raise ValueError(
            f"the first weights of the model are on disk (hf_device_map: {device_map}), so the pipelines of "
            "transformers cannot find the device that computes; keep model.shared in memory with device_map or "
            "max_memory, or use TextTranslator of hf_moe_ted"
        )
    return {}


def _is_list(languages: Any) -> bool:
    return isinstance(languages, Sequence) and not isinstance(languages, str)


def _max_positions(model: PreTrainedModel) -> int:
    """The longest sequence that the model's positions allow, in tokens."""
    return getattr(model.config, "max_position_embeddings", None) or torch.iinfo(torch.long).max


__all__ = ["ZCodeM3TranslationPipeline"]
