"""Seconds of `trainer.predict` with `predict_with_generate`: this package's searches beside those of transformers.

    python examples/benchmarks/bench_predict.py --num_beams 1 4 --output predict.json

A `MultitaskSeq2SeqTrainer` translates sentences of the test split, half of them into English, in batches of mixed
languages, in turn with the searches of transformers (a hook on the model makes it so) and of this package. On a GPU
these are captured. The first round of each search is left out.
"""

import argparse
import json
import lzma
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sacrebleu.metrics import CHRF

from hf_moe_ted import (
    DataCollatorForMultitaskSeq2Seq,
    MultitaskDataset,
    MultitaskSeq2SeqTrainer,
    MultitaskTrainingArguments,
    load_model_and_tokenizer,
)

EXAMPLES = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=EXAMPLES / "checkpoints" / "zcode_m3_demo")
    parser.add_argument("--num_sentences", type=int, default=512)
    parser.add_argument("--num_beams", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--max_length", type=int, default=64, help="tokens of a translation")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no_bf16", action="store_true", help="train in float32")
    parser.add_argument("--output", type=Path, help="JSON with all numbers")
    args = parser.parse_args()
    model, tokenizer = load_model_and_tokenizer(args.model, dtype="float32")
    rows = test_rows(args.num_sentences, tokenizer.languages)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        options = MultitaskTrainingArguments(
            folder,
            bf16=not args.no_bf16,
            use_cpu=not torch.cuda.is_available(),
            predict_with_generate=True,
            generation_max_length=args.max_length,
            per_device_eval_batch_size=args.batch_size,
            report_to="none",
            disable_tqdm=True,
        )
        collator = DataCollatorForMultitaskSeq2Seq(tokenizer, model)
        trainer = MultitaskSeq2SeqTrainer(model, options, data_collator=collator, processing_class=tokenizer)
        for num_beams in args.num_beams:
            results += measured(trainer, rows, num_beams, args.rounds)
    show(results, len(rows))
    if args.output is not None:
        args.output.write_text(json.dumps({"arguments": vars(args), "results": results}, default=str, indent=1) + "\n")


def test_rows(num_rows: int, languages: list[str]) -> list[dict[str, str]]:
    """Rows of the test split in some languages at equal distances, every other one into English."""
    with lzma.open(EXAMPLES / "data" / "chromium_l10n.test.tsv.xz", "rt", encoding="utf-8") as file:
        lines = [line for line in (line.rstrip("\n").split("\t") for line in file) if line[0] in languages]
    rows = []
    for number, (lang, english, other) in enumerate(lines[:: max(1, len(lines) // num_rows)][:num_rows]):
        texts = [("en", english), (lang, other)]
        (src_lang, source), (tgt_lang, target) = texts if number % 2 else texts[::-1]
        rows.append({"source": source, "target": target, "src_lang": src_lang, "tgt_lang": tgt_lang})
    return sorted(rows, key=lambda row: len(row["source"]))


def measured(trainer: Any, rows: list[dict[str, str]], num_beams: int, rounds: int) -> list[dict[str, Any]]:
    """Seconds of each round, and chrF, by search; the searches take turns."""
    dataset, tokenizer = MultitaskDataset(rows), trainer.processing_class
    seconds: dict[str, list[float]] = {"transformers": [], "hf_moe_ted": []}
    scores = {}
    for _ in range(rounds + 1):
        for search, of_search in seconds.items():
            hook = trainer.model.register_forward_hook(lambda *_: None) if search == "transformers" else None
            start = time.perf_counter()
            ids = trainer.predict(dataset, num_beams=num_beams).predictions
            of_search.append(time.perf_counter() - start)
            if hook is not None:
                hook.remove()
            ids[ids == -100] = tokenizer.pad_token_id
            texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
            scores[search] = CHRF().corpus_score(texts, [[row["target"] for row in rows]]).score
    return [
        {"search": search, "num_beams": num_beams, "seconds": times[1:], "chrF": scores[search]}
        for search, times in seconds.items()
    ]


def show(results: list[dict[str, Any]], num_rows: int) -> None:
    table = Table(title=f"{num_rows} sentences, {torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}")
    for column in ("beams", "search", "seconds", "sentences/s", "times as fast", "chrF"):
        table.add_column(column)
    for result in results:
        of_peer = median(
            next(r["seconds"] for r in results if r["num_beams"] == result["num_beams"] and r["search"] != "hf_moe_ted")
        )
        seconds = median(result["seconds"])
        numbers = (f"{seconds:.2f}", f"{num_rows / seconds:.1f}", f"{of_peer / seconds:.2f}", f"{result['chrF']:.1f}")
        table.add_row(str(result["num_beams"]), result["search"], *numbers)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
