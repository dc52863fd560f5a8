"""Models in folders whose experts are brought when they are needed, and the same with all of them in memory."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_moe_ted import ExpertMemory, ZCodeM3ForConditionalGeneration, quantize_experts

MakeModel = Callable[..., ZCodeM3ForConditionalGeneration]
KINDS = ("float32", "bfloat16", "int8", "int8 in bfloat16", "int4", "int4 in bfloat16")


@pytest.fixture(name="poisoned_memory")
def _poisoned_memory() -> Iterator[None]:
    """New tensors are full of NaN: slots that hold no expert must not reach anything."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def save(model: Any, kind: str, folder: Path) -> Path:
    """The folder of a model in one of `KINDS`; it is made if it is not there."""
    path = folder / kind.replace(" ", "_")
    if path.is_dir():
        return path
    dtype = torch.bfloat16 if "bfloat16" in kind else torch.float32
    full = folder / f"full_{str(dtype).removeprefix('torch.')}"
    if not full.is_dir():
        model.to(dtype).save_pretrained(full)
    if kind.startswith("int"):
        quantize_experts(full, int(kind[3]), output_dir=path)
        return path
    return full


def num_bytes_of_an_expert(folder: Path) -> int:
    """The largest of a model, as it is stored."""
    model: Any = load(folder, dtype="auto")
    return max(
        sum(stack.nbytes for stack in module.parameters()) // module.num_experts
        for name, module in model.named_modules()
        if name.endswith(".experts")
    )


def load(folder: Path, memory: ExpertMemory | None = None, **options: Any) -> Any:
    return ZCodeM3ForConditionalGeneration.from_pretrained(folder, expert_memory=memory, **{"dtype": "auto"} | options)


def tokens(num_sentences: int = 5, length: int = 9, seed: int = 2) -> Tensor:
    return torch.randint(4, 270, (num_sentences, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def outputs_of(model: Any, ids: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Logits and generated tokens."""
    ids = ids.to(model.device)
    logits = model(input_ids=ids, decoder_input_ids=ids.flip(0)).logits
    generated = model.generate(input_ids=ids, **{"num_beams": 2, "max_new_tokens": 5, "do_sample": False} | options)
    return logits, generated


def require_same(model: Any, expected: Any, *batches: Tensor, **options: Any) -> None:
    """Bit for bit, batch after batch, what the other model computes."""
    for ids in batches:
        for mine, theirs in zip(outputs_of(model, ids, **options), outputs_of(expected, ids, **options), strict=True):
            assert torch.equal(mine, theirs), (ids.shape, (mine.float() - theirs.float()).abs().max())
