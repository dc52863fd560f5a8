"""Training of which a part is what a teacher says: a dense model learns from one with experts."""

from typing import Any

import torch
from token_trainer import TokenPairsTrainer
from torch import Tensor, nn
from torch.nn import functional as F


class DistillationTrainer(TokenPairsTrainer):
    """[`TokenPairsTrainer`] with the probabilities of a teacher as a part of the target.

    The loss is `1 - teacher_share` of the model's own, and `teacher_share` of the cross-entropy between the teacher's
    probabilities and the model's, in nats, over the same target tokens (Switch Transformers,
    https://huggingface.co/papers/2101.03961, section 4.2). The teacher runs as in evaluation. Logged training losses
    are this sum, held-out losses are without it.

    Args:
        teacher: model of the same vocabulary, which is not changed.
        teacher_share: from 0 to 1.
    """

    def __init__(self, *args: Any, teacher: nn.Module, teacher_share: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.args.world_size > 1:  # the Trainer scales its own loss by it
            raise ValueError(
                f"a run with a teacher is for one process, not {self.args.world_size}: one GPU for each run"
            )
        if not 0 <= teacher_share <= 1:
            raise ValueError(f"teacher_share ({teacher_share}) must be from 0 to 1")
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)
        self.teacher_share = teacher_share

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        labels_BL = inputs["labels"]
        with torch.no_grad(), self.accelerator.autocast():
            start = self.model.prepare_decoder_input_ids_from_labels(labels_BL)
            sources = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            logits_BLV = self.teacher(**sources, decoder_input_ids=start, use_cache=False).logits
        num_items = (labels_BL != -100).sum() if num_items_in_batch is None else num_items_in_batch
        taught = soft_cross_entropy(outputs.logits, logits_BLV, labels_BL != -100) / num_items
        loss = (1 - self.teacher_share) * loss + self.teacher_share * taught
        return (loss, outputs) if return_outputs else loss


def soft_cross_entropy(logits_BLV: Tensor, teacher_logits_BLV: Tensor, mask_BL: Tensor) -> Tensor:
    """Sum of the cross-entropies between a teacher's probabilities and a model's where `mask_BL` is set, float32."""
    probs_NV = teacher_logits_BLV.float().softmax(-1).flatten(0, -2)
    nats_N = F.cross_entropy(logits_BLV.float().flatten(0, -2), probs_NV, reduction="none")
    return torch.where(mask_BL.flatten(), nats_N, 0.0).sum()
