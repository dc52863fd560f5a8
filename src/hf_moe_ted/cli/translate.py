"""The command that translates texts."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from .options import (
    BatchTokens,
    Beams,
    Device,
    Dtype,
    ExpertLanguages,
    ExpertMemorySize,
    ExpertMemoryStatistics,
    ExpertsIn,
    KeepPlaceholders,
    MaxNewTokens,
    ModelWithTokenizer,
    expert_memory,
)

MAX_SHOWN = 10


def translate(
    model: ModelWithTokenizer,
    tgt: Annotated[str, typer.Option(help="Language to translate to.")],
    source: Annotated[
        Path | None,
        typer.Argument(
            metavar="[INPUT]",
            help="File with lines of text, or a table (tsv, csv, jsonl, parquet); default, or -: standard input.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Argument(
            metavar="[OUTPUT]",
            help="File for the translations, a line for each line; or a table, if its name ends like one; default, or "
            "-: standard output.",
        ),
    ] = None,
    src: Annotated[str, typer.Option(help="Language of the texts, or auto.")] = "auto",
    column: Annotated[
        str | None, typer.Option(help="Column of the table that has the texts; default: source, text or sentence.")
    ] = None,
    glossary: Annotated[
        Path | None,
        typer.Option(help="TSV file of terms and their translations; a term without a translation stays as it is."),
    ] = None,
    beams: Beams = 4,
    alternatives: Annotated[int, typer.Option(help="How many more translations of each text; fewer than beams.")] = 0,
    batch_tokens: BatchTokens = 4096,
    max_new_tokens: MaxNewTokens = None,
    split: Annotated[bool, typer.Option(help="Split texts into sentences, or take each line as one.")] = True,
    wrapped: Annotated[
        bool,
        typer.Option(
            "--wrapped", help="Take the lines of a paragraph as one text; the output has a line per paragraph."
        ),
    ] = False,
    keep_placeholders: KeepPlaceholders = True,
    dtype: Dtype = None,
    device: Device = None,
    expert_memory_size: ExpertMemorySize = None,
    expert_statistics: ExpertMemoryStatistics = None,
    expert_languages: ExpertLanguages = None,
    experts_in: ExpertsIn = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output and begin again.")] = False,
) -> None:
    """Translate text of any length. An interrupted run continues where it stopped; torchrun shares rows among GPUs."""
    from .. import Glossary, TextTranslator, load_model_and_tokenizer, translate_file

    memory = expert_memory(expert_memory_size, expert_statistics, expert_languages, experts_in)
    terms = None if glossary is None else Glossary.from_file(glossary)
    translator = TextTranslator(
        *load_model_and_tokenizer(model, dtype or "auto", device, "MODEL", expert_memory=memory),
        num_beams=beams,
        num_alternatives=alternatives,
        batch_tokens=batch_tokens,
        max_new_tokens=max_new_tokens,
        split=split,
        keep_placeholders=keep_placeholders,
    )
    result = translate_file(
        translator,
        None if source in (None, Path("-")) else source,
        None if output in (None, Path("-")) else output,
        src_lang=src,
        tgt_lang=tgt,
        column=column,
        wrapped=wrapped,
        glossary=terms,
        overwrite=overwrite,
    )
    _show("was not translated", {number: (error,) for number, error in result.errors.items()})
    _show("should be looked at", result.problems)
    if result.errors:
        rest = "the others were" if len(result.errors) < result.num_rows else "none was"
        raise ValueError(f"{len(result.errors)} of {result.num_rows} rows were not translated; {rest}")


def _show(what: str, rows: dict[int, tuple[str, ...]]) -> None:
    for number, messages in list(rows.items())[:MAX_SHOWN]:
        print(f"row {number} {what}: {'; '.join(messages)}", file=sys.stderr)
    if len(rows) > MAX_SHOWN:
        print(f"... and {len(rows) - MAX_SHOWN} more rows", file=sys.stderr)
