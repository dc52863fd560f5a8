"""DeepSpeed's own checkpoints become models with its logits, and go back without a changed bit."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import M2M100Config

from hf_moe_ted import (
    RuleSet,
    ZCodeM3ForConditionalGeneration,
    ZCodeM3Tokenizer,
    convert_deepspeed_checkpoint,
    export_deepspeed_checkpoint,
    read_deepspeed_state_dict,
)
from hf_moe_ted.testing import tiny_config

FIXTURES = Path(__file__).parents[2] / "fixtures" / "deepspeed"
TOP1 = "m2m_ep1_zero0_top1_fp32"
TOP2 = "m2m_ep2_zero1_top2_fp32"
RESIDUAL = "m2m_ep2_zero2_top1_bf16_residual"
EXPERTS_PER_TOKEN = {TOP1: 1, TOP2: 2, RESIDUAL: 1}
USER_PROGRAM = Path(__file__).with_name("deepspeed_user.py")
NO_DEEPSPEED = importlib.util.find_spec("deepspeed") is None


def expected(name: str) -> dict[str, Any]:
    return torch.load(FIXTURES / name / "expected.pt", weights_only=True)


def convert(name: str, output_dir: Path, **options: Any) -> ZCodeM3ForConditionalGeneration:
    options = {
        "base_config": expected(name)["base_config"],
        "config_overrides": {"num_experts_per_tok": EXPERTS_PER_TOKEN[name]},
        **options,
    }
    convert_deepspeed_checkpoint(FIXTURES / name, output_dir, **options)
    return ZCodeM3ForConditionalGeneration.from_pretrained(output_dir, dtype="auto").eval()


def logits(model: ZCodeM3ForConditionalGeneration, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**{n: batch[n] for n in ("input_ids", "attention_mask", "decoder_input_ids")}).logits.float()


def assert_same_weights(found: Any, weights: dict[str, Tensor]) -> None:
    """`found` may have tied weights under more names."""
    assert set(weights) <= set(found)
    assert set(found) - set(weights) <= {f"model.{side}.embed_tokens.weight" for side in ("encoder", "decoder")} | {
        "lm_head.weight"
    }
    assert [name for name in weights if not torch.equal(found[name].float(), weights[name].float())] == []


@pytest.mark.parametrize("name", EXPERTS_PER_TOKEN)
@pytest.mark.parametrize("weights", ["model", "master"])
def test_logits_are_those_of_the_engine(name: str, weights: str, tmp_path: Path) -> None:
    model = convert(name, tmp_path / "ours", weights=weights)
    golden = expected(name)
    assert model.dtype == (torch.bfloat16 if name == RESIDUAL and weights == "model" else torch.float32)
    torch.testing.assert_close(logits(model, golden), golden["logits"], rtol=0.0, atol=golden["tolerance"])
    assert model.config.use_residual == (name == RESIDUAL)
    assert (model.config.encoder_sparse_layers, model.config.decoder_sparse_layers) == ([1, 3], [1])


@pytest.mark.parametrize("name", EXPERTS_PER_TOKEN)
@pytest.mark.parametrize("expert_parallel_size", [1, 4])
def test_there_and_back_changes_no_bit(name: str, expert_parallel_size: int, tmp_path: Path) -> None:
    model = convert(name, tmp_path / "ours")
    for number, source in enumerate((model, tmp_path / "ours")):
        export_deepspeed_checkpoint(
            source, tmp_path / f"back{number}", rules="m2m100", expert_parallel_size=expert_parallel_size
        )
        back = read_deepspeed_state_dict(tmp_path / f"back{number}")
        assert_same_weights(back, expected(name)["weights"])
        assert {spec.dtype for spec in back.specs.values()} == {model.dtype}


def test_tensor_parallel_export_is_merged_again(tmp_path: Path) -> None:
    convert(TOP1, tmp_path / "ours")
    export_deepspeed_checkpoint(tmp_path / "ours", tmp_path / "back", rules="m2m100", tensor_parallel_size=2)
    shard = torch.load(tmp_path / "back" / "global_step0" / "layer_1_expert_2_mp_rank_01_model_states.pt")
    assert [tuple(tensor.shape) for name, tensor in shard.items() if name.endswith("fc1.weight")] == [(32, 32)]
    rules = RuleSet.load("m2m100")
    back = read_deepspeed_state_dict(tmp_path / "back", tensor_parallel_rules=rules.tensor_parallel)
    assert_same_weights(back, expected(TOP1)["weights"])
    again = tmp_path / "again"
    convert_deepspeed_checkpoint(tmp_path / "back", again, base_config=expected(TOP1)["base_config"])
    first = ZCodeM3ForConditionalGeneration.from_pretrained(tmp_path / "ours").state_dict()
    second = ZCodeM3ForConditionalGeneration.from_pretrained(again).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("as_what", ["object", "folder", "file"])
def test_base_config_in_any_form(as_what: str, tmp_path: Path) -> None:
    config = M2M100Config(**expected(TOP1)["base_config"])
    config.save_pretrained(tmp_path / "base")
    forms = {"object": config, "folder": tmp_path / "base", "file": str(tmp_path / "base" / "config.json")}
    model = convert(TOP1, tmp_path / "ours", base_config=forms[as_what])
    torch.testing.assert_close(logits(model, expected(TOP1)), expected(TOP1)["logits"], rtol=0.0, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "semantics"),
    [
        ({}, {"num_experts_per_tok": 1, "normalize_router_weights": None, "token_drop_policy": "random"}),
        (
            {"num_experts_per_tok": 2, "capacity_factor": 1.5},
            {"normalize_router_weights": "after_dropping", "token_drop_policy": "position", "capacity_factor": 1.5},
        ),
        (
            {"num_experts_per_tok": 3},
            {"normalize_router_weights": "after_dropping", "token_drop_policy": "probability"},
        ),
        ({"token_drop_policy": "position"}, {"token_drop_policy": "position"}),
    ],
)
def test_semantics_of_the_gate(overrides: dict[str, Any], semantics: dict[str, Any], tmp_path: Path) -> None:
    model = convert(TOP1, tmp_path / "ours", config_overrides=overrides)
    assert {name: getattr(model.config, name) for name in semantics} == semantics


def test_report_warns_that_k_is_unknown(tmp_path: Path) -> None:
    base_config = expected(TOP1)["base_config"]
    report = convert_deepspeed_checkpoint(FIXTURES / TOP1, tmp_path / "ours", base_config=base_config)
    assert any("num_experts_per_tok is not in the checkpoint" in warning for warning in report.warnings)
    assert "warning: num_experts_per_tok" in str(report)
    assert report.num_experts == (4, 4, 4)


def test_tokenizer_is_saved_along(tmp_path: Path) -> None:
    tokenizer = ZCodeM3Tokenizer(languages=["en", "de"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for number, given in enumerate((tokenizer, tmp_path / "tokenizer")):
        convert(TOP1, tmp_path / f"ours{number}", tokenizer=given)
        assert ZCodeM3Tokenizer.from_pretrained(tmp_path / f"ours{number}").languages == ["en", "de"]
    with pytest.raises(ValueError, match=r"tokenizer \(nowhere\) must be a tokenizer or a folder"):
        convert(TOP1, tmp_path / "ours", tokenizer="nowhere")


def test_biases_that_were_never_added_become_zero(tmp_path: Path) -> None:
    model = convert(RESIDUAL, tmp_path / "ours", ignore_expert_output_bias=True)
    for name, parameter in model.named_parameters():
        is_ignored = name.endswith(("experts.down_proj_bias", "residual.mlp.fc2.bias"))
        if ".ffn." in name and name.endswith("bias"):
            assert (parameter.abs().sum() == 0) == is_ignored, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_config": {"model_type": "bert"}}, "base_config has model_type 'bert'"),
        ({"base_config": "nowhere"}, r"base_config \(nowhere\) must be a config, a dict or a folder"),
        ({"config_overrides": "{"}, "config_overrides is not JSON"),
        ({"config_overrides": "[1]"}, "config_overrides must be a JSON object"),
        ({"config_overrides": [1]}, r"config_overrides \(\[1\]\) must be a dict"),
        ({"config_overrides": {"num_experts_per_tok": "two"}}, "num_experts_per_tok .*'two'"),
        ({"config_overrides": '{"encoder_ffn_dim": 1000000000}'}, r"encoder_ffn_dim \(1000000000\) must be at most"),
        ({"base_config": {"model_type": "m2m_100", "d_model": "wide"}}, "base_config: this is not a config of M2M100"),
        ({"config_overrides": {"num_expert_per_tok": 2}}, "config_overrides has num_expert_per_tok, which"),
        ({"config_overrides": {"num_experts": 8}}, r"has the shape \(4, 64, 32\), but the config needs \(8, 64, 32\)"),
        ({"config_overrides": {"encoder_sparse_layers": [1]}}, r"unknown: model\.encoder\.layers\.3\.ffn"),
        ({"rules": "fairseq"}, r"163 tensors do not fit the rules fairseq"),
        ({"rules": "nothing"}, r"rules \(nothing\) must be one of"),
        ({"weights": "both"}, r"weights \('both'\) must be"),
        ({"tag": "global_step9"}, "global_step9"),
        ({"dtype": "int4"}, r"dtype \(int4\)"),
    ],
)
def test_wrong_arguments_write_nothing(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        convert(TOP1, tmp_path / "ours", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert_parallel_size": 3}, r"num_experts \(4\) must be divisible by expert_parallel_size \(3\)"),
        ({"expert_parallel_size": 0}, r"expert_parallel_size \(0\) must be at least 1"),
        ({"tensor_parallel_size": 3}, r"must be divisible by tensor_parallel_size \(3\)"),
        ({"rules": "nothing"}, r"rules \(nothing\) must be one of"),
    ],
)
def test_wrong_sizes_write_nothing(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = ZCodeM3ForConditionalGeneration(tiny_config())
    with pytest.raises(ValueError, match=message):
        export_deepspeed_checkpoint(model, tmp_path / "back", **{"rules": "m2m100", **options})
    assert list(tmp_path.iterdir()) == []


def test_own_naming_in_a_yaml_file(tmp_path: Path) -> None:
    """A checkpoint of other names, made by renaming a real one, and the rules for it, made from the shipped ones."""
    shutil.copytree(FIXTURES / TOP1, tmp_path / "theirs")
    for path in (tmp_path / "theirs" / "global_step3").glob("*model_states.pt"):
        content = torch.load(path, weights_only=True)
        tensors = content.get("module", content)
        for name in list(tensors):
            other = name.replace("model.", "net.").replace("fc1.deepspeed_moe", "moe.deepspeed_moe")
            tensors[other] = tensors.pop(name)
        torch.save(content, path)
    shipped = (Path(sys.modules[RuleSet.__module__].__file__).parent / "rules" / "m2m100.yaml").read_text()
    own = shipped.replace('source: "model.', 'source: "net.').replace('ignore: "model.', 'ignore: "net.')
    (tmp_path / "own.yaml").write_text(own)
    base_config = expected(TOP1)["base_config"]
    convert_deepspeed_checkpoint(
        tmp_path / "theirs", tmp_path / "ours", base_config=base_config, rules=tmp_path / "own.yaml"
    )
    model = ZCodeM3ForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    torch.testing.assert_close(logits(model, expected(TOP1)), expected(TOP1)["logits"], rtol=0.0, atol=1e-5)


def test_deepspeed_is_not_needed() -> None:
    code = (
        "import sys, hf_moe_ted.conversion.deepspeed.converter, hf_moe_ted.conversion.deepspeed.writer\n"
        "print('deepspeed' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"


@pytest.mark.slow
@pytest.mark.skipif(NO_DEEPSPEED, reason="needs the extra deepspeed")
@pytest.mark.parametrize(
    ("expert_parallel_size", "top_k", "zero_stage", "use_residual"),
    [(1, 1, 0, False), (2, 2, 1, False), (2, 1, 2, True)],
)
def test_deepspeed_loads_trains_and_saves_what_we_export(
    expert_parallel_size: int, top_k: int, zero_stage: int, use_residual: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    normalize = "after_dropping" if top_k > 1 else None
    options = {"num_experts_per_tok": top_k, "normalize_router_weights": normalize, "use_residual": use_residual}
    model = ZCodeM3ForConditionalGeneration(tiny_config(init_std=0.2, **options)).eval()
    export_deepspeed_checkpoint(model, tmp_path / "exported", rules="m2m100", expert_parallel_size=expert_parallel_size)
    ids = torch.randint(4, 96, (3, 4, 8))
    batch = {"input_ids": ids[0], "attention_mask": torch.ones_like(ids[0]), "decoder_input_ids": ids[1]}
    torch.save({**batch, "labels": ids[2]}, tmp_path / "batch.pt")
    names = M2M100Config().to_dict().keys() & model.config.to_dict().keys()
    base_config = {name: getattr(model.config, name) for name in names} | {"model_type": "m2m_100"}
    base_config |= {"dtype": None, "architectures": None, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(expert_parallel_size), str(USER_PROGRAM), "--config", json.dumps(base_config)]
    command += ["--load", tmp_path / "exported", "--save", tmp_path / "trained", "--batch", tmp_path / "batch.pt"]
    command += ["--expert_parallel_size", str(expert_parallel_size), "--top_k", str(top_k)]
    command += ["--zero_stage", str(zero_stage), *(["--residual"] if use_residual else [])]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment)
    theirs = torch.load(tmp_path / "trained" / "logits.pt", weights_only=True)
    torch.testing.assert_close(logits(model, batch), theirs["loaded"], rtol=0.0, atol=1e-5)

    convert_deepspeed_checkpoint(
        tmp_path / "trained",
        tmp_path / "again",
        base_config=base_config,
        config_overrides={"num_experts_per_tok": top_k},
    )
    again = ZCodeM3ForConditionalGeneration.from_pretrained(tmp_path / "again").eval()
    torch.testing.assert_close(logits(again, batch), theirs["trained"], rtol=0.0, atol=1e-5)
    assert (theirs["trained"] - theirs["loaded"]).abs().max() > 0.1
