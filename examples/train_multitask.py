"""Multitask training by a recipe: translation both ways and denoising, dense or sparse, one run or an experiment.

A recipe is a JSON file with the fields of the arguments below and of `MultitaskTrainingArguments`. With `variants`,
fields by name, and `seeds` it is an experiment, whose runs are done one after another, but for those that are done:

    python examples/train_multitask.py examples/recipes/experiments/token_dropping.json --train_file train.tsv.xz \
        --validation_file valid.tsv.xz --output_dir runs/token_dropping
    python examples/experiment_report.py runs/token_dropping

Fields on the command line override those of the recipe and its variants; `--variants`, `--seeds` select runs. A run
goes on from its last checkpoint, if it saves any. `--dry_run` trains no model and prints for each variant the mixture,
the tokens of each language, steps, shapes of batches and memory. Files hold lines of lang, English and target, see
`multitask_data.py`.

Each run leaves `result.json` (losses over steps and seconds, numbers of the routers) and, with `max_test_samples`,
`translations.json` in `output_dir/<variant>/seed_<seed>`.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from multitask_data import backwards, first_pairs, monolingual, read_pairs
from multitask_plan import print_plan
from multitask_runs import PlaceOfDropped, Seconds, translate, write_json
from transformers import HfArgumentParser, set_seed
from transformers.trainer_utils import get_last_checkpoint

from hf_moe_ted import (
    DataCollatorForMultitaskSeq2Seq,
    DenoisingNoise,
    LanguageRoutingCallback,
    MultitaskDataset,
    MultitaskSeq2SeqTrainer,
    MultitaskTrainingArguments,
    RouterStatisticsCallback,
    TokenBudgetBatchSampler,
    ZCodeM3Config,
    ZCodeM3ForConditionalGeneration,
    ZCodeM3Tokenizer,
    token_lengths,
)


@dataclass
class ModelArguments:
    """Which model to train."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Train this model; default: a new one."})
    tokenizer_name_or_path: str | None = field(default=None, metadata={"help": "Default: one trained on the text."})
    vocab_size: int = field(default=32000, metadata={"help": "Vocabulary of a new tokenizer, language tags included."})
    tokenizer_texts: int = field(default=500_000, metadata={"help": "Texts that a new tokenizer is trained on."})
    config: str = field(default="{}", metadata={"help": "ZCodeM3Config fields of a new model, as JSON."})
    experts_implementation: str | None = field(default=None, metadata={"help": "Such as zcode_grouped."})
    save_model: bool = field(default=False, metadata={"help": "Write the trained model to the folder of the run."})


@dataclass
class DataArguments:
    """Which text to train on."""

    train_file: str = field(metadata={"help": "Training pairs, see multitask_data.py."})
    validation_file: str = field(metadata={"help": "Pairs for eval_loss."})
    test_file: str | None = field(default=None, metadata={"help": "Pairs to translate; default: validation_file."})
    languages: list[str] | None = field(default=None, metadata={"help": "Languages besides English; default: all."})
    max_pairs: int | None = field(default=None, metadata={"help": "Training pairs per language; default: all."})
    low_resource_languages: list[str] = field(
        default_factory=list, metadata={"help": "Languages with low_resource_pairs only, whose losses are told apart."}
    )
    low_resource_pairs: int = field(default=1000, metadata={"help": "Training pairs of a low-resource language."})
    denoising: bool = field(
        default=False, metadata={"help": "Denoise all training texts, those left out as pairs too."}
    )
    mask_ratio: float = field(default=0.35, metadata={"help": "Share of the words that denoising masks."})
    poisson_lambda: float = field(default=3.5, metadata={"help": "Mean length of a masked span, in words."})
    sentence_distance: int = field(default=0, metadata={"help": "Places that denoising may move a sentence."})
    word_dropout: float = field(default=0.0, metadata={"help": "Probability that denoising leaves a word out."})
    max_length: int = field(default=128, metadata={"help": "Longer texts are truncated, in tokens."})
    max_eval_samples: int = field(default=20, metadata={"help": "Validation pairs per direction."})
    max_test_samples: int = field(default=0, metadata={"help": "Pairs per direction that are translated at the end."})


@dataclass(frozen=True)
class Run:
    """One training of an experiment."""

    variant: str
    seed: int
    model: ModelArguments
    data: DataArguments
    training: MultitaskTrainingArguments

    @property
    def folder(self) -> Path:
        return Path(self.training.output_dir or "runs/multitask")


def runs_of(argv: list[str]) -> tuple[list[Run], bool]:
    """The runs that a command line asks for, and whether it is a dry run.

    Raises:
        ValueError: an unknown variant, or a field of the recipe that is no argument.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--variants", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--dry_run", "--dry-run", action="store_true")
    selected, overrides = parser.parse_known_args(argv)
    recipe = json.loads(selected.recipe.read_text())
    variants = recipe.pop("variants", {"run": {}})
    seeds = recipe.pop("seeds", [recipe.get("seed", 0)])
    if unknown := {*(selected.variants or ())} - {*variants}:
        raise ValueError(f"{selected.recipe} has no variants {sorted(unknown)}; it has {list(variants)}")
    runs = [
        _run(recipe, overrides, variant, variants[variant], seed)
        for seed in selected.seeds or seeds
        for variant in selected.variants or variants
    ]
    return runs, selected.dry_run


def _run(recipe: dict[str, Any], overrides: list[str], variant: str, of_variant: dict[str, Any], seed: int) -> Run:
    fields = {**recipe, **of_variant, "seed": seed}
    fields["config"] = {**recipe.get("config", {}), **of_variant.get("config", {})}
    if fields.get("bf16") and not torch.cuda.is_available():
        fields["bf16"] = False  # bfloat16 is slower than float32 on most CPUs
    argv = []
    for name, value in fields.items():
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        argv += [f"--{name}", *map(str, values)]
    parser = HfArgumentParser([ModelArguments, DataArguments, MultitaskTrainingArguments])
    model, data, training = parser.parse_args_into_dataclasses([*argv, *overrides])
    training.dataloader_pin_memory &= torch.cuda.is_available()  # without a GPU it does nothing but warn
    training.output_dir = os.path.join(training.output_dir or "runs/multitask", variant, f"seed_{seed}")
    return Run(variant, seed, model, data, training)


class Text:
    """The text of a run, read once for all runs that take the same."""

    def __init__(self, args: DataArguments):
        self.all_pairs = read_pairs(args.train_file, args.languages)
        pairs = self.all_pairs if args.max_pairs is None else first_pairs(self.all_pairs, args.max_pairs)
        self.pairs = first_pairs(pairs, args.low_resource_pairs, args.low_resource_languages)
        self.dataset = MultitaskDataset(
            translation=self.pairs,
            denoising=monolingual(pairs) if args.denoising else None,
            both_directions=True,
            languages=None if args.languages is None else ["en", *args.languages],
        )
        validation = read_pairs(args.validation_file, args.languages)
        self.validation = {"validation": first_pairs(validation, args.max_eval_samples)}
        if args.low_resource_languages:
            of_low = [row["tgt_lang"] in args.low_resource_languages for row in self.validation["validation"]]
            rows = list(zip(of_low, self.validation.pop("validation"), strict=True))
            self.validation = {"low": [row for low, row in rows if low], "high": [row for low, row in rows if not low]}
        # the last ones, as the first ones are for the loss
        test = validation if args.test_file is None else read_pairs(args.test_file, args.languages)
        self.test = first_pairs(test[::-1], args.max_test_samples)

    @property
    def languages(self) -> list[str]:
        return ["en", *sorted({row["tgt_lang"] for row in self.all_pairs})]


def tokenizer_of(run: Run, text: Text) -> Any:
    """The tokenizer of a run; a new one is kept beside the runs, for the others."""
    kept = run.folder.parents[1] / f"tokenizer_{run.model.vocab_size}"
    name = run.model.tokenizer_name_or_path or run.model.model_name_or_path or (str(kept) if kept.is_dir() else None)
    if name is not None:
        return ZCodeM3Tokenizer.from_pretrained(name)
    texts = [row["text"] for row in monolingual(text.pairs)]
    step = max(1, len(texts) // run.model.tokenizer_texts)
    tokenizer = ZCodeM3Tokenizer(languages=text.languages)
    tokenizer = tokenizer.train_new_from_iterator(texts[::step], run.model.vocab_size)
    tokenizer.save_pretrained(kept)
    return tokenizer


def config_of(run: Run, tokenizer: Any) -> ZCodeM3Config:
    """The architecture of a run."""
    if run.model.model_name_or_path is not None:
        return ZCodeM3Config.from_pretrained(run.model.model_name_or_path)
    return ZCodeM3Config(vocab_size=len(tokenizer), **json.loads(run.model.config))


def collator_of(run: Run, tokenizer: Any, model: Any = None) -> DataCollatorForMultitaskSeq2Seq:
    """The data collator of a run."""
    args = run.data
    noise = DenoisingNoise(args.mask_ratio, args.poisson_lambda, args.sentence_distance, args.word_dropout)
    multiple = 8 if run.training.length_buckets is None else None
    return DataCollatorForMultitaskSeq2Seq(
        tokenizer, model, noise=noise, max_length=args.max_length, pad_to_multiple_of=multiple
    )


def trainer_of(run: Run, text: Text, tokenizer: Any) -> MultitaskSeq2SeqTrainer:
    """A trainer with a new model, or the one that is named."""
    set_seed(run.seed)
    config = config_of(run, tokenizer)
    if run.model.model_name_or_path is None:
        model = ZCodeM3ForConditionalGeneration(config)
    else:
        model = ZCodeM3ForConditionalGeneration.from_pretrained(run.model.model_name_or_path)
    if run.model.experts_implementation is not None:
        model.set_experts_implementation(run.model.experts_implementation)
    collator = collator_of(run, tokenizer, model)
    validation = {
        name: MultitaskDataset(sorted(rows, key=lambda row: len(row["source"])), both_directions=True)
        for name, rows in text.validation.items()
    }
    trainer = MultitaskSeq2SeqTrainer(
        model=model,
        args=run.training,
        train_dataset=text.dataset,
        eval_dataset=validation,
        data_collator=collator,
        processing_class=tokenizer,
        token_lengths=lengths_of(text, run, tokenizer),
        callbacks=[Seconds()],
    )
    if config.sparse_layers("encoder") or config.sparse_layers("decoder"):
        for callback in (RouterStatisticsCallback(), LanguageRoutingCallback(tokenizer), PlaceOfDropped()):
            callback.add_to(trainer)
    return trainer


def lengths_of(text: Text, run: Run, tokenizer: Any) -> np.ndarray:
    """Tokens of the training examples, which are counted once and kept beside the runs."""
    key = f"{run.data} {run.model.tokenizer_name_or_path} {run.model.model_name_or_path} {run.model.vocab_size}"
    path = run.folder.parents[1] / f"token_lengths_{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy"
    if not path.is_file():
        lengths = token_lengths(text.dataset, collator_of(run, tokenizer))
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_suffix(".incomplete.npy")
        np.save(staged, lengths)
        os.replace(staged, path)
    return np.load(path)


def train(run: Run, text: Text, tokenizer: Any) -> None:
    """Train, translate the test set, and write what came out."""
    trainer = trainer_of(run, text, tokenizer)
    checkpoint = get_last_checkpoint(str(run.folder)) if run.folder.is_dir() else None
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter()
    rows = text.test + backwards(text.test)
    translations = translate(trainer.model, tokenizer, rows, max_length=run.data.max_length) if rows else []
    if not trainer.is_world_process_zero():
        return
    if run.model.save_model:
        trainer.save_model()
    if rows:
        written = [{**row, "translation": text} for row, text in zip(rows, translations, strict=True)]
        write_json(run.folder / "translations.json", written)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    result = {
        "variant": run.variant,
        "seed": run.seed,
        "config": trainer.model.config.to_diff_dict(),
        "num_parameters": trainer.model.num_parameters(),
        "max_tokens_per_batch": run.training.max_tokens_per_batch,
        "low_resource_languages": run.data.low_resource_languages,
        "device": device,
        "torch": torch.__version__,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "translating_s": time.perf_counter() - seconds,
        "log_history": trainer.state.log_history,
    }
    write_json(run.folder / "result.json", result)


def main() -> None:
    # its backward can give NaN on Hopper since torch 2.11: docs/upstream/torch_cudnn_attention_gradient.md
    torch.backends.cuda.enable_cudnn_sdp(False)
    runs, is_dry = runs_of(sys.argv[1:])
    texts: dict[str, Text] = {}
    for run in runs if not is_dry else [run for run in runs if run.seed == runs[0].seed]:
        if not is_dry and (run.folder / "result.json").is_file():
            print(f"{run.folder} is done")
            continue
        if str(run.data) not in texts:
            texts[str(run.data)] = Text(run.data)
        text = texts[str(run.data)]
        tokenizer = tokenizer_of(run, text)
        if is_dry:
            print(f"\n{run.variant}, seed {run.seed}")
            sampler = TokenBudgetBatchSampler(
                text.dataset,
                collator_of(run, tokenizer),
                run.training.max_tokens_per_batch,
                mixture=run.training.mixture(),
                examples_per_epoch=run.training.examples_per_epoch,
                seed=run.seed,
                length_buckets=run.training.length_buckets,
                max_signatures=run.training.max_signatures,
                lengths=lengths_of(text, run, tokenizer),
            )
            print_plan(sampler, config_of(run, tokenizer), run.training)
        else:
            print(f"{run.variant}, seed {run.seed}: {run.folder}", flush=True)
            train(run, text, tokenizer)


if __name__ == "__main__":
    main()
