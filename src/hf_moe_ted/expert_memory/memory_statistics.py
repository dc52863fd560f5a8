"""What a cache of experts did."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertMemoryStatistics:
    """Counts since the model was loaded, or since they were set back.

    An expert counts once for each call of a layer that needs it. Layers all of whose experts are on the device count
    their calls only: nothing looks which experts they need.

    Attributes:
        num_calls: of MoE layers.
        num_calls_all_resident: of those, of layers all of whose experts are on the device.
        num_hits: experts that were on the device when they were needed.
        num_misses: experts that were not, and were copied there.
        num_streamed: of the misses, those that passed through: the layer needed more than its share of the memory.
        num_prefetched: of the hits, those that were copied while the layer before computed.
        num_on_cpu: experts that were not on the device, and were computed by the processor.
        num_bytes_copied: to the device, what was not needed then included.
        wait_s: seconds for which the computation waited for experts.
        num_bytes_resident: that experts take on the device, at most.
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
        """Share of the needed experts that were on the device; 1 if none was looked for."""
        num_needed = self.num_hits + self.num_misses + self.num_on_cpu
        return self.num_hits / num_needed if num_needed else 1.0

    def __str__(self) -> str:
        num_needed = self.num_hits + self.num_misses + self.num_on_cpu
        return (
            f"experts on the device: {self.num_bytes_resident / 1e9:.2f} GB, hits {self.hit_rate:.1%} of "
            f"{num_needed:,}, copied {self.num_bytes_copied / 1e9:.2f} GB, waited {self.wait_s:.2f} s"
        )


__all__ = ["ExpertMemoryStatistics"]
