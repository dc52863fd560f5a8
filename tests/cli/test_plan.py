"""`hf-moe-ted plan`: its table, its JSON, and its errors."""

import json
from pathlib import Path

import pytest
from cli_runs import message_of, run_here

from hf_moe_ted import read_planned_config
from hf_moe_ted.testing import tiny_config

OPTIONS = ("--gpus", 4, "--gpu", "h100-80gb", "--batch-tokens", 256, "--sequence", 16, "--tokens", "1.5M")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_config().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["", "config.json"])
def test_table(folder: Path, name: str) -> None:
    lines = run_here("plan", folder / name, *map(str, OPTIONS), "--layouts", "3").splitlines()
    assert lines[0].startswith("101,152 parameters in bfloat16 on 4 x h100-80gb")
    assert lines[1].startswith("TedPlugin(") and lines[2].startswith("TrainingArguments: per_device_train_batch_size=")
    assert lines[3].split()[:6] == ["tp", "ep", "etp", "dp", "replicas", "ZeRO"]
    assert len(lines) == 9 and "are impossible" in lines[-1]


def test_serve(folder: Path) -> None:
    options = ("--gpus", 2, "--gpu", "h100-80gb", "--serve", "--sequence", 16, "--sentences", 3, "--beams", 2)
    lines = run_here("plan", folder, *map(str, options), "--no-cuda-graphs").splitlines()
    assert lines[0].endswith("3 sentences at once with 2 beams, 16 tokens to 16")
    assert lines[1] == f"CUDA_VISIBLE_DEVICES=0 hf-moe-ted serve {folder} --dtype bfloat16 --beams 2 --batch-tokens 48"
    assert "2 copies" in lines[2] and "cuda_graphs = False" in lines[3]
    assert lines[4].split()[0] == "weights" and lines[5].split()[0] == "floats" and "no" in lines[5].split()
    lines = run_here("plan", folder, *map(str, options), "--expert-memory", "200KB", "--host-memory", "0").splitlines()
    assert lines[1].endswith("--expert-memory 200000 --experts-in files")
    content = json.loads(run_here("plan", folder, *map(str, options), "--json", "--expert-memory", "200KB"))
    assert content["ways"][0]["expert_memory"] == 200_000 and content["ways"][0]["ms_per_token"] > 0


@pytest.mark.parametrize("mode", [(), ("--serve",)])
def test_picture(folder: Path, tmp_path: Path, mode: tuple[str, ...]) -> None:
    picture = tmp_path / "memory.png"
    options = ("plan", folder, "--gpus", "1", "--gpu", "h100-80gb", "--sequence", "16", *mode)
    for _ in range(2):  # the second replaces the first
        run_here(*options, "--picture", picture)
        assert picture.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "mine.png").write_text("mine")
    assert "was not written by an earlier run" in message_of(*options, "--picture", tmp_path / "mine.png")
    assert "must end with .png" in message_of(*options, "--picture", tmp_path / "memory.svg")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model_type": "m2m_100"}, "has model_type 'm2m_100', and must have 'zcode_m3' or 'nllb-moe'"),
        ({"d_model": 64}, "has model_type None"),
        ({"model_type": "zcode_m3", "d_model": "wide"}, "Field 'd_model' expected int, got str"),
        ({"model_type": "zcode_m3", "quantization_config": {"quant_method": "zcode_experts", "bits": 8}}, "quantized"),
        ({"model_type": "zcode_m3", "quantization_config": {"quant_method": "gptq"}}, "quant_method 'gptq'"),
    ],
)
def test_models_of_others(tmp_path: Path, content: dict, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert message in message_of("plan", tmp_path, *map(str, OPTIONS))


def test_nllb_moe(tmp_path: Path) -> None:
    """As transformers wrote it: two experts per token, and weights that are read as ZCodeM3's."""
    fields = {
        "model_type": "nllb-moe", "vocab_size": 256_206, "d_model": 2048, "encoder_layers": 24, "decoder_layers": 24,
        "encoder_ffn_dim": 8192, "decoder_ffn_dim": 8192, "encoder_attention_heads": 16, "decoder_attention_heads": 16,
        "num_experts": 128, "encoder_sparse_step": 4, "decoder_sparse_step": 4,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert read_planned_config(tmp_path).num_experts_per_tok == 2
    lines = run_here("plan", tmp_path, "--gpus", "8", "--gpu", "a100-40gb", "--layouts", "1").splitlines()
    assert lines[0].startswith("54,500,569,088 parameters")
    assert "expert_parallel_size=8" in lines[1] and "offload='cpu'" in lines[1]


def test_json(folder: Path) -> None:
    content = json.loads(run_here("plan", folder, *map(str, OPTIONS), "--layouts", "2", "--json"))
    assert (content["num_gpus"], content["total_tokens"], len(content["layouts"])) == (4, 1_500_000, 2)
    best = content["layouts"][0]
    assert best["plugin"].startswith("TedPlugin(") and best["peak_bytes"] > 0 and best["step"]["matmul"] > 0
    assert all(layout["reason"] for layout in content["impossible"])


def test_errors(folder: Path) -> None:
    assert "--tokens ('many') must be a number" in message_of("plan", folder, *map(str, OPTIONS[:-1]), "many")
    assert "total_tokens (0)" in message_of("plan", folder, *map(str, OPTIONS[:-1]), "0")
    assert "gpu ('tpu') must be one of" in message_of("plan", folder, "--gpus", "4", "--gpu", "tpu")
    assert "does not exist" in message_of("plan", folder / "nowhere", *map(str, OPTIONS))
    assert "MODEL" in message_of("plan", folder.parent, *map(str, OPTIONS))  # a folder without a config
    gpus = ("--gpus", "4", "--gpu", "h100-80gb")
    assert "--beams (2) is for translation: give --serve" in message_of("plan", folder, *gpus, "--beams", "2")
    assert "--tokens (1B) is for training" in message_of("plan", folder, *gpus, "--serve", "--tokens", "1B")
    assert "size of expert_memory ('8gb')" in message_of("plan", folder, *gpus, "--serve", "--expert-memory", "8gb")
    assert "num_beams (0)" in message_of("plan", folder, *gpus, "--serve", "--beams", "0")
