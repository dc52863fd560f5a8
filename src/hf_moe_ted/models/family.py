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


def not_of_family(name: str, model_type: str) -> str:
    """Why a model is refused."""
    why = _WHY_NOT.get(model_type, "other models name languages in other ways; use its own generate")
    return (
        f"{name} ({model_type}) does not belong to the models that translate here, ZCodeM3, NLLB-MoE, M2M100 and "
        f"NLLB: {why}"
    )


__all__ = ["M2M_100", "NLLB_MOE", "ZCODE_M3", "check_family", "not_of_family"]
