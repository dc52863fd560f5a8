"""Sentences through a model, a batch at a time: what `generate` needs, and what it gives.

Shape letters: B sentences of a batch, N sequences of each, beams among them, L tokens, V words of the vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import LogitsProcessor, StoppingCriteria

from ..models.language_codes import language_ids, languages_kept

OnStep = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class SourceSentence:
    """A sentence that waits for its translation; equal ones have the same.

    Attributes:
        text: as it stands in its text.
        src_lang, tgt_lang: as the tokenizer names them.
        input_ids: its tokens, with those of the language and of the end.
        first_token: with which the translation begins: the one of its language.
        num_sequences: translations that are wanted: the best one and its alternatives.
    """

    text: str
    src_lang: str
    tgt_lang: str
    input_ids: tuple[int, ...]
    first_token: int
    num_sequences: int = 1


@dataclass(frozen=True)
class GeneratedSentence:
    """
    Attributes:
        texts: as many as were asked for, the best first.
        scores: log-probability per token of each, as beam search ranks them; empty for one text.
        is_cut: whether the first one was cut before its end.
    """

    texts: tuple[str, ...]
    scores: tuple[float, ...]
    is_cut: bool


class SentenceTranslator:
    """What [`TextTranslator`] does with a model and its tokenizer; for the arguments see there."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        num_beams: int,
        batch_tokens: int,
        max_new_tokens: int | None,
    ):
        numbers = {"num_beams": num_beams, "batch_tokens": batch_tokens, "max_new_tokens": max_new_tokens}
        for name, number in numbers.items():
            if number is not None and number < 1:
                raise ValueError(f"{name} ({number}) must be at least 1")
        if not hasattr(tokenizer, "_build_translation_inputs"):
            raise ValueError(f"{type(tokenizer).__name__} must be a tokenizer for translation: a ZCodeM3Tokenizer")
        self.model: Any = model
        self.tokenizer: Any = tokenizer
        self.languages = list(language_ids(tokenizer))
        self.num_beams, self.batch_tokens = num_beams, batch_tokens
        positions = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
        self.max_source_tokens = min(positions, tokenizer.model_max_length)
        self.max_new_tokens = min(max_new_tokens or positions, positions)
        self._cuts_early = max_new_tokens is None

    def encode(
        self, texts: Sequence[str], src_lang: str, tgt_lang: str, num_sequences: int = 1
    ) -> list[SourceSentence]:
        """The texts as sentences, each at most `max_source_tokens` long if it is to be translated."""
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
            )
            for text, ids in zip(texts, encoded["input_ids"], strict=True)
        ]

    def batches(self, sentences: Iterable[SourceSentence]) -> Iterator[list[SourceSentence]]:
        """The longest first, so that what does not fit in memory fails at once."""
        batch: list[SourceSentence] = []
        for sentence in sorted(sentences, key=lambda sentence: -len(sentence.input_ids)):
            if batch and (len(batch) + 1) * len(batch[0].input_ids) > self.batch_tokens:
                yield batch
                batch = []
            batch.append(sentence)
        if batch:
            yield batch

    def generate(self, batch: Sequence[SourceSentence], on_step: OnStep | None = None) -> list[GeneratedSentence]:
        """Translate a batch, whose languages may differ; in parts, if it does not fit in the memory of a GPU.

        Args:
            batch: B sentences.
            on_step: is called after each token of the batch; what it raises ends the work.
        """
        try:
            return self._generate(batch, on_step)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            torch.cuda.empty_cache()
        middle = len(batch) // 2
        return self.generate(batch[:middle], on_step) + self.generate(batch[middle:], on_step)

    @torch.inference_mode()
    def _generate(self, batch: Sequence[SourceSentence], on_step: OnStep | None) -> list[GeneratedSentence]:
        ids = [list(sentence.input_ids) for sentence in batch]
        inputs = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(self.model.device)
        limits = [self._max_new_tokens(sentence) for sentence in batch]
        num_sequences = max(sentence.num_sequences for sentence in batch)
        outputs = self.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            logits_processor=[_FirstTokens([sentence.first_token for sentence in batch], self.model.device)],
            stopping_criteria=[_Limits(limits, self.model.device, on_step)],
            num_beams=self.num_beams,
            num_return_sequences=num_sequences,
            max_new_tokens=max(limits),
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=num_sequences > 1,
        )
        sequences: Tensor = outputs.sequences  # [B * N, L]
        end = torch.as_tensor(self.model.generation_config.eos_token_id, device=sequences.device)
        has_ended = torch.isin(sequences[:, 1:], end).any(dim=1)[::num_sequences].tolist()
        texts = self.tokenizer.batch_decode(sequences, skip_special_tokens=True)
        scores = outputs.sequences_scores.tolist() if num_sequences > 1 else []
        generated = []
        for index, sentence in enumerate(batch):
            own = slice(index * num_sequences, index * num_sequences + sentence.num_sequences)
            own_scores = tuple(scores[own]) if sentence.num_sequences > 1 else ()
            generated.append(GeneratedSentence(tuple(texts[own]), own_scores, not has_ended[index]))
        return generated

    def _max_new_tokens(self, sentence: SourceSentence) -> int:
        """By the sentence alone, so that its translation does not depend on its batch."""
        if not self._cuts_early:
            return self.max_new_tokens
        return min(self.max_new_tokens, 4 * len(sentence.input_ids) + 32)


class _FirstTokens(LogitsProcessor):
    """`forced_bos_token_id` with a token for each sentence."""

    def __init__(self, first_tokens: Sequence[int], device: torch.device):
        self._first_tokens_B = torch.tensor(first_tokens, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] > 1:
            return scores
        num_beams = len(scores) // len(self._first_tokens_B)
        first_tokens = self._first_tokens_B.repeat_interleave(num_beams).unsqueeze(1)
        return torch.full_like(scores, -torch.inf).scatter(1, first_tokens, 0.0)


class _Limits(StoppingCriteria):
    """`max_new_tokens` with a number for each sentence, and somebody who is told of each step."""

    def __init__(self, limits: Sequence[int], device: torch.device, on_step: OnStep | None):
        self._limits_B = torch.tensor(limits, device=device)
        self._on_step = on_step

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self._on_step is not None:
            self._on_step()
        is_at_limit_B = self._limits_B <= input_ids.shape[1] - 1
        return is_at_limit_B.repeat_interleave(len(input_ids) // len(is_at_limit_B))


__all__ = ["GeneratedSentence", "SentenceTranslator", "SourceSentence"]
