"""Compile the Triton kernels for a GPU that need not be there, with the sizes that their launchers choose for it.

`python compile_for_target.py 80 few` (or `most`, `all`, `optimizer`, `quantized`) prints a line of JSON for each
kernel: its name, dtype and case, the bytes of shared memory that it asks for, its copies to shared memory that nobody
waits for, the most products of Hopper's tensor cores that may run on behind a wait, and its loads and stores of 16
bytes. A process of its own, as the tests' may have chosen Triton's interpreter.
"""

import json
import re
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler import ASTSource

from hf_moe_ted.kernels import (
    beam_attention,
    beam_step,
    fused_cross_entropy,
    fused_ffn,
    fused_router,
    multi_tensor,
    quantized_ffn,
    row_plan,
    small_batch_ffn,
)
from hf_moe_ted.kernels import triton_permutation as permutation
from hf_moe_ted.models.search_memory import KeySize, MemorySize, SearchMemory

NUM_EXPERTS, WIDTH, INNER_WIDTH = 16, 256, 512


class DriverOfNoDevice(DriverBase):
    """Says what is compiled for. Nothing is launched."""

    def __init__(self, target: GPUTarget):
        self.target = target

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_active_torch_device(self) -> torch.device:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


class Compiler:
    """Compiles what is launched, in place of the launch."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)
        self.case: dict[str, Any] = {}
        triton.runtime.driver.set_active(DriverOfNoDevice(self.target))
        triton.knobs.runtime.jit_cache_hook = self.compile
        fused_ffn._capability = lambda _: divmod(capability, 10)

    def run(self, function: Any, dtype: torch.dtype, *sizes: int) -> None:
        self.case = {"case": function.__name__, "dtype": str(dtype).removeprefix("torch."), "sizes": sizes}
        function(dtype, *sizes)

    def compile(self, *, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        source = ASTSource(fn.jit_function, compile["signature"], compile["constants"], compile["configs"][0])
        options = {name: compile[name] for name in ("num_warps", "num_ctas", "num_stages", "enable_fp_fusion")}
        kernel = triton.compile(source, target=self.target, options=options)
        waits = re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", kernel.asm["ptx"])
        compiled = {
            "kernel": fn.name.rpartition(".")[2],
            **self.case,
            "shared": kernel.metadata.shared,
            "copies": kernel.asm["ptx"].count("cp.async"),
            "running": max((int(number) for number in waits), default=None),
            "wide": [kernel.asm["ptx"].count(f"{kind}.global.v4.b32") for kind in ("ld", "st")],
        }
        print(json.dumps(compiled), flush=True)
        return True  # do not launch


def experts_parameters(dtype: torch.dtype) -> list[torch.Tensor]:
    shapes = (INNER_WIDTH, WIDTH), (WIDTH, INNER_WIDTH), (INNER_WIDTH,), (WIDTH,)
    return [torch.zeros(NUM_EXPERTS, *shape, dtype=dtype) for shape in shapes]


def experts_of(dtype: torch.dtype, num_slots: int) -> None:
    """Forward and backward of `zcode_fused`."""
    up, down, *biases = experts_parameters(dtype)
    tokens, weights = torch.zeros(num_slots, WIDTH, dtype=dtype), torch.zeros(num_slots, 1)
    ids = torch.zeros(num_slots, 1, dtype=torch.int64)
    block_m = fused_ffn.row_config(num_slots, NUM_EXPERTS, dtype, tokens.device).block_m
    sizes = block_m, fused_ffn.rows_step(block_m, dtype, tokens.device)
    plan = row_plan.plan_rows(ids, NUM_EXPERTS, *sizes)
    output, *kept = fused_ffn.relu_experts(tokens, weights, up, biases[0], down, biases[1], plan, *sizes, True)
    fused_ffn.relu_experts_backward(torch.zeros_like(output), weights, up, down, *kept, plan, *sizes, True)


def small_batch_of(dtype: torch.dtype, num_slots: int) -> None:
    """A step of generation."""
    up, down, *biases = experts_parameters(dtype)
    tokens = torch.zeros(num_slots, WIDTH, dtype=dtype)
    ids, weights = torch.zeros(num_slots, 1, dtype=torch.int64), torch.zeros(num_slots, 1)
    small_batch_ffn.small_batch_relu_experts(ids, tokens, weights, up, biases[0], down, biases[1])


def quantized_of(dtype: torch.dtype, num_slots: int, bits: int, group: int) -> None:
    """Both matrices of quantized experts; a group of 0 is a row."""
    ids = torch.zeros(num_slots, 1, dtype=torch.int64)
    weights, is_few = torch.zeros(num_slots, 1), num_slots <= quantized_ffn.MAX_SLOTS
    plan = quantized_ffn.plan_tiles(ids, NUM_EXPERTS) if is_few else ids
    for num_rows, depth in ((INNER_WIDTH, WIDTH), (WIDTH, INNER_WIDTH)):
        packed = torch.zeros(NUM_EXPERTS, num_rows, depth * bits // 8, dtype=torch.int8 if bits == 8 else torch.uint8)
        scale = torch.zeros(NUM_EXPERTS, num_rows, depth // (group or depth), dtype=dtype)
        bias, inputs = torch.zeros(NUM_EXPERTS, num_rows, dtype=dtype), torch.zeros(num_slots, depth, dtype=dtype)
        if not is_few and num_rows == INNER_WIDTH:
            tile = quantized_ffn.many_slots_tile(num_slots, NUM_EXPERTS, packed, scale, dtype)
            plan = row_plan.plan_rows(ids, NUM_EXPERTS, tile.block_m)
        is_down = depth == INNER_WIDTH
        quantized_ffn.quantized_linear(
            inputs, ids, plan, weights if is_down else None, packed, scale, bias, not is_down
        )


def router_of(dtype: torch.dtype, num_tokens: int, num_experts: int) -> None:
    hidden, weight = torch.zeros(num_tokens, WIDTH, dtype=dtype), torch.zeros(num_experts, WIDTH)
    seed = torch.zeros(1, dtype=torch.int64)
    logits, probs, choices = fused_router.route(hidden, weight, None, seed, 0.1, 2)
    grads = torch.zeros_like(logits), torch.zeros_like(probs)
    fused_router.route_backward(logits, choices, *grads, hidden, weight, seed, 0.1, dtype, True, True, False)


def beams_of(dtype: torch.dtype, num_beams: int) -> None:
    """What follows the logits in a step of beam search."""
    num_candidates = 2 * num_beams
    size = MemorySize(3, num_beams, 64, 16, num_candidates, 1)
    memory = SearchMemory.allocate(size, KeySize(1, 1, 8, dtype, torch.device("cpu")))
    logits, settings = torch.zeros(3 * num_beams, 128_000, dtype=dtype), memory.settings
    ends = (settings.ends_E, settings.forbids_ends_1)
    best = beam_step.best_words(logits, num_candidates, *ends, memory.forced_B, memory.has_nan_1)
    beam_step.advance_beams(*best, memory)
    query, new_keys, new_values = torch.zeros(3, 3, num_beams, 4, 64, dtype=dtype).transpose(2, 3)
    keys, values = torch.zeros(2, 3, 4, 64 * num_beams, 64, dtype=dtype)
    mask = memory.mask_B1NK
    beam_attention.beam_attention(query, keys, values, mask, 0.1)
    beam_attention.beam_attention(query, keys, values, mask, 0.1, new_keys, new_values, memory.keys_N)


def others_of(dtype: torch.dtype) -> None:
    """Cross-entropy, and moves of tokens to rows and back."""
    logits, labels = torch.zeros(8, 8192, dtype=dtype), torch.zeros(8, dtype=torch.int64)
    losses, log_partitions = fused_cross_entropy.cross_entropy._init_fn(logits, labels, 0.1)
    fused_cross_entropy.cross_entropy_backward._init_fn(losses, logits, labels, log_partitions, 0.1)
    slots, tokens, weights = torch.zeros(64, dtype=torch.int32), torch.zeros(64, WIDTH, dtype=dtype), torch.ones(64, 1)
    permutation.spread(tokens, slots, 1)
    permutation.combine(tokens, slots[:, None], weights)
    permutation.spread_weighted(tokens, slots, slots[:, None], weights, tokens)


def optimizer_of(dtype: torch.dtype) -> None:
    """A norm and a step of AdamW."""
    tensors, number = [torch.zeros(10_000, dtype=dtype) for _ in range(4)], torch.zeros(())
    device = number.device
    chunks = multi_tensor.cut_into_chunks(tensors[:1], multi_tensor.NORM_CHUNK)
    multi_tensor.sum_of_squares(multi_tensor.addresses_of([tensors[:1]], device), torch.ones(1), chunks)
    chunks = multi_tensor.cut_into_chunks(tensors[:1], multi_tensor.STEP_CHUNK)
    addresses = multi_tensor.addresses_of([[tensor] for tensor in (*tensors, number)], device)
    options = torch.tensor([[1e-3, 0.0, 0.9, 0.999, 1e-8]])
    multi_tensor.adamw_step(addresses, torch.zeros(1, dtype=torch.int32), options, chunks, number)


def main(capability: int, cases: str) -> None:
    compiler = Compiler(capability)
    bf16, fp32 = torch.bfloat16, torch.float32
    if cases == "optimizer":
        compiler.run(optimizer_of, bf16)
        compiler.run(optimizer_of, fp32)
        return
    if cases == "quantized":
        for bits, group in ((8, 0), (8, 8), (4, 0)):
            compiler.run(quantized_of, bf16, 8192, bits, group)
        return
    compiler.run(experts_of, bf16, 8192)
    compiler.run(small_batch_of, bf16, 64)
    compiler.run(beams_of, bf16, 4)
    compiler.run(quantized_of, bf16, 64, 4, 128)
    compiler.run(quantized_of, bf16, 8192, 4, 128)
    if cases == "most":
        compiler.run(experts_of, fp32, 8192)
        compiler.run(router_of, bf16, 16384, 128)
        compiler.run(others_of, bf16)
    if cases == "all":
        for dtype in (bf16, fp32):
            for num_beams in (1, 2, 5, 8):
                compiler.run(beams_of, dtype, num_beams)
            for num_slots in (128, 512, 8192):
                compiler.run(experts_of, dtype, num_slots)
            for num_slots in (2, 64):
                compiler.run(small_batch_of, dtype, num_slots)
            for num_experts in (16, 64, 128, 512):
                compiler.run(router_of, dtype, 16384, num_experts)
                compiler.run(router_of, dtype, 64, num_experts)
            compiler.run(others_of, dtype)
        for dtype in (bf16, torch.float16, fp32):
            for num_slots in (2, 64, 128, 512, 8192):
                for bits, group in ((8, 0), (8, 11), (4, 0), (4, 128), (4, 64), (4, 32), (4, 6)):
                    compiler.run(quantized_of, dtype, num_slots, bits, group)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
