"""Metrics of this process, for Prometheus.

One `Telemetry` per process, given by constructor to those who count. What has a state of its own
(a gauge) is not told: it is looked at when somebody scrapes, see `watch`. No label ever holds a
runner, a key or a run: each value would be a time series of its own, for ever.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from auth.errors import AuthError
from broker.errors import BrokerError, code_of

NAMESPACE = "bakeoff_queue"
LOOP_TICK_S = 0.1
KIB, MIB = 1024, 1024 * 1024
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
WAITS_S = (0.1, 1, 10, 60, 300, 900, 3600, 4 * 3600, 24 * 3600, 7 * 24 * 3600)
LAGS_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900)
BYTES = (16 * KIB, 64 * KIB, 256 * KIB, MIB, 2 * MIB, 4 * MIB, 8 * MIB, 16 * MIB, 34 * MIB)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)
# Gauges that are looked at, not told: name -> what it is.
WATCHED = {
    "waiters": "Claims that are parked until there is a run for them.",
    "http_connections": "Connections of clients.",
    "http_in_flight": "Requests that are being answered.",
    "breaker_open": "1 while the sweep is held because most leases are overdue at once.",
    "listener_connected": "1 while the expired events of every Redis primary are heard.",
    "trust_root_age_seconds": "Age of the Sigstore trust root in use.",
}


class Telemetry:
    """The counters, by name, in a registry of their own."""

    def __init__(self, version: str) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        Info("build", "The version that runs.", namespace=NAMESPACE, registry=self._registry).info(
            {"version": version}
        )
        self.requests = self._counter(
            "http_requests", "Requests answered.", "route", "method", "status"
        )
        self.request_seconds = self._histogram(
            "http_request_duration_seconds", "From a request's headers to its answer; a claim's"
            " includes its wait.", SECONDS, "route",
        )  # fmt: skip
        self.turned_away = self._counter(
            "http_connections_turned_away", "Connections that were not kept, or not accepted yet.",
            "reason",
        )  # fmt: skip
        self.auth_failures = self._counter("auth_failures", "Answers 401 and 403.", "reason")
        self.rate_limited = self._counter("rate_limited", "Answers 429, by route.", "route")
        self.claims = self._counter("claims", "Claims, by what came of them.", "outcome")
        self.claim_seconds = self._histogram(
            "claim_duration_seconds", "One claim statement, for all that waited together.", SECONDS
        )
        self.claim_batch_size = self._histogram(
            "claim_batch_size", "Claims that shared one statement.", BATCHES
        )
        self.heartbeats = self._counter("heartbeats", "Heartbeats, by answer.", "outcome")
        self.lapsed = self._counter(
            "leases_lapsed", "Leases that lapsed, by what brought the sweep.", "noticed_by"
        )
        self.expiry_lag = self._histogram(
            "expiry_lag_seconds", "From a lease's deadline to its end by the sweep.", LAGS_S
        )
        self.sweep_success = self._gauge(
            "sweep_last_success_timestamp_seconds", "When a sweep last went through."
        )
        self.loop_restarts = self._counter(
            "loop_restarts", "Background loops that ended and were started again.", "loop"
        )
        self.loop_success = self._gauge(
            "loop_last_success_timestamp_seconds", "When a background loop last did its work.",
            "loop",
        )  # fmt: skip
        self.submissions = self._counter("submissions", "Submits, by what came of them.", "outcome")
        self.submission_bytes = self._histogram(
            "submission_bytes", "Size of the bundles that arrived whole.", BYTES
        )
        self.verify_seconds = self._histogram(
            "verify_seconds", "Steps 1 to 5 of a submit, in a worker.", SECONDS
        )
        self.workers_lost = self._counter(
            "workers_lost", "Worker processes that ended, or were ended, at their work."
        )
        self.runs = self._gauge("runs", "Runs of the queue; as old as a few seconds.", "status")
        self.oldest_pending = self._gauge(
            "oldest_pending_age_seconds", "Since the oldest claimable run was enqueued; 0: none."
        )
        self.leases_active = self._gauge("leases_active", "Leases that are held now.")
        self.unclaimable = self._gauge(
            "unclaimable_runs", "PENDING runs that no live runner can be given, by the reason that"
            " comes first; counted up to 10,000 for each model.", "reason",
        )  # fmt: skip
        self.runners = self._gauge("runners", "Runners that have registered, by state.", "state")
        self.queue_wait_seconds = self._histogram(
            "queue_wait_seconds", "From a run's enqueue, or requeue, to its lease.", WAITS_S
        )
        self.redis_up = self._gauge("redis_up", "1 while Redis took the last lease keys.")
        self.redis_up.set(1)
        self.listener_gaps = self._counter(
            "listener_gaps", "Times that expired events could not be received for a while."
        )
        self._loop_lag = self._histogram(
            "event_loop_lag_seconds", "How much later than asked the event loop comes back.",
            SECONDS,
        )  # fmt: skip

    def watch(self, **looks: Callable[[], float]) -> None:
        """Show each named gauge of WATCHED by calling its look at every scrape."""
        for name, look in looks.items():
            self._gauge(name, WATCHED[name]).set_function(look)

    def watch_pool(self, size: Callable[[], int], idle: Callable[[], int]) -> None:
        """Show the connections of the database pool, by state."""
        pool = self._gauge("db_pool", "Connections to PostgreSQL.", "state")
        pool.labels("idle").set_function(idle)
        pool.labels("busy").set_function(lambda: size() - idle())

    def watch_dropped_lines(self, look: Callable[[], int]) -> None:
        """Show how many log lines were lost, by calling `look` at every scrape."""
        self._registry.register(_DroppedLines(look))

    async def watch_loop(self, succeeded: Callable[[], None]) -> None:
        """Measure the event loop's lag until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + LOOP_TICK_S
            await asyncio.sleep(LOOP_TICK_S)
            self._loop_lag.observe(max(0.0, loop.time() - due))
            succeeded()

    def exposition(self) -> bytes:
        """Return everything as Prometheus' text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(name, what, labels, namespace=NAMESPACE, registry=self._registry)

    def _gauge(self, name: str, what: str, *labels: str) -> Gauge:
        return Gauge(name, what, labels, namespace=NAMESPACE, registry=self._registry)

    def _histogram(
        self, name: str, what: str, buckets: tuple[float, ...], *labels: str
    ) -> Histogram:
        return Histogram(
            name, what, labels, namespace=NAMESPACE, buckets=buckets, registry=self._registry
        )


class _DroppedLines(Collector):
    """A counter that somebody else counts."""

    def __init__(self, look: Callable[[], int]) -> None:
        self._look = look

    def collect(self) -> Iterator[Metric]:
        name = f"{NAMESPACE}_log_lines_dropped"
        what = "Log lines that could not be written: stderr full, closed or not read."
        yield CounterMetricFamily(name, what, value=self._look())


@contextmanager
def failures_counted(counter: Counter) -> Iterator[None]:
    """Count what is raised inside by its code; what succeeds is the caller's to count."""
    try:
        yield
    except BaseException as error:
        counter.labels(outcome_of(error)).inc()
        raise


def outcome_of(error: BaseException) -> str:
    """Return an outcome: one of our codes, `client_disconnected`, or `error` for all else."""
    if isinstance(error, asyncio.CancelledError):
        return "client_disconnected"
    return code_of(error) if isinstance(error, BrokerError | AuthError) else "error"
