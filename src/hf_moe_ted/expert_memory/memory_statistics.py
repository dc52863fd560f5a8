"""Statistics of an expert cache."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertMemoryStatistics:
    """Counts since the model was loaded, or since the last reset.

    An expert counts once for each call of a layer that needs it. A layer with all experts on the device only counts its
    calls, because its needed experts are not determined.

    Attributes:
        num_calls: calls of MoE layers.
        num_calls_all_resident: the part of these calls of layers with all experts on the device.
        num_hits: needed experts that were on the device.
        num_misses: needed experts that were not on the device and were copied.
        num_streamed: the part of the misses that passed through, because the layer needed more than its memory.
        num_prefetched: the part of the hits that were copied while the previous layer computed.
        num_on_cpu: needed experts that were not on the device and were computed by the CPU.
        num_bytes_copied: bytes copied to the device, also for experts that were then not needed.
        wait_s: seconds for which the computation waited for experts.
        num_bytes_resident: most bytes of experts on the device.
    """

    num_calls: int
    num_calls_all_resident: int
    num_hits: int
    num_misses: int
    num_streamed: int
    num_prefetched: int
    num_on_cpu: int
    num_bytes_copied: int
    wait_s: float
    num_bytes_resident: int

    @property
    def hit_rate(self) -> float:
        """Share of the needed experts that were on the device; 1 if none was needed."""
        num_needed = self.num_hits + self.num_misses + self.num_on_cpu
        return self.num_hits / num_needed if num_needed else 1.0

    def __str__(self) -> str:
        num_needed = self.num_hits + self.num_misses + self.num_on_cpu
        return (
            f"experts on the device: {self.num_bytes_resident / 1e9:.2f} GB, hits {self.hit_rate:.1%} of "
            f"{num_needed:,}, copied {self.num_bytes_copied / 1e9:.2f} GB, waited {self.wait_s:.2f} s"
        )


__all__ = ["ExpertMemoryStatistics"]
