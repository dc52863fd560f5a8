"""Recipes of `train_multitask.py`: their fields, and the runs that follow from a recipe and a command line."""

import argparse
import json
import math
import os
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, replace
from dataclasses import fields as dataclass_fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from multitask_data import content_hash
from transformers import HfArgumentParser, Seq2SeqTrainingArguments

from hf_moe_ted import MultitaskTrainingArguments, ZCodeM3Config

SETTINGS = "settings.json"
# of prune_experts
CRITERIA = ("random", "utilization", "activity_confidence", "reap")
SCOPES = ("global", "language_pair", "language")
START_METHODS = ("prune", "upcycle", "aggregate", "shared_weights")
_OF_TRAINING = (
    "max_steps", "num_train_epochs", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps",
    "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "gradient_accumulation_steps", "optim",
    "label_smoothing_factor", "seed", "data_seed", "torch_compile",
)  # fmt: skip
_OF_MEASUREMENT = ("max_eval_samples", "max_test_samples", "eval_capacities", "save_model", "cuda_graphs", "pilot")


@dataclass
class ModelArguments:
    """Which model to train."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Train this model; default: a new one."})
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer; default: a new one, trained on the text."}
    )
    vocab_size: int = field(default=32000, metadata={"help": "Vocabulary of a new tokenizer, language tags included."})
    tokenizer_texts: int = field(
        default=500_000, metadata={"help": "Number of texts on which a new tokenizer is trained."}
    )
    config: str = field(default="{}", metadata={"help": "ZCodeM3Config fields of a new model, as JSON."})
    experts_implementation: str | None = field(
        default=None, metadata={"help": "How experts are computed, such as zcode_grouped."}
    )
    router_init_scale: float = field(
        default=1.0, metadata={"help": "Factor of the initial router weights of a new model; Switch: 0.1."}
    )
    save_model: bool = field(default=False, metadata={"help": "Write the trained model to the folder of the run."})
    start_from: str = field(
        default="{}",
        metadata={"help": "Variants whose models this one is made of, as JSON: method, variants and more, see Start."},
    )
    teacher: str | None = field(
        default=None, metadata={"help": "Variant whose probabilities are a part of the target, see distillation.py."}
    )
    teacher_share: float = field(default=0.25, metadata={"help": "That part; Switch: 0.25."})
    share_of_steps: float = field(default=1.0, metadata={"help": "Part of max_steps that this variant is trained."})
    eval_capacities: list[str] = field(
        default_factory=list,
        metadata={"help": "Held-out losses with these in place of eval_capacity_factor, too; none for no capacity."},
    )


@dataclass
class DataArguments:
    """Which text to train on."""

    train_file: str | None = field(default=None, metadata={"help": "Training pairs, see multitask_data.py."})
    validation_file: str | None = field(default=None, metadata={"help": "Pairs for eval_loss, and to translate."})
    train_tokens: str | None = field(default=None, metadata={"help": "train_file as written by prepare_tokens.py."})
    validation_tokens: str | None = field(
        default=None, metadata={"help": "Pairs for eval_loss as written by prepare_tokens.py; with train_tokens."}
    )
    test_file: str | None = field(default=None, metadata={"help": "Pairs to translate; default: validation_file."})
    languages: list[str] | None = field(default=None, metadata={"help": "Languages besides English; default: all."})
    max_pairs: int | None = field(default=None, metadata={"help": "Training pairs per language; default: all."})
    low_resource_languages: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Languages with only low_resource_pairs. Text has a loss for them and one for the others, token "
            "ids one for each direction."
        },
    )
    low_resource_pairs: int = field(default=1000, metadata={"help": "Training pairs of a low-resource language."})
    into_english_share: float = field(
        default=1.0,
        metadata={
            "help": "Share of the pairs of each language that are translated into English, too, drawn once for all "
            "seeds; at least one, unless it is 0. Needs train_tokens, and sampling_temperature 1."
        },
    )
    english_once: bool = field(
        default=False,
        metadata={
            "help": "Translate one pair of each English text into English, too, drawn once for all seeds, so that each "
            "is a target once an epoch. Needs train_tokens, and sampling_temperature 1."
        },
    )
    pivoted_share: float = field(
        default=0.0,
        metadata={
            "help": "Share of the translations that are between two languages besides English, whose text in English "
            "is the same; a third at most, drawn once for all seeds. Needs train_tokens, and sampling_temperature 1."
        },
    )
    denoising: bool = field(
        default=False, metadata={"help": "Denoise all training texts, also texts that are left out as pairs."}
    )
    mask_ratio: float = field(
        default=0.35, metadata={"help": "Share of the words, or token ids, that denoising masks."}
    )
    poisson_lambda: float = field(
        default=3.5, metadata={"help": "Mean length of a masked span, in words or token ids."}
    )
    sentence_distance: int = field(default=0, metadata={"help": "Places that denoising may move a sentence."})
    word_dropout: float = field(default=0.0, metadata={"help": "Probability that denoising leaves a word out."})
    max_length: int = field(default=128, metadata={"help": "Longest text in tokens; longer texts are truncated."})
    max_eval_samples: int = field(default=20, metadata={"help": "Validation pairs per direction."})
    max_test_samples: int = field(default=0, metadata={"help": "Pairs per direction that are translated at the end."})

    def __post_init__(self) -> None:
        for name in ("train", "validation"):
            given = [getattr(self, f"{name}_{kind}") for kind in ("file", "tokens")]
            if self.train_tokens is None and given != [given[0], None]:
                raise ValueError(f"{name}_tokens ({given[1]!r}) needs train_tokens, which is not given")
            if given[self.train_tokens is not None] is None:
                raise ValueError(f"give {name}_file, or train_tokens and validation_tokens (prepare_tokens.py)")
        if not 0 <= self.pivoted_share <= 1 / 3:
            raise ValueError(f"pivoted_share ({self.pivoted_share}) must be between 0 and 1/3")
        if not 0 <= self.into_english_share <= 1:
            raise ValueError(f"into_english_share ({self.into_english_share}) must be between 0 and 1")
        if self.english_once and self.into_english_share != 1:
            raise ValueError(
                f"give one of english_once ({self.english_once}) and into_english_share ({self.into_english_share})"
            )
        if self.changed_shares and self.train_tokens is None:
            raise ValueError(f"{self.changed_shares} needs token ids: give train_tokens")
        if self.train_tokens is not None and self.train_file is not None:
            raise ValueError(f"train_tokens ({self.train_tokens}) stands for train_file ({self.train_file}): give one")
        if self.train_tokens is not None and (self.sentence_distance or self.word_dropout):
            raise ValueError("sentence_distance and word_dropout need text: give train_file, not train_tokens")

    @property
    def changed_shares(self) -> str:
        """What changes how often directions are drawn, with its values; empty for nothing."""
        shares = {name: getattr(self, name) for name in ("pivoted_share", "into_english_share", "english_once")}
        return ", ".join(f"{name} ({value})" for name, value in shares.items() if value != getattr(DataArguments, name))


@dataclass(frozen=True)
class Start:
    """Other runs, of whose models that of a run is made before its training.

    Its steps and seconds count on from theirs, and its learning rate and its batches are those of these steps, but for
    `shared_weights`, which is another way to initialize a model.

    Attributes:
        method: one of `START_METHODS`; multitask_starts.py does it.
        sources: the runs, of the same seed.
        at: part of their steps, behind which the models are taken, from checkpoints (`save_steps` of the source);
            1 for models that are trained to their end (`save_model`).
        criterion: of pruning, and its `scope`: see `prune_experts`.
    """

    method: str
    sources: "tuple[Run, ...]"
    at: float = 1.0
    criterion: str = "utilization"
    scope: str = "global"

    def __post_init__(self) -> None:
        for name, values in (("method", START_METHODS), ("criterion", CRITERIA), ("scope", SCOPES)):
            if getattr(self, name) not in values:
                raise ValueError(f"{name} {getattr(self, name)!r} of start_from must be one of {values}")
        if not 0 < self.at <= 1:
            raise ValueError(
                f"at ({self.at}) of start_from must be over 0 and at most 1, a part of the steps of its runs"
            )

    @property
    def steps_of_sources(self) -> list[int]:
        return [math.ceil(source.training.max_steps * self.at) for source in self.sources]

    @property
    def steps(self) -> int:
        """At which the training begins."""
        return 0 if self.method == "shared_weights" else sum(self.steps_of_sources)


@dataclass(frozen=True)
class Run:
    """One training of an experiment.

    Attributes:
        pilots: short ones that choose its learning rate.
        tiers: languages besides English by the name of their group, for the report.
        start: where its model comes from; `None` for a new one, or the one that is named.
        teacher: a run with the same seed, whose model teaches.
        is_pilot: only its losses are wanted: it translates nothing and keeps no model.
    """

    variant: str
    seed: int
    model: ModelArguments
    data: DataArguments
    training: MultitaskTrainingArguments
    pilots: "tuple[Run, ...]" = ()
    tiers: dict[str, list[str]] = field(default_factory=dict)
    start: Start | None = None
    teacher: "Run | None" = None
    is_pilot: bool = False

    @property
    def folder(self) -> Path:
        return Path(self.training.output_dir or "runs/multitask")

    @property
    def kept_folder(self) -> Path:
        """Where all runs of the experiment find what they share."""
        return self.folder.parents[1]

    @property
    def needs(self) -> "list[Run]":
        """Runs that must be done before it begins."""
        return [*self.pilots, *(self.start.sources if self.start else ()), *filter(None, [self.teacher])]

    def with_needs(self) -> "Iterator[Run]":
        """The run, what it needs, what that needs, ..."""
        yield self
        for each in self.needs:
            yield from each.with_needs()

    def check_settings(self) -> None:
        """Raise if the run was begun with other settings, which would be mixed with these.

        Raises:
            ValueError: a field that changes the trained model has another value than when the run was begun.
        """
        path = self.folder / SETTINGS
        if not path.is_file():
            return
        begun = {**_defaults(), **json.loads(path.read_text(encoding="utf-8"))}  # of an older version, without fields
        other = [
            f"{name} {begun[name]!r}, not {value!r}"
            for name, value in self.settings.items()
            if begun.get(name, value) != value
        ]
        if other:
            raise ValueError(
                f"{self.folder} was begun with {', '.join(other)}; give the same again, or another output_dir"
            )

    @property
    def settings(self) -> dict[str, Any]:
        """Fields that change the trained model, as they are in JSON.

        Hashes stand for the files of training text. Where models and tokenizers are does not count, and the learning
        rate of a run with pilots is what they try.
        """
        of_trainer = {each.name for each in dataclass_fields(Seq2SeqTrainingArguments)}
        named = {
            name: value
            for name, value in self.fields.items()
            if (name in _OF_TRAINING or name not in of_trainer)
            and name not in _OF_MEASUREMENT
            and not name.endswith(("_file", "_tokens", "_or_path"))
        }
        text = self.data.train_file if self.data.train_tokens is None else self.data.train_tokens
        named["training_text"] = content_hash(str(text))
        if self.pilots:
            named["learning_rate"] = [[each.training.learning_rate, each.training.max_steps] for each in self.pilots]
        return json.loads(json.dumps(named))

    @property
    def fields(self) -> dict[str, Any]:
        """All that a recipe and a command line can say."""
        pilots = [str(each.folder) for each in self.pilots]
        return {**vars(self.model), **vars(self.data), **self.training.to_dict(), "pilot": pilots}

    def result(self) -> dict[str, Any] | None:
        """What a run has left that is done."""
        path = self.folder / "result.json"
        try:
            result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no JSON ({error}): remove it, and the run is trained again") from None
        return result if result.get("is_done", bool(result)) else None


def _defaults() -> dict[str, Any]:
    """The defaults of our own fields, as they are in JSON."""
    kinds = (ModelArguments, DataArguments, MultitaskTrainingArguments)
    of_trainer = {each.name for each in dataclass_fields(Seq2SeqTrainingArguments)}
    own = [each for kind in kinds for each in dataclass_fields(kind) if each.name not in of_trainer]
    values = {each.name: each.default if each.default_factory is MISSING else each.default_factory() for each in own}
    return dict(json.loads(json.dumps(values)))


@dataclass(frozen=True)
class Command:
    """What a command line asks for.

    Attributes:
        max_seconds: of the process; `None` for as long as it takes.
    """

    runs: list[Run]
    is_dry: bool
    max_seconds: float | None


def command_of(argv: list[str], about: str | None = None) -> Command:
    """What a command line asks for; `about` is its help.

    Raises:
        ValueError: an unknown variant, a field of the recipe that is no argument, or `start_from` or `teacher` that
            cannot be.
    """
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("recipes", metavar="recipe", nargs="+", type=Path)
    parser.add_argument("--variants", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--dry_run", "--dry-run", action="store_true")
    parser.add_argument("--max_seconds", type=float, help="of the process, its start included")
    selected, overrides = parser.parse_known_args(argv)
    experiments = [_Experiment(path, overrides) for path in selected.recipes]
    if unknown := {*(selected.variants or ())} - {name for each in experiments for name in each.variants}:
        known = {str(each.path): list(each.variants) for each in experiments}
        raise ValueError(f"no recipe has variants {sorted(unknown)}; they have {known}")
    seeds = dict.fromkeys(selected.seeds or [seed for each in experiments for seed in each.seeds])
    runs = [
        each.run(variant, seed)
        for seed in seeds
        for each in experiments
        if selected.seeds or seed in each.seeds
        for variant in selected.variants or each.variants
        if variant in each.variants
    ]
    of_folder: dict[Path, Run] = {}
    for run in runs:
        for each in run.with_needs():
            if (other := of_folder.setdefault(each.folder, each)).fields != each.fields:
                names = sorted(name for name, value in each.fields.items() if value != other.fields[name])
                raise ValueError(
                    f"two recipes have a run in {each.folder}, with different {names}: give one its own output_dir"
                )
    return Command(runs, selected.dry_run, selected.max_seconds)


class _Experiment:
    """The runs of a recipe, whose fields are overridden by those of a command line."""

    def __init__(self, path: Path, overrides: list[str]):
        self.path, self.overrides = path, overrides
        self.fields = read_recipe(path)
        self.variants: dict[str, Any] = self.fields.pop("variants", {"run": {}})
        self.tiers = self.fields.pop("tiers", {})
        self.seeds: list[int] = self.fields.pop("seeds", [self.fields.get("seed", 0)])
        self.pilot = self.fields.pop("pilot", None)
        if not isinstance(self.seeds, list) or not self.seeds or not all(isinstance(seed, int) for seed in self.seeds):
            raise ValueError(f"seeds of {path} ({self.seeds}) must be a list of whole numbers, such as [0, 1]")
        if not self.variants or not all(
            isinstance(of_one, dict) and "/" not in n for n, of_one in self.variants.items()
        ):
            raise ValueError(
                f"variants of {path} ({self.variants}) must be fields by name, such as "
                '{"dense": {"config": {"encoder_sparse_step": 0}}}; a name is that of a folder, without /'
            )
        if self.pilot and not _is_pilot(self.pilot):
            raise ValueError(
                f"pilot of {path} ({self.pilot}) must have a list of numbers as learning_rate, and other fields of a "
                'run, such as {"learning_rate": [0.001, 0.002], "max_steps": 400}'
            )
        if any(argument.split("=")[0] == "--learning_rate" for argument in overrides):
            self.pilot = None

    def run(self, variant: str, seed: int, needed_by: tuple[str, ...] = ()) -> Run:
        """A run, and those that it needs."""
        chain = (*needed_by, variant)
        if variant in needed_by:
            raise ValueError(f"start_from and teacher of {self.path} go round in a circle: {' needs '.join(chain)}")
        run = _run(self.fields, self.overrides, variant, self.variants[variant], seed)
        fields = json.loads(run.model.start_from)
        of_start = fields.pop("variants", [])
        names = [*of_start, *filter(None, [run.model.teacher])]
        if unknown := {*names} - {*self.variants}:
            raise ValueError(f"{variant} of {self.path} needs {sorted(unknown)}; there are {list(self.variants)}")
        if names and self.pilot:
            raise ValueError(f"pilot does not go with {variant}, which needs {names}; give learning_rate")
        if names and run.training.max_steps < 1:
            raise ValueError(f"{variant} needs max_steps ({run.training.max_steps}), of which it takes a part")
        start = _start(variant, fields, [self.run(name, seed, chain) for name in of_start])
        if start is not None and start.steps >= run.training.max_steps:
            raise ValueError(
                f"{variant} begins at step {start.steps}, behind those of {of_start}, so its max_steps "
                f"({run.training.max_steps}) must be more"
            )
        return replace(
            run,
            pilots=tuple(self._pilots(variant)) if self.pilot else (),
            tiers=self.tiers,
            teacher=self.run(run.model.teacher, seed, chain) if run.model.teacher else None,
            start=start,
        )

    def _pilots(self, variant: str) -> Iterator[Run]:
        """A short run with the first seed for each learning rate."""
        fixed = [
            text for name, value in self.pilot.items() if name != "learning_rate" for text in (f"--{name}", str(value))
        ]
        for rate in self.pilot["learning_rate"]:
            overrides = [*self.overrides, *fixed, "--learning_rate", str(rate)]
            run = _run(self.fields, overrides, variant, self.variants[variant], self.seeds[0])
            if run.training.eval_strategy == "no":
                raise ValueError(f"pilot of {self.path} chooses by held-out losses: give eval_strategy and eval_steps")
            if run.data.train_tokens is None and run.data.low_resource_languages:
                raise ValueError(
                    f"pilot of {self.path} chooses by one held-out loss, and text with low_resource_languages "
                    f"({run.data.low_resource_languages}) has two: give learning_rate, not pilot, or train_tokens"
                )
            if run.training.eval_strategy == "steps" and run.training.max_steps > 0 and "eval_steps" not in self.pilot:
                run.training.eval_steps = run.training.max_steps  # by which it chooses
            run.training.output_dir = str(run.folder.with_name(f"pilot_{rate}"))
            yield replace(run, is_pilot=True, tiers=self.tiers)


def _is_pilot(pilot: Any) -> bool:
    rates = pilot.get("learning_rate") if isinstance(pilot, dict) else None
    return isinstance(rates, list) and bool(rates) and all(isinstance(rate, (int, float)) for rate in rates)


def _start(variant: str, fields: dict[str, Any], sources: list[Run]) -> Start | None:
    if not fields and not sources:
        return None
    if not sources:
        raise ValueError(f"start_from of {variant} ({fields}) must name variants")
    try:
        return Start(sources=tuple(sources), **fields)
    except TypeError as error:  # a field that is missing or unknown
        raise ValueError(f"start_from of {variant} ({fields}): {error}") from None


def read_recipe(path: Path) -> dict[str, Any]:
    """The fields of a recipe.

    A recipe may name another one beside it as its `base`, whose fields hold where it has none; those of `config` one by
    one. A variant that is written as `"base"` is the one with this name there.

    Raises:
        ValueError: there is no such file, it is not JSON, or the base has no variant with this name.
    """
    if not path.is_file():
        raise ValueError(f"recipe ({path}) does not exist")
    try:
        own: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"recipe ({path}) is not JSON: {error}") from None
    base = own.pop("base", None)
    if base is None:
        return own
    of_base = read_recipe(path.parent / base)
    config = {**of_base.get("config", {}), **own.get("config", {})}
    recipe = {**of_base, **own, "config": config}
    if "variants" in own:
        of_name = of_base.get("variants", {})
        recipe["variants"] = {n: of_name.get(n) if v == "base" else v for n, v in own["variants"].items()}
        if missing := [name for name, of_variant in recipe["variants"].items() if of_variant is None]:
            raise ValueError(f"{path} takes variants {missing} of {base}, which has {[*of_name]}")
    return recipe


@cache
def _parser() -> HfArgumentParser:
    return HfArgumentParser([ModelArguments, DataArguments, MultitaskTrainingArguments], allow_abbrev=False)


def _run(recipe: dict[str, Any], overrides: list[str], variant: str, of_variant: dict[str, Any], seed: int) -> Run:
    fields = {**recipe, **of_variant, "seed": seed}
    fields["config"] = {**recipe.get("config", {}), **of_variant.get("config", {})}
    if not torch.cuda.is_available():
        fields |= {name: False for name in ("bf16", "cuda_graphs") if name in fields}  # for CPUs: slower, and refused
    argv = []
    for name, value in fields.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        argv += [f"--{name}", *map(str, values)]
    model, data, training = _parser().parse_args_into_dataclasses([*argv, *overrides])
    if unknown := {*json.loads(model.config)} - {each.name for each in dataclass_fields(ZCodeM3Config)}:
        raise ValueError(f"config of {variant} has fields {sorted(unknown)}, which ZCodeM3Config has not")
    temperature = training.sampling_temperature
    if data.changed_shares and temperature != 1:  # which draws directions more alike
        raise ValueError(f"{data.changed_shares} needs a sampling_temperature of 1, not {temperature}")
    training.dataloader_pin_memory &= torch.cuda.is_available()  # without a GPU it does nothing but warn
    if data.train_tokens is not None:  # batches are made on the device
        training.dataloader_pin_memory, training.dataloader_num_workers = False, 0
    elif model.start_from != "{}" or model.teacher or model.eval_capacities:
        raise ValueError(f"start_from, teacher and eval_capacities of {variant} need token ids: give train_tokens")
    if training.max_steps == 0 or model.share_of_steps <= 0:
        raise ValueError(
            f"max_steps ({training.max_steps}) and share_of_steps ({model.share_of_steps}) of {variant} must be more "
            "than 0; max_steps is -1 for num_train_epochs"
        )
    training.max_steps = math.ceil(training.max_steps * model.share_of_steps)
    training.output_dir = os.path.join(training.output_dir or "runs/multitask", variant, f"seed_{seed}")
    return Run(variant, seed, model, data, training)
