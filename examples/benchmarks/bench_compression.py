"""Translations by a model with fewer, merged, rounded or aggregated experts: what of its quality and speed is left.

    python examples/benchmarks/bench_compression.py --output_dir runs/compression --device cuda
    python examples/benchmarks/compression_curves.py runs/compression

The first command translates the test split with each of the models that it makes; it needs no metrics. The second one
scores the translations and draws the curves. Each model is one file in `output_dir/lines`, which appears when it is
done and is skipped if it is there: the command can be stopped and started again, and several processes can do a few
`--parts` each at the same time, but for `speed`, which has to be alone. Parts:

- `full`: the model as it is;
- `prune`: criteria against experts kept;
- `scope`: for whose text the experts are chosen, by utilization;
- `merge`, `quantize`;
- `train`: models pruned by utilization or merged by clustering, and the full one, after further training;
- `half_1`, `half_2`, `longer`: trained from random weights, or with `--start_from_model` further, on each half of the
  text, and on all of it for as many steps as both halves and `aggregate` together;
- `aggregate`: the experts of both halves in one model, before and after further training;
- `speed`: of the models of `full`, `prune` by utilization, `merge` by clustering, and `quantize`.
"""

import argparse
import copy
import json
import lzma
import os
import random
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments, set_seed
from translation_batches import Sentence, Translator, encode, read_sentences

from hf_moe_ted import (
    ExpertStatistics,
    ZCodeM3ForConditionalGeneration,
    ZCodeM3Tokenizer,
    aggregate_experts,
    collect_expert_statistics,
    merge_experts,
    prune_experts,
    quantize_experts,
)

EXAMPLES = Path(__file__).parents[1]
HALVES = ("half_1", "half_2")
CRITERIA = ("utilization", "activity_confidence", "reap")
QUANTIZATIONS = {"int8 per channel": (8, None), "int4 groups of 128": (4, 128), "int4 groups of 32": (4, 32)}


@dataclass(frozen=True)
class Case:
    """A model to be measured.

    Attributes:
        part: see above.
        series: the curve that it is a point of.
        make: makes it on the CPU.
        keep: share of the experts that are left.
        seed: of a choice of experts at random.
        language: the only one besides English that it translates; `None`: all.
    """

    part: str
    series: str
    make: Callable[[], Any]
    keep: float = 1.0
    seed: int = 0
    language: str | None = None

    @property
    def fields(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "make"}

    @property
    def file_name(self) -> str:
        words = " ".join(map(str, self.fields.values()))
        return "".join(letter if letter.isalnum() or letter == "." else "_" for letter in words) + ".json.xz"


class Bench:
    """The cases, the models in them, and what is measured of these."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.on_gpu = arguments.device == "cuda"
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        self.model = ZCodeM3ForConditionalGeneration.from_pretrained(arguments.model, dtype=torch.float32)
        self.tokenizer = ZCodeM3Tokenizer.from_pretrained(arguments.model)
        self.languages = arguments.languages or [code for code in self.tokenizer.languages if code != "en"]
        if new_languages := [code for code in self.languages if code not in self.tokenizer.languages]:
            self.tokenizer.add_languages(new_languages)
            self.model.resize_token_embeddings(len(self.tokenizer))
        self.parts: dict[str, Callable[[], Iterator[Case]]] = {
            "full": self.full_cases,
            "prune": self.prune_cases,
            "scope": self.scope_cases,
            "merge": self.merge_cases,
            "quantize": self.quantize_cases,
            "train": self.train_cases,
            **{name: partial(self.half_cases, name) for name in HALVES},
            "longer": self.longer_cases,
            "aggregate": self.aggregate_cases,
            "speed": self.speed_cases,
        }

    @cached_property
    def statistics(self) -> ExpertStatistics:
        sentences = self.read("validation", self.languages)
        model = copy.deepcopy(self.model).to(self.arguments.device, self.dtype)
        return collect_expert_statistics(model, self.tokenizer, [s._asdict() for s in sentences], batch_size=256)

    def read(self, split: str, languages: list[str]) -> list[Sentence]:
        return read_sentences(split, self.arguments.data_dir, languages, self.arguments.max_sentences)

    # ---- cases ----

    def full_cases(self) -> Iterator[Case]:
        yield Case("full", "full", lambda: copy.deepcopy(self.model))

    def prune_cases(self) -> Iterator[Case]:
        for keep in self.arguments.keep:
            for criterion in CRITERIA:
                yield self.pruned_case("prune", criterion, keep, criterion=criterion)
            for seed in range(self.arguments.num_seeds):
                yield self.pruned_case("prune", "random", keep, criterion="random", seed=seed)

    def scope_cases(self) -> Iterator[Case]:
        for keep in self.arguments.keep:
            yield self.pruned_case("scope", "scope=language_pair", keep, scope="language_pair")
            yield self.pruned_case("scope", "scope=language", keep, scope="language")
            yield self.pruned_case("scope", "per_layer=adaptive", keep, per_layer="adaptive")
            for language in self.languages:
                options = {"languages": ["en", language], "language": language}
                yield self.pruned_case("scope", "languages=[en, X]", keep, **options)

    def merge_cases(self) -> Iterator[Case]:
        for keep in self.arguments.keep:
            for method in ("clustering", "frequency"):
                yield self.merged_case(method, keep)

    def quantize_cases(self) -> Iterator[Case]:
        for series, (bits, group_size) in QUANTIZATIONS.items():
            yield Case("quantize", series, partial(self.quantized, bits, group_size))

    def train_cases(self) -> Iterator[Case]:
        cases = [*self.full_cases()]
        for keep in self.arguments.keep:
            cases += [self.pruned_case("train", "utilization", keep), self.merged_case("clustering", keep)]
        for case in cases:
            yield replace(case, part="train", make=partial(self.trained, case.make, self.arguments.learning_rate))

    def half_cases(self, name: str) -> Iterator[Case]:
        yield Case(name, name, partial(self.half, name))

    def longer_cases(self) -> Iterator[Case]:
        num_steps = 2 * self.arguments.scratch_steps + self.arguments.steps
        yield Case("longer", "longer", lambda: self.train(self.new_model(), num_steps))

    def aggregate_cases(self) -> Iterator[Case]:
        yield Case("aggregate", "before training", self.aggregated)
        learning_rate = self.arguments.scratch_learning_rate
        yield Case("aggregate", "after training", partial(self.trained, self.aggregated, learning_rate))

    def speed_cases(self) -> Iterator[Case]:
        cases = [*self.full_cases(), *self.quantize_cases()]
        for keep in self.arguments.keep:
            cases += [self.pruned_case("speed", "utilization", keep), self.merged_case("clustering", keep)]
        yield from (replace(case, part="speed") for case in cases)

    def pruned_case(self, part: str, series: str, keep: float, *, language: str | None = None, **options: Any) -> Case:
        def make() -> Any:
            statistics = None if options.get("criterion") == "random" else self.statistics
            return prune_experts(self.model, statistics, keep=keep, **options).model

        return Case(part, series, make, keep, options.get("seed", 0), language)

    def merged_case(self, method: str, keep: float) -> Case:
        return Case(
            "merge", method, lambda: merge_experts(self.model, self.statistics, keep=keep, method=method).model, keep
        )

    # ---- models ----

    def quantized(self, bits: int, group_size: int | None) -> Any:
        return quantize_experts(copy.deepcopy(self.model).to(self.dtype), bits, group_size)

    def new_model(self) -> Any:
        set_seed(0)
        if self.arguments.start_from_model:
            return copy.deepcopy(self.model)
        return ZCodeM3ForConditionalGeneration(copy.deepcopy(self.model.config))

    def half(self, name: str) -> Any:
        """A model trained on the sentences of one half of the English texts; `aggregate` finds it in `output_dir`."""
        folder = self.arguments.output_dir / name
        if not folder.exists():
            model = self.train(self.new_model(), self.arguments.scratch_steps, half=name)
            temporary = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=folder.parent))
            model.save_pretrained(temporary)
            self.tokenizer.save_pretrained(temporary)
            temporary.rename(folder)
        return ZCodeM3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)

    def aggregated(self) -> Any:
        folder = self.arguments.output_dir / "aggregated"
        aggregate_experts([folder.with_name(name) for name in HALVES], folder, overwrite=True)
        return ZCodeM3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)

    def trained(self, make: Callable[[], Any], learning_rate: float) -> Any:
        return self.train(make(), self.arguments.steps, learning_rate)

    def train(self, model: Any, num_steps: int, learning_rate: float | None = None, half: str | None = None) -> Any:
        """Train on sentences drawn from the train split; `learning_rate` is that of a new model by default."""
        arguments = self.arguments
        sentences = read_sentences("train", arguments.data_dir, self.languages)
        if half is not None:
            sentences = [s for s in sentences if HALVES[zlib.crc32(s.english.encode()) % 2] == half]
        drawn = random.Random(0).choices(sentences, k=num_steps * arguments.train_batch_size)
        unique = [*{*drawn}]
        encoded = dict(zip(unique, encode(self.tokenizer, unique), strict=True))
        dataset: Any = [encoded[sentence] for sentence in drawn]
        with tempfile.TemporaryDirectory() as folder:
            training_arguments = Seq2SeqTrainingArguments(
                output_dir=folder,
                max_steps=num_steps,
                per_device_train_batch_size=arguments.train_batch_size,
                learning_rate=learning_rate or arguments.scratch_learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=max(1, num_steps // 10),
                adam_beta2=0.98,
                weight_decay=0.1,
                train_sampling_strategy="group_by_length",
                bf16=self.on_gpu,
                use_cpu=not self.on_gpu,
                dataloader_num_workers=4 if self.on_gpu else 0,
                dataloader_pin_memory=self.on_gpu,
                save_strategy="no",
                logging_steps=100,
                report_to="none",
            )
            collator = DataCollatorForSeq2Seq(self.tokenizer, model=model, pad_to_multiple_of=8)
            trainer = Seq2SeqTrainer(self.configured(model), training_arguments, collator, dataset)
            trainer.train()
        return trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False).cpu()

    def configured(self, model: Any) -> Any:
        if self.arguments.experts_implementation:
            model.set_experts_implementation(self.arguments.experts_implementation)
        return model

    # ---- measuring ----

    def measure(self, case: Case) -> dict[str, Any]:
        """What the file of a case holds: its fields, and translations or speed."""
        model = self.configured(case.make()).to(device=self.arguments.device, dtype=self.dtype).eval()
        line = case.fields | {
            "num_bytes": sum(weight.nbytes for weight in model.parameters()),  # tied ones once
            "languages": [case.language] if case.language else self.languages,
            "model_languages": self.tokenizer.languages,
            "max_sentences": self.arguments.max_sentences,
            "device": torch.cuda.get_device_name() if self.on_gpu else "CPU",
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        translator = Translator(
            self.tokenizer,
            self.read("test", line["languages"]),
            batch_size=self.arguments.batch_size,
            max_new_tokens=self.arguments.max_new_tokens,
        )
        if case.part == "speed":
            return line | translator.speed(model)
        start = time.perf_counter()
        outputs = translator.translate(model)
        return line | {"translation_s": time.perf_counter() - start, "outputs": outputs}


def write_line(line: dict[str, Any], path: Path) -> None:
    """Compressed JSON that is there as a whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(lzma.compress(json.dumps(line, ensure_ascii=False).encode()))
    temporary.replace(path)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/compression"))
    parser.add_argument("--model", type=Path, default=EXAMPLES / "checkpoints" / "zcode_m3_demo")
    parser.add_argument("--data_dir", type=Path, default=EXAMPLES / "data")
    parser.add_argument("--languages", nargs="+", help="besides English; default: all of the model")
    parser.add_argument("--parts", nargs="+", help="default: all, in the order above")
    parser.add_argument("--keep", nargs="+", type=float, default=[0.75, 0.5, 0.25, 0.125], help="shares of the experts")
    parser.add_argument("--num_seeds", type=int, default=3, help="of pruning at random")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--experts_implementation", help="such as zcode_grouped; default: that of the model")
    parser.add_argument("--max_sentences", type=int, default=100, help="of statistics and test, per direction")
    parser.add_argument("--batch_size", type=int, default=1024, help="sentences that are translated at once")
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=300, help="of further training")
    parser.add_argument("--scratch_steps", type=int, default=1500, help="of training on a half of the text")
    parser.add_argument("--start_from_model", action="store_true", help="halves and longer; languages may be new to it")
    parser.add_argument("--train_batch_size", type=int, default=256, help="sentences per step")
    parser.add_argument("--learning_rate", type=float, default=4e-4, help="of further training")
    parser.add_argument("--scratch_learning_rate", type=float, default=1.5e-3, help="of new models")
    parser.add_argument("--time_limit_s", type=float, default=float("inf"), help="no case is begun after it")
    return parser.parse_args()


def main() -> None:
    start = time.perf_counter()
    arguments = parse_arguments()
    bench = Bench(arguments)
    if unknown := sorted({*(arguments.parts or ())} - bench.parts.keys()):
        raise ValueError(f"unknown parts {', '.join(unknown)}; there are {', '.join(bench.parts)}")
    lines = arguments.output_dir / "lines"
    lines.mkdir(parents=True, exist_ok=True)
    cases = [case for part in arguments.parts or bench.parts for case in bench.parts[part]()]
    waiting = [case for case in cases if not (lines / case.file_name).exists()]
    for index, case in enumerate(tqdm(waiting, desc="Models", unit="model")):
        if time.perf_counter() - start > arguments.time_limit_s:
            print(f"time limit reached: {len(waiting) - index} models are left; the same command goes on with them")
            break
        write_line(bench.measure(case), lines / case.file_name)


if __name__ == "__main__":
    main()
