"""Linear layers and embeddings in 8 bits per weight: the large matrices that are not in experts.

Shape letters: R rows, O output width, I input width, V words of the vocabulary, D model width.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..kernels.int8_linear import Int8Layer, PackedInt8Weights
from .rounding import dequantize_weight, relative_error, round_into

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION, FEED_FORWARD, VOCABULARY = "attention", "feed-forward", "vocabulary"
_MAX_FLOATS = 2**26  # weights that are floats at the same time, without gradients; a vocabulary projection has more
_SIDES = ("encoder", "decoder")


class _QuantizedWeight(nn.Module):
    """A matrix of integers, one scale per row.

    Parameters: `weight_packed` int8[O, I] and `weight_scale` float[O, 1].
    """

    weight_packed: nn.Parameter
    weight_scale: nn.Parameter

    def __init__(self, weight: Tensor):
        """Take shape, dtype and device from `weight`."""
        super().__init__()
        packed, scale = weight.new_empty(weight.shape, dtype=torch.int8), weight.new_empty((len(weight), 1))
        self.weight_packed = nn.Parameter(packed, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)

    @torch.no_grad()
    def quantize_from(self, weight: Tensor, name: str) -> tuple[float, float]:
        """Copy and round a weight; returns the sums of squares of its error and of the weight.

        Raises:
            ValueError: a number is not finite, or is too large to be rounded in its dtype.
        """
        return round_into(weight, self.weight_packed, self.weight_scale, 8, None, name)


class QuantizedLinear(_QuantizedWeight):
    """An `nn.Linear` with integer weights.

    On CPUs without gradients, activations are rounded, too, and multiplied as integers: see [`PackedInt8Weights`].
    Otherwise the weights become floats in each call, those of large matrices in parts.

    Parameters: `weight_packed` int8[O, I], `weight_scale` float[O, 1] and `bias` float[O] or `None`.
    """

    def __init__(self, linear: nn.Linear):
        """Take shapes, dtype, device and a copy of the bias from `linear`."""
        super().__init__(linear.weight)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        bias = linear.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self._packed_weights = PackedInt8Weights()

    def forward(self, inputs: Tensor) -> Tensor:
        """float[..., I] -> float[..., O]."""
        if self._multiplies_integers():
            return self._outputs_of_integers(inputs, (), "weight")
        num_rows = max(1, _MAX_FLOATS // self.in_features)
        if torch.is_grad_enabled() or self.out_features <= num_rows:
            return self._outputs_of_floats(inputs, slice(None))
        first = self._outputs_of_floats(inputs, slice(num_rows))
        outputs = first.new_empty(*first.shape[:-1], self.out_features)
        outputs[..., :num_rows] = first
        for start in range(num_rows, self.out_features, num_rows):
            part = slice(start, start + num_rows)
            outputs[..., part] = self._outputs_of_floats(inputs, part)
        return outputs

    def _outputs_of_floats(self, inputs: Tensor, part: slice) -> Tensor:
        """Outputs for some rows of the weight."""
        weight = dequantize_weight(self.weight_packed[part], self.weight_scale[part], 8)
        bias = None if self.bias is None else self.bias[part]
        return nn.functional.linear(inputs, weight.to(inputs.dtype), bias)

    def with_others(self, others: Sequence[nn.Module], inputs: Tensor) -> list[Tensor]:
        """The outputs of this layer and of others for the same inputs, in one product where that is possible."""
        layers = [self, *others]
        if not self._multiplies_integers() or any(
            type(other) is not type(self) or _has_hooks(other) for other in layers
        ):
            return [layer(inputs) for layer in layers]
        outputs = self._outputs_of_integers(inputs, others, "with others")
        return list(outputs.split([layer.out_features for layer in layers], dim=-1))

    def _outputs_of_integers(self, inputs: Tensor, others: Sequence[Any], key: str) -> Tensor:
        layers = [
            Int8Layer(layer.weight_packed, layer.weight_scale.squeeze(-1), layer.bias) for layer in (self, *others)
        ]
        outputs_RO = self._packed_weights.layers(inputs.reshape(-1, self.in_features), key, layers)
        return outputs_RO.view(*inputs.shape[:-1], -1).to(inputs.dtype)

    def _multiplies_integers(self) -> bool:
        return self.weight_packed.device.type == "cpu" and not torch.is_grad_enabled()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class QuantizedEmbedding(_QuantizedWeight):
    """Word embeddings with integer weights; only rows that are looked up become floats.

    Parameters: `weight_packed` int8[V, D] and `weight_scale` float[V, 1].
    """

    def __init__(self, embedding: Any):
        """Take shapes, dtype and device from `embedding`, a [`ZCodeM3ScaledWordEmbedding`]."""
        super().__init__(embedding.weight)
        self.embed_scale: float = embedding.embed_scale
        self.num_embeddings, self.embedding_dim = embedding.weight.shape

    def forward(self, input_ids: Tensor) -> Tensor:
        """int64[...] -> float[..., D]."""
        # F.embedding refuses negative ids, such as -100 of labels; indexing would count them from the end
        packed, scale = (nn.functional.embedding(input_ids, rows) for rows in (self.weight_packed, self.weight_scale))
        return packed.to(scale.dtype) * scale * self.embed_scale

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def modules_of_parts(model: nn.Module) -> list[nn.Module]:
    """The modules that `quantize_parts` replaces, each once."""
    linears = [linear for _, _, linear in _linears_of(model)]
    return [*linears, *dict.fromkeys(embedding for _, embedding in _tied_embeddings_of(model))]


def weights_of_parts(model: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """Name of each module that `quantize_parts` replaces -> part and weight; tied modules have several names."""
    linears = {name: (part, linear.weight) for name, part, linear in _linears_of(model)}
    return linears | {name: (VOCABULARY, embedding.weight) for name, embedding in _tied_embeddings_of(model)}


def replace_by_quantized(model: "PreTrainedModel") -> None:
    """Replace linear layers and tied embeddings by quantized modules, which have no weights yet."""
    for name, _, linear in list(_linears_of(model)):
        model.set_submodule(name, QuantizedLinear(linear))
    made: dict[nn.Module, nn.Module] = {}
    for name, embedding in list(_tied_embeddings_of(model)):
        model.set_submodule(name, made.setdefault(embedding, QuantizedEmbedding(embedding)))
    _tie(model)


def quantize_parts(model: "PreTrainedModel") -> dict[str, float]:
    """Round linear layers and tied embeddings to 8 bits per weight.

    Returns:
        part -> relative error of its weights.
    """
    exact = weights_of_parts(model)
    training = {name: model.get_submodule(name).training for name in exact}
    replace_by_quantized(model)
    sums: dict[str, list[float]] = {}
    done: set[int] = set()
    for name, (part, weight) in exact.items():
        module: Any = model.get_submodule(name)
        module.train(training[name])
        if id(module.weight_packed) in done:
            continue
        done.add(id(module.weight_packed))
        of_part = sums.setdefault(part, [0.0, 0.0])
        for index, number in enumerate(module.quantize_from(weight, name)):
            of_part[index] += number
    return {part: relative_error(*of_part) for part, of_part in sums.items()}


def _linears_of(model: nn.Module) -> Iterator[tuple[str, str, nn.Linear]]:
    """Name, part and module of all large linear layers."""
    from ..models.attention import ZCodeM3Attention
    from ..models.moe_layer import ZCodeM3DenseFFN

    for name, module in model.named_modules():
        if isinstance(module, ZCodeM3Attention | ZCodeM3DenseFFN):
            part = ATTENTION if isinstance(module, ZCodeM3Attention) else FEED_FORWARD
            for child_name, child in module.named_children():
                if type(child) is nn.Linear:
                    yield f"{name}.{child_name}", part, child
    head = getattr(model, "lm_head", None)
    if type(head) is nn.Linear:
        yield "lm_head", VOCABULARY, head


def _tied_embeddings_of(model: Any) -> Iterator[tuple[str, Any]]:
    """Name and embedding; a tied one comes once for each of its names."""
    from ..models.layers import ZCodeM3ScaledWordEmbedding

    if model.config.tie_word_embeddings:
        for name, module in model.named_modules(remove_duplicate=False):
            if isinstance(module, ZCodeM3ScaledWordEmbedding):
                yield name, module


def _tie(model: Any) -> None:
    """Tie the integers and the scales of embeddings and head, as their weights were tied."""
    for module in model.modules():
        tied = getattr(module, "_tied_weights_keys", None)
        if tied and model.config.tie_word_embeddings:
            module._tied_weights_keys = {
                name.replace(".weight", kind): source.replace(".weight", kind)
                for name, source in tied.items()
                for kind in (".weight_packed", ".weight_scale")
            }
    if model.config.tie_word_embeddings:
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
        model.tie_weights(recompute_mapping=False)


__all__ = [
    "QuantizedEmbedding",
    "QuantizedLinear",
    "modules_of_parts",
    "quantize_parts",
    "replace_by_quantized",
    "weights_of_parts",
]
