"""Generation with experts that are not all on the device, beside all of them, a dense model and Accelerate's offload.

    python examples/benchmarks/bench_one_machine.py --output one_machine.json                    # NLLB-MoE's layout
    python examples/benchmarks/bench_one_machine.py --device cpu --layers 8 --d_model 512 --ffn_dim 2048 \
        --num_experts 64 --vocab_size 8000 --batch_sizes 4 --shares 0.25 --output one_machine_cpu.json

A folder of random weights in the layout is made first, experts as `hf-moe-ted quantize` stores them, the same in each
layer. Routers choose as unevenly as those of the model that was shipped until 2026-11-30 did for one pair of languages
(English to German, validation text): by Zipf's law with an exponent of 1.1 in the encoder (0.8 to 1.4 by layer) and of
2.0 in the decoder, whose experts are in another order in each layer. Every batch has sentences of its own, and tokens
that are generated are given: a random model would repeat one, and need the experts of one.

Rows: `resident`, all experts on the device; `memory`, a GPU whose memory is capped (`--caps`), or on a CPU a share of
the experts' bytes (`--shares`); `memory-all`, the same with all else in int8, as `--what all` stores it; `dense`,
M2M100 in bfloat16 with as many active parameters; `accelerate`, transformers' NLLB-MoE in bfloat16 with the device map
that Accelerate makes for the cap, and if that has nothing on the GPU all in main memory; `accelerate-experts`, the same
with a device map made by hand: all but experts on the GPU, and as many of the decoder's experts as there is room for.
`resident-graphs` and `dense-compiled` choose their tokens themselves, as captured searches take no given ones.

Each row runs in a process of its own. The time of a decoding step is the difference between generating many tokens and
one, divided by the number of steps; that of the prefill is what one token takes. Of Accelerate, which copies for longer
than anything else takes, both are times within one generation. Rounds that warm up are not counted; graphs are made in
two of them. The file is written after each row.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import cpu_offload, dispatch_model, infer_auto_device_map, init_empty_weights
from accelerate.utils import convert_file_size_to_int
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    M2M100Config,
    M2M100ForConditionalGeneration,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
)
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeExperts

from hf_moe_ted import ExpertMemory, ExpertQuantizationConfig, ZCodeM3Config, ZCodeM3ForConditionalGeneration

GB = 10**9
COLUMNS = ("row", "batch", "prefill ms", "step ms", "tokens/s", "hits", "MB copied/step", "device GB", "process GB")
MEMORY_ROWS = ("memory", "memory-all")
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
    parser.add_argument("--rounds", type=int, default=3, help="that are timed; their median counts")
    parser.add_argument("--caps", nargs="+", default=["24GB", "8GB"], help="memory of the GPU")
    parser.add_argument("--reserve", default="2500MB", help="of a cap, for activations and what CUDA takes")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25], help="on a CPU, of the experts' bytes")
    parser.add_argument("--experts_in", default="auto", choices=["auto", "memory", "files"])
    parser.add_argument("--rows", nargs="+", help="only these, with or without a cap")
    parser.add_argument("--max_seconds", type=float, help="of a row, if it is isolated")
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
    """A folder as `hf-moe-ted quantize --dtype bfloat16 --what NAME` makes it, where NAME is its own.

    Files of experts, one for each MoE layer, stand in the folder above, for several such folders.
    """
    config, what = config_of(arguments), folder.name
    with torch.device("meta"):
        model = ZCodeM3ForConditionalGeneration(config)
    folder.mkdir(exist_ok=True)
    specs = model.state_dict()
    rest = random_weights(
        {n: spec for n, spec in specs.items() if ".experts." not in n and n not in model.all_tied_weights_keys},
        arguments,
    )
    if what == "all":
        rest = dict(item for name, weight in rest.items() for item in in_int8(name, weight).items())
    files = {"model-rest.safetensors": list(rest)}
    save_file(rest, folder / "model-rest.safetensors", metadata={"format": "pt"})
    experts = {}
    for layer in sorted({name.partition(".experts.")[0] for name in specs if ".experts." in name}):
        experts = experts or random_experts(arguments)
        tensors = {f"{layer}.experts.{name}": tensor for name, tensor in experts.items()}
        files[f"{layer}.safetensors"] = list(tensors)
        link, file = (where / f"{layer}.safetensors" for where in (folder, arguments.folder))
        if not file.is_file():
            save_file(tensors, file.with_suffix(".part"), metadata={"format": "pt"})
            file.with_suffix(".part").rename(file)
        link.unlink(missing_ok=True)
        link.hardlink_to(file)
    weight_map = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    group_size = arguments.group_size if arguments.bits == 4 else None
    config.quantization_config = ExpertQuantizationConfig(arguments.bits, group_size, what=what)
    config.dtype, config.architectures = torch.bfloat16, ["ZCodeM3ForConditionalGeneration"]
    config.save_pretrained(folder)  # last: a folder that has it is whole


def random_weights(specs: dict[str, Tensor], arguments: argparse.Namespace) -> dict[str, Tensor]:
    """All but experts, in bfloat16: outputs of every layer have about the size of its inputs; routers are uneven."""
    weights = {name: random_weight(name, spec, arguments) for name, spec in specs.items()}
    for name in [name for name in weights if ".router." in name and name.endswith(".weight")]:
        weights[name] *= STD_OF_GUMBEL_NOISE
        exponent = arguments.encoder_zipf if ".encoder." in name else arguments.decoder_zipf
        ranks = torch.randperm(arguments.num_experts) + 1
        weights[name.replace("weight", "bias")] = (-exponent * ranks.log()).bfloat16()
    return weights


def random_weight(name: str, spec: Tensor, arguments: argparse.Namespace) -> Tensor:
    if spec.ndim == 1:
        return torch.full(spec.shape, float(name.endswith("norm.weight")), dtype=torch.bfloat16)
    numbers = torch.randn(spec.shape, dtype=torch.bfloat16, device=arguments.device)  # a CPU would take a minute
    return (numbers * spec.shape[-1] ** -0.5).cpu()


def in_int8(name: str, weight: Tensor) -> dict[str, Tensor]:
    """A matrix as `--what all` stores it: other integers of the same size."""
    if weight.ndim == 1 or ".router." in name:
        return {name: weight}
    scale = torch.full((len(weight), 1), weight.shape[-1] ** -0.5 / STD_OF_INTEGERS[8], dtype=torch.bfloat16)
    integers = torch.randint(-127, 128, (1, weight.shape[-1]), dtype=torch.int8)
    packed = torch.cat([integers.roll(row, dims=1) for row in range(min(len(weight), 1024))])
    repeats = -(-len(weight) // len(packed))
    return {f"{name}_packed": packed.repeat(repeats, 1)[: len(weight)].clone(), f"{name}_scale": scale}


def random_experts(arguments: argparse.Namespace) -> dict[str, Tensor]:
    """Of a layer. Experts differ in the order of their rows: more random numbers would take minutes."""
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
        tensors[f"{name}_packed"] = rolled(one, arguments.num_experts)
        shape = (arguments.num_experts, num_outputs, num_groups)
        tensors[f"{name}_scale"] = torch.full(shape, scale, dtype=torch.bfloat16)
        tensors[f"{name}_bias"] = torch.zeros(shape[:2], dtype=torch.bfloat16)
    return tensors


def rolled(one: Tensor, num_experts: int) -> Tensor:
    """[num_experts, ...], which differ in the order of their rows."""
    stack = torch.empty(num_experts, *one.shape, dtype=one.dtype)
    for expert, rows in enumerate(stack):
        rows.copy_(one.roll(expert, dims=0))
    return stack


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


def accelerate_model(row: str, arguments: argparse.Namespace, cap: int) -> Any:
    """transformers' class whose weights are in main memory where they do not fit under the cap.

    Its layers send all tokens to two experts and compute one of them for each token and each other expert, 127 rows in
    place of two: 7.9 GiB for 32 x 128 tokens at the width of the experts
    (docs/upstream/transformers_nllb_moe_routing.md). Here they get the experts that their routers choose.

    MoE layers share the main memory of their experts, 8.6 GB in place of 103: what is copied, and how, is the same.
    """
    config = config_of(arguments)
    names = ("vocab_size", "d_model", "max_position_embeddings", "num_experts")
    for side in ("encoder", "decoder"):
        names += (f"{side}_layers", f"{side}_ffn_dim", f"{side}_attention_heads", f"{side}_sparse_step")
    with init_empty_weights(include_buffers=False):
        fields = {name: getattr(config, name) for name in names}
        model: Any = NllbMoeForConditionalGeneration(NllbMoeConfig(**fields, router_bias=True))
    model = model.bfloat16().eval()
    model.tie_weights()
    for module in model.modules():
        if isinstance(module, NllbMoeExperts):
            module.register_forward_pre_hook(with_chosen_experts)
    specs = dict(model.named_parameters())
    weights = random_weights({name: spec for name, spec in specs.items() if ".expert_" not in name}, arguments)
    weights |= shared_experts([name for name in specs if ".expert_" in name], arguments)
    device_map: dict[str, Any] = {"": "cpu"}
    if arguments.device == "cuda":
        room = cap - convert_file_size_to_int(arguments.reserve)
        device_map = map_of_experts(model, room) if "-experts" in row else map_of_layers(model, room)
        weights = {name: tensor.to(device_of(name, device_map)) for name, tensor in weights.items()}
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not missing, missing
    if {*device_map.values()} == {"cpu"}:  # no room for a whole layer: with this map all would be computed on the CPU
        return cpu_offload(model, torch.device(arguments.device))
    return dispatch_model(model, device_map)


def with_chosen_experts(experts: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What `NllbMoeExperts` is given: hidden states [T, D], a mask [T, E] and weights [T, E], to experts and weights of
    each token [T, 2]."""
    hidden, _, weights = inputs
    chosen, experts_of_tokens = weights.topk(2)
    return hidden, experts_of_tokens, chosen


def map_of_layers(model: nn.Module, room: int) -> dict[str, Any]:
    """As for `device_map="auto"`."""
    memory: dict[int | str, int] = {0: room, "cpu": 2**50}
    return infer_auto_device_map(model, memory, no_split_module_classes=list(model._no_split_modules or ()))


def map_of_experts(model: nn.Module, room: int) -> dict[str, Any]:
    """All but experts on the GPU, and experts of the decoder before those of the encoder, as long as there is room."""
    num_bytes: dict[str, int] = {}  # of each module that has weights, or of each expert
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        module = name.partition(".fc")[0] if ".expert_" in name else name.rpartition(".")[0]
        num_bytes[module] = num_bytes.get(module, 0) + tensor.nbytes
    experts = [name for name in num_bytes if ".expert_" in name]
    room -= sum(num_bytes.values()) - sum(num_bytes[name] for name in experts)
    tied = {name.rpartition(".")[0] for name, _ in model.named_parameters(remove_duplicate=False)}
    device_map: dict[str, Any] = {name: 0 for name in (*num_bytes, *tied) if ".expert_" not in name}
    for name in sorted(experts, key=lambda name: ".encoder." in name):
        device_map[name] = 0 if num_bytes[name] <= room else "cpu"
        room -= num_bytes[name] if device_map[name] == 0 else 0
    return device_map


def device_of(name: str, device_map: dict[str, Any]) -> Any:
    """Of a parameter: that of the innermost module that the map names."""
    while name and name not in device_map:
        name = name.rpartition(".")[0]
    return device_map[name]


def shared_experts(names: list[str], arguments: argparse.Namespace) -> dict[str, Tensor]:
    """Parameters by name, those of all layers in the same memory."""
    stacks = {}
    for name, num_outputs, num_inputs in (
        ("fc1", arguments.ffn_dim, arguments.d_model),
        ("fc2", arguments.d_model, arguments.ffn_dim),
    ):
        one = torch.randn(num_outputs, num_inputs, dtype=torch.bfloat16) * num_inputs**-0.5
        stacks[f"{name}.weight"] = rolled(one, arguments.num_experts)
        stacks[f"{name}.bias"] = torch.zeros(arguments.num_experts, num_outputs, dtype=torch.bfloat16)
    weights = {}
    for name in names:
        expert, _, kind = name.rpartition(".expert_")[2].partition(".")
        weights[name] = stacks[kind][int(expert)]
    return weights


# ---- rows ----


def rows_of(arguments: argparse.Namespace) -> list[str]:
    if arguments.device == "cuda":
        names = ["dense", "dense-compiled", "resident", "resident-graphs"]
        kinds = ("memory", "memory-all", "accelerate", "accelerate-experts")
        names += [f"{kind} {cap}" for cap in arguments.caps for kind in kinds]
    else:
        names = ["dense", "resident", *(f"{kind} {share}" for share in arguments.shares for kind in MEMORY_ROWS)]
        names += ["accelerate"]
    return [name for name in names if arguments.rows is None or {name, name.partition(" ")[0]} & {*arguments.rows}]


def folder_of(row: str, arguments: argparse.Namespace) -> Path:
    return arguments.folder / ("all" if row.startswith("memory-all") else "experts")


def load(row: str, arguments: argparse.Namespace) -> Any:
    name, _, limit = row.partition(" ")
    kind, folder = name.partition("-")[0], folder_of(row, arguments)
    if kind == "dense":
        return dense_model(arguments)
    if kind == "resident":
        return ZCodeM3ForConditionalGeneration.from_pretrained(folder, dtype="auto").to(arguments.device)
    cap = 0
    if arguments.device == "cuda":
        cap = convert_file_size_to_int(limit)
        torch.cuda.set_per_process_memory_fraction(cap / torch.cuda.get_device_properties(0).total_memory)
    if kind == "accelerate":
        return accelerate_model(row, arguments, cap)
    if arguments.device == "cuda":
        size = cap - bytes_of_files(folder, ".experts.", False) - convert_file_size_to_int(arguments.reserve)
        if size <= 0:
            raise MemoryError(f"{limit} is less than what all but experts takes, and the reserve")
    else:
        size = int(bytes_of_files(folder, ".experts.", True) * float(limit))
    memory = ExpertMemory(size, experts_in=arguments.experts_in)
    return ZCodeM3ForConditionalGeneration.from_pretrained(
        folder, dtype="auto", expert_memory=memory, device_map=arguments.device
    )


def bytes_of_files(folder: Path, part: str, has_part: bool) -> int:
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = {file for name, file in weight_map.items() if (part in name) == has_part}
    return sum((folder / file).stat().st_size for file in files)


def measure(row: str, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A result for each batch size; those that need too much memory say so."""
    torch.manual_seed(0)
    model = load(row, arguments)
    for batch_size in arguments.batch_sizes:
        try:
            yield measure_batches(row, model, batch_size, arguments)
        except torch.OutOfMemoryError as error:
            yield {"row": row, "batch_size": batch_size, "failed": ". ".join(str(error).split(". ")[:2])}
        if arguments.device == "cuda":
            torch.cuda.empty_cache()


def measure_batches(row: str, model: Any, batch_size: int, arguments: argparse.Namespace) -> dict[str, Any]:
    cache = getattr(model, "expert_memory", None)
    num_tokens, steps = arguments.new_tokens, arguments.new_tokens - 1
    seconds: dict[str, list[float]] = {"1": [], str(num_tokens): []}
    copied, hits = [0, 0], 1.0
    num_warm_ups = 2 if row.endswith(("-graphs", "-compiled")) else 1
    for number in range(num_warm_ups + arguments.rounds):
        of_round = []
        for index, length in enumerate((1, num_tokens)):
            if row.startswith("accelerate"):
                of_round = generate(row, model, batch_size, num_tokens, seed_of(batch_size, number, 1), arguments)
                break
            of_round += generate(row, model, batch_size, length, seed_of(batch_size, number, index), arguments)[-1:]
            if cache is not None:
                counts = cache.statistics()
                cache.reset_statistics()
                hits = counts.hit_rate
                copied[index] += counts.num_bytes_copied if number >= num_warm_ups else 0
        if number >= num_warm_ups:
            for times, of_length in zip(seconds.values(), of_round, strict=True):
                times.append(of_length)
    prefill_s, all_s = (statistics.median(times) for times in seconds.values())
    step_s = (all_s - prefill_s) / steps
    return {
        "row": row,
        "batch_size": batch_size,
        "prefill_ms": prefill_s * 1000,
        "step_ms": step_s * 1000,
        "tokens_per_s": batch_size / step_s,
        "hit_rate": None if cache is None else hits,
        "bytes_copied_per_step": None if cache is None else (copied[1] - copied[0]) / arguments.rounds / steps,
        "bytes_copied_per_prefill": None if cache is None else copied[0] / arguments.rounds,
        "device_bytes": torch.cuda.max_memory_allocated() if arguments.device == "cuda" else None,
        "process_bytes": peak_of_process(),
        "seconds": seconds,
    }


def seed_of(batch_size: int, round_number: int, index: int) -> int:
    """Of sentences that no other call of the process has."""
    return (batch_size * 1000 + round_number) * 2 + index


class GivenTokens(LogitsProcessor):
    """Leaves one token at each step: those of int64[batch, steps]."""

    def __init__(self, tokens: Tensor, at_step: Callable[[], None]):
        self._tokens, self._at_step = tokens, at_step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._at_step()
        given = self._tokens[:, input_ids.shape[1] - 1, None]
        return torch.full_like(scores, -torch.inf).scatter(1, given, 0.0)


@torch.inference_mode()
def generate(
    row: str, model: Any, batch_size: int, num_tokens: int, seed: int, arguments: argparse.Namespace
) -> list[float]:
    """Seconds until all tokens are there; of Accelerate before that those until the first one is."""
    generator = torch.Generator().manual_seed(seed)
    ids, given = (
        torch.randint(4, arguments.vocab_size, (batch_size, length), generator=generator).to(arguments.device)
        for length in (arguments.source_length, num_tokens)
    )
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    times: list[float] = []

    def look_at_clock() -> None:
        if row.startswith("accelerate") and len(times) == 1:
            synchronize(arguments)
            times.append(clock())

    options: dict[str, Any] = {
        "dense-compiled": {"cache_implementation": "static"},
        "resident-graphs": {"cuda_graphs": True},
    }.get(row, {"logits_processor": LogitsProcessorList([GivenTokens(given, look_at_clock)])})
    if row.startswith("resident"):
        options.setdefault("cuda_graphs", False)
    synchronize(arguments)
    times.append(clock())
    model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, min_new_tokens=num_tokens,
        do_sample=False, num_beams=1, **options,
    )  # fmt: skip
    synchronize(arguments)
    times.append(clock())
    return [end - times[0] for end in times[1:]]


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
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        try:
            code = subprocess.run(
                command, stdout=output, stderr=errors, check=False, timeout=arguments.max_seconds
            ).returncode
            failed = f"exit code {code}" if code else None
        except subprocess.TimeoutExpired as late:
            code, failed = 0, f"ended after {late.timeout:.0f} s"
        output.seek(0)
        errors.seek(0)
        results = [json.loads(line) for line in output if line.startswith("{")]
        lines = errors.read().strip().splitlines()
    if failed is not None:
        results.append({"row": row, "failed": lines[-1] if code and lines else failed})
    return results


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
            table.add_row(result["row"], str(result.get("batch_size", "")), result["failed"])
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
        for result in measure(arguments.row, arguments):
            print(json.dumps(result), flush=True)
        return
    with tempfile.TemporaryDirectory() as temporary:
        arguments.folder = arguments.folder or Path(temporary)
        arguments.folder.mkdir(exist_ok=True)
        rows = rows_of(arguments)
        folders = sorted({folder_of(row, arguments) for row in rows if not row.startswith(("dense", "accelerate"))})
        for folder in folders:
            if not (folder / "config.json").is_file():
                write_model(folder, arguments)
        written: dict[str, Any] = {
            "device": device_name(arguments),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "arguments": {name: str(value) for name, value in vars(arguments).items()},
            "bytes_of_experts": {folder.name: bytes_of_files(folder, ".experts.", True) for folder in folders},
            "bytes_of_all_else": {folder.name: bytes_of_files(folder, ".experts.", False) for folder in folders},
            "results": [],
        }
        for row in rows:
            written["results"] += results_of(row, arguments)
            arguments.output.write_text(json.dumps(written, indent=1) + "\n")
    Console(width=160).print(table_of(written["results"]))


if __name__ == "__main__":
    main()
