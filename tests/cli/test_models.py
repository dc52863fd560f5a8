"""Commands about one model or checkpoint."""

import shutil
from pathlib import Path

import torch
from cli_runs import message_of, run_here
from typer.testing import CliRunner

from hf_moe_ted import ZCodeM3ForConditionalGeneration, ZCodeM3Tokenizer
from hf_moe_ted.cli import app
from hf_moe_ted.testing import tiny_config

FIXTURES = Path(__file__).parents[1] / "fixtures"


def test_init(tmp_path: Path) -> None:
    tiny_config(vocab_size=300).save_pretrained(tmp_path / "config")
    ZCodeM3Tokenizer(languages=["en", "de"]).save_pretrained(tmp_path / "tokenizer")
    options = ["--config", tmp_path / "config", "--seed", "3", "--dtype", "bfloat16", "--max-shard-size", "100KB"]
    printed = run_here("init", tmp_path / "ours", *options, "--tokenizer", tmp_path / "tokenizer")
    assert "tensors of bfloat16" in printed
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    assert ZCodeM3ForConditionalGeneration.from_pretrained(tmp_path / "ours").dtype == torch.bfloat16
    assert ZCodeM3Tokenizer.from_pretrained(tmp_path / "ours").languages == ["en", "de"]

    assert message_of("init", tmp_path / "ours", *options).startswith("output_dir")
    run_here("init", tmp_path / "ours", *options, "--overwrite")


def test_inspect_prints_no_control_characters(tmp_path: Path) -> None:
    source = FIXTURES / "deepspeed" / "m2m_ep2_zero1_top2_fp32"
    shutil.copytree(source, tmp_path / "copy")
    for path in (tmp_path / "copy").glob("*/mp_rank_*_model_states.pt"):
        content = torch.load(path, weights_only=True)
        content["ds_version"] = "0.1\x1b[2J\r0.2"
        torch.save(content, path)
    printed = CliRunner().invoke(app, ["inspect", str(tmp_path / "copy")]).output
    assert "0.1 [2J 0.2" in printed and "\x1b" not in printed and "\r" not in printed
