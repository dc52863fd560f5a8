"""How fast texts are translated: the command, the pipeline, and `generate` on batches in the order of the input.

    python examples/benchmarks/bench_translate.py MODEL sentences.txt --src en --tgt de

Each way translates the same lines with the same beams and the same limit of new tokens, after a warm-up. Seconds are of
the clock; processor seconds do not count what other programs took. A way is compared with the command.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_moe_ted import TextTranslator, ZCodeM3TranslationPipeline, load_model_and_tokenizer, translate_file

BATCH_SIZE = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("sentences", type=Path, help="a sentence per line")
    parser.add_argument("--src", default="en")
    parser.add_argument("--tgt", default="de")
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--max-sentences", type=int, default=1000)
    parser.add_argument("--device", default=None)
    args = parser.parse_args()
    model, tokenizer = load_model_and_tokenizer(args.model, device=args.device)
    texts = args.sentences.read_text(encoding="utf-8").splitlines()[: args.max_sentences]
    ways = ways_to_translate(model, tokenizer, args)
    rows = {name: timed(translate, texts, model.device) for name, translate in ways.items()}
    num_tokens = sum(map(len, tokenizer(texts)["input_ids"]))
    print(f"{len(texts)} lines, {num_tokens} source tokens, {args.beams} beams, {model.device}, {torch.__version__}\n")
    print(table(rows, len(texts), num_tokens))


def ways_to_translate(model: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, Callable]:
    """Names of the ways, and functions from texts to translations."""
    limits = {"num_beams": args.beams, "max_new_tokens": args.max_new_tokens}
    translator = TextTranslator(model, tokenizer, **limits)
    pipe = ZCodeM3TranslationPipeline(
        model=model, tokenizer=tokenizer, device=model.device, src_lang=args.src, tgt_lang=args.tgt, **limits
    )

    def command(texts: list[str]) -> list[str]:
        with tempfile.TemporaryDirectory() as folder:
            source, output = Path(folder) / "in.txt", Path(folder) / "out.txt"
            source.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
            translate_file(translator, source, output, src_lang=args.src, tgt_lang=args.tgt)
            return output.read_text(encoding="utf-8").splitlines()

    def by_pipeline(batch_size: int) -> Callable:
        return lambda texts: [item["translation_text"] for item in pipe(texts, batch_size=batch_size)]

    def by_generate(texts: list[str]) -> list[str]:
        translations: list[str] = []
        for start in range(0, len(texts), BATCH_SIZE):
            batch = texts[start : start + BATCH_SIZE]
            inputs = tokenizer(batch, src_lang=args.src, padding=True, truncation=True, return_tensors="pt")
            outputs = model.generate(
                **inputs.to(model.device), forced_bos_token_id=tokenizer.get_lang_id(args.tgt), **limits
            )
            translations += tokenizer.batch_decode(outputs, skip_special_tokens=True)
        return translations

    return {
        "hf-moe-ted translate": command,
        f"pipeline, batch_size={BATCH_SIZE}": by_pipeline(BATCH_SIZE),
        "pipeline, batch_size=1": by_pipeline(1),
        f"generate, {BATCH_SIZE} in input order": by_generate,
    }


def timed(translate: Callable, texts: list[str], device: torch.device) -> tuple[float, float, list[str]]:
    """Seconds, processor seconds, and translations."""
    translate(texts[:2])
    start, processor_start = time.perf_counter(), time.process_time()
    translations = translate(texts)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, time.process_time() - processor_start, translations


def table(rows: dict[str, tuple[float, float, list[str]]], num_texts: int, num_tokens: int) -> str:
    """A row per way; ratios are of the command's time."""
    first_s, first_cpu_s, expected = next(iter(rows.values()))
    lines = [
        "| way | s | processor s | sentences/s | source tokens/s | s / command | processor s / command | same texts |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, (seconds, cpu_s, texts) in rows.items():
        same = sum(text.strip() == other.strip() for text, other in zip(texts, expected, strict=True)) / num_texts
        lines.append(
            f"| {name} | {seconds:.1f} | {cpu_s:.1f} | {num_texts / seconds:.1f} | {num_tokens / seconds:.0f} | "
            f"{seconds / first_s:.2f}x | {cpu_s / first_cpu_s:.2f}x | {same:.1%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
