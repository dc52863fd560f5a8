"""Convert a DeepSpeed-MoE checkpoint to a ZCodeM3 folder; the same as `hf-moe-ted convert deepspeed`."""

from hf_moe_ted.cli import run

if __name__ == "__main__":
    run("convert", "deepspeed")
