"""Tokens of a tokenizer, and the embeddings that a model has for them."""

from typing import Any


def num_embeddings(model: Any) -> int | None:
    """Number of tokens for which a model has embeddings, padding of the vocabulary included; `None` if unknown.

    The larger number counts: a rank may have a part of the rows, and a config may know nothing of rows added since.
    """
    of_config = getattr(getattr(model, "config", None), "vocab_size", None)
    if of_config is None or not hasattr(model, "get_input_embeddings"):
        return of_config
    return max(of_config, getattr(model.get_input_embeddings(), "num_embeddings", 0))


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Check that a model has embeddings for all tokens; a token without one is an `IndexError` inside the model.

    Raises:
        ValueError: the tokenizer has more tokens.
    """
    num_tokens, num_rows = len(tokenizer), num_embeddings(model)
    if num_rows is not None and num_tokens > num_rows:
        raise ValueError(
            f"the tokenizer has {num_tokens} tokens, but the model has embeddings for {num_rows}; call "
            "model.resize_token_embeddings(len(tokenizer)), and train the new tokens"
        )


__all__ = ["check_vocabulary", "num_embeddings"]
