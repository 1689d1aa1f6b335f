"""What a server counts, for Prometheus; numbers only, nothing of a picture."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "dlfer_requests", "Requests that were answered.", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "dlfer_request_seconds",
            "Seconds from the head of a request to the end of its answer.",
            ["route"],
            buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
            registry=self.registry,
        )
        self.faces = Counter("dlfer_faces", "Faces that were predicted.", ["model"], registry=self.registry)
        self.batch = Histogram(
            "dlfer_batch_images",
            "Images, or crops, that were predicted together.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
            registry=self.registry,
        )
        self.waiting = Gauge("dlfer_requests_in_progress", "Requests begun and not answered.", registry=self.registry)

    def write(self) -> bytes:
        """Return all of them in Prometheus' text format."""
        return generate_latest(self.registry)
