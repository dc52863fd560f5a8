import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_moe_ted import ZCodeM3ForConditionalGeneration, ZCodeM3Tokenizer, read_deepspeed_state_dict
from hf_moe_ted.testing import tiny_config

NLLB_MOE = Path(__file__).parent / "fixtures" / "nllb_moe" / "tiny_a"
COMMAND = Path(sys.executable).with_name("hf-moe-ted")


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, *map(str, arguments)], check=False, capture_output=True, text=True)


def test_convert_nllb_moe(tmp_path: Path) -> None:
    done = run("convert", "nllb-moe", NLLB_MOE, tmp_path / "ours", "--dtype", "bfloat16", "--max-shard-size", "200KB")
    assert done.returncode == 0, done.stderr
    assert "tensors of bfloat16" in done.stdout
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    ZCodeM3ForConditionalGeneration.from_pretrained(tmp_path / "ours")

    again = run("convert", "nllb-moe", NLLB_MOE, tmp_path / "ours")
    assert again.returncode == 1
    assert again.stderr.strip().splitlines()[-1].startswith("Error: output_dir")
    assert "Traceback" not in again.stderr
    assert run("convert", "nllb-moe", NLLB_MOE, tmp_path / "ours", "--overwrite").returncode == 0


def test_init(tmp_path: Path) -> None:
    tiny_config(vocab_size=300).save_pretrained(tmp_path / "config")
    ZCodeM3Tokenizer(languages=["en", "de"]).save_pretrained(tmp_path / "tokenizer")
    options = ["--config", tmp_path / "config", "--seed", "3", "--dtype", "bfloat16", "--max-shard-size", "100KB"]
    done = run("init", tmp_path / "ours", *options, "--tokenizer", tmp_path / "tokenizer")
    assert done.returncode == 0, done.stderr
    assert "tensors of bfloat16" in done.stdout
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    assert ZCodeM3ForConditionalGeneration.from_pretrained(tmp_path / "ours").dtype == torch.bfloat16
    assert ZCodeM3Tokenizer.from_pretrained(tmp_path / "ours").languages == ["en", "de"]

    again = run("init", tmp_path / "ours", *options)
    assert again.returncode == 1
    assert again.stderr.strip().splitlines()[-1].startswith("Error: output_dir")
    assert run("init", tmp_path / "ours", *options, "--overwrite").returncode == 0


def test_statistics_and_pruning(tmp_path: Path) -> None:
    demo = Path(__file__).parents[1] / "examples" / "checkpoints" / "zcode_m3_demo"
    rows = [{"source": "Close", "target": "Schlie\u00dfen", "src_lang": "en", "tgt_lang": "de"}] * 3
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = run("expert-statistics", demo, tmp_path / "rows.jsonl", tmp_path / "statistics", "--languages", "en,de")
    assert done.returncode == 0, done.stderr
    assert "3 sentences in 1 directions" in done.stdout

    options = ["--statistics", tmp_path / "statistics", "--languages", "en:de", "--keep", "0.5"]
    done = run("prune", demo, "--output", tmp_path / "half", *options)
    assert done.returncode == 0, done.stderr
    experts = ZCodeM3ForConditionalGeneration.from_pretrained(demo).config.num_experts
    assert ZCodeM3ForConditionalGeneration.from_pretrained(tmp_path / "half").config.num_experts == experts // 2

    wrong = run("prune", demo, "--output", tmp_path / "none", "--keep", "0.5")
    assert wrong.returncode == 1
    assert "statistics" in wrong.stderr.strip().splitlines()[-1]


def test_deepspeed_there_and_back(tmp_path: Path) -> None:
    source = Path(__file__).parent / "fixtures" / "deepspeed" / "m2m_ep2_zero1_top2_fp32"
    golden = torch.load(source / "expected.pt", weights_only=True)
    (tmp_path / "config.json").write_text(json.dumps({**golden["base_config"], "model_type": "m2m_100"}))
    inspected = run("inspect", source)
    assert inspected.returncode == 0, inspected.stderr
    assert "model.encoder.layers.3.fc1" in inspected.stdout

    options = ["--base-config", tmp_path / "config.json", "--config-overrides", '{"num_experts_per_tok": 2}']
    done = run("convert", "deepspeed", source, tmp_path / "ours", *options, "--weights", "master")
    assert done.returncode == 0, done.stderr
    model = ZCodeM3ForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    inputs = {name: golden[name] for name in ("input_ids", "attention_mask", "decoder_input_ids")}
    torch.testing.assert_close(model(**inputs).logits, golden["logits"], rtol=0.0, atol=1e-5)

    done = run("export", "deepspeed", tmp_path / "ours", tmp_path / "back", "--expert-parallel-size", "2")
    assert done.returncode == 0, done.stderr
    back = read_deepspeed_state_dict(tmp_path / "back")
    assert all(torch.equal(back[name], tensor) for name, tensor in golden["weights"].items())

    shutil.copytree(source, tmp_path / "broken")
    next((tmp_path / "broken").glob("*/layer_0_expert_3_*")).unlink()
    inspected = run("inspect", tmp_path / "broken")
    assert inspected.returncode == 1
    assert "problem: " in inspected.stdout


@pytest.mark.parametrize("arguments", [(), ("convert",)])
def test_help(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert "convert" in done.stdout + done.stderr


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, hf_moe_ted.cli; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout.strip() == b"False"
