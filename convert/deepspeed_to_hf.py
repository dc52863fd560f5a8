"""Convert a DeepSpeed-MoE checkpoint to a ZCodeM3 folder; the same as `hf-moe-ted convert deepspeed`."""

import argparse
import json

from hf_moe_ted import convert_deepspeed_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint_dir", help="what engine.save_checkpoint wrote")
    parser.add_argument("output_dir", help="the new folder")
    parser.add_argument(
        "--base_config", required=True, help="config.json of the dense model or of ZCodeM3, or its folder"
    )
    parser.add_argument("--config_overrides", type=json.loads, default={}, help="fields of ZCodeM3Config, as JSON")
    parser.add_argument("--rules", default="m2m100", help="m2m100, fairseq, zcode_m3, megatron, or a YAML file")
    parser.add_argument("--weights", default="model", help="model, or master for the optimizer's float32 copies")
    parser.add_argument("--dtype", help="of the weights: float32, bfloat16 or float16; default: as in the source")
    parser.add_argument("--tag", help="which checkpoint of the folder; default: the last one")
    parser.add_argument("--tokenizer", help="folder of a tokenizer to be saved along")
    parser.add_argument("--max_shard_size", default="5GB")
    parser.add_argument("--ignore_expert_output_bias", action="store_true", help="Megatron-DeepSpeed until early 2023")
    parser.add_argument("--overwrite", action="store_true", help="replace output_dir if it is not empty")
    arguments = parser.parse_args()
    try:
        print(convert_deepspeed_checkpoint(**vars(arguments)))
    except (ValueError, OSError) as error:
        parser.exit(1, f"Error: {error}\n")


if __name__ == "__main__":
    main()
