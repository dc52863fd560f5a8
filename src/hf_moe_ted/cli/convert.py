"""Commands that convert between checkpoints of other software and folders of this package."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Dtype, MaxShardSize, OutputDir, Overwrite, Rules, Tag, Tokenizer

convert = typer.Typer(no_args_is_help=True, help="Convert checkpoints of other software to from_pretrained folders.")
export = typer.Typer(no_args_is_help=True, help="Convert from_pretrained folders to checkpoints of other software.")


def _json(text: str) -> Any:
    """Parse a value that is written as JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise typer.BadParameter(f"{text[:100]!r} is not JSON: {error}") from error


@convert.command()
def nllb_moe(
    source: Annotated[Path, typer.Argument(help="Folder with config.json and the weights.")],
    output_dir: OutputDir,
    dtype: Dtype = None,
    max_shard_size: MaxShardSize = "5GB",
    overwrite: Overwrite = False,
) -> None:
    """Convert a Hugging Face NLLB-MoE folder to ZCodeM3."""
    from .. import convert_nllb_moe_checkpoint

    print(
        convert_nllb_moe_checkpoint(source, output_dir, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite)
    )


@convert.command("deepspeed")
def convert_deepspeed(
    checkpoint_dir: Annotated[Path, typer.Argument(help="Folder that engine.save_checkpoint of DeepSpeed wrote.")],
    output_dir: OutputDir,
    base_config: Annotated[Path, typer.Option(help="config.json of the dense model or of ZCodeM3, or its folder.")],
    config_overrides: Annotated[
        str, typer.Option(help="Fields of ZCodeM3Config, as JSON: '{\"num_experts_per_tok\": 2}'.")
    ] = "{}",
    rules: Rules = "m2m100",
    weights: Annotated[
        str, typer.Option(help="model, or master: the float32 copies that the optimizer keeps.")
    ] = "model",
    dtype: Dtype = None,
    tag: Tag = None,
    tokenizer: Tokenizer = None,
    max_shard_size: MaxShardSize = "5GB",
    ignore_expert_output_bias: Annotated[
        bool,
        typer.Option(
            "--ignore-expert-output-bias",
            help="Leave out output biases of experts, which Megatron-DeepSpeed until early 2023 stored but never "
            "added.",
        ),
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Convert a DeepSpeed-MoE checkpoint to ZCodeM3."""
    from .. import convert_deepspeed_checkpoint

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
    num_experts: Annotated[
        Any,
        typer.Option(
            parser=_json,
            metavar="<int>",
            help="Experts of each layer that becomes sparse, or a list such as [8,8,16] with the encoder's layers "
            "first.",
        ),
    ],
    encoder_sparse_step: Annotated[int, typer.Option(help="Every which layer becomes sparse; 0: none.")] = 2,
    decoder_sparse_step: Annotated[int, typer.Option(help="Every which layer becomes sparse; 0: none.")] = 2,
    noise_std: Annotated[float, typer.Option(help="Standard deviation of the noise on the copied weights.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the routers and the noise.")] = 0,
    config_overrides: Annotated[
        Any, typer.Option(parser=_json, metavar="<json>", help="Fields of ZCodeM3Config: '{\"router_bias\": true}'.")
    ] = None,
    dtype: Dtype = None,
    max_shard_size: MaxShardSize = "5GB",
    overwrite: Overwrite = False,
) -> None:
    """Convert a dense model to ZCodeM3: each expert is a copy of the feed-forward."""
    from .. import upcycle_dense_checkpoint

    print(
        upcycle_dense_checkpoint(
            source,
            output_dir,
            num_experts=num_experts,
            encoder_sparse_step=encoder_sparse_step,
            decoder_sparse_step=decoder_sparse_step,
            noise_std=noise_std,
            seed=seed,
            config_overrides=config_overrides,
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
    expert_parallel_size: Annotated[
        int, typer.Option(help="Ranks that share the experts; must divide the number of experts of every layer.")
    ] = 1,
    tensor_parallel_size: Annotated[int, typer.Option(help="Ranks that share each tensor that the rules split.")] = 1,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
) -> None:
    """Convert a ZCodeM3 folder to a DeepSpeed-MoE checkpoint, for load_checkpoint(dir, load_module_only=True)."""
    from .. import export_deepspeed_checkpoint

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


@export.command("m2m100")
def m2m100(
    folder: Annotated[Path, typer.Argument(help="A ZCodeM3 folder whose layers are all dense or have one expert.")],
    output_dir: OutputDir,
    dtype: Dtype = None,
    max_shard_size: MaxShardSize = "5GB",
    overwrite: Overwrite = False,
) -> None:
    """Convert a dense ZCodeM3 folder to M2M100, for transformers without this package and for CTranslate2."""
    from .. import export_m2m100

    print(export_m2m100(folder, output_dir, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite))
