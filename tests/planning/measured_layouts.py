"""What bench_ted.py measured on H200: models, layouts and batches of docs/ted.md and its records."""

from dataclasses import dataclass, field
from typing import Any

from hf_moe_ted import ZCodeM3Config
from hf_moe_ted.distributed.layout import Layout, sizes_of_axes
from hf_moe_ted.planning.workload import Checkpointing, Workload

# d_model, encoder and decoder layers, heads
BASES = {"0.6B": (1024, 24, 12, 16), "1.3B": (2048, 12, 6, 16), "2.3B": (3072, 12, 6, 24), "6.7B": (4096, 16, 11, 32)}
FULL, AWARE = "full", "communication-aware"


@dataclass(frozen=True)
class Line:
    """One line of a table.

    Attributes:
        sizes: of the axes, by the arguments of `sizes_of_axes`.
        options: other fields of a [`Layout`].
        measured: GiB, or milliseconds per step.
    """

    base: str
    num_experts: int
    num_gpus: int
    measured: float
    sizes: dict[str, int] = field(default_factory=dict)
    checkpointing: Checkpointing | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> ZCodeM3Config:
        d_model, encoder_layers, decoder_layers, num_heads = BASES[self.base]
        return ZCodeM3Config(
            vocab_size=128_000, d_model=d_model, encoder_layers=encoder_layers, decoder_layers=decoder_layers,
            encoder_ffn_dim=4 * d_model, decoder_ffn_dim=4 * d_model, encoder_attention_heads=num_heads,
            decoder_attention_heads=num_heads, num_experts=self.num_experts, capacity_factor=1.25,
            attention_dropout=0.0, max_position_embeddings=512,
        )  # fmt: skip

    @property
    def layout(self) -> Layout:
        sizes = self.sizes
        tp, ep, etp, dp = sizes_of_axes(self.num_gpus, sizes.get("tp", 1), sizes.get("ep", 1), sizes.get("etp"), None)
        return Layout(tp, dp, ep, etp, **self.options)

    @property
    def workload(self) -> Workload:
        batch_size, length = (64, 128) if self.base == "0.6B" else (16, 512)
        return Workload(batch_size, length, length, checkpointing=self.checkpointing)

    def __str__(self) -> str:
        named = [*self.sizes.items(), *self.options.items(), ("checkpointing", self.checkpointing)]
        shown = " ".join(f"{name}={value}" for name, value in named)
        return f"{self.base}x{self.num_experts} on {self.num_gpus} {shown}"
