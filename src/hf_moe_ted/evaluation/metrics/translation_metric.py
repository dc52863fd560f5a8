"""What the metrics of this package share: their inputs and how they are checked."""

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

import datasets
import evaluate


class TranslationMetric(evaluate.Metric):
    """Corpus metric of translations against one or several references per sentence.

    A subclass sets the class attributes and implements `_score`.
    """

    description: str
    citation: str = ""
    reference_urls: tuple[str, ...] = ()

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=self.description,
            citation=self.citation,
            inputs_description=self._score.__doc__ or "",
            features=[
                datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
                datasets.Features({"predictions": text, "references": text}),
            ],
            reference_urls=list(self.reference_urls),
        )

    def add(
        self, *, prediction: str | None = None, reference: str | Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        """Add one translation and its references to the corpus, see `add_batch`."""
        self.add_batch(predictions=[prediction], references=[reference], **kwargs)

    def add_batch(
        self,
        *,
        predictions: Sequence[str | None] | None = None,
        references: Sequence[str | Sequence[str] | None] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add translations and their references to the corpus that `compute` scores.

        Args:
            predictions: translations, one string per sentence.
            references: one string or a list of strings per sentence, none of them empty.

        Raises:
            ValueError: an argument is missing, empty or of another form, or the two differ in length.
        """
        if predictions is None or references is None:
            raise ValueError("Both predictions and references are required")
        if len(predictions) != len(references):
            raise ValueError(
                f"The number of predictions ({len(predictions)}) must equal the number of references "
                f"({len(references)})"
            )
        if len(predictions) == 0:
            raise ValueError("Predictions and references are empty, at least one sentence is required")
        for index, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
            if not isinstance(prediction, str):
                raise ValueError(f"Prediction {index} ({prediction!r}) must be a string")
            texts = as_texts(reference)
            if not texts or not all(isinstance(text, str) and text for text in texts):
                raise ValueError(f"Reference {index} ({reference!r}) must be one or several strings, none empty")
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def _compute(
        self, *, predictions: list[str], references: list[str] | list[list[str]], **options: Any
    ) -> dict[str, Any]:
        return self._score(predictions, [as_texts(reference) for reference in references], **options)

    def _score(self, predictions: list[str], references: list[list[str]]) -> dict[str, Any]:
        """Score at least one prediction against its references, one or more each, none of them empty."""
        raise NotImplementedError


def as_texts(reference: str | Iterable[str] | None) -> list[str]:
    """The references of one sentence as a list, empty if `reference` is neither a string nor iterable."""
    if isinstance(reference, str):
        return [reference]
    return list(reference) if isinstance(reference, Iterable) else []


def reference_streams(references: Iterable[Sequence[str]]) -> list[list[str]]:
    """Turn lists of references per sentence into the columns that sacrebleu takes, which skips the empty padding."""
    return [list(stream) for stream in zip_longest(*references, fillvalue="")]
