"""Options and arguments that several commands share."""

from pathlib import Path
from typing import Annotated, Any

import typer

OutputDir = Annotated[Path, typer.Argument(help="The new folder; it appears when everything is in it.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as in the source.")]
MaxShardSize = Annotated[str, typer.Option(help="Size of one weight file, such as 5GB or 500MB.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output of the same kind.")]
Rules = Annotated[str, typer.Option(help="m2m100, fairseq, zcode_m3, megatron, or a YAML file.")]
Tag = Annotated[str | None, typer.Option(help="Which checkpoint of the folder; default: the last one.")]
Tokenizer = Annotated[Path | None, typer.Option(help="Folder of a tokenizer to be saved along.")]
Model = Annotated[Path, typer.Argument(help="Folder of a ZCodeM3 model.")]
ModelWithTokenizer = Annotated[Path, typer.Argument(help="Folder of a ZCodeM3 model with its tokenizer.")]
Output = Annotated[Path, typer.Option(help="The new folder; it appears when everything is in it.")]

Keep = Annotated[str, typer.Option(help="A fraction of the experts (0.25), experts per layer (16), or a size (8GB).")]
Scope = Annotated[str, typer.Option(help="global, language_pair or language.")]
PerLayer = Annotated[str, typer.Option(help="equal or adaptive.")]
Languages = Annotated[
    str | None, typer.Option(help="Languages to keep, en,de,fr, or directions, en:de,en:fr; default: all there are.")
]
EncoderDecoderRatio = Annotated[
    float | None, typer.Option(help="Experts of an encoder layer per expert of a decoder layer, such as 3.")
]

Data = Annotated[
    str,
    typer.Argument(
        help="A file (jsonl, csv, tsv or parquet; text maybe as .gz, .xz or .bz2) or a dataset of the Hub, with the "
        "columns source, target, src_lang and tgt_lang, or translation."
    ),
]
DataLanguages = Annotated[str | None, typer.Option(help="Only sentences between these: en,de,fr.")]
Subset = Annotated[str | None, typer.Option(help="Configuration of a dataset of the Hub.")]
Split = Annotated[str, typer.Option(help="Split of a dataset of the Hub.")]
BatchSize = Annotated[int, typer.Option(help="Sentences per batch.")]
Device = Annotated[str | None, typer.Option(help="Such as cuda, or auto: all GPUs, memory and disk; default: a GPU.")]

ExpertMemorySize = Annotated[
    str | None,
    typer.Option("--expert-memory", help="Experts on the device at once, such as 8GB; others come when needed."),
]
ExpertMemoryStatistics = Annotated[
    Path | None,
    typer.Option(
        "--expert-statistics", help="Folder of `expert-statistics`: which experts of --expert-memory are first."
    ),
]
ExpertsIn = Annotated[
    str | None,
    typer.Option(
        "--experts-in", help="Where those of --expert-memory come from, memory or files; default: memory for a GPU."
    ),
]
ExpertLanguages = Annotated[
    str | None, typer.Option(help="Languages whose --expert-statistics count, en,de; default: all they have.")
]

Beams = Annotated[int, typer.Option(help="1 is greedy.")]
BatchTokens = Annotated[int, typer.Option(help="Source tokens of a batch.")]
MaxNewTokens = Annotated[
    int | None, typer.Option(help="Where a sentence that has not ended is cut; default: by its source.")
]
KeepPlaceholders = Annotated[
    bool, typer.Option(help="Try again, with markers, where a placeholder is lost; or only report it.")
]


def codes(languages: str | None) -> list[str] | None:
    """`"en, de"` -> codes."""
    from .. import parse_languages

    return None if languages is None else parse_languages(languages)


def expert_memory(
    size: str | None, statistics: Path | None = None, languages: str | None = None, experts_in: str | None = None
) -> Any:
    """`ExpertMemory` of the options of the command, `None` without a size.

    Raises:
        ValueError: the others without a size, or one that is wrong.
    """
    from .. import ExpertMemory

    if size is None:
        if statistics is not None or languages is not None:
            raise ValueError("--expert-statistics and --expert-languages need --expert-memory")
        if experts_in is not None:
            raise ValueError(f"--experts-in ({experts_in}) needs --expert-memory")
        return None
    return ExpertMemory(size, statistics=statistics, languages=codes(languages), experts_in=experts_in or "auto")
