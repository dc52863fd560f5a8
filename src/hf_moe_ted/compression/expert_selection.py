"""Which experts count, and how many each layer gets: the options that pruning and merging share."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..models.language_codes import LanguagePair
from ..routing.expert_statistics import LayerStatistics

Criterion = Callable[[LayerStatistics], Tensor]
"""Statistics of a layer's experts for some language pairs -> number[E], higher for experts to keep.

The numbers must be finite and not negative. They are divided by their sum, so only their ratios count.
"""

SCOPES = ("global", "language_pair", "language")
PER_LAYER = ("equal", "adaptive")


@dataclass(frozen=True, kw_only=True)
class ExpertSelection:
    """The options of `prune_experts`, checked as far as that is possible without a model.

    Attributes:
        keep: a fraction of the experts (a float up to 1.0), a number of experts per layer (an int; the mean over layers
            with `"adaptive"` or a ratio), or a size of the weights (`"8GB"`): as many experts as fit.
        criterion: name of the criterion or a function; it says how important each expert is.
        scope: the group of language pairs for which the criterion is computed; see `expert_importance`.
        languages: what to keep. Codes stand for the pairs whose two languages are both among them; under `"language"`,
            for all pairs from one of them (encoder) or to one of them (decoder). Pairs are written `[("en", "de"),
            ("en", "fr")]`. `None` is all.
        per_layer: `"equal"`: all layers keep the same number, or the same share if `keep` is a fraction or a size.
            `"adaptive"`: each layer keeps its `min_experts` most important experts; the rest go to the experts of the
            highest importance, in any layer.
        min_experts: the fewest that a layer keeps. A layer that has fewer keeps all.
        encoder_decoder_ratio: mean number of experts of an encoder layer per expert of a decoder layer. It does not
            change the total, up to rounding.
        seed: seed of the criterion `"random"`.

    Raises:
        ValueError: an option has another value.
    """

    keep: float | int | str
    criterion: str | Criterion = "utilization"
    scope: str = "global"
    languages: Sequence[str] | Sequence[LanguagePair] | None = None
    per_layer: str = "equal"
    min_experts: int = 1
    encoder_decoder_ratio: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in (("scope", SCOPES), ("per_layer", PER_LAYER)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} ({getattr(self, name)!r}) must be one of {choices}")
        keep, languages, ratio = self.keep, self.languages, self.encoder_decoder_ratio
        if languages is not None and (isinstance(languages, str) or len({isinstance(x, str) for x in languages}) != 1):
            raise ValueError(f"languages ({languages!r}) must be a list of codes or a list of pairs, or None for all")
        if ratio is not None and not 0 < ratio < math.inf:
            raise ValueError(f"encoder_decoder_ratio ({ratio}) must be a positive number, such as 3.0")
        if isinstance(keep, str):
            return
        if isinstance(keep, bool) or not isinstance(keep, int | float) or not 0 < keep < math.inf:
            raise ValueError(f"keep ({keep!r}) must be a fraction (0.25), a number of experts (16) or a size ('8GB')")
        if isinstance(keep, float) and keep > 1:
            raise ValueError(f"keep ({keep}) is a fraction of more than 1; a number of experts per layer is an int")

    @property
    def criterion_name(self) -> str:
        """Name of the criterion, for messages and reports."""
        criterion = self.criterion
        return criterion if isinstance(criterion, str) else getattr(criterion, "__name__", repr(criterion))

    def arguments(self) -> dict[str, Any]:
        """All options, for a report."""
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return options | {"criterion": self.criterion_name}


__all__ = ["Criterion", "ExpertSelection"]
