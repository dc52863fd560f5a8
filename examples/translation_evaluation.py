"""Scores of the examples: BLEU, chrF, length ratio and language of translations per direction, rounded."""

from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

import torch
from datasets import Dataset
from translation_data import Direction, first_rows

from hf_moe_ted import TranslationScores, evaluate_translation, score_translations


@dataclass(frozen=True)
class Score:
    """Scores of one direction: BLEU and chrF from 0 to 100, characters of output per character of reference.

    `None` is a number that a direction does not have; see `TranslationScores`.
    """

    num_sentences: int
    bleu: float | None
    chrf: float
    length_ratio: float
    off_target: float | None  # share of translations in another language
    copy_chrf: float  # chrF of the untranslated source

    @classmethod
    def of(cls, scores: TranslationScores) -> "Score":
        """What the library has found, rounded."""
        return cls(
            num_sentences=scores.num_sentences,
            bleu=None if scores.bleu is None else round(scores.bleu, 2),
            chrf=round(scores.chrf, 2),
            length_ratio=round(scores.length_ratio, 3),
            off_target=None if scores.off_target is None else round(scores.off_target, 3),
            copy_chrf=round(scores.source_chrf, 2),
        )


@torch.inference_mode()
def translate(
    model: Any, tokenizer: Any, sources: list[str], direction: Direction, *, max_new_tokens: int = 128
) -> list[str]:
    """Translations of `sources`, in one batch."""
    inputs = tokenizer(sources, src_lang=direction.src_lang, padding=True, return_tensors="pt").to(model.device)
    output = model.generate(
        **inputs,
        forced_bos_token_id=tokenizer.get_lang_id(direction.tgt_lang),
        num_beams=1,
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    return tokenizer.batch_decode(output, skip_special_tokens=True)


class TranslationEvaluator:
    """Scores of several directions."""

    def score(self, direction: Direction, sources: list[str], predictions: list[str], references: list[str]) -> Score:
        """Score the translations of one direction."""
        return Score.of(score_translations(sources, predictions, references, tgt_lang=direction.tgt_lang))

    def evaluate(
        self,
        model: Any,
        tokenizer: Any,
        directions: dict[Direction, Dataset],
        *,
        max_samples: int | None = None,
        batch_size: int = 64,
    ) -> dict[Direction, Score]:
        """Translate and score each direction, the first `max_samples` of each."""
        quality = evaluate_translation(model, tokenizer, first_rows(directions, max_samples), batch_size=batch_size)
        return {Direction(*pair): Score.of(scores) for pair, scores in quality.directions.items()}


def average(scores: dict[Direction, Score]) -> Score:
    """Mean over the directions that have a number; `num_sentences` is the sum."""
    if not scores:
        raise ValueError("there are no scores to average")
    rows = [asdict(score) for score in scores.values()]
    known = {name: [row[name] for row in rows if row[name] is not None] for name in rows[0] if name != "num_sentences"}
    means = {name: round(mean(numbers), 3) if numbers else None for name, numbers in known.items()}
    return Score(num_sentences=sum(row["num_sentences"] for row in rows), **means)


def as_json(scores: dict[Direction, Score]) -> dict[str, dict[str, float | None]]:
    """Direction -> scores, for a report."""
    return {str(direction): asdict(score) for direction, score in scores.items()}
