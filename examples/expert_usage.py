"""Count which experts each language uses, drop the least-used ones, and draw the counts."""

from pathlib import Path
from typing import Any

import matplotlib
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import DataCollatorForSeq2Seq
from translation_data import Direction, tokenize

from hf_moe_ted import ZCodeM3ForConditionalGeneration

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Usage = dict[tuple[str, str], list[torch.Tensor]]  # (side, language) -> tokens per expert, int64[E], per sparse layer


@torch.inference_mode()
def count_expert_usage(
    model: Any, tokenizer: Any, directions: dict[Direction, Dataset], *, max_samples: int, batch_size: int = 64
) -> Usage:
    """Tokens that each expert computes for each language: the encoder's by source language, the decoder's by target."""
    model.eval()
    collate = DataCollatorForSeq2Seq(tokenizer, model=model)
    usage: Usage = {}
    samples = {d: data.select(range(min(len(data), max_samples))) for d, data in directions.items()}
    with tqdm(total=sum(map(len, samples.values())), desc="Counting expert usage", unit="sentence") as progress:
        for direction, data in samples.items():
            data = tokenize(data, tokenizer, direction, model.config.max_position_embeddings).remove_columns("length")
            for batch in DataLoader(data, batch_size=batch_size, collate_fn=collate):
                outputs = model(**batch.to(model.device), output_routings=True)
                for side, language, routings in (
                    ("encoder", direction.src_lang, outputs.encoder_routings),
                    ("decoder", direction.tgt_lang, outputs.decoder_routings),
                ):
                    counts = [routing.num_tokens_per_expert().cpu() for routing in routings]
                    before = usage.get((side, language), [0] * len(counts))
                    usage[side, language] = [a + b for a, b in zip(before, counts, strict=True)]
                progress.update(batch["input_ids"].shape[0])
    return usage


def most_used_experts(usage: Usage, keep: int) -> dict[str, list[list[int]]]:
    """Side -> per sparse layer, the ids of the `keep` experts with the most tokens over all languages, ascending."""
    kept: dict[str, list[list[int]]] = {}
    for side in ("encoder", "decoder"):
        layers = zip(*(counts for (s, _), counts in usage.items() if s == side), strict=True)
        kept[side] = [torch.stack(layer).sum(0).topk(keep).indices.sort().values.tolist() for layer in layers]
    return kept


def keep_experts(model: ZCodeM3ForConditionalGeneration, kept: dict[str, list[list[int]]]) -> Any:
    """A copy of `model` with only the `kept` experts of each sparse layer and their rows of the router."""
    config = type(model.config).from_dict(model.config.to_dict())
    config.num_experts = [len(experts) for side in ("encoder", "decoder") for experts in kept[side]]
    weights = model.state_dict()
    for side in ("encoder", "decoder"):
        for layer, experts in zip(config.sparse_layers(side), kept[side], strict=True):
            prefix = f"model.{side}.layers.{layer}.ffn."
            for name in [name for name in weights if name.startswith((f"{prefix}experts.", f"{prefix}router."))]:
                weights[name] = weights[name][experts]
    pruned = ZCodeM3ForConditionalGeneration(config)
    pruned.load_state_dict(weights)
    pruned.generation_config = model.generation_config
    return pruned.to(model.device).eval()


def draw_expert_usage(model: Any, usage: Usage, path: Path) -> None:
    """Heat maps languages x experts, one per sparse layer: the share of a language's tokens that an expert computes."""
    panels = [
        (f"{side} layer {layer}", side, position)
        for side in ("encoder", "decoder")
        for position, layer in enumerate(model.config.sparse_layers(side))
    ]
    languages = sorted({language for _, language in usage})
    figure, axes = plt.subplots(
        1, len(panels), figsize=(1.2 + 2.0 * len(panels), 1.4 + 0.24 * len(languages)), sharey=True, squeeze=False
    )
    for axis, (title, side, position) in zip(axes[0], panels, strict=True):
        counts = torch.stack([usage[side, language][position] for language in languages]).double()
        image = axis.imshow(counts / counts.sum(1, keepdim=True), aspect="auto", cmap="viridis", vmin=0.0, vmax=1.0)
        axis.set(title=title, xlabel="expert", xticks=range(counts.shape[1]))
        axis.set_yticks(range(len(languages)), languages)
    axes[0][0].set_ylabel("language (source of encoder, target of decoder)")
    figure.colorbar(image, ax=axes[0].tolist(), label="share of the language's tokens", fraction=0.02)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
