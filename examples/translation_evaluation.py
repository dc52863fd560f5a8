"""Translate test sets in length-sorted batches and score them: BLEU, chrF and length ratio per direction."""

from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

import evaluate
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from translation_data import Direction

from hf_moe_ted.metrics import metric_path

# sacreBLEU tokenizers of languages that are written without spaces between words
BLEU_TOKENIZER = {"zh": "zh", "ja": "char", "th": "char"}


@dataclass(frozen=True)
class Score:
    """Scores of one direction: BLEU and chrF from 0 to 100, characters of output per character of reference."""

    num_sentences: int
    bleu: float
    chrf: float
    length_ratio: float
    copy_chrf: float  # chrF of the untranslated source


@torch.inference_mode()
def translate(
    model: Any,
    tokenizer: Any,
    sources: list[str],
    direction: Direction,
    *,
    batch_size: int = 64,
    num_beams: int = 1,
    max_new_tokens: int = 128,
    progress: tqdm | None = None,
) -> list[str]:
    """Translations of `sources`, in their order. Long sources go first, so that a batch has little padding."""
    order = sorted(range(len(sources)), key=lambda index: -len(sources[index]))
    translations = [""] * len(sources)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        inputs = tokenizer(
            [sources[index] for index in batch],
            src_lang=direction.src_lang,
            padding=True,
            truncation=True,
            max_length=model.config.max_position_embeddings,
            return_tensors="pt",
        ).to(model.device)
        output = model.generate(
            **inputs,
            forced_bos_token_id=tokenizer.get_lang_id(direction.tgt_lang),
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        for index, text in zip(batch, tokenizer.batch_decode(output, skip_special_tokens=True), strict=True):
            translations[index] = text
        if progress is not None:
            progress.update(len(batch))
    return translations


class TranslationEvaluator:
    """Scores translations with the metrics of the package, which work offline."""

    def __init__(self) -> None:
        self.bleu = evaluate.load(metric_path("sacrebleu"))
        self.chrf = evaluate.load(metric_path("chrf"))
        self.length_ratio = evaluate.load(metric_path("length_ratio"))

    def score(self, direction: Direction, sources: list[str], predictions: list[str], references: list[str]) -> Score:
        """Score one direction."""
        tokenizer = BLEU_TOKENIZER.get(direction.tgt_lang, "13a")
        bleu = self.bleu.compute(predictions=predictions, references=references, tokenize=tokenizer)
        chrf = self.chrf.compute(predictions=predictions, references=references)
        copy_chrf = self.chrf.compute(predictions=sources, references=references)
        length_ratio = self.length_ratio.compute(predictions=predictions, references=references)
        return Score(
            num_sentences=len(sources),
            bleu=round(bleu["score"], 2),
            chrf=round(chrf["score"], 2),
            length_ratio=round(length_ratio["corpus_ratio"], 3),
            copy_chrf=round(copy_chrf["score"], 2),
        )

    def evaluate(
        self,
        model: Any,
        tokenizer: Any,
        directions: dict[Direction, Dataset],
        *,
        max_samples: int | None = None,
        description: str = "Translating",
        **generation: Any,
    ) -> dict[Direction, Score]:
        """Translate and score each direction with [`translate`], the first `max_samples` of each."""
        model.eval()
        samples = {d: data.select(range(min(len(data), max_samples or len(data)))) for d, data in directions.items()}
        scores = {}
        with tqdm(total=sum(map(len, samples.values())), desc=description, unit="sentence") as progress:
            for direction, data in samples.items():
                sources = list(data["source"])
                predictions = translate(model, tokenizer, sources, direction, progress=progress, **generation)
                scores[direction] = self.score(direction, sources, predictions, list(data["target"]))
        return scores


def average(scores: dict[Direction, Score]) -> Score:
    """Mean over directions; `num_sentences` is the sum."""
    if not scores:
        raise ValueError("there are no scores to average")
    rows = [asdict(score) for score in scores.values()]
    means = {name: round(mean(row[name] for row in rows), 3) for name in rows[0] if name != "num_sentences"}
    return Score(num_sentences=sum(row["num_sentences"] for row in rows), **means)


def as_json(scores: dict[Direction, Score]) -> dict[str, dict[str, float]]:
    """Direction -> scores, for a report."""
    return {str(direction): asdict(score) for direction, score in scores.items()}
