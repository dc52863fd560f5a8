"""The command that measures how well a model translates."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import BatchSize, Data, DataLanguages, Device, Dtype, ModelWithTokenizer, Split, Subset, codes

UNKNOWN = "-"


def evaluate(
    model: ModelWithTokenizer,
    data: Data,
    output: Annotated[Path, typer.Option(help="The new JSON file, for `hf-moe-ted report`.")],
    also: Annotated[
        str | None,
        typer.Option(help="A second text, best from another domain: DATA does not show what is lost there."),
    ] = None,
    languages: DataLanguages = None,
    subset: Subset = None,
    split: Split = "test",
    max_sentences: Annotated[
        int | None, typer.Option(help="Use only so many sentences of each direction, from the start; default: all.")
    ] = None,
    batch_size: BatchSize = 32,
    num_beams: Annotated[int, typer.Option(help="Beams of the search; 1 is greedy.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Longest translation in tokens; longer ones are cut.")] = 128,
    dtype: Dtype = None,
    device: Device = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output file.")] = False,
) -> None:
    """Translate a test set. Measure speed and, by direction, BLEU, chrF, lengths, languages, copies and repetitions."""
    from .. import TranslationQuality, evaluate_translation, load_model_and_tokenizer, open_parallel_text

    with TranslationQuality.keeping_path(output, overwrite=overwrite):
        rows = open_parallel_text(data, subset, split)
        quality = evaluate_translation(
            *load_model_and_tokenizer(model, dtype or "auto", device, "MODEL"),
            rows,
            also=None if also is None else open_parallel_text(also, None, split, "--also"),
            languages=codes(languages),
            max_sentences=max_sentences,
            batch_size=batch_size,
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
        )
        quality.save(output, overwrite=overwrite)
    print(_table(quality))
    if quality.also is not None:
        print(f"\n{also}\n{_table(quality.also)}")
    print(f"\n{quality}")
    print(f"{quality.num_sentences:,} sentences in {len(quality.directions)} directions -> {output}")


def _table(quality: Any) -> str:
    """The scores, one line per direction; a number that a direction does not have is "-"."""
    kinds = [*quality.mean([*quality.directions]).copied]
    header = ["direction", "sentences", "BLEU", "chrF", "length", "off target", *kinds, "repeating"]
    rows = [
        [
            "-".join(pair),
            str(scores.num_sentences),
            UNKNOWN if scores.bleu is None else f"{scores.bleu:.1f}",
            f"{scores.chrf:.1f}",
            f"{scores.length_ratio:.2f}",
            UNKNOWN if scores.off_target is None else f"{scores.off_target:.1%}",
            *(_share(*scores.copied.get(kind, (0, 0))) for kind in kinds),
            UNKNOWN if scores.repeating is None else f"{scores.repeating:.1%}",
        ]
        for pair, scores in quality.directions.items()
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in [header, *rows]
    )


def _share(num_wanted: int, num_copied: int) -> str:
    return f"{num_copied / num_wanted:.1%}" if num_wanted else UNKNOWN
