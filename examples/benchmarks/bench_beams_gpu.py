"""Beam search whose steps are CUDA graphs, beside the searches of transformers, on one GPU.

    python examples/benchmarks/bench_beams_gpu.py --text sentences.en.txt --output beams.json

Weights are random, so that all peers decode the same number of tokens. Milliseconds per step are the difference of
two generations, of `--long` and of `--short` new tokens, divided by the difference of their lengths: what comes before
the first step is not in them, but in the seconds of the long one. Numbers are those of the fastest rounds. "greedy
compiled" is transformers' static cache. Sentences per second are those of whole translations of `--text`, one sentence
a line, through the pipeline, all of the same length. Rows come in the order of what they are worth, until `--seconds`
have passed; the file is written after each.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_generation import BASES, dense_model, environment, random_config
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hf_moe_ted import ZCodeM3Config, ZCodeM3ForConditionalGeneration, ZCodeM3Tokenizer, ZCodeM3TranslationPipeline

TOKENIZER = Path(__file__).parents[1] / "checkpoints" / "zcode_m3_demo"
CAPTURED, BEAMS, GREEDY, GREEDY_CAPTURED, DENSE_BEAMS = (
    "four beams, captured",
    "four beams, step by step",
    "greedy, compiled",
    "greedy, captured",
    "dense M2M100, four beams",
)
OPTIONS: dict[str, dict[str, Any]] = {
    CAPTURED: {"num_beams": 4, "cuda_graphs": True},
    BEAMS: {"num_beams": 4, "cuda_graphs": False},
    GREEDY_CAPTURED: {"num_beams": 1, "cuda_graphs": True},
    DENSE_BEAMS: {"num_beams": 4},
    GREEDY: {"num_beams": 1, "cache_implementation": "static", "cuda_graphs": False},
}


def nllb_moe_config(num_layers: int) -> ZCodeM3Config:
    """The shape of NLLB-MoE 54B with fewer layers, every fourth of which has experts."""
    return ZCodeM3Config(
        vocab_size=256_206, d_model=2048, encoder_layers=num_layers, decoder_layers=num_layers, encoder_ffn_dim=8192,
        decoder_ffn_dim=8192, encoder_attention_heads=16, decoder_attention_heads=16, num_experts=128,
        num_experts_per_tok=2, encoder_sparse_step=4, decoder_sparse_step=4, max_position_embeddings=1024,
        normalize_router_weights="after_dropping", init_std=2048**-0.5,
    )  # fmt: skip


class Peers:
    """Models that are made when they are needed first, and the table of what they took.

    Args:
        arguments: of the command line.
    """

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.start = time.perf_counter()
        self.models: dict[tuple[str, bool], Any] = {}
        self.rows: list[dict[str, Any]] = []

    def config(self, base: str) -> ZCodeM3Config:
        if base == "nllb-moe":
            return nllb_moe_config(self.arguments.nllb_moe_layers)
        config = random_config(argparse.Namespace(**{**vars(self.arguments), "base": base}))
        config.vocab_size = max(config.vocab_size, 16_384)  # as many as the tokenizer has
        return config

    def model(self, base: str, is_dense: bool) -> Any:
        if (base, is_dense) not in self.models:
            for name in [name for name in self.models if name[0] != base]:  # room for what follows
                del self.models[name]
            gc.collect()
            config, dtype = self.config(base), torch.bfloat16
            if is_dense:
                made: Any = dense_model(config, dtype, self.arguments.device)
            else:
                with torch.device(self.arguments.device):
                    made = ZCodeM3ForConditionalGeneration._from_config(config, dtype=dtype).eval()
            self.models[base, is_dense] = made
        return self.models[base, is_dense]

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row, and write all."""
        row["at_s"] = round(time.perf_counter() - self.start, 1)
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        arguments = {name: str(value) for name, value in vars(self.arguments).items()}
        written = {"environment": environment(self.arguments), "arguments": arguments, "results": self.rows}
        self.arguments.output.write_text(json.dumps(written, indent=1) + "\n")

    @property
    def is_late(self) -> bool:
        return time.perf_counter() - self.start > self.arguments.seconds


def synchronized(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def fastest(call: Callable[[], Any], rounds: int, device: str) -> float:
    seconds = []
    for _ in range(rounds):
        start = synchronized(device)
        call()
        seconds.append(synchronized(device) - start)
    return min(seconds)


def measure_steps(peers: Peers, base: str, batch_size: int, name: str) -> None:
    """One row: milliseconds of a step."""
    arguments = peers.arguments
    config = peers.config(base)
    model = peers.model(base, name == DENSE_BEAMS)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, config.vocab_size, (batch_size, arguments.source_length), generator=generator)
    inputs = {"input_ids": ids.to(arguments.device), "attention_mask": torch.ones_like(ids).to(arguments.device)}

    def generate(num_tokens: int) -> Tensor:
        return model.generate(
            **inputs, **OPTIONS[name], do_sample=False, min_new_tokens=num_tokens, max_new_tokens=num_tokens
        )

    seconds = {}
    start = synchronized(arguments.device)
    for length in (arguments.short, arguments.long):
        for _ in range(2):  # kernels and graphs are made
            generate(length)
    warm_up = synchronized(arguments.device) - start
    for length in (arguments.short, arguments.long):
        seconds[length] = fastest(lambda length=length: generate(length), arguments.rounds, arguments.device)
    difference = seconds[arguments.long] - seconds[arguments.short]
    peers.add(
        {
            "base": base,
            "batch_size": batch_size,
            "peer": name,
            "ms_per_step": 1000 * difference / (arguments.long - arguments.short),
            "seconds": seconds[arguments.long],
            "warm_up_s": warm_up,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if arguments.device == "cuda" else None,
        }
    )


def measure_translations(peers: Peers, base: str, name: str) -> None:
    """One row: sentences per second of the pipeline."""
    arguments = peers.arguments
    lines = arguments.text.read_text(encoding="utf-8").splitlines()
    sentences = [line for line in lines if line.strip()][: arguments.num_sentences]
    model = peers.model(base, name == DENSE_BEAMS)
    tokenizer = ZCodeM3Tokenizer.from_pretrained(TOKENIZER)
    translator = ZCodeM3TranslationPipeline(model=model, tokenizer=tokenizer, src_lang="en", tgt_lang="de")
    length = arguments.translation_length
    options = {"min_new_tokens": length, "max_new_tokens": length, **OPTIONS[name]}

    def translate() -> None:
        translator(sentences, split=False, batch_size=arguments.pipeline_batch_size, **options)

    start = synchronized(arguments.device)
    translate()
    warm_up = synchronized(arguments.device) - start
    seconds = fastest(translate, max(1, arguments.rounds - 1), arguments.device)
    peers.add(
        {
            "base": base,
            "batch_size": arguments.pipeline_batch_size,
            "peer": f"pipeline: {name}",
            "sentences_per_s": len(sentences) / seconds,
            "seconds": seconds,
            "warm_up_s": warm_up,
            "num_sentences": len(sentences),
        }
    )


def profile_step(peers: Peers, base: str, batch_size: int) -> None:
    """Print the kernels of captured steps."""
    model, device = peers.model(base, False), peers.arguments.device
    ids = torch.randint(3, peers.config(base).vocab_size, (batch_size, peers.arguments.source_length), device=device)

    def generate(num_tokens: int) -> None:
        model.generate(
            input_ids=ids, **OPTIONS[CAPTURED], do_sample=False, min_new_tokens=num_tokens, max_new_tokens=num_tokens
        )

    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    for _ in range(2):
        generate(peers.arguments.long)
    with torch.profiler.profile(activities=activities) as profile:
        generate(peers.arguments.long)
        synchronized(device)
    print(f"{base}, batch {batch_size}, {peers.arguments.long} steps and the encoder", flush=True)
    averages = profile.key_averages()
    print(averages.table(sort_by="self_cuda_time_total", row_limit=30, max_name_column_width=70), flush=True)


def print_table(rows: list[dict[str, Any]], title: str) -> None:
    def of(row: dict[str, Any], peer: str) -> float | None:
        same = [r for r in rows if (r["base"], r["batch_size"], r["peer"]) == (row["base"], row["batch_size"], peer)]
        return same[0].get("ms_per_step") if same else None

    def shown(value: float | None, form: str) -> str:
        return "" if value is None else f"{value:{form}}"

    columns = (
        "base",
        "batch",
        "peer",
        "ms/step",
        "/ greedy compiled",
        "x step by step",
        "s",
        "sentences/s",
        "warm up s",
    )
    table = Table(*columns, title=title)
    for row in rows:
        ms, greedy, beams = row.get("ms_per_step"), of(row, GREEDY), of(row, BEAMS)
        table.add_row(
            row["base"], str(row["batch_size"]), row["peer"], shown(ms, ".3f"),
            shown(ms and greedy and ms / greedy, ".2f"), shown(ms and beams and beams / ms, ".2f"),
            shown(row["seconds"], ".3f"),
            shown(row.get("sentences_per_s"), ".1f"), shown(row["warm_up_s"], ".1f"),
        )  # fmt: skip
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=[*BASES], default="0.6B")
    parser.add_argument("--num_experts", type=int, default=16)
    parser.add_argument("--num_experts_per_tok", type=int, default=1)
    parser.add_argument("--nllb_moe_layers", type=int, default=8, help="on each side; 0 leaves NLLB-MoE's shape out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch_sizes", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--source_length", type=int, default=32, help="tokens of a random sentence")
    parser.add_argument("--short", type=int, default=16, help="tokens of the shorter generation")
    parser.add_argument("--long", type=int, default=48, help="tokens of the longer generation")
    parser.add_argument("--text", type=Path, help="file of one sentence a line")
    parser.add_argument("--num_sentences", type=int, default=512)
    parser.add_argument("--pipeline_batch_size", type=int, default=64)
    parser.add_argument("--translation_length", type=int, default=32, help="tokens of each translation of the text")
    parser.add_argument("--peers", nargs="*", choices=[*OPTIONS], default=[*OPTIONS])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=130.0, help="after which no row begins")
    parser.add_argument("--profile", type=int, nargs="*", default=[], help="batch sizes whose kernels are printed")
    parser.add_argument("--output", type=Path, default=Path("beams.json"))
    arguments = parser.parse_args()
    torch.manual_seed(0)

    peers = Peers(arguments)
    rows: list[Callable[[], None]] = []
    asked = [name for name in OPTIONS if name in arguments.peers]
    for name in asked:
        # a compiled search takes as long to compile for each batch size as all other rows together
        sizes = sorted(arguments.batch_sizes, reverse=name == GREEDY)
        rows += [lambda b=b, name=name: measure_steps(peers, arguments.base, b, name) for b in sizes]
    if arguments.text is not None:
        for name in (CAPTURED, DENSE_BEAMS, BEAMS):
            if name in asked:
                rows.append(lambda name=name: measure_translations(peers, arguments.base, name))
    rows += [lambda b=b: profile_step(peers, arguments.base, b) for b in arguments.profile]
    if arguments.nllb_moe_layers:
        for b in (16, 1) if arguments.base == "0.6B" else (2,):
            for name in (CAPTURED, BEAMS, GREEDY_CAPTURED):
                if name in asked:
                    rows.append(lambda b=b, name=name: measure_steps(peers, "nllb-moe", b, name))
    for row in rows:
        if peers.is_late:
            print(f"{len(rows)} rows, of which those behind {arguments.seconds} s are left out", flush=True)
            break
        row()
    print_table(peers.rows, f"{arguments.base} x {arguments.num_experts}, random weights, bfloat16")


if __name__ == "__main__":
    main()
