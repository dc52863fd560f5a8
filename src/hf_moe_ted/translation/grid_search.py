"""Beam search for translations that must have certain phrases: grid beam search (Hokamp and Liu 2017, section 3).

Beams are in separate banks, by the number of phrases that they have and the number of tokens that their begun phrase
still needs. So a beam with a phrase, which costs score, is not compared with a beam without it. In each step a beam may
continue with any token, or begin a missing phrase; a begun phrase is written to its end.

Shape letters: B beams of all sentences, L tokens, V words of the vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .phrases import Phrase, PhraseTokens, Spelling

MAX_BEAMS = 8  # times num_beams: most beams of a sentence, in all banks; usually it has half as many
IMPOSSIBLE = -1e8  # log-probability


class Hypothesis(NamedTuple):
    """
    Attributes:
        tokens: tokens of a translation, with the start token of decoding.
        score: log-probability per token, by which beam search ranks.
        has_ended: whether it ended by itself and was not cut.
    """

    tokens: tuple[int, ...]
    score: float
    has_ended: bool


class _Beam(NamedTuple):
    """
    Attributes:
        row: its sentence.
        parent: the beam from which it continues, among all of the previous step.
        tokens: its tokens, with the start token of decoding.
        score: sum of log-probabilities.
        missing: for each phrase, how often it must still be begun.
        begun: remaining tokens of its begun phrase.
        ends_word: whether its begun phrase, or the phrase that its last token ended, must end a word.
    """

    row: int
    parent: int
    tokens: tuple[int, ...]
    score: float
    missing: tuple[int, ...]
    begun: tuple[int, ...] = ()
    ends_word: bool = False


class _Step(NamedTuple):
    """A possible next token of a beam; `beam` is the beam's index in its sentence, other fields are as in `_Beam`."""

    score: float
    beam: int
    token: int
    missing: tuple[int, ...]
    begun: tuple[int, ...] = ()
    ends_word: bool = False


@dataclass(frozen=True)
class _Settings:
    num_beams: int
    prompt_length: int
    length_penalty: float
    early_stopping: bool | str | None
    eos: frozenset[int]
    phrase_tokens: PhraseTokens


@dataclass
class _Row:
    """A sentence.

    Attributes:
        limit: largest number of new tokens.
        finished: translations that have all phrases, the best first; as many as beam search has beams are kept.
    """

    phrases: Sequence[Phrase]
    limit: int
    settings: _Settings
    finished: list[Hypothesis] = field(default_factory=list)

    def __post_init__(self) -> None:
        num_banks = 1 + sum(phrase.count for phrase in self.phrases)
        self.max_beams = MAX_BEAMS * self.settings.num_beams
        self.bank_size = max(1, min(self.settings.num_beams, self.max_beams // 2 // num_banks))

    def step(self, beams: Sequence[_Beam], first: int, log_probs_BV: Tensor) -> list[_Beam]:
        """The next beams; none when the sentence is done.

        Args:
            beams: beams of this sentence.
            first: index of the first of them among all beams.
            log_probs_BV: log-probabilities of these beams.
        """
        banks: dict[tuple[int, int], list[_Step]] = {}
        for step in self._steps(beams, log_probs_BV):
            banks.setdefault((sum(step.missing), len(step.begun)), []).append(step)
        chosen = [beam for _, bank in sorted(banks.items()) for beam in self._best(bank, beams, first)]
        chosen = chosen[: self.max_beams]  # those with most of the phrases
        if not chosen or len(chosen[0].tokens) - self.settings.prompt_length >= self.limit:
            self._cut(chosen or beams)
            return []
        return [] if self._is_done(chosen) else chosen

    def _steps(self, beams: Sequence[_Beam], log_probs_BV: Tensor) -> list[_Step]:
        best = log_probs_BV.topk(min(2 * self.bank_size, log_probs_BV.shape[-1]))
        steps: list[_Step] = []
        forced: list[_Step] = []  # their scores do not include the tokens yet
        for number, (beam, values, tokens) in enumerate(zip(beams, *map(Tensor.tolist, best), strict=True)):
            if beam.begun:
                forced.append(_forced_step(beam, number, beam.begun, beam.missing, beam.ends_word))
                continue
            if beam.ends_word:
                values, tokens = self._outside_word(log_probs_BV[number])
            steps += [
                _Step(beam.score + value, number, token, self._missing_after(beam, token))
                for value, token in zip(values, tokens, strict=True)
            ]
            forced += self._begun(beam, number)
        if forced:
            added = log_probs_BV[[step.beam for step in forced], [step.token for step in forced]].tolist()
            steps += [s._replace(score=s.score + value) for s, value in zip(forced, added, strict=True)]
        return [step for step in steps if step.score > IMPOSSIBLE]

    def _outside_word(self, log_probs_V: Tensor) -> tuple[list[float], list[int]]:
        """The best tokens that do not continue a word, and their log-probabilities."""
        in_order = log_probs_V.argsort(descending=True).tolist()
        free = (token for token in in_order if not self.settings.phrase_tokens.continues_word(token))
        tokens = list(islice(free, 2 * self.bank_size))
        return log_probs_V[tokens].tolist(), tokens

    def _missing_after(self, beam: _Beam, token: int) -> tuple[int, ...]:
        """Missing phrases after a token. An ending beam counts as having all; `_may_end` checks whether it has."""
        return (0,) * len(beam.missing) if token in self.settings.eos else beam.missing

    def _begun(self, beam: _Beam, number: int) -> list[_Step]:
        """Steps that begin the missing phrases of a beam, in the spellings that fit after its last token."""
        num_new = len(beam.tokens) - self.settings.prompt_length
        if num_new == 0:  # the token of the language comes first
            return []
        is_start = num_new == 1
        is_after_word = not is_start and self.settings.phrase_tokens.ends_in_word(beam.tokens[-1])

        def fits(spelling: Spelling) -> bool:
            return spelling.is_at_start == is_start and (spelling.is_after_word or not is_after_word)

        return [
            _forced_step(beam, number, spelling.tokens, _without(beam.missing, index), phrase.ends_word)
            for index, phrase in enumerate(self.phrases)
            if beam.missing[index] > 0
            for spelling in self.settings.phrase_tokens.spellings(phrase)
            if fits(spelling)
        ]

    def _best(self, bank: list[_Step], beams: Sequence[_Beam], first: int) -> list[_Beam]:
        """The best beams that continue; those among the best that end are finished, as in beam search."""
        size = max(1, self.bank_size // 2) if bank[0].begun else self.bank_size
        chosen: dict[tuple[Any, ...], _Beam] = {}
        rank = 0
        for step in sorted(bank, key=lambda step: -step.score):
            parent = beams[step.beam]
            tokens = (*parent.tokens, step.token)
            if step.token not in self.settings.eos:
                beam = _Beam(
                    parent.row, first + step.beam, tokens, step.score, step.missing, step.begun, step.ends_word
                )
                chosen.setdefault((tokens, step.begun), beam)
            elif rank < size and self._may_end(parent):
                self.finished.append(Hypothesis(tokens, self._ranked(step.score, len(tokens)), True))
            else:
                continue
            rank += 1
            if len(chosen) == size:
                break
        self.finished = sorted(self.finished, key=lambda hypothesis: -hypothesis.score)[: self.settings.num_beams]
        return list(chosen.values())

    def _may_end(self, beam: _Beam) -> bool:
        """Whether a beam has all phrases; it may also have written them by itself, in other tokens.

        A placeholder that was written to its end may have become part of another, such as of a longer address.
        """
        in_question = self.phrases if any(beam.missing) else [p for p in self.phrases if not p.is_term]
        if not in_question:
            return True
        text = self.settings.phrase_tokens.decode(beam.tokens)
        return all(phrase.is_in(text) for phrase in in_question)

    def _is_done(self, beams: Sequence[_Beam]) -> bool:
        """Whether no beam with all phrases can become better than the finished translations.

        Other beams are not waited for: beams that miss a phrase at the end of the sentence often repeat themselves,
        with a good score.
        """
        if len(self.finished) < self.bank_size:
            return False
        complete = [beam.score for beam in beams if not any(beam.missing)]
        if not complete or self.settings.early_stopping is True:
            return True
        return self._ranked(max(complete), len(beams[0].tokens)) <= self.finished[self.bank_size - 1].score

    def _cut(self, beams: Sequence[_Beam]) -> None:
        """At the limit, fill missing translations with beams that did not end, those with the most phrases first."""
        order = sorted(beams, key=lambda beam: (sum(beam.missing) + bool(beam.begun), -beam.score))
        for beam in order[: max(0, self.bank_size - len(self.finished))]:
            self.finished.append(Hypothesis(beam.tokens, self._ranked(beam.score, len(beam.tokens)), False))

    def _ranked(self, score: float, num_tokens: int) -> float:
        return score / (num_tokens - self.settings.prompt_length) ** self.settings.length_penalty


def _forced_step(beam: _Beam, number: int, tokens: tuple[int, ...], missing: tuple[int, ...], ends_word: bool) -> _Step:
    """A step in which a beam continues with the first of some tokens; its score does not include the token yet."""
    return _Step(beam.score, number, tokens[0], missing, tokens[1:], ends_word)


def _without(missing: tuple[int, ...], index: int) -> tuple[int, ...]:
    return (*missing[:index], missing[index] - 1, *missing[index + 1 :])


def grid_search(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    *,
    phrases: Sequence[Sequence[Phrase]],
    phrase_tokens: PhraseTokens,
    limits: Sequence[int],
    beams_of_grid: int,
    on_step: Callable[[], None] | None = None,
    **model_kwargs: Any,
) -> list[list[Hypothesis]]:
    """The `custom_generate` of `model.generate(..., num_beams=1)`; without phrases it is plain beam search.

    Args:
        phrases: for each sentence, the phrases that its translation must have.
        phrase_tokens: the [`PhraseTokens`] of the tokenizer.
        limits: for each sentence, the longest translation in tokens.
        beams_of_grid: `num_beams` of a search without phrases; a sentence with phrases has up to eight times as many.
        on_step: function that is called after each token; an exception in it ends the work.

    Returns:
        The translations of each sentence, the best first; at least one. A translation that misses a phrase was cut.
    """
    settings = _Settings(
        num_beams=beams_of_grid,
        prompt_length=input_ids.shape[1],
        length_penalty=1.0 if generation_config.length_penalty is None else generation_config.length_penalty,
        early_stopping=generation_config.early_stopping,
        eos=frozenset(generation_config._eos_token_tensor.tolist()),
        phrase_tokens=phrase_tokens,
    )
    rows = [_Row(of_row, limit, settings) for of_row, limit in zip(phrases, limits, strict=True)]
    beams = [
        _Beam(number, number, tuple(tokens), 0.0, tuple(phrase.count for phrase in rows[number].phrases))
        for number, tokens in enumerate(input_ids.tolist())
    ]
    decoder = _Decoder(model, model_kwargs)
    while beams:
        tokens_BL = torch.tensor([beam.tokens for beam in beams], device=input_ids.device)
        log_probs_BV = logits_processor(tokens_BL, decoder.log_probs(tokens_BL, [beam.row for beam in beams]))
        beams = _next_beams(beams, rows, log_probs_BV)
        decoder.keep([beam.parent for beam in beams])
        if on_step is not None:
            on_step()
    return [row.finished for row in rows]


def _next_beams(beams: Sequence[_Beam], rows: Sequence[_Row], log_probs_BV: Tensor) -> list[_Beam]:
    following: list[_Beam] = []
    first = 0
    for row, of_row in groupby(beams, key=lambda beam: beam.row):
        own = list(of_row)
        following += rows[row].step(own, first, log_probs_BV[first : first + len(own)])
        first += len(own)
    return following


class _Decoder:
    """The decoder of a model, with a varying number of beams per step."""

    def __init__(self, model: Any, model_kwargs: dict[str, Any]):
        self.model = model
        self.encoder_outputs, self.mask = model_kwargs["encoder_outputs"], model_kwargs["attention_mask"]
        self.cache_name = next(n for n in ("past_key_values", "cache") if model_kwargs.get(n) is not None)
        self.cache = model_kwargs[self.cache_name]
        self.num_decoded = 0
        self.rows: list[int] = []

    def log_probs(self, tokens_BL: Tensor, rows: list[int]) -> Tensor:
        """Log-probabilities of the next tokens, [B, V] float32; `rows` are the sentences of the beams."""
        self.rows = rows
        index_B = torch.tensor(rows, device=self.mask.device)
        outputs = self.model(
            decoder_input_ids=tokens_BL[:, self.num_decoded :],
            encoder_outputs=type(self.encoder_outputs)(
                last_hidden_state=self.encoder_outputs.last_hidden_state[index_B]
            ),
            attention_mask=self.mask[index_B],
            use_cache=True,
            return_dict=True,
            **{self.cache_name: self.cache},
        )
        self.num_decoded = tokens_BL.shape[1]
        return outputs.logits[:, -1].float().log_softmax(dim=-1)

    def keep(self, parents: list[int]) -> None:
        """Reorder the cache to the beams that continue."""
        if parents:
            is_same = [self.rows[parent] for parent in parents] == self.rows
            cache = self.cache.self_attention_cache if is_same else self.cache  # the source stays
            cache.reorder_cache(torch.tensor(parents, device=self.mask.device))


__all__ = ["Hypothesis", "grid_search"]
