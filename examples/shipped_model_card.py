"""The card of the shipped model: `model_cards/zcode_m3_demo.md` with the scores that `hf-moe-ted evaluate` has written.

    python examples/shipped_model_card.py test.json short_test.json direct_test.json \
        --output examples/checkpoints/zcode_m3_demo/README.md

The files are those of docs/benchmarks/zcode_m3_demo_long_h200_2026-12-01.md: the test split, strings of one or two
words, and pairs without English.
"""

import argparse
import os
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

from hf_moe_ted import TranslationQuality

TEMPLATE = Path(__file__).parents[1] / "model_cards" / "zcode_m3_demo.md"
PARTS = {
    "English to X": lambda source, target: source == "en",
    "X to English": lambda source, target: target == "en",
    "between two other languages": lambda source, target: "en" not in (source, target),
}


def rows_of(quality: TranslationQuality) -> Iterable[str]:
    """A row of each direction, with its way back behind it, and of the means."""
    pairs = sorted(quality.directions, key=lambda pair: (sorted({*pair} - {"en"}), pair[0] != "en"))
    for pair in pairs:
        yield _row("-".join(pair), quality, [pair])
    for name, is_in in PARTS.items():
        if found := [pair for pair in pairs if is_in(*pair)]:
            yield _row(f"**{name}**", quality, found)


def other_rows_of(short: TranslationQuality, direct: TranslationQuality) -> Iterable[str]:
    """Rows of means: short strings from and into English, and pairs without English."""
    for text, quality in (("one or two words, ", short), ("", direct)):
        for name, is_in in PARTS.items():
            if found := [pair for pair in quality.directions if is_in(*pair)]:
                mean, num_sentences = quality.mean(found), _num_sentences(quality, found)
                about = f"{text}{name}" + ("" if text else f", {len(found)} directions")
                yield f"| {about} | {num_sentences} | {mean.chrf:.1f} | {mean.length_ratio:.2f} |"


def _row(name: str, quality: TranslationQuality, pairs: list[tuple[str, str]]) -> str:
    mean, num_sentences = quality.mean(pairs), _num_sentences(quality, pairs)
    copies = fmean(quality.directions[pair].source_chrf for pair in pairs)
    bleu = "-" if mean.bleu is None else f"{mean.bleu:.1f}"
    return f"| {name} | {num_sentences} | {mean.chrf:.1f} | {bleu} | {mean.length_ratio:.2f} | {copies:.1f} |"


def _num_sentences(quality: TranslationQuality, pairs: list[tuple[str, str]]) -> int:
    return sum(quality.directions[pair].num_sentences for pair in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("test", type=Path)
    parser.add_argument("short", type=Path)
    parser.add_argument("direct", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    test, short, direct = (
        TranslationQuality.load(path) for path in (arguments.test, arguments.short, arguments.direct)
    )
    card = TEMPLATE.read_text(encoding="utf-8").format(
        rows="\n".join(rows_of(test)), other_rows="\n".join(other_rows_of(short, direct))
    )
    staged = arguments.output.with_name(f".{arguments.output.name}")
    staged.write_text(card, encoding="utf-8")
    os.replace(staged, arguments.output)


if __name__ == "__main__":
    main()
