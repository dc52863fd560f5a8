"""Checkpoints written by DeepSpeed, as they are, rewritten to other layouts, and damaged."""

import argparse
import os
import pickle
import random
import re
import shutil
import sys
import zipfile
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_moe_ted.conversion.deepspeed import files as deepspeed_files
from hf_moe_ted.conversion.deepspeed.contents import Shard
from hf_moe_ted.conversion.deepspeed.files import FilePool, load_file
from hf_moe_ted.conversion.deepspeed.reader import (
    DeepSpeedLayout,
    inspect_deepspeed_checkpoint,
    read_deepspeed_state_dict,
)

FIXTURES = Path(__file__).parents[2] / "fixtures" / "deepspeed"
NAMES = sorted(path.name for path in FIXTURES.iterdir())
LOST = ["tiny_ep2_zero1_lost_residual", "tiny_tp2_ep1_zero1_bf16_lost_main_file"]
PLAIN, TED = "causal_lm_e_top3_ep2", "causal_lm_f_ted_tp2_ep2_z0"
ZERO0, ZERO2 = "tiny_ep2_zero0_bf16", "causal_lm_e_prmoe_every2_residual_z2_bf16"
EDP, TP = "tiny_ep2_edp2_data_before_expert_zero1_bf16", "tiny_tp2_ep2_edp2_zero1_bf16"
PIPELINE = "tiny_pp2_ep2_zero1_bf16"
EXPERTS = ".deepspeed_moe.experts.deepspeed_experts."
RULES = [(r"\.[qkv]\.(weight|bias)$", 0), (r"\.o\.weight$", 1), (r"fc1\.(weight|bias)$", 0), (r"fc2\.weight$", 1)]
READING_MODES = ("model", "master")

Weights = dict[str, Tensor]


def expected_weights(name: str) -> Weights:
    """The live parameters of all ranks, merged, by names with global expert ids."""
    expected = torch.load(FIXTURES / name / "expected.pt", weights_only=True)
    if "weights" in expected:
        return expected["weights"]
    config = expected["config"]
    shards: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for rank in expected["per_rank"]:
        expert_rank = rank["info"]["ep"].index(rank["rank"])
        for key, value in rank["params"].items():
            if EXPERTS in key:
                module, _, rest = key.partition(EXPERTS)
                expert, _, param = rest.partition(".")
                key = f"{module}{EXPERTS}{expert_rank * (config['E'] // config['ep']) + int(expert)}.{param}"
            shards[key].setdefault(rank["tp_rank"], value)
    return {key: merge(key, [by_rank[rank] for rank in sorted(by_rank)]) for key, by_rank in shards.items()}


def merge(name: str, parts: list[Tensor]) -> Tensor:
    rule = next((rule for rule in RULES if re.search(rule[0], name)), None)
    return parts[0] if len(parts) == 1 or rule is None else torch.cat(parts, rule[1])


def read(folder: Path, weights: str = "model", **options: Any) -> Weights:
    return dict(read_deepspeed_state_dict(folder, weights=weights, tensor_parallel_rules=RULES, **options))


def assert_same(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name
        assert not found[name].requires_grad, name


@cache
def undamaged(name: str, weights: str) -> Weights:
    return read(FIXTURES / name, weights)


@pytest.fixture(name="copy_of")
def _copy_of(tmp_path: Path) -> Callable[[str], Path]:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(FIXTURES / name, tmp_path / name))

    return copy


def tag_of(folder: Path) -> Path:
    return folder / (folder / "latest").read_text()


def files_of(name: str) -> list[str]:
    return sorted(path.name for path in tag_of(FIXTURES / name).iterdir())


def rewrite(path: Path, change: Callable[[Any], Any], new_path: Path | None = None) -> None:
    """Load a file, change its content (in place, or to what `change` returns) and save it."""
    content = torch.load(path, weights_only=True)
    changed = change(content)
    path.unlink()
    torch.save(content if changed is None else changed, new_path or path)


# Real checkpoints


@pytest.mark.parametrize("name", [name for name in NAMES if name not in LOST])
def test_weights_are_those_of_the_live_model(name: str) -> None:
    tensors = read_deepspeed_state_dict(FIXTURES / name, tensor_parallel_rules=RULES)
    expected = expected_weights(name)
    assert expected.keys() <= tensors.keys()
    for key in tensors:
        value = tensors[key]
        assert (value.shape, value.dtype) == (tensors.specs[key].shape, tensors.specs[key].dtype)
        if key in expected:
            assert torch.equal(value, expected[key].to(value.dtype)), key
        else:  # tied names and buffers are no parameters of their own
            assert re.search(r"lm_head|head\.weight|embed_tokens|\.pos$", key), key


@pytest.mark.parametrize("name", NAMES)
def test_masters_round_to_the_weights(name: str) -> None:
    masters, expected = read(FIXTURES / name, "master"), expected_weights(name)
    is_half = bool(re.search("bf16|fp16", name))
    dtype = torch.float16 if "fp16" in name else torch.bfloat16 if is_half else torch.float32
    assert {master.dtype for master in masters.values()} == {torch.float32}
    for key, value in expected.items():
        assert torch.equal(masters[key].to(dtype), value.to(dtype)), key
    if is_half and "tp2" not in name:  # the tensor-parallel ones were saved before the first step
        assert sum(not torch.equal(masters[key], value.float()) for key, value in expected.items()) > 0.9 * len(
            expected
        )


def test_tied_names_have_one_master() -> None:
    masters = read(FIXTURES / "m2m_ep2_zero2_top1_bf16_residual", "master")
    assert torch.equal(masters["lm_head.weight"], masters["model.shared.weight"])
    masters = read(FIXTURES / ZERO0, "master")
    assert torch.equal(masters["head.weight"], masters["emb.weight"])


def test_lost_residual_branch_is_named_and_read_from_masters() -> None:
    folder = FIXTURES / "tiny_ep2_zero1_lost_residual"
    with pytest.raises(ValueError, match=r"lacks blocks.0.experts.mlp.fc1.weight.*coefficient.*weights='master'"):
        read(folder)
    assert_same({k: v for k, v in read(folder, "master").items() if k in expected_weights(folder.name)},
                expected_weights(folder.name))  # fmt: skip


def test_lost_residual_branch_without_zero_is_seen_in_the_optimizer(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of(PLAIN)
    path = tag_of(folder) / "mp_rank_00_model_states.pt"
    rewrite(path, lambda main: main["module"].__delitem__("blocks.1.attn.q.weight"))
    with pytest.raises(ValueError, match=r"lacks 1 tensors that were trained, with the shapes \(16, 16\)"):
        read(folder)


def test_main_file_that_deepspeed_never_wrote_is_named_and_replaced_by_masters() -> None:
    folder = FIXTURES / "tiny_tp2_ep1_zero1_bf16_lost_main_file"
    with pytest.raises(ValueError, match=r"mp_rank_01_model_states.pt missing.*weights='master' reads them"):
        read(folder)
    masters = read(folder, "master")
    assert masters["blocks.0.q.weight"].shape == (16, 16)


# Other layouts, made of real files


def split_pipeline(folder: Path, tensor_parallel_size: int, with_degrees: bool) -> None:
    """Make a stage of each of two layers; the embedding is tied and therefore in both."""
    tag = tag_of(folder)
    for rank in reversed(range(tensor_parallel_size)):
        path = tag / f"mp_rank_{rank:02d}_model_states.pt"
        main = torch.load(path, weights_only=True)
        module = main["module"]
        for stage in (1, 0):
            other = f"blocks.{1 - stage}."
            main["module"] = {
                name: value
                for name, value in module.items()
                if not name.startswith(other) and (stage == 1 or not name.startswith(("lnf", "head")))
            }
            main["optimizer"], main["num_experts"] = None, [4]
            if with_degrees:
                main["checkpoint_parallel_dimensions"] = {"pp_degree": 2, "tp_degree": tensor_parallel_size}
            else:
                main.pop("checkpoint_parallel_dimensions", None)
            torch.save(main, tag / f"mp_rank_{stage * tensor_parallel_size + rank:02d}_model_states.pt")
    for path in sorted(tag.glob("layer_1_*")):
        expert, rank = map(int, re.findall(r"expert_(\d+)_mp_rank_(\d+)", path.name)[0])
        new = tag / f"layer_0_expert_{expert}_mp_rank_{tensor_parallel_size + rank:02d}_model_states.pt"
        rewrite(path, lambda content: None, new)


@pytest.mark.parametrize("with_degrees", [True, False])
@pytest.mark.parametrize("name", [PLAIN, TED])
def test_pipeline_stages(name: str, with_degrees: bool, copy_of: Callable[[str], Path]) -> None:
    folder = copy_of(name)
    split_pipeline(folder, 2 if name == TED else 1, with_degrees)
    assert_same(read(folder), expected_weights(name))
    layout = inspect_deepspeed_checkpoint(folder)
    assert (layout.pipeline_parallel_size, layout.problems) == (2, ())
    paths = sorted(tag_of(folder).glob("mp_rank_*"))
    for path in paths[len(paths) // 2 :]:
        rewrite(path, lambda main: main["module"].update({"emb.weight": torch.zeros(61, 16)}))
    with pytest.raises(ValueError, match=r"emb\.weight is in several pipeline stages"):
        read(folder)


def test_pipeline_of_an_old_version_without_its_last_stage(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of(PIPELINE)
    for path in tag_of(folder).glob("mp_rank_*"):
        rewrite(path, lambda main: main.__delitem__("checkpoint_parallel_dimensions"))
    assert_same(read(folder), undamaged(PIPELINE, "model"))
    for path in tag_of(folder).glob("*_mp_rank_01_*"):
        path.unlink()
    (tag_of(folder) / "mp_rank_01_model_states.pt").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 main files: mp_rank_01_model_states.pt missing.*No other file holds"):
        read(folder, "master")


@pytest.mark.parametrize("name", [PLAIN, TED])
def test_one_file_with_an_expert_of_all_layers(name: str, copy_of: Callable[[str], Path]) -> None:
    folder = copy_of(name)
    tag = tag_of(folder)
    content: dict[str, Weights] = defaultdict(dict)
    for path in tag.glob("layer_*"):
        content[re.sub(r"^layer_\d+_", "", path.name)].update(torch.load(path))
        path.unlink()
    for new_name, tensors in content.items():
        torch.save(tensors, tag / new_name)

    def age(main: dict[str, Any]) -> None:
        main["num_experts"] = 4
        for key in ("buffer_names", "ds_version", "checkpoint_parallel_dimensions", "ds_autoep_layers", "ds_config"):
            main.pop(key)

    for path in tag.glob("mp_rank_*"):
        rewrite(path, age)
    assert len(list(tag.glob("expert_*"))) == (8 if name == TED else 4)
    assert_same(read(folder), expected_weights(name))


def test_megatron_nests_its_main_file_and_leaves_experts_behind(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of(PLAIN)
    tag, renamed = tag_of(folder), "language_model.encoder.layers."

    def nest(main: dict[str, Any]) -> None:
        module = main["module"]
        layers = {n.removeprefix("blocks."): v for n, v in module.items() if n.startswith("blocks.")}
        layers["1.mlp" + EXPERTS + "0.fc1.weight"] = torch.zeros(32, 16)  # under the local id of a rank
        embedding = {"word_embeddings": {"weight": module["emb.weight"]}}
        encoder = {f"layers.{n}": v for n, v in layers.items()}
        encoder |= {"final_layernorm.weight": module["lnf.weight"], "final_layernorm.bias": module["lnf.bias"]}
        main["module"] = {
            "language_model": {"embedding": embedding, "encoder": encoder},
            "head.weight": module["head.weight"],
            "encoderlayers.0.mlp" + EXPERTS + "1.fc1.weight": torch.zeros(32, 16),
        }
        main["args"] = argparse.Namespace(num_layers=2, params_dtype=torch.float32)
        main["rng_state"] = [{"np_rng_state": np.random.get_state(), "seed": np.int64(3), "random": random.getstate()}]

    rewrite(tag / "mp_rank_00_model_states.pt", nest)
    for path in tag.glob("layer_*"):
        rewrite(path, lambda content: {n.replace("blocks.", renamed): v for n, v in content.items()})
    names = {"emb.weight": "language_model.embedding.word_embeddings.weight"}
    names |= {f"lnf.{n}": f"language_model.encoder.final_layernorm.{n}" for n in ("weight", "bias")}
    expected = {names.get(n, n.replace("blocks.", renamed)): v for n, v in expected_weights(PLAIN).items()}
    assert_same(read(folder), expected)


def test_autoep(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of(PLAIN)
    tag = tag_of(folder)

    def name_autoep(name: str) -> str:
        name = re.sub(r"\.deepspeed_moe\.gate\.wg", ".router.gate", name)
        for old, new in (("fc1.weight", "w1"), ("fc2.weight", "w2"), ("fc1.bias", "w3")):
            name = re.sub(rf"\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.{old}", rf".experts.{new}.\1", name)
        return name

    def convert(main: dict[str, Any]) -> None:
        main["module"] = {name_autoep(name): value for name, value in main["module"].items()}
        main["num_experts"] = []
        main["ds_autoep_layers"] = [{"module_path": f"blocks.{i}.mlp", "num_experts": 4} for i in range(2)]

    rewrite(tag / "mp_rank_00_model_states.pt", convert)
    for path in tag.glob("layer_*"):
        rewrite(
            path, lambda c: {name_autoep(n): v for n, v in c.items() if "fc2.bias" not in n} | {"folding": {"tp": 1}}
        )
    expected = {name_autoep(n): v for n, v in expected_weights(PLAIN).items() if not re.search(r"experts.*fc2.bias", n)}
    assert "blocks.1.mlp.experts.w2.3" in expected
    assert_same(read(folder), expected)
    (tag / "layer_1_expert_3_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(ValueError, match=r"lacks expert 3 of blocks\.1\.mlp, which has 4"):
        read(folder)


def test_storage_shared_by_all_experts_is_not_copied(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of(PLAIN)
    for path in tag_of(folder).glob("layer_*"):
        rewrite(path, lambda content: {n: torch.stack([v] * 50)[7] for n, v in content.items()})
    found = read(folder)
    assert_same(found, expected_weights(PLAIN))
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in found.values())


def test_masters_of_the_fused_optimizer(copy_of: Callable[[str], Path]) -> None:
    def flatten(content: dict[str, Any]) -> None:
        state = content["optimizer"]
        state["fp32_groups_flat"] = [torch.cat([t.reshape(-1) for t in group]) for group in state.pop("fp32_groups")]

    folder = copy_of(ZERO0)
    for path in tag_of(folder).glob("expp_*"):
        rewrite(path, flatten)
    assert_same(read(folder, "master"), read(FIXTURES / ZERO0, "master"))


def test_masters_without_names_in_another_order_are_refused(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of(ZERO0)
    path = tag_of(folder) / "expp_rank_1_mp_rank_00_optim_states.pt"
    rewrite(path, lambda content: content["optimizer"]["fp32_groups"][1].reverse())
    with pytest.raises(ValueError, match=r"expp_rank_1.*masters without names.*use weights='model'"):
        read(folder, "master")
    read(folder)


# Tensor-parallel rules


def test_differing_shards_without_a_rule_are_all_named() -> None:
    tensors = read_deepspeed_state_dict(FIXTURES / TED)
    assert tensors.specs["blocks.0.attn.q.weight"].shape == (8, 16)
    assert torch.equal(tensors["lnf.weight"], expected_weights(TED)["lnf.weight"])
    with pytest.raises(ValueError) as error:
        tensors["blocks.0.attn.q.weight"]
    sharded = [name for name in expected_weights(TED) if any(re.search(rule, name) for rule, _ in RULES)]
    assert len(sharded) == 38
    assert all(name in str(error.value) for name in sharded)
    assert "fc2.bias" not in str(error.value) and "lnf" not in str(error.value)


def test_rule_takes_the_first_shard() -> None:
    tensors = read_deepspeed_state_dict(FIXTURES / TED, tensor_parallel_rules=[(r"q\.weight$", None)])
    main = load_file(tag_of(FIXTURES / TED) / "mp_rank_00_model_states.pt")
    assert torch.equal(tensors["blocks.0.attn.q.weight"], main["module"]["blocks.0.attn.q.weight"])


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("(", 0)], "no regular expression"),
        ([("weight", "0")], "must be an integer or None"),
        ([("weight", True)], "must be an integer or None"),
        (["weight"], "give pairs"),
        ([0], "give pairs"),
        ([("q.bias", 1)], r"joins blocks\.0\.attn\.q\.bias along dimension 1"),
        ([("q.weight", -3)], r"joins blocks\.0\.attn\.q\.weight along dimension -3"),
    ],
)
def test_invalid_rules(rules: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_deepspeed_state_dict(FIXTURES / TED, tensor_parallel_rules=rules)


# Errors


def test_folder_tag_and_weights_are_checked(tmp_path: Path, copy_of: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        read(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no file `latest`.*no checkpoint at all"):
        read(tmp_path)
    folder = copy_of(PLAIN)
    with pytest.raises(ValueError, match=r"tag \('step9'\) is not in .* \(it has global_step3\)"):
        read(folder, tag="step9")
    with pytest.raises(ValueError, match=r"has no file `latest`; .*tag='global_step3'"):
        read(folder / "global_step3")
    with pytest.raises(ValueError, match=r"weights \('fp32'\) must be 'model' or 'master'"):
        read(folder, "fp32")
    (folder / "latest").write_text("global_step4\n")
    with pytest.raises(ValueError, match=r"latest names the tag 'global_step4'.*it has global_step3"):
        read(folder)
    assert_same(read(folder, tag="global_step3"), expected_weights(PLAIN))


def test_expert_checks(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of(PLAIN)
    tag = tag_of(folder)
    first, second = (tag / f"layer_0_expert_{i}_mp_rank_00_model_states.pt" for i in (0, 1))
    content = torch.load(first)
    torch.save(content, tag / "layer_9_expert_0_mp_rank_00_model_states.pt")
    assert_same(read(folder), expected_weights(PLAIN))  # the same twice
    torch.save({n: v + 1 for n, v in content.items()}, tag / "layer_9_expert_0_mp_rank_00_model_states.pt")
    with pytest.raises(ValueError, match=r"experts\.0\.fc1\.weight is in layer_0_expert_0.* with different values"):
        read(folder)
    (tag / "layer_9_expert_0_mp_rank_00_model_states.pt").unlink()
    good = torch.load(second)
    torch.save({n: v[:8] for n, v in good.items()}, second)
    with pytest.raises(ValueError, match=r"experts\.1\.fc1\.weight has the shape \(8, 16\)"):
        read(folder)
    torch.save({n: v.half() for n, v in good.items()}, second)
    with pytest.raises(
        ValueError, match=r"blocks\.0\.mlp fc1\.weight has several dtypes: torch.float16, torch.float32"
    ):
        read(folder)
    torch.save({n.replace("blocks.0", "blocks.7"): v for n, v in good.items()}, second)
    with pytest.raises(
        ValueError, match=r"(?s)lacks expert 1 of blocks\.0\.mlp.*experts of blocks\.7\.mlp, which the main files"
    ):
        read(folder)


def test_masters_of_another_step_are_refused(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of(ZERO2)
    path = next(tag_of(folder).glob("layer_0_expert_2_*"))
    rewrite(path, lambda content: {n: v * 2 for n, v in content.items()})
    tensors = read_deepspeed_state_dict(folder, weights="master")
    with pytest.raises(ValueError, match=r"master of .*experts\.2\.fc1\.weight in bf16_zero_pp_rank_1.*does not round"):
        dict(tensors)


def test_masters_need_the_files_of_all_ranks(copy_of: Callable[[str], Path]) -> None:
    for name, pattern, message in (
        (EDP, "*zero_pp_rank_2_*", r"lacks zero_pp_rank_2_mp_rank_00_optim_states\.pt .*use weights='model'"),
        (TP, "*zero_pp_*", r"written by ZeRO, but its .*zero_pp_rank.* are missing"),
        (ZERO0, "expp_*", r"has no expp_rank_.*use weights='model'"),
    ):
        folder = copy_of(name)
        for path in tag_of(folder).glob(pattern):
            path.unlink()
        with pytest.raises(ValueError, match=message):
            read(folder, "master")
        assert_same(read(folder), undamaged(name, "model"))


def test_zero3_is_refused(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of(PLAIN)
    torch.save({}, tag_of(folder) / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    with pytest.raises(ValueError, match="ZeRO-3"):
        read(folder)
    assert inspect_deepspeed_checkpoint(folder).zero_stage == 3


# Damage: the right result or a clear error, never a wrong tensor


def assert_right_or_refused(folder: Path, name: str) -> None:
    for weights in READING_MODES:
        try:
            found = read(folder, weights)
        except ValueError as error:
            assert len(str(error)) > 20
        else:
            assert_same(found, undamaged(name, weights))


def swap(first: Path, second: Path) -> None:
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


DAMAGED = [(name, file) for name in (TED, ZERO0, ZERO2, TP) for file in files_of(name)]


@pytest.mark.parametrize(("name", "file"), DAMAGED)
def test_damaged_file(name: str, file: str, copy_of: Callable[[str], Path]) -> None:
    folder = copy_of(name)
    path = tag_of(folder) / file
    content = path.read_bytes()
    is_weight = file.endswith("model_states.pt")

    path.unlink()
    if is_weight:
        with pytest.raises(ValueError, match=r"lacks expert|has \d of \d|no experts of mp_rank|main files"):
            read(folder)
    assert_right_or_refused(folder, name)
    for damaged in (
        content[:-1],
        content[: len(content) // 2],
        content[: len(content) // 2].ljust(len(content), b"\0"),
        b"",
    ):
        path.write_bytes(damaged)
        if is_weight:
            with pytest.raises(ValueError, match=f"{file} cannot be read; it may be truncated"):
                read(folder)
        assert_right_or_refused(folder, name)
    path.write_bytes(content + b"\0" * 7)
    assert_right_or_refused(folder, name)
    path.write_bytes(content)

    other = path.with_name(
        re.sub(r"(\d+)(?=_mp)|rank_00(?=_model)", lambda m: "7" if m[1] else "rank_01", file, count=1)
    )
    path.rename(other)
    assert_right_or_refused(folder, name)


@pytest.mark.parametrize("name", [TED, ZERO0, ZERO2, EDP, TP])
def test_swapped_files(name: str, copy_of: Callable[[str], Path]) -> None:
    folder = copy_of(name)
    kinds: dict[str, list[Path]] = defaultdict(list)
    for file in files_of(name):
        kinds[re.sub(r"\d+", "", file)].append(tag_of(folder) / file)
    pairs = [pair for paths in kinds.values() for pair in combinations(paths, 2)]
    for pair in random.Random(0).sample(pairs, min(len(pairs), 12)):
        swap(*pair)
        assert_right_or_refused(folder, name)
        swap(*pair)
    assert_same(read(folder), undamaged(name, "model"))


@pytest.mark.parametrize("name", [TED, ZERO2])
def test_resized_tensors(name: str, copy_of: Callable[[str], Path]) -> None:
    folder = copy_of(name)
    for file in [file for file in files_of(name) if file.endswith("model_states.pt")][::5]:
        path = tag_of(folder) / file
        good = path.read_bytes()
        content = torch.load(path)
        tensors = content.get("module", content)
        for key in list(tensors)[:: len(tensors) // 4]:
            value = tensors[key]
            tensors[key] = torch.cat([value, value])
            torch.save(content, path)
            with pytest.raises(ValueError, match=re.escape(key)):
                read(folder)
            tensors[key] = value
        path.write_bytes(good)


def test_flipped_bits_in_weights_and_masters(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of(ZERO2)
    for pattern, weights in (
        ("mp_rank_00*", "model"),
        ("layer_0_expert_1_*", "model"),
        ("bf16_zero_pp_rank_1_*", "master"),
    ):
        path = next(tag_of(folder).glob(pattern))
        content = path.read_bytes()
        with zipfile.ZipFile(path) as archive:
            entry = next(entry for entry in archive.infolist() if entry.filename.endswith("data/0"))
        damaged = bytearray(content)
        damaged[entry.header_offset + 300] ^= 0x40  # the header and its padding are at most 128 bytes
        path.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=rf"{path.name} cannot be read; it may be truncated or damaged: Bad CRC-32"
        ):
            read(folder, weights)
        path.write_bytes(content)
    assert_same(read(folder, "master"), undamaged(ZERO2, "master"))


def laughs(depth: int) -> Any:
    content: Any = {"k": torch.zeros(1)}
    for _ in range(depth):
        content = {"a": content, "b": content}
    return content


BOMBS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda main: main.update(checkpoint_parallel_dimensions={"tp_degree": 10**8}), "tp_degree is 100000000"),
    (lambda main: main.update(checkpoint_parallel_dimensions={"tp_degree": -1}), "tp_degree is -1"),
    (lambda main: main.update(checkpoint_parallel_dimensions={"tp_degree": "2"}), "tp_degree is '2'"),
    (lambda main: main.update(checkpoint_parallel_dimensions={"tp_degree": 2**16, "pp_degree": 2**16}), "any cluster"),
    (lambda main: main.update(mp_world_size=10**12), "mp_world_size is"),
    (lambda main: main.update(dp_world_size=[2]), r"dp_world_size is \[2\]"),
    (lambda main: main.update(module=laughs(40)), "one dict of weights in two places"),
    (lambda main: main.update(module={"a" * 2000: torch.ones(1)}), "at most 1,000 characters"),
    (lambda main: main.update(module={7: torch.ones(1)}), "a weight of the name 7"),
    (lambda main: main.update(num_experts=laughs(60)), r"lists \{'a': \{.*experts"),
    (
        lambda main: main.update(ds_autoep_layers=[{"module_path": "blocks.0.mlp", "num_experts": 10**12}]),
        "num_experts is 1000000000000",
    ),
    (lambda main: main.update(param_shapes=[{"emb.weight": (10**12, 10**12)}]), "is not a main file"),
    (lambda main: main.update(param_shapes=[{"emb.weight": 5}]), "is not a main file"),
    (lambda main: main.update(buffer_names=5), "is not a main file"),
    (lambda main: main.update(optimizer={"param_groups": [{"moe": True}, 5]}), "is not a main file"),
]


@pytest.mark.parametrize(("change", "message"), BOMBS)
def test_small_files_that_ask_for_much_are_refused(
    change: Callable[[dict[str, Any]], Any], message: str, copy_of: Callable[[str], Path]
) -> None:
    folder = copy_of(PLAIN)
    path = tag_of(folder) / "mp_rank_00_model_states.pt"
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    with pytest.raises(ValueError, match=rf"(?s)mp_rank_00_model_states\.pt.*{message}") as error:
        read(folder)
    assert len(str(error.value)) < 5000
    assert re.search(message, "".join(inspect_deepspeed_checkpoint(folder).problems), re.DOTALL)


@pytest.mark.parametrize("file", ["mp_rank_{}_model_states.pt", "zero_pp_rank_{}_mp_rank_00_optim_states.pt"])
def test_ranks_that_no_cluster_has(file: str, copy_of: Callable[[str], Path]) -> None:
    folder = copy_of(PLAIN)
    torch.save({}, tag_of(folder) / file.format(99_999_999))
    with pytest.raises(ValueError, match=r"rank_99999999.* is of a rank of 131,072 or more"):
        read(folder)


def test_pipes_are_not_opened(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of(PLAIN)
    for file in ("mp_rank_00_model_states.pt", "layer_0_expert_1_mp_rank_00_model_states.pt"):
        (tag_of(folder) / file).unlink()
        os.mkfifo(tag_of(folder) / file)
        with pytest.raises(ValueError, match=rf"{file} cannot be read: it is a pipe"):
            read(folder)


# Safety


class Payload:
    def __init__(self, function: Callable[..., Any], *args: Any):
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("kind", ["mp_rank", "layer_0_expert_1", "bf16_zero_pp_rank_1"])
@pytest.mark.parametrize("call", ["system", "eval", "own"])
def test_payload_is_refused_and_not_executed(
    kind: str, call: str, copy_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copy_of(ZERO2)
    proof = tmp_path / "executed"
    code = f"open({str(proof)!r}, 'w')"
    payload, named = {
        "system": (Payload(__import__("os").system, f"touch {proof}"), "posix.system|nt.system"),
        "eval": (Payload(eval, code), "eval"),
        "own": (Payload(shutil.copyfile, str(folder / "latest"), str(proof)), "shutil.copyfile"),
    }[call]
    path = next(tag_of(folder).glob(f"{kind}*"))
    torch.save({"optimizer_state_dict": payload, "module": payload, "weight": payload}, path)
    with pytest.raises(ValueError, match=rf"{path.name} names ({named}), .*nothing in the file was executed"):
        read(folder, "master")
    inspect_deepspeed_checkpoint(folder)
    assert not proof.exists()


def test_payload_in_a_file_of_old_pytorch_is_refused(copy_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy_of(PLAIN)
    path = tag_of(folder) / "mp_rank_00_model_states.pt"
    path.write_bytes(pickle.dumps(Payload(eval, f"open({str(tmp_path / 'executed')!r}, 'w')"), protocol=2))
    with pytest.raises(ValueError, match=r"mp_rank_00_model_states\.pt cannot be read|names eval"):
        read(folder)
    assert not (tmp_path / "executed").exists()


def test_files_of_old_pytorch_are_read(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of(PLAIN)
    for path in tag_of(folder).glob("*_model_states.pt"):
        torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    assert_same(read(folder), expected_weights(PLAIN))


def test_deepspeed_is_not_imported() -> None:
    assert "deepspeed" not in sys.modules


# Laziness and memory


@pytest.mark.parametrize("weights", READING_MODES)
@pytest.mark.parametrize("name", [TED, ZERO0, ZERO2])
def test_no_tensor_is_read_on_opening(name: str, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    paths: list[Path] = []
    view = FilePool.view

    def counting_view(pool: FilePool, path: Path, select: Callable[[Any], Tensor]) -> Tensor:
        paths.append(path)
        return view(pool, path, select)

    monkeypatch.setattr(FilePool, "view", counting_view)
    tensors = read_deepspeed_state_dict(FIXTURES / name, weights=weights, tensor_parallel_rules=RULES)
    assert len(tensors) > 50 and all(spec.is_meta for spec in tensors.specs.values())
    assert paths == []
    if name == ZERO2:
        tensors["blocks.1.attn.q.weight"]  # in the partitions of both ranks, and checked against the weight
        assert len(paths) == (3 if weights == "master" else 1)


@pytest.mark.parametrize("weights", READING_MODES)
def test_few_files_are_mapped_at_once(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_files, "MAX_MAPPED_FILES", 3)
    monkeypatch.setattr(deepspeed_files, "MAX_MAPPED_BYTES", 4096)
    most_files = most_bytes = 0
    view = Shard.view

    def measuring_view(shard: Shard, pool: FilePool) -> Tensor:
        nonlocal most_files, most_bytes
        tensor = view(shard, pool)
        mapped = Path("/proc/self/maps").read_text().split()
        most_files = max(most_files, len({path for path in mapped if TP in path}))
        most_bytes = max(most_bytes, pool._num_bytes_read - tensor.nbytes)
        return tensor

    monkeypatch.setattr(Shard, "view", measuring_view)
    found = read(FIXTURES / TP, weights)
    monkeypatch.undo()
    assert_same(found, undamaged(TP, weights))
    assert 1 < most_files <= 3
    assert most_bytes <= 4096 + 3 * max(value.nbytes for value in found.values())


def test_caller_owns_what_is_read() -> None:
    tensors = read_deepspeed_state_dict(FIXTURES / ZERO2)
    for name, value in expected_weights(ZERO2).items():
        tensors[name].zero_()
        assert torch.equal(tensors[name], value.to(torch.bfloat16))


# Inspection


def test_layout() -> None:
    layout = inspect_deepspeed_checkpoint(FIXTURES / TED)
    assert layout == DeepSpeedLayout(
        checkpoint_dir=FIXTURES / TED,
        tag="global_step3",
        tensor_parallel_size=2,
        data_parallel_size=2,
        expert_parallel_size=2,
        expert_data_parallel_size=1,
        num_experts={"blocks.0.mlp": 4, "blocks.1.mlp": 4},
        dtypes=(torch.float32,),
        num_tensors=62,
        num_bytes=layout.num_bytes,
        deepspeed_version="0.19.8",
        has_masters=True,
    )
    for line in (
        "tag global_step3, DeepSpeed 0.19.8",
        "62 tensors of float32",
        "expert data 1",
        "blocks.1.mlp: 4 experts",
    ):
        assert line in str(layout)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [(PLAIN, (1, 2, 2, 1)), (ZERO2, (1, 2, 2, 1)), (EDP, (1, 4, 2, 2)), (TP, (2, 2, 2, 2)), (LOST[1], (2, 2, 1, 4))],
)
def test_parallel_sizes(name: str, sizes: tuple[int, ...]) -> None:
    found = inspect_deepspeed_checkpoint(FIXTURES / name)
    assert sizes == (
        found.tensor_parallel_size,
        found.data_parallel_size,
        found.expert_parallel_size,
        found.expert_data_parallel_size,
    )
    assert bool(found.problems) == (name in LOST)


def test_masters_are_in_files_of_an_optimizer(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of(PLAIN)
    assert inspect_deepspeed_checkpoint(folder).has_masters
    for path in tag_of(folder).glob("expp_*"):
        torch.save({"optimizer": None}, path)  # as DeepSpeed wrote it under ZeRO
    assert not inspect_deepspeed_checkpoint(folder).has_masters
    for path in tag_of(folder).glob("expp_*"):
        path.unlink()
    assert "fp32 masters: no" in str(inspect_deepspeed_checkpoint(folder))


def test_layout_collects_problems(copy_of: Callable[[str], Path], tmp_path: Path) -> None:
    assert "is not a folder" in inspect_deepspeed_checkpoint(tmp_path / "nowhere").problems[0]
    folder = copy_of(TED)
    (tag_of(folder) / "mp_rank_01_model_states.pt").write_bytes(b"PK")
    for path in tag_of(folder).glob("layer_1_expert_3_*"):
        path.unlink()
    layout = inspect_deepspeed_checkpoint(folder)
    assert len(layout.problems) == 2 and all(f"problem: {problem}" in str(layout) for problem in layout.problems)
    assert "cannot be read" in layout.problems[0] and "lacks expert 3 of blocks.1.mlp" in layout.problems[1]
