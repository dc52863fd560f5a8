"""On a CPU, experts take no more memory than they may, whatever the texts."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_moe_ted import ZCodeM3Config, ZCodeM3ForConditionalGeneration, quantize_experts
from hf_moe_ted.kernels.int8_linear import packed_bytes_per_weight

MIB = 2**20
PRODUCTS_BYTES = 36 * MIB  # what oneDNN keeps for itself of products of so many sizes, with all experts in memory, too
PROGRAM = """
import re, sys
from pathlib import Path
import torch
from hf_moe_ted import ExpertMemory, ZCodeM3ForConditionalGeneration

def kibibytes(name):
    return int(re.search(rf"{name}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

def translate(model):
    for seed in range(3):
        ids = torch.randint(4, 64, (4, 12), generator=torch.Generator().manual_seed(seed))
        model.generate(input_ids=ids, max_new_tokens=6, num_beams=2)

small, folder, size = sys.argv[1:]
translate(ZCodeM3ForConditionalGeneration.from_pretrained(small, expert_memory=ExpertMemory("9MB"), device_map="cpu"))
before = kibibytes("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
model = ZCodeM3ForConditionalGeneration.from_pretrained(folder, expert_memory=ExpertMemory(int(size)), device_map="cpu")
translate(model)
statistics = model.expert_memory.statistics()
assert statistics.num_streamed and statistics.num_bytes_copied > int(size), statistics
print((kibibytes("VmHWM") - before) * 1024)
"""


def make_model(**sizes: int) -> ZCodeM3ForConditionalGeneration:
    config = ZCodeM3Config(
        vocab_size=64, encoder_sparse_step=1, decoder_sparse_step=1, encoder_layers=3, decoder_layers=2, **sizes
    )
    with torch.device("meta"):
        model = ZCodeM3ForConditionalGeneration(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.1, 0.1)
    return model


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_peak_memory(bits: int, tmp_path: Path) -> None:
    """Loading included: what experts may take, all other weights, and little else.

    Most of what products take for themselves, whatever the number of experts, a small model has taken before.
    """
    widths = {"d_model": 256, "encoder_ffn_dim": 1024, "decoder_ffn_dim": 1024, "num_experts_per_tok": 2}
    model = make_model(num_experts=64, **widths)
    make_model(num_experts=2, **widths).save_pretrained(tmp_path / "small")
    model.save_pretrained(tmp_path / "full", max_shard_size="64MB")
    stacks = [parameter for name, parameter in model.named_parameters() if ".experts." in name]
    num_bytes, others = sum(p.nbytes for p in stacks), sum(p.nbytes for p in model.parameters())
    others -= num_bytes
    folder = tmp_path / "full"
    small = tmp_path / "small"
    if bits < 16:
        small = tmp_path / "small_quantized"
        quantize_experts(tmp_path / "small", bits, output_dir=small)
        folder = tmp_path / "quantized"
        quantize_experts(tmp_path / "full", bits, output_dir=folder)
        num_bytes = num_bytes * bits // 16
    size = num_bytes // 8 * (1 + packed_bytes_per_weight() if bits == 8 else 1)
    del model, stacks
    command = [sys.executable, "-c", PROGRAM, small, folder, str(size)]
    peak = int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    bound = size + others + PRODUCTS_BYTES
    assert bound < 0.7 * num_bytes, (bound / MIB, num_bytes / MIB)
    assert peak < bound, (peak / MIB, bound / MIB)
