"""Time and error of one layer of experts on a CPU, implementation by implementation, beside a dense feed-forward.

    python examples/benchmarks/bench_experts_cpu.py --output experts_cpu.json

Random weights, inputs and top-k choices; errors are relative to a float64 reference. Peers take turns. A turn of few
tokens is several passes with other tokens, 16 in all, as in a model whose layers follow one another: their
weights do not fit the cache. By default one thread, and the time that the processor worked for it, which others on the
same machine disturb least; ratios are those of the fastest turns.
"""

import argparse
import json
import os
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from bench_generation import DENSE, Peer, cpu_name
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_moe_ted import ZCodeM3Config, ZCodeM3ForConditionalGeneration, quantize_experts

Case = tuple[Tensor, Tensor, Tensor]
LAYER = "model.encoder.layers.0.ffn.experts"
FLOAT32_PEERS = ("eager", "grouped_mm", "zcode_grouped", "zcode_cpu")
MAX_TOKENS_OF_BATCHED_MM = 16  # it copies the weights for every token
MIN_TOKENS_PER_TURN = 16


@dataclass(frozen=True)
class Result:
    """One line of the table.

    Attributes:
        milliseconds: of one pass, mean of every turn.
        error: `||output - exact|| / ||exact||`; `None` for the dense layer, which computes something else.
    """

    peer: str
    num_tokens: int
    milliseconds: list[float]
    error: float | None


@dataclass(frozen=True)
class Models:
    """The same layer, as the peers have it."""

    float32: Any
    bfloat16: Any
    int8: Any
    dense: nn.Module


def make_model(arguments: argparse.Namespace) -> ZCodeM3ForConditionalGeneration:
    """One sparse layer that matters; outputs of every linear layer have about the size of its inputs."""
    config = ZCodeM3Config(
        vocab_size=8, d_model=arguments.d_model, encoder_layers=1, decoder_layers=1, encoder_sparse_step=1,
        decoder_sparse_step=0, encoder_ffn_dim=arguments.ffn_dim, decoder_ffn_dim=8, num_experts=arguments.num_experts,
        num_experts_per_tok=arguments.num_experts_per_tok, max_position_embeddings=8, activation_dropout=0.0,
    )  # fmt: skip
    model = ZCodeM3ForConditionalGeneration(config).eval()
    for name, parameter in model.get_submodule(LAYER).named_parameters():
        nn.init.normal_(parameter, std=0.1 if name.endswith("bias") else parameter.shape[-1] ** -0.5)
    return model


def peers_of(models: Models, num_tokens: int) -> list[Peer]:
    """The peers that this installation has."""
    registered = {"eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()}
    implementations = [
        *((name, models.float32, name) for name in FLOAT32_PEERS),
        ("batched_mm", models.float32, "batched_mm"),
        ("bf16 grouped_mm", models.bfloat16, "grouped_mm"),
        ("bf16 zcode_cpu", models.bfloat16, "zcode_cpu"),
        ("int8 weights only", models.int8, "eager"),
        ("int8 zcode_cpu", models.int8, "zcode_cpu"),
    ]
    peers = [Peer(*fields) for fields in implementations if fields[2] in registered]
    if num_tokens > MAX_TOKENS_OF_BATCHED_MM:
        peers = [peer for peer in peers if peer.name != "batched_mm"]
    return [*peers, Peer(DENSE, models.dense, None)]


def run(peer: Peer, case: Case) -> Tensor:
    """float[T, D], one pass."""
    hidden, ids, weights = case
    if peer.name == DENSE:
        return peer.model(hidden)
    dtype = peer.model.dtype
    return peer.model.get_submodule(LAYER)(hidden.to(dtype), ids, weights.to(dtype))


def reference(experts: Any, case: Case) -> Tensor:
    """float64[T, D], expert by expert."""
    hidden, ids, weights = case
    output = torch.zeros_like(hidden, dtype=torch.float64)
    for expert in range(experts.num_experts):
        token, slot = torch.where(ids == expert)
        inner = hidden[token].double() @ experts.up_proj[expert].double().T + experts.up_proj_bias[expert]
        down = inner.relu() @ experts.down_proj[expert].double().T + experts.down_proj_bias[expert]
        output.index_add_(0, token, down * weights[token, slot, None])
    return output


def make_models(arguments: argparse.Namespace) -> Models:
    model, twin = make_model(arguments), make_model(arguments)
    twin.load_state_dict(model.state_dict())
    width = arguments.num_experts_per_tok * arguments.ffn_dim
    dense = nn.Sequential(nn.Linear(arguments.d_model, width), nn.ReLU(), nn.Linear(width, arguments.d_model))
    return Models(model, twin.bfloat16(), quantize_experts(model), dense)


def random_case(num_tokens: int, seed: int, arguments: argparse.Namespace) -> Case:
    """float[T, D], int64[T, K] and float[T, K]; every expert equally likely."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, arguments.d_model, generator=generator)
    probabilities, ids = torch.rand(num_tokens, arguments.num_experts, generator=generator).topk(
        arguments.num_experts_per_tok
    )
    return hidden, ids, probabilities


@torch.no_grad()
def measure(models: Models, num_tokens: int, arguments: argparse.Namespace) -> list[Result]:
    num_calls = max(MIN_TOKENS_PER_TURN // num_tokens, 1)
    cases = [random_case(num_tokens, arguments.seed + call, arguments) for call in range(num_calls)]
    exact = torch.cat([reference(models.float32.get_submodule(LAYER), case) for case in cases])
    peers = peers_of(models, num_tokens)
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    errors: dict[str, float | None] = {}
    for peer in peers:
        peer.prepare()
        output = torch.cat([run(peer, case) for case in cases])
        errors[peer.name] = None if peer.name == DENSE else ((output.double() - exact).norm() / exact.norm()).item()
    milliseconds: dict[str, list[float]] = {peer.name: [] for peer in peers}
    start = time.perf_counter()
    while time.perf_counter() - start < arguments.seconds or len(milliseconds[DENSE]) < arguments.min_turns:
        for peer in peers:
            peer.prepare()
            before = clock()
            for case in cases:
                run(peer, case)
            milliseconds[peer.name].append((clock() - before) * 1e3 / num_calls)
    return [Result(name, num_tokens, milliseconds[name], errors[name]) for name in milliseconds]


def print_table(results: list[Result], title: str) -> None:
    table = Table("tokens", "peer", "ms (fastest)", "ms (median)", "x grouped_mm", "time / dense", "error", title=title)
    fastest = {(r.num_tokens, r.peer): min(r.milliseconds) for r in results}
    for r in results:
        best = min(r.milliseconds)
        table.add_row(
            str(r.num_tokens), r.peer, f"{best:.2f}", f"{statistics.median(r.milliseconds):.2f}",
            f"{fastest[r.num_tokens, 'grouped_mm'] / best:.2f}", f"{best / fastest[r.num_tokens, DENSE]:.2f}",
            "" if r.error is None else f"{r.error:.1e}",
        )  # fmt: skip
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 16, 128, 512])
    parser.add_argument("--num_experts", type=int, default=16)
    parser.add_argument("--num_experts_per_tok", type=int, default=1)
    parser.add_argument("--d_model", type=int, default=1024)
    parser.add_argument("--ffn_dim", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=["cpu", "wall"], default="cpu", help="wall for several threads")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each number of tokens")
    parser.add_argument("--min_turns", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("experts_cpu.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)

    models = make_models(arguments)
    about = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": arguments.threads,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    results: list[Result] = []
    for num_tokens in arguments.tokens:
        results += measure(models, num_tokens, arguments)
        written = {
            "environment": about,
            "arguments": {name: str(value) for name, value in vars(arguments).items()},
            "results": [asdict(result) for result in results],
        }
        arguments.output.write_text(json.dumps(written, indent=1) + "\n")
    shape = f"{arguments.num_experts} experts of {arguments.d_model} x {arguments.ffn_dim}"
    print_table(results, f"{shape}; {about['cpu']}, {arguments.threads} threads, {arguments.clock} time")


if __name__ == "__main__":
    main()
