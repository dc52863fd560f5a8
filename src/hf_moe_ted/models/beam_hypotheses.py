"""The state of beam search for each sentence, like that of transformers' own (`GenerationMixin._beam_search`).

Shape letters: B sentences that are not done, N beams of each, C candidates of each, L tokens.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

IMPOSSIBLE = -1e9  # added to a score to make its choice impossible


@dataclass(frozen=True)
class Candidates:
    """The best continuations of the beams of each sentence, the best first.

    Attributes:
        scores_BC: float32, sums of log-probabilities.
        parents_BC: int64, the beam from which each continues.
        tokens_BC: int64.
    """

    scores_BC: Tensor
    parents_BC: Tensor
    tokens_BC: Tensor


class Ranks(Protocol):
    """How hypotheses are compared. A length is a number or, on a device, an int64[1]."""

    def ranked(self, scores: Tensor, length: Any) -> Tensor:
        """Ranking scores from sums of log-probabilities, for hypotheses with so many tokens."""

    def best_possible(self, scores: Tensor, length: Any) -> Tensor:
        """The best ranking scores that running beams of a length can reach."""

    def is_enough(self, has_ended_BN: Tensor) -> Tensor:
        """bool[B, 1], sentences that stop because all their places are full."""


@dataclass(frozen=True)
class Ranking:
    """[`Ranks`] from numbers that the host knows.

    Attributes:
        length_penalty: exponent of the length by which sums of log-probabilities are divided.
        early_stopping: as in `GenerationConfig`.
        prompt_length, max_length: lengths in tokens.
    """

    length_penalty: float
    early_stopping: bool | str | None
    prompt_length: int
    max_length: int

    def divisor(self, length: int) -> float:
        """Divisor of the sum of log-probabilities of so many tokens."""
        return (length - self.prompt_length) ** self.length_penalty

    def best_divisor(self, length: int) -> float:
        """Divisor for the best scores that running beams can reach."""
        is_longest_best = self.early_stopping == "never" and self.length_penalty > 0.0
        return self.divisor(self.max_length if is_longest_best else length)

    def ranked(self, scores: Tensor, length: int) -> Tensor:
        return scores / self.divisor(length)

    def best_possible(self, scores: Tensor, length: int) -> Tensor:
        return scores / self.best_divisor(length)

    def is_enough(self, has_ended_BN: Tensor) -> Tensor:
        return has_ended_BN.all(dim=1, keepdim=True) & (self.early_stopping is True)


@dataclass
class Hypotheses:
    """Running beams and ended translations, with the same number of places for each.

    Attributes:
        sentences_B: int64, numbers of the sentences in the batch.
        running_BNL, ended_BNL: int64, tokens.
        running_rows_BNL, ended_rows_BNL: int32, the row (sentence times N plus beam) from which each new token
            continues; -1 after the end.
        running_scores_BN: float32, sums of log-probabilities.
        ended_scores_BN: float32, ranked, the best first.
        has_ended_BN: whether a place has an ended translation.
        may_improve_B1: whether a running beam may still become better than an ended translation.
    """

    sentences_B: Tensor
    running_BNL: Tensor
    running_rows_BNL: Tensor
    running_scores_BN: Tensor
    ended_BNL: Tensor
    ended_rows_BNL: Tensor
    ended_scores_BN: Tensor
    has_ended_BN: Tensor
    may_improve_B1: Tensor

    @classmethod
    def start(cls, prompts_BL: Tensor, num_beams: int, max_length: int, fill: int) -> "Hypotheses":
        """Start with the prompts as beams; only the first beam of a sentence counts."""
        num_sentences, length = prompts_BL.shape
        device = prompts_BL.device
        tokens_BNL = torch.full((num_sentences, num_beams, max_length), fill, dtype=torch.int64, device=device)
        tokens_BNL[:, :, :length] = prompts_BL.unsqueeze(1)
        rows_BNL = torch.full((num_sentences, num_beams, max_length - length), -1, dtype=torch.int32, device=device)
        scores_BN = torch.zeros(num_sentences, num_beams, device=device)
        scores_BN[:, 1:] = IMPOSSIBLE
        return cls(
            sentences_B=torch.arange(num_sentences, device=device),
            running_BNL=tokens_BNL,
            running_rows_BNL=rows_BNL,
            running_scores_BN=scores_BN,
            ended_BNL=tokens_BNL.clone(),
            ended_rows_BNL=rows_BNL.clone(),
            ended_scores_BN=torch.full_like(scores_BN, IMPOSSIBLE),
            has_ended_BN=torch.zeros_like(scores_BN, dtype=torch.bool),
            may_improve_B1=torch.ones(num_sentences, 1, dtype=torch.bool, device=device),
        )

    def kept(self, index: Tensor) -> "Hypotheses":
        """The hypotheses of only these sentences, int64."""
        return Hypotheses(**{field.name: getattr(self, field.name).index_select(0, index) for field in fields(self)})

    def continued(self, candidates: Candidates, place_1: Tensor, row_place_1: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens int64[B, C, L] and rows int32[B, C, L] of the candidates; new ones are at the places, int64[1]."""
        num_beams = self.running_BNL.shape[1]
        tokens_BCL = _of_beams(self.running_BNL, candidates.parents_BC)
        tokens_BCL.index_copy_(2, place_1, candidates.tokens_BC.unsqueeze(-1))
        rows_BC = candidates.parents_BC + num_beams * self.sentences_B.unsqueeze(-1)
        rows_BCL = _of_beams(self.running_rows_BNL, candidates.parents_BC)
        rows_BCL.index_copy_(2, row_place_1, rows_BC.to(rows_BCL.dtype).unsqueeze(-1))
        return tokens_BCL, rows_BCL

    def advance(
        self, candidates: Candidates, continued: tuple[Tensor, Tensor], ends_BC: Tensor, length: Any, ranking: Ranks
    ) -> Tensor:
        """Update the hypotheses with the candidates.

        Args:
            continued: what `continued` returned.
            ends_BC: bool, which candidates end.
            length: length of the beams before this step, in the form that `ranking` takes.

        Returns:
            int64[B, N], the beams from which the running ones continue.
        """
        num_beams = self.running_BNL.shape[1]
        self._take_ended(candidates, continued, ends_BC, length, ranking)
        scores_BC = candidates.scores_BC + ends_BC * IMPOSSIBLE
        chosen_BN = scores_BC.topk(num_beams)[1]
        self.running_BNL, self.running_rows_BNL = (_of_beams(of_beams, chosen_BN) for of_beams in continued)
        self.running_scores_BN = scores_BC.gather(1, chosen_BN)
        possible_B1 = ranking.best_possible(self.running_scores_BN[:, :1], length + 1)
        worst_BN = torch.where(self.has_ended_BN, self.ended_scores_BN.amin(dim=1, keepdim=True), IMPOSSIBLE)
        self.may_improve_B1 = self.may_improve_B1 & (possible_B1 > worst_BN).any(dim=1, keepdim=True)
        return candidates.parents_BC.gather(1, chosen_BN)

    def _take_ended(
        self, candidates: Candidates, continued: tuple[Tensor, Tensor], ends_BC: Tensor, length: Any, ranking: Ranks
    ) -> None:
        num_beams = self.running_BNL.shape[1]
        is_taken_BC = ends_BC.clone()
        is_taken_BC[:, num_beams:] = False  # the others can continue
        scores_BC = ranking.ranked(candidates.scores_BC, length + 1) + ~is_taken_BC * IMPOSSIBLE
        scores = torch.cat([self.ended_scores_BN, scores_BC], dim=1)
        as_they_are_N = torch.arange(num_beams, device=scores.device)  # places of sentences that are done
        chosen_BN = torch.where(self.is_done_B1(ranking), as_they_are_N, scores.topk(num_beams)[1])
        self.ended_scores_BN = scores.gather(1, chosen_BN)
        self.has_ended_BN = torch.cat([self.has_ended_BN, is_taken_BC], dim=1).gather(1, chosen_BN)
        self.ended_BNL = _of_beams(torch.cat([self.ended_BNL, continued[0]], dim=1), chosen_BN)
        self.ended_rows_BNL = _of_beams(torch.cat([self.ended_rows_BNL, continued[1]], dim=1), chosen_BN)

    def is_done_B1(self, ranking: Ranks) -> Tensor:
        """bool[B, 1], the sentences whose translations cannot change any more."""
        return ~self.may_improve_B1 | ranking.is_enough(self.has_ended_BN)


def together(parts: Iterable[Hypotheses]) -> Hypotheses:
    """Join the sentences of all parts, in the order of the batch."""
    all_parts = list(parts)
    joined = Hypotheses(
        **{field.name: torch.cat([getattr(part, field.name) for part in all_parts]) for field in fields(Hypotheses)}
    )
    return joined.kept(joined.sentences_B.argsort())


def _of_beams(of_beams_BNL: Tensor, beams_BC: Tensor) -> Tensor:
    return of_beams_BNL.gather(1, beams_BC.unsqueeze(-1).expand(-1, -1, of_beams_BNL.shape[-1]))


__all__ = ["Candidates", "Hypotheses", "Ranking", "Ranks", "together"]
