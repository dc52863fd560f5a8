"""What one layout saves, any other resumes bit for bit: optimizers, schedulers, weights; and what a kill leaves."""

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharded_by_hand import (
    EIGHT,
    FOUR,
    NUM_STEPS,
    check,
    clear,
    decay,
    mixtral,
    optimizer_of,
    reference,
    saved_by_eight,
    set_gradients,
    shard,
    train,
    zcode_m3,
)
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR, LambdaLR, SequentialLR
from transformers import PreTrainedModel

from hf_moe_ted import ClippedAdamW
from hf_moe_ted.distributed.sharding import regions
from hf_moe_ted.distributed.training_state import load_training_state, save_training_state
from hf_moe_ted.testing import run_distributed_test

LAYOUTS = EIGHT[::2]  # AdamW on DTensors takes seconds per layout


def check_resumed(
    folder: Path, model: PreTrainedModel, expected: dict[str, Tensor], *, by_layout: bool = False
) -> torch.optim.AdamW:
    """A fresh optimizer and scheduler, in whatever groups, are as if they had trained here."""
    clear(model)
    optimizer = optimizer_of(model, by_layout=by_layout, lr=3.0)
    scheduler = LambdaLR(optimizer, decay)
    extra = load_training_state(folder, model, optimizer, scheduler)
    assert torch.equal(extra["seeds"], torch.arange(3))
    assert extra["step"] == NUM_STEPS
    check(model, optimizer, expected)
    assert scheduler.last_epoch == NUM_STEPS
    assert scheduler.base_lrs == [1e-2] * len(optimizer.param_groups)
    assert scheduler.get_last_lr() == [1e-2 * 0.25] * len(optimizer.param_groups)
    for group in optimizer.param_groups:
        assert (group["lr"], group["initial_lr"]) == (1e-2 * 0.25, 1e-2)
    return optimizer


def save_and_resume_on_eight(folder: Path) -> None:
    for make_model, layouts in ((zcode_m3, LAYOUTS), (mixtral, LAYOUTS[:1])):
        expected = reference(make_model)
        name = make_model.__name__
        for number, layout in enumerate(layouts):
            model, optimizer, scheduler = train(make_model, layout)
            check(model, optimizer, expected)
            extra = {"step": NUM_STEPS, "seeds": torch.arange(3)}
            save_training_state(folder / f"{name}{number}", model, optimizer, scheduler, extra=extra)
            check_resumed(folder / f"{name}{max(number - 1, 0)}", model, expected)  # of another layout


def check_continued(make_model: Callable[[], PreTrainedModel], model: nn.Module, optimizer: torch.optim.AdamW) -> None:
    set_gradients(model, NUM_STEPS)
    optimizer.step()
    check(model, optimizer, reference(make_model, num_steps=NUM_STEPS + 1))


saved = saved_by_eight(save_and_resume_on_eight)


@pytest.mark.parametrize(("make_model", "num_folders"), [(zcode_m3, len(LAYOUTS)), (mixtral, 1)])
def test_eight_processes_resume_as_one(
    saved: Path, make_model: Callable[[], PreTrainedModel], num_folders: int
) -> None:
    for number in range(num_folders):
        model = make_model()
        optimizer = check_resumed(saved / f"{make_model.__name__}{number}", model, reference(make_model))
        check_continued(make_model, model, optimizer)


def resume_on_four(folder: Path) -> None:
    for make_model, layout in ((zcode_m3, FOUR[0]), (zcode_m3, FOUR[1]), (mixtral, FOUR[0])):
        model = shard(make_model(), layout)
        state = folder / f"{make_model.__name__}0"
        optimizer = check_resumed(state, model, reference(make_model), by_layout=True)
        check_continued(make_model, model, optimizer)


def test_eight_processes_resume_as_four(saved: Path) -> None:
    run_distributed_test(resume_on_four, 4, saved)


class Master(torch.optim.Optimizer):
    """float32 copies of bf16 parameters, which are what is trained, and a state of another kind for each group."""

    def __init__(self, params: Any, lr: float = 1.0):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update(step=0, master=torch.empty_like(parameter.detach(), dtype=torch.float32))
                    state["age"] = torch.zeros((), dtype=torch.int64)
                    for part, low in zip(regions(state["master"]), regions(parameter), strict=True):
                        part.local.copy_(low.local)
                state["step"] += 1
                state["age"] += 2
                for part, low, grad in zip(
                    regions(state["master"]), regions(parameter), regions(parameter.grad), strict=True
                ):
                    part.local.sub_(grad.local.float(), alpha=group["lr"])
                    low.local.copy_(part.local)


def bf16() -> PreTrainedModel:
    return zcode_m3(torch.bfloat16)


def train_master(model: nn.Module) -> Master:
    optimizer = Master(model.parameters(), lr=2**-7)
    for step in range(3):
        set_gradients(model, step)
        optimizer.step()
    return optimizer


def check_master(model: nn.Module, optimizer: Master) -> None:
    truth = bf16()
    expected = train_master(truth)
    for (name, parameter), of_truth in zip(model.named_parameters(), truth.parameters(), strict=True):
        state, state_of_truth = optimizer.state[parameter], expected.state[of_truth]
        assert (state["step"], state["age"].item(), state["age"].dtype) == (3, 6, torch.int64)
        assert state["master"].dtype == torch.float32
        for tensor, whole in ((parameter, of_truth), (state["master"], state_of_truth["master"])):
            for part in regions(tensor):
                assert torch.equal(part.local, whole.detach()[part.slices]), name
    assert not torch.equal(state_of_truth["master"], state_of_truth["master"].bfloat16().float())


def other_cases_on_four(folder: Path) -> None:
    states_keep_their_dtypes(folder / "bf16")
    errors_reach_all(folder)


def states_keep_their_dtypes(folder: Path) -> None:
    model = shard(bf16(), FOUR[0])
    optimizer = train_master(model)
    save_training_state(folder, model, optimizer)
    check_master(model, optimizer)
    masters = [optimizer.state[parameter]["master"] for parameter in model.parameters()]
    for master in masters:
        for part in regions(master):
            part.local.zero_()
    load_training_state(folder, model, optimizer)
    check_master(model, optimizer)
    assert all(optimizer.state[p]["master"] is old for p, old in zip(model.parameters(), masters, strict=True))


def errors_reach_all(folder: Path) -> None:
    rank = dist.get_rank()
    model, optimizer, _ = train(zcode_m3, FOUR[0])
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(ValueError, match="is a file; choose a folder"):
        save_training_state(folder / "bf16" / "training_state.pt", model, optimizer)
    state = optimizer.state[model.get_parameter("model.shared.weight")]
    state["exp_avg"] = torch.zeros(3) if rank == 1 else state["exp_avg"]
    with pytest.raises(ValueError, match=r"exp_avg of model.shared.weight is no DTensor"):
        save_training_state(folder / "new", model, optimizer)
    small = nn.Linear(2, 2)
    write_data = dcp.FileSystemWriter.write_data

    def fail(*args: Any) -> Any:
        if rank == 1:
            raise OSError("disk of rank 1")
        return write_data(*args)

    dcp.FileSystemWriter.write_data = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="rank 1: OSError"):
        save_training_state(folder / "new", small, torch.optim.SGD(small.parameters()))
    dcp.FileSystemWriter.write_data = write_data  # type: ignore[method-assign]
    dist.barrier()
    assert sorted(path.name for path in folder.iterdir()) == before


def test_other_cases(tmp_path: Path) -> None:
    run_distributed_test(other_cases_on_four, 4, tmp_path)
    model = bf16()
    optimizer = Master(model.parameters())
    load_training_state(tmp_path / "bf16", model, optimizer)
    assert optimizer.param_groups[0]["lr"] == 2**-7
    check_master(model, optimizer)


def linear_training(folder: Path, value: float) -> None:
    """Save the state of a small model whose weights are all `value`, or compare with it."""
    model = nn.Linear(4, 2)
    nn.init.constant_(model.weight, value)
    save_training_state(folder, model, torch.optim.SGD(model.parameters()), extra={"value": value})


def check_linear_training(folder: Path, value: float) -> None:
    model = nn.Linear(4, 2)
    extra = load_training_state(folder, model, torch.optim.SGD(model.parameters()))
    assert extra["value"] == value
    assert torch.equal(model.weight, torch.full((2, 4), value))


def die_while_saving(folder: Path, rank: int, method: str) -> None:
    linear_training(folder, 1.0)
    original = getattr(dcp.FileSystemWriter, method)

    def die(*args: Any, **kwargs: Any) -> Any:
        if method == "write_data":
            original(*args, **kwargs)
        os._exit(9)

    if dist.get_rank() == rank:
        setattr(dcp.FileSystemWriter, method, die)
    linear_training(folder, 2.0)


# after the files of one rank, and before the list of all files
@pytest.mark.parametrize(("rank", "method"), [(1, "write_data"), (0, "finish")])
def test_killed_rank_leaves_the_previous_state(tmp_path: Path, rank: int, method: str) -> None:
    with pytest.raises(RuntimeError):
        run_distributed_test(die_while_saving, 2, tmp_path / "state", rank, method, timeout_s=60.0)
    check_linear_training(tmp_path / "state", 1.0)
    run_distributed_test(linear_training, 2, tmp_path / "state", 3.0)
    check_linear_training(tmp_path / "state", 3.0)


def test_killed_at_any_system_call_leaves_one_of_both(tmp_path: Path) -> None:
    """A process that dies at its n-th flush, renaming or removal, for all n."""
    folder, previous = tmp_path / "state", tmp_path / ".state.previous"
    seen = set()
    for number in range(100):
        linear_training(folder, 1.0)
        pid = os.fork()
        if pid == 0:
            calls = [0]

            def dying(function: Callable[..., Any], calls: list[int] = calls, last: int = number) -> Callable[..., Any]:
                def call(*args: Any, **kwargs: Any) -> Any:
                    calls[0] += 1
                    if calls[0] > last:
                        os._exit(9)
                    return function(*args, **kwargs)

                return call

            for module, name in ((os, "fsync"), (os, "rename"), (os, "unlink"), (os, "rmdir"), (os, "chmod")):
                setattr(module, name, dying(getattr(module, name)))
            linear_training(folder, 2.0)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        if folder.exists():
            value = torch.load(folder / "training_state.pt")["extra"]["value"]
            check_linear_training(folder, value)
            assert value == 2.0 or not (previous.exists() or status == 0)
            seen.add(value)
        else:
            check_linear_training(previous, 1.0)  # between the two renames; the next save puts it back
            seen.add("aside")
        if status == 0:
            break
    assert seen == {1.0, 2.0, "aside"}
    assert number > 8


def test_optimizers_of_the_same_states(tmp_path: Path) -> None:
    """AdamW goes on from ClippedAdamW, and the other way round."""
    for number, kinds in enumerate([(torch.optim.AdamW, ClippedAdamW), (ClippedAdamW, torch.optim.AdamW)]):
        model = nn.Linear(2, 3)
        first, second = (kind(model.parameters(), lr=lr) for kind, lr in zip(kinds, (0.1, 0.5), strict=True))
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        first.step()
        save_training_state(tmp_path / str(number), model, first)
        load_training_state(tmp_path / str(number), model, second)
        second.step()
        assert second.param_groups[0]["lr"] == 0.1
        for parameter in model.parameters():
            assert second.state[parameter]["step"] == 2
            torch.testing.assert_close(second.state[parameter]["exp_avg"], torch.full_like(parameter, 0.19))


def test_wrong_states_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    optimizer = torch.optim.AdamW([{"params": model[0].parameters()}, {"params": model[1].parameters(), "lr": 0.5}])
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = tmp_path / "state"
    save_training_state(state, model, optimizer)

    def refused(
        message: str,
        other: nn.Module = model,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: Any = None,
    ) -> None:
        with pytest.raises(ValueError, match=message):
            load_training_state(state, other, optimizer or torch.optim.AdamW(other.parameters()), scheduler)

    refused("has the state of AdamW, but the optimizer is SGD", optimizer=torch.optim.SGD(model.parameters()))
    refused(r"(?s)other parameters than the one to load.*missing: 2.weight", nn.Sequential(*model, nn.Linear(2, 2)))
    refused(r"unknown: 1.weight", nn.Sequential(model[0]))
    frozen = torch.optim.AdamW(model[0].parameters())
    refused(r"(?s)the optimizer in .*unknown: 1.bias", optimizer=frozen)
    wide = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2))
    grouped = torch.optim.AdamW([{"params": wide[0].parameters()}, {"params": wide[1].parameters()}])
    refused(
        r"0.weight has the shape \(3, 2\) in the checkpoint, but the parameter has \(4, 2\)", wide, optimizer=grouped
    )
    refused("1.weight and 0.weight are in one param group, but their options differed")
    fresh = torch.optim.AdamW([{"params": model[0].parameters()}, {"params": model[1].parameters()}])
    refused(r"0.weight was trained as torch.float32 but is torch.float64 now", copy.deepcopy(model).double())
    refused("has no state of a scheduler", scheduler=ConstantLR(fresh), optimizer=fresh)
    refused(r"parameter 0 of param group 0, of shape \(3, 2\), does not belong to", optimizer=optimizer, other=wide)
    with pytest.raises(ValueError, match="holds something that cannot be read without running code"):
        save_training_state(tmp_path / "new", model, optimizer, extra={"object": Path()})
    (state / "training_state.pt").unlink()
    refused("has no training state that can be read")


def test_learning_rates_of_other_groups(tmp_path: Path) -> None:
    """Rates and schedules that differ between groups belong to parameters, in groups of whatever order and number."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    first, second = [*model[0].parameters()], [*model[1].parameters()]

    def make(*groups: list[Tensor], lr: Any = 1.0) -> tuple[torch.optim.Optimizer, SequentialLR]:
        optimizer = torch.optim.SGD([{"params": group} for group in groups], lr=lr)
        schedulers = [ConstantLR(optimizer, 0.5, 2), LambdaLR(optimizer, [decay] * len(groups))]
        return optimizer, SequentialLR(optimizer, schedulers, milestones=[2])

    optimizer = torch.optim.SGD([{"params": first, "lr": 2.0}, {"params": second, "lr": 8.0}], momentum=0.5)
    scheduler = SequentialLR(optimizer, [ConstantLR(optimizer, 0.5, 2), LambdaLR(optimizer, decay)], milestones=[2])
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    save_training_state(tmp_path / "state", model, optimizer, scheduler)
    resumed, resumed_scheduler = make(second[:1], [], first, second[1:], lr=torch.tensor(1.0))
    load_training_state(tmp_path / "state", model, resumed, resumed_scheduler)
    for _ in range(3):
        lrs = [group["lr"] for group in optimizer.param_groups]
        assert [float(resumed.param_groups[i]["lr"]) for i in (0, 2, 3)] == [lrs[1], lrs[0], lrs[1]]
        assert all(isinstance(group["lr"], Tensor) and group["momentum"] == 0.5 for group in resumed.param_groups[::2])
        scheduler.step()
        resumed_scheduler.step()
    with pytest.raises(ValueError, match=r"0.bias and 1.weight are in one param group"):
        load_training_state(tmp_path / "state", model, *make([second[0], first[1]], [first[0], second[1]]))
