"""The command `hf-moe-ted`.

What a subcommand does is imported in it, so that `--help` and wrong arguments need not wait for torch.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Multilingual MoE translation models.")
convert = typer.Typer(no_args_is_help=True, help="Checkpoints of other software to from_pretrained folders.")
export = typer.Typer(no_args_is_help=True, help="from_pretrained folders to checkpoints of other software.")
app.add_typer(convert, name="convert")
app.add_typer(export, name="export")

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
Device = Annotated[str | None, typer.Option(help="Such as cuda; default: a GPU if there is one.")]
Languages = Annotated[
    str | None, typer.Option(help="Languages to keep, en,de,fr, or directions, en:de,en:fr; default: all there are.")
]


@app.callback()
def main() -> None:
    """Multilingual Mixture-of-Experts translation models for Hugging Face Transformers."""


@app.command()
def init(
    output_dir: OutputDir,
    config: Annotated[Path, typer.Option(help="config.json of ZCodeM3, or its folder.")],
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    tokenizer: Tokenizer = None,
    max_shard_size: MaxShardSize = "5GB",
    overwrite: Overwrite = False,
) -> None:
    """A model with random weights, to train from scratch."""
    from . import initialize_checkpoint

    print(
        initialize_checkpoint(
            config,
            output_dir,
            seed=seed,
            dtype=dtype,
            tokenizer=tokenizer,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
        )
    )


@convert.command()
def nllb_moe(
    source: Annotated[Path, typer.Argument(help="Folder with config.json and the weights.")],
    output_dir: OutputDir,
    dtype: Dtype = None,
    max_shard_size: MaxShardSize = "5GB",
    overwrite: Overwrite = False,
) -> None:
    """A Hugging Face NLLB-MoE folder to ZCodeM3."""
    from . import convert_nllb_moe_checkpoint

    print(
        convert_nllb_moe_checkpoint(source, output_dir, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite)
    )


@convert.command("deepspeed")
def convert_deepspeed(
    checkpoint_dir: Annotated[Path, typer.Argument(help="What engine.save_checkpoint wrote.")],
    output_dir: OutputDir,
    base_config: Annotated[Path, typer.Option(help="config.json of the dense model or of ZCodeM3, or its folder.")],
    config_overrides: Annotated[
        str, typer.Option(help="Fields of ZCodeM3Config, as JSON: '{\"num_experts_per_tok\": 2}'.")
    ] = "{}",
    rules: Rules = "m2m100",
    weights: Annotated[str, typer.Option(help="model, or master for the float32 copies of the optimizer.")] = "model",
    dtype: Dtype = None,
    tag: Tag = None,
    tokenizer: Tokenizer = None,
    max_shard_size: MaxShardSize = "5GB",
    ignore_expert_output_bias: Annotated[
        bool, typer.Option("--ignore-expert-output-bias", help="For Megatron-DeepSpeed until early 2023.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """A DeepSpeed-MoE checkpoint to ZCodeM3."""
    from . import convert_deepspeed_checkpoint

    print(
        convert_deepspeed_checkpoint(
            checkpoint_dir,
            output_dir,
            base_config=base_config,
            config_overrides=config_overrides,
            rules=rules,
            weights=weights,
            dtype=dtype,
            tag=tag,
            tokenizer=tokenizer,
            max_shard_size=max_shard_size,
            ignore_expert_output_bias=ignore_expert_output_bias,
            overwrite=overwrite,
        )
    )


@convert.command()
def upcycle(
    source: Annotated[Path, typer.Argument(help="Folder of a dense M2M100, NLLB-200 or ZCodeM3 model.")],
    output_dir: OutputDir,
    num_experts: Annotated[int, typer.Option(help="Copies of each feed-forward that becomes sparse.")],
    encoder_sparse_step: Annotated[int, typer.Option(help="Every which layer becomes sparse; 0: none.")] = 2,
    decoder_sparse_step: Annotated[int, typer.Option(help="Every which layer becomes sparse; 0: none.")] = 2,
    noise_std: Annotated[float, typer.Option(help="Noise on the copies.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the routers and the noise.")] = 0,
    dtype: Dtype = None,
    max_shard_size: MaxShardSize = "5GB",
    overwrite: Overwrite = False,
) -> None:
    """A dense model to ZCodeM3 with copied experts."""
    from . import upcycle_dense_checkpoint

    print(
        upcycle_dense_checkpoint(
            source,
            output_dir,
            num_experts=num_experts,
            encoder_sparse_step=encoder_sparse_step,
            decoder_sparse_step=decoder_sparse_step,
            noise_std=noise_std,
            seed=seed,
            dtype=dtype,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
        )
    )


@export.command("deepspeed")
def export_deepspeed(
    folder: Annotated[Path, typer.Argument(help="A ZCodeM3 folder.")],
    output_dir: OutputDir,
    rules: Rules = "m2m100",
    expert_parallel_size: Annotated[int, typer.Option(help="Must divide the experts of every layer.")] = 1,
    tensor_parallel_size: Annotated[int, typer.Option(help="Shards of each tensor that the rules name.")] = 1,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
) -> None:
    """A ZCodeM3 folder to a DeepSpeed-MoE checkpoint, for load_checkpoint(dir, load_module_only=True)."""
    from . import export_deepspeed_checkpoint

    export_deepspeed_checkpoint(
        folder,
        output_dir,
        rules=rules,
        expert_parallel_size=expert_parallel_size,
        tensor_parallel_size=tensor_parallel_size,
        dtype=dtype,
        overwrite=overwrite,
    )
    print(f"{folder} -> {output_dir}")


@app.command()
def inspect(
    checkpoint_dir: Annotated[Path, typer.Argument(help="What engine.save_checkpoint of DeepSpeed wrote.")],
    tag: Tag = None,
) -> None:
    """What a DeepSpeed-MoE checkpoint is: layout, sizes, experts per layer, dtypes, what is missing."""
    from . import inspect_deepspeed_checkpoint

    layout = inspect_deepspeed_checkpoint(checkpoint_dir, tag=tag)
    print(layout)
    if layout.problems:
        raise SystemExit(1)


@app.command()
def prune(
    model: Model,
    output: Output,
    keep: Keep,
    statistics: Annotated[
        Path | None, typer.Option(help="Folder of `hf-moe-ted expert-statistics`; only random needs none.")
    ] = None,
    criterion: Annotated[str, typer.Option(help="utilization, activity_confidence, reap or random.")] = "utilization",
    scope: Scope = "global",
    languages: Languages = None,
    per_layer: PerLayer = "equal",
    min_experts: Annotated[int | None, typer.Option(help="Fewest of a layer; default: experts per token.")] = None,
    encoder_decoder_ratio: EncoderDecoderRatio = None,
    seed: Annotated[int, typer.Option(help="Of the criterion random.")] = 0,
    max_shard_size: MaxShardSize = "5GB",
    overwrite: Overwrite = False,
) -> None:
    """A smaller model with the experts that matter for some languages."""
    from . import prune_experts

    result = prune_experts(
        model,
        _statistics(statistics),
        keep=_number_or_size(keep),
        criterion=criterion,
        scope=scope,
        languages=_languages(languages),
        per_layer=per_layer,
        min_experts=min_experts,
        encoder_decoder_ratio=encoder_decoder_ratio,
        output_dir=output,
        seed=seed,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
    )
    print(result.report)


@app.command()
def expert_statistics(
    model: ModelWithTokenizer,
    data: Data,
    output_dir: OutputDir,
    languages: DataLanguages = None,
    subset: Subset = None,
    split: Split = "validation",
    batch_size: BatchSize = 32,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens per language pair; default: all.")] = None,
    dtype: Dtype = None,
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Count on real text which experts each language uses."""
    from . import ExpertStatistics, collect_expert_statistics, load_model_and_tokenizer, open_parallel_text

    with ExpertStatistics.keeping_folder(output_dir, overwrite=overwrite):
        rows = open_parallel_text(data, subset, split)
        statistics = collect_expert_statistics(
            *load_model_and_tokenizer(model, dtype or "auto", device, "MODEL"),
            rows,
            languages=_data_languages(languages),
            batch_size=batch_size,
            max_tokens=max_tokens,
        )
        statistics.save(output_dir, overwrite=overwrite)
    print(f"{sum(statistics.num_sentences):,} sentences in {len(statistics.pairs)} directions -> {output_dir}")


@app.command()
def merge(
    model: Model,
    output: Output,
    keep: Keep,
    statistics: Annotated[Path, typer.Option(help="Folder of `hf-moe-ted expert-statistics`.")],
    method: Annotated[str, typer.Option(help="clustering (HC-SMoE) or frequency (MC-SMoE).")] = "clustering",
    scope: Scope = "global",
    languages: Languages = None,
    per_layer: PerLayer = "equal",
    min_experts: Annotated[int, typer.Option(help="Fewest of a layer.")] = 1,
    encoder_decoder_ratio: EncoderDecoderRatio = None,
    max_shard_size: MaxShardSize = "5GB",
    overwrite: Overwrite = False,
) -> None:
    """A smaller model in which experts that are alike have become one."""
    from . import merge_experts

    result = merge_experts(
        model,
        _statistics(statistics),
        keep=_number_or_size(keep),
        method=method,
        scope=scope,
        languages=_languages(languages),
        per_layer=per_layer,
        min_experts=min_experts,
        encoder_decoder_ratio=encoder_decoder_ratio,
        output_dir=output,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
    )
    print(result.report)


@app.command()
def aggregate(
    checkpoints: Annotated[list[Path], typer.Argument(help="Two or more folders of ZCodeM3 models.")],
    output: Output,
    max_shard_size: MaxShardSize = "5GB",
    overwrite: Overwrite = False,
) -> None:
    """One model with the experts of several, to continue its training."""
    from . import aggregate_experts

    print(aggregate_experts(checkpoints, output, max_shard_size=max_shard_size, overwrite=overwrite))


@app.command()
def quantize(
    model: Model,
    output: Output,
    bits: Annotated[int, typer.Option(help="8 or 4 per weight of an expert.")] = 8,
    group_size: Annotated[
        int | None, typer.Option(help="Weights per scale; default: a row for 8 bits, up to 128 for 4.")
    ] = None,
    max_shard_size: MaxShardSize = "5GB",
    overwrite: Overwrite = False,
) -> None:
    """A smaller model whose experts have 8 or 4 bits per weight, for inference."""
    from . import quantize_experts

    quantized: Any = quantize_experts(
        model, bits, group_size, output_dir=output, max_shard_size=max_shard_size, overwrite=overwrite
    )
    print(quantized.hf_quantizer.report)


@app.command()
def evaluate(
    model: ModelWithTokenizer,
    data: Data,
    output: Annotated[Path, typer.Option(help="The new JSON file, for `hf-moe-ted report`.")],
    languages: DataLanguages = None,
    subset: Subset = None,
    split: Split = "test",
    max_sentences: Annotated[int | None, typer.Option(help="Of each direction, the first ones; default: all.")] = None,
    batch_size: BatchSize = 32,
    num_beams: Annotated[int, typer.Option(help="1 is greedy.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Where a translation that has not ended is cut.")] = 128,
    dtype: Dtype = None,
    device: Device = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output file.")] = False,
) -> None:
    """Translate a test set: BLEU, chrF, length ratio and language of each direction, and speed."""
    from . import TranslationQuality, evaluate_translation, load_model_and_tokenizer, open_parallel_text

    with TranslationQuality.keeping_path(output, overwrite=overwrite):
        rows = open_parallel_text(data, subset, split)
        quality = evaluate_translation(
            *load_model_and_tokenizer(model, dtype or "auto", device, "MODEL"),
            rows,
            languages=_data_languages(languages),
            max_sentences=max_sentences,
            batch_size=batch_size,
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
        )
        quality.save(output, overwrite=overwrite)
    print(f"{_table(quality)}\n\n{quality}")
    print(f"{quality.num_sentences:,} sentences in {len(quality.directions)} directions -> {output}")


@app.command()
def report(
    model: Annotated[Path, typer.Argument(help="Folder of a compressed model, with compression_report.json.")],
    before: Annotated[
        Path | None, typer.Option(help="File of `hf-moe-ted evaluate` for the model that was compressed.")
    ] = None,
    after: Annotated[Path | None, typer.Option(help="The same for this model, on the same text.")] = None,
    trained: Annotated[Path | None, typer.Option(help="The same for this model after further training.")] = None,
    statistics: Annotated[
        Path | None, typer.Option(help="Folder of `hf-moe-ted expert-statistics` for the model that was compressed.")
    ] = None,
) -> None:
    """Add to the report and model card of a compression what it costs in quality and how languages use the experts."""
    from . import TranslationQuality, write_compression_report

    qualities = {"before": before, "after": after, "trained": trained}
    loaded = {}
    for name, file in qualities.items():
        if file is not None:
            with _naming(f"--{name}"):
                loaded[name] = TranslationQuality.load(file)
    path = write_compression_report(
        model,
        **loaded,
        statistics=_statistics(statistics),
    )
    print(f"{path} and README.md beside it")


def run() -> None:
    """Run the command; an error that names what is wrong ends it without a stack trace."""
    try:
        try:
            app()
        finally:
            _flush_output()
    except (ValueError, OSError) as error:
        typer.secho(f"Error: {_one_line(str(error))}", fg="red", err=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes it once more
        raise SystemExit(1) from None


def _one_line(message: str) -> str:
    """A message without line ends and control characters, which names in files may have, too."""
    line = re.sub(r"\s*\n\s*", "; ", re.sub(r":\s*\n\s*", ": ", message.strip()))
    return "".join(character if character.isprintable() else " " for character in line)


def _flush_output() -> None:
    """A full disk behind `> file` is an error, too."""
    try:
        sys.stdout.flush()
    except OSError as error:
        raise OSError(error.errno, f"the output cannot be printed: {error.strerror}; choose another file") from None


def _number_or_size(keep: str) -> float | int | str:
    """`"16"` -> 16, `"0.25"` -> 0.25, and anything else as it is."""
    for parse in (int, float):
        try:
            return parse(keep)
        except ValueError:
            continue
    return keep


def _languages(languages: str | None) -> list[Any] | None:
    """`"en, de"` -> codes, `"en:de, en:fr"` -> pairs."""
    from . import parse_languages

    if languages is None:
        return None
    items = parse_languages(languages)
    pairs = [tuple(code.strip() for code in item.split(":")) for item in items]
    if any(len(pair) > 2 or not all(pair) for pair in pairs) or len({len(pair) for pair in pairs}) > 1:
        raise ValueError(f"--languages ({languages!r}) must be codes, as en,de,fr, or directions, as en:de,en:fr")
    return items if len(pairs[0]) == 1 else pairs


def _data_languages(languages: str | None) -> list[str] | None:
    """`"en, de"` -> codes."""
    from . import parse_languages

    return None if languages is None else parse_languages(languages)


@contextmanager
def _naming(argument: str) -> Iterator[None]:
    """Errors inside say which argument they are about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from error


def _statistics(folder: Path | None) -> Any:
    from . import ExpertStatistics

    with _naming("--statistics"):
        return None if folder is None else ExpertStatistics.load(folder)


def _table(quality: Any) -> str:
    """The scores of each direction, a line each."""
    header = ["direction", "sentences", "BLEU", "chrF", "length", "off target"]
    rows = [
        [
            "-".join(pair),
            str(scores.num_sentences),
            f"{scores.bleu:.1f}",
            f"{scores.chrf:.1f}",
            f"{scores.length_ratio:.2f}",
            "" if scores.off_target is None else f"{scores.off_target:.1%}",
        ]
        for pair, scores in quality.directions.items()
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in [header, *rows]
    )
