"""Tokens, work and steps of ranks that share a batch count once: as in one process with the same batches."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from ted_cases import write_models
from torch import Tensor
from transformers import Seq2SeqTrainingArguments

from hf_moe_ted import TedPlugin, TedSeq2SeqTrainer, ZCodeM3ForConditionalGeneration
from hf_moe_ted.testing import run_distributed_test

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {"expert_parallel_size": 2},
    "tp2": {"tensor_parallel_size": 2},
}
NUM_SAMPLES, BATCH_SIZE = 16, 8


@dataclass(frozen=True)
class Counts:
    """
    Attributes:
        num_tokens, total_flos: of two steps of two micro-batches.
        losses, norms: by step.
        num_eval_steps: of 11 samples, two at once on each data-parallel rank; of `evaluate` and of `predict`.
        num_eval_samples: likewise.
    """

    num_tokens: float
    total_flos: float
    losses: list[float]
    norms: list[float]
    num_eval_steps: tuple[float, float]
    num_eval_samples: tuple[float, float]


def rows(num_samples: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 96, (num_samples, 9), generator=generator)
    labels = torch.randint(5, 96, (num_samples, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[:, 6:] = 0
    return [{"input_ids": i, "attention_mask": m, "labels": k} for i, m, k in zip(ids, mask, labels, strict=True)]


def count(folder: str, layout: dict[str, Any], averages: bool, tokens: str) -> Counts:
    plugin = TedPlugin(**layout)
    is_sharded = plugin.total_size > 1
    options: Any = {"distributed_config": plugin.distributed_config} if is_sharded else {}
    args = Seq2SeqTrainingArguments(
        f"{folder}/run",
        parallelism_config=plugin,
        per_device_train_batch_size=BATCH_SIZE // plugin.dp_shard_size // 2,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        include_num_input_tokens_seen=tokens,
        average_tokens_across_devices=averages,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    model = ZCodeM3ForConditionalGeneration.from_pretrained(f"{folder}/additive", **options)
    trainer = TedSeq2SeqTrainer(
        model, args, train_dataset=rows(NUM_SAMPLES), optimizer_cls_and_kwargs=plugin.tiled_adamw(lr=1e-3)
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    metrics = trainer.evaluate(rows(11)), trainer.predict(rows(11), metric_key_prefix="eval").metrics
    steps, seen = (
        tuple(m[f"eval_{what}_per_second"] * m["eval_runtime"] for m in metrics) for what in ("steps", "samples")
    )
    num_tokens, flos = trainer.state.num_input_tokens_seen, trainer.state.total_flos
    return Counts(num_tokens, flos, [log["loss"] for log in logs], [log["grad_norm"] for log in logs], steps, seen)


def count_all(folder: str, layouts: dict[str, Any]) -> dict[tuple[str, bool], Counts]:
    return {
        (name, averages): count(folder, layout, averages, "non_padding" if averages else "all")
        for name, layout in layouts.items()
        for averages in (True, False)
    }


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], list[Counts]]:
    folder = tmp_path_factory.mktemp("counts")
    write_models(folder, {"additive"})
    by_rank = run_distributed_test(count_all, 2, str(folder), LAYOUTS)
    counts = {key: [rank[key] for rank in by_rank] for key in by_rank[0]}
    return counts | {key: [value] for key, value in count_all(str(folder), {"one": {}}).items()}


@pytest.mark.parametrize("averages", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_one_process(counted: dict[tuple[str, bool], list[Counts]], layout: str, averages: bool) -> None:
    (expected,) = counted["one", averages]
    assert expected.num_tokens == NUM_SAMPLES * (6 if averages else 9)
    for found in counted[layout, averages]:
        assert found.num_tokens == expected.num_tokens
        assert found.total_flos == pytest.approx(expected.total_flos, rel=1e-3)
        assert found.losses == pytest.approx(expected.losses, rel=1e-4)
        assert found.norms == pytest.approx(expected.norms, rel=1e-4)
        num_batches = 2 if layout == "dp2" else 1
        assert found.num_eval_steps == pytest.approx([-(-11 // (2 * num_batches))] * 2, rel=0.05)
        assert found.num_eval_samples == pytest.approx([11] * 2, rel=0.05)
