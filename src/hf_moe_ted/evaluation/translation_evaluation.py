"""Translate real text with a model and measure the quality."""

import contextlib
import hashlib
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.execution_device import execution_device
from ..models.language_codes import LanguagePair, find_language, languages_kept, unknown_languages
from ..models.language_detection import detector_code
from ..models.vocabulary import check_vocabulary
from ..tensors.lazy_tensors import num_bytes
from .evaluation_mode import evaluation_mode
from .parallel_text import Sentence, check_languages, choose_languages, progress_over, read_sentences
from .translation_quality import DirectionQuality, TranslationQuality
from .translation_scores import score_translations

BATCHES_PER_BUCKET = 16


def evaluate_translation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Iterable[Mapping[str, Any]],
    *,
    also: Iterable[Mapping[str, Any]] | None = None,
    languages: Sequence[str] | None = None,
    max_sentences: int | None = None,
    batch_size: int = 32,
    num_beams: int = 1,
    max_new_tokens: int = 128,
    description: str = "Translating",
) -> TranslationQuality:
    """Translate a test set and measure, per direction, BLEU, chrF, length ratio, language, copies, and speed.

    BLEU and chrF are sacreBLEU's; BLEU is `None` in a direction where no reference has four tokens. The length ratio
    shows what they hide: pruned models tend to translate too long, such as NLLB-MoE into English, by 16 % (the outputs
    released with https://huggingface.co/papers/2212.09811). BLEU and chrF also show little of lost numbers,
    placeholders and names, and of repetitions; these are counted separately (`copied`, `repeating`). A test set from
    the domain that chose the experts hides losses in other domains; use `also` for these.

    All rows are read before the first is translated, so errors in rows show early; texts and translations stay in
    memory until the end. A batch holds sentences of one direction and of similar length. The translation of a blank
    source is empty, as in [`ZCodeM3TranslationPipeline`]. On a GPU the first batch runs twice, so one-time work does
    not count as time.

    Args:
        model: an encoder-decoder with `generate`; it translates in evaluation mode; its mode is restored.
        tokenizer: its tokenizer, a [`ZCodeM3Tokenizer`] or one for translation of transformers (`NllbTokenizer`).
        dataset: rows with the strings `source`, `target`, `src_lang` and `tgt_lang`, or the translation rows of
            *datasets*, `{"translation": {"en": "...", "de": "..."}}`, which count for every ordered pair of their
            languages. Sources longer than the model takes are truncated. Languages are codes in any form that means
            one of the tokenizer's (`zh-CN` for `zh`); the directions of the result have the tokenizer's.
        also: a second test set, best from another domain; its quality is `also` of the result.
        languages: skip sentences whose source or target language is not among these; by default none are skipped.
        max_sentences: number of sentences per direction, from the start; by default all.
        batch_size: sentences per batch.
        num_beams: beams of the search; 1 is greedy.
        max_new_tokens: longest translation in tokens, limited by the model's positions; longer ones are cut.
        description: text of the progress bar.

    Raises:
        ValueError: a row has another form or no reference; the tokenizer does not know a language of `languages` or of
            the dataset, or a language has no sentence; the dataset is empty; a number is less than 1; py3langid is not
            installed.
    """
    numbers = {"batch_size": batch_size, "num_beams": num_beams, "max_new_tokens": max_new_tokens}
    for name, number in {**numbers, "max_sentences": max_sentences}.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} ({number}) must be at least 1")
    detector_code("en")  # a missing package should show before hours of translating
    known, languages = choose_languages(tokenizer, languages)
    check_vocabulary(model, tokenizer)
    translator = _Translator(model, tokenizer, batch_size, num_beams, max_new_tokens)
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(model.device)
    datasets = [dataset] if also is None else [dataset, also]
    with evaluation_mode(model), contextlib.ExitStack() as bars:
        read = []
        for each in datasets:
            progress = bars.enter_context(progress_over(each, description))
            sentences = _read(each, known, languages, max_sentences, progress)
            check_languages(sentences, languages)
            read.append((sentences, progress))
        directions = [
            {pair: translator.quality(pair, sentences[pair], known, progress) for pair in sorted(sentences)}
            for sentences, progress in read
        ]
    of_all: dict[str, Any] = {
        **numbers,
        "model": model.name_or_path or type(model).__name__,
        "device": torch.cuda.get_device_name(model.device) if on_gpu else model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "num_bytes": num_bytes(dict(model.named_parameters())),
        "peak_memory_bytes": torch.cuda.max_memory_allocated(model.device) if on_gpu else None,
    }
    second = None if also is None else TranslationQuality(directions=directions[1], **of_all)
    return TranslationQuality(directions=directions[0], also=second, **of_all)


def _read(
    dataset: Any, known: list[str], languages: Sequence[str] | None, max_sentences: int | None, progress: Any
) -> dict[LanguagePair, list[Sentence]]:
    """The sentences of each direction.

    Args:
        dataset: see `evaluate_translation`.
        known: the languages of the tokenizer.
        languages: those of `known` in which sentences must be.
        max_sentences: sentences per direction, from the start; the others count as done.
        progress: progress bar over the sentences.

    Raises:
        ValueError: a row has another form, an unknown language or no reference.
    """
    sentences: defaultdict[LanguagePair, list[Sentence]] = defaultdict(list)
    wanted = None if languages is None else {*languages}
    meaning = cache(lambda code: find_language(code, known))
    unknown: set[str] = set()
    for codes, sentence in read_sentences(dataset, progress):
        source, target = map(meaning, codes)
        if wanted is not None and not {source, target} <= wanted:
            progress.update(1)
            continue
        if source is None or target is None:
            unknown |= {code for code in codes if meaning(code) is None}
            continue
        of_pair = sentences[source, target]
        if len(of_pair) == max_sentences:
            progress.update(1)
            continue
        if not sentence.target.strip():
            raise ValueError(f"a sentence from {source} to {target} has an empty target: {sentence.source[:100]!r}")
        of_pair.append(sentence)
    if unknown:
        raise ValueError(
            f"the tokenizer does not know the languages {unknown_languages(unknown, known)}; it knows "
            f"{', '.join(known)}"
        )
    return {pair: of_pair for pair, of_pair in sentences.items() if of_pair}


@dataclass
class _Translations:
    """Translations of the sentences of one direction, in their order; see [`DirectionQuality`]."""

    texts: list[str]
    num_cut: int
    seconds: float


class _Translator:
    """Translates the sentences of one direction in batches of similar length."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, num_beams: int, max_new_tokens: int):
        if not hasattr(tokenizer, "_build_translation_inputs"):
            raise ValueError(
                f"{type(tokenizer).__name__} must be a tokenizer for translation, such as a ZCodeM3Tokenizer"
            )
        self._model, self._tokenizer, self._batch_size = model, tokenizer, batch_size
        num_positions = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
        self._max_source_tokens = min(num_positions, tokenizer.model_max_length)
        # one translation per source, as a tensor, whatever the model's generation config says
        self._generation = {
            "num_beams": num_beams,
            "max_new_tokens": min(max_new_tokens, num_positions),
            "num_return_sequences": 1,
            "do_sample": False,
            "return_dict_in_generate": False,
        }
        self._is_warm = model.device.type != "cuda"

    def quality(
        self, pair: LanguagePair, sentences: Sequence[Sentence], languages: Sequence[str], progress: Any
    ) -> DirectionQuality:
        """The quality of one direction; `languages` are all in which the model can answer."""
        return _quality(pair, sentences, self.translate(pair, [each.source for each in sentences], progress), languages)

    def translate(self, pair: LanguagePair, sources: Sequence[str], progress: Any) -> _Translations:
        """The translations in the order of the sources; a blank source has an empty translation."""
        translations = _Translations([""] * len(sources), num_cut=0, seconds=0.0)
        progress.update(sum(not source.strip() for source in sources))
        for batch in self._batches(sources):
            batch_sources = [sources[index] for index in batch]
            if not self._is_warm:
                self._translate_batch(pair, batch_sources)
                self._is_warm = True
            start = time.perf_counter()
            texts, num_cut = self._translate_batch(pair, batch_sources)
            translations.seconds += time.perf_counter() - start
            translations.num_cut += num_cut
            for index, text in zip(batch, texts, strict=True):
                translations.texts[index] = text
            progress.update(len(batch))
        return translations

    def _batches(self, sources: Sequence[str]) -> Iterator[list[int]]:
        """Indices of sources that are not blank, the longest of a bucket first, so a lack of memory shows at once."""
        bucket_size = self._batch_size * BATCHES_PER_BUCKET
        for start in range(0, len(sources), bucket_size):
            bucket = range(len(sources))[start : start + bucket_size]
            not_blank = [index for index in bucket if sources[index].strip()]
            order = sorted(not_blank, key=lambda index: len(sources[index]), reverse=True)
            yield from (order[first : first + self._batch_size] for first in range(0, len(order), self._batch_size))

    @torch.inference_mode()
    def _translate_batch(self, pair: LanguagePair, sources: list[str]) -> tuple[list[str], int]:
        """Translations, and the number of those that were cut."""
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
        output_BL: Tensor = self._model.generate(**inputs.to(execution_device(self._model)), **self._generation)
        end = torch.as_tensor(self._model.generation_config.eos_token_id, device=output_BL.device)
        has_ended_B = torch.isin(output_BL[:, 1:], end).any(dim=1)  # the first token is often the end token, too
        return self._tokenizer.batch_decode(output_BL, skip_special_tokens=True), int((~has_ended_B).sum())


def _quality(
    pair: LanguagePair, sentences: Sequence[Sentence], translations: _Translations, languages: Sequence[str]
) -> DirectionQuality:
    """The quality of one direction; `languages` are all in which the model can answer."""
    sources, references = [sentence.source for sentence in sentences], [sentence.target for sentence in sentences]
    scores = score_translations(sources, translations.texts, references, tgt_lang=pair[1], languages=languages)
    digest = hashlib.sha256()
    for texts in sorted(zip(sources, references, strict=True)):  # in any order of arrival
        digest.update("\0".join((*texts, "")).encode())
    return DirectionQuality(
        **vars(scores),
        num_cut=translations.num_cut,
        seconds=translations.seconds,
        text_sha256=digest.hexdigest(),
    )


__all__ = ["evaluate_translation"]
