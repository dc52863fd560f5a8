"""What TED uses of accelerate under private names, with the reason.

`docs/private_names.md` lists all such names of the package with the versions that were read.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator


def models_with_optimizers(accelerator: Accelerator) -> list[tuple[Any, Any]]:
    """What was prepared, of which no public attribute tells.

    Raises:
        ValueError: there is not one optimizer per model.
    """
    models, optimizers = accelerator._models, accelerator._optimizers
    if len(models) != len(optimizers):
        raise ValueError(
            f"{len(models)} models and {len(optimizers)} optimizers are prepared; save_state and load_state need one "
            "optimizer per model, in the same order"
        )
    return list(zip(models, optimizers, strict=True))


@contextlib.contextmanager
def without_models(accelerator: Accelerator) -> Iterator[None]:
    """A block in which `save_state` and `load_state` leave models and optimizers alone: there is no option for it."""
    models, optimizers = accelerator._models, accelerator._optimizers
    accelerator._models, accelerator._optimizers = [], []
    try:
        yield
    finally:
        accelerator._models, accelerator._optimizers = models, optimizers


def num_registered_objects(accelerator: Accelerator) -> int:
    """How many objects `register_for_checkpointing` got, each of which has a file in a state."""
    return len(accelerator._custom_objects)


__all__ = ["models_with_optimizers", "num_registered_objects", "without_models"]
