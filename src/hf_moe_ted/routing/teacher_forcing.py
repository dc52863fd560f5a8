"""Teacher forcing: encoder and decoder run at once on a sentence and its translation; nothing is generated.

Shape letters: B sentences, L tokens of the longest one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..evaluation.parallel_text import EncodedSentence
from ..models.execution_device import execution_device


@dataclass(frozen=True)
class TeacherForcedBatch:
    """The model's inputs for sentences and their translations, on its device.

    Attributes:
        source_ids, target_ids: int64[B, L]; a target begins with the start of decoding and lacks its last token, which
            is only predicted.
        source_mask, target_mask: bool[B, L], False for padding.
    """

    source_ids: Tensor
    source_mask: Tensor
    target_ids: Tensor
    target_mask: Tensor

    @classmethod
    def of(cls, sentences: Sequence[EncodedSentence], model: Any) -> "TeacherForcedBatch":
        start = [model.config.decoder_start_token_id]
        return cls(
            *_pad([sentence.source for sentence in sentences], model),
            *_pad([start + sentence.target[:-1] for sentence in sentences], model),
        )

    @torch.no_grad()
    def run(self, model: Any, **kwargs: Any) -> Any:
        """Run the model and return its output."""
        return model(
            input_ids=self.source_ids,
            attention_mask=self.source_mask,
            decoder_input_ids=self.target_ids,
            decoder_attention_mask=self.target_mask,
            use_cache=False,
            **kwargs,
        )


def _pad(rows: list[list[int]], model: Any) -> tuple[Tensor, Tensor]:
    """int64[B, L] and bool[B, L], False for padding."""
    length = max(map(len, rows))
    ids = torch.tensor([row + [model.config.pad_token_id] * (length - len(row)) for row in rows])
    mask = torch.arange(length) < torch.tensor([len(row) for row in rows]).unsqueeze(-1)
    device = execution_device(model)
    return ids.to(device), mask.to(device)


__all__ = ["TeacherForcedBatch"]
