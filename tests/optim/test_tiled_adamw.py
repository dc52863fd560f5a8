"""TiledAdamW against torch.optim.AdamW, which is the reference: same gradients, same weights."""

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from peak_memory import PeakMemory
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.optim import AdamW
from transformers import Trainer, TrainingArguments

from hf_moe_ted import ZCodeM3ForConditionalGeneration
from hf_moe_ted.optim.tiled_adamw import TiledAdamW
from hf_moe_ted.testing import run_distributed_test, tiny_config

SHAPES = ((37, 11), (3, 5, 7), (64,), ())
STATES = ("exp_avg", "exp_avg_sq", "master")


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters(dtype: torch.dtype = torch.float32, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[nn.Parameter]:
    return [nn.Parameter(random(shape, seed).to(dtype)) for seed, shape in enumerate(shapes)]


def set_gradients(params: list[Any], step: int) -> None:
    for i, param in enumerate(params):
        param.grad = random(param.shape, 1000 * step + i + 100).to(param.dtype)


def train(optimizer: torch.optim.Optimizer, num_steps: int, first: int = 0) -> list[Tensor]:
    """Steps with gradients that depend on the number of the step only, and the parameters after them."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for step in range(first, first + num_steps):
        set_gradients(params, step)
        optimizer.step()
    return [param.detach().clone() for param in params]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)


# --- the same numbers


@pytest.mark.parametrize("tile_numel", [1, 7, 32, 1000, None])
@pytest.mark.parametrize(
    "options",
    [{}, {"weight_decay": 0.0}, {"weight_decay": 1.0}, {"lr": 0.1, "betas": (0.5, 0.7), "eps": 1e-3}],
    ids=["defaults", "no-decay", "most-decay", "others"],
)
def test_float32_is_bitwise_that_of_torch(tile_numel: int | None, options: dict[str, Any]) -> None:
    found = train(TiledAdamW(parameters(), tile_numel=tile_numel, **options), 4)
    assert_equal(found, train(AdamW(parameters(), **options), 4))
    assert_equal(found, train(AdamW(parameters(), foreach=False, **options), 4))
    assert not torch.equal(found[0], parameters()[0])


@pytest.mark.parametrize("lr", [0.05, torch.tensor(0.05), torch.tensor([0.05], dtype=torch.float64)])
def test_groups_and_schedulers(lr: float | Tensor) -> None:
    def run(make: Callable[..., torch.optim.Optimizer]) -> list[Tensor]:
        params = parameters()
        groups = [
            {"params": params[:2], "weight_decay": 0.2},
            {"params": params[2:], "betas": (0.8, 0.9), "eps": 1e-4},
        ]
        optimizer = make(groups, lr=copy.deepcopy(lr))
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.7)
        for step in range(4):
            train(optimizer, 1, first=step)
            scheduler.step()
        return params

    assert_equal(run(lambda *args, **kw: TiledAdamW(*args, tile_numel=9, **kw)), run(AdamW))


@pytest.mark.parametrize("tile_numel", [4, 50, None])
def test_tensors_that_are_not_contiguous_are_stepped_in_place(tile_numel: int | None) -> None:
    def run(make: Callable[..., torch.optim.Optimizer]) -> list[Tensor]:
        bases = [*(random((12, 10), seed) for seed in range(3)), random((2, 9, 8), 3)]
        params = [nn.Parameter(bases[0].t()), nn.Parameter(bases[1][:, ::3]), nn.Parameter(bases[2])]
        params.append(nn.Parameter(bases[3].transpose(0, 2)))  # such as experts' weights
        optimizer = make(params)
        for step in range(3):
            set_gradients(params, step)
            params[2].grad = random((10, 12), step).t()
            optimizer.step()
        return bases

    expected = run(AdamW)
    assert_equal(run(lambda params: TiledAdamW(params, tile_numel=tile_numel)), expected)
    # fused kernels ignore strides: they may see none of these
    assert_equal(run(lambda params: TiledAdamW(params, tile_numel=tile_numel, fused=True)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_is_close(dtype: torch.dtype) -> None:
    found = train(optimizer := TiledAdamW(parameters(dtype), tile_numel=50, fused=True), 4)
    expected = train(reference := TiledAdamW(parameters(dtype), tile_numel=50), 4)
    for param, other in zip(optimizer.state, reference.state, strict=True):
        for name in STATES[: len(optimizer.state[param]) - 1]:
            torch.testing.assert_close(
                optimizer.state[param][name], reference.state[other][name], rtol=1e-6, atol=1e-6, msg=name
            )
    if dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("lr", [0.05, torch.tensor(0.05)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_capturable_is_the_same(dtype: torch.dtype, lr: float | Tensor) -> None:
    fused = [TiledAdamW(parameters(dtype), lr, tile_numel=50, fused=True, capturable=c) for c in (False, True)]
    assert_equal(*(train(optimizer, 4) for optimizer in fused))
    plain = [TiledAdamW(parameters(dtype), lr, tile_numel=50, capturable=c) for c in (False, True)]
    expected, found = (train(optimizer, 4) for optimizer in plain)
    if dtype == torch.bfloat16:
        expected, found = ([state["master"] for state in optimizer.state.values()] for optimizer in plain)
    # 1 - beta**step in float32, as torch computes it then, has five digits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_are_what_float32_training_gives(dtype: torch.dtype) -> None:
    params = parameters(dtype)
    masters = [nn.Parameter(param.detach().float()) for param in params]
    optimizer, reference = TiledAdamW(params, tile_numel=50), AdamW(masters)
    for step in range(4):
        set_gradients(params, step)
        for param, master in zip(params, masters, strict=True):
            master.grad = param.grad.float()
        optimizer.step()
        reference.step()
    assert_equal([optimizer.state[param]["master"] for param in params], masters)
    assert_equal(params, [master.to(dtype) for master in masters])
    assert {optimizer.state[param][name].dtype for param in params for name in STATES} == {torch.float32}


def test_parameters_without_gradient_or_elements_are_skipped() -> None:
    params = [*parameters(), nn.Parameter(torch.empty(0, 4))]
    before = params[1].detach().clone()
    optimizer = TiledAdamW(params)
    set_gradients(params, 0)
    params[1].grad = None
    optimizer.step()
    assert_equal([params[1]], [before])
    assert params[1] not in optimizer.state
    assert optimizer.state[params[4]]["exp_avg"].shape == (0, 4)


def test_closure() -> None:
    param = nn.Parameter(torch.tensor([2.0]))
    optimizer = TiledAdamW([param], lr=0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 4.0
    assert param.item() < 2.0


def test_sparse_gradients_are_refused_before_anything_is_changed() -> None:
    params = parameters(shapes=((4, 3), (5, 2)))
    before = [param.detach().clone() for param in params]
    set_gradients(params, 0)
    params[1].grad = params[1].grad.to_sparse()
    with pytest.raises(ValueError, match=r"parameter of shape \(5, 2\) is sparse"):
        TiledAdamW(params).step()
    assert_equal(params, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"lr \(-1.0\)"),
        ({"lr": float("nan")}, "lr"),
        ({"lr": torch.ones(2)}, "one element"),
        ({"betas": (1.0, 0.9)}, "betas"),
        ({"betas": (0.9, -0.1)}, "betas"),
        ({"betas": (0.9,)}, "betas"),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"tile_numel": 0}, r"tile_numel \(0\)"),
        ({"tile_numel": 1e6}, "tile_numel"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TiledAdamW(parameters(), **options)


def test_wrong_groups() -> None:
    with pytest.raises(ValueError, match="weight_decay"):
        TiledAdamW([{"params": parameters(), "weight_decay": -1.0}])
    with pytest.raises(ValueError, match="complex64"):
        TiledAdamW([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    optimizer = TiledAdamW(parameters())
    for wrong in ({"lr": -1.0}, {"params": [nn.Parameter(torch.zeros(2, dtype=torch.complex64))]}):
        with pytest.raises(ValueError, match=r"lr|complex64"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], **wrong})
        assert len(optimizer.param_groups) == 1


# --- memory and launches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
def test_temporaries_are_one_tile(dtype: torch.dtype, fused: bool) -> None:
    shapes = ((512, 300), (300, 512), *[(100,)] * 200)
    numel = 2 * 512 * 300 + 200 * 100
    optimizer = TiledAdamW(parameters(dtype, shapes), tile_numel=4096, fused=fused)
    train(optimizer, 1)
    with PeakMemory() as memory:
        optimizer.step()
    assert memory.peak / numel < 0.1
    needs_tile = not fused or dtype == torch.bfloat16
    assert 4 * 4000 * needs_tile <= memory.peak <= 4 * 4096 + 64
    if not fused:  # what the bound is about, and that the measurement sees it
        reference = AdamW(parameters(dtype, shapes), foreach=True)
        train(reference, 1)
        with PeakMemory() as memory:
            reference.step()
        assert memory.peak / numel >= dtype.itemsize


@pytest.mark.parametrize("fused", [False, True])
def test_small_parameters_share_kernel_launches(fused: bool) -> None:
    optimizer = TiledAdamW(parameters(torch.bfloat16, ((10,),) * 1000), fused=fused)
    train(optimizer, 1)
    with PeakMemory() as operations:
        optimizer.step()
    per_parameter = operations.num_calls / 1000
    assert (
        per_parameter < 3.5
    )  # counting the step, reading it, viewing the gradient's copy; what is on a device is shared


# --- saving and loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_resumed(dtype: torch.dtype) -> None:
    optimizer = TiledAdamW(params := parameters(dtype), lr=0.1, tile_numel=20)
    train(optimizer, 3)
    torch.save(optimizer.state_dict(), file := io.BytesIO())
    file.seek(0)
    resumed = TiledAdamW([nn.Parameter(param.detach().clone()) for param in params], tile_numel=33)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.tile_numel == 33
    names = STATES if dtype == torch.bfloat16 else STATES[:2]
    for state, loaded in zip(optimizer.state.values(), resumed.state.values(), strict=True):
        assert set(loaded) == {"step", *names}
        assert loaded["step"] == 3
        assert_equal([loaded[name] for name in names], [state[name] for name in names])
    assert_equal(train(resumed, 2, first=3), train(optimizer, 2, first=3))


def test_copies_and_pickles_keep_the_options() -> None:
    optimizer = TiledAdamW(parameters(), tile_numel=20, fused=False, capturable=True)
    train(optimizer, 1)
    torch.save(optimizer, file := io.BytesIO())
    file.seek(0)
    for other in (copy.deepcopy(optimizer), torch.load(file, weights_only=False)):
        assert (other.tile_numel, other.fused, other.capturable) == (20, False, True)
        assert_equal(train(other, 1, first=1), train(copy.deepcopy(optimizer), 1, first=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_of_torch_is_resumed_and_back(dtype: torch.dtype) -> None:
    reference = AdamW(parameters(), lr=0.1)
    weights = train(reference, 2)
    optimizer = TiledAdamW([nn.Parameter(weight.to(dtype)) for weight in weights])
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    for param, state in optimizer.state.items():
        assert ("master" in state) == (dtype != torch.float32)
        assert_equal([state.get("master", param)], [param.float()])
    found = train(optimizer, 2, first=2)
    if dtype == torch.float32:
        assert_equal(found, train(reference, 2, first=2))
        back = AdamW([nn.Parameter(weight) for weight in found])
        back.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert_equal(train(back, 1, first=4), train(reference, 1, first=4))


def test_a_checkpoint_without_masters_is_unflattened_by_torch() -> None:
    flatten = StateDictOptions(flatten_optimizer_state_dict=True)
    model = nn.Linear(3, 2)
    reference = AdamW(model.parameters())
    train(reference, 1)
    saved = get_optimizer_state_dict(model, reference, options=flatten)
    low = copy.deepcopy(model).bfloat16()
    optimizer = TiledAdamW(low.parameters())
    set_optimizer_state_dict(low, optimizer, saved, options=flatten)
    for param, state in optimizer.state.items():
        assert_equal([state["master"]], [param.float()])
    assert_equal([optimizer.state[low.weight]["exp_avg"]], [reference.state[model.weight]["exp_avg"]])


def test_states_that_do_not_fit_are_refused_and_nothing_is_changed() -> None:
    optimizer = TiledAdamW(parameters())
    train(optimizer, 1)
    before = copy.deepcopy(optimizer.state_dict())

    def refuse(other: torch.optim.Optimizer, message: str) -> None:
        train(other, 1)
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(other.state_dict())
        after = optimizer.state_dict()
        assert after["param_groups"] == before["param_groups"]
        torch.testing.assert_close(after["state"], before["state"], rtol=0.0, atol=0.0)

    refuse(AdamW(parameters(shapes=(*SHAPES[:3], (2,)))), r"exp_avg of parameter 3 has the layout \(\(2,\),\)")
    refuse(AdamW(parameters(shapes=SHAPES[:3])), "size of optimizer's group")
    refuse(AdamW([{"params": [param]} for param in parameters()]), "different number of parameter groups")
    refuse(AdamW(parameters(), amsgrad=True), "amsgrad=True")
    refuse(AdamW(parameters(), maximize=True), "maximize=True")
    refuse(torch.optim.Adam(parameters()), "decoupled_weight_decay=False")
    refuse(torch.optim.SGD(parameters(), momentum=0.9), "parameter 0 has no step, exp_avg, exp_avg_sq")


def test_other_hooks_of_loading_see_the_states() -> None:
    optimizer = TiledAdamW(parameters(torch.bfloat16))
    train(optimizer, 1)
    seen: list[int] = []

    def double_first_moments(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        state = {key: {**state, "exp_avg": 2 * state["exp_avg"]} for key, state in state_dict["state"].items()}
        return {**state_dict, "state": state}

    other = TiledAdamW(parameters(torch.bfloat16))
    other.register_load_state_dict_pre_hook(double_first_moments)
    other.register_load_state_dict_post_hook(lambda optimizer: seen.append(len(optimizer.state)))
    for _ in range(2):
        other.load_state_dict(optimizer.state_dict())
    assert seen == [4, 4]
    for state, loaded in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert_equal([loaded["exp_avg"]], [2 * state["exp_avg"]])


def write_in_place(param: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        param.copy_(value)


def write_as_loading_does(param: Tensor, value: Tensor) -> None:
    nn.ParameterList([param]).load_state_dict({"0": value})


def give_other_memory(param: Tensor, value: Tensor) -> None:
    param.data = value.clone()


@pytest.mark.parametrize("write", [write_in_place, write_as_loading_does, give_other_memory])
@pytest.mark.parametrize("is_loaded", [False, True], ids=["after a step", "after load_state_dict"])
def test_a_step_goes_on_from_weights_that_were_written(write: Callable[..., None], is_loaded: bool) -> None:
    optimizer = TiledAdamW(params := parameters(torch.bfloat16), lr=0.0)
    trained = train(optimizer, 1)
    if is_loaded:
        optimizer.load_state_dict(optimizer.state_dict())
    kept = optimizer.state[params[1]]["master"].clone()
    written = torch.full_like(params[0], 3.0)
    write(params[0], written)
    for _ in range(2):
        optimizer.step()
        assert_equal([params[0], optimizer.state[params[0]]["master"]], [written, written.float()])
        assert_equal([params[1], optimizer.state[params[1]]["master"]], [trained[1], kept])
    optimizer.reset_masters()
    assert not any(state["master"].requires_grad for state in optimizer.state.values())


@pytest.mark.parametrize("weights_first", [True, False])
def test_masters_of_the_same_checkpoint_are_kept_in_any_order(weights_first: bool) -> None:
    optimizer = TiledAdamW(params := parameters(torch.bfloat16), lr=1e-2)
    weights, states = train(optimizer, 2), copy.deepcopy(optimizer.state_dict())
    masters = [optimizer.state[param]["master"].clone() for param in params]
    assert any(not torch.equal(master, weight.float()) for master, weight in zip(masters, weights, strict=True))
    train(optimizer, 1)
    if not weights_first:
        optimizer.load_state_dict(states)
    for param, weight in zip(params, weights, strict=True):
        write_in_place(param, weight)
    if weights_first:
        optimizer.load_state_dict(states)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    assert_equal([optimizer.state[param]["master"] for param in params], masters)


def test_masters_can_be_reset_after_what_a_step_cannot_see() -> None:
    optimizer = TiledAdamW(params := parameters(torch.bfloat16), lr=0.0)
    train(optimizer, 1)
    params[0].data.fill_(3.0)
    optimizer.reset_masters()
    optimizer.step()
    assert_equal([params[0]], [torch.full_like(params[0], 3.0)])


# --- shards

LAYOUTS: dict[str, tuple[tuple[int, ...], Placement]] = {
    "uneven": ((5, 4), Shard(0)),
    "one-row": ((1, 6), Shard(0)),  # the second rank holds nothing
    "columns": ((6, 10), Shard(1)),
    "replicated": ((7,), Replicate()),
    "partial-gradient": ((3, 3), Replicate()),
}


def sharded_optimizer(dtype: torch.dtype, other_layout: bool = False) -> tuple[nn.ParameterDict, TiledAdamW]:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    model = nn.ParameterDict()
    for seed, (name, (shape, placement)) in enumerate(LAYOUTS.items()):
        placement = Shard(0) if other_layout else placement
        model[name] = nn.Parameter(distribute_tensor(random(shape, seed).to(dtype), mesh, [placement]))
        if name == "columns":  # a view into a larger one, as a shard of a fused weight is
            local = model[name].to_local().detach()
            gapped = torch.cat([local, local], dim=1)[:, : local.shape[1]]
            model[name] = nn.Parameter(DTensor.from_local(gapped, mesh, [placement]))
    return model, TiledAdamW(model.parameters(), lr=0.1, tile_numel=8)


def sharded_steps(model: nn.ParameterDict, optimizer: TiledAdamW, num_steps: int, first: int = 0) -> None:
    for step in range(first, first + num_steps):
        for i, (name, param) in enumerate(model.items()):
            grad = random(param.shape, 1000 * step + i + 100).to(param.dtype)
            if name == "partial-gradient":
                world_size = torch.distributed.get_world_size()
                param.grad = DTensor.from_local(grad / world_size, param.device_mesh, [Partial()])
            else:
                param.grad = distribute_tensor(grad, param.device_mesh, param.placements)
        optimizer.step()


def full_tensors(model: nn.ParameterDict) -> list[Tensor]:
    return [param.detach().full_tensor() for param in model.values()]


def train_shards_and_resume_on_other_ones(dtype: torch.dtype, folder: str) -> tuple[list[Tensor], list[Tensor], bool]:
    """Weights after 4 steps without a break, the same resumed after 2 with other shards, whether states are shards."""
    model, optimizer = sharded_optimizer(dtype)
    sharded_steps(model, optimizer, 2)
    flatten = StateDictOptions(flatten_optimizer_state_dict=True)
    saved = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer, options=flatten)}
    dcp.save(saved, checkpoint_id=folder)
    sharded_steps(model, optimizer, 2, first=2)
    are_shards = all(
        state[name].placements == param.placements and state[name].to_local().shape == param.to_local().shape
        for param, state in optimizer.state.items()
        for name in set(state) - {"step"}
    )

    resumed, other = sharded_optimizer(dtype, other_layout=True)
    loaded = {"model": resumed.state_dict(), "optimizer": get_optimizer_state_dict(resumed, other, options=flatten)}
    dcp.load(loaded, checkpoint_id=folder)
    resumed.load_state_dict(loaded["model"])
    set_optimizer_state_dict(resumed, other, loaded["optimizer"], options=flatten)
    sharded_steps(resumed, other, 2, first=2)

    with pytest.raises(ValueError, match=r"has the layout .*reshard it with torch.distributed.checkpoint"):
        other.load_state_dict(optimizer.state_dict())
    return full_tensors(model), full_tensors(resumed), are_shards


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards(dtype: torch.dtype, tmp_path: Path) -> None:
    results = run_distributed_test(train_shards_and_resume_on_other_ones, 2, dtype, str(tmp_path / "checkpoint"))
    expected = train(TiledAdamW(parameters(dtype, tuple(shape for shape, _ in LAYOUTS.values())), lr=0.1), 4)
    for found, resumed, are_shards in results:
        assert are_shards
        assert_equal(found, expected)
        assert_equal(resumed, expected)


def write_into_shards() -> list[bool]:
    """Whether a step without learning rate leaves what was written, by `load_state_dict` and in place."""
    model, optimizer = sharded_optimizer(torch.bfloat16)
    sharded_steps(model, optimizer, 1)
    before = {name: param.detach().clone() for name, param in model.items()}
    sharded_steps(model, optimizer, 1, first=1)
    optimizer.param_groups[0]["lr"] = 0.0
    left = []
    for factor in (1.0, 2.0):
        model.load_state_dict(before)
        with torch.no_grad():
            for param in model.values():
                param.mul_(factor)
        sharded_steps(model, optimizer, 1)
        left += [torch.equal(p.to_local(), factor * before[name].to_local()) for name, p in model.items()]
    return left


def test_a_step_goes_on_from_shards_that_were_written() -> None:
    assert run_distributed_test(write_into_shards, 2) == [[True] * 2 * len(LAYOUTS)] * 2


# --- the Hugging Face tools


def test_accelerate(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = nn.Linear(4, 4).bfloat16()
    optimizer = TiledAdamW(model.parameters(), lr=0.1, tile_numel=5)
    model, optimizer = accelerator.prepare(model, optimizer)

    def step() -> Tensor:
        accelerator.backward(model(torch.ones(2, 4, dtype=torch.bfloat16)).square().sum())
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return torch.cat([state["master"].flatten() for state in optimizer.state.values()])

    step()
    accelerator.save_state(str(tmp_path))
    expected = step()
    accelerator.load_state(str(tmp_path))
    assert_equal([step()], [expected])


def test_trainer_resumes(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 96, (12, 2, 8), generator=generator)
    rows = [{"input_ids": source, "labels": target} for source, target in ids]

    def trainer(**arguments: Any) -> Trainer:
        torch.manual_seed(0)
        options = {"per_device_train_batch_size": 2, "max_steps": 4, "report_to": [], "disable_tqdm": True}
        return Trainer(
            ZCodeM3ForConditionalGeneration(tiny_config()).bfloat16(),
            TrainingArguments(tmp_path, use_cpu=True, save_steps=2, weight_decay=0.1, **options, **arguments),
            train_dataset=rows,
            optimizer_cls_and_kwargs=(TiledAdamW, {"lr": 1e-2, "tile_numel": 1000}),
        )

    whole = trainer()
    whole.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert isinstance(whole.optimizer.optimizer, TiledAdamW)
    assert {group["weight_decay"] for group in whole.optimizer.param_groups} == {0.0, 0.1}
    for state, other in zip(whole.optimizer.state.values(), resumed.optimizer.state.values(), strict=True):
        assert state["master"].dtype == torch.float32
        assert_equal([state[name] for name in STATES], [other[name] for name in STATES])


# --- CUDA


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tile_numel", [7, 1000, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda(tile_numel: int | None, dtype: torch.dtype) -> None:
    def run(make: Callable[..., torch.optim.Optimizer], has_odd_strides: bool = False) -> list[Tensor]:
        params = [nn.Parameter(param.detach().cuda()) for param in parameters(dtype, (*SHAPES, (9, 1)))]
        shape_and_seeds = [(param.shape, seed) for seed, param in enumerate(params)]
        gradients = [
            [random(shape, seed + step).to(dtype).cuda() for shape, seed in shape_and_seeds] for step in range(3)
        ]
        optimizer = make(params)
        torch.cuda.set_sync_debug_mode("error")  # a step may not wait for the device
        for of_step in gradients:
            for param, gradient in zip(params, of_step, strict=True):
                param.grad = gradient
            if has_odd_strides:
                params[-1].grad = of_step[-1].as_strided((9, 1), (1, 5))  # contiguous all the same
            optimizer.step()
        torch.cuda.set_sync_debug_mode("default")
        return [optimizer.state[param].get("master", param.detach()) for param in params]

    plain = run(lambda params: TiledAdamW(params, tile_numel=tile_numel, fused=False))
    for has_odd_strides in (False, True):
        fused = run(lambda params: TiledAdamW(params, tile_numel=tile_numel), has_odd_strides)
        torch.testing.assert_close(fused, plain, rtol=1e-6, atol=1e-6)
    if dtype == torch.float32:
        assert_equal(plain, run(AdamW))


def weights_after_four_steps(dtype: torch.dtype, fused: bool, as_graph: bool) -> list[Tensor]:
    """With a learning rate that falls; as a graph, the last two are replays."""
    params = [nn.Parameter(param.detach().cuda()) for param in parameters(dtype)]
    for seed, param in enumerate(params):
        param.grad = random(param.shape, 100 + seed).to(param)
    lr = torch.tensor(0.1, device="cuda" if as_graph else "cpu")
    optimizer = TiledAdamW(params, lr, tile_numel=50, fused=fused, capturable=as_graph)
    step: Callable[[], Any] = optimizer.step
    for index in range(4):
        if as_graph and index == 2:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
            step = graph.replay
        lr.mul_(0.5)
        step()
    return [optimizer.state[param].get("master", param.detach()) for param in params]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graph(dtype: torch.dtype, fused: bool) -> None:
    found, expected = (weights_after_four_steps(dtype, fused, as_graph) for as_graph in (True, False))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    optimizer = TiledAdamW([nn.Parameter(torch.ones(3, device="cuda"))])
    with pytest.raises(ValueError, match="capturable"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
