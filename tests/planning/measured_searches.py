"""What was measured of decoding on an H200, and how many experts the same searches choose, counted on a CPU.

Times are those of translation_speed_h200_2026-11-30.md, quantized_experts_h200_2026-11-30.md and
one_machine_h200_2026-11-30.md in docs/benchmarks, counts those of count_experts_cpu_2026-11-30.md.
"""

from dataclasses import dataclass
from typing import Any

from measured_layouts import Line

from hf_moe_ted import ZCodeM3Config
from hf_moe_ted.planning.gpus import GPUS
from hf_moe_ted.planning.serving_memory import ServingWorkload, default_bits, resident_experts, weight_bytes
from hf_moe_ted.planning.serving_time import time_of_source, time_of_token, zipf_of_experts

CONFIG_0_6B = Line("0.6B", 16, 1, 0.0).config
# the shape of NLLB-MoE with 8 + 8 layers
CONFIG_NLLB_MOE = ZCodeM3Config(
    vocab_size=256_206, d_model=2048, encoder_layers=8, decoder_layers=8, encoder_ffn_dim=8192, decoder_ffn_dim=8192,
    encoder_attention_heads=16, decoder_attention_heads=16, num_experts=128, num_experts_per_tok=2,
    encoder_sparse_step=4, decoder_sparse_step=4, max_position_embeddings=1024,
    normalize_router_weights="after_dropping",
)  # fmt: skip
SOURCE, LONG = 32, 48  # tokens; steps are the difference of generations of 48 and 16


@dataclass(frozen=True)
class Search:
    """A step of a search.

    Attributes:
        measured: milliseconds.
        experts: different experts of a layer that a step chose, counted; `None` if rows are taken to choose evenly.
    """

    config: ZCodeM3Config
    batch_size: int
    num_beams: int
    is_captured: bool
    measured: float
    experts: float | None = None

    @property
    def workload(self) -> ServingWorkload:
        zipf = 0.0
        if self.experts is not None:
            [num_experts] = {*self.config.num_experts_per_layer("decoder").values()}
            rows = self.batch_size * self.num_beams
            zipf = zipf_of_experts(num_experts, self.config.num_experts_per_tok, rows, self.experts)
        return ServingWorkload(
            self.batch_size, self.num_beams, SOURCE, LONG + 16, cuda_graphs=self.is_captured, zipf=zipf
        )

    def __str__(self) -> str:
        how = "captured" if self.is_captured else "step by step"
        return f"{self.config.num_experts} experts, {self.batch_size} sentences, {self.num_beams} beams, {how}"


CAPTURED = [
    Search(CONFIG_0_6B, 1, 4, True, 1.21, 1.7),
    Search(CONFIG_0_6B, 16, 4, True, 1.45, 3.5),
    Search(CONFIG_0_6B, 64, 4, True, 1.79, 5.8),
    Search(CONFIG_0_6B, 1, 1, True, 1.12, 1.0),
    Search(CONFIG_0_6B, 16, 1, True, 1.13, 2.3),
    Search(CONFIG_0_6B, 64, 1, True, 1.61, 3.6),
]
# nothing is fitted on them
NLLB_MOE = [
    Search(CONFIG_NLLB_MOE, 1, 4, True, 1.47, 5.9),
    Search(CONFIG_NLLB_MOE, 16, 4, True, 2.11, 20.9),
    Search(CONFIG_NLLB_MOE, 1, 1, True, 1.28, 2.0),
    Search(CONFIG_NLLB_MOE, 16, 1, True, 1.72, 11.5),
]
# two runs
STEP_BY_STEP = [
    *(Search(CONFIG_0_6B, size, 4, False, ms) for size, ms in ((1, 13.16), (16, 24.50), (64, 20.45))),
    *(Search(CONFIG_0_6B, size, 4, False, ms) for size, ms in ((1, 12.3), (16, 10.3), (64, 17.0))),
]


@dataclass(frozen=True)
class OneMachine:
    """NLLB-MoE's layout with experts of 4 bits, greedy, step by step: milliseconds of a step, and of the first token.

    Attributes:
        expert_memory: bytes of experts on the GPU, `None` for all.
    """

    batch_size: int
    expert_memory: int | None
    measured_prefill: float
    measured_step: float
    zipf_of_source: float = 1.1  # of the routers that the model was made with
    zipf_of_token: float = 2.0

    def _arguments(self, zipf: float) -> tuple[tuple[Any, ...], dict[str, Any]]:
        config = replace_layers(CONFIG_NLLB_MOE, 24)
        stored = default_bits(config, 4, "experts")
        weights = weight_bytes(config, stored)
        workload = ServingWorkload(self.batch_size, 1, 128, 32, cuda_graphs=False, zipf=zipf)
        residence = resident_experts(weights, self.expert_memory)
        return (config, workload, GPUS["h200-141gb"], weights, stored), {"residence": residence}

    @property
    def step_ms(self) -> float:
        arguments, options = self._arguments(self.zipf_of_token)
        return 1e3 * time_of_token(*arguments, **options).total

    @property
    def prefill_ms(self) -> float:
        """Of the encoder and the first step."""
        arguments, options = self._arguments(self.zipf_of_source)
        return 1e3 * time_of_source(*arguments, **options) + self.step_ms

    def __str__(self) -> str:
        where = "all" if self.expert_memory is None else f"{self.expert_memory / 1e9:.1f} GB of"
        return f"NLLB-MoE's layout, {where} experts in int4 on the GPU, {self.batch_size} sentences"


def replace_layers(config: ZCodeM3Config, num_layers: int) -> ZCodeM3Config:
    """As many on each side."""
    return ZCodeM3Config(**{**config.to_diff_dict(), "encoder_layers": num_layers, "decoder_layers": num_layers})


IN_24_GB = 15_600_000_000
ONE_MACHINE = [
    OneMachine(1, None, 65.1, 28.5),
    OneMachine(32, None, 59.0, 23.9),
    OneMachine(1, IN_24_GB, 83.4, 27.2),
    OneMachine(32, IN_24_GB, 84.9, 22.3),
]


@dataclass(frozen=True)
class ExpertCall:
    """One layer's experts, of top-2 random routing: milliseconds of each way.

    Attributes:
        num_slots: (token, expert) pairs.
        floats, int4, int8: in kernels.
        loop_int4, loop_int8: over experts, one after the other.
    """

    num_experts: int
    d_model: int
    num_slots: int
    floats: float
    int4: float
    int8: float
    loop_int4: float
    loop_int8: float

    def measured(self, bits: int) -> float:
        """In kernels; 16 bits are floats."""
        return {16: self.floats, 8: self.int8, 4: self.int4}[bits]

    def measured_loop(self, bits: int) -> float:
        return {8: self.loop_int8, 4: self.loop_int4}[bits]


EXPERT_CALLS = [
    ExpertCall(16, 1024, 2, 0.021, 0.014, 0.017, 1.30, 0.97),
    ExpertCall(16, 1024, 8, 0.051, 0.026, 0.030, 3.93, 3.82),
    ExpertCall(16, 1024, 64, 0.178, 0.046, 0.066, 11.1, 4.75),
    ExpertCall(128, 2048, 2, 0.052, 0.025, 0.031, 1.15, 0.94),
    ExpertCall(128, 2048, 8, 0.169, 0.059, 0.087, 4.03, 2.62),
    ExpertCall(128, 2048, 64, 1.613, 0.294, 0.449, 24.5, 16.0),
]
