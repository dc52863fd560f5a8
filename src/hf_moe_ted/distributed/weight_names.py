"""Checkpoints whose names differ from the model's, which transformers converts during loading."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from .private_transformers import given_conversions


def converted_tensors(
    model: nn.Module, own: Mapping[str, Tensor], names: Iterable[str], read: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint under the names of the model; separate experts become one stacked tensor.

    Args:
        model: a model for which transformers may know such names.
        own: names of the model's tensors.
        names: names of the checkpoint's tensors.
        read: function that returns a tensor of the checkpoint, on any device, `meta` included.

    Yields:
        Names and tensors, grouped by conversion; tensors without a conversion have their own names.
    """
    mapping = _mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    conversions: dict[str, Any] = {}
    for name in sorted(names, key=dot_natural_key):  # the order of the experts
        target, pattern = (name, None) if name in own else rename_source_key(name, renamings, converters)
        if target not in own:
            target, pattern = name, None
        if pattern is None:
            yield target, read(name)
            continue
        conversion = conversions.setdefault(target, deepcopy(converter_of[pattern]))
        conversion.add_tensor(target, name, pattern, lambda name=name: read(name))
    for target, conversion in conversions.items():
        for name, tensor in conversion.convert(target, model=model, config=getattr(model, "config", None)).items():
            yield name, tensor[0] if isinstance(tensor, list) else tensor


def has_other_names(model: nn.Module) -> bool:
    """Whether names in checkpoints of the model may differ from the model's."""
    return bool(_mapping(model))


def _mapping(model: nn.Module) -> list[Any]:
    """The conversions of transformers for the class, and the `key_mapping` given to `from_pretrained`."""
    if not isinstance(model, PreTrainedModel):
        return []
    known = get_model_conversion_mapping(model)
    of_class = {repr(entry) for entry in known}
    return [*(entry for entry in given_conversions(model) if repr(entry) not in of_class), *known]


__all__ = ["converted_tensors", "has_other_names"]
