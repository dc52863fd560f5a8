"""Arguments that cannot be, checkpoints that do not fit, ranks that die: an error says what is wrong, on all ranks."""

import multiprocessing
import os
import socket
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from ted_cases import ADAMW, messages_of, write_models

from hf_moe_ted import TedPlugin, ZCodeM3ForConditionalGeneration
from hf_moe_ted.distributed.checkpoint import load_weights, save_pretrained
from hf_moe_ted.distributed.training_state import load_training_state, save_training_state
from hf_moe_ted.testing import run_distributed_test, tiny_config

TP2_EP2 = {"tensor_parallel_size": 2, "expert_parallel_size": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"zero_stage": 4}, "zero_stage (4) must be 1, 2 or 3"),
        ({"zero_stage": 0}, "zero_stage (0) must be 1, 2 or 3"),
        ({"offload": "disk"}, "offload ('disk') must be None or 'cpu'"),
        ({"overlap_chunks": 0}, "overlap_chunks (0) must be at least 1"),
        (
            {"overlap_chunks": 2, "pad_expert_input_to_capacity": True},
            "overlap_chunks (2) must be 1 with pad_expert_input_to_capacity",
        ),
        ({"tensor_parallel_size": 4, "offload": "cpu"}, "offload='cpu' moves the shards of data parallelism"),
        ({"tensor_parallel_size": 3}, "the world size (4 processes) must be divisible by tensor_parallel_size (3)"),
    ],
)
def test_arguments_that_cannot_be(monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], message: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError) as error:
        TedPlugin(**arguments)
    assert message in str(error.value)


def test_tiles_are_checked_by_the_optimizer() -> None:
    optimizer_class, options = TedPlugin(tile_numel=0).tiled_adamw(lr=1.0)
    with pytest.raises(ValueError, match=r"tile_numel \(0\) must be a positive number"):
        optimizer_class([torch.nn.Parameter(torch.ones(1))], **options)


def sharded(folder: str, **layout: Any) -> tuple[Any, torch.optim.Optimizer]:
    plugin = TedPlugin(**layout)
    load = ZCodeM3ForConditionalGeneration.from_pretrained
    model: Any = load(folder, distributed_config=plugin.distributed_config)
    optimizer_class, options = plugin.tiled_adamw(**ADAMW)
    return model, optimizer_class(model.parameters(), **options)


def load_what_does_not_fit(models: str, states: str) -> dict[str, str]:
    model, optimizer = sharded(f"{models}/top1", **TP2_EP2)
    other, other_optimizer = sharded(f"{models}/other", **TP2_EP2)
    save_training_state(f"{states}/state", model, optimizer)
    save_pretrained(model, f"{states}/weights")
    torch_optimizer = torch.optim.AdamW(model.parameters())
    return messages_of(
        {
            "another model": lambda: load_training_state(f"{states}/state", other, other_optimizer),
            "another optimizer": lambda: load_training_state(f"{states}/state", model, torch_optimizer),
            "nothing": lambda: load_training_state(f"{states}/nothing", model, optimizer),
            "another model's weights": lambda: load_weights(other, f"{states}/weights"),
            "no weights": lambda: load_weights(model, states),
            "a model that cannot be divided": lambda: sharded(f"{models}/other", tensor_parallel_size=4),
            "an argument": lambda: model.save_pretrained(f"{states}/refused", variant="fp16"),
            "a state dict": lambda: model.save_pretrained(f"{states}/refused", state_dict={"a": 1}),
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, {"top1"})
    config = tiny_config(encoder_layers=2, decoder_layers=2, encoder_ffn_dim=32, encoder_attention_heads=2)
    ZCodeM3ForConditionalGeneration(config).save_pretrained(folder / "other")
    return folder


@pytest.fixture(scope="module")
def messages(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return run_distributed_test(load_what_does_not_fit, 4, str(folder), str(tmp_path_factory.mktemp("states")))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("another model", "fc1.weight has the shape (64, 32) in the checkpoint, but the parameter has (32, 32)"),
        ("another optimizer", "has the state of TiledAdamW, but the optimizer is AdamW"),
        ("nothing", "has no training state that can be read"),
        ("another model's weights", "encoder.layers.0.ffn.fc1.weight"),
        ("no weights", "has neither model.safetensors nor model.safetensors.index.json"),
        ("a model that cannot be divided", "encoder_attention_heads (2) must be divisible by tensor_parallel_size (4)"),
        ("an argument", "{'variant': 'fp16'} cannot be given for a sharded model"),
        ("a state dict", "state_dict has {'a': ()} (shapes by name), which are not tensors of the model"),
    ],
)
def test_what_does_not_fit(messages: list[dict[str, str]], name: str, message: str) -> None:
    for found in messages:
        assert message in found[name]


def train_until_lost(folder: str, rank: int, port: int, how: str, timeout_s: float, report: str) -> None:
    """Train with a rank that is gone, or does not go on, in the second step."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 4}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"})
    torch.set_num_threads(1)
    plugin = TedPlugin(**TP2_EP2, timeout_s=timeout_s)
    model: Any = ZCodeM3ForConditionalGeneration.from_pretrained(folder, distributed_config=plugin.distributed_config)
    ids = torch.arange(5, 25).view(2, 10)
    try:
        for step in range(3):
            if step == 1 and rank == 1:
                if how == "exits":
                    os._exit(7)
                time.sleep(600)
            model(input_ids=ids, labels=ids).loss.backward()
    except RuntimeError:  # which errors of the process group are
        Path(report, str(rank)).write_text(traceback.format_exc())
        os._exit(1)  # without waiting for others


@pytest.mark.parametrize(("how", "timeout_s"), [("exits", 300.0), ("hangs", 5.0)])
def test_a_lost_rank_ends_the_others(folder: Path, tmp_path: Path, how: str, timeout_s: float) -> None:
    context = multiprocessing.get_context("forkserver")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    arguments = (port, how, timeout_s, str(tmp_path))
    processes = [
        context.Process(target=train_until_lost, args=(str(folder / "top1"), rank, *arguments), daemon=True)
        for rank in range(4)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 60
    try:
        survivors = [process for rank, process in enumerate(processes) if rank != 1]
        for process in survivors:
            process.join(timeout=max(deadline - time.monotonic(), 0.1))
        assert [process.exitcode for process in survivors] == [1, 1, 1]
    finally:
        for process in processes:
            process.kill()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "2", "3"]
