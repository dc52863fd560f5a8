from serving_cases import client, make_client, shouting
from translation_cases import make_model, tokenizer

__all__ = ["client", "make_client", "make_model", "shouting", "tokenizer"]
