"""Generation speed of a mixture-of-experts model by experts implementation, beside a dense model of its active size.

    python examples/benchmarks/bench_generation.py --base 0.6B --output generation.json
    python examples/benchmarks/bench_generation.py --model examples/checkpoints/zcode_m3_demo --threads 2

Without `--model`, weights and tokens are random. With the folder of a model, English sentences of the examples' test
split are translated. Peers take turns, round by round, and all of them decode the same number of tokens: `--new_tokens`
with random weights, else as many as the translation takes. "dense" is transformers' M2M100 with random weights, "int8"
what `quantize_experts` makes of the model, and "int8_zcode_cpu" the same with integer products. Ratios are those of the
fastest rounds.
"""

import argparse
import csv
import json
import lzma
import os
import platform
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import M2M100Config, M2M100ForConditionalGeneration
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_moe_ted import ZCodeM3Config, ZCodeM3ForConditionalGeneration, ZCodeM3Tokenizer, quantize_experts

# d_model, encoder and decoder layers, heads, vocabulary; the feed-forward is 4 * d_model wide
BASES = {
    "0.6B": (1024, 24, 12, 16, 128_000),
    "small": (512, 6, 3, 8, 32_000),
    "tiny": (64, 2, 2, 4, 1_000),
}
TEST_SENTENCES = Path(__file__).parents[1] / "data" / "chromium_l10n.test.tsv.xz"
MAX_TRANSLATION_TOKENS = 64
INT8, INT8_CPU, DENSE = "int8", "int8_zcode_cpu", "dense"
PEERS_OF_DEVICE = {
    "cpu": ("eager", "grouped_mm", "zcode_grouped", "zcode_cpu", INT8, INT8_CPU, DENSE),
    "cuda": ("eager", "grouped_mm", "zcode_grouped", "zcode_fused", DENSE),
}


@dataclass
class Peer:
    """A model that generates; models of several peers are the same one, run by another implementation."""

    name: str
    model: Any
    experts_implementation: str | None

    def prepare(self) -> None:
        if self.experts_implementation is not None:
            self.model.set_experts_implementation(self.experts_implementation)


@dataclass(frozen=True)
class Batch:
    """Sentences that are generated from at once.

    Attributes:
        inputs: `input_ids` and `attention_mask` int64[B, L], `decoder_input_ids` int64[B, 2].
        num_new_tokens: that every sentence gets.
    """

    inputs: dict[str, Tensor]
    num_new_tokens: int


@dataclass(frozen=True)
class Result:
    """One line of the table.

    Attributes:
        num_sentences, num_new_tokens: of one round.
        seconds: of every round.
        experts_per_step: mean over decoder layers and steps, how many experts had a token.
        equal_tokens: share of tokens that are those of the first peer; `None` for another model.
        peak_gib: of the memory of the GPU, models of all peers included.
    """

    peer: str
    batch_size: int
    num_beams: int
    num_sentences: int
    num_new_tokens: int
    seconds: list[float]
    experts_per_step: float | None
    equal_tokens: float | None
    peak_gib: float | None


# ---- models ----


def random_config(arguments: argparse.Namespace) -> ZCodeM3Config:
    d_model, encoder_layers, decoder_layers, num_heads, vocab_size = BASES[arguments.base]
    return ZCodeM3Config(
        vocab_size=vocab_size, d_model=d_model, encoder_layers=encoder_layers, decoder_layers=decoder_layers,
        encoder_ffn_dim=4 * d_model, decoder_ffn_dim=4 * d_model, encoder_attention_heads=num_heads,
        decoder_attention_heads=num_heads, num_experts=arguments.num_experts,
        num_experts_per_tok=arguments.num_experts_per_tok, encoder_sparse_step=2, decoder_sparse_step=2,
        # embeddings of about the size of the sinusoids, or all tokens at one position would go to the same expert
        max_position_embeddings=512, init_std=d_model**-0.5,
    )  # fmt: skip


def moe_model(arguments: argparse.Namespace, dtype: torch.dtype) -> ZCodeM3ForConditionalGeneration:
    if arguments.model is not None:
        return ZCodeM3ForConditionalGeneration.from_pretrained(arguments.model, dtype=dtype).to(arguments.device)
    with torch.device(arguments.device):
        return ZCodeM3ForConditionalGeneration._from_config(random_config(arguments), dtype=dtype).eval()


def dense_model(config: ZCodeM3Config, dtype: torch.dtype, device: str) -> M2M100ForConditionalGeneration:
    """M2M100 of the same shape; with several experts per token its feed-forwards are wider, for the same FLOPs."""

    def ffn_dim(side: str) -> int:
        num_layers, num_sparse = getattr(config, f"{side}_layers"), len(config.sparse_layers(side))
        num_more = (config.num_experts_per_tok - 1 + config.use_residual) * num_sparse
        return round(getattr(config, f"{side}_ffn_dim") * (1 + num_more / num_layers) / 8) * 8

    names = ("vocab_size", "d_model", "encoder_layers", "decoder_layers", "encoder_attention_heads")
    names += (
        "decoder_attention_heads",
        "max_position_embeddings",
        "activation_function",
        "scale_embedding",
        "init_std",
    )
    fields = {name: getattr(config, name) for name in names}
    fields |= {"encoder_ffn_dim": ffn_dim("encoder"), "decoder_ffn_dim": ffn_dim("decoder")}
    with torch.device(device):
        return M2M100ForConditionalGeneration._from_config(M2M100Config(**fields), dtype=dtype).eval()


def peers_of(arguments: argparse.Namespace, dtype: torch.dtype) -> list[Peer]:
    """The peers that this installation has, for this device or by `--peers`."""
    moe = moe_model(arguments, dtype)
    registered = ["eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()]
    known = [*registered, INT8, *([INT8_CPU] if "zcode_cpu" in registered else []), DENSE]
    names = arguments.peers or [name for name in PEERS_OF_DEVICE[arguments.device] if name in known]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--peers {' '.join(unknown)}: not known here; there are {' '.join(known)}")
    quantized = quantize_experts(moe) if {INT8, INT8_CPU} & {*names} else None
    peers = []
    for name in names:
        if name == DENSE:
            peers.append(Peer(name, dense_model(moe.config, dtype, arguments.device), None))
        elif name in (INT8, INT8_CPU):
            peers.append(Peer(name, quantized, "eager" if name == INT8 else "zcode_cpu"))
        else:
            peers.append(Peer(name, moe, name))
    return peers


# ---- what is generated ----


def random_batches(config: ZCodeM3Config, batch_size: int, arguments: argparse.Namespace) -> list[Batch]:
    """One batch; each sentence starts with a token of its own, as equal ones would all go to the same experts."""
    generator = torch.Generator().manual_seed(arguments.seed)
    input_ids = torch.randint(3, config.vocab_size, (batch_size, arguments.source_length), generator=generator)
    first = torch.randint(3, config.vocab_size, (batch_size, 1), generator=generator)
    return [Batch(_inputs(config, input_ids, torch.ones_like(input_ids), first), arguments.new_tokens)]


def translation_batches(peer: Peer, batch_size: int, num_beams: int, arguments: argparse.Namespace) -> list[Batch]:
    """`--num_sentences` sentences in batches, each with the number of steps that its translation takes."""
    tokenizer = ZCodeM3Tokenizer.from_pretrained(arguments.model)
    texts = english_sentences(arguments)
    batches = []
    for start in range(0, len(texts), batch_size):
        sentences = texts[start : start + batch_size]
        encoded = tokenizer(sentences, src_lang="en", padding=True, return_tensors="pt")
        first = torch.full((len(sentences), 1), tokenizer.get_lang_id(arguments.tgt_lang))
        inputs = _inputs(peer.model.config, encoded["input_ids"], encoded["attention_mask"], first)
        peer.prepare()
        with counted_experts(peer.model) as counts:
            options = {"num_beams": num_beams, "max_new_tokens": MAX_TRANSLATION_TOKENS, "do_sample": False}
            peer.model.generate(**{k: v.to(arguments.device) for k, v in inputs.items()}, **options)
        batches.append(Batch(inputs, counts.num_steps))
    return batches


def english_sentences(arguments: argparse.Namespace) -> list[str]:
    """A sample of those that the test split has in the target language."""
    with lzma.open(TEST_SENTENCES, "rt", encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        texts = [row["english"] for row in rows if row["lang"] == arguments.tgt_lang]
    if not texts:
        raise ValueError(f"{TEST_SENTENCES} has no sentences with --tgt_lang {arguments.tgt_lang}")
    return random.Random(arguments.seed).sample(texts, min(arguments.num_sentences, len(texts)))


def _inputs(config: Any, input_ids: Tensor, attention_mask: Tensor, first: Tensor) -> dict[str, Tensor]:
    start = torch.full_like(first, config.decoder_start_token_id)
    decoder_input_ids = torch.cat([start, first], dim=1)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "decoder_input_ids": decoder_input_ids}


class ExpertCounts:
    """Steps of the decoder, and experts with at least one token in each call of an experts module."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.num_used: list[int] = []

    def count_step(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.num_steps += 1

    def count_used(self, module: Any, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
        self.num_used.append(int((inputs[1].unique() < module.num_experts).sum()))


@contextmanager
def counted_experts(model: Any) -> Iterator[ExpertCounts]:
    """Count in the decoder of a model."""
    counts, decoder = ExpertCounts(), model.get_decoder()
    hooks = [decoder.register_forward_pre_hook(counts.count_step)]
    for name, module in decoder.named_modules():
        if name.endswith(".experts"):
            hooks.append(module.register_forward_pre_hook(counts.count_used))
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


# ---- measuring ----


def generate(peer: Peer, batches: list[Batch], num_beams: int, device: str, cache: str | None = None) -> list[Tensor]:
    """int64[B, 2 + num_new_tokens] of each batch."""
    options = {"num_beams": num_beams, "do_sample": False, "use_cache": True, "cache_implementation": cache}
    outputs = []
    for batch in batches:
        inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
        length = {"min_new_tokens": batch.num_new_tokens, "max_new_tokens": batch.num_new_tokens}
        outputs.append(peer.model.generate(**inputs, **length, **options))
    return outputs


def measure(
    peers: list[Peer], batches: list[Batch], batch_size: int, num_beams: int, arguments: argparse.Namespace
) -> list[Result]:
    """A round to warm up and to count in, then `--rounds` in which the peers take turns."""
    on_gpu, cache = arguments.device == "cuda", arguments.cache_implementation
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {peer.name: [] for peer in peers}
    counts, outputs, peak_gib = {}, {}, {}
    for peer in peers:
        peer.prepare()
        with counted_experts(peer.model) as counts[peer.name]:
            outputs[peer.name] = generate(peer, batches, num_beams, arguments.device)
        if cache is not None:  # hooks that count are not part of what is compiled
            outputs[peer.name] = generate(peer, batches, num_beams, arguments.device, cache)
    for _ in range(arguments.rounds):
        for peer in peers:
            peer.prepare()
            if on_gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = clock()
            generate(peer, batches, num_beams, arguments.device, cache)
            if on_gpu:
                torch.cuda.synchronize()
                peak_gib[peer.name] = torch.cuda.max_memory_allocated() / 2**30
            seconds[peer.name].append(clock() - start)
    return [
        Result(
            peer.name,
            batch_size,
            num_beams,
            num_sentences=sum(len(batch.inputs["input_ids"]) for batch in batches),
            num_new_tokens=sum(len(batch.inputs["input_ids"]) * batch.num_new_tokens for batch in batches),
            seconds=seconds[peer.name],
            experts_per_step=statistics.mean(used) if (used := counts[peer.name].num_used) else None,
            equal_tokens=None if peer.name == DENSE else share_of_equal(outputs[peer.name], outputs[peers[0].name]),
            peak_gib=peak_gib.get(peer.name),
        )
        for peer in peers
    ]


def share_of_equal(outputs: list[Tensor], expected: list[Tensor]) -> float:
    """Of the tokens after the two that were given."""
    equal = [(a == b)[:, 2:].flatten() for a, b in zip(outputs, expected, strict=True)]
    return torch.cat(equal).float().mean().item()


def print_table(results: list[Result], title: str) -> None:
    """Ratios to grouped_mm and to the dense model, of the fastest rounds."""
    table = Table(
        "batch", "beams", "peer", "s (fastest)", "s (median)", "sentences/s", "new tokens/s", "x grouped_mm",
        "time / dense", "experts/step", "equal tokens", "peak GiB", title=title,
    )  # fmt: skip
    fastest = {(r.batch_size, r.num_beams, r.peer): min(r.seconds) for r in results}

    def shown(value: float | None, form: str) -> str:
        return "" if value is None else f"{value:{form}}"

    for r in results:
        best = min(r.seconds)
        grouped = fastest.get((r.batch_size, r.num_beams, "grouped_mm"))
        dense = fastest.get((r.batch_size, r.num_beams, DENSE))
        table.add_row(
            str(r.batch_size), str(r.num_beams), r.peer, f"{best:.3f}", f"{statistics.median(r.seconds):.3f}",
            f"{r.num_sentences / best:.2f}", f"{r.num_new_tokens / best:,.0f}",
            shown(grouped and grouped / best, ".2f"), shown(dense and best / dense, ".2f"),
            shown(r.experts_per_step, ".1f"), shown(r.equal_tokens, ".1%"), shown(r.peak_gib, ".2f"),
        )  # fmt: skip
    Console(width=175).print(table)


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def environment(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a model and its tokenizer; random weights without")
    parser.add_argument("--base", choices=[*BASES], default="0.6B", help="size of a model with random weights")
    parser.add_argument("--num_experts", type=int, default=16, help="of a model with random weights")
    parser.add_argument("--num_experts_per_tok", type=int, default=1, help="of a model with random weights")
    parser.add_argument("--peers", nargs="*", help="experts implementations, int8, dense")
    parser.add_argument("--device", choices=[*PEERS_OF_DEVICE], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="bfloat16 on GPUs, else float32")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall",
        help="cpu: seconds that the processor worked for this process, for a machine that others use; with --threads 1",
    )  # fmt: skip
    parser.add_argument("--batch_sizes", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--num_beams", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--source_length", type=int, default=32, help="tokens of a random sentence")
    parser.add_argument("--new_tokens", type=int, default=32, help="generated from a random sentence")
    parser.add_argument("--num_sentences", type=int, default=64, help="translated in each round")
    parser.add_argument("--tgt_lang", default="de")
    parser.add_argument("--cache_implementation", help="static: decoding is compiled, on GPUs into CUDA graphs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("generation.json"))
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if arguments.device == "cuda" else "float32"))
    torch.manual_seed(arguments.seed)

    peers = peers_of(arguments, dtype)
    about = environment(arguments) | {"dtype": str(dtype).removeprefix("torch.")}
    results: list[Result] = []
    for batch_size in arguments.batch_sizes:
        for num_beams in arguments.num_beams:
            if arguments.model is None:
                batches = random_batches(peers[0].model.config, batch_size, arguments)
            else:
                batches = translation_batches(peers[0], batch_size, num_beams, arguments)
            results += measure(peers, batches, batch_size, num_beams, arguments)
            written = {
                "environment": about,
                "arguments": {name: value if value is None else str(value) for name, value in vars(arguments).items()},
                "parameters": {peer.name: peer.model.num_parameters() for peer in peers},
                "results": [asdict(result) for result in results],
            }
            arguments.output.write_text(json.dumps(written, indent=1) + "\n")
    source = arguments.model.name if arguments.model else f"{arguments.base} x {arguments.num_experts}, random weights"
    print_table(results, f"{source}; {about['dtype']}, {about['device']}, {about['threads']} threads")


if __name__ == "__main__":
    main()
