"""Padding, shapes and steps of an epoch: batches of similar length, length buckets, and buckets that are proposed.

    python examples/benchmarks/bench_batches.py train.tsv.xz TOKENIZER --ranks 1 4

Pairs are translated both ways. `--languages` keeps those that the tokenizer knows; without a tokenizer one is trained
on the text, of `--vocab-size`. Tokens are counted once and kept in `--cache`.
"""

import argparse
import hashlib
import os
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parents[1]))
from multitask_data import Row, first_pairs, monolingual, read_pairs

from hf_moe_ted import (
    BatchStatistics,
    DataCollatorForMultitaskSeq2Seq,
    MultitaskDataset,
    TokenBudgetBatchSampler,
    ZCodeM3Tokenizer,
    propose_length_buckets,
    token_lengths,
)

BUCKETS = [16, 32, 48, 64, 96, 128, 192, 256]
TOKENIZER_TEXTS = 300_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train_file", type=Path, help="lines of lang, English and target, see multitask_data.py")
    parser.add_argument("tokenizer", nargs="?", help="a folder; default: one trained on the text")
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--languages", nargs="+")
    parser.add_argument("--max-pairs", type=int, help="per language")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--max-tokens-per-batch", type=int, default=16_384)
    parser.add_argument("--buckets", type=int, nargs="+", default=BUCKETS)
    parser.add_argument("--signatures", type=int, nargs="+", default=[24, 32, 40])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1])
    parser.add_argument("--cache", type=Path, default=Path("runs/batches"))
    args = parser.parse_args()
    pairs = read_pairs(args.train_file, args.languages)
    pairs = pairs if args.max_pairs is None else first_pairs(pairs, args.max_pairs)
    tokenizer = tokenizer_of(args, pairs)
    dataset = MultitaskDataset(pairs, both_directions=True)
    lengths = lengths_of(args, dataset, DataCollatorForMultitaskSeq2Seq(tokenizer, max_length=args.max_length))
    median, ninetieth = np.percentile(lengths, [50, 90])
    print(f"{len(pairs):,} pairs, {len(tokenizer):,} words, {lengths.sum():,} tokens; of a text ", end="")
    print(f"{lengths.mean():.1f}, median {median:.0f}, 90th percentile {ninetieth:.0f}\n")
    print(table(args, dataset, tokenizer, lengths))


def tokenizer_of(args: argparse.Namespace, pairs: list[Row]) -> ZCodeM3Tokenizer:
    """The tokenizer that is named, or one of the text, which is kept."""
    if args.tokenizer is not None:
        return ZCodeM3Tokenizer.from_pretrained(args.tokenizer)
    folder = args.cache / f"tokenizer_{args.vocab_size}_{key_of(args.train_file, args.languages, args.max_pairs)}"
    if not folder.is_dir():
        texts = [row["text"] for row in monolingual(pairs)]
        languages = ["en", *sorted({row["tgt_lang"] for row in pairs})]
        step = max(1, len(texts) // TOKENIZER_TEXTS)
        tokenizer = ZCodeM3Tokenizer(languages=languages).train_new_from_iterator(texts[::step], args.vocab_size)
        tokenizer.save_pretrained(folder)
    return ZCodeM3Tokenizer.from_pretrained(folder)


def lengths_of(
    args: argparse.Namespace, dataset: MultitaskDataset, collator: DataCollatorForMultitaskSeq2Seq
) -> np.ndarray:
    """Tokens of source and target of each example, counted once."""
    tokenizer = args.tokenizer or args.vocab_size
    path = args.cache / f"{key_of(args.train_file, args.languages, args.max_pairs, tokenizer, args.max_length)}.npy"
    if not path.is_file():
        lengths = token_lengths(dataset, collator)
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_suffix(".incomplete.npy")
        np.save(staged, lengths)
        os.replace(staged, path)
    return np.load(path)


def key_of(*of: Any) -> str:
    """A name for what is kept of these arguments."""
    return hashlib.sha256(repr(of).encode()).hexdigest()[:16]


def table(args: argparse.Namespace, dataset: MultitaskDataset, tokenizer: ZCodeM3Tokenizer, lengths: np.ndarray) -> str:
    """A row per way to make batches and number of ranks."""
    lines = [
        "| batches | ranks | signatures | padding | steps | steps of other shapes | components of a batch | s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    most = max(args.signatures)
    ways: list[tuple[str, int, list[int] | None, int | None]] = [
        ("similar lengths", most, None, None),
        ("similar lengths, multiples of 8", most, None, 8),
        (f"{len(args.buckets)} buckets: {', '.join(map(str, args.buckets))}", min(args.signatures), args.buckets, None),
    ]
    for num_signatures in args.signatures:
        proposed = propose_length_buckets(lengths, max_signatures=num_signatures)
        ways.append((f"{len(proposed)} buckets, proposed", num_signatures, proposed, None))
    detail = ""
    for name, num_signatures, buckets, multiple in ways:
        for num_ranks in args.ranks:
            start = time.perf_counter()
            sampler = TokenBudgetBatchSampler(
                dataset,
                DataCollatorForMultitaskSeq2Seq(tokenizer, max_length=args.max_length, pad_to_multiple_of=multiple),
                args.max_tokens_per_batch,
                length_buckets=buckets,
                max_signatures=num_signatures,
                data_parallel_size=num_ranks,
                lengths=lengths,
            )
            seconds = time.perf_counter() - start
            statistics = sampler.statistics()
            lines.append(f"| {name} | {num_ranks} | {row_of(statistics, sampler)} | {seconds:.1f} |")
            if buckets is not None and num_signatures == min(args.signatures) and num_ranks == args.ranks[0]:
                detail = f"{', '.join(map(str, buckets))}\n\n{statistics}"
    return "\n".join([*lines, "", f"The proposed buckets of {min(args.signatures)} signatures: {detail}"])


def row_of(statistics: BatchStatistics, sampler: TokenBudgetBatchSampler) -> str:
    """Cells of a row; without signatures, how many shapes there are."""
    num_shapes = len(statistics.signatures) or f"- ({len(statistics.leftovers)} shapes)"
    others = f"{statistics.leftover_share:.1%}" if statistics.signatures else "all"
    return (
        f"{num_shapes} | {statistics.padding_share:.1%} | {statistics.num_steps:,} | {others} | "
        f"{components_of_a_batch(sampler):.1f}"
    )


def components_of_a_batch(sampler: TokenBudgetBatchSampler) -> float:
    """The mean number of components, a task in a direction, of the examples of the first batches."""
    components = sampler.dataset.component_numbers
    first = islice(sampler, 500)
    numbers = [len({components[draw.example] for draw in batch if draw.example is not None}) for batch in first]
    return float(np.mean(numbers))


if __name__ == "__main__":
    main()
