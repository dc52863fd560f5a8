"""Dense M2M100 (https://huggingface.co/papers/2010.11125) and NLLB-200 as ZCodeM3: config and names of weights."""

import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import M2M100Config

from ..models.nllb_moe import M2M100_FIELDS

MODEL_TYPE = M2M100Config.model_type


def m2m100_config_fields(m2m100: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `ZCodeM3Config` from those of `M2M100Config`; missing fields have the defaults of `M2M100Config`.

    Layer drop has no counterpart. M2M100 extends its positions for long sequences; ZCodeM3 refuses sequences longer
    than `max_position_embeddings`.

    Raises:
        ValueError: a field has a wrong type.
    """
    try:
        config = M2M100Config.from_dict(dict(m2m100))
    except StrictDataclassError as error:
        raise ValueError(f"this is not a config of M2M100: {error}") from error
    return {name: getattr(config, name) for name in M2M100_FIELDS}


def m2m100_name(name: str) -> str:
    """The M2M100 name of a weight of a dense ZCodeM3 model. In M2M100 the feed-forward is not a module of its own."""
    return re.sub(r"\.ffn\.(fc[12])\.", r".\1.", name)


__all__ = ["MODEL_TYPE", "m2m100_config_fields", "m2m100_name"]
