"""What a user of `Seq2SeqTrainer` gets: steps from Python, compiled, and replayed as CUDA graphs, beside dense M2M100.

    python examples/benchmarks/bench_trainer.py --output trainer.json
    python examples/benchmarks/bench_trainer.py --peers "ours eager" "ours graphs" --gpus 4 --expert_parallel_size 4
    python examples/benchmarks/bench_trainer.py --peers "ours eager" "ours graphs" --train_file mt50.train.tsv

Every peer trains in a process of its own, or in one per GPU, with clipping at 1.0, fused AdamW and random weights.
Without `--train_file` batches are random tokens of one shape; with it they are real text, `--max_tokens_per_batch`
tokens with padding, in as many shapes as `length_buckets` give. Milliseconds are the mean over the timed steps, tokens
are those of source and target without padding.

| peer | |
|---|---|
| `dense eager`, `dense compile`, `dense graphs` | M2M100 of the same active size, bfloat16 autocast over float32 |
| `ours eager`, `ours compile`, `ours graphs` | ZCodeM3 in bfloat16, `TedSeq2SeqTrainer` on several GPUs |
| `ours compile+graphs` | layers that `torch.compile` compiled, inside the captured step; one GPU |
| `ours loop` | no Trainer: the whole step, optimizer included, as one CUDA graph (`bench_ted.py`) |
| `deepspeed loop` | no Trainer: M2M100 with DeepSpeed's own MoE and ZeRO, from Python (`bench_ted.py`) |
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_ted import deepspeed_step, dense_model, sharded_model, sync, torch_step
from rich.console import Console
from rich.table import Table
from ted_suites import BASES, Case
from transformers import Seq2SeqTrainer, TrainerCallback, default_data_collator

from hf_moe_ted import (
    CudaGraphsTrainerMixin,
    DataCollatorForMultitaskSeq2Seq,
    MultitaskDataset,
    MultitaskTrainerMixin,
    MultitaskTrainingArguments,
    TedPlugin,
    TedSeq2SeqTrainer,
    ZCodeM3Tokenizer,
)

PEERS = ("dense eager", "dense compile", "dense graphs", "ours eager", "ours compile", "ours graphs")
PEERS += ("ours compile+graphs", "ours loop", "deepspeed loop")


class CountsTokens(Seq2SeqTrainer):
    """Keeps the number of tokens of each step, on the device, and that of positions with padding."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.tokens: list[torch.Tensor] = []
        self.num_positions = 0

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        for batch in batches:
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            self.tokens.append(mask.sum() + (batch["labels"] != -100).sum())
            self.num_positions += batch["input_ids"].numel() + batch["labels"].numel()
        return batches, num_items


class GraphTrainer(CountsTokens, CudaGraphsTrainerMixin, Seq2SeqTrainer):
    pass


class TedTrainer(CountsTokens, TedSeq2SeqTrainer):
    pass


class TextTrainer(MultitaskTrainerMixin, GraphTrainer):
    pass


class TedTextTrainer(MultitaskTrainerMixin, TedTrainer):
    pass


class Clock(TrainerCallback):
    """Times the steps behind the first ones, and profiles the one that follows."""

    def __init__(self, num_warmup_steps: int, num_steps: int, profiles: bool = False):
        self.num_warmup_steps, self.last_step = num_warmup_steps, num_warmup_steps + num_steps
        self.seconds = 0.0
        self.profiler = torch.profiler.profile() if profiles else None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.num_warmup_steps:
            sync()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            self.start = time.perf_counter()
        elif state.global_step == self.last_step:
            sync()
            self.seconds = time.perf_counter() - self.start
            if self.profiler is not None:
                self.profiler.start()
        elif state.global_step == self.last_step + 1 and self.profiler is not None:
            sync()
            self.profiler.stop()

    def profile(self) -> str | None:
        """Where the host and the device were in one step."""
        if self.profiler is None:
            return None
        averages = self.profiler.key_averages()
        keys = ["cpu_time_total", "self_device_time_total"] if torch.cuda.is_available() else ["cpu_time_total"]
        return "\n".join(averages.table(sort_by=key, row_limit=40, max_name_column_width=70) for key in keys)


# ---- one peer, in every process ----


def run_peer(peer: str, arguments: argparse.Namespace) -> dict[str, Any]:
    system, how = peer.split()
    if how == "loop":
        return run_loop(system, arguments)
    plugin = TedPlugin(**layout_of(arguments))
    model = model_of(system, arguments, plugin)
    clock = Clock(arguments.warmup_steps, arguments.steps, arguments.profile)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(system, how, arguments, plugin, model, folder, clock)
        metrics = trainer.train().metrics
    losses = [round(log["loss"], 4) for log in trainer.state.log_history if "loss" in log]
    num_ranks = trainer.args.world_size // trainer.get_tp_size()  # which have as many tokens each, or nearly
    tokens = int(sum(trainer.tokens[clock.num_warmup_steps : clock.last_step])) * num_ranks
    return {
        "step_ms": clock.seconds / arguments.steps * 1e3,
        "tokens_per_s": tokens / clock.seconds,
        "padding": 1.0 - int(sum(trainer.tokens)) / trainer.num_positions,
        "peak_gib": torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else None,
        "losses": losses,
        "graphs": {name: number for name, number in metrics.items() if name.startswith("cuda_graphs/")},
        "profile": clock.profile(),
    }


def run_loop(system: str, arguments: argparse.Namespace) -> dict[str, Any]:
    case = case_of(system, arguments, graph=system == "ours")
    measured = deepspeed_step(case) if system == "deepspeed" else torch_step(case)
    for _ in range(arguments.warmup_steps):
        measured.step()
    sync()
    start = time.perf_counter()
    for _ in range(arguments.steps):
        measured.step()
    sync()
    seconds = time.perf_counter() - start
    tokens = 2 * arguments.batch_size * arguments.length * arguments.steps * measured.num_batches
    peak_gib = torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else None
    return {"step_ms": seconds / arguments.steps * 1e3, "tokens_per_s": tokens / seconds, "peak_gib": peak_gib}


def layout_of(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("tensor_parallel_size", "expert_parallel_size", "zero_stage")
    return {name: getattr(arguments, name) for name in names}


def case_of(system: str, arguments: argparse.Namespace, graph: bool = False) -> Case:
    layout: dict[str, Any] = layout_of(arguments) if arguments.gpus > 1 else {}
    if system == "deepspeed":
        layout = {"tp": arguments.tensor_parallel_size, "ep": arguments.expert_parallel_size}
    elif graph and layout:
        layout["pad_expert_input_to_capacity"] = True
    checkpointing = "full" if system == "deepspeed" else "communication-aware"
    return Case(
        system,
        arguments.gpus,
        layout=layout,
        checkpointing=checkpointing if arguments.gradient_checkpointing else None,
        base=arguments.base,
        num_experts=arguments.num_experts,
        optimizer="fused",
        batch_size=arguments.batch_size,
        length=arguments.length,
        graph=graph,
    )


def model_of(system: str, arguments: argparse.Namespace, plugin: TedPlugin) -> Any:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if system == "dense":
        return dense_model(case_of(system, arguments)).to(device)
    return sharded_model(case_of(system, arguments), plugin.distributed_config if arguments.gpus > 1 else None, device)


def trainer_of(
    system: str, how: str, arguments: argparse.Namespace, plugin: TedPlugin, model: Any, folder: str, clock: Clock
) -> Any:
    is_sharded = system == "ours" and arguments.gpus > 1
    on_gpu = torch.cuda.is_available()
    options: dict[str, Any] = {"parallelism_config": plugin} if is_sharded else {}
    if arguments.train_file is not None:
        options |= {"max_tokens_per_batch": arguments.max_tokens_per_batch}
        options |= {"length_buckets": arguments.length_buckets} if arguments.length_buckets else {}
        options |= {"dataloader_num_workers": 4}  # tokenizing a batch takes longer than a step
    args = MultitaskTrainingArguments(
        folder,
        max_steps=clock.last_step + 2,
        per_device_train_batch_size=arguments.batch_size,
        bf16=system == "dense" and on_gpu,
        optim="adamw_torch_fused" if on_gpu else "adamw_torch",
        learning_rate=1e-4,
        logging_steps=max(1, arguments.steps // 4),
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=not on_gpu,
        gradient_checkpointing=arguments.gradient_checkpointing,
        cuda_graphs="graphs" in how,
        torch_compile="compile" in how,
        **options,
    )
    data = text_of(arguments, model) if arguments.train_file else random_tokens(arguments, model)
    kind: Any = TedTextTrainer if is_sharded else TextTrainer
    if not arguments.train_file:
        kind = TedTrainer if is_sharded else GraphTrainer
    return kind(model=model, args=args, callbacks=[clock], **data)


def random_tokens(arguments: argparse.Namespace, model: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.batch_size * 8, arguments.length)
    ids, labels = (torch.randint(10, model.config.vocab_size, shape, generator=generator) for _ in range(2))
    rows = [{"input_ids": source, "labels": target} for source, target in zip(ids, labels, strict=True)]
    return {"train_dataset": rows, "data_collator": default_data_collator}


def text_of(arguments: argparse.Namespace, model: Any) -> dict[str, Any]:
    """Pairs of a file with lines of a language, a corpus, English, and the text in that language."""
    tokenizer = ZCodeM3Tokenizer.from_pretrained(arguments.tokenizer)
    known = set(tokenizer.lang_code_to_id)
    rows = []
    with open(arguments.train_file, encoding="utf-8") as lines:
        for line in lines:
            language, _, english, text = line.rstrip("\n").split("\t")
            if language in known:
                rows.append({"source": english, "target": text, "src_lang": "en", "tgt_lang": language})
            if len(rows) == arguments.max_pairs:
                break
    collator = DataCollatorForMultitaskSeq2Seq(tokenizer, model)
    return {"train_dataset": MultitaskDataset(rows, both_directions=True), "data_collator": collator}


# ---- the driver ----


def main() -> None:
    arguments = parsed()
    if arguments.worker:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        result = run_peer(arguments.worker, arguments)
        if int(os.environ.get("RANK", "0")) == 0:
            print("RESULT " + json.dumps(result), flush=True)
        return
    results = []
    for peer in arguments.peers:
        results.append({"peer": peer} | run_in_processes(peer, arguments))
        Console(width=150).print(table(results[-1:], results))
        if arguments.output:
            device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
            setting = {"device": device, "torch": torch.__version__, "command": sys.argv}
            arguments.output.write_text(json.dumps(setting | {"results": results}, indent=1) + "\n")
    Console(width=150).print(table(results, results))


def run_in_processes(peer: str, arguments: argparse.Namespace) -> dict[str, Any]:
    num_processes = 1 if peer.startswith("dense") else arguments.gpus
    command = [sys.executable]
    if num_processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    own = [*sys.argv[1:], *(["--gpus", "1"] if num_processes == 1 else [])]
    environment = dict(os.environ)
    if num_processes == 1:
        environment.setdefault("CUDA_VISIBLE_DEVICES", "0")
    if peer.startswith("ours compile"):
        environment |= {"ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "true"}
        if arguments.train_file is not None:
            environment |= {"ACCELERATE_DYNAMO_USE_DYNAMIC": "true"}
    try:
        done = subprocess.run(
            [*command, __file__, *own, "--worker", peer], capture_output=True, text=True, env=environment,
            timeout=arguments.time_limit_s,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"more than {arguments.time_limit_s} s"}
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        return {"error": done.stderr.strip()[-3000:]}
    return json.loads(found[-1].removeprefix("RESULT "))


def table(rows: list[dict[str, Any]], results: list[dict[str, Any]]) -> Table:
    found = Table(
        "peer", "ms/step", "tokens/s", "/ first", "reserved GiB", "padding", "replayed / eager / graphs", "losses"
    )
    first = next((result["tokens_per_s"] for result in results if "error" not in result), 1.0)
    for row in rows:
        if "error" in row:
            found.add_row(row["peer"], "failed", row["error"])
            continue
        counts = row.get("graphs") or {}
        found.add_row(
            row["peer"],
            f"{row['step_ms']:.1f}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['tokens_per_s'] / first:.2f}",
            "" if row.get("peak_gib") is None else f"{row['peak_gib']:.1f}",
            "" if row.get("padding") is None else f"{row['padding']:.1%}",
            " / ".join(str(number) for number in counts.values()),
            " ".join(f"{loss:.4f}" for loss in row.get("losses", [])[:4]),
        )
    return found


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", default=PEERS, choices=PEERS)
    parser.add_argument("--base", choices=BASES, default="0.6B")
    parser.add_argument("--num_experts", type=int, default=16)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--expert_parallel_size", type=int, default=1)
    parser.add_argument("--tensor_parallel_size", type=int, default=1)
    parser.add_argument("--zero_stage", type=int, default=1)
    parser.add_argument("--gradient_checkpointing", action="store_true", help="communication-aware, full for DeepSpeed")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument(
        "--train_file", type=Path, help="tab-separated: a language, a corpus, English, and the text in that language"
    )
    parser.add_argument("--tokenizer", default="examples/checkpoints/zcode_m3_demo")
    parser.add_argument("--max_pairs", type=int, default=100_000)
    parser.add_argument("--max_tokens_per_batch", type=int, default=16_384)
    parser.add_argument("--length_buckets", type=int, nargs="+")
    parser.add_argument("--warmup_steps", type=int, default=15)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--profile", action="store_true", help="of one step, into --output")
    parser.add_argument("--time_limit_s", type=float, default=170.0, help="of one peer")
    parser.add_argument("--output", type=Path, help="JSON, written after each peer")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
