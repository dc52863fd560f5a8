"""Masters of ZeRO where tensor, pipeline, data and expert parallelism meet, in files made by hand."""

import sys
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_moe_ted.conversion.deepspeed.reader import inspect_deepspeed_checkpoint, read_deepspeed_state_dict

TP, PP, DP, NUM_EXPERTS = 2, 2, 2, 4
RULES = [(r"q\.weight$", 0)]


class FragmentAddress:
    def __init__(self, start: int, numel: int):
        self.start, self.numel = start, numel


# as its pickles name it
FragmentAddress.__module__, FragmentAddress.__qualname__ = "deepspeed.utils.tensor_fragment", "fragment_address"


def expert_name(stage: int, expert: int) -> str:
    return f"blocks.{stage}.mlp.deepspeed_moe.experts.deepspeed_experts.{expert}.fc1.weight"


def partition(masters: dict[str, Tensor], count: int, index: int) -> tuple[Tensor, dict[str, FragmentAddress]]:
    """Part `index` of `count` equal ones of the flat masters, and where in it each name lies."""
    flat = torch.cat([master.reshape(-1) for master in masters.values()])
    size = flat.numel() // count
    first, last = index * size, (index + 1) * size
    slices, start = OrderedDict(), 0
    for name, master in masters.items():
        begin, end = max(start, first), min(start + master.numel(), last)
        if begin < end:
            slices[name] = FragmentAddress(begin - first, end - begin)
        start += master.numel()
    return flat[first:last].clone(), slices


@pytest.fixture(name="checkpoint", params=[4, 2], ids=["ep4", "ep2"])
def _checkpoint(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, Tensor]]:
    """A folder, and its masters by global names. Experts are not tensor parallel: their ranks are neighbours."""
    ep = request.param
    for module in ("deepspeed", "deepspeed.utils", "deepspeed.utils.tensor_fragment"):
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
    sys.modules["deepspeed.utils.tensor_fragment"].fragment_address = FragmentAddress  # type: ignore[attr-defined]
    torch.manual_seed(0)
    folder = tmp_path / "step"
    folder.mkdir()
    (tmp_path / "latest").write_text("step")
    masters = {}
    for stage in range(PP):
        masters[f"blocks.{stage}.q.weight"] = torch.randn(6, 8)
        masters[f"blocks.{stage}.mlp.deepspeed_moe.gate.wg.weight"] = torch.randn(NUM_EXPERTS, 8)
        masters |= {expert_name(stage, expert): torch.randn(4, 8) for expert in range(NUM_EXPERTS)}
        for tp_rank in range(TP):
            write_rank(folder, masters, stage, tp_rank, ep)
    return tmp_path, masters


def write_rank(folder: Path, masters: dict[str, Tensor], stage: int, tp_rank: int, ep: int) -> None:
    mp_rank, num_local = stage * TP + tp_rank, NUM_EXPERTS // ep
    q, gate = f"blocks.{stage}.q.weight", f"blocks.{stage}.mlp.deepspeed_moe.gate.wg.weight"
    dense = {q: masters[q].chunk(TP)[tp_rank], gate: masters[gate]}
    shapes = {name: master.shape for name, master in dense.items()}
    shapes |= {expert_name(stage, local): torch.Size((4, 8)) for local in range(num_local)}
    main = {
        "module": {name: master.bfloat16() for name, master in dense.items()},
        "param_shapes": [shapes],
        "checkpoint_parallel_dimensions": {"pp_degree": PP, "tp_degree": TP},
        "dp_world_size": DP,
        "num_experts": [NUM_EXPERTS],
        "ds_config": {"zero_optimization": {"stage": 1}},
    }
    torch.save(main, folder / f"mp_rank_{mp_rank:02d}_model_states.pt")
    for dp_rank in range(DP):
        world_rank = dp_rank * TP + tp_rank  # inside the stage
        first = world_rank % ep * num_local
        experts = {expert_name(stage, local): masters[expert_name(stage, first + local)] for local in range(num_local)}
        for expert in range(first, first + num_local):
            content = {expert_name(stage, expert): masters[expert_name(stage, expert)].bfloat16()}
            torch.save(content, folder / f"layer_0_expert_{expert}_mp_rank_{mp_rank:02d}_model_states.pt")
        counts = [DP, DP * TP // ep]
        parts = [partition(dense, counts[0], dp_rank), partition(experts, counts[1], world_rank // ep)]
        state = {
            "base_optimizer_state": {"param_groups": [{"name": "dense"}, {"name": f"ep_size_{ep}", "moe": True}]},
            "partition_count": counts,
            "single_partition_of_fp32_groups": [flat for flat, _ in parts],
            "param_slice_mappings": [slices for _, slices in parts],
        }
        path = folder / f"bf16_zero_pp_rank_{dp_rank}_mp_rank_{mp_rank:02d}_optim_states.pt"
        torch.save({"optimizer_state_dict": state}, path)


def test_masters_with_tensor_and_pipeline_parallelism(checkpoint: tuple[Path, dict[str, Tensor]]) -> None:
    folder, expected = checkpoint
    layout = inspect_deepspeed_checkpoint(folder)
    assert (layout.problems, layout.tensor_parallel_size, layout.pipeline_parallel_size) == ((), TP, PP)
    assert layout.has_masters
    found = dict(read_deepspeed_state_dict(folder, weights="master", tensor_parallel_rules=RULES))
    assert found.keys() == expected.keys()
    for name, master in expected.items():
        assert torch.equal(found[name], master), name


@pytest.mark.parametrize("damage", ["end", "overlap", "negative", "integers", "missing"])
def test_partition_that_its_names_do_not_fit(damage: str, checkpoint: tuple[Path, dict[str, Tensor]]) -> None:
    folder, _ = checkpoint
    path = folder / "step" / "bf16_zero_pp_rank_0_mp_rank_03_optim_states.pt"
    content = torch.load(path, weights_only=False)
    state = content["optimizer_state_dict"]
    masters, slices = state["single_partition_of_fp32_groups"], list(state["param_slice_mappings"][0].values())
    if damage == "end":
        masters[0] = masters[0][:-1].clone()
    elif damage == "overlap":
        slices[1].start -= 1
    elif damage == "negative":
        slices[0].start = -1
    elif damage == "integers":
        masters[0] = masters[0].int()
    else:  # of the last name in the group, a few numbers
        slices[-1].numel -= 4
    torch.save(content, path)
    message = {
        "integers": r"rank_0_mp_rank_03.*its masters are torch\.int32",
        "missing": r"optimizer files of .* have \d+ numbers of blocks\.1\.mlp.*gate.* \(mp_rank 3\), which has 32",
    }.get(damage, r"rank_0_mp_rank_03.*masters of other sizes than its param_slice_mappings says")
    with pytest.raises(ValueError, match=message):
        read_deepspeed_state_dict(folder, weights="master", tensor_parallel_rules=RULES)
