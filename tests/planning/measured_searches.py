"""What was measured of decoding on an H200: docs/benchmarks/translation_speed_h200 and quantized_experts_h200."""

from dataclasses import dataclass

from measured_layouts import Line

from hf_moe_ted import ZCodeM3Config
from hf_moe_ted.planning.serving_memory import ServingWorkload

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
    """

    config: ZCodeM3Config
    batch_size: int
    num_beams: int
    is_captured: bool
    measured: float

    @property
    def workload(self) -> ServingWorkload:
        return ServingWorkload(self.batch_size, self.num_beams, SOURCE, LONG + 16, cuda_graphs=self.is_captured)

    def __str__(self) -> str:
        how = "captured" if self.is_captured else "step by step"
        return f"{self.config.num_experts} experts, {self.batch_size} sentences, {self.num_beams} beams, {how}"


CAPTURED = [
    Search(CONFIG_0_6B, 1, 4, True, 1.21),
    Search(CONFIG_0_6B, 16, 4, True, 1.45),
    Search(CONFIG_0_6B, 64, 4, True, 1.85),
    Search(CONFIG_0_6B, 1, 1, True, 1.19),
    Search(CONFIG_0_6B, 16, 1, True, 1.19),
    Search(CONFIG_0_6B, 64, 1, True, 1.60),
]
# the first version, by PyTorch's operations: nothing is fitted on it
NLLB_MOE = Search(CONFIG_NLLB_MOE, 16, 4, True, 2.62)
STEP_BY_STEP = [
    *(Search(CONFIG_0_6B, size, 4, False, ms) for size, ms in ((1, 12.32), (16, 10.30), (64, 17.04))),
    *(Search(CONFIG_0_6B, size, 4, False, ms) for size, ms in ((1, 22.42), (16, 11.68), (64, 16.17))),
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


EXPERT_CALLS = [
    ExpertCall(16, 1024, 2, 0.021, 0.014, 0.017, 1.13, 0.86),
    ExpertCall(16, 1024, 8, 0.053, 0.027, 0.031, 3.42, 2.15),
    ExpertCall(16, 1024, 64, 0.177, 0.101, 0.097, 7.17, 5.02),
    ExpertCall(128, 2048, 2, 0.052, 0.025, 0.031, 1.22, 0.79),
    ExpertCall(128, 2048, 8, 0.168, 0.063, 0.087, 3.95, 2.64),
    ExpertCall(128, 2048, 64, 1.575, 0.598, 0.585, 23.7, 17.9),
]
