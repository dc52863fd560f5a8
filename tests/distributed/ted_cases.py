"""Training runs that ranks do on their shards, and one process without them."""

import contextlib
import functools
import gc
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MixtralConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from hf_moe_ted import TedPlugin, ZCodeM3ForConditionalGeneration
from hf_moe_ted.distributed.bounded_exchange import bounded_expert_load
from hf_moe_ted.distributed.gradient_norm import clip_grad_norm_
from hf_moe_ted.distributed.parallelize import deferred_reduction, prepare_for_training
from hf_moe_ted.distributed.private_torch import world_timeout
from hf_moe_ted.distributed.random_state import RandomState
from hf_moe_ted.distributed.sharding import regions
from hf_moe_ted.testing import run_distributed_test, tiny_config

NUM_STEPS = 3
NUM_SAMPLES = 8
MAX_NORM = 0.5
# The gradient of k_proj.bias is zero but for rounding, and AdamW divides it by its own size plus eps: with the usual
# 1e-8 the parameters would compare noise.
ADAMW = {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1}
SEED = 7
CASES_PER_LAUNCH = 12  # so that a launch ends in time on a machine that is busy

Index = tuple[slice, ...]
Parts = dict[str, list[tuple[Index, Tensor]]]
T = TypeVar("T")
Log = Counter[tuple[str, int]]  # how often an operation ran with so many bytes of input

# one dense and one sparse layer per side; nothing is random and nothing is dropped unless a model says so
_SMALL: dict[str, Any] = {
    "encoder_layers": 2,
    "decoder_layers": 2,
    "capacity_factor": None,
    "router_noise_policy": None,
    "init_std": 0.1,
}
_CAUSAL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "num_experts_per_tok": 2,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "top1": lambda: tiny_config(**_SMALL),
    "top2": lambda: tiny_config(**_SMALL, num_experts_per_tok=2, normalize_router_weights="after_dropping"),
    "residual": lambda: tiny_config(**_SMALL, use_residual=True),
    "untied": lambda: tiny_config(**_SMALL, position_embedding_type="tupe", tie_word_embeddings=False),
    "smoothed": lambda: tiny_config(**_SMALL, label_smoothing=0.1, position_embedding_type="learned"),
    "skewed": lambda: tiny_config(**_SMALL, router_bias=True),
    "skewed2": lambda: tiny_config(**_SMALL, router_bias=True, num_experts_per_tok=2),
    "dropping": lambda: tiny_config(**_SMALL | {"capacity_factor": 0.5}, min_capacity=1, token_drop_policy="position"),
    "random": lambda: tiny_config(
        **_SMALL | {"capacity_factor": 0.5, "router_noise_policy": "jitter"},
        min_capacity=1, token_drop_policy="random", router_jitter_noise=0.1, dropout=0.1, moe_token_dropout=0.2,
    ),
    # without the losses that are no sums over tokens, any batches give the same; its sentences have different words
    "additive": lambda: tiny_config(
        **_SMALL | {"init_std": 0.5}, router_aux_loss_coef=0.0, router_z_loss_coef=0.0, scale_embedding=False
    ),
    # as merged, where two rows of a router are one expert, and as pruned with renormalize=False, where some are none
    "merged": lambda: tiny_config(**_SMALL, num_experts_per_tok=2, expert_map=[[0, 3, 1, 2, 3, 0], [1, 1, 2, 0, 3, 1]]),
    "thinned": lambda: tiny_config(
        **_SMALL | {"capacity_factor": 0.5}, min_capacity=1, token_drop_policy="position",
        expert_map=[[4, 2, 0, 1, 4, 3], [3, 4, 4, 1, 0, 2]],
    ),
    # nothing is dropped, and most tokens want the first two experts
    "noisy": lambda: tiny_config(
        **_SMALL | {"router_noise_policy": "jitter"}, num_experts_per_tok=2, router_bias=True,
        router_jitter_noise=0.1, dropout=0.1, moe_token_dropout=0.2,
    ),
    "mixtral": lambda: MixtralConfig(**_CAUSAL, num_local_experts=4),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_CAUSAL, num_experts=4, moe_intermediate_size=24, head_dim=8, mlp_only_layers=[0], norm_topk_prob=True
    ),
}  # fmt: skip
ROUTER_BIAS = {
    "skewed": [0.0, 60.0, 0.0, 30.0],  # all tokens: expert 1, then expert 3
    "skewed2": [0.0, 60.0, 0.0, 30.0],
    "noisy": [1.5, 3.0, 0.0, 0.0],
}


@dataclass(frozen=True)
class Case:
    """Three clipped steps of AdamW.

    Attributes:
        layout: arguments of TedPlugin.
        model: a key of `CONFIGS`.
        data: "even", "uneven" (each rank has another number and length of samples), or "idle" (the first data-parallel
            rank has nothing but padding).
        checkpointing: of activations: `None`, "full" or "communication-aware".
        accumulation: micro-batches per step and rank.
        load_bound: of `bounded_expert_load`, which must be enough; `None` for exchanges of what there is.
    """

    layout: dict[str, Any] = field(default_factory=dict)
    model: str = "top1"
    data: str = "even"
    checkpointing: str | None = None
    accumulation: int = 1
    load_bound: float | None = None

    def data_parallel_size(self, world_size: int) -> int:
        return world_size // self.layout.get("tensor_parallel_size", 1)


@dataclass(frozen=True)
class Trained:
    """What a rank has after a case.

    Attributes:
        losses: of each step and of an evaluation after the last one, the share of this rank's batches.
        norms: of the gradients of each step, before clipping.
        gradients: of the first step, as parts of the whole ones, by name.
        parameters: after the last step, likewise.
    """

    losses: list[float]
    norms: list[float]
    gradients: Parts
    parameters: Parts


# the folder of the models, and what each rank has after each case
Launched = tuple[Path, dict[str, list[Trained]]]


@functools.cache
def is_causal(folder: str) -> bool:
    return not AutoConfig.from_pretrained(folder).is_encoder_decoder


def model_class(folder: str) -> Any:
    return AutoModelForCausalLM if is_causal(folder) else ZCodeM3ForConditionalGeneration


def write_models(folder: Path, names: set[str]) -> None:
    """Models whose biases are not zero, either."""
    for name in sorted(names):
        torch.manual_seed(0)
        config = CONFIGS[name]()
        new: Any = ZCodeM3ForConditionalGeneration if config.is_encoder_decoder else AutoModelForCausalLM.from_config
        model = new(config)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
                if name in ROUTER_BIAS and parameter_name.endswith("router.bias"):
                    parameter.copy_(torch.tensor(ROUTER_BIAS[name]))
        model.save_pretrained(folder / name)


def micro_batches(case: Case, step: int, num_parts: int, *, causal: bool) -> list[dict[str, Tensor]]:
    """The batches of a step, those of data-parallel rank r at r * accumulation."""
    generator = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(5, 96, (NUM_SAMPLES, 9), generator=generator)
    mask, labels = torch.ones_like(ids), torch.randint(5, 96, (NUM_SAMPLES, 7), generator=generator)
    for sample in range(NUM_SAMPLES):
        mask[sample, 9 - sample % 4 :] = 0
        labels[sample, 7 - sample % 3 :] = -100
    ids[mask == 0] = 1
    if causal:
        labels = ids.masked_fill(mask == 0, -100)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    sizes = [NUM_SAMPLES // num_parts] * num_parts
    if case.data == "uneven":
        sizes = [size + (1 if part % 2 else -1) for part, size in enumerate(sizes)]
    pieces = {name: value.split(sizes) for name, value in batch.items()}
    parts = [{name: value[part] for name, value in pieces.items()} for part in range(num_parts)]
    if case.data == "uneven":
        cut = [9 - part for part in range(num_parts)]
        parts = [
            {k: v[:, : cut[i]] if k != "labels" or causal else v for k, v in p.items()} for i, p in enumerate(parts)
        ]
    if case.data == "idle":
        for part in parts[: case.accumulation]:
            part["input_ids"] = torch.ones_like(part["input_ids"])
            part["attention_mask"] = torch.zeros_like(part["attention_mask"])
            part["labels"] = torch.full_like(part["labels"], -100)
    return parts


def num_labels(parts: list[dict[str, Tensor]], *, causal: bool) -> int:
    return sum(int((part["labels"][:, int(causal) :] != -100).sum()) for part in parts)


def renew_groups() -> None:
    """End the process groups of all ranks, and make that of the world again; models of before have none any more."""
    rank, world_size, timeout = dist.get_rank(), dist.get_world_size(), world_timeout("cpu")
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # of the same server as the store of the old groups, which would end with them
    store = dist.TCPStore(*address, world_size, rank == 0, wait_for_workers=False, multi_tenant=True)
    dist.barrier()
    dist.destroy_process_group()
    _clear_sharding_prop_cache()  # which keeps meshes, and they keep groups
    gc.collect()
    store = dist.PrefixStore(f"renewed {next(_RENEWALS)}", store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)


_RENEWALS = itertools.count()


def in_new_groups(cases: Iterable[T]) -> Iterator[T]:
    """The cases, each with process groups of its own.

    A group of gloo has threads that wake up a hundred times per second for as long as it lives, and a case makes some
    ten: behind a few cases ranks would do little else. On one process nothing is renewed.
    """
    for number, case in enumerate(cases):
        if number and dist.is_initialized():
            renew_groups()
        yield case


def run_cases(folder: str, cases: Mapping[str, Case]) -> dict[str, Trained]:
    """What a rank does."""
    results = {}
    for name, case in in_new_groups(cases.items()):
        try:
            results[name] = train_sharded(f"{folder}/{case.model}", case)
        except Exception as error:
            raise RuntimeError(f"case {name!r} failed") from error
    return results


Run = Callable[[], float]  # of a step or of a micro-batch: adds to the gradients, gives the loss


def run_once(run: Run) -> float:
    return run()


def run_within_bound(model: nn.Module, bound: float, run: Run) -> float:
    with bounded_expert_load(model, bound) as overflow:
        loss = run()
        assert not overflow.any_rank()
    return loss


def train_sharded(folder: str, case: Case) -> Trained:
    model, plugin = load_sharded(folder, case)
    if case.load_bound is None:
        return train(model, plugin, case)
    return train(model, plugin, case, functools.partial(run_within_bound, model, case.load_bound))


def load_sharded(folder: str, case: Case, **options: Any) -> tuple[Any, TedPlugin]:
    plugin = TedPlugin(**case.layout, communication_aware_checkpointing=case.checkpointing != "full")
    model = model_class(folder).from_pretrained(folder, distributed_config=plugin.distributed_config, **options)
    set_up(model, plugin, case)
    return model, plugin


def train(
    model: Any,
    plugin: TedPlugin,
    case: Case,
    run_step: Callable[[Run], float] = run_once,
    run_micro_batch: Callable[[Run], float] = run_once,
) -> Trained:
    """`run_step` and `run_micro_batch` run what they get, maybe more than once."""
    data_parallel_size, causal = plugin.data_parallel_size, model.config.is_encoder_decoder is not True
    first, layout = dist.get_rank() // plugin.tp_size * case.accumulation, plugin.distributed_config.layout
    optimizer_class, options = plugin.tiled_adamw(**ADAMW)
    optimizer = optimizer_class(model.parameters(), **options)
    losses, norms, gradients = [], [], {}
    for step in range(NUM_STEPS):
        parts = micro_batches(case, step, data_parallel_size * case.accumulation, causal=causal)
        total = num_labels(parts, causal=causal)
        own_parts = parts[first : first + case.accumulation]

        def backward(index: int, own_parts: Any = own_parts, total: int = total) -> float:
            is_deferred = index < case.accumulation - 1 and isinstance(model, FSDPModule)
            with deferred_reduction(model, layout) if is_deferred else contextlib.nullcontext():
                loss = model(**own_parts[index], num_items_in_batch=torch.tensor(total)).loss
                (loss * data_parallel_size).backward()
            return loss.item()

        def accumulate(backward: Callable[[int], float] = backward) -> float:
            indices = range(case.accumulation)
            return sum(run_micro_batch(functools.partial(backward, index)) for index in indices)

        losses.append(run_step(accumulate))
        if step == 0:
            gradients = parts_of({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        norms.append(float(clip_grad_norm_(model.parameters(), MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
    parameters = parts_of(dict(model.named_parameters()))  # before a forward without backward gathers them
    losses.append(evaluation_loss(model, own_parts, total))
    return Trained(losses, norms, gradients, parameters)


def evaluation_loss(model: Any, parts: list[dict[str, Tensor]], total: int) -> float:
    model.eval()
    with torch.no_grad():
        return sum(model(**part, num_items_in_batch=torch.tensor(total)).loss.item() for part in parts)


def set_up(model: PreTrainedModel, plugin: TedPlugin, case: Case) -> None:
    model.train()
    prepare_for_training(model)  # as Accelerator and Trainer do
    state: Any = model.ted_random_state
    state.load_state_dict({"num_forwards": 0, "base_seed": SEED})
    if case.checkpointing is not None:
        model.activation_checkpointing_enable(plugin.activation_checkpointing_kwargs)


def load_alone(folder: str, **options: Any) -> Any:
    return model_class(folder).from_pretrained(folder, **options)


def train_alone(
    folder: str, case: Case, world_size: int, load: Callable[[str], Any] = load_alone
) -> tuple[list[float], list[float], dict[str, Tensor], Any]:
    """The same in one process with what torch has: losses, norms, gradients of the first step, and parameters."""
    model = load(folder)
    model.train()
    causal, data_parallel_size = is_causal(folder), case.data_parallel_size(world_size)
    states = [RandomState(rank) for rank in range(data_parallel_size)]
    for state in states:
        state.load_state_dict({"num_forwards": 0, "base_seed": SEED})
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW, foreach=False)
    losses, norms, gradients = [], [], {}
    for step in range(NUM_STEPS):
        parts = micro_batches(case, step, data_parallel_size * case.accumulation, causal=causal)
        total = num_labels(parts, causal=causal)
        losses.append(0.0)
        for index, part in enumerate(parts):
            state = states[index // case.accumulation]
            state.before_forward(model, (), {})
            loss = model(**part, num_items_in_batch=torch.tensor(total)).loss
            state.after_forward(model, (), None)
            loss.backward()
            losses[-1] += loss.item()
        if step == 0:
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
    losses.append(evaluation_loss(model, parts, total))
    return losses, norms, gradients, {name: parameter.detach() for name, parameter in model.named_parameters()}


def parts_of(tensors: Mapping[str, Tensor]) -> Parts:
    """What this rank holds of each tensor."""
    return {name: [(part.slices, part.local.clone()) for part in regions(tensor)] for name, tensor in tensors.items()}


def relative_errors(by_rank: list[Parts], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Largest error of each tensor, relative to its largest value.

    All ranks have the same names, and together the whole of each tensor.
    """
    errors = {}
    largest = max(float(whole.abs().max()) for whole in expected.values())
    for parts in by_rank:
        assert {*parts} == {*expected}
    for name, whole in expected.items():
        covered = torch.zeros(whole.shape, dtype=torch.bool)
        error = 0.0
        for parts in by_rank:
            for index, local in parts[name]:
                covered[index] = True
                error = max(error, float((local - whole[index]).abs().max()))
                assert torch.isfinite(local).all(), name
        assert covered.all(), f"no rank has all of {name}"
        # attention does not change with the bias of the keys, whose gradient is a sum of rounding errors
        floor = largest if name.endswith("k_proj.bias") else torch.finfo(torch.float32).tiny
        errors[name] = error / max(float(whole.abs().max()), floor)
    return errors


def launch(folder: Path, cases: Mapping[str, Case], world_size: int) -> dict[str, list[Trained]]:
    """What each rank has after each case."""
    results: dict[str, list[Trained]] = {}
    names = iter(cases)
    while part := [*itertools.islice(names, CASES_PER_LAUNCH)]:
        by_rank = run_distributed_test(run_cases, world_size, str(folder), {name: cases[name] for name in part})
        results |= {name: [result[name] for result in by_rank] for name in part}
    return results


def write_and_launch(folder: Path, on_four: Mapping[str, Case], on_eight: Mapping[str, Case]) -> Launched:
    """The cases that take four processes, and those that take eight, with all their models."""
    write_models(folder, {case.model for cases in (on_four, on_eight) for case in cases.values()})
    return folder, launch(folder, on_four, 4) | launch(folder, on_eight, 8)


def messages_of(attempts: Mapping[str, Callable[[], Any]]) -> dict[str, str]:
    """What those say that are refused."""
    found = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except ValueError as error:
            found[name] = str(error)
    return found


class CollectiveCounter(TorchDispatchMode):
    """Counts functional collectives, and those of `torch.distributed`, which FSDP2 uses."""

    _OUTPUT_FIRST = ("_allgather_base_", "_reduce_scatter_base_", "alltoall_base_")

    def __init__(self) -> None:
        super().__init__()
        self.log: Log = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("_c10d_functional", "c10d") and func._opname != "wait_tensor":
            source = args[1] if func._opname in self._OUTPUT_FIRST else args[0]
            num_bytes = sum(leaf.nbytes for leaf in tree_leaves(source) if isinstance(leaf, Tensor))
            self.log[f"{func.namespace}.{func._opname}", num_bytes] += 1
        return func(*args, **(kwargs or {}))


def count_collectives(run: Callable[[], Tensor]) -> tuple[Log, Log]:
    """Those of a forward, and of the backward of the sum of what it returns."""
    with CollectiveCounter() as forward:
        output = run()
    with CollectiveCounter() as backward:
        output.sum().backward()
    return forward.log, backward.log


def log_of(**counts: list[int]) -> Log:
    """From the bytes of each kind of functional collective."""
    return Counter((f"_c10d_functional.{name}", num_bytes) for name, sizes in counts.items() for num_bytes in sizes)


def gradient_of(output: Tensor, batch: int) -> Tensor:
    """What an output of a batch gets in backward."""
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(50 + batch))


def assert_as_a_loop_over_all_experts(
    folder: Path,
    by_rank: list[tuple[Tensor, Tensor, Tensor, Parts]],
    tensor_parallel_size: int,
    inputs_of: Callable[[int], tuple[Tensor, Tensor, Tensor]],
) -> None:
    """A sparse layer's outputs and gradients, of its inputs and parameters, are those of all experts on one process.

    Args:
        folder: with the model `top2`.
        by_rank: output, gradients of hidden states and weights, and this rank's parts of those of the parameters.
        inputs_of: hidden states, expert ids and weights of a batch.
    """
    num_batches = len(by_rank) // tensor_parallel_size
    model = ZCodeM3ForConditionalGeneration.from_pretrained(folder / "top2", experts_implementation="eager")
    experts: Any = model.model.encoder.layers[1].ffn.experts
    for batch in range(num_batches):
        hidden, ids, weights = inputs_of(batch)
        output = experts(hidden, ids, weights)
        (output / num_batches).backward(gradient_of(output, batch))  # parameters get the mean over batches
        for found in by_rank[batch * tensor_parallel_size : (batch + 1) * tensor_parallel_size]:
            torch.testing.assert_close(found[0], output.detach(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found[1], hidden.grad * num_batches, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found[2], weights.grad * num_batches, rtol=1e-5, atol=1e-6)
    expected = {name: parameter.grad for name, parameter in experts.named_parameters()}
    errors = relative_errors([found[3] for found in by_rank], expected)
    assert {name: error for name, error in errors.items() if error > 1e-5} == {}


def assert_as_one_process(
    folder: Path, case: Case, by_rank: list[Trained], load: Callable[[str], Any] = load_alone
) -> None:
    """Losses, gradient norms, the gradient of every parameter and the parameters are those of one process."""
    losses, norms, gradients, parameters = train_alone(str(folder / case.model), case, len(by_rank), load)
    tensor_parallel_size = case.layout.get("tensor_parallel_size", 1)
    for rank, trained in enumerate(by_rank):
        assert trained.losses == by_rank[rank - rank % tensor_parallel_size].losses  # those of the same batch
        assert trained.norms == by_rank[0].norms
    shares = zip(*(trained.losses for trained in by_rank[::tensor_parallel_size]), strict=True)
    assert [sum(share) for share in shares] == pytest.approx(losses, rel=1e-5)
    assert by_rank[0].norms == pytest.approx(norms, rel=1e-5)
    errors = {f"gradient of {k}": v for k, v in relative_errors([r.gradients for r in by_rank], gradients).items()}
    errors |= relative_errors([r.parameters for r in by_rank], parameters)
    assert {name: error for name, error in errors.items() if error > 1e-5} == {}
