"""Text of two languages as token ids, in seconds."""

import sys
from pathlib import Path
from typing import Any

import prepare_tokens
import pytest

LINES = [
    f"{lang}\tEnglish sentence {number} about {topic}\t{lang} {topic} sentensi {'hapa ' * (number % 5)}{number}"
    for topic in ("tabs", "windows")
    for number in range(12)
    for lang in ("de", "is")
]


def prepare(folder: Path) -> dict[str, Any]:
    """Write `train`, `valid` and their tokenizer; returns the fields of a recipe that name them."""
    (folder / "train.tsv").write_text("\n".join([*LINES, f"de\tshort\t{'lang ' * 99}"]) + "\n")
    (folder / "valid.tsv").write_text("\n".join(LINES[:20]) + "\n")
    files = [str(folder / f"{name}.tsv") for name in ("train", "valid")]
    with pytest.MonkeyPatch.context() as patch:
        options = ["--vocab_size", "320", "--max_length", "48", "--output_dir", str(folder)]
        patch.setattr(sys, "argv", ["prepare_tokens.py", *files, *options])
        prepare_tokens.main()
    return {
        "train_tokens": str(folder / "train.npz.xz"),
        "validation_tokens": str(folder / "valid.npz.xz"),
        "tokenizer_name_or_path": str(folder / "tokenizer"),
        "validation_file": str(folder / "valid.tsv"),
    }
