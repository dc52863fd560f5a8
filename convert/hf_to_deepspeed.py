"""Write a ZCodeM3 folder as a DeepSpeed-MoE checkpoint; the same as `hf-moe-ted export deepspeed`."""

import argparse

from hf_moe_ted import export_deepspeed_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_or_folder", help="a ZCodeM3 folder")
    parser.add_argument("output_dir", help="the new folder")
    parser.add_argument("--rules", default="m2m100", help="m2m100, fairseq, zcode_m3, megatron, or a YAML file")
    parser.add_argument("--expert_parallel_size", type=int, default=1)
    parser.add_argument("--tensor_parallel_size", type=int, default=1)
    parser.add_argument("--dtype", help="of the weights: float32, bfloat16 or float16; default: as in the source")
    parser.add_argument("--overwrite", action="store_true", help="replace output_dir if it is not empty")
    arguments = parser.parse_args()
    try:
        print(export_deepspeed_checkpoint(**vars(arguments)))
    except (ValueError, OSError) as error:
        parser.exit(1, f"Error: {error}\n")


if __name__ == "__main__":
    main()
