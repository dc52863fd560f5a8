"""Plans of transformers that say, by module name, how the weights of a stack are split over devices."""

import re
from collections.abc import Iterator

from torch import nn

from .attention import ZCodeM3Attention
from .experts import ZCodeM3Experts
from .moe_layer import ZCodeM3DenseFFN


def tensor_parallel_plan(stack: nn.Module) -> dict[str, str]:
    """Styles of the stack's dense layers and of the embedding."""
    plan = {"embed_tokens": "embedding_rowwise"}
    for rule, module in _modules_by_rule(stack):
        if isinstance(module, ZCodeM3Attention):
            plan |= {f"{rule}.{part}_proj": "colwise" for part in "qkv"} | {f"{rule}.out_proj": "rowwise"}
        elif isinstance(module, ZCodeM3DenseFFN):
            plan |= {f"{rule}.fc1": "colwise", f"{rule}.fc2": "rowwise"}
    return plan


def expert_parallel_plan(stack: nn.Module) -> dict[str, str]:
    """Styles of the stack's experts and their parameters."""
    plan: dict[str, str] = {}
    for rule, module in _modules_by_rule(stack):
        if isinstance(module, ZCodeM3Experts):
            plan |= {f"{rule}.{name}": "grouped_gemm" for name, _ in module.named_parameters()}
            plan[rule] = "ep_dispatch_experts"
    return plan


def _modules_by_rule(stack: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module with its name, in which each number is replaced by `*`."""
    for name, module in stack.named_modules():
        yield re.sub(r"\.\d+(?=\.)", ".*", name), module


__all__ = ["expert_parallel_plan", "tensor_parallel_plan"]
