"""Tensor parallelism of the dense layers of ZCodeM3, on local tensors.

The corresponding styles of transformers wrap every linear layer's input and output in DTensors, with an all-reduce per
projection in backward. Here the input of a block is copied to the group once, as in Megatron-LM
(https://huggingface.co/papers/1909.08053, section 3): one all-reduce forward and one backward per block.

Shape letters: B batch, L length, N tokens, C tokens of one chunk, D model width, W words of this rank.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
from transformers.distributed.tensor_parallel import TensorParallelLayer

from ..models.losses import SummedCrossEntropy, row_chunks, summed_cross_entropy
from .collectives import copy_to_group, join_shares, max_over, sum_over, sum_over_group
from .local_shard import LocalShard


class _LocalStyle(TensorParallelLayer):
    """Style of a module that runs on this rank's parts of its parameters; stored as its `tensor_parallel_style`."""

    def placement(self, param: str) -> Placement:
        raise NotImplementedError

    def shard_param(self, module: Any, param: str, mesh: DeviceMesh) -> None:
        full = getattr(module, param, None)
        if full is None:
            return
        module.tensor_parallel_style = self
        sharded = distribute_tensor(full, mesh, [self.placement(param)], src_data_rank=None)
        setattr(module, param, nn.Parameter(sharded, requires_grad=full.requires_grad))

    def should_use_local_tensors(self, module: nn.Module) -> bool:
        return True


class TedColumn(_LocalStyle):
    """Linear layer split by outputs; it has `copies_input` if it is the first layer of its block."""

    def __init__(self, copies_input: bool):
        self.copies_input = copies_input

    def placement(self, param: str) -> Placement:
        return Shard(0)

    def install_forward(self, module: Any, mesh: DeviceMesh) -> nn.Module:
        group = mesh.get_group()

        def forward(x: Tensor) -> Tensor:
            if self.copies_input:
                x = copy_to_group(x, group)
            return nn.functional.linear(x, _local(module.weight), _local(module.bias))

        module.forward = forward
        return module


class TedRow(_LocalStyle):
    """Linear layer split by inputs; the bias is added once, after the sum."""

    def placement(self, param: str) -> Placement:
        return Replicate() if param == "bias" else Shard(1)

    def install_forward(self, module: Any, mesh: DeviceMesh) -> nn.Module:
        group = mesh.get_group()

        def forward(x: Tensor) -> Tensor:
            output = sum_over_group(nn.functional.linear(x, _local(module.weight)), group)
            return output if module.bias is None else output + _local(module.bias)

        module.forward = forward
        return module


class TedBeforeColumn(TensorParallelLayer):
    """Linear layer that is whole on every rank; a column-parallel layer reads its output without a copy to the group.

    Each rank then has its part of the gradients. The input's gradient is summed where the block copies its input, and
    the weight's gradient here. For a long output and a small weight, this is less to sum than the output.
    """

    def install_forward(self, module: Any, mesh: DeviceMesh) -> nn.Module:
        group = mesh.get_group()

        def forward(x: Tensor) -> Tensor:
            return nn.functional.linear(x, copy_to_group(module.weight, group))

        module.forward = forward
        return module


def split_low_rank(first: nn.Module, second: nn.Module, of: nn.Module, mesh: DeviceMesh) -> None:
    """Split two linear layers like a split layer to whose output their product is added.

    Args:
        first: [rank, inputs], without bias; whole and equal on all ranks.
        second: [outputs, rank], in the same form.
        of: the layer, for which [`can_split_low_rank`] is true. If it is not split, they stay whole, too.
        mesh: mesh of the tensor-parallel group.
    """
    style = getattr(of, "tensor_parallel_style", None)
    if isinstance(style, TedRow):
        style.shard_param(first, "weight", mesh)
        style.install_forward(first, mesh)
    elif isinstance(style, TedColumn):
        style.shard_param(second, "weight", mesh)
        style.install_forward(second, mesh)  # the first layer of a block copies its input, and so does this one
        if not style.copies_input:
            TedBeforeColumn().install_forward(first, mesh)


def can_split_low_rank(layer: nn.Module) -> bool:
    """Whether the layer is a linear layer that is split by inputs, by outputs, or not at all."""
    style = getattr(layer, "tensor_parallel_style", None)
    return isinstance(layer, nn.Linear) and (style is None or isinstance(style, TedColumn | TedRow))


class TedBlockInput(TensorParallelLayer):
    """Attention: the input of its projections is copied to the group once for all of them."""

    def transform_inputs_pre_forward(self, module: nn.Module, args: Any, kwargs: Any, mesh: DeviceMesh) -> Any:
        return (copy_to_group(args[0], mesh.get_group()), *args[1:]), kwargs


class TedDecoderInput(TensorParallelLayer):
    """Decoder: the states that all its cross-attentions read are copied to the group once."""

    def transform_inputs_pre_forward(self, module: nn.Module, args: Any, kwargs: Any, mesh: DeviceMesh) -> Any:
        states = kwargs.get("encoder_hidden_states")
        if states is not None:
            kwargs = {**kwargs, "encoder_hidden_states": copy_to_group(states, mesh.get_group())}
        return args, kwargs


class TedUntiedPositions(TensorParallelLayer):
    """Untied positions: their scores for this rank's heads."""

    def install_forward(self, module: Any, mesh: DeviceMesh) -> nn.Module:
        module.num_heads //= mesh.size()
        return module


class TedVocabEmbedding(_LocalStyle):
    """Embedding split by words: each rank looks up its own words; the sum over ranks has all."""

    def placement(self, param: str) -> Placement:
        return Shard(0)

    def install_forward(self, module: Any, mesh: DeviceMesh) -> nn.Module:
        group = mesh.get_group()

        def forward(input_ids: Tensor) -> Tensor:
            weight_WD = _local(module.weight)
            first, num_words = group.rank() * weight_WD.shape[0], weight_WD.shape[0]
            ids = input_ids - first
            is_elsewhere = (ids < 0) | (ids >= num_words)
            padding = module.padding_idx - first if module.padding_idx is not None else -1
            own = nn.functional.embedding(
                ids.masked_fill(is_elsewhere, 0), weight_WD, padding if 0 <= padding < num_words else None
            )
            own = own.masked_fill(is_elsewhere.unsqueeze(-1), 0.0)
            return sum_over_group(own, group) * getattr(module, "embed_scale", 1.0)

        module.forward = forward
        return module


class TedVocabHead(_LocalStyle):
    """Head split by words. With gradients the logits stay split, as a DTensor; else all ranks get all logits.

    [`join_logits_without_loss`] joins split logits that the model's own loss does not use.
    """

    def placement(self, param: str) -> Placement:
        return Shard(0)

    def transform_inputs_pre_forward(self, module: nn.Module, args: Any, kwargs: Any, mesh: DeviceMesh) -> Any:
        return (copy_to_group(args[0], mesh.get_group()), *args[1:]), kwargs

    def transform_output_post_forward(self, module: nn.Module, output: Tensor, mesh: DeviceMesh) -> Tensor:
        shape = torch.Size((*output.shape[:-1], output.shape[-1] * mesh.size()))
        if torch.is_grad_enabled():
            stride = torch.empty(shape, device="meta").stride()
            return DTensor.from_local(output, mesh, [Shard(-1)], run_check=False, shape=shape, stride=stride)
        return _join_words(output, mesh.get_group())


def join_logits_without_loss(model: nn.Module) -> None:
    """Make the forward of a model with a [`TedVocabHead`] return whole logits if it computes no loss.

    A loss outside the model (`label_smoothing_factor` and `compute_loss_func` of the Trainer) takes ordinary tensors,
    the same on all ranks of the group. With labels the loss is the model's, and its logits stay split.
    """
    parameters = inspect.signature(type(model).forward)

    def join(module: nn.Module, args: Any, kwargs: Any, outputs: Any) -> Any:
        if parameters.bind_partial(module, *args, **kwargs).arguments.get("labels") is not None:
            return outputs
        if isinstance(outputs, tuple):
            return tuple(_whole_logits(output) for output in outputs)
        outputs["logits"] = _whole_logits(outputs["logits"])
        return outputs

    model.register_forward_hook(join, with_kwargs=True)


def _whole_logits(output: Any) -> Any:
    if not isinstance(output, DTensor):
        return output
    return _join_words(output.to_local(), output.device_mesh.get_group())


def _join_words(logits_W: Tensor, group: ProcessGroup) -> Tensor:
    """Gather the logits of all words on all ranks of the group, which then compute the same from them."""
    words_first = logits_W.flatten(0, -2).t()
    whole = join_shares(words_first, [logits_W.shape[-1]] * group.size(), group)
    return whole.t().reshape(*logits_W.shape[:-1], -1)


class _SplitCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropies of logits that are split by words; the logits are not gathered.

    As in `models.losses.summed_cross_entropy`, float32 numbers exist for some rows at a time.
    """

    backward = staticmethod(SummedCrossEntropy.backward)

    @staticmethod
    def forward(ctx: Any, logits_NW: Tensor, labels_N: Tensor, smoothing: float, group: ProcessGroup) -> Tensor:
        num_words = logits_NW.shape[-1]
        is_counted_N = labels_N != -100
        own_N = labels_N - group.rank() * num_words
        is_own_N = is_counted_N & (own_N >= 0) & (own_N < num_words)
        own_N = own_N.masked_fill(~is_own_N, 0)
        chunks = row_chunks(logits_NW)
        largest_N = max_over(torch.cat([logits_NW[rows].amax(dim=-1).float() for rows in chunks]), group)
        parts = []
        for rows in chunks:
            logits_CW = logits_NW[rows].float()
            target_C = logits_CW.gather(1, own_N[rows, None]).squeeze(1).masked_fill(~is_own_N[rows], 0.0)
            total_C = logits_CW.sum(dim=-1)
            sum_exp_C = (logits_CW - largest_N[rows, None]).exp_().sum(dim=-1)
            parts.append(torch.stack([sum_exp_C, target_C, total_C]))
        sum_exp_N, target_N, total_N = sum_over(torch.cat(parts, dim=1), group)
        log_partition_N = sum_exp_N.log() + largest_N
        vocab_size = num_words * group.size()
        loss_N = log_partition_N - (1.0 - smoothing) * target_N - smoothing * total_N / vocab_size
        hit_N = ((smoothing - 1.0) * is_own_N).float()
        ctx.save_for_backward(logits_NW, log_partition_N, own_N, hit_N, is_counted_N)
        ctx.share = smoothing / vocab_size
        return loss_N.masked_fill(~is_counted_N, 0.0).sum()


def vocab_parallel_cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Like `models.losses.summed_cross_entropy`, also for logits that [`TedVocabHead`] leaves split by words.

    Args:
        logits: float[..., vocab_size], a DTensor with its last dimension sharded, or a plain tensor.
        labels: int64[...], -100 for positions without loss.
        label_smoothing: share of the target that is spread over all words.

    Returns:
        float32 scalar, the sum over labels other than -100.
    """
    if not isinstance(logits, DTensor):
        return summed_cross_entropy(logits, labels, label_smoothing)
    group = logits.device_mesh.get_group()
    local = logits.to_local().flatten(0, -2)
    return _SplitCrossEntropy.apply(local, labels.flatten(), label_smoothing, group)


def _local(param: Any) -> Any:
    return LocalShard.apply(param) if isinstance(param, DTensor) else param


# ZCodeM3's plan names the styles of transformers, which work without this package; these styles replace them
STYLES = {
    "colwise": "ted_column",
    "rowwise": "ted_row",
    "embedding_rowwise": "ted_vocab_embedding",
    "colwise_gather_output": "ted_vocab_head",
}

_REGISTRY: Any = ALL_PARALLEL_STYLES
_REGISTRY.register("ted_column", TedColumn(copies_input=False))
_REGISTRY.register("ted_first_column", TedColumn(copies_input=True))
_REGISTRY.register("ted_row", TedRow())
_REGISTRY.register("ted_block_input", TedBlockInput())
_REGISTRY.register("ted_decoder_input", TedDecoderInput())
_REGISTRY.register("ted_untied_positions", TedUntiedPositions())
_REGISTRY.register("ted_vocab_embedding", TedVocabEmbedding())
_REGISTRY.register("ted_vocab_head", TedVocabHead())

__all__ = ["can_split_low_rank", "join_logits_without_loss", "split_low_rank", "vocab_parallel_cross_entropy"]
