"""The models: config, tokenizer, modeling and pipeline. These files travel to the Hub as remote code.

They import no private name. `docs/private_names.md` lists what they override or read of transformers and PyTorch with
an underscore.
"""
