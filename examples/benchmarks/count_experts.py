"""How many different experts of a layer the steps of a search choose, on a CPU: what a GPU has to read in each.

    python examples/benchmarks/count_experts.py --output count_experts.json                 # random weights
    python examples/benchmarks/count_experts.py --model examples/checkpoints/zcode_m3_demo --first 2 --last 12 \
        --output count_experts_demo.json

Models with random weights and their sentences have the shapes, sizes and steps of bench_beams_gpu.py, whose
milliseconds depend on this. Experts of a layer are windows of one matrix, each a few numbers further, so that 128 of
NLLB-MoE take the memory of one. A model of one's own translates English sentences of `--data` that are long enough not
to end before `--last`. Beside each count stands what independent tokens would choose evenly, and the exponent of Zipf's
law by which they would choose as many: what `hf-moe-ted plan --serve --zipf` asks for. The file is written after each
row.
"""

import argparse
import csv
import json
import lzma
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bench_beams_gpu import nllb_moe_config
from bench_generation import BASES, TEST_SENTENCES, random_config
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hf_moe_ted import ZCodeM3Config, ZCodeM3ForConditionalGeneration, ZCodeM3Tokenizer, zipf_of_experts

SHIFT = 12_289  # numbers from an expert's window to the next: a prime, so that no rows are the same


class ExpertCounts:
    """Of each call of the routers of a decoder.

    Args:
        model: whose routers are watched from now on.
    """

    def __init__(self, model: ZCodeM3ForConditionalGeneration):
        self.of_layer: dict[int, list[int]] = {}
        for index, layer in enumerate(model.model.decoder.layers):
            if hasattr(layer.ffn, "router"):
                self.of_layer[index] = []
                layer.ffn.router.register_forward_hook(lambda *call, index=index: self._count(index, call[-1][1]))

    def _count(self, layer: int, routing: Any) -> None:
        chosen = routing.expert_ids.unique()
        self.of_layer[layer].append(int((chosen < routing.num_experts).sum()))

    def mean(self, first: int, last: int) -> dict[int, float]:
        """Of each layer, over the steps from `first` to `last`, counted from 1."""
        steps = {layer: counts[first - 1 : last] for layer, counts in self.of_layer.items()}
        return {layer: sum(counts) / len(counts) for layer, counts in steps.items()}

    def clear(self) -> None:
        for counts in self.of_layer.values():
            counts.clear()


def random_model(config: ZCodeM3Config, seed: int) -> ZCodeM3ForConditionalGeneration:
    """As `_from_config` initializes it, in float32, but for experts, which are windows of one matrix."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = ZCodeM3ForConditionalGeneration(config)
    state = {}
    for name, spec in model.state_dict().items():
        if name.endswith(("experts.up_proj", "experts.down_proj")):
            count, rows, columns = spec.shape
            numbers = torch.randn(rows * columns + SHIFT * (count - 1)) * config.init_std
            state[name] = numbers.as_strided((count, rows, columns), (SHIFT, columns, 1))
        elif spec.ndim == 1 or name.endswith("_bias"):
            state[name] = torch.full(spec.shape, float(name.endswith("norm.weight")))
        elif name not in model.all_tied_weights_keys:
            state[name] = torch.randn(spec.shape) * config.init_std
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    return model.requires_grad_(False).eval()


def models(arguments: argparse.Namespace) -> Iterator[tuple[str, ZCodeM3ForConditionalGeneration]]:
    if arguments.model is not None:
        yield arguments.model.name, ZCodeM3ForConditionalGeneration.from_pretrained(arguments.model).eval()
        return
    for base in arguments.bases:
        if base == "nllb-moe":
            config = nllb_moe_config(arguments.nllb_moe_layers)
        else:
            config = random_config(argparse.Namespace(base=base, num_experts=16, num_experts_per_tok=1))
        yield base, random_model(config, arguments.seed)


def batches(
    arguments: argparse.Namespace, model: ZCodeM3ForConditionalGeneration, batch_size: int
) -> Iterator[dict[str, Any]]:
    """Arguments of `generate` for `--rounds` batches; sentences are others in each."""
    if arguments.model is None:
        generator = torch.Generator().manual_seed(arguments.seed)
        for _ in range(arguments.rounds):
            shape = (batch_size, arguments.source_length)
            ids = torch.randint(3, model.config.vocab_size, shape, generator=generator)
            yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return
    tokenizer = ZCodeM3Tokenizer.from_pretrained(arguments.model, src_lang="en", tgt_lang=arguments.tgt_lang)
    with lzma.open(arguments.data, "rt", encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        sentences = [row["english"] for row in rows if row["lang"] == arguments.tgt_lang]
    long = [text for text in sentences if len(tokenizer(text).input_ids) >= arguments.last + 4]
    for start in range(0, min(arguments.rounds * batch_size, len(long) - batch_size + 1), batch_size):
        inputs: dict[str, Tensor] = tokenizer(long[start : start + batch_size], padding=True, return_tensors="pt")
        yield {**inputs, "forced_bos_token_id": tokenizer.get_lang_id(arguments.tgt_lang)}


@torch.inference_mode()
def count(
    arguments: argparse.Namespace, model: ZCodeM3ForConditionalGeneration, counts: ExpertCounts, size: int, beams: int
) -> dict[str, Any]:
    """One row."""
    start, means = time.perf_counter(), []
    for inputs in batches(arguments, model, size):
        counts.clear()
        length = {"min_new_tokens": arguments.last, "max_new_tokens": arguments.last}
        model.generate(**inputs, **length, num_beams=beams, do_sample=False, cuda_graphs=False)
        means.append(counts.mean(arguments.first, arguments.last))
    of_layer = {layer: sum(mean[layer] for mean in means) / len(means) for layer in means[0]}
    [num_experts] = {*model.config.num_experts_per_layer("decoder").values()}
    experts, of_tokens = sum(of_layer.values()) / len(of_layer), (num_experts, model.config.num_experts_per_tok)
    return {
        "num_experts": num_experts,
        "top_k": model.config.num_experts_per_tok,
        "batch_size": size,
        "num_beams": beams,
        "experts": experts,
        "by_layer": of_layer,
        "evenly": num_experts * (1 - (1 - of_tokens[1] / num_experts) ** (size * beams)),
        "zipf": zipf_of_experts(*of_tokens, size * beams, experts) if size * beams > 1 else None,
        "num_rounds": len(means),
        "seconds": time.perf_counter() - start,
    }


def table_of(rows: list[dict[str, Any]]) -> Table:
    table = Table("model", "sentences", "beams", "experts", "evenly", "as by Zipf's law of", "by layer")
    for row in rows:
        by_layer = ", ".join(f"{mean:.1f}" for mean in row["by_layer"].values())
        sizes = (str(row[name]) for name in ("batch_size", "num_beams"))
        counts = (f"{row[name]:.1f}" for name in ("experts", "evenly"))
        table.add_row(row["model"], *sizes, *counts, "" if row["zipf"] is None else f"{row['zipf']:.2f}", by_layer)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", choices=[*BASES, "nllb-moe"], default=["nllb-moe", "0.6B"])
    parser.add_argument("--nllb_moe_layers", type=int, default=8, help="on each side")
    parser.add_argument("--model", type=Path, help="a folder, in place of random weights")
    parser.add_argument("--data", type=Path, default=TEST_SENTENCES, help="sentences for --model")
    parser.add_argument("--tgt_lang", default="de", help="for --model")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--num_beams", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--source_length", type=int, default=32, help="tokens of a random sentence")
    parser.add_argument("--first", type=int, default=17, help="step that is counted")
    parser.add_argument("--last", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=1, help="batches for each row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path, default=Path("count_experts.json"))
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rows: list[dict[str, Any]] = []
    for name, model in models(arguments):
        counts = ExpertCounts(model)
        for size in arguments.batch_sizes:
            for beams in arguments.num_beams:
                rows.append({"model": name, **count(arguments, model, counts, size, beams)})
                print(json.dumps(rows[-1]), flush=True)
                named = {key: str(value) for key, value in vars(arguments).items()}
                written = {"torch": torch.__version__, "arguments": named, "results": rows}
                arguments.output.write_text(json.dumps(written, indent=1) + "\n")
    Console(width=150).print(table_of(rows))


if __name__ == "__main__":
    main()
