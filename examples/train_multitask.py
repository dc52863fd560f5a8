"""Multitask training by a recipe: translation both ways and denoising, dense or sparse, one run or an experiment.

A recipe is a JSON file with the fields of the arguments below and of `MultitaskTrainingArguments`. With `variants`
(fields by name) and `seeds` it is an experiment. Its runs are done one after another; finished runs are skipped:

    python examples/train_multitask.py examples/recipes/experiments/token_dropping.json --train_file train.tsv.xz \
        --validation_file valid.tsv.xz --output_dir runs/token_dropping
    python examples/experiment_report.py runs/token_dropping

Fields on the command line override those of the recipe and its variants; `--variants`, `--seeds` select runs. A run
goes on from its last checkpoint, if it saves any. With `--max_seconds` the process ends in time: the run that is in
work evaluates and saves a checkpoint, from which the same command goes on. `--dry_run` trains no model and prints for
each variant the mixture, the tokens of each language, steps, shapes of batches and memory. Files hold lines of lang,
English and target, see `multitask_data.py`; `train_tokens` and `validation_tokens` are token ids in their place
(`prepare_tokens.py`), which are on the GPU before the first step.

Processes with the same command share the runs, one GPU each: a process takes the next run that no other has in work
and whose models are done. What fails in one process (`failure.txt` in the folder of the run) is left out by the
others. A run that was begun with other settings is refused. The runs of several recipes are one list, seed by seed:

    for gpu in 0 1; do
        CUDA_VISIBLE_DEVICES=$gpu python examples/train_multitask.py pruning.json upcycling.json &
    done
    wait

A recipe with `pilot`, a list of learning rates and other fields, tries them for each variant with the first seed, and
trains with the one whose held-out loss is lowest at the end of its pilot:

    "pilot": {"learning_rate": [0.001, 0.002, 0.004], "max_steps": 400}

Each run leaves `result.json` (losses over steps and seconds, numbers of the routers) and, with `max_test_samples`,
`translations.json` in `output_dir/<variant>/seed_<seed>`, pilots in `output_dir/<variant>/pilot_<learning rate>`.
"""

import gc
import hashlib
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import PartialState
from distillation import DistillationTrainer
from multitask_claims import claimed_runs, failure_noted, shared
from multitask_data import backwards, content_hash, first_pairs, monolingual, read_pairs
from multitask_plan import num_active_parameters, print_plan
from multitask_recipe import SETTINGS, DataArguments, Run, command_of
from multitask_runs import PlaceOfDropped, Seconds, TimeLimit, translate, write_json
from multitask_starts import load_weights, model_folder, scale_routers, start_seconds, write_start
from token_noise import TokenNoise
from token_pairs import BatchCollator, TokenArrays, TokenPairs
from token_trainer import TokenPairsTrainer
from transformers import TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from whole_checkpoints import last_checkpoint

from hf_moe_ted import (
    DataCollatorForMultitaskSeq2Seq,
    DenoisingNoise,
    LanguageRoutingCallback,
    MultitaskDataset,
    MultitaskSeq2SeqTrainer,
    RouterStatisticsCallback,
    TokenBudgetBatchSampler,
    ZCodeM3Config,
    ZCodeM3ForConditionalGeneration,
    ZCodeM3Tokenizer,
    token_lengths,
)


class Tokens:
    """The token ids of a run in the place of [`Text`], read once for all runs that take the same."""

    def __init__(self, run: Run):
        args, device = run.data, run.training.device
        arrays = TokenArrays.load(str(args.train_tokens))
        if unknown := {*(args.languages or ())} - {*arrays.tags}:
            raise ValueError(f"{args.train_tokens} has no pairs in {sorted(unknown)}; it has {list(arrays.tags)}")
        pairs = arrays.first_pairs(args.max_pairs, args.languages)
        check_low_resource(args, {*arrays.tags} - {"en"})
        check_tiers(run.tiers, {*arrays.tags} - {"en"})
        translated = arrays.with_few(pairs, args.low_resource_languages, args.low_resource_pairs)
        if args.english_once:
            into_english = arrays.one_of_each_english(translated)
        else:
            into_english = arrays.share_of_each_language(translated, args.into_english_share)
        num_english = len(translated) + len(into_english)
        num_pivoted = round(num_english * args.pivoted_share / (1 - args.pivoted_share))
        self.dataset = TokenPairs(
            arrays,
            device,
            translated,
            into_english=into_english,
            pivots=arrays.pivoted(translated, num_pivoted) if num_pivoted else None,
            denoised_pairs=pairs if args.denoising else None,
            noise=self._noise(run) if args.denoising else None,
        )
        of_validation = TokenArrays.load(str(args.validation_tokens))
        if differences := of_validation.differences(arrays):
            raise ValueError(
                f"{args.train_tokens} and {args.validation_tokens} differ in {differences}: make both in one call of "
                "prepare_tokens.py"
            )
        if differences := arrays.differences_to(ZCodeM3Tokenizer.from_pretrained(tokenizer_folder(run))):
            raise ValueError(
                f"{args.train_tokens} was made with another tokenizer than {tokenizer_folder(run)}: they differ in "
                f"{differences}"
            )
        if (longest := int(self.dataset.lengths.max())) > args.max_length:
            raise ValueError(
                f"{args.train_tokens} has texts of {longest} tokens, more than max_length ({args.max_length}): give a "
                "max_length that they have, or prepare_tokens.py --max_length"
            )
        self.validation: Any = TokenPairs(
            of_validation, device, of_validation.first_pairs(args.max_eval_samples, args.languages)
        )
        test_file = args.validation_file if args.test_file is None else args.test_file
        rows = [] if test_file is None else read_pairs(test_file, args.languages)
        if args.max_test_samples and not rows:
            raise ValueError(
                f"max_test_samples ({args.max_test_samples}) needs text: give test_file or validation_file"
            )
        self.test = first_pairs(rows[::-1], args.max_test_samples)

    def _noise(self, run: Run) -> TokenNoise:
        return TokenNoise(run.data.mask_ratio, run.data.poisson_lambda, tokenizer_of(run, self).mask_token_id)

    def numbers(self, steps_per_epoch: int) -> dict[str, Any]:
        """What the report needs besides losses: target tokens that are held out by direction, and tokens of a step."""
        tokens = np.bincount(self.validation.component_numbers, weights=self.validation.lengths[:, 1])
        return {
            "held_out_tokens": dict(zip(self.validation.directions, tokens.astype(int).tolist(), strict=True)),
            "steps_per_epoch": steps_per_epoch,
            "tokens_per_epoch": int(self.dataset.lengths.sum()),
        }


def check_low_resource(args: DataArguments, languages: set[str]) -> None:
    if unknown := {*args.low_resource_languages} - languages:
        raise ValueError(f"low_resource_languages {sorted(unknown)} have no pairs; there are {sorted(languages)}")


def check_tiers(tiers: dict[str, list[str]], languages: set[str]) -> None:
    if unknown := {language for of_tier in tiers.values() for language in of_tier} - languages:
        raise ValueError(f"tiers have languages {sorted(unknown)} without pairs; there are {sorted(languages)}")


class Text:
    """The text of a run, read once for all runs that take the same."""

    def __init__(self, args: DataArguments):
        self.all_pairs = read_pairs(str(args.train_file), args.languages)
        pairs = self.all_pairs if args.max_pairs is None else first_pairs(self.all_pairs, args.max_pairs)
        check_low_resource(args, {row["tgt_lang"] for row in pairs})
        self.pairs = first_pairs(pairs, args.low_resource_pairs, args.low_resource_languages)
        self.dataset = MultitaskDataset(
            translation=self.pairs,
            denoising=monolingual(pairs) if args.denoising else None,
            both_directions=True,
            languages=None if args.languages is None else ["en", *args.languages],
        )
        validation = read_pairs(str(args.validation_file), args.languages)
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


def tokenizer_of(run: Run, text: Text | Tokens) -> Any:
    """The tokenizer of a run; a new one is kept beside the runs, for the others.

    Raises:
        ValueError: token ids without the tokenizer that made them.
    """
    if isinstance(text, Tokens):
        return ZCodeM3Tokenizer.from_pretrained(tokenizer_folder(run))
    name = run.model.tokenizer_name_or_path or run.model.model_name_or_path
    if name is not None:
        return ZCodeM3Tokenizer.from_pretrained(name)
    key = f"{content_hash(str(run.data.train_file))} {run.data.languages} {run.model.tokenizer_texts}"
    kept = run.kept_folder / f"tokenizer_{run.model.vocab_size}_{short_hash(key)}"
    with shared(kept):
        if kept.is_dir():
            return ZCodeM3Tokenizer.from_pretrained(kept)
        texts = [row["text"] for row in monolingual(text.pairs)]
        step = max(1, len(texts) // run.model.tokenizer_texts)
        tokenizer = ZCodeM3Tokenizer(languages=text.languages)
        tokenizer = tokenizer.train_new_from_iterator(texts[::step], run.model.vocab_size)
        tokenizer.save_pretrained(kept)
    return tokenizer


def tokenizer_folder(run: Run) -> str:
    """The tokenizer of token ids."""
    if run.model.tokenizer_name_or_path is None:
        raise ValueError("train_tokens needs tokenizer_name_or_path, the tokenizer that prepare_tokens.py has written")
    return run.model.tokenizer_name_or_path


def config_of(run: Run, tokenizer: Any) -> ZCodeM3Config:
    """The architecture of a run.

    Raises:
        ValueError: the model that is named is not there.
    """
    if (name := run.model.model_name_or_path) is not None:
        try:
            return ZCodeM3Config.from_pretrained(name)
        except OSError as error:
            raise ValueError(
                f"model_name_or_path ({name}) of {run.variant} cannot be read; if another recipe trains it, run that "
                f"one first ({error})"
            ) from None
    return ZCodeM3Config(vocab_size=len(tokenizer), **json.loads(run.model.config))


def model_of(run: Run, tokenizer: Any) -> Any:
    """A new model, or the one that is named."""
    config = config_of(run, tokenizer)
    if run.model.model_name_or_path is not None:
        model = ZCodeM3ForConditionalGeneration.from_pretrained(run.model.model_name_or_path, config=config)
    else:
        model = ZCodeM3ForConditionalGeneration(config)
        scale_routers(model, run.model.router_init_scale)
    if run.model.experts_implementation is not None:
        model.set_experts_implementation(run.model.experts_implementation)
    return model


def collator_of(run: Run, tokenizer: Any, model: Any = None) -> DataCollatorForMultitaskSeq2Seq:
    """The data collator of a run."""
    args = run.data
    noise = DenoisingNoise(args.mask_ratio, args.poisson_lambda, args.sentence_distance, args.word_dropout)
    kind = DataCollatorForMultitaskSeq2Seq if args.train_tokens is None else BatchCollator
    multiple = 8 if run.training.length_buckets is None and args.train_tokens is None else None
    return kind(tokenizer, model, noise=noise, max_length=args.max_length, pad_to_multiple_of=multiple)


def trainer_of(run: Run, text: Text | Tokens, tokenizer: Any) -> MultitaskSeq2SeqTrainer:
    """A trainer with a new model, or the one that is named."""
    set_seed(run.seed)
    model = model_of(run, tokenizer)
    validation: Any = text.validation
    if isinstance(text, Text):
        validation = {
            name: MultitaskDataset(sorted(rows, key=lambda row: len(row["source"])), both_directions=True)
            for name, rows in text.validation.items()
        }
    kind, options = kind_of_trainer(run) if isinstance(text, Tokens) else (MultitaskSeq2SeqTrainer, {})
    trainer = kind(
        model=model,
        args=run.training,
        train_dataset=text.dataset,
        eval_dataset=validation,
        data_collator=collator_of(run, tokenizer, model),
        processing_class=tokenizer,
        token_lengths=lengths_of(text, run, tokenizer),
        callbacks=[Seconds()],
        **options,
    )
    is_sparse = bool(model.config.sparse_layers("encoder") or model.config.sparse_layers("decoder"))
    if is_sparse and isinstance(text, Text):
        for callback in (RouterStatisticsCallback(), LanguageRoutingCallback(tokenizer), PlaceOfDropped()):
            callback.add_to(trainer)
    return trainer


def kind_of_trainer(run: Run) -> tuple[type[TokenPairsTrainer], dict[str, Any]]:
    """The trainer of a run on token ids, and its arguments."""
    capacities = [None if text == "none" else float(text) for text in run.model.eval_capacities]
    options: dict[str, Any] = {"eval_capacities": capacities, "first_step": run.start.steps if run.start else 0}
    if run.teacher is None:
        return TokenPairsTrainer, options
    teacher = ZCodeM3ForConditionalGeneration.from_pretrained(model_folder(run.teacher, run.teacher.training.max_steps))
    return DistillationTrainer, options | {"teacher": teacher, "teacher_share": run.model.teacher_share}


def short_hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def lengths_of(text: Text | Tokens, run: Run, tokenizer: Any) -> np.ndarray:
    """Tokens of the training examples, which are counted once and kept beside the runs."""
    if isinstance(text, Tokens):
        return text.dataset.lengths
    about = (run.data, content_hash(str(run.data.train_file)), run.model.tokenizer_name_or_path)
    key = f"{about} {run.model.model_name_or_path} {run.model.vocab_size}"
    path = run.kept_folder / f"token_lengths_{short_hash(key)}.npy"
    with shared(path):
        if not path.is_file():
            lengths = token_lengths(text.dataset, collator_of(run, tokenizer))
            staged = path.with_suffix(".incomplete.npy")
            np.save(staged, lengths)
            os.replace(staged, path)
    return np.load(path)


def sampler_of(run: Run, text: Text | Tokens, tokenizer: Any) -> TokenBudgetBatchSampler:
    """The batches that a trainer draws."""
    return TokenBudgetBatchSampler(
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


def train(run: Run, text: Text | Tokens, deadline: float | None) -> None:
    """Train until the steps or the time are over, translate the test set, and write what came out."""
    settings = run.settings
    tokenizer = tokenizer_of(run, text)
    pilot_losses = {str(each.training.learning_rate): last_loss(each) for each in run.pilots}
    if run.pilots:
        run.training.learning_rate = min(run.pilots, key=last_loss).training.learning_rate
    print(f"{run.variant}, seed {run.seed}, learning rate {run.training.learning_rate}: {run.folder}", flush=True)
    with run.training.main_process_first(local=False):
        if run.training.process_index == 0:
            write_json(run.folder / SETTINGS, settings)
        checkpoint = last_checkpoint(run.folder)
        if run.start is not None and checkpoint is None:
            assert isinstance(text, Tokens)
            set_seed(run.seed)
            checkpoint = write_start(run, model_of(run, tokenizer), text.dataset, tokenizer)
    is_start = run.start is not None and str(checkpoint).endswith(f"{PREFIX_CHECKPOINT_DIR}-{run.start.steps}")
    run.training.eval_on_start = is_start
    trainer = trainer_of(run, text, tokenizer)
    if deadline is not None:
        trainer.add_callback(TimeLimit(deadline))
    if checkpoint is not None and is_at_end(checkpoint, run.training.max_steps):
        load_weights(trainer.model, checkpoint)  # a process was ended between its last step and its result
        trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    else:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    is_done = trainer.state.global_step >= trainer.state.max_steps
    seconds = time.perf_counter()
    rows = text.test + backwards(text.test) if is_done and not run.is_pilot else []
    translations = translate(trainer.model, tokenizer, rows, max_length=run.data.max_length) if rows else []
    if not trainer.is_world_process_zero():
        return
    if run.model.save_model and not run.is_pilot:
        trainer.save_model()
    if rows:
        written = [{**row, "translation": text} for row, text in zip(rows, translations, strict=True)]
        write_json(run.folder / "translations.json", written)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    result = {
        "variant": run.variant,
        "seed": run.seed,
        "is_done": is_done,
        "learning_rate": run.training.learning_rate,
        "pilot_losses": pilot_losses,
        "config": trainer.model.config.to_diff_dict(),
        "num_parameters": trainer.model.num_parameters(),
        "num_active_parameters": num_active_parameters(trainer.model),
        "max_tokens_per_batch": run.training.max_tokens_per_batch,
        "low_resource_languages": run.data.low_resource_languages,
        "tiers": run.tiers,
        "start": start_of(run),
        "teacher": None if run.teacher is None else run.teacher.variant,
        "device": device,
        "torch": torch.__version__,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "translating_s": time.perf_counter() - seconds,
        **(text.numbers(len(trainer.get_train_dataloader())) if isinstance(text, Tokens) else {}),
        "log_history": trainer.state.log_history,
    }
    write_json(run.folder / "result.json", result)


def is_at_end(checkpoint: Path, max_steps: int) -> bool:
    """Whether no step is left; a Trainer that goes on from such a checkpoint would make one more."""
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    return state.global_step >= (max_steps if max_steps > 0 else state.max_steps)


def start_of(run: Run) -> dict[str, Any] | None:
    """What a run has begun with, for the report."""
    if run.start is None:
        return None
    start = run.start
    about = {"method": start.method, "variants": [source.variant for source in start.sources]}
    return about | {"steps": start.steps, "seconds": start_seconds(run)}


def last_loss(run: Run) -> float:
    """Held-out loss at the end of a pilot; infinite for one that diverged."""
    losses = [entry["eval_loss"] for entry in (run.result() or {})["log_history"] if "eval_loss" in entry]
    return losses[-1] if math.isfinite(losses[-1]) else math.inf


def main() -> None:
    since = psutil.Process().create_time()
    start = time.perf_counter() - (time.time() - since)
    # its backward can give NaN on Hopper since torch 2.11: docs/upstream/torch_cudnn_attention_gradient.md
    torch.backends.cuda.enable_cudnn_sdp(False)
    command = command_of(sys.argv[1:], __doc__)
    if any(run.training.torch_compile for run in command.runs):
        # graphs of one function; all kinds of layers have the same one, see docs/training.md#compiled-layers
        torch._dynamo.config.recompile_limit = 64
    deadline = None if command.max_seconds is None else start + command.max_seconds
    texts: dict[str, Text | Tokens] = {}

    def text_of(run: Run) -> Text | Tokens:
        key = str(run.data)
        if key not in texts:
            texts[key] = Text(run.data) if run.data.train_tokens is None else Tokens(run)
        return texts[key]

    if command.is_dry:
        for run in (each for each in command.runs if each.seed == command.runs[0].seed):
            print(f"\n{run.variant}, seed {run.seed}")
            tokenizer = tokenizer_of(run, text_of(run))
            print_plan(sampler_of(run, text_of(run), tokenizer), config_of(run, tokenizer), run.training)
        return
    for run in claimed_runs(command.runs, deadline, since=since):
        with failure_noted(run):
            train(run, text_of(run), deadline)
        PartialState().wait_for_everyone()  # its result is written by one rank
        gc.collect()  # a trainer and its model hold each other
    if deadline is not None and time.perf_counter() >= deadline:
        print(f"{command.max_seconds} s are over; the same command goes on from here")


if __name__ == "__main__":
    main()
