"""Kernels of the MoE layer: what they have to do, whether they do it right, and how long variants of them take.

    python examples/benchmarks/bench_layer_kernels.py --roofline
    python examples/benchmarks/bench_layer_kernels.py --output layer_kernels.json

The first needs no GPU: FLOPs and bytes of each kernel of forward and backward, and the time that they need at least.
The second checks outputs and gradients of each variant of the experts against float32 and a second run, then times the
layer with each beside the dense feed-forward of the same FLOPs, then single kernels with other tiles, and last all
kernels of a step. All of it in one process. Sizes, tokens and weights are those of bench_experts.py.
"""

import argparse
import contextlib
import functools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bench_experts import captured, step_of
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from hf_moe_ted import ZCodeM3Config, ZCodeM3Model

SIZES = [(65536, 64), (65536, 128), (16384, 64), (16384, 128), (4096, 64)]
PROFILED = [(65536, 64), (16384, 64)]
D_MODEL, FFN_DIM = 1024, 4096
FLOPS_PER_MS, BYTES_PER_MS = 790e9, 4.3e9  # of an H200: products in bfloat16, copies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--roofline", action="store_true", help="what the kernels have to do, no GPU")
    parser.add_argument("--sizes", nargs="+", help="tokens,experts; default: the five with targets")
    parser.add_argument("--variants", nargs="+", help="default: all")
    parser.add_argument("--parts", nargs="+", default=["checks", "layer", "profile", "sweep"])
    parser.add_argument("--seconds", type=float, default=140.0, help="no new size is begun in the sweep after these")
    parser.add_argument("--output", type=Path, help="JSON, written after each row")
    args = parser.parse_args()
    sizes = SIZES if args.sizes is None else [tuple(map(int, size.split(","))) for size in args.sizes]
    if args.roofline:
        Console(width=140).print(roofline_table(sizes))
        return
    bench = Bench(args.output, time.perf_counter() + args.seconds)
    variants = {name: all_variants()[name] for name in args.variants or all_variants()}
    if "checks" in args.parts:
        for name, settings in variants.items():
            bench.add("checks", check(name, settings))
        for has_half in (False, True):
            bench.add("checks", check_router({"_HALF_PRODUCTS": has_half}))
    if "layer" in args.parts:
        for num_tokens, num_experts in sizes:
            bench.add("layer", time_layer(num_tokens, num_experts, variants))
        Console(width=160).print(layer_table(bench.results["layer"], list(variants)))
    if "profile" in args.parts:
        for num_tokens, num_experts in PROFILED:
            bench.add("profile", profile(num_tokens, num_experts))
    if "sweep" in args.parts:
        for num_tokens, num_experts in sorted(sizes, key=lambda size: size not in PROFILED):
            bench.add("sweep", sweep(num_tokens, num_experts, bench.deadline))


class Bench:
    """Rows so far, printed and written one by one."""

    def __init__(self, output: Path | None, deadline: float):
        self.output = output
        self.deadline = deadline
        self.start = time.perf_counter()
        device = torch.cuda.get_device_name()
        self.results: dict[str, Any] = {"device": device, "torch": torch.__version__}

    def add(self, part: str, row: dict[str, Any]) -> None:
        row["at_s"] = round(time.perf_counter() - self.start, 1)
        self.results.setdefault(part, []).append(row)
        print(part, json.dumps(row), flush=True)
        if self.output:
            self.output.write_text(json.dumps(self.results, indent=1) + "\n")


# --- What the kernels have to do


def roofline(num_tokens: int, num_experts: int, width: int = D_MODEL, inner: int = FFN_DIM) -> list[dict[str, Any]]:
    """GFLOP, with the rows that fill up tiles, and GB of each kernel, top-1, and its ms at the device's speeds.

    Rows per expert are those of one random routing, uniform over the experts.
    """
    generator = torch.Generator().manual_seed(0)
    rows_E = torch.randint(num_experts, (num_tokens,), generator=generator).bincount(minlength=num_experts)
    tokens, activations = 2 * num_tokens * width, 2 * num_tokens * inner  # bytes in bfloat16
    weights, mask = 2 * num_experts * width * inner, num_tokens * inner // 8

    def product(name: str, moved: int, before: int = 0) -> dict[str, Any]:
        num_rows = sum(-(-rows // 128) * 128 for rows in rows_E.tolist())
        return times(name, 2 * num_tokens * width * inner, 2 * num_rows * width * inner, moved, before)

    def times(name: str, exact: int, computed: int, moved: int, before: int = 0) -> dict[str, Any]:
        return {
            "kernel": name,
            "gflop": exact / 1e9,
            "gb": moved / 1e9,
            "ms_flop": exact / FLOPS_PER_MS,
            "ms_byte": moved / BYTES_PER_MS,
            "before": max(computed / FLOPS_PER_MS, (moved + before) / BYTES_PER_MS),
            "now": max(computed / FLOPS_PER_MS, moved / BYTES_PER_MS),
        }

    def move(name: str, moved: int, before: int = 0) -> dict[str, Any]:
        return times(name, 0, 0, moved, before)

    def weight_product(name: str) -> dict[str, Any]:
        return times(name, *[2 * num_tokens * width * inner] * 2, tokens + activations + weights)

    router = 2 * num_tokens * width * num_experts
    logits = 4 * num_tokens * num_experts
    return [
        times("router", router, router, tokens + logits),
        move("gather", 2 * tokens),
        product("up", tokens + weights + activations + mask, before=-mask),
        product("down", activations + weights + 2 * tokens),
        move("gather backward", 3 * tokens),
        product("gradient", tokens + weights + activations + mask, before=activations - mask),
        product("gradient of input", activations + weights + tokens),
        weight_product("weight gradient, up"),
        weight_product("weight gradient, down"),
        move("sums", 0, before=tokens + activations),
        times("router backward", 2 * router, 2 * router, 2 * tokens + 3 * logits),
        move("sum of two gradients", 3 * tokens),
    ]


def roofline_table(sizes: list[tuple[int, int]]) -> Table:
    result = Table(title="GFLOP / GB / ms at least, before and now")
    rows = {size: roofline(*size) for size in sizes}
    result.add_column("kernel")
    for num_tokens, num_experts in sizes:
        result.add_column(f"{num_tokens:,}, {num_experts}", justify="right")
    for kernels in zip(*rows.values(), strict=True):
        cells = [f"{k['gflop']:.0f} / {k['gb']:.2f} / {k['before']:.3f} {k['now']:.3f}" for k in kernels]
        result.add_row(kernels[0]["kernel"], *cells)
    sums = [[sum(kernel[key] for kernel in kernels) for key in ("before", "now")] for kernels in rows.values()]
    result.add_row("sum", *(f"{before:.2f} {now:.2f}" for before, now in sums))
    return result


# --- Variants


def all_variants() -> dict[str, dict[str, Any]]:
    """Settings of each variant, by the names of constants in row_plan.py, fused_ffn.py and fused_router.py."""
    from hf_moe_ted.kernels.fused_ffn import GemmConfig

    none = {
        "_STORES_TILES": False,
        "_SUMS_IN_WEIGHT_PRODUCT": False,
        "_PREFETCH": False,
        "_HALF_PRODUCTS": False,
        "_WEIGHT_CONFIGS": (GemmConfig(128, 128, 32, 4, 5, 2),) * 2,
    }
    apart = {"_SUMS_IN_WEIGHT_PRODUCT": False, "_PREFETCH": False}
    return {
        "none": none,
        "whole tiles": none | {"_STORES_TILES": True},
        "sums": none | {"_SUMS_IN_WEIGHT_PRODUCT": True},
        "router": none | {"_HALF_PRODUCTS": True},
        "as it is": {},
        "3 weight programs": apart | {"_WEIGHT_CONFIGS": (GemmConfig(128, 128, 32, 4, 4, 3, 168),) * 2},
        "256 x 128 weights": {"_WEIGHT_CONFIGS": (GemmConfig(256, 128, 64, 8, 4),) * 2},
    }


@contextlib.contextmanager
def settings_of(settings: dict[str, Any]) -> Iterator[None]:
    from hf_moe_ted.kernels import fused_ffn, fused_router, row_plan

    before = []
    for name, value in settings.items():
        module = next(module for module in (row_plan, fused_ffn, fused_router) if hasattr(module, name))
        before.append((module, name, getattr(module, name)))
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


# --- Checks


def check(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Largest relative errors of output and gradients against float32, over routings of all kinds, in new memory full
    of NaN; and whether two runs are equal to the bit.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills new memory with NaN
    errors, is_same = {}, True
    with settings_of(settings):
        for case in ("random", "skewed", "all on one", "some dropped", "empty experts"):
            for num_tokens in (3000, 1500):
                inputs, ids, cotangent = example(case, num_tokens, 16, 264, 520)
                actual, again = (experts_step(inputs, ids, cotangent) for _ in range(2))
                expected = reference_step(inputs, ids, cotangent)
                is_same &= all(torch.equal(one, other) for one, other in zip(actual, again, strict=True))
                for part, one, other in zip(PARTS, actual, expected, strict=True):
                    error = (one.float() - other).norm() / other.norm().clamp(min=1e-30)
                    error = error.item() if one.isfinite().all() else float("nan")
                    errors[part] = error if error != error else max(errors.get(part, 0.0), error)
    torch.use_deterministic_algorithms(False)
    is_right = is_same and all(error < 1.2e-2 for error in errors.values())
    return {
        "variant": name,
        "right": is_right,
        "bit-equal": is_same,
        "errors": {k: f"{v:.1e}" for k, v in errors.items()},
    }


def check_router(settings: dict[str, Any]) -> dict[str, Any]:
    """Relative errors of logits and gradients against float64."""
    from hf_moe_ted.kernels.fused_router import fused_route

    torch.manual_seed(0)
    hidden, weight = (
        torch.randn(5000, 264, device="cuda").bfloat16(),
        torch.randn(72, 264, device="cuda").bfloat16() / 16,
    )
    inputs = [hidden.requires_grad_(), weight.requires_grad_(), torch.randn(72, device="cuda").requires_grad_()]
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    with settings_of(settings):
        logits, probs, choices = fused_route(*inputs, 1)
        cotangents = [torch.randn_like(logits), torch.randn_like(probs)]
        actual = [logits, *torch.autograd.grad([logits, probs], inputs, cotangents)]
    exact_logits = torch.nn.functional.linear(*exact_inputs)
    exact_probs = exact_logits.softmax(dim=-1).gather(1, choices)
    cotangents = [cotangent.double() for cotangent in cotangents]
    expected = [exact_logits, *torch.autograd.grad([exact_logits, exact_probs], exact_inputs, cotangents)]
    errors = [(one.double() - other).norm() / other.norm() for one, other in zip(actual, expected, strict=True)]
    return settings | dict(
        zip(("logits", "hidden", "weight", "bias"), [f"{error:.1e}" for error in errors], strict=True)
    )


PARTS = ("output", "hidden", "weights", "up_proj", "up_proj_bias", "down_proj", "down_proj_bias")


def example(
    case: str, num_tokens: int, num_experts: int, width: int, inner: int
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Hidden states, routing weights and parameters in bfloat16; ids of experts; cotangent."""
    torch.manual_seed(0)
    ids = torch.randint(num_experts, (num_tokens, 2), device="cuda")
    if case == "skewed":
        ids = (torch.rand(num_tokens, 2, device="cuda") ** 4 * num_experts).long()
    elif case == "all on one":
        ids[:] = num_experts - 1
        ids[:, 1] = num_experts
    elif case == "some dropped":
        ids[torch.rand(ids.shape, device="cuda") < 0.3] = num_experts
    elif case == "empty experts":
        ids[ids % 2 == 0] = num_experts
    shapes = [(inner, width), (inner,), (width, inner), (width,)]
    scales = [width**-0.5, 0.3, inner**-0.5, 0.3]
    parameters = [torch.randn(num_experts, *s, device="cuda") * x for s, x in zip(shapes, scales, strict=True)]
    hidden, cotangent = torch.randn(2, num_tokens, width, device="cuda")
    inputs = [hidden, torch.rand(num_tokens, 2, device="cuda"), *parameters]
    return [tensor.bfloat16().requires_grad_() for tensor in inputs], ids, cotangent.bfloat16()


def experts_step(inputs: list[Tensor], ids: Tensor, cotangent: Tensor) -> list[Tensor]:
    from hf_moe_ted.kernels.fused_ffn import fused_ffn_experts_forward

    experts = nn.Module()
    hidden, weights, experts.up_proj, experts.up_proj_bias, experts.down_proj, experts.down_proj_bias = [
        nn.Parameter(tensor.detach()) for tensor in inputs
    ]
    experts.num_experts = len(experts.up_proj)
    output = fused_ffn_experts_forward(experts, hidden, ids, weights)
    return [output.detach(), *torch.autograd.grad(output, [hidden, weights, *experts.parameters()], cotangent)]


def reference_step(inputs: list[Tensor], ids: Tensor, cotangent: Tensor) -> list[Tensor]:
    """In float32, with activations rounded as the kernels round them, so that ReLU has the same units."""
    inputs = [tensor.detach().float().requires_grad_() for tensor in inputs]
    x, w, up, up_bias, down, down_bias = inputs
    output = torch.zeros_like(x)
    for expert in range(len(up)):
        token, slot = torch.where(ids == expert)
        inner = torch.relu(x[token] @ up[expert].T + up_bias[expert])
        result = (inner @ down[expert].T + down_bias[expert]) * w[token, slot, None]
        output = output.index_add(0, token, result)
    return [output.detach(), *torch.autograd.grad(output, inputs, cotangent.float())]


# --- Times


def time_layer(num_tokens: int, num_experts: int, variants: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Milliseconds of forward and backward, step by step and as a CUDA graph, dense and of each variant."""
    dense, layer, hidden, cotangent = modules(num_tokens, num_experts)
    row: dict[str, Any] = {"tokens": num_tokens, "experts": num_experts, "dense": timed(dense, hidden, cotangent)}
    for name, settings in variants.items():
        with settings_of(settings):
            row[name] = timed(layer, hidden, cotangent)
    row["dense again"] = timed(dense, hidden, cotangent)
    return row


def modules(num_tokens: int, num_experts: int) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """Dense and sparse feed-forward, tokens and cotangent."""
    torch.manual_seed(0)
    config = ZCodeM3Config(
        vocab_size=8, d_model=D_MODEL, encoder_ffn_dim=FFN_DIM, encoder_layers=2, encoder_sparse_step=2,
        decoder_layers=1, decoder_sparse_step=0, num_experts=num_experts, num_experts_per_tok=1,
        activation_dropout=0.0, capacity_factor=None, router_noise_policy=None,
    )  # fmt: skip
    hidden = torch.randn(1, num_tokens, D_MODEL, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    cotangent = torch.randn_like(hidden)
    with torch.device("cuda"):
        model = ZCodeM3Model(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.03)
    model.set_experts_implementation("zcode_fused")
    dense, layer = (layer.ffn for layer in model.to(torch.bfloat16).encoder.layers)
    return dense, layer, hidden, cotangent


def timed(module: nn.Module, hidden: Tensor, cotangent: Tensor) -> dict[str, float]:
    step = step_of(module, hidden, cotangent)
    step()
    return {"step": milliseconds(step, 100), "graph_step": milliseconds(captured(step), 100)}


def layer_table(rows: list[dict[str, Any]], variants: list[str]) -> Table:
    result = Table(title="milliseconds of forward and backward, and their ratios to dense (step by step; as graphs)")
    for column in ("tokens", "experts", "dense", *variants):
        result.add_column(column, justify="right")
    for row in rows:
        dense = {key: min(row["dense"][key], row["dense again"][key]) for key in row["dense"]}
        cells = [f"{dense['step']:.3f}, {dense['graph_step']:.3f}"]
        for name in variants:
            ratios = [row[name][key] / dense[key] for key in ("step", "graph_step")]
            cells.append(f"{row[name]['step']:.3f}, {row[name]['graph_step']:.3f} ({ratios[0]:.2f}; {ratios[1]:.2f})")
        result.add_row(f"{row['tokens']:,}", str(row["experts"]), *cells)
    return result


def profile(num_tokens: int, num_experts: int) -> dict[str, Any]:
    """Microseconds of each kernel in a step of the dense and of the sparse layer, mean of ten."""
    dense, layer, hidden, cotangent = modules(num_tokens, num_experts)
    result: dict[str, Any] = {"tokens": num_tokens, "experts": num_experts}
    for name, module in (("dense", dense), ("sparse", layer)):
        step = step_of(module, hidden, cotangent)
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as record:
            for _ in range(10):
                step()
            torch.cuda.synchronize()
        result[name] = kernels_of(record, num_steps=10)
    return result


def kernels_of(record: Any, num_steps: int) -> list[tuple[str, float]]:
    """Names and microseconds of the kernels of a step, in their order, means of all steps.

    In the order of their times if the steps differ.
    """
    events = [event for event in record.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda event: event.time_range.start)
    names = [event.name for event in events]
    per_step = len(events) // num_steps
    if len(events) % num_steps or names[:per_step] * num_steps != names:
        total = Counter()
        for event in events:
            total[event.name[:80]] += event.time_range.elapsed_us() / num_steps
        return [(name, round(us, 1)) for name, us in total.most_common()]
    return [
        (names[i][:80], round(sum(event.time_range.elapsed_us() for event in events[i::per_step]) / num_steps, 1))
        for i in range(per_step)
    ]


def milliseconds(function: Callable[[], None], rep: int = 40) -> float:
    return do_bench(function, warmup=20, rep=rep, return_mode="median")


# --- Tiles


def sweep(num_tokens: int, num_experts: int, deadline: float) -> dict[str, Any]:
    """Milliseconds of single kernels with other tiles."""
    row: dict[str, Any] = {"tokens": num_tokens, "experts": num_experts}
    if time.perf_counter() > deadline:
        return row | {"left out": "no time"}
    for part in (sweep_of_router, sweep_of_weight_products, sweep_of_row_products, sweep_of_gather):
        row[part.__name__] = {name: round(ms, 4) for name, ms in part(num_tokens, num_experts)}
    return row


def sweep_of_weight_products(num_tokens: int, num_experts: int) -> Iterator[tuple[str, float]]:
    """Both weight gradients, and the sums of their first factors."""
    from hf_moe_ted.kernels import fused_ffn

    two, three, large = (128, 128, 32, 4, 5, 2), (128, 128, 32, 4, 4, 3, 168), (256, 128, 64, 8, 4, 1)
    cases = {  # tiles; whether sums are in the product; whether ranges of rows are read ahead
        "2 programs": (two, False, False),
        "2 programs, sums": (two, True, False),
        "2 programs, sums, ahead": (two, True, True),
        "3 programs": (three, False, False),
        "3 programs, ahead": (three, False, True),
        "3 programs, sums": (three, True, False),
        "256 x 128": (large, False, False),
        "256 x 128, sums": (large, True, False),
        "256 x 128, sums, ahead": (large, True, True),
    }
    for name, (config, has_sums, reads_ahead) in cases.items():
        settings = {"_WEIGHT_CONFIGS": (fused_ffn.GemmConfig(*config),) * 2}
        with settings_of(settings | {"_SUMS_IN_WEIGHT_PRODUCT": has_sums, "_PREFETCH": reads_ahead}):
            plan, wide, narrow = rows_and_plan(num_tokens, num_experts)
            for kind, a, b in (("up", wide, narrow), ("down", narrow, wide)):
                yield f"{kind}: {name}", milliseconds(functools.partial(fused_ffn._weight_and_bias, a, b, plan))


def sweep_of_row_products(num_tokens: int, num_experts: int) -> Iterator[tuple[str, float]]:
    for name, settings in (("whole tiles", {}), ("pointers", {"_STORES_TILES": False})):
        with settings_of(settings):
            for kind, call in row_products(num_tokens, num_experts).items():
                yield f"{kind}: {name}", milliseconds(call)


def row_products(num_tokens: int, num_experts: int) -> dict[str, Callable[[], None]]:
    """The four products of rows, with tensors of their own."""
    from hf_moe_ted.kernels.fused_ffn import _row_product

    plan, wide, narrow = rows_and_plan(num_tokens, num_experts)
    up = torch.randn(num_experts, FFN_DIM, D_MODEL, device="cuda", dtype=torch.bfloat16) * 0.03
    down = up.view(num_experts, D_MODEL, FFN_DIM)
    bias = torch.zeros(num_experts, FFN_DIM, device="cuda", dtype=torch.bfloat16)
    weights = torch.ones(num_tokens, 1, device="cuda", dtype=torch.bfloat16)
    slots, unweighted = torch.empty(2, num_tokens, D_MODEL, device="cuda", dtype=torch.bfloat16)
    inner = torch.empty_like(wide)
    active = torch.zeros(len(wide), FFN_DIM // 32, device="cuda", dtype=torch.int32)
    weighting = {"bias": bias, "weights": weights, "unweighted": unweighted}
    return {
        "up": lambda: _row_product("up", narrow, up, inner, plan, bias=bias, active=active),
        "down": lambda: _row_product("down", wide, down, slots, plan, **weighting),
        "gradient": lambda: _row_product("grad_inner", narrow, down, inner, plan, active=active),
        "gradient of input": lambda: _row_product("grad_input", wide, up, slots, plan),
    }


def sweep_of_gather(num_tokens: int, num_experts: int) -> Iterator[tuple[str, float]]:
    from hf_moe_ted.kernels import fused_ffn

    plan, _, rows = rows_and_plan(num_tokens, num_experts)
    tokens, slots, unweighted = torch.randn(3, num_tokens, D_MODEL, device="cuda", dtype=torch.bfloat16)
    weights = torch.ones(num_tokens, 1, device="cuda", dtype=torch.bfloat16)
    weighting = {"weights": weights, "unweighted": unweighted, "grad_weights": torch.empty_like(weights)}
    for sizes in ((16, 512), (8, 1024), (16, 256), (32, 256), (64, 128)):
        with settings_of({"_GATHER_ROWS": sizes[0], "_GATHER_COLUMNS": sizes[1]}):
            for kind, options in (("forward", {}), ("backward", weighting)):
                options = options | {"rows": rows, "slots_out": slots}
                call = functools.partial(fused_ffn._gather, tokens, plan, 1, **options)
                yield f"{kind}: {sizes}", milliseconds(call)


def rows_and_plan(num_tokens: int, num_experts: int) -> tuple[Any, Tensor, Tensor]:
    """Plan of a random routing, and rows of inner and of model width."""
    from hf_moe_ted.kernels import fused_ffn
    from hf_moe_ted.kernels.row_plan import RowPlan, plan_rows

    torch.manual_seed(0)
    ids = torch.randint(num_experts, (num_tokens, 1), device="cuda")
    case = num_tokens, num_experts, torch.bfloat16, ids.device
    sizes = fused_ffn.row_config(*case).block_m, fused_ffn.rows_multiple(*case, True)
    plan = RowPlan.of(plan_rows(ids, num_experts, *sizes), num_tokens, num_experts, *sizes)
    return plan, *(torch.randn(plan.num_rows, n, device="cuda", dtype=torch.bfloat16) for n in (FFN_DIM, D_MODEL))


def sweep_of_router(num_tokens: int, num_experts: int) -> Iterator[tuple[str, float]]:
    """Forward, and backward with one kernel's tiles changed at a time."""
    from hf_moe_ted.kernels import fused_router
    from hf_moe_ted.kernels.fused_router import RouterTiles

    torch.manual_seed(0)
    hidden = torch.randn(num_tokens, D_MODEL, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(num_experts, D_MODEL, device="cuda", dtype=torch.bfloat16) * 0.03
    forward: tuple[Any, ...] = (hidden, weight, None, None, 0.0, 1)
    logits, probs, choices = fused_router.route(*forward)
    backward = (
        logits, choices, None, torch.randn_like(probs), hidden, weight, None, 0.0, hidden.dtype, True, True, False,
    )  # fmt: skip
    forward_call = functools.partial(fused_router.route, *forward)
    backward_call = functools.partial(fused_router.route_backward, *backward)
    for name, settings in (("", {}), (", TF32", {"_HALF_PRODUCTS": False})):
        with settings_of(settings):
            yield f"forward{name}", milliseconds(forward_call)
            yield f"backward{name}", milliseconds(backward_call)
    cases = {  # tokens, columns, warps, stages
        "route_tiles": ((64, 64, 4, 3), (128, 64, 8, 3), (64, 128, 4, 3)),
        "hidden_tiles": ((64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (64, 128, 4, 2), (128, 128, 8, 2)),
        "weight_tiles": ((32, 64, 4, 4), (64, 64, 8, 4), (32, 128, 8, 3), (64, 128, 8, 3)),
    }
    for name, all_tiles in cases.items():
        call = forward_call if name == "route_tiles" else backward_call
        for block_t, block_d, *others in all_tiles:
            tiles = RouterTiles(block_t, block_d, num_experts, *others)
            with settings_of({name: lambda *_, tiles=tiles: tiles}), contextlib.suppress(OutOfResources):
                yield f"{name} {(block_t, block_d, *others)}", milliseconds(call)
    with settings_of({"_WEIGHT_PROGRAMS": 1024}):
        yield "backward, 1024 weight programs", milliseconds(backward_call)


if __name__ == "__main__":
    main()
