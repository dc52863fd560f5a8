"""The script of what fits: its search, and that its published models are simulated as planned."""

import plan_simulation
import pytest
from plan_simulation import WAYS, fits, largest, largest_base, largest_total, layout_of, model_of, total


@pytest.mark.parametrize("limit", [0, 1, 7, 9, 10])
def test_largest(limit: int) -> None:
    assert largest(lambda number: number <= limit, 10) == limit


def test_largest_base_fits_and_the_next_does_not() -> None:
    (way,) = WAYS["experts + data"]
    found = largest_base(32, 40, way, offload=False)
    layout = layout_of(32, 16, way, offload=False)
    widths = [128 * n for n in range(1, 64) if fits(model_of(128 * n, 16), layout, 40)]
    assert found == total(model_of(widths[-1], 1))
    assert largest_base(32, 80, way, offload=False) > found
    assert largest_base(32, 40, way, offload=True) > found


def test_host_bounds_what_is_offloaded() -> None:
    """16 bytes per parameter of 128 GiB per GPU."""
    (way,) = WAYS["ZeRO 3"]
    most = largest_total(128, 80, way, offload=True)
    assert 0.9 < 16 * most / (128 * 128 * 2**30) <= 1


def test_simulated_ranks_are_as_planned(capsys: pytest.CaptureFixture[str]) -> None:
    plan_simulation.print_simulated()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if " on " in line]
    assert len(rows) == 6
    assert all(simulated == planned for _, _, _, simulated, planned, *_ in rows)
