"""Models that are made of those of other runs: the first checkpoint of a run with `start_from`.

    "32_kept": {
      "config": {"num_experts": 32},
      "start_from": {"method": "prune", "variants": ["64_experts"], "at": 0.8, "criterion": "random"}
    }

`config` says what becomes of it, `METHODS` how. The checkpoint stands at the step that the sources have reached
together, with a new optimizer, so that the run is resumed from it as from any other: same schedule, next batches.
"""

import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from multitask_claims import shared
from multitask_recipe import Run
from multitask_runs import seconds_at
from token_pairs import TokenPairs
from transformers import TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_moe_ted import (
    ExpertStatistics,
    ZCodeM3ForConditionalGeneration,
    aggregate_experts,
    collect_expert_statistics,
    prune_experts,
    upcycle_dense_checkpoint,
)

STATISTICS_PAIRS = 64  # of each direction


def write_start(run: Run, model: Any, data: TokenPairs, tokenizer: Any) -> Path:
    """Write the checkpoint that a run begins with; returns its folder.

    Args:
        run: one with a `start`.
        model: a new one of its config, whose weights are replaced.
        data: training pairs, for statistics of experts.
        tokenizer: of the pairs.

    Raises:
        ValueError: a source is not done, or has not saved its model; or the made model is not what `config` says.
    """
    start = run.start
    assert start is not None
    folders = [model_folder(source, steps) for source, steps in zip(start.sources, start.steps_of_sources, strict=True)]
    try:
        METHODS[start.method](run, model, folders, data, tokenizer)
    except RuntimeError as error:  # of `load_state_dict`
        raise ValueError(f"config of {run.variant} is not that of what {start.method} makes: {error}") from error
    state = TrainerState(
        global_step=start.steps,
        train_batch_size=run.training.train_batch_size,
        log_history=[{"step": start.steps, "seconds": start_seconds(run)}],
        stateful_callbacks=[TrainerControl()],  # as in any checkpoint
    )
    state.compute_steps(run.training, run.training.max_steps)
    folder = run.folder / f"{PREFIX_CHECKPOINT_DIR}-{start.steps}"
    staged = folder.with_name(f".{folder.name}")
    if staged.exists():  # of a process that was ended
        shutil.rmtree(staged)
    model.save_pretrained(staged)
    state.save_to_json(str(staged / "trainer_state.json"))
    return staged.rename(folder)


def start_seconds(run: Run) -> float:
    """Training seconds of the sources before a run began; 0 where steps do not count on, either."""
    if run.start is None or not run.start.steps:
        return 0.0
    pairs = zip(run.start.sources, run.start.steps_of_sources, strict=True)
    return math.fsum(seconds_at((source.result() or {})["log_history"], steps) for source, steps in pairs)


def model_folder(source: Run, steps: int) -> Path:
    """Where the model of a run is after so many steps.

    Raises:
        ValueError: the run is not done, was done with another number of steps, or has not saved it.
    """
    result = source.result()
    if result is None:
        raise ValueError(f"{source.variant} with seed {source.seed} is not done, see {source.folder}: run it first")
    if (done := result["log_history"][-1]["step"]) != source.training.max_steps:
        raise ValueError(
            f"{source.folder} has {done} steps, not {source.training.max_steps}: give it another output_dir"
        )
    is_end = steps >= source.training.max_steps
    folder = source.folder if is_end else source.folder / f"{PREFIX_CHECKPOINT_DIR}-{steps}"
    if not (folder / "config.json").is_file():
        needed = '"save_model": true' if is_end else f'"save_strategy": "steps" and save_steps for step {steps}'
        raise ValueError(f"{folder} has no model: give the variant {source.variant} {needed}, and train it anew")
    return folder


def _prune(run: Run, model: Any, folders: list[Path], data: TokenPairs, tokenizer: Any) -> None:
    """Keep as many experts in each layer as the config has, by `criterion` and `scope`; the seed draws random ones."""
    assert run.start is not None
    source = ZCodeM3ForConditionalGeneration.from_pretrained(folders[0]).to(data.device)
    kept = folders[0] / "expert_statistics"  # for the other runs that are made of it
    statistics = None
    if run.start.criterion != "random":
        with shared(kept):
            if not kept.exists():
                rows = data.first_rows(tokenizer, STATISTICS_PAIRS)
                collect_expert_statistics(source, tokenizer, rows, batch_size=STATISTICS_PAIRS).save(kept)
        statistics = ExpertStatistics.load(kept)
    pruned = prune_experts(
        source,
        statistics,
        keep=model.config.num_experts,
        criterion=run.start.criterion,
        scope=run.start.scope,
        seed=run.seed,
    )
    assert pruned.model is not None
    model.load_state_dict(pruned.model.state_dict())


def _upcycle(run: Run, model: Any, folders: list[Path], data: TokenPairs, tokenizer: Any) -> None:
    """Copy the dense feed-forwards into all experts, behind routers as new models of the recipe have them."""
    steps = {f"{side}_sparse_step": getattr(model.config, f"{side}_sparse_step") for side in ("encoder", "decoder")}
    with tempfile.TemporaryDirectory(dir=run.folder) as folder:
        made = Path(folder) / "upcycled"
        upcycle_dense_checkpoint(folders[0], made, num_experts=model.config.num_experts, seed=run.seed, **steps)
        load_weights(model, made)
    scale_routers(model, run.model.router_init_scale)


def _aggregate(run: Run, model: Any, folders: list[Path], data: TokenPairs, tokenizer: Any) -> None:
    """Experts of all sources beside each other, the mean of what they share."""
    with tempfile.TemporaryDirectory(dir=run.folder) as folder:
        made = Path(folder) / "aggregated"
        aggregate_experts(folders, made)
        load_weights(model, made)


def _share_weights(run: Run, model: Any, folders: list[Path], data: TokenPairs, tokenizer: Any) -> None:
    """All that is the same in both models: what stands for experts here is new (Switch Transformers, section 4.2)."""
    [folder] = folders
    found = model.load_state_dict(ZCodeM3ForConditionalGeneration.from_pretrained(folder).state_dict(), strict=False)
    if other := [name for names in found for name in names if ".ffn." not in name]:
        raise ValueError(f"{run.variant} and {folder} differ in more than their feed-forwards: {other}")


def load_weights(model: Any, folder: Path) -> None:
    """Take the weights of a saved model of the same config."""
    model.load_state_dict(ZCodeM3ForConditionalGeneration.from_pretrained(folder).state_dict())


@torch.no_grad()
def scale_routers(model: Any, factor: float) -> None:
    """Multiply the weights of all routers, which a new model has as large as other weights."""
    for name, module in model.named_modules():
        if name.endswith(".ffn.router"):
            module.weight.mul_(factor)


METHODS: dict[str, Callable[[Run, Any, list[Path], TokenPairs, Any], None]] = {
    "prune": _prune,
    "upcycle": _upcycle,
    "aggregate": _aggregate,
    "shared_weights": _share_weights,
}
