"""Metrics of a server for Prometheus; they contain no text of users."""

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

METRICS_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class ServerMetrics:
    """Metrics of one app, in their own registry."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        labels = ("endpoint", "status")
        self.requests = Counter("hf_moe_ted_requests", "Requests that were answered.", labels, registry=self._registry)
        self.seconds = Histogram(
            "hf_moe_ted_request_seconds",
            "From the head of a request to the end of its answer.",
            ("endpoint",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.characters = Counter("hf_moe_ted_characters", "Characters of translated texts.", registry=self._registry)
        self.in_flight = Gauge("hf_moe_ted_requests_in_flight", "Requests in progress.", registry=self._registry)
        self.waiting = Gauge(
            "hf_moe_ted_waiting_characters", "Characters that wait for the model.", registry=self._registry
        )

    def shown(self) -> bytes:
        """The metrics in the text format of Prometheus."""
        return generate_latest(self._registry)


__all__ = ["METRICS_TYPE", "ServerMetrics"]
