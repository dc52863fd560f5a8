"""Where the metrics stood before: `metric_path` is imported from here."""

from .evaluation.metrics import METRICS, metric_path

__all__ = ["METRICS", "metric_path"]
