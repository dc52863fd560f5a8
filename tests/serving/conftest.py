from translation_cases import make_model, tokenizer

__all__ = ["make_model", "tokenizer"]
