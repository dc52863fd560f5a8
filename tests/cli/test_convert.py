"""Commands between formats, and the scripts that are the same."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_runs import initialized, message_of, run, run_here
from transformers import M2M100ForConditionalGeneration
from typer.testing import CliRunner

from hf_moe_ted import ZCodeM3ForConditionalGeneration, read_deepspeed_state_dict
from hf_moe_ted.cli import app

REPOSITORY = Path(__file__).parents[2]
FIXTURES = REPOSITORY / "tests" / "fixtures"
NLLB_MOE = FIXTURES / "nllb_moe" / "tiny_a"


def test_convert_nllb_moe(tmp_path: Path) -> None:
    done = run("convert", "nllb-moe", NLLB_MOE, tmp_path / "ours", "--dtype", "bfloat16", "--max-shard-size", "200KB")
    assert done.returncode == 0, done.stderr
    assert "tensors of bfloat16" in done.stdout
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    ZCodeM3ForConditionalGeneration.from_pretrained(tmp_path / "ours")

    assert message_of("convert", "nllb-moe", NLLB_MOE, tmp_path / "ours").startswith("output_dir")
    run_here("convert", "nllb-moe", NLLB_MOE, tmp_path / "ours", "--overwrite")


def test_deepspeed_there_and_back(tmp_path: Path) -> None:
    source = FIXTURES / "deepspeed" / "m2m_ep2_zero1_top2_fp32"
    golden = torch.load(source / "expected.pt", weights_only=True)
    (tmp_path / "config.json").write_text(json.dumps({**golden["base_config"], "model_type": "m2m_100"}))
    assert "model.encoder.layers.3.fc1" in run_here("inspect", source)

    options = ["--base-config", tmp_path / "config.json", "--config-overrides", '{"num_experts_per_tok": 2}']
    run_here("convert", "deepspeed", source, tmp_path / "ours", *options, "--weights", "master")
    model = ZCodeM3ForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    inputs = {name: golden[name] for name in ("input_ids", "attention_mask", "decoder_input_ids")}
    torch.testing.assert_close(model(**inputs).logits, golden["logits"], rtol=0.0, atol=1e-5)

    run_here("export", "deepspeed", tmp_path / "ours", tmp_path / "back", "--expert-parallel-size", "2")
    back = read_deepspeed_state_dict(tmp_path / "back")
    assert all(torch.equal(back[name], tensor) for name, tensor in golden["weights"].items())

    shutil.copytree(source, tmp_path / "broken")
    next((tmp_path / "broken").glob("*/layer_0_expert_3_*")).unlink()
    inspected = CliRunner().invoke(app, ["inspect", str(tmp_path / "broken")])
    assert inspected.exit_code == 1
    assert "problem: " in inspected.stdout


def test_export_m2m100(tmp_path: Path) -> None:
    run_here(
        "prune", initialized(tmp_path / "full"), "--keep", "1", "--criterion", "random", "--output", tmp_path / "one"
    )
    printed = run_here("export", "m2m100", tmp_path / "one", tmp_path / "m2m100", "--dtype", "float16")
    assert "tensors of float16" in printed and "experts of the sparse layers: none" in printed
    model = M2M100ForConditionalGeneration.from_pretrained(tmp_path / "m2m100", dtype="auto")
    assert model.dtype == torch.float16
    assert "prune --keep 1" in message_of("export", "m2m100", tmp_path / "full", tmp_path / "other")
    assert "is not empty" in message_of("export", "m2m100", tmp_path / "one", tmp_path / "m2m100")
    run_here("export", "m2m100", tmp_path / "one", tmp_path / "m2m100", "--overwrite", "--max-shard-size", "100KB")


def test_config_overrides_are_a_json_object(tmp_path: Path) -> None:
    base = ["convert", "deepspeed", tmp_path / "in", tmp_path / "out", "--base-config", tmp_path, "--config-overrides"]
    assert "config_overrides is not JSON" in message_of(*base, "{a}")
    assert "config_overrides must be a JSON object (fields by name), but is [1]" in message_of(*base, "[1]")
    assert "config_overrides is not JSON" in message_of(*base, "[" * 100_000)


def test_a_file_that_is_no_config_or_a_folder_without_tokenizer(tmp_path: Path) -> None:
    source = FIXTURES / "deepspeed" / "m2m_ep2_zero1_top2_fp32"
    golden = torch.load(source / "expected.pt", weights_only=True)
    base = golden["base_config"] | {"model_type": "m2m_100"}
    (tmp_path / "base.json").write_text(json.dumps(base))
    (tmp_path / "none.json").write_text(json.dumps({"decoder": {"type": "ByteLevel"}}))
    (tmp_path / "empty").mkdir()
    command = ["convert", "deepspeed", source, tmp_path / "new", "--config-overrides", '{"num_experts_per_tok": 2}']
    message = message_of(*command, "--base-config", tmp_path / "none.json")
    assert "none.json" in message or "the config describes no model" in message
    message = message_of(*command, "--base-config", tmp_path / "base.json", "--tokenizer", tmp_path / "empty")
    assert "must be a tokenizer or a folder with one: it has no tokenizer.json and no tokenizer_config.json" in message
    assert not (tmp_path / "new").exists()


def test_upcycle_reads_json() -> None:
    for option in ("--num-experts", "--config-overrides"):
        for text in ("[2", "[" * 100_000):
            done = CliRunner().invoke(app, ["convert", "upcycle", "none", "new", option, text])
            assert done.exit_code == 2 and "is not JSON" in done.output and option in done.output


@pytest.mark.parametrize(
    ("script", "command"),
    [
        ("deepspeed_to_hf.py", "convert deepspeed"),
        ("hf_to_deepspeed.py", "export deepspeed"),
        ("nllb_moe_to_hf.py", "convert nllb-moe"),
        ("upcycle_dense.py", "convert upcycle"),
    ],
)
def test_scripts_are_commands(script: str, command: str) -> None:
    path = REPOSITORY / "convert" / script
    helped = subprocess.run([sys.executable, path, "--help"], check=True, capture_output=True, text=True).stdout
    assert helped == run(*command.split(), "--help").stdout and f"hf-moe-ted {command}" in helped


def test_script_with_underscores(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "none").mkdir()
    script = str(REPOSITORY / "convert" / "deepspeed_to_hf.py")
    arguments = [tmp_path / "none", tmp_path / "new", "--base_config", tmp_path]
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    monkeypatch.setattr(os, "dup2", lambda *_: 0)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(script, run_name="__main__")
    printed = capfd.readouterr()
    assert end.value.code == 1 and printed.out == ""
    assert printed.err.splitlines()[-1].startswith("Error: ")
