"""Commands that make a model or look at a checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from .options import MaxShardSize, OutputDir, Overwrite, Tag, Tokenizer


def init(
    output_dir: OutputDir,
    config: Annotated[Path, typer.Option(help="config.json of ZCodeM3, or its folder.")],
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    tokenizer: Tokenizer = None,
    max_shard_size: MaxShardSize = "5GB",
    overwrite: Overwrite = False,
) -> None:
    """Make a model with random weights, to train it from scratch."""
    from .. import initialize_checkpoint

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


def inspect(
    checkpoint_dir: Annotated[Path, typer.Argument(help="Folder that engine.save_checkpoint of DeepSpeed wrote.")],
    tag: Tag = None,
) -> None:
    """Describe a DeepSpeed-MoE checkpoint: layout, sizes, experts per layer, dtypes, missing files."""
    from .. import inspect_deepspeed_checkpoint

    layout = inspect_deepspeed_checkpoint(checkpoint_dir, tag=tag)
    print(layout)
    if layout.problems:
        raise SystemExit(1)
