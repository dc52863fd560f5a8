"""Private names of accelerate that TED uses, each with the reason.

`docs/private_names.md` lists all such names of the package, with the versions that were read.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator


def models_with_optimizers(accelerator: Accelerator) -> list[tuple[Any, Any]]:
    """The prepared models and optimizers; no public attribute has them.

    Raises:
        ValueError: the numbers of models and optimizers differ.
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
    """A block in which `save_state` and `load_state` skip models and optimizers; accelerate has no option for that."""
    models, optimizers = accelerator._models, accelerator._optimizers
    accelerator._models, accelerator._optimizers = [], []
    try:
        yield
    finally:
        accelerator._models, accelerator._optimizers = models, optimizers


def num_registered_objects(accelerator: Accelerator) -> int:
    """Number of objects that were given to `register_for_checkpointing`; each has a file in a state."""
    return len(accelerator._custom_objects)


__all__ = ["models_with_optimizers", "num_registered_objects", "without_models"]
