"""The models: config, tokenizer, modeling and pipeline. These files travel to the Hub as remote code.

They import no private name. `docs/private_names.md` lists the underscore names of transformers and PyTorch that they
override or read.
"""
