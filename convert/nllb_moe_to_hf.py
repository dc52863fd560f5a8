"""Convert a Hugging Face NLLB-MoE folder to a ZCodeM3 one; the same as `hf-moe-ted convert nllb-moe`."""

from hf_moe_ted.cli import run

if __name__ == "__main__":
    run("convert", "nllb-moe")
