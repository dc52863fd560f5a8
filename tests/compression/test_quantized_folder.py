"""Folder to folder: what a model in memory would be saved as, in the memory of one shard."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_moe_ted import (
    ExpertMemory,
    ZCodeM3Config,
    ZCodeM3ForConditionalGeneration,
    ZCodeM3Tokenizer,
    prune_experts,
    quantize_experts,
)

MakeModel = Callable[..., ZCodeM3ForConditionalGeneration]
NLLB_MOE = Path(__file__).parents[1] / "fixtures" / "nllb_moe"
EXPERT = "model.encoder.layers.1.ffn.experts.expert_3.fc1.weight"
MIB = 2**20


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def require_equal_folders(written: Path, expected: Path) -> None:
    """Tensors bit for bit, in the same files; the same configs, but for a length that loading puts into one."""
    mine, theirs = tensors_of(written), tensors_of(expected)
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert mine[name].dtype == tensor.dtype and torch.equal(mine[name], tensor), name
    for name in ("config.json", "generation_config.json"):
        fields = [json.loads((folder / name).read_text()) for folder in (written, expected)]
        assert {"max_length": 128} | fields[0] == {"max_length": 128} | fields[1], name
    index = "model.safetensors.index.json"
    if (expected / index).is_file():
        files = [json.loads((folder / index).read_text())["weight_map"] for folder in (written, expected)]
        assert files[0] == files[1]
    assert {file.name for file in written.glob("*.safetensors")} == {f.name for f in expected.glob("*.safetensors")}


def both_ways(source: Path, tmp_path: Path, max_shard_size: str = "5GB", dtype: str = "auto", **options: Any) -> Any:
    """Quantize folder to folder, and after loading; returns the report."""
    report = quantize_experts(
        source, **options, dtype=dtype, output_dir=tmp_path / "streamed", max_shard_size=max_shard_size
    )
    in_memory: Any = quantize_experts(source, **options, dtype=dtype)
    in_memory.save_pretrained(tmp_path / "saved", max_shard_size=max_shard_size)
    require_equal_folders(tmp_path / "streamed", tmp_path / "saved")
    expected = in_memory.hf_quantizer.report
    assert report.relative_errors == expected.relative_errors
    assert report.errors_of_parts == pytest.approx(expected.errors_of_parts)
    assert report.num_bytes_after == expected.num_bytes_after
    assert report.num_parameters_after == expected.num_parameters_after
    return report


@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (8, 16), (4, None), (4, 8)])
@pytest.mark.parametrize("what", ["experts", "all"])
@pytest.mark.parametrize("tied", [True, False])
def test_equals_what_is_saved(
    bits: int, group_size: int | None, what: str, tied: bool, make_model: MakeModel, tmp_path: Path
) -> None:
    model = make_model(tie_word_embeddings=tied, router_bias=True, num_experts=[2, 4, 3])
    model.save_pretrained(tmp_path / "full", max_shard_size="50KB")
    both_ways(tmp_path / "full", tmp_path, bits=bits, group_size=group_size, what=what, max_shard_size="40KB")


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_dtype(dtype: str, make_model: MakeModel, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Scales and all that is not rounded have it; `auto` is that of the config."""
    make_model().bfloat16().save_pretrained(tmp_path / "full")
    both_ways(tmp_path / "full", tmp_path, bits=4, dtype=dtype)
    expected = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    dtypes = {name: tensor.dtype for name, tensor in tensors_of(tmp_path / "streamed").items()}
    assert {dtypes[name] for name in dtypes if not name.endswith("_packed")} == {expected}
    assert not caplog.messages
    assert ZCodeM3ForConditionalGeneration.from_pretrained(tmp_path / "streamed", dtype="auto").dtype == expected


def test_files_that_become_larger(make_model: MakeModel, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_model().bfloat16().save_pretrained(tmp_path / "full")
    path = tmp_path / "full" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}))
    quantize_experts(tmp_path / "full", output_dir=tmp_path / "small", dtype="bfloat16")
    assert not caplog.messages
    quantize_experts(tmp_path / "full", output_dir=tmp_path / "large")
    [message] = caplog.messages
    assert "full has bfloat16, and its config says float32; dtype 'bfloat16' (--dtype bfloat16) leaves them" in message


def test_several_dtypes_and_none_in_the_config(tmp_path: Path) -> None:
    """From_pretrained would take that of the tensor that comes first in the files."""
    shutil.copytree(NLLB_MOE / "tiny_a", tmp_path / "full")
    path = tmp_path / "full" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": None, "torch_dtype": None}))
    weights = load_file(tmp_path / "full" / "model.safetensors")
    mixed = {name: weight if "norm" in name else weight.bfloat16() for name, weight in weights.items()}
    save_file(mixed, tmp_path / "full" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"several \(torch.bfloat16, torch.float32\); choose one with dtype"):
        quantize_experts(tmp_path / "full", output_dir=tmp_path / "small")
    with pytest.raises(ValueError, match="choose one with dtype"):
        ZCodeM3ForConditionalGeneration.from_pretrained(tmp_path / "full", expert_memory=ExpertMemory("1GB"))
    both_ways(tmp_path / "full", tmp_path, dtype="bfloat16")


@pytest.mark.parametrize("name", ["tiny_a", "tiny_b"])
@pytest.mark.parametrize("what", ["experts", "all"])
def test_nllb_moe(name: str, what: str, tmp_path: Path) -> None:
    both_ways(NLLB_MOE / name, tmp_path, bits=4, what=what, dtype="bfloat16", max_shard_size="100KB")
    loaded, info = ZCodeM3ForConditionalGeneration.from_pretrained(tmp_path / "streamed", output_loading_info=True)
    assert not any(info.values()) and loaded.config.quantization_config.bits == 4


def test_scales_that_are_larger_than_a_file(make_model: MakeModel, tmp_path: Path) -> None:
    """They get one of their own, which comes before that of the integers."""
    make_model().save_pretrained(tmp_path / "full")
    stacks: Any = quantize_experts(tmp_path / "full", 4, 2).state_dict()
    [size] = {tensor.nbytes for name, tensor in stacks.items() if name.endswith("up_proj_packed")}
    assert all(tensor.nbytes > size for name, tensor in stacks.items() if name.endswith("up_proj_scale"))
    both_ways(tmp_path / "full", tmp_path, bits=4, group_size=2, max_shard_size=size + 100)


def test_pruned_and_merged(make_model: MakeModel, tmp_path: Path) -> None:
    pruned: Any = prune_experts(make_model(), None, keep=2, criterion="random", renormalize=False).model
    pruned.save_pretrained(tmp_path / "full")
    both_ways(tmp_path / "full", tmp_path, bits=8)


def test_tokenizer_and_generation_config_come_along(
    make_model: MakeModel, tokenizer: ZCodeM3Tokenizer, tmp_path: Path
) -> None:
    model: Any = make_model()
    model.generation_config.num_beams = 3
    model.save_pretrained(tmp_path / "full")
    tokenizer.save_pretrained(tmp_path / "full")
    both_ways(tmp_path / "full", tmp_path, bits=8)
    loaded: Any = ZCodeM3ForConditionalGeneration.from_pretrained(tmp_path / "streamed")
    assert loaded.generation_config.num_beams == 3
    assert ZCodeM3Tokenizer.from_pretrained(tmp_path / "streamed").languages == tokenizer.languages
    written = json.loads((tmp_path / "streamed" / "compression_report.json").read_text())
    assert written["operation"] == "quantize_experts" and len(written["relative_errors"]) == 3


DAMAGES: list[tuple[str, Callable[[Tensor], Tensor | None], str]] = [
    (EXPERT, lambda weight: None, r"expert 3 of model.encoder.layers.1.ffn.experts.up_proj is missing"),
    (EXPERT, lambda weight: weight[1:].contiguous(), rf"{EXPERT} is torch.float32 of shape"),
    (EXPERT, lambda weight: weight.to(torch.int8), rf"{EXPERT} is torch.int8 of shape"),
    (EXPERT, lambda weight: weight.clone().fill_(torch.nan), rf"{EXPERT} in .*safetensors has numbers that are NaN"),
    ("model.encoder.layer_norm.weight", lambda weight: None, "missing: model.encoder.layer_norm.weight"),
    ("model.encoder.layer_norm.weight", lambda w: w / 0, r"model.encoder.layer_norm.weight in .* NaN or infinite"),
]


@pytest.mark.parametrize(("name", "change", "message"), DAMAGES)
def test_damaged_nllb_moe(name: str, change: Any, message: str, tmp_path: Path) -> None:
    shutil.copytree(NLLB_MOE / "tiny_a", tmp_path / "full")
    weights = load_file(tmp_path / "full" / "model.safetensors")
    changed = {**weights, name: change(weights[name])}
    save_file({k: w for k, w in changed.items() if w is not None}, tmp_path / "full" / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        quantize_experts(tmp_path / "full", output_dir=tmp_path / "small")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_numbers_that_the_dtype_cannot_hold(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        model.get_parameter("model.encoder.layers.1.ffn.experts.down_proj")[2, 0, 0] = 1e6
    model.save_pretrained(tmp_path / "full")
    with pytest.raises(ValueError, match=r"down_proj of expert 2 has 1e\+06 .* torch.float16 cannot hold"):
        quantize_experts(tmp_path / "full", dtype="float16", output_dir=tmp_path / "small")
    for wrong in (tmp_path / "full", model):
        with pytest.raises(ValueError, match=r"dtype \('int8'\) must be one of auto, float32"):
            quantize_experts(wrong, dtype="int8")
    with pytest.raises(ValueError, match="'auto' for a model in memory"):
        quantize_experts(model, dtype="float16")


PROGRAM = """
import re, sys
from pathlib import Path
from hf_moe_ted import quantize_experts

def kibibytes(name):
    return int(re.search(rf"{name}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

small, full, output, bits, what, dtype = sys.argv[1:]
quantize_experts(Path(small), int(bits), output_dir=Path(output) / "warm")  # all that is loaded when it is first used
before = kibibytes("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew; that of getrusage has the parent's in it
quantize_experts(
    Path(full), int(bits), what=what, dtype=dtype, output_dir=Path(output) / "new", max_shard_size="24MB"
)
print((kibibytes("VmHWM") - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize(
    ("sizes", "what", "dtype"),
    [
        ({"vocab_size": 272, "encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048, "num_experts": 8}, "experts", "auto"),
        ({"vocab_size": 160_000, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_experts": 2}, "all", "bfloat16"),
    ],
    ids=["experts", "embeddings"],
)
def test_peak_memory(sizes: dict[str, int], what: str, dtype: str, make_model: MakeModel, tmp_path: Path) -> None:
    """Of 350 MiB: one shard, the largest tensor, files that are mapped in parts, and what rounding takes."""
    config = ZCodeM3Config(
        d_model=512, encoder_layers=3, decoder_layers=2, encoder_sparse_step=1, decoder_sparse_step=1, **sizes
    )
    make_model().save_pretrained(tmp_path / "small")
    with torch.device("meta"):
        model = ZCodeM3ForConditionalGeneration(config)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-1, 1)
    weights = model.state_dict()
    copies = {"lm_head.weight": weights["lm_head.weight"].clone()}  # as checkpoints of others have them
    model.save_pretrained(tmp_path / "full", max_shard_size="64MB")
    if what == "all":
        save_file(copies, tmp_path / "full" / "copies.safetensors")
        index = tmp_path / "full" / "model.safetensors.index.json"
        fields = json.loads(index.read_text())
        fields["weight_map"] |= dict.fromkeys(copies, "copies.safetensors")
        index.write_text(json.dumps(fields))
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    largest = max(parameter.nbytes for parameter in model.parameters())
    del model, weights, copies
    command = [sys.executable, "-c", PROGRAM, tmp_path / "small", tmp_path / "full", tmp_path, "4", what, dtype]
    peak = int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    shard = max(file.stat().st_size for file in (tmp_path / "new").glob("*.safetensors"))
    # pages of files that are mapped count until the system takes them, and copies are compared with what they copy
    bound = shard + largest + (192 if what == "all" else 128) * MIB
    assert peak < bound, (peak / MIB, bound / MIB)
    assert what == "all" or num_bytes > 1.7 * bound
