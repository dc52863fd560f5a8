"""The models that translate here: source and target begin with a language tag, which is forced for the target.

Other models would run, too, but answer in a wrong language or not at all. So they are refused by name.
"""

from typing import Any

from .nllb_moe import MODEL_TYPE as NLLB_MOE

ZCODE_M3, M2M_100 = "zcode_m3", "m2m_100"  # NLLB's dense checkpoints have this type, too

_WHY_NOT = {
    NLLB_MOE: "transformers' own class sends all tokens to two experts; load the checkpoint with "
    "ZCodeM3ForConditionalGeneration.from_pretrained",
    "marian": "it translates one language pair and has no language tokens; use its own generate",
    "mbart": "in some of these models the source language stands at the end of the source; use its own generate",
    "t5": "its task is given in words before the text; use its own generate",
    "mt5": "its task is given in words before the text; use its own generate",
    "umt5": "its task is given in words before the text; use its own generate",
}


def check_family(model: Any) -> None:
    """
    Args:
        model: a model of any class of transformers.

    Raises:
        ValueError: it is neither a ZCodeM3 nor a dense M2M100 or NLLB.
    """
    model_type = str(getattr(model.config, "model_type", None))
    if model_type not in (ZCODE_M3, M2M_100):
        raise ValueError(not_of_family(type(model).__name__, model_type))


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


def not_of_family(name: str, model_type: str) -> str:
    """Why a model is refused."""
    why = _WHY_NOT.get(model_type, "other models name languages in other ways; use its own generate")
    return (
        f"{name} ({model_type}) does not belong to the models that translate here, ZCodeM3, NLLB-MoE, M2M100 and "
        f"NLLB: {why}"
    )


__all__ = ["M2M_100", "NLLB_MOE", "ZCODE_M3", "check_family", "check_vocabulary", "not_of_family", "num_embeddings"]
