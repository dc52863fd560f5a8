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


PADDED = {"pad_expert_input_to_capacity": True}
ALL_SENT = PADDED | {"duplicate_token_dropping": False}
TP2_EP2 = {"tp": 2, "ep": 2}


def _four_ways(base: str, num_experts: int, milliseconds: tuple[float, float, float, float]) -> list[Line]:
    """Neither, communication-aware checkpointing, duplicate token dropping, both."""
    ways: list[tuple[Checkpointing, dict[str, Any]]] = [
        (FULL, ALL_SENT),
        (AWARE, ALL_SENT),
        (FULL, PADDED),
        (AWARE, PADDED),
    ]
    return [
        Line(base, num_experts, 4, measured, TP2_EP2, checkpointing, options)
        for measured, (checkpointing, options) in zip(milliseconds, ways, strict=True)
    ]


# milliseconds per step as one CUDA graph, H200, 2026-11-28
ON_NVLINK = [
    Line("0.6B", 16, 1, 111.8),
    Line("0.6B", 16, 2, 107.5, {"ep": 2}, None, PADDED),
    Line("0.6B", 16, 4, 99.2, {"ep": 4}, None, PADDED),
    *_four_ways("1.3B", 16, (151.7, 142.7, 153.6, 143.5)),
    Line("1.3B", 16, 4, 147.2, TP2_EP2, AWARE, PADDED | {"zero_stage": 3}),
    Line("1.3B", 16, 4, 172.7, {"ep": 4}, AWARE, PADDED),
    *_four_ways("2.3B", 8, (232.3, 220.1, 234.4, 221.7)),
    *_four_ways("6.7B", 8, (492.1, 471.9, 495.6, 472.8)),
]
# NVLink inside of pairs, sockets between them; and everything through the memory of the host
ON_TWO_EMULATED_MACHINES = _four_ways("1.3B", 16, (704.4, 630.1, 599.8, 569.2))
THROUGH_HOST_MEMORY = _four_ways("1.3B", 16, (434.0, 342.5, 444.1, 349.1))
# nothing was fitted on these: two H200 of another day (ted_across_h200_2026-11-30.md), the second on sockets
TWO_ON_NVLINK = [
    Line("1.3B", 16, 2, 173.1, {"ep": 2}, None, PADDED),
    Line("1.3B", 16, 2, 134.1, {"tp": 2}),
    Line("1.3B", 16, 2, 197.4),
    Line("1.3B", 16, 2, 211.0, {}, None, {"zero_stage": 3}),
]
ONE_ON_EACH_EMULATED_MACHINE = [
    Line("1.3B", 16, 2, 656, {"ep": 2}, None, PADDED),
    Line("1.3B", 16, 2, 2817, {}, None, {"zero_stage": 3}),
]
