from memory_cases import _poisoned_memory as _poisoned_memory
from translation_cases import make_model, make_quality, rows, tokenizer

__all__ = ["make_model", "make_quality", "rows", "tokenizer"]
