"""Real text through a model, and how good its translations are."""

import hashlib
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.language_codes import LanguagePair, find_language, language_ids, languages_kept, resolve_language
from ..tensors.lazy_tensors import num_bytes
from .evaluation_mode import evaluation_mode
from .language_detection import detector_code
from .parallel_text import Sentence, check_languages, progress_over, read_sentences, require_languages
from .translation_quality import DirectionQuality, TranslationQuality
from .translation_scores import score_translations

BATCHES_PER_BUCKET = 16


def evaluate_translation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Iterable[Mapping[str, Any]],
    *,
    languages: Sequence[str] | None = None,
    max_sentences: int | None = None,
    batch_size: int = 32,
    num_beams: int = 1,
    max_new_tokens: int = 128,
    description: str = "Translating",
) -> TranslationQuality:
    """Translate a test set and measure, per direction, BLEU, chrF, length ratio, language and speed.

    BLEU and chrF are sacreBLEU's. The length ratio shows what they hide: models whose experts were pruned tend to run
    on, as NLLB-MoE into English, by 16 % (the outputs released with https://huggingface.co/papers/2212.09811).

    All rows are read before the first is translated, so that what is wrong with one of them is known in time; texts
    and translations stay in memory to the end. A batch holds sentences of one direction and of similar length. The
    translation of a blank source is empty, as in [`ZCodeM3TranslationPipeline`]. On a GPU the first batch runs twice,
    so that what happens only once does not count as time.

    Args:
        model: an encoder-decoder with `generate`; it translates as in evaluation and is left in the mode it was in.
        tokenizer: its tokenizer, a [`ZCodeM3Tokenizer`] or one for translation of transformers (`NllbTokenizer`).
        dataset: rows with the strings `source`, `target`, `src_lang` and `tgt_lang`, or the translation rows of
            *datasets*, `{"translation": {"en": "...", "de": "..."}}`, which count for every ordered pair of their
            languages. Sources longer than the model takes are truncated. Languages are codes in any form that means
            one of the tokenizer's (`zh-CN` for `zh`); the directions of the result have the tokenizer's.
        languages: skip sentences whose source or target language is none of these; by default there are none to skip.
        max_sentences: as many of each direction, the first ones; by default all.
        batch_size: sentences per batch.
        num_beams: of the beam search; 1 is greedy.
        max_new_tokens: where a translation that has not ended is cut, at the latest after the model's positions.
        description: of the progress bar.

    Raises:
        ValueError: a row is of another form or has no reference; one of `languages` or a language of the dataset is
            unknown to the tokenizer, or there is no sentence for it; the dataset is empty; a number is less than 1;
            py3langid is not installed.
    """
    numbers = {"batch_size": batch_size, "num_beams": num_beams, "max_new_tokens": max_new_tokens}
    for name, number in {**numbers, "max_sentences": max_sentences}.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} ({number}) must be at least 1")
    if isinstance(languages, str):
        raise ValueError(f"languages ({languages!r}) must be a list of codes, such as ['en', 'de']")
    detector_code("en")  # what is missing should be known before hours of translating
    require_languages(tokenizer)
    translator = _Translator(model, tokenizer, batch_size, num_beams, max_new_tokens)
    if languages is not None:
        languages = [resolve_language(code, translator.languages, name="languages") for code in languages]
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(model.device)
    with (
        evaluation_mode(model),
        progress_over(dataset, description) as progress,
    ):
        sentences = _read(dataset, translator.languages, languages, max_sentences, progress)
        check_languages(sentences, languages)
        corpora = {pair: _Corpus() for pair in sentences}
        for pair, of_pair in sentences.items():
            for start in range(0, len(of_pair), batch_size * BATCHES_PER_BUCKET):
                bucket = of_pair[start : start + batch_size * BATCHES_PER_BUCKET]
                translations = translator.translate(pair, [sentence.source for sentence in bucket], progress)
                corpora[pair].add(bucket, translations)
    return TranslationQuality(
        model=model.name_or_path or type(model).__name__,
        directions={pair: corpus.quality(pair, translator.languages) for pair, corpus in sorted(corpora.items())},
        **numbers,
        device=torch.cuda.get_device_name(model.device) if on_gpu else model.device.type,
        dtype=str(model.dtype).removeprefix("torch."),
        num_bytes=num_bytes(dict(model.named_parameters())),
        peak_memory_bytes=torch.cuda.max_memory_allocated(model.device) if on_gpu else None,
    )


def _read(
    dataset: Any, known: list[str], languages: Sequence[str] | None, max_sentences: int | None, progress: Any
) -> dict[LanguagePair, list[Sentence]]:
    """The sentences of each direction.

    Args:
        dataset: see `evaluate_translation`.
        known: the languages of the tokenizer.
        languages: those of `known` that sentences must be in.
        max_sentences: of each direction, the first ones; the others are done.
        progress: bar over the sentences.

    Raises:
        ValueError: a row is of another form, has an unknown language or no reference.
    """
    sentences: defaultdict[LanguagePair, list[Sentence]] = defaultdict(list)
    meant: dict[str, str | None] = {}
    unknown = set()
    for codes, sentence in read_sentences(dataset, None, progress):
        for code in codes:
            if code not in meant:
                meant[code] = find_language(code, known)
        source, target = (meant[code] for code in codes)
        is_wanted = languages is None or (source in languages and target in languages)
        if is_wanted and (source is None or target is None):
            unknown |= {code for code in codes if meant[code] is None}
        elif not is_wanted or len(sentences[source, target]) == max_sentences:  # type: ignore[index]
            progress.update(1)
        elif not sentence.target.strip():
            raise ValueError(f"a sentence from {source} to {target} has an empty target: {sentence.source[:100]!r}")
        else:
            sentences[source, target].append(sentence)  # type: ignore[index]
    if unknown:
        raise ValueError(
            f"the tokenizer does not know the languages {', '.join(sorted(unknown))}; it knows {', '.join(known)}"
        )
    return {pair: of_pair for pair, of_pair in sentences.items() if of_pair}


@dataclass
class _Translations:
    """Of a bucket of sentences, in their order; see [`DirectionQuality`]."""

    texts: list[str]
    num_cut: int
    seconds: float


class _Translator:
    """Translates the sentences of a bucket in batches of similar length."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, num_beams: int, max_new_tokens: int):
        if not hasattr(tokenizer, "_build_translation_inputs"):
            raise ValueError(f"{type(tokenizer).__name__} must be a tokenizer for translation: a ZCodeM3Tokenizer")
        self._model, self._tokenizer, self._batch_size = model, tokenizer, batch_size
        num_positions = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
        self._max_source_tokens = min(num_positions, tokenizer.model_max_length)
        # one translation of a source, as a tensor, whatever the generation config of the model says
        self._generation = {
            "num_beams": num_beams,
            "max_new_tokens": min(max_new_tokens, num_positions),
            "num_return_sequences": 1,
            "do_sample": False,
            "return_dict_in_generate": False,
        }
        self._is_warm = model.device.type != "cuda"
        self.languages = list(language_ids(tokenizer))

    def translate(self, pair: LanguagePair, sources: Sequence[str], progress: Any) -> _Translations:
        """The translations in the order of the sources; that of a blank one is empty."""
        not_blank = [index for index, source in enumerate(sources) if source.strip()]
        progress.update(len(sources) - len(not_blank))
        # the longest first, so that what does not fit in memory fails at once
        order = sorted(not_blank, key=lambda index: len(sources[index]), reverse=True)
        batches = [order[start : start + self._batch_size] for start in range(0, len(order), self._batch_size)]
        if batches and not self._is_warm:
            self._translate_batch(pair, [sources[index] for index in batches[0]])
            self._is_warm = True
        translations = _Translations([""] * len(sources), num_cut=0, seconds=0.0)
        for batch in batches:
            start = time.perf_counter()
            texts, num_cut = self._translate_batch(pair, [sources[index] for index in batch])
            translations.seconds += time.perf_counter() - start
            translations.num_cut += num_cut
            for index, text in zip(batch, texts, strict=True):
                translations.texts[index] = text
            progress.update(len(batch))
        return translations

    @torch.inference_mode()
    def _translate_batch(self, pair: LanguagePair, sources: list[str]) -> tuple[list[str], int]:
        """Translations, and how many of them had not ended."""
        with languages_kept(self._tokenizer):
            inputs = self._tokenizer._build_translation_inputs(
                sources,
                return_tensors="pt",
                src_lang=pair[0],
                tgt_lang=pair[1],
                padding=True,
                truncation=True,
                max_length=self._max_source_tokens,
            )
        output_BL: Tensor = self._model.generate(**inputs.to(self._model.device), **self._generation)
        end = torch.as_tensor(self._model.generation_config.eos_token_id, device=output_BL.device)
        has_ended_B = torch.isin(output_BL[:, 1:], end).any(dim=1)  # the first token is often the end token, too
        return self._tokenizer.batch_decode(output_BL, skip_special_tokens=True), int((~has_ended_B).sum())


@dataclass
class _Corpus:
    """The test set of one direction and its translations."""

    sources: list[str] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    translations: _Translations = field(default_factory=lambda: _Translations([], 0, 0.0))

    def add(self, sentences: Sequence[Sentence], translations: _Translations) -> None:
        self.sources += [sentence.source for sentence in sentences]
        self.references += [sentence.target for sentence in sentences]
        self.translations.texts += translations.texts
        self.translations.num_cut += translations.num_cut
        self.translations.seconds += translations.seconds

    def quality(self, pair: LanguagePair, languages: Sequence[str]) -> DirectionQuality:
        scores = score_translations(
            self.sources, self.translations.texts, self.references, tgt_lang=pair[1], languages=languages
        )
        digest = hashlib.sha256()
        for texts in sorted(zip(self.sources, self.references, strict=True)):  # in whatever order they came
            digest.update("\0".join((*texts, "")).encode())
        return DirectionQuality(
            **vars(scores),
            num_cut=self.translations.num_cut,
            seconds=self.translations.seconds,
            text_sha256=digest.hexdigest(),
        )


__all__ = ["evaluate_translation"]
