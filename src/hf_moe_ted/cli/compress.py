"""Commands that make a model smaller, or one larger model of several; and those that collect the data they need."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import naming
from .options import (
    BatchSize,
    Data,
    DataLanguages,
    Device,
    Dtype,
    EncoderDecoderRatio,
    ExpertMemorySize,
    Keep,
    Languages,
    MaxShardSize,
    Model,
    ModelWithTokenizer,
    Output,
    OutputDir,
    Overwrite,
    PerLayer,
    Scope,
    Split,
    Subset,
    codes,
    expert_memory,
)


def prune(
    model: Model,
    output: Output,
    keep: Keep,
    statistics: Annotated[
        Path | None,
        typer.Option(help="Folder written by `hf-moe-ted expert-statistics`; only the criterion random needs none."),
    ] = None,
    criterion: Annotated[str, typer.Option(help="utilization, activity_confidence, reap or random.")] = "utilization",
    scope: Scope = "global",
    languages: Languages = None,
    per_layer: PerLayer = "equal",
    min_experts: Annotated[
        int | None, typer.Option(help="Fewest experts that a layer keeps; default: experts per token.")
    ] = None,
    encoder_decoder_ratio: EncoderDecoderRatio = None,
    seed: Annotated[int, typer.Option(help="Seed of the criterion random.")] = 0,
    max_shard_size: MaxShardSize = "5GB",
    overwrite: Overwrite = False,
) -> None:
    """Make a model smaller: keep the experts that matter for some languages."""
    from .. import prune_experts

    result = prune_experts(
        model,
        _load_statistics(statistics),
        keep=_number_or_size(keep),
        criterion=criterion,
        scope=scope,
        languages=_codes_or_directions(languages),
        per_layer=per_layer,
        min_experts=min_experts,
        encoder_decoder_ratio=encoder_decoder_ratio,
        output_dir=output,
        seed=seed,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
    )
    print(result.report)


def expert_statistics(
    model: ModelWithTokenizer,
    data: Data,
    output_dir: OutputDir,
    languages: DataLanguages = None,
    subset: Subset = None,
    split: Split = "validation",
    batch_size: BatchSize = 32,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens to read per language pair; default: all.")] = None,
    dtype: Dtype = None,
    device: Device = None,
    expert_memory_size: ExpertMemorySize = None,
    overwrite: Overwrite = False,
) -> None:
    """Count on real text which experts each language uses."""
    from .. import ExpertStatistics, collect_expert_statistics, load_model_and_tokenizer, open_parallel_text

    memory = expert_memory(expert_memory_size)
    with ExpertStatistics.keeping_folder(output_dir, overwrite=overwrite):
        rows = open_parallel_text(data, subset, split)
        statistics = collect_expert_statistics(
            *load_model_and_tokenizer(model, dtype or "auto", device, "MODEL", expert_memory=memory),
            rows,
            languages=codes(languages),
            batch_size=batch_size,
            max_tokens=max_tokens,
        )
        statistics.save(output_dir, overwrite=overwrite)
    print(f"{sum(statistics.num_sentences):,} sentences in {len(statistics.pairs)} directions -> {output_dir}")


def merge(
    model: Model,
    output: Output,
    keep: Keep,
    statistics: Annotated[Path, typer.Option(help="Folder written by `hf-moe-ted expert-statistics`.")],
    method: Annotated[str, typer.Option(help="clustering (HC-SMoE) or frequency (MC-SMoE).")] = "clustering",
    scope: Scope = "global",
    languages: Languages = None,
    per_layer: PerLayer = "equal",
    min_experts: Annotated[int, typer.Option(help="Fewest experts that a layer keeps.")] = 1,
    encoder_decoder_ratio: EncoderDecoderRatio = None,
    max_shard_size: MaxShardSize = "5GB",
    overwrite: Overwrite = False,
) -> None:
    """Make a model smaller: merge experts that are alike into one."""
    from .. import merge_experts

    result = merge_experts(
        model,
        _load_statistics(statistics),
        keep=_number_or_size(keep),
        method=method,
        scope=scope,
        languages=_codes_or_directions(languages),
        per_layer=per_layer,
        min_experts=min_experts,
        encoder_decoder_ratio=encoder_decoder_ratio,
        output_dir=output,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
    )
    print(result.report)


def aggregate(
    checkpoints: Annotated[list[Path], typer.Argument(help="Two or more folders of ZCodeM3 models.")],
    output: Output,
    max_shard_size: MaxShardSize = "5GB",
    overwrite: Overwrite = False,
) -> None:
    """Put the experts of several models into one model, to train it further."""
    from .. import aggregate_experts

    print(aggregate_experts(checkpoints, output, max_shard_size=max_shard_size, overwrite=overwrite))


def quantize(
    model: Annotated[Path, typer.Argument(help="Folder of a ZCodeM3 or NLLB-MoE model.")],
    output: Output,
    bits: Annotated[int, typer.Option(help="Bits per expert weight: 8 or 4.")] = 8,
    group_size: Annotated[
        int | None, typer.Option(help="Weights that share a scale; default: a whole row for 8 bits, at most 128 for 4.")
    ] = None,
    what: Annotated[
        str,
        typer.Option(
            help="experts, or all: also attention, feed-forward and vocabulary, in 8 bits; this is fast on CPUs."
        ),
    ] = "experts",
    dtype: Dtype = None,
    max_shard_size: MaxShardSize = "5GB",
    overwrite: Overwrite = False,
) -> None:
    """Make a model smaller: round expert weights to 8 or 4 bits, for inference. It needs little memory."""
    from .. import quantize_experts

    report = quantize_experts(
        model,
        bits,
        group_size,
        what=what,
        dtype=dtype or "auto",
        output_dir=output,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
    )
    print(report)


def trim(
    model: ModelWithTokenizer,
    data: Data,
    output: Output,
    languages: Annotated[
        str | None,
        typer.Option(
            help="Languages to keep, such as en,de: their texts count and their tags stay; default: all of DATA."
        ),
    ] = None,
    min_count: Annotated[int, typer.Option(help="Keep a token that occurs at least so often in the texts.")] = 1,
    subset: Subset = None,
    split: Split = "train",
    max_shard_size: MaxShardSize = "5GB",
    overwrite: Overwrite = False,
) -> None:
    """Make a model and its tokenizer smaller: keep the tokens that some text uses."""
    from .. import open_parallel_text, trim_vocabulary

    result = trim_vocabulary(
        model,
        dataset=open_parallel_text(data, subset, split),
        languages=codes(languages),
        min_count=min_count,
        output_dir=output,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
    )
    print(result.report)


def report(
    model: Annotated[Path, typer.Argument(help="Folder of a compressed model, with compression_report.json.")],
    before: Annotated[
        Path | None, typer.Option(help="File written by `hf-moe-ted evaluate` for the model before compression.")
    ] = None,
    after: Annotated[Path | None, typer.Option(help="The same for this model, on the same text.")] = None,
    trained: Annotated[Path | None, typer.Option(help="The same for this model after further training.")] = None,
    statistics: Annotated[
        Path | None,
        typer.Option(help="Folder written by `hf-moe-ted expert-statistics` for the model before compression."),
    ] = None,
) -> None:
    """Add to a compression's report and model card: the loss of quality, and which experts each language uses."""
    from .. import TranslationQuality, write_compression_report

    qualities = {}
    for name, file in (("before", before), ("after", after), ("trained", trained)):
        with naming(f"--{name}"):
            qualities[name] = None if file is None else TranslationQuality.load(file)
    path = write_compression_report(model, **qualities, statistics=_load_statistics(statistics))
    print(f"{path} and README.md beside it")


def _number_or_size(keep: str) -> float | int | str:
    """`"16"` -> 16, `"0.25"` -> 0.25; other text stays as it is."""
    for parse in (int, float):
        try:
            return parse(keep)
        except ValueError:
            continue
    return keep


def _codes_or_directions(languages: str | None) -> list[Any] | None:
    """`"en, de"` -> codes, `"en:de, en:fr"` -> pairs."""
    items = codes(languages)
    if items is None:
        return None
    pairs = [tuple(code.strip() for code in item.split(":")) for item in items]
    if any(len(pair) > 2 or not all(pair) for pair in pairs) or len({len(pair) for pair in pairs}) > 1:
        raise ValueError(
            f"--languages ({languages!r}) must be codes, such as en,de,fr, or directions, such as en:de,en:fr"
        )
    return items if len(pairs[0]) == 1 else pairs


def _load_statistics(folder: Path | None) -> Any:
    from .. import ExpertStatistics

    with naming("--statistics"):
        return None if folder is None else ExpertStatistics.load(folder)
