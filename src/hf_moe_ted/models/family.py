"""Which models translate here: source and target begin with the tag of their language, the target by force.

Others would run, too, and answer in a wrong language or not at all, so they are refused by name.
"""

from typing import Any

from .nllb_moe import MODEL_TYPE as NLLB_MOE

ZCODE_M3, M2M_100 = "zcode_m3", "m2m_100"  # NLLB's dense checkpoints are M2M100's

_WHY_NOT = {
    NLLB_MOE: "transformers' own class sends all tokens to two experts; load the checkpoint with "
    "ZCodeM3ForConditionalGeneration.from_pretrained",
    "marian": "it translates one pair of languages and has no tokens for languages; use its own generate",
    "mbart": "the language of a source stands at its end in some of them; use its own generate",
    "t5": "it is told what to do in words before the text; use its own generate",
    "mt5": "it is told what to do in words before the text; use its own generate",
    "umt5": "it is told what to do in words before the text; use its own generate",
}


def check_family(model: Any) -> None:
    """
    Args:
        model: of any class of transformers.

    Raises:
        ValueError: it is no ZCodeM3, and no dense M2M100 or NLLB.
    """
    model_type = str(getattr(model.config, "model_type", None))
    if model_type not in (ZCODE_M3, M2M_100):
        raise ValueError(not_of_family(type(model).__name__, model_type))


def not_of_family(name: str, model_type: str) -> str:
    """Why a model is refused."""
    why = _WHY_NOT.get(model_type, "other models name languages in other ways; use its own generate")
    return (
        f"{name} ({model_type}) is no model of the family that translates here, which is ZCodeM3, NLLB-MoE, M2M100 and "
        f"NLLB: {why}"
    )


__all__ = ["M2M_100", "NLLB_MOE", "ZCODE_M3", "check_family", "not_of_family"]
