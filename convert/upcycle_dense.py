"""Make a ZCodeM3 model with experts copied from a dense one; the same as `hf-moe-ted convert upcycle`."""

from hf_moe_ted.cli import run

if __name__ == "__main__":
    run("convert", "upcycle")
