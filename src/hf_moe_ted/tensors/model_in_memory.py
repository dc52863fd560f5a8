"""The weights of a model in memory, read like those of a folder."""

from torch import Tensor
from torch.distributed.tensor import DTensor

from ..models.modeling_zcode_m3 import ZCodeM3ForConditionalGeneration
from .lazy_tensors import LazyTensors, checked_weights


def tensors_of_model(model: ZCodeM3ForConditionalGeneration) -> LazyTensors:
    """Copies of the weights, tied ones once. Each is made and checked when it is read.

    Raises:
        ValueError: the model has an adapter of PEFT, or weights in other processes.
    """
    if adapted := [name for name, module in model.named_modules() if hasattr(module, "adapter_layer_names")]:
        raise ValueError(
            f"{adapted[0]} has an adapter of PEFT; merge adapters into the weights with merge_and_unload() first, or "
            "give the model without them"
        )
    weights: dict[str, Tensor] = model.state_dict()
    for name, weight in weights.items():
        if isinstance(weight, DTensor) or weight.is_meta:
            raise ValueError(
                f"{name} is not completely in the memory of this process; save the model and give the folder"
            )
    # usually one tensor; if there are two, `drop_tied_copies` refuses different ones
    tied = model.all_tied_weights_keys
    one = {name for name in tied if name in weights and weights[name].data_ptr() == weights[tied[name]].data_ptr()}
    tensors = LazyTensors(
        {name: weight.to("meta") for name, weight in weights.items() if name not in one},
        lambda name: weights[name].cpu().clone(),
        lambda name, index: weights[name][index].cpu().clone(),
        where=lambda _: f"the model in memory ({type(model).__name__})",
    )
    return checked_weights(tensors)


__all__ = ["tensors_of_model"]
