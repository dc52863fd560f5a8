"""The main job of the library on real text, on a laptop without a GPU, in a few minutes.

Loads the shipped model; translates sentences; evaluates the test split; fine-tunes on a language the model has never
seen; drops the least-used half of the experts; checks and evaluates the smaller model. Scores are printed as they are
measured. Results go to `demo_out/`. `report.json` is written after each part, so a stopped demo leaves its results. The
report of the smaller model, with pictures, is in its folder: `demo_out/pruned_model/report.md`.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import concatenate_datasets
from rich.console import Console
from rich.table import Table
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments, set_seed
from translation_data import first_rows, load_directions, tokenize

from hf_moe_ted import (
    TranslationQuality,
    ZCodeM3ForConditionalGeneration,
    ZCodeM3Tokenizer,
    ZCodeM3TranslationPipeline,
    collect_expert_statistics,
    evaluate_translation,
    prune_experts,
    write_compression_report,
    write_translation_card,
)

CHECKPOINT = Path(__file__).parent / "checkpoints" / "zcode_m3_demo"
NEW_LANGUAGE = "uk"  # Ukrainian is in the data, but not in the pretraining
SENTENCES = (
    "Close all tabs",
    "You can change this in settings",
    "The file could not be saved because the disk is full",
)
console = Console(width=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--output_dir", type=Path, default=Path("demo_out"))
    parser.add_argument("--max_test_samples", type=int, default=60, help="test sentences per direction")
    parser.add_argument("--fine_tune_steps", type=int, default=180)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    start = time.perf_counter()
    set_seed(arguments.seed)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    model = ZCodeM3ForConditionalGeneration.from_pretrained(arguments.checkpoint)
    tokenizer = ZCodeM3Tokenizer.from_pretrained(arguments.checkpoint)
    known_languages = [language for language in tokenizer.languages if language != "en"]
    report: dict[str, Any] = {"languages": tokenizer.languages}

    console.rule("1. Translate")
    report["translations"] = show_translations(model, tokenizer)
    keep_so_far(report, arguments.output_dir)

    console.rule("2. Evaluate on the test split")
    test = first_rows(load_directions("test", known_languages), arguments.max_test_samples)
    full = evaluate(model, tokenizer, test, description="All experts")
    report["full_model"] = summary(model, full) | {"size_mb": size_mb(arguments.checkpoint)}
    keep_so_far(report, arguments.output_dir)

    console.rule(f"3. Fine-tune on a new language, {NEW_LANGUAGE}")
    report |= fine_tune(arguments)
    keep_so_far(report, arguments.output_dir)

    console.rule("4. Drop the least-used half of the experts")
    folder = arguments.output_dir / "pruned_model"
    validation = first_rows(load_directions("validation", known_languages), arguments.max_test_samples)
    statistics = collect_expert_statistics(model, tokenizer, validation)
    report["kept_experts"] = prune_experts(
        arguments.checkpoint, statistics, keep=0.5, output_dir=folder, overwrite=True
    ).kept_experts
    pruned = ZCodeM3ForConditionalGeneration.from_pretrained(folder)
    check_same_output(pruned, prune_experts(model, statistics, keep=0.5).model, tokenizer)
    small = evaluate(pruned, tokenizer, test, description="Half of the experts")
    report["pruned_model"] = summary(pruned, small) | {"size_mb": size_mb(folder)}
    write_compression_report(folder, before=full, after=small)

    report["seconds"] = round(time.perf_counter() - start, 1)
    keep_so_far(report, arguments.output_dir)
    print_report(report, arguments.output_dir)


def evaluate(model: Any, tokenizer: Any, test: Any, description: str) -> TranslationQuality:
    """Translate the test sentences, and print the scores at once."""
    quality = evaluate_translation(model, tokenizer, test, batch_size=50, description=description)
    console.print(f"{description}: {quality}")
    return quality


def keep_so_far(report: dict[str, Any], output_dir: Path) -> None:
    """Write the report so far as a complete file, so a stopped demo leaves its results."""
    temporary = output_dir / ".report.json.incomplete"
    temporary.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(output_dir / "report.json")


def summary(model: Any, quality: TranslationQuality) -> dict[str, Any]:
    """For the report."""
    return {
        "parameters": model.num_parameters(),
        "sentences_per_second": round(quality.sentences_per_s, 1),
        "means": {name: asdict(quality.mean(pairs)) for name, pairs in quality.groups().items()},
        "quality": quality.to_dict(),
    }


def show_translations(model: Any, tokenizer: Any) -> dict[str, dict[str, str]]:
    """Translate `SENTENCES` into several languages with the pipeline and print them."""
    translator = ZCodeM3TranslationPipeline(model=model, tokenizer=tokenizer, src_lang="en")
    table = Table("", *SENTENCES)
    translations: dict[str, dict[str, str]] = {}
    for language in [language for language in tokenizer.languages if language != "en"]:
        results = translator(list(SENTENCES), tgt_lang=language, batch_size=len(SENTENCES), num_beams=4)
        translations[language] = dict(zip(SENTENCES, (result["translation_text"] for result in results), strict=True))
        table.add_row(language, *translations[language].values())
    console.print(table)
    return translations


def check_same_output(model: Any, other: Any, tokenizer: Any) -> None:
    """
    Raises:
        ValueError: the models do not translate to the same tokens.
    """
    inputs = tokenizer(list(SENTENCES), src_lang="en", padding=True, return_tensors="pt")
    generation = {"forced_bos_token_id": tokenizer.get_lang_id("de"), "max_new_tokens": 40, "do_sample": False}
    if not torch.equal(model.generate(**inputs, **generation), other.generate(**inputs, **generation)):
        raise ValueError(f"{model.name_or_path} does not translate as the model that was pruned in memory")
    print(f"{model.name_or_path} translates as the model that was pruned in memory")


def fine_tune(arguments: argparse.Namespace) -> dict[str, Any]:
    """Teach the model a new language, both directions, with the plain `Seq2SeqTrainer`: quality before and after."""
    model = ZCodeM3ForConditionalGeneration.from_pretrained(arguments.checkpoint)
    tokenizer = ZCodeM3Tokenizer.from_pretrained(arguments.checkpoint)
    tokenizer.add_languages([NEW_LANGUAGE])
    model.resize_token_embeddings(len(tokenizer))
    test = first_rows(load_directions("test", [NEW_LANGUAGE]), arguments.max_test_samples)
    before = evaluate(model, tokenizer, test, description="Before fine-tuning")

    train = load_directions("train", [NEW_LANGUAGE])
    dataset = concatenate_datasets([tokenize(data, tokenizer, d, max_length=64) for d, data in train.items()])
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            output_dir=str(arguments.output_dir / "fine_tuned_model"),
            max_steps=arguments.fine_tune_steps,
            per_device_train_batch_size=40,
            learning_rate=1e-3,
            warmup_steps=20,
            train_sampling_strategy="group_by_length",
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=False,
        ),
        train_dataset=dataset,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    after = evaluate(model, tokenizer, test, description="After fine-tuning")
    write_translation_card(trainer.args.output_dir, after)
    return {"new_language_before": summary(model, before), "new_language_after": summary(model, after)}


def size_mb(folder: Path) -> float:
    """Megabytes of the weights in a folder."""
    return round(sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6, 1)


def print_report(report: dict[str, Any], output_dir: Path) -> None:
    """Print the table at the end of the demo."""
    table = Table(
        "", "parameters", "MB", "sentences/s", "BLEU", "chrF", "length ratio", "off target", title="The demo in numbers"
    )
    rows = [
        ("all experts, test", report["full_model"]),
        ("half of the experts, test", report["pruned_model"]),
        (f"en-{NEW_LANGUAGE}-en before fine-tuning", report["new_language_before"]),
        (f"en-{NEW_LANGUAGE}-en after fine-tuning", report["new_language_after"]),
    ]
    for name, result in rows:
        mean = result["means"]["all directions"]
        table.add_row(
            name,
            f"{result['parameters']:,}",
            str(result.get("size_mb", "")),
            str(result["sentences_per_second"]),
            "-" if mean["bleu"] is None else f"{mean['bleu']:.1f}",
            f"{mean['chrf']:.1f}",
            f"{mean['length_ratio']:.2f}",
            "-" if mean["off_target"] is None else f"{mean['off_target']:.1%}",
        )
    console.print(f"{report['seconds']:.0f} s; report and models are in {output_dir}/")
    console.print(table)


if __name__ == "__main__":
    main()
