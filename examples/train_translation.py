"""Train or fine-tune a ZCodeM3 translation model with the plain `Seq2SeqTrainer`, English to X and X to English.

A run is a recipe, a JSON file with the fields of the arguments below and of `Seq2SeqTrainingArguments`; fields on the
command line override it:

    python examples/train_translation.py examples/recipes/zcode_m3_demo.json --output_dir runs/demo

It resumes from the last checkpoint in `output_dir` if there is one. At the end it writes the model, its tokenizer,
`training_curve.json` and `test_scores.json` (BLEU, chrF and length ratio per direction) to `output_dir`.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)
from translation_data import DATA_DIR, Direction, load_directions, mix, tokenize
from translation_evaluation import Score, TranslationEvaluator, as_json, average
from whole_checkpoints import last_checkpoint

from hf_moe_ted import ZCodeM3Config, ZCodeM3ForConditionalGeneration, ZCodeM3Tokenizer


@dataclass
class ModelArguments:
    """Which model to train."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Fine-tune this model; default: a new one."})
    vocab_size: int = field(default=12000, metadata={"help": "Vocabulary of a new tokenizer, language tags included."})
    config: str = field(default="{}", metadata={"help": "ZCodeM3Config fields of a new model, as JSON."})
    experts_implementation: str | None = field(
        default=None, metadata={"help": "How experts run: grouped_mm (default), batched_mm or eager."}
    )


@dataclass
class DataArguments:
    """Which text to train on."""

    data_dir: str = field(default=str(DATA_DIR), metadata={"help": "Folder with *.{split}.tsv.xz files."})
    languages: list[str] | None = field(default=None, metadata={"help": "Languages besides English; default: all."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature over directions; 1: by size."})
    max_length: int = field(default=128, metadata={"help": "Longer texts are truncated, in tokens."})
    max_eval_samples: int = field(default=100, metadata={"help": "Validation pairs per direction for eval_loss."})
    max_test_samples: int | None = field(default=None, metadata={"help": "Test pairs per direction; default: all."})


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, Seq2SeqTrainingArguments]:
    """Arguments of the recipe `argv[0]`, if that is a JSON file, overridden by the rest of the command line."""
    parser = HfArgumentParser([ModelArguments, DataArguments, Seq2SeqTrainingArguments])
    if argv and argv[0].endswith(".json"):
        recipe = json.loads(Path(argv[0]).read_text())
        if recipe.get("bf16") and not torch.cuda.is_available():
            recipe["bf16"] = False  # bfloat16 is slower than float32 on most CPUs
        recipe_argv = []
        for name, value in recipe.items():
            values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
            recipe_argv += [f"--{name}", *map(str, values)]
        argv = recipe_argv + argv[1:]
    return parser.parse_args_into_dataclasses(argv)


def new_model(args: ModelArguments, train: dict[Direction, Dataset]) -> tuple[Any, Any]:
    """A tokenizer trained on the training text, and a model with random weights."""
    texts = [train[direction]["target"] for direction in train if direction.src_lang == "en"]
    english = sorted({text for direction in train if direction.src_lang == "en" for text in train[direction]["source"]})
    languages = ["en", *(direction.tgt_lang for direction in train if direction.src_lang == "en")]
    tokenizer = ZCodeM3Tokenizer(languages=languages).train_new_from_iterator([*texts, english], args.vocab_size)
    config = ZCodeM3Config(vocab_size=len(tokenizer), **json.loads(args.config))
    tokenizer.model_max_length = config.max_position_embeddings
    return ZCodeM3ForConditionalGeneration(config), tokenizer


def print_scores(scores: dict[Direction, Score], title: str) -> None:
    """Print a table, one row per direction."""
    table = Table("direction", "sentences", "BLEU", "chrF", "length ratio", "chrF of the source copied", title=title)
    for name, score in [*((str(d), s) for d, s in scores.items()), ("mean", average(scores))]:
        table.add_row(
            name,
            str(score.num_sentences),
            "-" if score.bleu is None else f"{score.bleu:.1f}",
            f"{score.chrf:.1f}",
            f"{score.length_ratio:.2f}",
            f"{score.copy_chrf:.1f}",
        )
    Console(width=100).print(table)


def main() -> None:
    # its backward can give NaN on Hopper since torch 2.11: docs/upstream/torch_cudnn_attention_gradient.md
    torch.backends.cuda.enable_cudnn_sdp(False)
    model_args, data_args, training_args = parse_arguments(sys.argv[1:])
    training_args.dataloader_pin_memory &= torch.cuda.is_available()  # without a GPU it does nothing but warn
    output_dir = Path(training_args.output_dir)
    set_seed(training_args.seed)

    directions = {
        split: load_directions(split, data_args.languages, data_dir=Path(data_args.data_dir))
        for split in ("train", "validation", "test")
    }
    checkpoint = last_checkpoint(output_dir) if output_dir.is_dir() else None
    if start_from := checkpoint or model_args.model_name_or_path:
        model = AutoModelForSeq2SeqLM.from_pretrained(start_from)
        tokenizer = AutoTokenizer.from_pretrained(start_from)
    else:
        model, tokenizer = new_model(model_args, directions["train"])
    if model_args.experts_implementation:
        model.set_experts_implementation(model_args.experts_implementation)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens, languages {tokenizer.languages}")

    train = [tokenize(data, tokenizer, d, data_args.max_length) for d, data in directions["train"].items()]
    validation = [
        tokenize(data.select(range(min(len(data), data_args.max_eval_samples))), tokenizer, d, data_args.max_length)
        for d, data in directions["validation"].items()
    ]
    trainer = Seq2SeqTrainer(
        model=model,
        args=training_args,
        train_dataset=mix(train, data_args.temperature, training_args.seed),
        eval_dataset=concatenate_datasets(validation),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model, pad_to_multiple_of=8),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_model()
    (output_dir / "training_curve.json").write_text(json.dumps(trainer.state.log_history, indent=1) + "\n")

    scores = TranslationEvaluator().evaluate(
        trainer.model, tokenizer, directions["test"], max_samples=data_args.max_test_samples, batch_size=256
    )
    (output_dir / "test_scores.json").write_text(json.dumps(as_json(scores), indent=1) + "\n")
    print_scores(scores, title="Test set")


if __name__ == "__main__":
    main()
