"""DeepSpeed's own MoE in M2M100, as its users build it: the peer of `bench_ted.py`.

With expert parallelism alone, or with DeepSpeed-TED, its tensor-expert-data parallelism
(https://arxiv.org/abs/2303.06318): a Megatron-style `mpu` tells DeepSpeed the tensor groups; attention, feed-forwards,
experts, embeddings, head and loss are split over them as in Megatron-LM (https://arxiv.org/abs/1909.08053, section 3);
and DeepSpeed drops duplicate tokens before its all-to-all.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers.models.m2m_100.modeling_m2m_100 import shift_tokens_right

__all__ = ["deepspeed_step"]


class ModelParallelUnit:
    """What DeepSpeed asks of an `mpu`: tensor groups of consecutive ranks, and data groups across them."""

    def __init__(self, tensor_parallel_size: int, device_type: str) -> None:
        shape = (dist.get_world_size() // tensor_parallel_size, tensor_parallel_size)
        mesh = init_device_mesh(device_type, shape, mesh_dim_names=("data", "tensor"))
        self._data_group, self._tensor_group = mesh.get_group("data"), mesh.get_group("tensor")

    def __deepcopy__(self, memo: dict[int, Any]) -> "ModelParallelUnit":
        return self  # DeepSpeed copies the expert, which holds the unit; process groups cannot be copied

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._tensor_group

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self._tensor_group)

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self._tensor_group)

    # without pipelines, model parallelism is tensor parallelism
    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._data_group

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self._data_group)

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self._data_group)


class CopyToTensorGroup(torch.autograd.Function):
    """Megatron-LM's f: the identity, whose gradient is summed over the tensor group."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient = gradient.contiguous()  # in place, as Megatron-LM: products made it, and nobody else has it
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class SumOverTensorGroup(torch.autograd.Function):
    """Megatron-LM's g: the sum over the tensor group, whose gradient is the identity."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        dist.all_reduce(hidden, group=group)
        ctx.mark_dirty(hidden)
        return hidden

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class RowParallelLinear(nn.Module):
    """This rank's columns of a linear layer's weight, for what a column-parallel layer gives; the output is whole."""

    def __init__(self, linear: nn.Linear, mpu: ModelParallelUnit) -> None:
        super().__init__()
        self.weight, self.bias, self.mpu = shard_of(linear.weight, 1, mpu), linear.bias, mpu

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        partial_sums = nn.functional.linear(hidden, self.weight)
        return SumOverTensorGroup.apply(partial_sums, self.mpu.get_model_parallel_group()) + self.bias


class VocabParallelEmbedding(nn.Module):
    """This rank's words of an embedding; the output is whole."""

    def __init__(self, embedding: Any, mpu: ModelParallelUnit) -> None:
        super().__init__()
        self.weight, self.scale, self.mpu = shard_of(embedding.weight, 0, mpu), embedding.embed_scale, mpu

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        local_ids, elsewhere = local_words(ids, self.weight.shape[0], self.mpu)
        hidden = nn.functional.embedding(local_ids, self.weight) * self.scale
        hidden = hidden.masked_fill(elsewhere.unsqueeze(-1), 0.0)
        return SumOverTensorGroup.apply(hidden, self.mpu.get_model_parallel_group())


class VocabParallelCrossEntropy(torch.autograd.Function):
    """Mean cross entropy of logits `[..., local words]` for labels `[...]`, as Megatron-LM's: in float32."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, mpu: ModelParallelUnit) -> torch.Tensor:
        group = mpu.get_model_parallel_group()
        local_labels, elsewhere = local_words(labels, logits.shape[-1], mpu)
        largest = logits.amax(-1, keepdim=True).float()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        shifted = logits.float() - largest
        label_logits = shifted.gather(-1, local_labels.unsqueeze(-1)).squeeze(-1).masked_fill(elsewhere, 0.0)
        dist.all_reduce(label_logits, group=group)
        probabilities = shifted.exp_()
        partition = probabilities.sum(-1, keepdim=True)
        dist.all_reduce(partition, group=group)
        ctx.save_for_backward(probabilities.div_(partition), local_labels, elsewhere)
        ctx.dtype = logits.dtype
        return (partition.squeeze(-1).log() - label_logits).mean()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits_gradient, local_labels, elsewhere = ctx.saved_tensors
        here = elsewhere.logical_not().unsqueeze(-1).to(logits_gradient.dtype)
        logits_gradient.scatter_add_(-1, local_labels.unsqueeze(-1), -here)
        return logits_gradient.mul_(gradient / local_labels.numel()).to(ctx.dtype), None, None


def local_words(ids: torch.Tensor, num_local: int, mpu: ModelParallelUnit) -> tuple[torch.Tensor, torch.Tensor]:
    """Where words are among this rank's, and which are not (those point at its first)."""
    local_ids = ids - mpu.get_model_parallel_rank() * num_local
    elsewhere = (local_ids < 0) | (local_ids >= num_local)
    return local_ids.masked_fill(elsewhere, 0), elsewhere


def shard_of(parameter: nn.Parameter, dim: int, mpu: ModelParallelUnit) -> nn.Parameter:
    chunks = parameter.detach().chunk(mpu.get_model_parallel_world_size(), dim)
    return nn.Parameter(chunks[mpu.get_model_parallel_rank()].clone(memory_format=torch.contiguous_format))


def make_column_parallel(linear: nn.Linear, mpu: ModelParallelUnit) -> None:
    """Leave this rank's rows; `copy_inputs_of` the layer, or of what holds it, must go with it."""
    linear.weight = shard_of(linear.weight, 0, mpu)
    if linear.bias is not None:
        linear.bias = shard_of(linear.bias, 0, mpu)
    linear.out_features = linear.weight.shape[0]


def copy_inputs_of(module: nn.Module, mpu: ModelParallelUnit) -> None:
    """Apply f to the inputs of a module: once for query, key and value together, as a fused projection would."""
    module.register_forward_pre_hook(partial(_copied, mpu), with_kwargs=True)


def _copied(mpu: ModelParallelUnit, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    group = mpu.get_model_parallel_group()
    names = [name for name in ("hidden_states", "key_value_states") if kwargs.get(name) is not None]
    copies = {name: CopyToTensorGroup.apply(kwargs[name], group) for name in names}
    return tuple(CopyToTensorGroup.apply(hidden, group) for hidden in args), {**kwargs, **copies}


def make_tensor_parallel(model: Any, mpu: ModelParallelUnit) -> None:
    """Split M2M100 over the tensor group, in place; what `install_experts` has put there is split already."""
    for layer in (*model.model.encoder.layers, *model.model.decoder.layers):
        split_attention(layer.self_attn, mpu)
        if hasattr(layer, "encoder_attn"):
            split_attention(layer.encoder_attn, mpu)
        if isinstance(layer.fc1, nn.Linear):
            split_feed_forward(layer, mpu)
    embedding = VocabParallelEmbedding(model.get_input_embeddings(), mpu)
    model.set_input_embeddings(embedding)
    model.lm_head.weight = embedding.weight
    copy_inputs_of(model.lm_head, mpu)


def split_attention(attention: Any, mpu: ModelParallelUnit) -> None:
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        make_column_parallel(projection, mpu)
    copy_inputs_of(attention, mpu)
    attention.out_proj = RowParallelLinear(attention.out_proj, mpu)
    attention.num_heads //= mpu.get_model_parallel_world_size()


def split_feed_forward(module: Any, mpu: ModelParallelUnit) -> None:
    make_column_parallel(module.fc1, mpu)
    copy_inputs_of(module.fc1, mpu)
    module.fc2 = RowParallelLinear(module.fc2, mpu)


class Expert(nn.Module):
    """A feed-forward with the weights of one, or this rank's shard of it."""

    def __init__(self, fc1: nn.Linear, fc2: nn.Linear, mpu: ModelParallelUnit | None) -> None:
        super().__init__()
        self.fc1, self.fc2 = fc1, fc2
        if mpu is not None:
            split_feed_forward(self, mpu)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.relu(self.fc1(hidden)))


class MoEFeedForward(MoE):
    """DeepSpeed's layer without the router's loss and counts."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden)[0]


def install_experts(layer: Any, num_experts: int, expert_parallel_size: int, mpu: ModelParallelUnit | None) -> None:
    """Put a MoE in place of a layer's feed-forward; DeepSpeed makes all experts copies of it."""
    layer.fc1 = MoEFeedForward(
        layer.embed_dim, Expert(layer.fc1, layer.fc2, mpu), num_experts=num_experts, ep_size=expert_parallel_size, k=1,
        capacity_factor=1.25, enable_expert_tensor_parallelism=mpu is not None,
    ).to(layer.fc2.weight)  # fmt: skip
    layer.activation_fn = layer.fc2 = nn.Identity()


def deepspeed_step(
    model: Any,
    *,
    num_experts: int,
    tensor_parallel_size: int,
    expert_parallel_size: int,
    checkpointing: bool,
    batch_size: int,
    length: int,
) -> tuple[Callable[[], torch.Tensor], int]:
    """A training step in bfloat16 with ZeRO-1, and the number of batches that all processes take in it.

    Args:
        model: M2M100 in bfloat16, on its device and the same on all ranks. Every second layer gets experts, in place.
        batch_size, length: of a data-parallel rank.
    """
    deepspeed.init_distributed(verbose=False)
    device = model.device
    mpu = ModelParallelUnit(tensor_parallel_size, device.type) if tensor_parallel_size > 1 else None
    for layer in (*model.model.encoder.layers[1::2], *model.model.decoder.layers[1::2]):
        install_experts(layer, num_experts, expert_parallel_size, mpu)
    if mpu is not None:
        make_tensor_parallel(model, mpu)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    groups = split_params_into_different_moe_groups_for_optimizer(
        {"params": list(model.parameters()), "name": "parameters"}
    )
    settings = {
        "train_micro_batch_size_per_gpu": batch_size, "gradient_accumulation_steps": 1, "steps_per_print": 10**6,
        "bf16": {"enabled": True}, "gradient_clipping": 0.0,  # as in our cases, so nobody needs the norm
        "zero_optimization": {"stage": 1, "compute_grad_norm": False},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True, "fused": True}},
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=settings, mpu=mpu)
    data_rank = dist.get_rank() // tensor_parallel_size
    torch.manual_seed(data_rank)  # ranks of a tensor group drop the same activations and the same tokens
    generator = torch.Generator().manual_seed(data_rank)
    ids = torch.randint(10, model.config.vocab_size, (batch_size, length), generator=generator).to(device)
    mask = torch.ones_like(ids)
    decoder_ids = shift_tokens_right(ids, model.config.pad_token_id, model.config.decoder_start_token_id)

    def loss_of_batch() -> torch.Tensor:
        if mpu is None:
            return engine(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss
        logits = engine(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder_ids, use_cache=False).logits
        return VocabParallelCrossEntropy.apply(logits, ids, mpu)

    def step() -> torch.Tensor:
        loss = loss_of_batch()
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step, dist.get_world_size() // tensor_parallel_size
