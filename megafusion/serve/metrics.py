"""Figures of a server for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        name = "megafusion_{}".format
        self.requests = Counter(
            name("requests"), "Requests answered or refused.", ["path", "status"], registry=registry
        )
        self.seconds = Histogram(
            name("request_seconds"),
            "Time from a request's first byte to the last of its answer.",
            ["path"],
            buckets=SECONDS,
            registry=registry,
        )
        self.waiting = Gauge(name("waiting"), "Requests that wait for a batch.", registry=registry)
        self.batch_rows = Histogram(
            name("batch_rows"),
            "Answers that are generated together.",
            ["kind"],
            buckets=ROWS,
            registry=registry,
        )
        self.tokens = Counter(name("tokens"), "Text tokens sampled.", registry=registry)
        self.images = Counter(name("images"), "Images drawn.", registry=registry)
        self.denoising_steps = Counter(
            name("denoising_steps"), "Denoising steps, one an image.", registry=registry
        )
