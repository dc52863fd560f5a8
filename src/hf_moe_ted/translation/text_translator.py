"""Whole texts through a model: split into sentences, translated in batches of like length, put back together."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.language_codes import language_ids, languages_kept, resolve_language
from ..models.language_detection import UNDETERMINED, LanguageDetector, detector_code
from ..models.segments import Segments, split_long, split_sentences
from .placeholders import lost_placeholders

AUTO = "auto"

# A translation of a sentence is rarely shorter or longer than so many times its source, in bytes of UTF-8.
MIN_LENGTH_RATIO, MAX_LENGTH_RATIO = 0.25, 5.0
MIN_RATIO_BYTES = 20
MIN_DETECTED_LETTERS = 25  # in shorter texts the detector errs often

CUT = "cut at max_new_tokens"


@dataclass(frozen=True, kw_only=True)
class TranslatedSentence:
    """
    Attributes:
        source: a sentence, or a part of one that is longer than the model has positions.
        text: its translation.
        alternatives: other translations, the best first; the beams of the search.
        scores: of the translation and its alternatives: log-probability per token, as beam search ranks them; empty
            without alternatives.
        problems: what a reader should look at, in words: places for values or tags that were lost, an unusual length,
            another language than was asked for, a translation that was cut.
    """

    source: str
    text: str
    alternatives: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TranslatedText:
    """
    Attributes:
        text: the translation, with the white space and the lines of the source.
        src_lang, tgt_lang: as the tokenizer names them.
        sentences: in the order of the text.
        alternatives: the text with the first, second, ... alternative of each sentence.
    """

    text: str
    src_lang: str
    tgt_lang: str
    sentences: tuple[TranslatedSentence, ...]
    alternatives: tuple[str, ...] = ()

    @property
    def problems(self) -> tuple[str, ...]:
        """Of all its sentences, with the start of each."""
        return tuple(f"{s.source[:60]!r}: {problem}" for s in self.sentences for problem in s.problems)


class TextTranslator:
    """Translates texts of any length with an encoder-decoder model for translation.

    Args:
        model: a [`ZCodeM3ForConditionalGeneration`], or `M2M100ForConditionalGeneration` (also NLLB) of transformers.
        tokenizer: its tokenizer, a [`ZCodeM3Tokenizer`] or one for translation of transformers.
        num_beams: of the beam search; 1 is greedy.
        batch_tokens: source tokens of a batch, padding included. A batch that does not fit in a GPU's memory is halved.
        max_new_tokens: where a translation that has not ended is cut, and reported; by default four times its source
            and 32 more, at most what the model has positions for.
        num_alternatives: other translations of each sentence; less than `num_beams`.
        split: whether texts are split into sentences; otherwise each line is one. Lines are never joined.

    Raises:
        ValueError: a number that cannot be, or a tokenizer without languages.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        num_beams: int = 4,
        batch_tokens: int = 4096,
        max_new_tokens: int | None = None,
        num_alternatives: int = 0,
        split: bool = True,
    ):
        numbers = {"num_beams": num_beams, "batch_tokens": batch_tokens, "max_new_tokens": max_new_tokens}
        for name, number in numbers.items():
            if number is not None and number < 1:
                raise ValueError(f"{name} ({number}) must be at least 1")
        if not 0 <= num_alternatives < num_beams:
            raise ValueError(
                f"num_alternatives ({num_alternatives}) must be less than num_beams ({num_beams}), whose beams they are"
            )
        if not hasattr(tokenizer, "_build_translation_inputs"):
            raise ValueError(f"{type(tokenizer).__name__} must be a tokenizer for translation: a ZCodeM3Tokenizer")
        self.model: Any = model
        self.tokenizer: Any = tokenizer
        self.languages = list(language_ids(tokenizer))
        self.num_beams, self.batch_tokens, self.split = num_beams, batch_tokens, split
        self.num_sequences = num_alternatives + 1
        positions = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
        self.max_source_tokens = min(positions, tokenizer.model_max_length)
        self.max_new_tokens = min(max_new_tokens or positions, positions)
        self._cuts_early = max_new_tokens is None

    def translate(
        self,
        texts: Sequence[str],
        src_lang: str,
        tgt_lang: str,
        on_batch: Callable[[int, int], None] | None = None,
    ) -> list[TranslatedText]:
        """
        Args:
            texts: of any length; blank ones stay as they are. A sentence that stands in them several times is
                translated once.
            src_lang, tgt_lang: codes in any form that means a language of the tokenizer; `src_lang="auto"` for the
                language that py3langid finds in each text; it knows no scripts, so that the first of several forms of
                a language is taken (`zho_Hans`).
            on_batch: is told after each batch how many sentences and source tokens were translated.

        Raises:
            ValueError: an unknown language, or a text that is no string or has no language that could be found.
        """
        tgt_lang = resolve_language(tgt_lang, self.languages, name="tgt_lang")
        if src_lang != AUTO:
            src_lang = resolve_language(src_lang, self.languages, name="src_lang")
        languages = [self._language_of(text, index, src_lang) for index, text in enumerate(texts)]
        split = [
            split_sentences(text, language if self.split else None)
            for text, language in zip(texts, languages, strict=True)
        ]
        wanted: dict[str, dict[str, None]] = defaultdict(dict)  # sentences by language, each once
        for segments, language in zip(split, languages, strict=True):
            wanted[language] |= dict.fromkeys(segments.sentences)
        found: dict[tuple[str, str], list[TranslatedSentence]] = {}
        joined: dict[tuple[str, str], list[str]] = {}
        for language, sentences in wanted.items():
            for sentence, parts, translated in self._sentences([*sentences], language, tgt_lang, on_batch):
                found[language, sentence] = translated
                joined[language, sentence] = self._join(parts, translated, tgt_lang)
        return [
            self._whole(segments, [(language, s) for s in segments.sentences], found, joined, tgt_lang, language)
            for segments, language in zip(split, languages, strict=True)
        ]

    def _whole(
        self,
        segments: Segments,
        keys: list[tuple[str, str]],
        found: dict[tuple[str, str], list[TranslatedSentence]],
        joined: dict[tuple[str, str], list[str]],
        tgt_lang: str,
        language: str,
    ) -> TranslatedText:
        texts = [segments.join([joined[key][rank] for key in keys], tgt_lang) for rank in range(self.num_sequences)]
        sentences = tuple(sentence for key in keys for sentence in found[key])
        return TranslatedText(
            text=texts[0], src_lang=language, tgt_lang=tgt_lang, sentences=sentences, alternatives=tuple(texts[1:])
        )

    def _join(self, parts: Segments, translated: Sequence[TranslatedSentence], tgt_lang: str) -> list[str]:
        """A sentence of translated parts, and its alternatives."""
        ranked = [[sentence.text, *sentence.alternatives] for sentence in translated]
        return [parts.join([texts[rank] for texts in ranked], tgt_lang) for rank in range(self.num_sequences)]

    def _language_of(self, text: Any, index: int, src_lang: str) -> str:
        if not isinstance(text, str):
            raise ValueError(f"a text to translate must be a string, got {type(text).__name__} at {index}: {text!r}")
        if src_lang != AUTO:
            return src_lang
        # text without a letter has none, and any will do
        return self._language_of_code.get(self._detector.detect(text), self.languages[0])

    @cached_property
    def _language_of_code(self) -> dict[str, str]:
        """Codes of the detector, and the first language of the tokenizer that each means."""
        codes = {language: detector_code(language) for language in reversed(self.languages)}
        return {code: language for language, code in codes.items() if code is not None}

    @cached_property
    def _detector(self) -> LanguageDetector:
        return LanguageDetector(self._language_of_code.values())

    def _sentences(
        self, sentences: list[str], src_lang: str, tgt_lang: str, on_batch: Callable[[int, int], None] | None
    ) -> Iterator[tuple[str, Segments, list[TranslatedSentence]]]:
        """Each sentence, the parts that the model has positions for, and their translations."""
        counts = self._count_tokens(sentences, src_lang, tgt_lang)
        parts = [
            Segments((sentence,), ("", ""))
            if count <= self.max_source_tokens
            else split_long(
                sentence, self.max_source_tokens, lambda texts: self._count_tokens(texts, src_lang, tgt_lang)
            )
            for sentence, count in zip(sentences, counts, strict=True)
        ]
        each = list(dict.fromkeys(part for of_sentence in parts for part in of_sentence.sentences))
        translated = self._translate(each, src_lang, tgt_lang, on_batch)
        for sentence, of_sentence in zip(sentences, parts, strict=True):
            yield sentence, of_sentence, [translated[part] for part in of_sentence.sentences]

    def _encode(self, texts: Sequence[str], src_lang: str, tgt_lang: str) -> Any:
        with languages_kept(self.tokenizer):
            return self.tokenizer._build_translation_inputs(
                list(texts), return_tensors=None, src_lang=src_lang, tgt_lang=tgt_lang, verbose=False
            )

    def _count_tokens(self, texts: Sequence[str], src_lang: str, tgt_lang: str) -> list[int]:
        return [len(ids) for ids in self._encode(texts, src_lang, tgt_lang)["input_ids"]] if texts else []

    def _translate(
        self, texts: list[str], src_lang: str, tgt_lang: str, on_batch: Callable[[int, int], None] | None
    ) -> dict[str, TranslatedSentence]:
        if not texts:
            return {}
        encoded = self._encode(texts, src_lang, tgt_lang)
        forced = encoded["forced_bos_token_id"]
        ids = encoded["input_ids"]
        translated: dict[str, TranslatedSentence] = {}
        for batch in self._batches([len(of_text) for of_text in ids]):
            results = self._generate([ids[index] for index in batch], forced)
            for index, (outputs, scores, is_cut) in zip(batch, results, strict=True):
                problems = self._problems(texts[index], outputs[0], tgt_lang)
                translated[texts[index]] = TranslatedSentence(
                    source=texts[index],
                    text=outputs[0],
                    alternatives=tuple(outputs[1:]),
                    scores=tuple(scores),
                    problems=(*problems, *([CUT] if is_cut else [])),
                )
            if on_batch is not None:
                on_batch(len(batch), sum(len(ids[index]) for index in batch))
        return translated

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """The longest first, so that what does not fit in memory fails at once."""
        batch: list[int] = []
        for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
            if batch and (len(batch) + 1) * lengths[batch[0]] > self.batch_tokens:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def _generate(self, ids: list[list[int]], forced: Any) -> list[tuple[list[str], list[float], bool]]:
        """Of each source: its translations, their scores, and whether the first was cut."""
        try:
            return self._generate_at_once(ids, forced)
        except torch.OutOfMemoryError:
            if len(ids) == 1:
                raise
            torch.cuda.empty_cache()
        middle = len(ids) // 2
        return self._generate(ids[:middle], forced) + self._generate(ids[middle:], forced)

    @torch.inference_mode()
    def _generate_at_once(self, ids: list[list[int]], forced: Any) -> list[tuple[list[str], list[float], bool]]:
        inputs = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(self.model.device)
        longest = max(map(len, ids))
        max_new_tokens = min(self.max_new_tokens, 4 * longest + 32) if self._cuts_early else self.max_new_tokens
        outputs = self.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            forced_bos_token_id=forced,
            num_beams=self.num_beams,
            num_return_sequences=self.num_sequences,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=self.num_sequences > 1,
        )
        sequences: Tensor = outputs.sequences  # [B * num_sequences, L]
        end = torch.as_tensor(self.model.generation_config.eos_token_id, device=sequences.device)
        has_ended = torch.isin(sequences[:, 1:], end).any(dim=1)[:: self.num_sequences].tolist()
        texts = self.tokenizer.batch_decode(sequences, skip_special_tokens=True)
        scores = outputs.sequences_scores.tolist() if self.num_sequences > 1 else []
        return [
            (texts[start : start + self.num_sequences], scores[start : start + self.num_sequences], not ended)
            for start, ended in zip(range(0, len(texts), self.num_sequences), has_ended, strict=True)
        ]

    def _problems(self, source: str, translation: str, tgt_lang: str) -> list[str]:
        problems = []
        if lost := lost_placeholders(source, translation):
            problems.append(f"not as often as in the source: {' '.join(lost)}")
        num_bytes = len(source.encode())
        ratio = len(translation.encode()) / num_bytes
        if num_bytes >= MIN_RATIO_BYTES and not MIN_LENGTH_RATIO <= ratio <= MAX_LENGTH_RATIO:
            problems.append(f"{ratio:.2g} times as long as the source")
        if detector_code(tgt_lang) is not None and sum(map(str.isalpha, translation)) >= MIN_DETECTED_LETTERS:
            found = self._detector.detect(translation)
            if found not in (UNDETERMINED, detector_code(tgt_lang)):
                problems.append(f"looks like {found}, not {tgt_lang}")
        return problems


__all__ = ["AUTO", "TextTranslator", "TranslatedSentence", "TranslatedText"]
