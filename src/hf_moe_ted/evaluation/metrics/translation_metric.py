"""Base class of this package's metrics: it adapts the functions of `corpus_metrics` to `evaluate`."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import datasets
import evaluate

from hf_moe_ted.evaluation.corpus_metrics import checked_references


class TranslationMetric(evaluate.Metric):
    """Corpus metric of translations against one or several references per sentence.

    A subclass sets the class attributes; `_score` is one of `corpus_metrics`.
    """

    description: str
    citation: str = ""
    reference_urls: tuple[str, ...] = ()
    _score: ClassVar[Callable[..., dict[str, Any]]]

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
        checked_references(predictions, references)
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def _compute(self, **texts_and_options: Any) -> dict[str, Any]:
        return self._score(**texts_and_options)
