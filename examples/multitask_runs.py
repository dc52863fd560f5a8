"""Measurements of experiment runs besides losses: seconds, dropped tokens, translations."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from multitask_data import Row
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback

NUM_PLACES = 10


class Seconds(TrainerCallback):
    """Adds the `seconds` of training to each entry of the log history, without those of evaluation."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        before = [entry["seconds"] for entry in state.log_history if "seconds" in entry]  # of a run that is resumed
        self.start = time.perf_counter() - (before[-1] if before else 0.0)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        runtimes = [
            value for name, value in (logs or {}).items() if name.startswith("eval") and name.endswith("_runtime")
        ]
        self.start += sum(runtimes)
        state.log_history[-1]["seconds"] = time.perf_counter() - self.start


def seconds_at(log_history: list[dict[str, Any]], step: int) -> float:
    """Seconds of training behind the last log up to a step, as [`Seconds`] has added them; 0 before the first."""
    return max((entry["seconds"] for entry in log_history if "seconds" in entry and entry["step"] <= step), default=0.0)


class TimeLimit(TrainerCallback):
    """Ends a training in time, with an evaluation and a checkpoint from which it can continue.

    Args:
        deadline: value of `time.perf_counter()`, in seconds.
    """

    def __init__(self, deadline: float):
        self.deadline = deadline

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if time.perf_counter() >= self.deadline:
            control.should_log = control.should_evaluate = control.should_save = True
            control.should_training_stop = True


class PlaceOfDropped(TrainerCallback):
    """Adds `dropped_by_place` to logs of training: the share of slots that no expert computes, by tenths of batches."""

    def add_to(self, trainer: Trainer) -> None:
        """Watch the routers of a trainer's model."""
        trainer.add_callback(self)
        self.counts = torch.zeros(2, NUM_PLACES, dtype=torch.float64, device=trainer.args.device)
        for name, module in trainer.model.named_modules():
            if name.endswith(".ffn.router"):
                module.register_forward_hook(self._count)

    @torch.no_grad()
    def _count(self, router: Any, args: Any, output: Any) -> None:
        if not router.training:
            return
        routing = output[1]
        num_tokens, top_k = routing.expert_ids.shape
        place = torch.arange(num_tokens, device=routing.expert_ids.device) * NUM_PLACES // num_tokens
        is_counted = torch.ones_like(place) if routing.token_mask is None else routing.token_mask
        is_dropped = (routing.expert_ids == routing.num_experts).sum(dim=1) * is_counted
        self.counts[0].index_add_(0, place, is_dropped.double())
        self.counts[1].index_add_(0, place, top_k * is_counted.double())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            dropped, all_slots = self.counts
            state.log_history[-1]["dropped_by_place"] = (dropped / all_slots.clamp(min=1)).tolist()
            self.counts = torch.zeros_like(self.counts)


@contextmanager
def eval_capacity(model: Any, capacity: float | None) -> Iterator[None]:
    """Give experts another `eval_capacity_factor`; `None` for no capacity. Dense models have none."""
    before = getattr(model.config, "eval_capacity_factor", None)
    model.config.eval_capacity_factor = capacity
    try:
        yield
    finally:
        model.config.eval_capacity_factor = before


@torch.inference_mode()
def translate(model: Any, tokenizer: Any, rows: list[Row], *, max_length: int, batch_size: int = 256) -> list[str]:
    """Greedy translations, in batches of similar length and of any languages.

    Experts have no capacity here, whatever the model's config says: all texts of a batch begin with the same token,
    whose expert would be full, and a translation would depend on the others of its batch.
    """
    model.eval()
    translations: dict[int, str] = {}
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]["source"]), reverse=True)
    for start in tqdm(range(0, len(rows), batch_size), desc="Translating", unit="batch"):
        numbers = order[start : start + batch_size]
        encoded = [
            tokenizer(rows[n]["source"], src_lang=rows[n]["src_lang"], truncation=True, max_length=max_length)
            for n in numbers
        ]
        inputs = tokenizer.pad(encoded, return_tensors="pt").to(model.device)
        tags = [[model.config.decoder_start_token_id, tokenizer.get_lang_id(rows[n]["tgt_lang"])] for n in numbers]
        longest = min(max_length, 2 * inputs["input_ids"].shape[1] + 10)
        with eval_capacity(model, None):
            output = model.generate(
                **inputs,
                decoder_input_ids=torch.tensor(tags, device=model.device),
                num_beams=1,
                do_sample=False,
                max_length=longest,
            )
        translations |= zip(numbers, tokenizer.batch_decode(output, skip_special_tokens=True), strict=True)
    return [translations[number] for number in range(len(rows))]


def write_json(path: Path, content: Any) -> None:
    """Write a file that appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}")
    staged.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(staged, path)
