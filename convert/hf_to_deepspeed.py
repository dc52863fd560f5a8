"""Write a ZCodeM3 folder as a DeepSpeed-MoE checkpoint; the same as `hf-moe-ted export deepspeed`."""

from hf_moe_ted.cli import run

if __name__ == "__main__":
    run("export", "deepspeed")
