"""Helpers for tests of this package and of code that builds on it: tiny models, several processes."""

import gc
import multiprocessing
import os
import pickle
import queue
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from typing import Any

from .models.configuration_zcode_m3 import ZCodeM3Config

TINY_SIZES = {
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "d_model": 32,
    "encoder_layers": 4,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}


def tiny_config(**overrides: Any) -> ZCodeM3Config:
    """A model of 101,152 parameters without dropout: 4 + 2 layers, every second one with 4 experts."""
    fields: dict[str, Any] = {**TINY_SIZES, "num_experts": 4, "dropout": 0.0, "attention_dropout": 0.0}
    return ZCodeM3Config(**{**fields, **overrides})


def run_distributed_test(
    function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 300.0, **kwargs: Any
) -> list[Any]:
    """Run `function(*args, **kwargs)` on `world_size` processes of this machine, as torchrun would, over gloo.

    Args:
        function: a function of an importable module, which runs after `torch.distributed` is initialized.
        world_size: number of processes.
        timeout_s: seconds after which all processes are killed; a collective that waits longer fails in its process.
        args, kwargs: arguments of the function; they and its result are pickled.

    Returns:
        The result of each rank, rank 0 first.

    Raises:
        RuntimeError: processes failed or died; the message has their tracebacks or exit codes.
        TimeoutError: the processes did not end in time.
    """
    context = multiprocessing.get_context("forkserver")
    # otherwise each process would import these, which takes longer than most tests
    context.set_forkserver_preload([f"{__package__}.models.modeling_zcode_m3", f"{__package__}.distributed.trainer"])
    results: Any = context.Queue()
    port = _free_port()
    processes: list[BaseProcess] = [
        context.Process(
            target=_run_rank, args=(function, rank, world_size, port, timeout_s, results, args, kwargs), daemon=True
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        by_rank = _collect(results, processes, time.monotonic() + timeout_s)
        for process in processes:
            process.join(timeout=30.0)
    finally:
        for process in processes:
            process.kill()
    return [by_rank[rank] for rank in range(world_size)]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _collect(results: Any, processes: list[BaseProcess], deadline: float) -> dict[int, Any]:
    by_rank: dict[int, Any] = {}
    errors: dict[int, str] = {}
    while len(by_rank) + len(errors) < len(processes):
        try:
            rank, result, error = results.get(timeout=0.5)
        except queue.Empty:
            dead = {rank: process.exitcode for rank, process in enumerate(processes) if process.exitcode}
            dead = {rank: code for rank, code in dead.items() if rank not in errors}
            if dead and not errors:
                raise RuntimeError(f"processes died without a traceback, exit codes by rank: {dead}") from None
            if dead or (errors and time.monotonic() > deadline):
                errors |= {rank: f"died without a traceback, exit code {code}" for rank, code in dead.items()}
                break
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"ranks {sorted({*range(len(processes))} - {*by_rank})} did not end in time"
                ) from None
            continue
        if error is None:
            by_rank[rank] = pickle.loads(result)
        else:  # other ranks may only have lost their connection to the failed one
            errors[rank] = error
            deadline = min(deadline, time.monotonic() + 5.0)
    if errors:
        raise RuntimeError("\n".join(f"rank {rank} failed:\n{error}" for rank, error in sorted(errors.items())))
    return by_rank


def _run_rank(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    port: int,
    timeout_s: float,
    results: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    gc.freeze()  # what is imported is no garbage: looking for some there would copy its pages from the parent
    launcher = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in launcher.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"})
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s))
        result = function(*args, **kwargs)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        raise
    # pickled here: the queue's own pickling would pass tensors as files that end with this process
    results.put((rank, pickle.dumps(result), None))


__all__ = ["TINY_SIZES", "run_distributed_test", "tiny_config"]
