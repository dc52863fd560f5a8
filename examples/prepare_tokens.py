"""Turn tab-separated pairs into token ids for `train_multitask.py --train_tokens`, with a tokenizer trained on them.

    python examples/prepare_tokens.py train.tsv.xz valid.tsv.xz --vocab_size 16000 --output_dir tokens

writes `tokenizer/`, and for each file `<name>.npz.xz`; the first file trains the tokenizer. With `--segmentations 6` it
has each pair six times: as the tokenizer cuts it, and five times cut at random (BPE dropout), against over-fitting.
"""

import argparse
from copy import deepcopy
from pathlib import Path
from typing import Any

from multitask_data import first_pairs, monolingual, read_pairs
from token_pairs import TokenArrays

from hf_moe_ted import ZCodeM3Tokenizer


def with_bpe_dropout(tokenizer: Any, probability: float) -> Any:
    """A copy that leaves out merges at random, so that a text is cut in another way each time. It has no seed."""
    copy = deepcopy(tokenizer)
    copy.backend_tokenizer.model.dropout = probability
    return copy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="files of pairs in the format of multitask_data.py")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, help="default: a new one")
    parser.add_argument("--vocab_size", type=int, default=16_000)
    parser.add_argument(
        "--tokenizer_texts", type=int, default=200_000, help="number of texts on which a new tokenizer is trained"
    )
    parser.add_argument(
        "--max_length", type=int, default=128, help="longest text in tokens; pairs with a longer text are left out"
    )
    parser.add_argument("--languages", nargs="+", help="beside English; default: all")
    parser.add_argument(
        "--segmentations",
        type=int,
        default=1,
        help="copies of each pair of the first file: one as the tokenizer cuts it, the others with --bpe_dropout",
    )
    parser.add_argument(
        "--bpe_dropout",
        type=float,
        default=0.1,
        help="part of the merges that are left out, drawn anew for each text (2020.acl-main.170)",
    )
    parser.add_argument("--max_pairs", type=int, help="pairs of each language; default: all")
    arguments = parser.parse_args()
    if arguments.segmentations < 1:
        raise ValueError(f"--segmentations ({arguments.segmentations}) must be at least 1")
    if not 0 < arguments.bpe_dropout < 1:
        raise ValueError(f"--bpe_dropout ({arguments.bpe_dropout}) must be between 0 and 1, such as 0.1")

    names = [path.name.removesuffix(".xz").removesuffix(".tsv") for path in arguments.files]
    if len({*names}) < len(names):
        raise ValueError(f"files {list(map(str, arguments.files))} need different names: each makes NAME.npz.xz")

    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = None if arguments.tokenizer is None else ZCodeM3Tokenizer.from_pretrained(arguments.tokenizer)
    for path, name in zip(arguments.files, names, strict=True):
        pairs = read_pairs(path, arguments.languages)
        if arguments.max_pairs is not None:
            pairs = first_pairs(pairs, arguments.max_pairs)
        if tokenizer is None:
            texts = [row["text"] for row in monolingual(pairs)]
            languages = ["en", *sorted({row["tgt_lang"] for row in pairs})]
            tokenizer = ZCodeM3Tokenizer(languages=languages).train_new_from_iterator(
                texts[:: max(1, len(texts) // arguments.tokenizer_texts)], arguments.vocab_size
            )
            if len(tokenizer) > arguments.vocab_size:
                raise ValueError(
                    f"--vocab_size ({arguments.vocab_size}) must be at least {len(tokenizer)}, for bytes, tags and "
                    "special tokens"
                )
            tokenizer.save_pretrained(arguments.output_dir / "tokenizer")
        arrays = TokenArrays.of(pairs, tokenizer, arguments.max_length)
        if path == arguments.files[0] and arguments.segmentations > 1:
            cut_anew = with_bpe_dropout(tokenizer, arguments.bpe_dropout)
            copies = [TokenArrays.of(pairs, cut_anew, arguments.max_length) for _ in range(arguments.segmentations - 1)]
            arrays = TokenArrays.joined([arrays, *copies])
        written = arguments.output_dir / f"{name}.npz.xz"
        arrays.save(written)
        print(
            f"{written}: {len(arrays.english):,} of {len(pairs):,} pairs, {arrays.num_english:,} English texts, "
            f"{len(arrays.ids):,} tokens, {written.stat().st_size:,} bytes",
            flush=True,
        )


if __name__ == "__main__":
    main()
