"""Translation metrics that `evaluate.load(metric_path(name))` loads and runs without network access."""

from pathlib import Path

METRICS = ("chrf", "length_ratio", "off_target", "sacrebleu")


def metric_path(name: str) -> str:
    """Folder of the metric `name`, for `evaluate.load`.

    Raises:
        ValueError: `name` is not one of `METRICS`.
    """
    if name not in METRICS:
        raise ValueError(f"Unknown metric {name!r}, expected one of: {', '.join(METRICS)}")
    return str(Path(__file__).parent / name)
