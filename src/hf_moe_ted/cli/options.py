"""Options and arguments that several commands share."""

from pathlib import Path
from typing import Annotated, Any

import typer

OutputDir = Annotated[Path, typer.Argument(help="The new folder; it appears once it is complete.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as in the source.")]
MaxShardSize = Annotated[str, typer.Option(help="Size of one weight file, such as 5GB or 500MB.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output of the same kind.")]
Rules = Annotated[str, typer.Option(help="m2m100, fairseq, zcode_m3, megatron, or a YAML file.")]
Tag = Annotated[str | None, typer.Option(help="Which checkpoint of the folder; default: the last one.")]
Tokenizer = Annotated[Path | None, typer.Option(help="Folder of a tokenizer that is saved with the model.")]
Model = Annotated[Path, typer.Argument(help="Folder of a ZCodeM3 model.")]
ModelWithTokenizer = Annotated[Path, typer.Argument(help="Folder of a ZCodeM3 model with its tokenizer.")]
Output = Annotated[Path, typer.Option(help="The new folder; it appears once it is complete.")]

Keep = Annotated[
    str, typer.Option(help="What to keep: a fraction of the experts (0.25), experts per layer (16), or a size (8GB).")
]
Scope = Annotated[str, typer.Option(help="global, language_pair or language.")]
PerLayer = Annotated[str, typer.Option(help="equal or adaptive.")]
Languages = Annotated[
    str | None,
    typer.Option(help="Languages to keep, such as en,de,fr, or directions, such as en:de,en:fr; default: all."),
]
EncoderDecoderRatio = Annotated[
    float | None, typer.Option(help="Experts of an encoder layer per expert of a decoder layer, such as 3.")
]

Data = Annotated[
    str,
    typer.Argument(
        help="A file (jsonl, csv, tsv or parquet; text may be compressed as .gz, .xz or .bz2) or a dataset of the "
        "Hub. Columns: source, target, src_lang and tgt_lang; or translation."
    ),
]
DataLanguages = Annotated[str | None, typer.Option(help="Only sentences between these languages, such as en,de,fr.")]
Subset = Annotated[str | None, typer.Option(help="Configuration of a dataset of the Hub.")]
Split = Annotated[str, typer.Option(help="Split of a dataset of the Hub.")]
BatchSize = Annotated[int, typer.Option(help="Sentences per batch.")]
Device = Annotated[
    str | None,
    typer.Option(
        help="A device such as cuda, or auto to use all GPUs, memory and disk; default: a GPU if there is one."
    ),
]

ExpertMemorySize = Annotated[
    str | None,
    typer.Option(
        "--expert-memory",
        help="Size of the experts that are on the device at once, such as 8GB; others are loaded when needed.",
    ),
]
ExpertMemoryStatistics = Annotated[
    Path | None,
    typer.Option(
        "--expert-statistics",
        help="Folder written by `expert-statistics`: it says which experts --expert-memory loads first.",
    ),
]
ExpertsIn = Annotated[
    str | None,
    typer.Option(
        "--experts-in", help="Where --expert-memory loads experts from: memory or files; default: memory for a GPU."
    ),
]
ExpertLanguages = Annotated[
    str | None, typer.Option(help="Languages of --expert-statistics that count, such as en,de; default: all.")
]

Beams = Annotated[int, typer.Option(help="1 is greedy.")]
BatchTokens = Annotated[int, typer.Option(help="Source tokens per batch.")]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        help="Longest translation of a sentence in tokens; longer ones are cut; default: set by the source's length."
    ),
]
KeepPlaceholders = Annotated[
    bool, typer.Option(help="Translate again with markers when a placeholder or number is lost, or only report it.")
]


def codes(languages: str | None) -> list[str] | None:
    """`"en, de"` -> codes."""
    from .. import parse_languages

    return None if languages is None else parse_languages(languages)


def expert_memory(
    size: str | None, statistics: Path | None = None, languages: str | None = None, experts_in: str | None = None
) -> Any:
    """The `ExpertMemory` that the options of a command describe; `None` without a size.

    Raises:
        ValueError: an option is wrong, or others are given without a size.
    """
    from .. import ExpertMemory

    if size is None:
        if statistics is not None or languages is not None:
            raise ValueError("--expert-statistics and --expert-languages need --expert-memory")
        if experts_in is not None:
            raise ValueError(f"--experts-in ({experts_in}) needs --expert-memory")
        return None
    return ExpertMemory(size, statistics=statistics, languages=codes(languages), experts_in=experts_in or "auto")
