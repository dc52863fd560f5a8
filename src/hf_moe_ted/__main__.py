"""`python -m hf_moe_ted`: the command line, for launchers such as torchrun."""

from .cli import run

if __name__ == "__main__":
    run()
