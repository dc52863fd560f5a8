"""Beam search for translations that have certain phrases: grid beam search (Hokamp and Liu 2017, section 3).

Beams are kept apart by how many of the phrases they have, so that one that has paid for a phrase is not compared with
one that has not yet. It is the `custom_generate` of `model.generate`.

Shape suffixes: B beams of all sentences, V vocabulary, L tokens so far.
"""

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.generation.utils import GenerateBeamEncoderDecoderOutput

from .glossary import capitalized, count_phrase, ends_in_word, starts_in_word


@dataclass(frozen=True)
class Phrase:
    """What a translation has to have.

    Attributes:
        text: of it.
        count: how often.
        is_word: whether it stands apart from the words around it; otherwise anywhere.
        may_be_capitalized: whether it may have a capital letter at the start of the translation.
    """

    text: str
    count: int = 1
    is_word: bool = True
    may_be_capitalized: bool = False

    def is_in(self, translation: str) -> bool:
        if not self.is_word:
            return translation.count(self.text) >= self.count
        return count_phrase(self.text, translation, may_be_capitalized=self.may_be_capitalized) >= self.count


@dataclass(frozen=True)
class _Spelling:
    """One way to write a phrase in tokens.

    Attributes:
        is_at_start, is_after_word: whether it can stand at the start of a translation, and after a letter.
    """

    tokens: tuple[int, ...]
    is_at_start: bool
    is_after_word: bool


class PhraseTokens:
    """How a tokenizer writes phrases.

    Args:
        tokenizer: one for translation.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.spellings = functools.lru_cache(2**14)(self._spellings)
        self.continues_word = functools.lru_cache(2**18)(self._continues_word)
        self.ends_in_word = functools.lru_cache(2**18)(self._ends_in_word)

    def _spellings(self, phrase: Phrase) -> tuple[_Spelling, ...]:
        """At the start, after a space, after other text; with a capital letter at the start if it may have one."""
        after_word = not (phrase.is_word and starts_in_word(phrase.text))
        found = [
            _Spelling(self._tokens("", phrase.text), True, False),
            _Spelling(self._tokens("a", f" {phrase.text}"), False, True),
            _Spelling(self._tokens("(", phrase.text), False, after_word),
        ]
        if phrase.may_be_capitalized and capitalized(phrase.text) != phrase.text:
            found.append(_Spelling(self._tokens("", capitalized(phrase.text)), True, False))
        return tuple(spelling for spelling in dict.fromkeys(found) if spelling.tokens)

    def _tokens(self, before: str, text: str) -> tuple[int, ...]:
        """Of a text after other text; none if a token belongs to both."""
        first = self._encode(before) if before else ()
        both = self._encode(before + text)
        return both[len(first) :] if both[: len(first)] == first else ()

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def _continues_word(self, token_id: int) -> bool:
        token = self.tokenizer.convert_ids_to_tokens(token_id)
        if token.startswith("▁") or token_id in self.tokenizer.all_special_ids:
            return False
        return starts_in_word(self.tokenizer.convert_tokens_to_string([token]))

    def _ends_in_word(self, token_id: int) -> bool:
        token = self.tokenizer.convert_ids_to_tokens(token_id)
        text = self.tokenizer.convert_tokens_to_string([token])
        return text.endswith("\ufffd") or ends_in_word(text)  # a part of a character may be one of a letter

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)


class _Beam(NamedTuple):
    """
    Attributes:
        row: of the batch.
        parent: its beam of the step before, in the cache.
        tokens: with those that decoding starts from.
        score: sum of log-probabilities.
        missing: of each phrase, how often it has yet to come.
        begun: tokens that the phrase goes on with.
        is_after_phrase: whether its last token ended a phrase, after which no word goes on.
    """

    row: int
    parent: int
    tokens: tuple[int, ...]
    score: float
    missing: tuple[int, ...]
    begun: tuple[int, ...] = ()
    is_after_phrase: bool = False


class _Step(NamedTuple):
    """A beam and its next token, with what comes of them."""

    score: float
    beam: int
    token: int
    missing: tuple[int, ...]
    begun: tuple[int, ...] = ()
    ends_phrase: bool = False


class _Finished(NamedTuple):
    score: float
    tokens: tuple[int, ...]


class _Row:
    """A sentence of the batch: its phrases, and what was found."""

    def __init__(self, phrases: Sequence[Phrase], beams_per_bank: int, texts: PhraseTokens, settings: Any):
        self.phrases, self.width, self.texts, self.settings = phrases, beams_per_bank, texts, settings
        self.finished: list[_Finished] = []
        self.is_done = False

    def step(self, beams: Sequence[_Beam], first: int, log_probs_BV: Tensor, is_last: bool) -> list[_Beam]:
        """The next beams.

        Args:
            beams: of this row.
            first: index of the first of them among the beams of all rows.
            log_probs_BV: of all rows.
        """
        banks: dict[int, list[_Step]] = {}
        for candidate in self._candidates(beams, log_probs_BV[first : first + len(beams)]):
            banks.setdefault(sum(candidate.missing), []).append(candidate)
        chosen = [beam for bank in banks.values() for beam in self._best(bank, beams, first)]
        if is_last or not chosen:
            self._end(chosen)
            return []
        if len(self.finished) >= self.width and self._cannot_improve(chosen, len(chosen[0].tokens)):
            return []
        return chosen

    def _best(self, bank: list[_Step], beams: Sequence[_Beam], first: int) -> list[_Beam]:
        """The best of those that have as many phrases; of those that end, the ones among the first are finished."""
        chosen: dict[tuple[Any, ...], _Beam] = {}
        rank = 0
        for step in sorted(bank, key=lambda step: -step.score):
            parent = beams[step.beam]
            ends = step.token in self.settings.eos
            if ends and (rank >= self.width or not self._may_end(parent)):
                continue
            beam = _Beam(
                parent.row, first + step.beam, (*parent.tokens, step.token), step.score, step.missing, step.begun,
                step.ends_phrase,
            )
            if ends:
                self._finish(beam)
            else:
                chosen.setdefault((beam.tokens, beam.begun), beam)
            rank += 1
            if len(chosen) == self.width:
                break
        return list(chosen.values())

    def _may_end(self, beam: _Beam) -> bool:
        """Whether it has all phrases; it may have come to one by other tokens."""
        if not any(beam.missing):
            return True
        text = self.texts.decode(beam.tokens)
        return all(phrase.is_in(text) for phrase in self.phrases)

    def _cannot_improve(self, beams: Sequence[_Beam], num_tokens: int) -> bool:
        if self.settings.early_stopping is True:
            return True
        running = [beam.score for beam in beams if not any(beam.missing)] if self.settings.stop_early else [beam.score for beam in beams]
        if not running: return True
        best = max(running)
        return self._ranked(best, num_tokens) <= self.finished[-1].score

    def _ranked(self, score: float, num_tokens: int) -> float:
        return score / max(1, num_tokens - self.settings.prompt_length) ** self.settings.length_penalty

    def _finish(self, beam: _Beam) -> None:
        self.finished.append(_Finished(self._ranked(beam.score, len(beam.tokens)), beam.tokens))
        self.finished.sort(key=lambda f: -f.score)
        del self.finished[self.width :]

    def _end(self, beams: list[_Beam]) -> None:
        """Fills up with those that did not end: those with the most phrases first."""
        order = sorted(beams, key=lambda b: (sum(b.missing) + bool(b.begun), -b.score))
        for beam in order[: self.width - len(self.finished)]:
            self.finished.append(_Finished(self._ranked(beam.score, len(beam.tokens)), beam.tokens))

    def _candidates(self, beams: Sequence[_Beam], log_probs: Tensor) -> list[_Step]:
        values, ids = log_probs.topk(min(2 * self.width + 8, log_probs.shape[-1]))
        found: list[_Step] = []
        forced: list[tuple[int, int, tuple[int, ...], tuple[int, ...]]] = []
        for index, (beam, of_beam, tokens) in enumerate(zip(beams, values.tolist(), ids.tolist(), strict=True)):
            if beam.begun:
                forced.append((index, beam.begun[0], beam.begun[1:], beam.missing))
                continue
            for value, token in zip(of_beam, tokens, strict=True):
                missing = (0,) * len(beam.missing) if token in self.settings.eos else beam.missing
                if not (beam.is_after_phrase and self.texts.continues_word(token)):
                    found.append(_Step(beam.score + value, index, token, missing))
            if len(beam.tokens) > self.settings.prompt_length:
                forced += [
                    (index, spelling.tokens[0], spelling.tokens[1:], self._less(beam.missing, phrase))
                    for spelling, phrase in self._starts(beam)
                ]
        if forced:
            scores = log_probs[[f[0] for f in forced], [f[1] for f in forced]].tolist()
            found += [
                _Step(beams[index].score + score, index, token, missing, begun, not begun)
                for (index, token, begun, missing), score in zip(forced, scores, strict=True)
            ]
        return [step for step in found if step.score > -1e8]

    @staticmethod
    def _less(missing: tuple[int, ...], phrase: int) -> tuple[int, ...]:
        return tuple(count - (index == phrase) for index, count in enumerate(missing))

    def _starts(self, beam: _Beam) -> list[tuple[_Spelling, int]]:
        is_first = len(beam.tokens) == self.settings.prompt_length + 1
        in_word = not is_first and self.texts.ends_in_word(beam.tokens[-1])
        return [
            (spelling, index)
            for index, (phrase, count) in enumerate(zip(self.phrases, beam.missing, strict=True))
            if count > 0
            for spelling in self.texts.spellings(phrase)
            if (spelling.is_at_start if is_first else not spelling.is_at_start or True)
            and (is_first or spelling.is_after_word or not in_word)
        ]


@dataclass(frozen=True)
class _Settings:
    eos: frozenset[int]
    prompt_length: int
    length_penalty: float
    early_stopping: bool | str | None
    words: bool = True
    stop_early: bool = True


def grid_search(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    phrases: Sequence[Sequence[Phrase]] = (),
    texts: Any = None,
    width: int = 4,
    max_beams: int = 16,
    stop_early: bool = True,
    **model_kwargs: Any,
) -> Any:
    settings = _Settings(
        frozenset(generation_config._eos_token_tensor.tolist()),
        input_ids.shape[1],
        generation_config.length_penalty if generation_config.length_penalty is not None else 1.0,
        generation_config.early_stopping, True, stop_early,
    )
    rows = [
        _Row(of_row, max(1, min(width, max_beams // (1 + sum(p.count for p in of_row)))), texts, settings) for of_row in phrases
    ]
    beams = [
        _Beam(index, index, tuple(ids), 0.0, tuple(p.count for p in row.phrases))
        for index, (row, ids) in enumerate(zip(rows, input_ids.tolist(), strict=True))
    ]
    encoder_outputs, mask = model_kwargs["encoder_outputs"], model_kwargs["attention_mask"]
    name = next(name for name in ("past_key_values", "cache") if model_kwargs.get(name) is not None)
    cache = model_kwargs[name]
    max_length = generation_config.max_length
    hidden = encoder_outputs.last_hidden_state
    device = input_ids.device
    while beams:
        of_row = torch.tensor([beam.row for beam in beams], device=device)
        tokens_BL = torch.tensor([beam.tokens for beam in beams], device=device)
        outputs = type(encoder_outputs)(last_hidden_state=hidden[of_row])
        out = model(
            decoder_input_ids=tokens_BL if tokens_BL.shape[1] == settings.prompt_length else tokens_BL[:, -1:],
            encoder_outputs=outputs, attention_mask=mask[of_row], use_cache=True, return_dict=True, **{name: cache},
        )
        log_probs_BV = logits_processor(tokens_BL, out.logits[:, -1].float().log_softmax(-1))
        is_last = tokens_BL.shape[1] + 1 >= max_length
        chosen = []
        start = 0
        while start < len(beams):
            end = start
            while end < len(beams) and beams[end].row == beams[start].row:
                end += 1
            chosen += rows[beams[start].row].step(beams[start:end], start, log_probs_BV, is_last)
            start = end
        same = [b.row for b in beams] == [b.row for b in chosen]
        beams = chosen
        if beams:
            (cache.self_attention_cache if same else cache).reorder_cache(torch.tensor([beam.parent for beam in beams], device=device))
    longest = max(len(f.tokens) for row in rows for f in row.finished[:1])
    pad = int(generation_config._pad_token_tensor)
    sequences = torch.tensor([[*r.finished[0].tokens, *[pad] * (longest - len(r.finished[0].tokens))] for r in rows], device=device)
    return GenerateBeamEncoderDecoderOutput(sequences=sequences, sequences_scores=torch.tensor([r.finished[0].score for r in rows]))
