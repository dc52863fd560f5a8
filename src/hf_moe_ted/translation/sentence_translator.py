"""Translate batches of sentences with a model: inputs and outputs of `generate`.

Shape letters: B sentences of a batch, N sequences of each, beams among them, L tokens, V words of the vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import StoppingCriteria

from ..evaluation.copied_parts import missing_numbers
from ..evaluation.placeholders import lost_placeholders, placeholders
from ..models.attention_backends import without_cudnn_attention
from ..models.execution_device import execution_device
from ..models.family import check_family
from ..models.generation import FirstTokens
from ..models.language_codes import language_ids, languages_kept
from ..models.vocabulary import check_vocabulary
from .grid_search import MAX_BEAMS, Hypothesis, grid_search
from .markers import Markers, invented_markers
from .phrases import Phrase, PhraseTokens

OnStep = Callable[[], None]

# the usual range of a translation's length relative to its source, in bytes of UTF-8
MIN_LENGTH_RATIO, MAX_LENGTH_RATIO = 0.25, 5.0
MIN_RATIO_BYTES = 20
_SMALL = ("0", "1", "2")


@dataclass(frozen=True, kw_only=True)
class SourceSentence:
    """A sentence to translate; equal sentences have the same translation.

    Attributes:
        text: the sentence as in its text.
        src_lang, tgt_lang: languages by their names in the tokenizer.
        input_ids: its tokens, with language tag and end token.
        first_token: first token of the translation: the tag of its language.
        num_sequences: largest number of translations: the best one and its alternatives.
        phrases: phrases that its translation must have.
        keep_numbers: whether it must have the numbers of the sentence.
    """

    text: str
    src_lang: str
    tgt_lang: str
    input_ids: tuple[int, ...]
    first_token: int
    num_sequences: int = 1
    phrases: tuple[Phrase, ...] = ()
    keep_numbers: bool = False

    def missing(self, translation: str) -> list[Phrase]:
        """The phrases that a translation lacks, or has less often than required."""
        return [phrase for phrase in self.phrases if not phrase.is_in(translation)]

    def lacks_placeholders(self, translation: str) -> bool:
        """Whether placeholders are missing, which justify a translation with markers."""
        return any(not phrase.is_term for phrase in self.missing(translation))

    def lacks_numbers(self, translation: str) -> bool:
        """Whether numbers are missing that justify one: none that many languages write as a word, or in the noun."""
        return self.keep_numbers and any(number not in _SMALL for number in missing_numbers(self.text, translation))

    def is_mended_by(self, translation: str, plain: str, *, numbers: bool) -> bool:
        """Whether a translation with markers may replace the plain one.

        It has all phrases, and exactly the placeholders of the sentence; all numbers and no others or, where numbers
        had no markers, no fewer than the plain one; and it is not much longer than the source.
        """
        is_long = len(translation.encode()) > MAX_LENGTH_RATIO * max(MIN_RATIO_BYTES, len(self.text.encode()))
        if is_long or self.missing(translation) or self.lost_placeholders(translation):
            return False
        missing = missing_numbers(self.text, translation)
        if numbers and (missing or missing_numbers(translation, self.text)):
            return False
        is_worse = len(missing) > len(missing_numbers(self.text, plain))
        return not is_worse and not invented_markers(self.text, translation)

    def lost_placeholders(self, translation: str) -> list[str]:
        """Placeholders that a translation has more or less often than the sentence, but for those of glossary terms."""
        of_terms = {
            name
            for phrase in self.phrases
            if phrase.source is not None
            for name in placeholders(f"{phrase.source}\n{phrase.text}")
        }
        return [name for name in lost_placeholders(self.text, translation) if name not in of_terms]

    def lacks_terms(self, translation: str) -> bool:
        """Whether glossary terms are missing, which justify a search."""
        return any(phrase.is_term for phrase in self.missing(translation))


@dataclass(frozen=True)
class GeneratedSentence:
    """
    Attributes:
        texts: different translations, the best first; fewer than requested if the beams have fewer.
        scores: log-probability per token of each, by which beam search ranks; empty if one was requested.
        is_cut: whether the first text was cut before its end.
    """

    texts: tuple[str, ...]
    scores: tuple[float, ...]
    is_cut: bool


class SentenceTranslator:
    """Translates sentences with a model and its tokenizer for [`TextTranslator`]; see there for the arguments."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        num_beams: int,
        batch_tokens: int,
        max_new_tokens: int | None,
    ):
        arguments = {"num_beams": num_beams, "batch_tokens": batch_tokens, "max_new_tokens": max_new_tokens}
        for name, number in arguments.items():
            if number is not None and number < 1:
                raise ValueError(f"{name} ({number}) must be at least 1")
        check_family(model)
        if not hasattr(tokenizer, "_build_translation_inputs"):
            raise ValueError(
                f"{type(tokenizer).__name__} must be a tokenizer for translation, such as a ZCodeM3Tokenizer"
            )
        check_vocabulary(model, tokenizer)
        self.model: Any = model
        self.tokenizer: Any = tokenizer
        self.languages = list(language_ids(tokenizer))
        self.num_beams, self.batch_tokens = num_beams, batch_tokens
        positions = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
        self.max_source_tokens = min(positions, tokenizer.model_max_length)
        self.max_new_tokens = min(max_new_tokens or positions, positions)
        self._cuts_early = max_new_tokens is None
        self._phrase_tokens = PhraseTokens(tokenizer)

    def encode(
        self,
        texts: Sequence[str],
        src_lang: str,
        tgt_lang: str,
        num_sequences: int = 1,
        phrases: Sequence[tuple[Phrase, ...]] | None = None,
    ) -> list[SourceSentence]:
        """Encode texts as sentences; sentences to translate have at most `max_source_tokens` tokens."""
        if not texts:
            return []
        with languages_kept(self.tokenizer):
            encoded = self.tokenizer._build_translation_inputs(
                list(texts), return_tensors=None, src_lang=src_lang, tgt_lang=tgt_lang, verbose=False
            )
        return [
            SourceSentence(
                text=text,
                src_lang=src_lang,
                tgt_lang=tgt_lang,
                input_ids=tuple(ids),
                first_token=encoded["forced_bos_token_id"],
                num_sequences=num_sequences,
                phrases=of_text,
            )
            for text, ids, of_text in zip(texts, encoded["input_ids"], phrases or [()] * len(texts), strict=True)
        ]

    def batches(self, sentences: Iterable[SourceSentence]) -> Iterator[list[SourceSentence]]:
        """Batches, the longest first, so that a lack of memory shows at once."""
        batch: list[SourceSentence] = []
        for sentence in sorted(sentences, key=lambda sentence: -len(sentence.input_ids)):
            if batch and (len(batch) + 1) * len(batch[0].input_ids) > self.batch_tokens:
                yield batch
                batch = []
            batch.append(sentence)
        if batch:
            yield batch

    def generate(
        self, batch: Sequence[SourceSentence], on_step: OnStep | None = None, *, search: bool = True
    ) -> list[GeneratedSentence]:
        """Translate a batch; its languages may differ. A batch that does not fit in a GPU's memory is split.

        A sentence whose translation lacks placeholders or numbers is translated again with markers; a sentence that
        lacks terms is translated again by a search for translations that have them. All other sentences have the same
        translation as without phrases.

        Args:
            batch: B sentences.
            on_step: function that is called after each token of the batch; an exception in it ends the work.
            search: whether to search for sentences that lack terms.
        """
        try:
            generated = self._generate(batch, on_step)
            self._with_markers(batch, generated, on_step)
            if search:
                self._with_terms(batch, generated, on_step)
            return generated
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            torch.cuda.empty_cache()
        middle = len(batch) // 2
        halves = (self.generate(half, on_step, search=search) for half in (batch[:middle], batch[middle:]))
        return [of_one for half in halves for of_one in half]

    def _with_terms(
        self, batch: Sequence[SourceSentence], generated: list[GeneratedSentence], on_step: OnStep | None
    ) -> None:
        """Replace translations that lack terms by the results of the search."""
        again = [index for index, of_one in enumerate(generated) if batch[index].lacks_terms(of_one.texts[0])]
        num_at_once = math.ceil(len(batch) / MAX_BEAMS)  # each has so many times more beams
        for start in range(0, len(again), num_at_once):
            indices = again[start : start + num_at_once]
            found = self._search([batch[index] for index in indices], on_step)
            for index, hypotheses in zip(indices, found, strict=True):
                generated[index] = self._merged(hypotheses, generated[index], batch[index])

    def _with_markers(
        self, batch: Sequence[SourceSentence], generated: list[GeneratedSentence], on_step: OnStep | None
    ) -> None:
        """Replace translations that lack placeholders or numbers by those with markers, if they have all of them."""
        plain = [of_one.texts[0] for of_one in generated]
        lack_numbers = [index for index, sentence in enumerate(batch) if sentence.lacks_numbers(plain[index])]
        lack_placeholders = [index for index, sentence in enumerate(batch) if sentence.lacks_placeholders(plain[index])]
        mended = self._mended(batch, generated, lack_numbers, on_step, numbers=True)
        left = [index for index in lack_placeholders if index not in mended]
        mended |= self._mended(batch, generated, left, on_step, numbers=False)
        left = [index for index in left if index not in mended and index not in lack_numbers]
        self._mended(batch, generated, left, on_step, numbers=True)

    def _mended(
        self,
        batch: Sequence[SourceSentence],
        generated: list[GeneratedSentence],
        indices: Sequence[int],
        on_step: OnStep | None,
        *,
        numbers: bool,
    ) -> set[int]:
        """Translate some sentences with markers, and take what has all that is asked for; returns which."""
        markers = {index: Markers(batch[index].text, batch[index].phrases, numbers=numbers) for index in indices}
        marked = {
            index: replace(batch[index], text=of_one.text, input_ids=self._one(batch[index], of_one.text).input_ids)
            for index, of_one in markers.items()
            if of_one.is_other
        }
        marked = {index: s for index, s in marked.items() if len(s.input_ids) <= self.max_source_tokens}
        mended = set()
        for index, found in zip(marked, self._generate([*marked.values()], on_step) if marked else (), strict=True):
            sentence, plain = batch[index], generated[index].texts[0]
            texts = tuple(map(markers[index].restored, found.texts))
            if not found.is_cut and sentence.is_mended_by(texts[0], plain, numbers=numbers):
                kept = [i for i, text in enumerate(texts) if not invented_markers(sentence.text, text)]
                scores = [found.scores[i] for i in kept] if found.scores else found.scores
                texts = tuple(texts[i] for i in kept)
                generated[index] = _different(texts, scores, sentence.num_sequences, found.is_cut)
                mended.add(index)
        return mended

    def _one(self, sentence: SourceSentence, text: str) -> SourceSentence:
        return self.encode([text], sentence.src_lang, sentence.tgt_lang)[0]

    def _merged(self, found: list[Hypothesis], plain: GeneratedSentence, sentence: SourceSentence) -> GeneratedSentence:
        """If the search found too few, plain translations follow; plain ones with as many phrases stay."""
        texts = self._decoded([list(hypothesis.tokens) for hypothesis in found])
        if len(sentence.missing(texts[0])) >= len(sentence.missing(plain.texts[0])):
            return plain
        scores = [hypothesis.score for hypothesis in found]
        if plain.scores:  # of several translations
            texts, scores = [*texts, *plain.texts], [*scores, *plain.scores]
        return _different(texts, scores, sentence.num_sequences, not found[0].has_ended)

    @torch.inference_mode()
    def _generate(self, batch: Sequence[SourceSentence], on_step: OnStep | None) -> list[GeneratedSentence]:
        limits = [self._max_new_tokens(sentence) for sentence in batch]
        # all beams, of which some may be the same text in other tokens
        num_sequences = self.num_beams if any(sentence.num_sequences > 1 for sentence in batch) else 1
        outputs = self._call_model(
            **self._inputs(batch),
            stopping_criteria=[_Limits(limits, self.device, on_step)],
            num_beams=self.num_beams,
            num_return_sequences=num_sequences,
            max_new_tokens=max(limits),
            return_dict_in_generate=True,
            output_scores=num_sequences > 1,
        )
        sequences: Tensor = outputs.sequences  # [B * N, L]
        end = torch.as_tensor(self.model.generation_config.eos_token_id, device=sequences.device)
        has_ended = torch.isin(sequences[:, 1:], end).any(dim=1)[::num_sequences].tolist()
        texts = self._decoded(sequences)
        scores = outputs.sequences_scores.tolist() if num_sequences > 1 else []
        generated = []
        for index, sentence in enumerate(batch):
            own = slice(index * num_sequences, (index + 1) * num_sequences)
            generated.append(_different(texts[own], scores[own], sentence.num_sequences, not has_ended[index]))
        return generated

    @torch.inference_mode()
    def _search(self, batch: Sequence[SourceSentence], on_step: OnStep | None) -> list[list[Hypothesis]]:
        limits = [self._max_new_tokens(sentence) for sentence in batch]
        return self._call_model(
            **self._inputs(batch),
            custom_generate=grid_search,
            phrases=[sentence.phrases for sentence in batch],
            phrase_tokens=self._phrase_tokens,
            limits=limits,
            beams_of_grid=self.num_beams,
            on_step=on_step,
            num_beams=1,
            max_new_tokens=max(limits),
            use_cache=True,
        )

    def _call_model(self, **arguments: Any) -> Any:
        with without_cudnn_attention():
            return self.model.generate(**arguments)

    @property
    def device(self) -> torch.device:
        """The device for the model's inputs."""
        return execution_device(self.model)

    def _inputs(self, batch: Sequence[SourceSentence]) -> dict[str, Any]:
        ids = [list(sentence.input_ids) for sentence in batch]
        inputs = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(self.device)
        first_tokens = [sentence.first_token for sentence in batch]
        return {
            "input_ids": inputs["input_ids"],
            "attention_mask": inputs["attention_mask"],
            "logits_processor": [FirstTokens(first_tokens)],
            "do_sample": False,
        }

    def _decoded(self, sequences: Tensor | list[list[int]]) -> list[str]:
        return [text.strip() for text in self.tokenizer.batch_decode(sequences, skip_special_tokens=True)]

    def _max_new_tokens(self, sentence: SourceSentence) -> int:
        """The limit depends on the sentence alone, so its translation does not depend on its batch."""
        if not self._cuts_early:
            return self.max_new_tokens
        return min(self.max_new_tokens, 4 * len(sentence.input_ids) + 32)


def _different(texts: Sequence[str], scores: Sequence[float], number: int, is_cut: bool) -> GeneratedSentence:
    """The first translations that are different; different tokens may be the same text."""
    first = [texts.index(text) for text in dict.fromkeys(texts)][:number]
    own_scores = tuple(scores[index] for index in first) if number > 1 else ()
    return GeneratedSentence(tuple(texts[index] for index in first), own_scores, is_cut)


class _Limits(StoppingCriteria):
    """A stopping criterion: `max_new_tokens` for each sentence; it also calls a function at each step."""

    def __init__(self, limits: Sequence[int], device: torch.device, on_step: OnStep | None):
        self._limits_B = torch.tensor(limits, device=device)
        self._on_step = on_step

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self._on_step is not None:
            self._on_step()
        is_at_limit_B = self._limits_B <= input_ids.shape[1] - 1
        return is_at_limit_B.repeat_interleave(len(input_ids) // len(is_at_limit_B))


__all__ = ["GeneratedSentence", "SentenceTranslator", "SourceSentence"]
