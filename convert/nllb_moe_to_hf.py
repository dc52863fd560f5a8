"""Convert a Hugging Face NLLB-MoE folder to a ZCodeM3 one; the same as `hf-moe-ted convert nllb-moe`."""

import argparse

from hf_moe_ted import convert_nllb_moe_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="folder with config.json and the weights")
    parser.add_argument("output_dir", help="the new folder")
    parser.add_argument("--dtype", help="of the weights: float32, bfloat16 or float16; default: as in the source")
    parser.add_argument("--max_shard_size", default="5GB")
    parser.add_argument("--overwrite", action="store_true", help="replace output_dir if it is not empty")
    arguments = parser.parse_args()
    try:
        print(convert_nllb_moe_checkpoint(**vars(arguments)))
    except (ValueError, OSError) as error:
        parser.exit(1, f"Error: {error}\n")


if __name__ == "__main__":
    main()
