"""Generation with experts that are not all on the device, beside all of them, a dense model and Accelerate's offload.

    python examples/benchmarks/bench_one_machine.py --output one_machine.json                    # NLLB-MoE's layout
    python examples/benchmarks/bench_one_machine.py --device cpu --layers 8 --d_model 512 --ffn_dim 2048 \
        --num_experts 64 --vocab_size 8000 --batch_sizes 4 --shares 0.25 --output one_machine_cpu.json

A folder of random weights in the layout is made first, matrix by matrix, experts as `hf-moe-ted quantize` stores them.
Routers choose as unevenly as those of examples/checkpoints/zcode_m3_demo do for one pair of languages (English to
German, validation text): by Zipf's law with an exponent of 1.1 in the encoder (0.8 to 1.4 by layer) and of 2.0 in the
decoder, whose experts are in another order in each layer. Every batch has sentences of its own, and tokens that are
generated are given: a random model would repeat one, and need the experts of one.

Rows: `resident`, all experts on the device; `memory`, a GPU whose memory is capped (`--caps`), or on a CPU a share of
the experts' bytes (`--shares`); `dense`, M2M100 in bfloat16 with as many active parameters; `accelerate`, transformers'
NLLB-MoE in bfloat16 with its layers in main memory where they do not fit under the cap. `resident-graphs` and
`dense-compiled` choose their tokens themselves, as captured searches take no tokens that are given. Each row runs in a
process of its own. The time of a decoding step is the difference between generating many tokens and one, divided by
the number of steps; that of the prefill is what one token takes. The file is written after each row.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import convert_file_size_to_int
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    M2M100Config,
    M2M100ForConditionalGeneration,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
)

from hf_moe_ted import ExpertMemory, ExpertQuantizationConfig, ZCodeM3Config, ZCodeM3ForConditionalGeneration

GB = 10**9
COLUMNS = ("row", "batch", "prefill ms", "step ms", "tokens/s", "hits", "MB copied/step", "device GB", "process GB")
STD_OF_GUMBEL_NOISE = 1.28  # with which the largest of log p + noise is drawn from p
STD_OF_INTEGERS = {4: 4.32, 8: 73.6}  # even on -7 to 7, on -127 to 127


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON")
    parser.add_argument("--folder", type=Path, help="of the random model; is made, and stays, if it is named")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--layers", type=int, default=24, help="of the encoder, and of the decoder")
    parser.add_argument("--sparse_step", type=int, default=4)
    parser.add_argument("--d_model", type=int, default=2048)
    parser.add_argument("--ffn_dim", type=int, default=8192)
    parser.add_argument("--num_experts", type=int, default=128)
    parser.add_argument("--vocab_size", type=int, default=256_206)
    parser.add_argument("--bits", type=int, default=4, choices=[4, 8])
    parser.add_argument("--group_size", type=int, default=128, help="with 4 bits")
    parser.add_argument("--encoder_zipf", type=float, default=1.1)
    parser.add_argument("--decoder_zipf", type=float, default=2.0)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--source_length", type=int, default=128)
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--caps", nargs="+", default=["24GB", "8GB"], help="memory of the GPU")
    parser.add_argument("--reserve", default="2500MB", help="of a cap, for activations and what CUDA takes")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25], help="on a CPU, of the experts' bytes")
    parser.add_argument("--experts_in", default="auto", choices=["auto", "memory", "files"])
    parser.add_argument("--rows", nargs="+", help="only these, with or without a cap")
    parser.add_argument("--isolate", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--clock",
        default="wall",
        choices=["wall", "cpu"],
        help="cpu: time of the processor, for a machine that is busy",
    )
    parser.add_argument("--row", help=argparse.SUPPRESS)  # one of them, in this process
    return parser.parse_args()


# ---- random models ----


def config_of(arguments: argparse.Namespace) -> ZCodeM3Config:
    heads = max(1, arguments.d_model // 128)
    return ZCodeM3Config(
        vocab_size=arguments.vocab_size, d_model=arguments.d_model, encoder_layers=arguments.layers,
        decoder_layers=arguments.layers, encoder_ffn_dim=arguments.ffn_dim, decoder_ffn_dim=arguments.ffn_dim,
        encoder_attention_heads=heads, decoder_attention_heads=heads, num_experts=arguments.num_experts,
        num_experts_per_tok=2, encoder_sparse_step=arguments.sparse_step, decoder_sparse_step=arguments.sparse_step,
        router_bias=True, max_position_embeddings=1024,
    )  # fmt: skip


def write_model(folder: Path, arguments: argparse.Namespace) -> None:
    """A folder as `hf-moe-ted quantize --dtype bfloat16` makes it, a file for each MoE layer and one for the rest."""
    config = config_of(arguments)
    with torch.device("meta"):
        model = ZCodeM3ForConditionalGeneration(config)
    rest = {
        name: random_weight(name, spec)
        for name, spec in model.state_dict().items()
        if ".experts." not in name and name not in model.all_tied_weights_keys
    }
    add_uneven_routers(rest, arguments)
    files = {"model-rest.safetensors": list(rest)}
    save_file(rest, folder / "model-rest.safetensors", metadata={"format": "pt"})
    layers = sorted({name.partition(".experts.")[0] for name in model.state_dict() if ".experts." in name})
    for layer in layers:
        tensors = random_experts(f"{layer}.experts", arguments)
        files[f"{layer}.safetensors"] = list(tensors)
        save_file(tensors, folder / f"{layer}.safetensors", metadata={"format": "pt"})
    weight_map = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    group_size = arguments.group_size if arguments.bits == 4 else None
    config.quantization_config = ExpertQuantizationConfig(arguments.bits, group_size)
    config.dtype, config.architectures = torch.bfloat16, ["ZCodeM3ForConditionalGeneration"]
    config.save_pretrained(folder)


def random_weight(name: str, spec: Tensor) -> Tensor:
    """Outputs of every layer have about the size of its inputs."""
    if spec.ndim == 1:
        return torch.full(spec.shape, float(name.endswith("norm.weight")), dtype=torch.bfloat16)
    return torch.randn(spec.shape, dtype=torch.bfloat16) * spec.shape[-1] ** -0.5


def add_uneven_routers(weights: dict[str, Tensor], arguments: argparse.Namespace) -> None:
    for name in [name for name in weights if name.endswith("router.weight")]:
        weights[name] *= STD_OF_GUMBEL_NOISE
        exponent = arguments.encoder_zipf if ".encoder." in name else arguments.decoder_zipf
        ranks = torch.randperm(arguments.num_experts) + 1
        weights[name.replace("weight", "bias")] = (-exponent * ranks.log()).bfloat16()


def random_experts(prefix: str, arguments: argparse.Namespace) -> dict[str, Tensor]:
    """Experts differ in the order of their rows: more random numbers would take minutes."""
    tensors = {}
    for name, num_outputs, num_inputs in (
        ("up_proj", arguments.ffn_dim, arguments.d_model),
        ("down_proj", arguments.d_model, arguments.ffn_dim),
    ):
        scale = num_inputs**-0.5 / STD_OF_INTEGERS[arguments.bits]
        if arguments.bits == 4:
            low, high = torch.randint(1, 16, (2, num_outputs, num_inputs // 2), dtype=torch.uint8)
            one, num_groups = low | (high << 4), num_inputs // arguments.group_size
        else:
            one, num_groups = torch.randint(-127, 128, (num_outputs, num_inputs), dtype=torch.int8), 1
        packed = torch.empty(arguments.num_experts, *one.shape, dtype=one.dtype)
        for expert, rows in enumerate(packed):
            rows.copy_(one.roll(expert, dims=0))
        tensors[f"{prefix}.{name}_packed"] = packed
        shape = (arguments.num_experts, num_outputs, num_groups)
        tensors[f"{prefix}.{name}_scale"] = torch.full(shape, scale, dtype=torch.bfloat16)
        tensors[f"{prefix}.{name}_bias"] = torch.zeros(shape[:2], dtype=torch.bfloat16)
    return tensors


def dense_model(arguments: argparse.Namespace) -> Any:
    """As many active parameters: a sparse layer's two experts are a dense one of twice the width, shared out."""
    config = config_of(arguments)
    num_sparse = len(config.sparse_layers("encoder"))
    width = round(arguments.ffn_dim * (1 + num_sparse / arguments.layers) / 8) * 8
    names = ("vocab_size", "d_model", "encoder_layers", "decoder_layers", "encoder_attention_heads")
    names += ("decoder_attention_heads", "max_position_embeddings")
    fields = {name: getattr(config, name) for name in names} | {"encoder_ffn_dim": width, "decoder_ffn_dim": width}
    with torch.device(arguments.device):
        return M2M100ForConditionalGeneration._from_config(M2M100Config(**fields), dtype=torch.bfloat16).eval()


def accelerate_model(arguments: argparse.Namespace, cap: int) -> Any:
    """transformers' class with the layers in main memory that do not fit under the cap, its experts in a loop.

    All weights are the same, so that every token goes to the same two experts: the least that can be copied. The class
    sends all tokens to two experts whatever the weights are.
    """
    fields = {
        name: getattr(config_of(arguments), name) for name in ("vocab_size", "d_model", "max_position_embeddings")
    }
    for side in ("encoder", "decoder"):
        fields |= {f"{side}_layers": arguments.layers, f"{side}_ffn_dim": arguments.ffn_dim}
        fields |= {f"{side}_sparse_step": arguments.sparse_step}
    with torch.device("meta"):
        model: Any = NllbMoeForConditionalGeneration(NllbMoeConfig(**fields, num_experts=arguments.num_experts))
    model = model.bfloat16().eval()
    model.set_experts_implementation("eager")  # others make copies of the experts of every token
    need, have = sum(p.nbytes for p in model.parameters()), free_memory()
    if need > have:
        raise MemoryError(f"its weights take {need / GB:.0f} GB of main memory, {have / GB:.0f} GB are free")
    model = model.to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):  # random numbers would take minutes
            tensor.fill_(0.01)
    memory: dict[int | str, int] = {"cpu": have}
    if arguments.device == "cuda":
        memory[0] = cap - convert_file_size_to_int(arguments.reserve)
    device_map = infer_auto_device_map(model, memory, no_split_module_classes=list(model._no_split_modules or ()))
    return dispatch_model(model, device_map)


def free_memory() -> int:
    """Bytes of main memory that can be had, what files are cached in included."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


# ---- rows ----


def rows_of(arguments: argparse.Namespace) -> list[str]:
    if arguments.device == "cuda":
        names = ["dense", "dense-compiled", "resident", "resident-graphs"]
        names += [f"{kind} {cap}" for cap in arguments.caps for kind in ("memory", "accelerate")]
    else:
        names = ["dense", "resident", *(f"memory {share}" for share in arguments.shares)]
    return [name for name in names if arguments.rows is None or {name, name.partition(" ")[0]} & {*arguments.rows}]


def load(row: str, arguments: argparse.Namespace) -> Any:
    kind, _, limit = row.partition(" ")
    kind = kind.partition("-")[0]
    if kind == "dense":
        return dense_model(arguments)
    if kind == "resident":
        return ZCodeM3ForConditionalGeneration.from_pretrained(arguments.folder, dtype="auto").to(arguments.device)
    if arguments.device == "cuda":
        cap = convert_file_size_to_int(limit)
        torch.cuda.set_per_process_memory_fraction(cap / torch.cuda.get_device_properties(0).total_memory)
        if kind == "accelerate":
            return accelerate_model(arguments, cap)
        size = cap - bytes_of_files(arguments, ".experts.", False) - convert_file_size_to_int(arguments.reserve)
        if size <= 0:
            raise MemoryError(f"{limit} is less than what all but experts takes")
    else:
        size = int(bytes_of_files(arguments, ".experts.", True) * float(limit))
    memory = ExpertMemory(size, experts_in=arguments.experts_in)
    return ZCodeM3ForConditionalGeneration.from_pretrained(
        arguments.folder, dtype="auto", expert_memory=memory, device_map=arguments.device
    )


def bytes_of_files(arguments: argparse.Namespace, part: str, has_part: bool) -> int:
    weight_map = json.loads((arguments.folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = {file for name, file in weight_map.items() if (part in name) == has_part}
    return sum((arguments.folder / file).stat().st_size for file in files)


def measure(row: str, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A result for each batch size."""
    torch.manual_seed(0)
    model = load(row, arguments)
    cache = getattr(model, "expert_memory", None)
    seed = iter(range(10**6))
    for batch_size in arguments.batch_sizes:
        timed: dict[int, list[float]] = {1: [], arguments.new_tokens: []}
        copied = {1: 0, arguments.new_tokens: 0}
        hits = 1.0
        for round_number in range(arguments.rounds + 1):
            for num_tokens in timed:
                seconds = generate(row, model, batch_size, num_tokens, next(seed), arguments)
                if cache is not None:
                    counts = cache.statistics()
                    cache.reset_statistics()
                    hits = counts.hit_rate
                if round_number:  # the first one warms up
                    timed[num_tokens].append(seconds)
                    copied[num_tokens] += counts.num_bytes_copied if cache is not None else 0
        prefill_s, all_s = (statistics.median(of_length) for of_length in timed.values())
        steps = arguments.new_tokens - 1
        step_s = (all_s - prefill_s) / steps
        yield {
            "row": row,
            "batch_size": batch_size,
            "prefill_ms": prefill_s * 1000,
            "step_ms": step_s * 1000,
            "tokens_per_s": batch_size / step_s,
            "hit_rate": None if cache is None else hits,
            "bytes_copied_per_step": None if cache is None else
            (copied[arguments.new_tokens] - copied[1]) / arguments.rounds / steps,
            "bytes_copied_per_prefill": None if cache is None else copied[1] / arguments.rounds,
            "device_bytes": torch.cuda.max_memory_allocated() if arguments.device == "cuda" else None,
            "process_bytes": peak_of_process(),
            "seconds": timed,
        }  # fmt: skip


class GivenTokens(LogitsProcessor):
    """Leaves one token at each step: those of int64[batch, steps]."""

    def __init__(self, tokens: Tensor):
        self._tokens = tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        given = self._tokens[:, input_ids.shape[1] - 1, None]
        return torch.full_like(scores, -torch.inf).scatter(1, given, 0.0)


@torch.inference_mode()
def generate(row: str, model: Any, batch_size: int, num_tokens: int, seed: int, arguments: argparse.Namespace) -> float:
    """Seconds for sentences that no other call has."""
    generator = torch.Generator().manual_seed(seed)
    ids, given = (
        torch.randint(4, arguments.vocab_size, (batch_size, length), generator=generator).to(arguments.device)
        for length in (arguments.source_length, num_tokens)
    )
    options: dict[str, Any] = {
        "dense-compiled": {"cache_implementation": "static"},
        "resident-graphs": {"cuda_graphs": True},
    }.get(row, {"logits_processor": LogitsProcessorList([GivenTokens(given)])})
    if row.startswith("resident"):
        options.setdefault("cuda_graphs", False)
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    synchronize(arguments)
    start = clock()
    model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, min_new_tokens=num_tokens,
        do_sample=False, num_beams=1, **options,
    )  # fmt: skip
    synchronize(arguments)
    return clock() - start


def synchronize(arguments: argparse.Namespace) -> None:
    if arguments.device == "cuda":
        torch.cuda.synchronize()


def peak_of_process() -> int | None:
    """Bytes of main memory, at most; `None` where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def results_of(row: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Those of a row, in a process of its own; if it fails, why."""
    if not arguments.isolate:
        return list(measure(row, arguments))
    command = [sys.executable, *sys.argv, "--folder", str(arguments.folder), "--row", row]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return [{"row": row, "failed": lines[-1]}]
    return json.loads(done.stdout.strip().splitlines()[-1])


# ---- output ----


def device_name(arguments: argparse.Namespace) -> str:
    if arguments.device == "cuda":
        return torch.cuda.get_device_name()
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{names[0].partition(': ')[2]}, {torch.get_num_threads()} threads" if names else "CPU"


def table_of(results: list[dict[str, Any]]) -> Table:
    table = Table(*COLUMNS)
    for result in results:
        if "failed" in result:
            table.add_row(result["row"], "", result["failed"])
            continue
        hits, copied = result["hit_rate"], result["bytes_copied_per_step"]
        in_gb = (
            "" if result[name] is None else f"{result[name] / GB:.2f}" for name in ("device_bytes", "process_bytes")
        )
        table.add_row(
            result["row"], str(result["batch_size"]), f"{result['prefill_ms']:.1f}", f"{result['step_ms']:.2f}",
            f"{result['tokens_per_s']:.1f}", "" if hits is None else f"{hits:.1%}",
            "" if copied is None else f"{copied / 1e6:.2f}", *in_gb,
        )  # fmt: skip
    return table


def main() -> None:
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.row:
        print(json.dumps(list(measure(arguments.row, arguments))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        arguments.folder = arguments.folder or Path(temporary)
        arguments.folder.mkdir(exist_ok=True)
        if not (arguments.folder / "config.json").is_file():
            write_model(arguments.folder, arguments)
        written: dict[str, Any] = {
            "device": device_name(arguments),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "arguments": {name: str(value) for name, value in vars(arguments).items()},
            "bytes_of_experts": bytes_of_files(arguments, ".experts.", True),
            "bytes_of_all_else": bytes_of_files(arguments, ".experts.", False),
            "results": [],
        }
        for row in rows_of(arguments):
            written["results"] += results_of(row, arguments)
            arguments.output.write_text(json.dumps(written, indent=1) + "\n")
    Console(width=160).print(table_of(written["results"]))


if __name__ == "__main__":
    main()
