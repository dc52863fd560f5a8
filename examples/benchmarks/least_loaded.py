"""Least-Loaded Expert Parallelism beside plain expert parallelism, for `bench_ted.py`: cases, routing and ratios.

The shipped model translates test sentences of a language pair, and the shares of tokens that its experts get become
those of a larger model's: sparse layer i of a side takes those of sparse layer i of the shipped one, in turn. What a
router drops is not asked, and each data-parallel rank draws the experts of its tokens once.
"""

import csv
import lzma
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from hf_moe_ted import ZCodeM3ForConditionalGeneration, ZCodeM3Tokenizer, collect_expert_statistics

EXAMPLES = Path(__file__).parents[1]
MODEL = EXAMPLES / "checkpoints" / "zcode_m3_demo"
MOVES = "least_loaded_experts"

_KEYS = ("num_gpus", "base", "num_experts", "checkpointing", "batch_size", "length", "forward")

Routing = dict[str, Any]  # "pair", and for "encoder" and "decoder" the shares of the experts of each sparse layer


def routing_of_pair(pair: str, num_sentences: int) -> Routing:
    """
    Args:
        pair: source and target language, one of them English, such as `"en-de"`.

    Raises:
        ValueError: there is no text of the pair.
    """
    source, _, target = pair.partition("-")
    language = target if source == "en" else source
    path = EXAMPLES / "data" / "chromium_l10n.test.tsv.xz"
    with lzma.open(path, "rt", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if row["lang"] == language]
    if not rows or "en" not in (source, target):
        raise ValueError(f"--pair {pair}: no such text in {path}; give en-XX or XX-en")
    texts = [{"en": row["english"], language: row["target"]} for row in rows[:num_sentences]]
    statistics = collect_expert_statistics(
        ZCodeM3ForConditionalGeneration.from_pretrained(MODEL, dtype="auto"),
        ZCodeM3Tokenizer.from_pretrained(MODEL),
        [{"source": t[source], "target": t[target], "src_lang": source, "tgt_lang": target} for t in texts],
    )
    routing: Routing = {"pair": pair, "encoder": [], "decoder": []}
    for name, layer in statistics.layers.items():
        counts = layer.num_routed.sum(dim=(0, 1)).double()
        routing["encoder" if ".encoder." in name else "decoder"].append((counts / counts.sum()).tolist())
    return routing


def even_routing(num_experts: int) -> Routing:
    """Routing in which all experts of all layers have the same share of the tokens."""
    shares = [[1.0 / num_experts] * num_experts]
    return {"pair": "even", "encoder": shares, "decoder": shares}


def route_as(model: nn.Module, routing: Routing, seed: int) -> None:
    """Send the tokens of each sparse layer to experts by their shares, in random order, whatever the router says.

    Args:
        seed: the same for ranks that share a batch.

    Raises:
        ValueError: the model has another number of experts than the routing.
    """
    num_layers = {"encoder": 0, "decoder": 0}
    for name, module in model.named_modules():
        if not name.endswith(".ffn.experts"):
            continue
        side = "encoder" if ".encoder." in name else "decoder"
        shares = routing[side][num_layers[side] % len(routing[side])]
        num_layers[side] += 1
        if model.config.num_experts != len(shares):
            raise ValueError(f"num_experts ({model.config.num_experts}) must be {len(shares)}, as many as have a share")
        module.register_forward_pre_hook(_DrawnExperts(shares, seed * 1000 + sum(num_layers.values())))


class _DrawnExperts:
    """A hook that puts the same experts in place of those of the router each time; each gets its share to one token."""

    def __init__(self, shares: list[float], seed: int):
        self.shares, self.generator = torch.tensor(shares, dtype=torch.float64), torch.Generator().manual_seed(seed)
        self.ids: dict[torch.Size, Tensor] = {}

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_states, expert_ids, weights = args
        if expert_ids.shape not in self.ids:
            num_slots = expert_ids.numel()
            places = (torch.randperm(num_slots, generator=self.generator) + 0.5) / num_slots
            drawn = torch.searchsorted(self.shares.cumsum(0), places).clamp(max=len(self.shares) - 1)
            self.ids[expert_ids.shape] = drawn.view(expert_ids.shape).to(expert_ids.device)
        return hidden_states, self.ids[expert_ids.shape], weights


def imbalance(shares: list[float], num_ranks: int) -> float:
    """The largest load of a rank, in parts of the mean."""
    return float(torch.tensor(shares).view(num_ranks, -1).sum(dim=1).max()) * num_ranks


def print_ratios(results: list[dict[str, Any]]) -> None:
    """Plain expert parallelism over least-loaded, of cases that differ in nothing else: above 1 it pays.

    Losses are of the same steps on the same data, and equal but for rounding.
    """
    columns = (
        "case",
        "GPUs",
        "load of a rank",
        "plain ms",
        "least-loaded ms",
        "time",
        "largest peak",
        "all-to-all MB, all ranks",
        "loss",
    )
    table = Table(*columns, title="plain / least-loaded")
    plain_cases: dict[Any, dict[str, Any]] = {}
    for result in results:  # plain cases come first
        if "error" in result or result["routing"] is None:
            continue
        layout = {key: value for key, value in result["layout"].items() if not key.startswith("least_loaded")}
        key = str([layout, *(result[name] for name in _KEYS)])
        if not result["layout"].get(MOVES):
            plain_cases[key] = result
        elif key in plain_cases:
            table.add_row(*_ratios(plain_cases[key], result))
    if table.row_count:
        Console(width=200).print(table)


def _ratios(plain: dict[str, Any], moving: dict[str, Any]) -> list[str]:
    layers = [shares for side in ("encoder", "decoder") for shares in moving["routing"][side]]
    loads = [imbalance(shares, moving["layout"]["expert_parallel_size"]) for shares in layers]
    return [
        plain["name"],
        str(plain["num_gpus"]),
        f"{min(loads):.2f} to {max(loads):.2f}",
        f"{plain['step_ms']:.1f}",
        f"{moving['step_ms']:.1f}",
        f"{plain['step_ms'] / moving['step_ms']:.2f}",
        f"{plain['largest_peak_gib'] / moving['largest_peak_gib']:.2f}",
        f"{plain['all_to_all_mb_of_all']:.1f} / {moving['all_to_all_mb_of_all']:.1f}",
        f"{plain['loss']:.4f} / {moving['loss']:.4f}",
    ]


__all__ = ["MOVES", "even_routing", "print_ratios", "route_as", "routing_of_pair"]
