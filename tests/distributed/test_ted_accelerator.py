"""Methods of an Accelerator with a sharded model: as on one process, or refused by name."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration, FullyShardedDataParallelPlugin, ProjectConfiguration
from ted_cases import messages_of, parts_of, relative_errors, write_models
from torch.utils.data import DataLoader

from hf_moe_ted import TedPlugin, ZCodeM3ForConditionalGeneration
from hf_moe_ted.testing import run_distributed_test

NUM_SAMPLES = 11
TP2_EP2 = {"tensor_parallel_size": 2, "expert_parallel_size": 2}
WAYS_TO_SAVE = ("save_model", "save_function", "state_dict", "sharded state_dict", "positional")
REFUSED = {
    "pickled": "safe_serialization (False) cannot be given for a sharded model",
    "another state dict": "state_dict has {'lm_head.weight': (3,)} (shapes by name), which are not tensors of the mod",
    "an empty state dict": "state_dict has nothing (shapes by name), which are not tensors of the model",
    "variant": "{'variant': 'fp16'} cannot be given for a sharded model",
    "push_to_hub": "{'push_to_hub': True} cannot be given for a sharded model",
    "join_uneven_inputs": "join_uneven_inputs is for DistributedDataParallel",
    "even_batches": "even_batches (False) lets ranks have different numbers of batches",
    "dispatch_batches": "dispatch_batches (True) would give all data-parallel ranks the same batch",
    "compiled": "torch.compile (dynamo backend EAGER) does not work with a sharded model",
    "FSDP": "TedPlugin shards a model itself and does not work with FSDP",
}


class Counter:
    """An object with a state, to be saved along."""

    number = 0

    def state_dict(self) -> dict[str, int]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.number = state["number"]


def accelerator_of(layout: dict[str, int], **options: Any) -> Accelerator:
    """A new one: what an earlier one has left is forgotten."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    return Accelerator(cpu=True, parallelism_config=TedPlugin(**layout), **options)


def prepared(folder: str, layout: dict[str, int], **options: Any) -> tuple[Any, Any, Any]:
    accelerator = accelerator_of(layout, **options)
    plugin: Any = accelerator.parallelism_config
    model: Any = ZCodeM3ForConditionalGeneration.from_pretrained(folder, distributed_config=plugin.distributed_config)
    with torch.no_grad():  # which leaves gathered parameters behind
        model(input_ids=data(1)[0]["input_ids"][None], labels=torch.tensor([[5]]))
    optimizer_class, options = plugin.tiled_adamw(lr=1e-2, eps=1e-3)
    model, optimizer = accelerator.prepare(model, optimizer_class(model.parameters(), **options))
    return accelerator, model, optimizer


def data(num_samples: int = NUM_SAMPLES) -> list[dict[str, Any]]:
    return [{"number": torch.tensor(i), "input_ids": torch.full((5,), 7 + i)} for i in range(num_samples)]


def gathered(accelerator: Accelerator) -> dict[str, list[Any]]:
    """Of eleven samples in batches of two, as tensors, in a nest of them, and as objects."""
    found: dict[str, list[Any]] = {"tensors": [], "nested": [], "objects": [], "tensors as objects": []}
    for batch in accelerator.prepare(DataLoader(data(), batch_size=2)):
        number = batch["number"]
        found["tensors"] += accelerator.gather_for_metrics(number).tolist()
        pair = accelerator.gather_for_metrics((number, {"ids": batch["input_ids"]}))
        found["nested"] += [*zip(pair[0].tolist(), pair[1]["ids"].tolist(), strict=True)]
        found["objects"] += accelerator.gather_for_metrics([f"sample {n}" for n in number.tolist()])
        as_objects = accelerator.gather_for_metrics([*number], use_gather_object=True)
        found["tensors as objects"] += [int(n) for n in as_objects]
    return found


def clipped(accelerator: Accelerator, model: Any, optimizer: Any) -> dict[str, Any]:
    model.train()
    batch = torch.stack([row["input_ids"] for row in data()])
    accelerator.backward(model(input_ids=batch, labels=batch).loss)
    accelerator.clip_grad_value_(model.parameters(), 1e-3)
    found = parts_of({name: parameter.grad for name, parameter in model.named_parameters()})
    assert {p for group in optimizer.param_groups for p in group["params"]} == {*model.parameters()}
    model.zero_grad()
    return found


def save_in_all_ways(accelerator: Accelerator, model: Any, saved: str) -> None:
    unwrapped, is_main = accelerator.unwrap_model(model), accelerator.is_main_process
    accelerator.save_model(model, f"{saved}/save_model", max_shard_size="100KB")
    unwrapped.save_pretrained(f"{saved}/save_function", is_main_process=is_main, save_function=accelerator.save)
    state = accelerator.get_state_dict(model)
    unwrapped.save_pretrained(f"{saved}/state_dict", is_main_process=is_main, state_dict=state)
    unwrapped.save_pretrained(f"{saved}/sharded state_dict", state_dict=model.state_dict())
    unwrapped.save_pretrained(f"{saved}/positional", is_main, state)
    accelerator.save(state, f"{saved}/state.bin")


def run_with_objects(accelerator: Accelerator, saved: str) -> int:
    counter = Counter()
    accelerator.register_for_checkpointing(counter)
    counter.number = 3
    accelerator.save_state(f"{saved}/state")
    counter.number = 0
    accelerator.load_state(f"{saved}/state")
    return counter.number


def messages(accelerator: Accelerator, model: Any, saved: str) -> dict[str, str]:
    loader = DataLoader(data(), batch_size=2)
    wrong = {"lm_head.weight": torch.ones(3)}

    def with_loaders(**options: Any) -> Any:
        return accelerator_of(TP2_EP2, dataloader_config=DataLoaderConfiguration(**options)).prepare(loader)

    attempts = {
        "pickled": lambda: accelerator.save_model(model, saved, safe_serialization=False),
        "another state dict": lambda: model.save_pretrained(f"{saved}/wrong", state_dict=wrong),
        "an empty state dict": lambda: model.save_pretrained(f"{saved}/wrong", state_dict={}),
        "variant": lambda: model.save_pretrained(f"{saved}/wrong", variant="fp16"),
        "push_to_hub": lambda: model.save_pretrained(f"{saved}/wrong", push_to_hub=True),
        "join_uneven_inputs": lambda: accelerator.join_uneven_inputs([model]),
        "even_batches": lambda: with_loaders(even_batches=False),
        "dispatch_batches": lambda: with_loaders(dispatch_batches=True),
        "compiled": lambda: accelerator_of(TP2_EP2, dynamo_backend="eager"),
        "FSDP": lambda: accelerator_of(TP2_EP2, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2)),
    }
    found = messages_of(attempts)
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # which Accelerate leaves
    return found


def run(folder: str, saved: str, layout: dict[str, int]) -> dict[str, Any]:
    accelerator, model, optimizer = prepared(folder, layout)
    found: dict[str, Any] = {"gathered": gathered(accelerator), "clipped": clipped(accelerator, model, optimizer)}
    for is_padded in (False, True):
        with accelerator.split_between_processes([*range(5)], apply_padding=is_padded) as share:
            found[f"split, padded {is_padded}"] = share
    with accelerator.split_between_processes({"a": torch.arange(4), "b": ["w", "x", "y", "z"]}) as share:
        found["split dict"] = (share["a"].tolist(), share["b"])
    found["reduced"] = int(accelerator.reduce(torch.ones(())))
    if dist.is_initialized():
        save_in_all_ways(accelerator, model, saved)
        found["state dict"] = {name: (*tensor.shape,) for name, tensor in accelerator.get_state_dict(model).items()}
        found["counted"] = run_with_objects(accelerator, saved)
        found["messages"] = messages(accelerator, model, saved)
    return found


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[dict[str, Any]]]:
    folder, saved = (tmp_path_factory.mktemp(name) for name in ("models", "saved"))
    write_models(folder, {"additive"})
    return folder / "additive", saved, run_distributed_test(run, 4, str(folder / "additive"), str(saved), TP2_EP2)


@pytest.mark.parametrize("kind", ["tensors", "nested", "objects", "tensors as objects"])
def test_metrics_get_each_sample_once(launched: tuple[Path, Path, list[dict[str, Any]]], kind: str) -> None:
    numbers = [*range(NUM_SAMPLES)]
    expected: dict[str, list[Any]] = {
        "tensors": numbers,
        "nested": [(n, [7 + n] * 5) for n in numbers],
        "objects": [f"sample {n}" for n in numbers],
        "tensors as objects": numbers,
    }
    for found in launched[2]:
        assert found["gathered"][kind] == expected[kind]


def test_inputs_are_split_between_data_parallel_ranks(launched: tuple[Path, Path, list[dict[str, Any]]]) -> None:
    for rank, found in enumerate(launched[2]):
        first = rank < 2  # ranks 0 and 1 are a tensor-parallel group
        assert found["split, padded False"] == ([0, 1, 2] if first else [3, 4])
        assert found["split, padded True"] == ([0, 1, 2] if first else [3, 4, 4])
        assert found["split dict"] == (([0, 1], ["w", "x"]) if first else ([2, 3], ["y", "z"]))
        assert found["reduced"] == 4


def test_gradients_are_clipped_by_value(launched: tuple[Path, Path, list[dict[str, Any]]]) -> None:
    check_clipped(launched[0], launched[2])


def check_clipped(folder: Path, by_rank: list[dict[str, Any]]) -> None:
    model: Any = ZCodeM3ForConditionalGeneration.from_pretrained(folder).train()
    batch = torch.stack([row["input_ids"] for row in data()])
    model(input_ids=batch, labels=batch).loss.backward()
    torch.nn.utils.clip_grad_value_(model.parameters(), 1e-3)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    errors = relative_errors([found["clipped"] for found in by_rank], gradients)
    # relative to the clipped value, which is far below that of the gradients and their rounding
    assert {name: error for name, error in errors.items() if error > 1e-3 and "k_proj.bias" not in name} == {}


@pytest.mark.parametrize("way", WAYS_TO_SAVE)
def test_saved_folders_are_ordinary(launched: tuple[Path, Path, list[dict[str, Any]]], way: str) -> None:
    source, saved, _ = launched
    expected = ZCodeM3ForConditionalGeneration.from_pretrained(source)
    model, info = ZCodeM3ForConditionalGeneration.from_pretrained(saved / way, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), expected.parameters(), strict=True))
    assert (len([*(saved / way).glob("*.safetensors")]) > 1) == (way == "save_model")


def test_state_dict_is_whole_on_the_first_rank(launched: tuple[Path, Path, list[dict[str, Any]]]) -> None:
    source, saved, by_rank = launched
    expected = ZCodeM3ForConditionalGeneration.from_pretrained(source).state_dict()
    assert by_rank[0]["state dict"] == {name: (*tensor.shape,) for name, tensor in expected.items()}
    assert [found["state dict"] for found in by_rank[1:]] == [{}] * 3
    for name, tensor in torch.load(saved / "state.bin").items():
        assert torch.equal(tensor, expected[name])


def test_objects_are_saved_along(launched: tuple[Path, Path, list[dict[str, Any]]]) -> None:
    assert [found["counted"] for found in launched[2]] == [3] * 4


@pytest.mark.parametrize("name", REFUSED)
def test_refused(launched: tuple[Path, Path, list[dict[str, Any]]], name: str) -> None:
    for found in launched[2]:
        assert REFUSED[name] in found["messages"][name]


def test_one_process(launched: tuple[Path, Path, list[dict[str, Any]]]) -> None:
    found = run(str(launched[0]), "", {})
    assert found["gathered"]["tensors"] == [*range(NUM_SAMPLES)]
    assert found["split, padded True"] == [*range(5)]


class Touch:
    """What a stranger's file may be."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


class Holder(Counter):
    def __init__(self, number: Any):
        self.number = number


def refusal(attempt: Any) -> str:
    try:
        attempt()
    except ValueError as error:
        return str(error)
    return ""


def state_of_objects(folder: str, saved: str, layout: dict[str, int]) -> dict[str, Any]:
    accelerator, _, _ = prepared(folder, layout)
    values = {"array": np.arange(3), "scalar": np.float64(2.0), "list": [("a", 1)]}
    holder = Holder(values)
    accelerator.register_for_checkpointing(holder)
    accelerator.save_state(f"{saved}/objects")
    holder.number = None
    accelerator.load_state(f"{saved}/objects")
    found: dict[str, Any] = {"same": repr(holder.number) == repr(values)}
    holder.number = timedelta(days=3)
    accelerator.save_state(f"{saved}/code")
    holder.number = None
    found["code"] = refusal(lambda: accelerator.load_state(f"{saved}/code"))
    accelerator.load_state(f"{saved}/code", load_kwargs={"weights_only": False})
    found["trusted"] = holder.number == timedelta(days=3)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        torch.save(Touch(Path(saved, "executed")), f"{saved}/code/custom_checkpoint_0.pkl")
    accelerator.wait_for_everyone()
    found["stranger"] = refusal(lambda: accelerator.load_state(f"{saved}/code"))
    return found


def states_in_folders(folder: str, saved: str, layout: dict[str, int]) -> dict[str, Any]:
    """Automatic names, of which two are kept, and a folder with files of others."""
    plan = ProjectConfiguration(f"{saved}/project", automatic_checkpoint_naming=True, total_limit=2)
    accelerator, _, _ = prepared(folder, layout, project_config=plan)
    saved_to = [accelerator.save_state(f"{saved}/not this") for _ in range(3)]
    accelerator.load_state()
    plan.iteration = 2
    found: dict[str, Any] = {"saved to": saved_to, "there": refusal(accelerator.save_state)}
    plan.automatic_checkpoint_naming = False
    found["nameless"] = refusal(accelerator.load_state)
    found["nowhere"] = refusal(lambda: accelerator.load_state(f"{saved}/nowhere"))
    accelerator.register_save_state_pre_hook(
        lambda models, weights, to: Path(to, "hook.txt").write_text("saved") if accelerator.is_main_process else None
    )
    accelerator.save_state(f"{saved}/shared")
    if accelerator.is_main_process:
        for name in ("notes.txt", "random_states_9.pkl"):
            Path(saved, "shared", name).write_text("mine")
    accelerator.save_state(f"{saved}/shared")
    accelerator.load_state(f"{saved}/shared")
    return found


def run_with_files(folder: str, saved: str, layout: dict[str, int]) -> dict[str, Any]:
    accelerator, model, optimizer = prepared(folder, layout)
    found: dict[str, Any] = {"clipped": clipped(accelerator, model, optimizer)}
    found["norms"] = [float(norm_of(accelerator, model, kind)) for kind in (1.0, 2.0, float("inf"))]
    return found | state_of_objects(folder, saved, layout) | states_in_folders(folder, saved, layout)


def norm_of(accelerator: Accelerator, model: Any, kind: float) -> Any:
    batch = torch.stack([row["input_ids"] for row in data()])
    accelerator.backward(model(input_ids=batch, labels=batch).loss)
    norm = accelerator.clip_grad_norm_(model.parameters(), 1e9, kind)
    model.zero_grad()
    return norm


@pytest.fixture(scope="module", params=["tensor_parallel_size", "expert_parallel_size"])
def with_files(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[dict[str, Any]]]:
    folder, saved = (tmp_path_factory.mktemp(name) for name in ("models", "saved"))
    write_models(folder, {"additive"})
    model = folder / "additive"
    return model, saved, run_distributed_test(run_with_files, 2, str(model), str(saved), {request.param: 2})


def test_gradients_are_clipped_on_one_axis(with_files: tuple[Path, Path, list[dict[str, Any]]]) -> None:
    """Some parameters are DTensors, others are not."""
    check_clipped(with_files[0], with_files[2])
    accelerator, model, _ = prepared(str(with_files[0]), {})
    norms = [float(norm_of(accelerator, model, kind)) for kind in (1.0, 2.0, float("inf"))]
    for found in with_files[2]:
        assert found["norms"] == pytest.approx(norms, rel=1e-4)


def test_states_of_objects_execute_nothing(with_files: tuple[Path, Path, list[dict[str, Any]]]) -> None:
    _, saved, by_rank = with_files
    for found in by_rank:
        assert found["same"] and found["trusted"]
        for name in ("code", "stranger"):
            assert "custom_checkpoint_0.pkl is damaged, or cannot be read without running code" in found[name]
    assert not (saved / "executed").exists()


def test_states_with_automatic_names_are_whole(with_files: tuple[Path, Path, list[dict[str, Any]]]) -> None:
    _, saved, by_rank = with_files
    states = saved / "project" / "checkpoints"
    assert sorted(path.name for path in states.iterdir()) == ["checkpoint_1", "checkpoint_2"]
    assert {path.name for path in (states / "checkpoint_2").iterdir()} == {
        "random_states_0.pkl",
        "random_states_1.pkl",
        "training_state_0",
    }
    for found in by_rank:
        assert found["saved to"] == [str(states / f"checkpoint_{number}") for number in range(3)]
        assert "checkpoint_2 exists: set accelerator.project_configuration.iteration" in found["there"]
        assert found["nameless"].startswith("input_dir is None") and "nowhere (input_dir) is no" in found["nowhere"]


def test_files_of_others_stay_beside_a_state(with_files: tuple[Path, Path, list[dict[str, Any]]]) -> None:
    shared = with_files[1] / "shared"
    assert (shared / "notes.txt").read_text() == "mine" and (shared / "hook.txt").read_text() == "saved"
    assert not (shared / "random_states_9.pkl").exists()
    assert not [path for path in shared.iterdir() if path.name.startswith(".")]
