"""Make a ZCodeM3 model with copied experts of a dense M2M100, NLLB-200 or ZCodeM3 folder (Sparse Upcycling)."""

import argparse
import json

from hf_moe_ted import upcycle_dense_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="folder with config.json and the weights")
    parser.add_argument("output_dir", help="the new folder")
    parser.add_argument(
        "--num_experts",
        type=json.loads,
        required=True,
        help="of each new sparse layer, or a list such as [8,8,16], encoder first",
    )
    parser.add_argument("--encoder_sparse_step", type=int, default=2, help="every so many layers; 0 for none")
    parser.add_argument("--decoder_sparse_step", type=int, default=2, help="every so many layers; 0 for none")
    parser.add_argument("--noise_std", type=float, default=0.0, help="of the noise on the experts' weights")
    parser.add_argument("--seed", type=int, default=0, help="of routers and noise")
    parser.add_argument(
        "--config_overrides", type=json.loads, help='fields of ZCodeM3Config, such as {"capacity_factor": 2.0}'
    )
    parser.add_argument("--dtype", help="of the weights: float32, bfloat16 or float16; default: as in the source")
    parser.add_argument("--max_shard_size", default="5GB")
    parser.add_argument("--overwrite", action="store_true", help="replace output_dir if it is not empty")
    arguments = parser.parse_args()
    try:
        print(upcycle_dense_checkpoint(**vars(arguments)))
    except (ValueError, OSError) as error:
        parser.exit(1, f"Error: {error}\n")


if __name__ == "__main__":
    main()
