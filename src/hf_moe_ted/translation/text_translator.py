"""Translate whole texts: split into sentences, translate in batches of similar length, and join again."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..evaluation.copied_parts import missing_numbers, numbers
from ..evaluation.placeholders import num_letters, without_placeholders
from ..models.language_codes import resolve_language
from ..models.language_detection import (
    AUTO,
    MIN_DETECTED_LETTERS,
    UNDETERMINED,
    LanguageFinder,
    detector_code,
    language_finder,
)
from ..models.segments import Segments, split_long, split_sentences
from .glossary import Glossary
from .phrases import phrases_of
from .scripts import stray_letters
from .sentence_translator import (
    MAX_LENGTH_RATIO,
    MIN_LENGTH_RATIO,
    MIN_RATIO_BYTES,
    GeneratedSentence,
    OnStep,
    SentenceTranslator,
    SourceSentence,
)

MAX_STREAMED_AT_ONCE = 32  # sentences
# of a detected language; docs/benchmarks/unsure_languages_cpu_2026-12-01.md
MIN_PROBABILITY = 0.7

CUT = "cut at max_new_tokens"


@dataclass(frozen=True, kw_only=True)
class TranslatedSentence:
    """
    Attributes:
        source: a sentence, or a part of a sentence that is longer than the model's positions.
        text: its translation.
        alternatives: other translations, all different, the best first: the beams of the search. They are fewer than
            requested where beams have the same text.
        scores: log-probability per token of the translation and its alternatives, by which beam search ranks; empty
            if no alternatives were requested.
        problems: problems that a reader should check, in words: lost placeholders or tags, missing numbers and glossary
            terms, an unusual length, another language than requested, letters of another script, a translation that was
            cut.
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
        src_lang, tgt_lang: languages by their names in the tokenizer.
        sentences: the sentences in the order of the text.
        alternatives: the text with the first, second, ... alternative of each sentence, or with its translation where
            it has fewer.
        text_problems: problems of the text as a whole, in words: the language for which it was taken, if that is not
            sure, or the text is unchanged because of it.
    """

    text: str
    src_lang: str
    tgt_lang: str
    sentences: tuple[TranslatedSentence, ...]
    alternatives: tuple[str, ...] = ()
    text_problems: tuple[str, ...] = ()

    @property
    def problems(self) -> tuple[str, ...]:
        """Problems of the text and of all sentences, with the start of each."""
        of_sentences = (f"{s.source[:60]!r}: {problem}" for s in self.sentences for problem in s.problems)
        return (*self.text_problems, *of_sentences)


@dataclass(frozen=True)
class PlannedText:
    """A text that is split into sentences, before translation.

    Attributes:
        src_lang, tgt_lang: languages by their names in the tokenizer.
        segments: its sentences and the gaps between them.
        parts: for each sentence, its parts that fit the model's positions; usually one.
        sentences: the parts, ready for translation.
        problems: problems of the text as a whole, with its start.
    """

    src_lang: str
    tgt_lang: str
    segments: Segments
    parts: tuple[Segments, ...]
    sentences: tuple[tuple[SourceSentence, ...], ...]
    problems: tuple[str, ...] = ()

    def pieces(self) -> "list[PlannedText]":
        """A text for each sentence, with the white space before it; the last also has the white space after it.

        The first has the problems of the whole.
        """
        segments = self.segments.pieces(self.tgt_lang)
        pieces = [
            replace(self, segments=piece, parts=(parts,), sentences=(sentences,), problems=())
            for piece, parts, sentences in zip(segments, self.parts, self.sentences, strict=True)
        ]
        return [replace(piece, problems=self.problems) for piece in pieces[:1]] + pieces[1:]

    def whole(self, translated: Mapping[SourceSentence, TranslatedSentence]) -> TranslatedText:
        """The text with the translations of its sentences."""
        found = [[translated[part] for part in parts] for parts in self.sentences]
        ranked = [[[sentence.text, *sentence.alternatives] for sentence in of_sentence] for of_sentence in found]

        most = max((len(texts) for of_sentence in ranked for texts in of_sentence), default=1)

        def text(rank: int) -> str:
            sentences = [
                parts.join([(texts[rank:] or texts)[0] for texts in of_sentence], self.tgt_lang)
                for parts, of_sentence in zip(self.parts, ranked, strict=True)
            ]
            return self.segments.join(sentences, self.tgt_lang)

        return TranslatedText(
            text=text(0),
            src_lang=self.src_lang,
            tgt_lang=self.tgt_lang,
            sentences=tuple(sentence for of_sentence in found for sentence in of_sentence),
            alternatives=tuple(text(rank) for rank in range(1, most)),
            text_problems=self.problems,
        )


class TextTranslator:
    """Translates texts of any length with an encoder-decoder model for translation.

    `translate` consists of `plan`, `translate_batch` for each of the `batches` of all sentences, and `whole` of each
    plan. A server mixes the sentences of several plans. Threads may share a translator.

    Args:
        model: a [`ZCodeM3ForConditionalGeneration`], or `M2M100ForConditionalGeneration` (also NLLB) of transformers.
        tokenizer: its tokenizer, a [`ZCodeM3Tokenizer`] or one for translation of transformers.
        num_beams: beams of the search; 1 is greedy.
        batch_tokens: source tokens of a batch, with padding. A batch that does not fit in a GPU's memory is halved.
        max_new_tokens: longest translation in tokens; a longer one is cut and reported. By default it is four times the
            source plus 32, at most the model's positions.
        num_alternatives: number of other translations per sentence; less than `num_beams`.
        split: whether texts are split into sentences; otherwise each line is one. Lines are never joined.
        keep_placeholders: whether translations must have the placeholders of their sources (`%s`, `{name}`, `<b>`,
            URLs, `report.pdf`, ...) and their numbers; otherwise lost ones are only reported.

    Raises:
        ValueError: a number is out of its range, or the tokenizer has no languages.
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
        keep_placeholders: bool = True,
    ):
        self._sentences = SentenceTranslator(
            model, tokenizer, num_beams=num_beams, batch_tokens=batch_tokens, max_new_tokens=max_new_tokens
        )
        self.split, self.keep_placeholders = split, keep_placeholders
        self.num_sequences = self._num_sequences(num_alternatives)

    @property
    def model(self) -> PreTrainedModel:
        """The model that translates."""
        return self._sentences.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the model."""
        return self._sentences.tokenizer

    @property
    def languages(self) -> list[str]:
        """The languages by their names in the tokenizer."""
        return self._sentences.languages

    @property
    def num_beams(self) -> int:
        """Number of beams of the search."""
        return self._sentences.num_beams

    @property
    def batch_tokens(self) -> int:
        """Source tokens of a batch, padding included."""
        return self._sentences.batch_tokens

    @property
    def max_new_tokens(self) -> int:
        """The longest translation of a sentence, in tokens."""
        return self._sentences.max_new_tokens

    def translate(
        self,
        texts: Sequence[str],
        src_lang: str,
        tgt_lang: str,
        on_batch: Callable[[int, int], None] | None = None,
        *,
        glossary: Glossary | None = None,
        num_alternatives: int | None = None,
    ) -> list[TranslatedText]:
        """
        Args:
            texts: texts of any length; blank texts, and texts in the target language, do not change. A sentence that
                occurs several times is translated once.
            src_lang, tgt_lang: codes in any form that means a language of the tokenizer; with `src_lang="auto"`
                py3langid detects the language of each text. It does not know scripts, so of several forms of a language
                the first is used (`zho_Hans`). `problems` says for which language a text was taken if that is not
                sure, or the text is unchanged.
            on_batch: function that gets, after each batch, the number of translated sentences and source tokens.
            glossary: terms that the translations must have; `problems` lists missing ones.
            num_alternatives: number per sentence; by default that of the translator.

        Raises:
            ValueError: a language is unknown, a text is not a string or has no detectable language, `texts` is a string
                itself, or there are more alternatives than other beams.
        """
        plans = self.plan(texts, src_lang, tgt_lang, glossary=glossary, num_alternatives=num_alternatives)
        translated: dict[SourceSentence, TranslatedSentence] = {}
        for batch in self.batches(sentence for plan in plans for part in plan.sentences for sentence in part):
            translated |= zip(batch, self.translate_batch(batch), strict=True)
            if on_batch is not None:
                on_batch(len(batch), sum(len(sentence.input_ids) for sentence in batch))
        return [plan.whole(translated) for plan in plans]

    def stream(
        self, text: str, src_lang: str, tgt_lang: str, *, num_alternatives: int | None = None
    ) -> Iterator[TranslatedText]:
        """Yield the sentences of a text in order, when they are finished: the first alone, then more at once.

        Each is a text with the white space before it; the last also has the white space after it. Together they are the
        text that `translate` returns. For arguments and errors see there.
        """
        [plan] = self.plan([text], src_lang, tgt_lang, num_alternatives=num_alternatives)
        pieces = plan.pieces() or [plan]
        translated: dict[SourceSentence, TranslatedSentence] = {}
        start, size = 0, 1
        while start < len(pieces):
            group = pieces[start : start + size]
            wanted = [sentence for piece in group for parts in piece.sentences for sentence in parts]
            for batch in self.batches(sentence for sentence in wanted if sentence not in translated):
                translated |= zip(batch, self.translate_batch(batch), strict=True)
            yield from (piece.whole(translated) for piece in group)
            start, size = start + size, min(2 * size, MAX_STREAMED_AT_ONCE)

    def warm_up(self) -> None:
        """Translate some words, so that GPU kernels are compiled before a user waits for them."""
        if self._sentences.device.type == "cuda":
            for num_sentences in (1, 8, 64):
                words = [f"{number} words." for number in range(num_sentences)]
                self.translate(words, self.languages[0], self.languages[-1])

    def plan(
        self,
        texts: Sequence[str],
        src_lang: str,
        tgt_lang: str,
        *,
        glossary: Glossary | None = None,
        num_alternatives: int | None = None,
    ) -> list[PlannedText]:
        """Plan the translation of texts; for arguments and errors see `translate`."""
        if isinstance(texts, str):
            raise ValueError(f"texts ({texts[:60]!r}) must be a list of strings: give [text]")
        num_sequences = self._num_sequences(num_alternatives)
        tgt_lang = resolve_language(tgt_lang, self.languages, name="tgt_lang")
        is_detected = src_lang == AUTO
        if not is_detected:
            src_lang = resolve_language(src_lang, self.languages, name="src_lang")
        languages = [self._language_of(text, index, src_lang) for index, text in enumerate(texts)]
        split = [
            Segments((), (text,)) if language == tgt_lang else split_sentences(text, language if self.split else None)
            for text, language in zip(texts, languages, strict=True)
        ]
        by_language: dict[str, dict[str, None]] = defaultdict(dict)  # sentences, each once
        for segments, language in zip(split, languages, strict=True):
            by_language[language] |= dict.fromkeys(segments.sentences)
        parts = {
            language: self._parts([*sentences], language, tgt_lang, glossary, num_sequences)
            for language, sentences in by_language.items()
        }
        return [
            PlannedText(
                language,
                tgt_lang,
                segments,
                *_transposed(parts[language][sentence] for sentence in segments.sentences),
                problems=_problems_of_detection(text, language, tgt_lang, self._finder) if is_detected else (),
            )
            for text, segments, language in zip(texts, split, languages, strict=True)
        ]

    def batches(self, sentences: Iterable[SourceSentence]) -> Iterator[list[SourceSentence]]:
        """Batches of distinct sentences of similar length, the longest first, so a lack of memory shows at once."""
        return self._sentences.batches(dict.fromkeys(sentences))

    def translate_batch(
        self, batch: Sequence[SourceSentence], on_step: OnStep | None = None, *, search: bool = True
    ) -> list[TranslatedSentence]:
        """
        Args:
            batch: sentences, possibly of several languages.
            on_step: function that is called after each token of the batch; an exception in it ends the work.
            search: whether to search again for sentences whose translation lacks glossary terms.
        """
        generated = self._sentences.generate(batch, on_step, search=search)
        return [self._translated(*both) for both in zip(batch, generated, strict=True)]

    def _num_sequences(self, num_alternatives: int | None) -> int:
        if num_alternatives is None:
            return self.num_sequences
        if not 0 <= num_alternatives < self.num_beams:
            raise ValueError(
                f"num_alternatives ({num_alternatives}) must be less than num_beams ({self.num_beams}), because "
                "alternatives are beams"
            )
        return num_alternatives + 1

    def _language_of(self, text: Any, index: int, src_lang: str) -> str:
        if not isinstance(text, str):
            raise ValueError(f"a text to translate must be a string, got {type(text).__name__} at {index}: {text!r}")
        if src_lang != AUTO:
            return src_lang
        return self._finder.find(text)

    @property
    def _finder(self) -> LanguageFinder:
        return language_finder(tuple(self.languages))

    def _parts(
        self, sentences: list[str], src_lang: str, tgt_lang: str, glossary: Glossary | None, num_sequences: int
    ) -> dict[str, tuple[Segments, tuple[SourceSentence, ...]]]:
        """Split each sentence into parts that fit the model's positions; usually one."""
        max_tokens = self._sentences.max_source_tokens

        def encode(texts: Sequence[str]) -> list[SourceSentence]:
            return self._sentences.encode(texts, src_lang, tgt_lang, num_sequences)

        def with_phrases(encoded: SourceSentence) -> SourceSentence:
            phrases = phrases_of(encoded.text, glossary, keep_placeholders=self.keep_placeholders)
            return replace(encoded, phrases=phrases, keep_numbers=self.keep_placeholders)

        def count_tokens(texts: Sequence[str]) -> list[int]:
            return [len(sentence.input_ids) for sentence in self._sentences.encode(texts, src_lang, tgt_lang)]

        parts: dict[str, tuple[Segments, tuple[SourceSentence, ...]]] = {}
        for sentence, encoded in zip(sentences, encode(sentences), strict=True):
            if len(encoded.input_ids) <= max_tokens:
                parts[sentence] = Segments((sentence,), ("", "")), (with_phrases(encoded),)
            else:
                split = split_long(sentence, max_tokens, count_tokens)
                parts[sentence] = split, tuple(map(with_phrases, encode(split.sentences)))
        return parts

    def _translated(self, source: SourceSentence, generated: GeneratedSentence) -> TranslatedSentence:
        problems = self._problems(source, generated.texts[0])
        return TranslatedSentence(
            source=source.text,
            text=generated.texts[0],
            alternatives=generated.texts[1:],
            scores=generated.scores,
            problems=(*problems, *([CUT] if generated.is_cut else [])),
        )

    def _problems(self, sentence: SourceSentence, translation: str) -> list[str]:
        source, tgt_lang = sentence.text, sentence.tgt_lang
        problems = []
        if lost := sentence.lost_placeholders(translation):
            problems.append(f"not as often as in the source: {' '.join(lost)}")
        of_terms = [number for phrase in sentence.phrases if phrase.source for number in numbers(phrase.source)]
        if missing := Counter(missing_numbers(source, translation)) - Counter(of_terms):
            problems.append(f"numbers that are missing: {' '.join(missing.elements())}")
        problems += [
            f"not as in the glossary: {phrase.source} -> {phrase.text}"
            for phrase in sentence.missing(translation)
            if phrase.is_term
        ]
        num_bytes = len(source.encode())
        ratio = len(translation.encode()) / num_bytes
        if num_bytes >= MIN_RATIO_BYTES and not MIN_LENGTH_RATIO <= ratio <= MAX_LENGTH_RATIO:
            problems.append(f"{ratio:.2g} times as long as the source")
        if detector_code(tgt_lang) is not None and num_letters(translation) >= MIN_DETECTED_LETTERS:
            found = self._finder.detector.detect(without_placeholders(translation))
            if found not in (UNDETERMINED, detector_code(tgt_lang)):
                problems.append(f"looks like {found}, not {tgt_lang}")
        if stray := stray_letters(translation, tgt_lang, [source, *(phrase.text for phrase in sentence.phrases)]):
            problems.append(f"letters that {tgt_lang} is not written in: {' '.join(stray)}")
        return problems


def _problems_of_detection(text: str, src_lang: str, tgt_lang: str, finder: LanguageFinder) -> tuple[str, ...]:
    """What to know about a detected language; for a text without letters any language is right."""
    words = without_placeholders(text)
    ranked = finder.detector.rank(words)
    if not ranked:
        return ()
    if src_lang == tgt_lang:
        problem = f"taken for {src_lang}, the target language: unchanged"
    elif ranked[0][1] < MIN_PROBABILITY:
        problem = f"taken for {src_lang}, with a probability of {ranked[0][1]:.2f}"
    else:
        return ()
    return (f"{text.strip()[:60]!r}: {problem}",)


def _transposed(
    parts: Iterable[tuple[Segments, tuple[SourceSentence, ...]]],
) -> tuple[tuple[Segments, ...], tuple[tuple[SourceSentence, ...], ...]]:
    both = list(parts)
    return tuple(segments for segments, _ in both), tuple(sentences for _, sentences in both)


__all__ = ["AUTO", "PlannedText", "TextTranslator", "TranslatedSentence", "TranslatedText"]
