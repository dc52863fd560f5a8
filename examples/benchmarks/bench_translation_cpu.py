"""Whole translations with beams on a CPU: processor time of one thread, peers in turn, the least of some rounds.

    taskset -c 0 python examples/benchmarks/bench_translation_cpu.py
    taskset -c 0 python examples/benchmarks/bench_translation_cpu.py --d_model 1024 --num_layers 12 --vocab_size 128112
    taskset -c 0 python examples/benchmarks/bench_translation_cpu.py --isa avx2

Random weights and a fixed number of tokens. Ours has 8 experts in every other layer, one for each token; "dense" is
M2M100 of the same active size, in transformers and, if it is installed, in CTranslate2. `--isa avx2` keeps all of them
to what a processor without AVX-512, VNNI and AMX has.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "CT2_FORCE_CPU_ISA": "AVX2",
    "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}
BASE = "CTranslate2 dense int8"
Peer = Callable[[], Any]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d_model", type=int, default=512)
    parser.add_argument("--num_layers", type=int, default=6)
    parser.add_argument("--vocab_size", type=int, default=32_000)
    parser.add_argument("--num_experts", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--source_length", type=int, default=24)
    parser.add_argument("--new_tokens", type=int, default=16)
    parser.add_argument("--num_beams", type=int, default=4)
    parser.add_argument("--num_rounds", type=int, default=5)
    parser.add_argument("--peers", help="comma-separated, each with a part of its name; default: all")
    parser.add_argument("--isa", choices=("native", "avx2"), default="native")
    parser.add_argument("--output", type=Path, help="JSON file with the seconds of all rounds")
    return parser.parse_args()


def keep_to(isa: str) -> None:
    """Start this script again with the variables of `--isa`, which libraries read once, unless they are set."""
    if isa == "avx2" and any(os.environ.get(name) != value for name, value in AVX2.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **AVX2})


def dense_model(arguments: argparse.Namespace) -> Any:
    from transformers import M2M100Config, M2M100ForConditionalGeneration

    return M2M100ForConditionalGeneration(M2M100Config(**shape(arguments))).eval()


def our_model(arguments: argparse.Namespace) -> Any:
    from hf_moe_ted import ZCodeM3Config, ZCodeM3ForConditionalGeneration

    config = ZCodeM3Config(**shape(arguments), num_experts=arguments.num_experts, num_experts_per_tok=1)
    return ZCodeM3ForConditionalGeneration(config).eval()


def shape(arguments: argparse.Namespace) -> dict[str, int]:
    width, layers = arguments.d_model, arguments.num_layers
    sides: dict[str, int] = {}
    for side in ("encoder", "decoder"):
        sides |= {f"{side}_layers": layers, f"{side}_ffn_dim": 4 * width, f"{side}_attention_heads": width // 64}
    return {"vocab_size": arguments.vocab_size, "d_model": width, "max_position_embeddings": 256, **sides}


def ctranslate2_peers(dense: Any, ids: Any, arguments: argparse.Namespace, folder: str) -> Iterator[tuple[str, Peer]]:
    try:
        import ctranslate2
        from ctranslate2.converters.transformers import M2M100Loader
    except ImportError:
        print("ctranslate2 is not installed: its rows are left out", file=sys.stderr)
        return
    words = ["<s>", "<pad>", "</s>", "<unk>", *(f"w{index}" for index in range(4, arguments.vocab_size))]
    source = [[words[index] for index in row] for row in ids.tolist()]
    length = arguments.new_tokens
    for precision in ("int8", "float32"):
        spec = M2M100Loader().get_model_spec(dense.requires_grad_(False))
        spec.register_source_vocabulary(words)
        spec.register_target_vocabulary(words)
        spec.config.bos_token, spec.config.eos_token = "<s>", "</s>"
        spec.config.unk_token, spec.config.decoder_start_token = "<unk>", "</s>"
        spec.validate()
        spec.optimize(quantization=None if precision == "float32" else precision)
        saved = Path(folder, precision)
        saved.mkdir()
        spec.save(str(saved))
        translator = ctranslate2.Translator(str(saved), compute_type=precision, inter_threads=1, intra_threads=1)
        options = {
            "beam_size": arguments.num_beams, "min_decoding_length": length, "max_decoding_length": length
        }  # fmt: skip
        yield (
            f"CTranslate2 dense {precision}",
            lambda translator=translator, options=options: translator.translate_batch(source, **options),
        )


def torch_peers(dense: Any, ids: Any, arguments: argparse.Namespace) -> Iterator[tuple[str, Peer]]:
    import torch

    from hf_moe_ted import quantize_experts

    options = {
        "num_beams": arguments.num_beams, "min_new_tokens": arguments.new_tokens,
        "max_new_tokens": arguments.new_tokens, "do_sample": False,
    }  # fmt: skip
    ours = our_model(arguments)
    models = {"transformers dense float32": lambda: dense, "ours float32": lambda: ours}
    for what in ("experts", "all"):
        models[f"ours int8 {what}"] = lambda what=what: quantize_experts(ours, what=what)
    for name, make in models.items():
        if is_wanted(name, arguments):
            with torch.inference_mode(False):
                model = make()
            yield name, lambda model=model: model.generate(ids, **options)


def is_wanted(name: str, arguments: argparse.Namespace) -> bool:
    return arguments.peers is None or any(part.strip() in name for part in arguments.peers.split(","))


@contextmanager
def peers_of(arguments: argparse.Namespace) -> Iterator[dict[str, Peer]]:
    import torch

    torch.manual_seed(0)
    dense = dense_model(arguments)
    ids = torch.randint(10, arguments.vocab_size, (arguments.batch_size, arguments.source_length))
    with tempfile.TemporaryDirectory() as folder:
        peers = {
            name: peer for name, peer in ctranslate2_peers(dense, ids, arguments, folder) if is_wanted(name, arguments)
        }
        yield peers | dict(torch_peers(dense, ids, arguments))


def measure(peers: dict[str, Peer], num_rounds: int) -> dict[str, list[float]]:
    """Seconds of processor time of each round, after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    for round_number in range(num_rounds + 1):
        for name, peer in peers.items():
            start = time.process_time()
            peer()
            if round_number > 0:
                seconds[name].append(time.process_time() - start)
    return seconds


def main() -> None:
    arguments = parse_arguments()
    keep_to(arguments.isa)
    import torch

    torch.set_num_threads(1)
    with peers_of(arguments) as peers, torch.inference_mode():
        seconds = measure(peers, arguments.num_rounds)
    least = {name: min(of_peer) for name, of_peer in seconds.items()}
    base = least.get(BASE, min(least.values()))
    print(f"d_model {arguments.d_model}, layers {arguments.num_layers}, words {arguments.vocab_size}, {arguments.isa}")
    for name, of_peer in least.items():
        rate = arguments.batch_size / of_peer
        print(f"{name:28s} {of_peer:7.2f} s {rate:7.1f} sentences/s {of_peer / base:6.2f} x")
    if arguments.output:
        arguments.output.write_text(json.dumps({"arguments": vars(arguments), "seconds": seconds}, default=str))


if __name__ == "__main__":
    main()
