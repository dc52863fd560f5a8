"""The former place of the metrics: `metric_path` can still be imported from here."""

from .evaluation.metrics import METRICS, metric_path

__all__ = ["METRICS", "metric_path"]
