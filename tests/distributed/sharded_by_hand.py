"""Small models, sharded as TED does it but by hand, and trained with gradients that depend on names only."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.optim.lr_scheduler import LambdaLR
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from hf_moe_ted import ZCodeM3ForConditionalGeneration
from hf_moe_ted.distributed.checkpoint import named_tensors
from hf_moe_ted.distributed.sharding import regions
from hf_moe_ted.testing import run_distributed_test, tiny_config

NUM_STEPS = 2
# data, tensor, expert data, expert, expert tensor
EIGHT = [(4, 2, 2, 2, 2), (8, 1, 4, 2, 1), (1, 8, 1, 4, 2)]
FOUR = [(2, 2, 1, 2, 2), (4, 1, 4, 1, 1)]


def zcode_m3(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Tied weights, and sizes that data parallelism does not divide."""
    torch.manual_seed(0)
    config = tiny_config(
        num_experts=6, d_model=24, encoder_layers=2, decoder_layers=1, position_embedding_type="learned"
    )
    return ZCodeM3ForConditionalGeneration(config).to(dtype)


def mixtral(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Experts with gate and up projections in one, and no tied weights."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    return MixtralForCausalLM(config).to(dtype)


def dense_placement(name: str) -> Placement:
    if name.endswith((".fc1.weight", ".fc1.bias", "_proj.weight", "_proj.bias")) and "out_proj" not in name:
        return Shard(0)
    return Shard(1) if name.endswith(("fc2.weight", "out_proj.weight", "shared.weight")) else Replicate()


def expert_placement(name: str) -> Placement:
    kind = name.rpartition(".")[2]
    placements = {"gate_up_proj": _StridedShard(1, split_factor=2), "up_proj": Shard(1), "up_proj_bias": Shard(1)}
    return placements.get(kind, Shard(2) if kind == "down_proj" else Replicate())


def shard(model: PreTrainedModel, layout: tuple[int, ...]) -> PreTrainedModel:
    """What TED makes of a model, by hand; axes of size 1 are left out, so that some parameters stay plain tensors."""
    data, tensor, expert_data, expert, expert_tensor = layout
    device = model.device.type
    dense = init_device_mesh(device, (data, tensor), mesh_dim_names=("fsdp", "tp"))
    experts = init_device_mesh(device, (expert_data, expert, expert_tensor), mesh_dim_names=("efsdp", "ep", "etp"))
    new: dict[Tensor, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if ".experts." in name and expert * expert_tensor > 1:
            mesh, placements = experts["ep", "etp"], [Shard(0), expert_placement(name)]
        elif ".experts." not in name and tensor > 1:
            mesh, placements = dense["tp"], [dense_placement(name)]
        else:
            continue
        new[parameter] = nn.Parameter(distribute_tensor(parameter.data, mesh, placements, src_data_rank=None))
    for module in model.modules():  # ties are kept
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in new:
                setattr(module, name, new[parameter])
    for name, module in model.named_modules():
        if name.endswith(".experts") and expert_data > 1:
            fully_shard(module, mesh=experts["efsdp"])
    if data > 1:
        kept = {p for name, p in model.named_parameters() if ".experts." in name}
        fully_shard(model, mesh=dense["fsdp"], ignored_params=kept)
    return model


def gradient(name: str, shape: torch.Size, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(name.encode()) * 31 + step)
    return torch.randn(shape, generator=generator)


def set_gradients(model: nn.Module, step: int) -> None:
    for name, parameter in named_tensors(model).items():
        if not parameter.requires_grad:
            continue
        parameter.grad = torch.zeros_like(parameter.detach())
        for part in regions(parameter.grad):
            part.local.copy_(gradient(name, parameter.shape, step)[part.slices])


def optimizer_of(model: nn.Module, *, by_layout: bool = False, lr: float = 1e-2) -> torch.optim.AdamW:
    """Biases without decay, as the Trainer has it, and, as it does too, a group for each kind of mesh."""
    groups: dict[Any, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        layout = getattr(parameter, "device_mesh", None) if by_layout else None
        groups.setdefault((name.endswith("bias"), layout and layout.mesh_dim_names), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": group, "weight_decay": 0.0 if key[0] else 0.1} for key, group in groups.items()],
        lr=lr,
        foreach=False,
    )


def decay(step: int) -> float:
    return 0.5**step


def train(
    make_model: Callable[[], PreTrainedModel], layout: tuple[int, ...] | None = None, *, num_steps: int = NUM_STEPS
) -> tuple[PreTrainedModel, torch.optim.AdamW, LambdaLR]:
    model = make_model() if layout is None else shard(make_model(), layout)
    optimizer = optimizer_of(model, by_layout=True)
    scheduler = LambdaLR(optimizer, decay)
    for step in range(num_steps):
        set_gradients(model, step)
        optimizer.step()
        scheduler.step()
    return model, optimizer, scheduler


def reference(make_model: Callable[[], PreTrainedModel], *, num_steps: int = NUM_STEPS) -> dict[str, Tensor]:
    """One process: parameters by name, and what AdamW has of them."""
    model, optimizer, _ = train(make_model, num_steps=num_steps)
    result = {}
    for name, parameter in model.named_parameters():
        result[name] = parameter.detach()
        result |= {f"{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    return result


def check(model: nn.Module, optimizer: torch.optim.Optimizer | None, expected: dict[str, Tensor]) -> None:
    """Every region on this rank, bit for bit."""
    for name, parameter in model.named_parameters():
        tensors = {name: parameter}
        if optimizer is not None:
            assert {*optimizer.state[parameter]} == {"step", "exp_avg", "exp_avg_sq"}
            tensors |= {f"{name}.{key}": value for key, value in optimizer.state[parameter].items()}
        for key, tensor in tensors.items():
            assert tensor.shape == expected[key].shape
            assert tensor.dtype == expected[key].dtype
            for part in regions(tensor):
                assert torch.equal(part.local.cpu(), expected[key][part.slices]), key


def saved_by_eight(save: Callable[[Path], None]) -> Any:
    """A fixture of a module: the folder into which eight processes save in several layouts."""

    @pytest.fixture(scope="module")
    def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("saved")
        run_distributed_test(save, 8, folder)
        return folder

    return saved


def clear(model: nn.Module) -> None:
    for tensor in named_tensors(model).values():
        for part in regions(tensor):
            part.local.zero_()
