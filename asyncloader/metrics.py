"""What loads and versions of a model do, as Prometheus metrics.

Needs prometheus_client: `pip install 'asyncloader[metrics]'`.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol
from weakref import WeakKeyDictionary, WeakValueDictionary

from ._serving.events import (
    Freed,
    LoadCancelled,
    LoadFailed,
    LoadFinished,
    LoadStarted,
    RolledBack,
    Swapped,
    VersionRefused,
)

try:
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
    from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily
except ImportError as error:
    raise ImportError(
        "asyncloader.metrics needs prometheus-client: pip install 'asyncloader[metrics]'",
        name=error.name,
    ) from error

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prometheus_client.core import Metric

    from ._loading.report import LoadReport
    from ._serving.events import Event
    from ._serving.state import LiveState, LiveVersion
    from ._threads.lag import LoopLag

__all__ = ["Metrics"]

_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000)
"""Seconds: from a small model in the page cache to a terabyte from a cold disk."""

_MILLI = 1e3


class _HasState(Protocol):
    """A `Live`, whose module is none that this one may import."""

    @property
    def state(self) -> LiveState:
        """Asked on any thread."""
        ...


class Metrics:
    """Counts what loads do, and says how a `Live` is, in a Prometheus registry.

    A listener for `Live`; for a plain `Loader`, tell it of each load:

    ```python
    metrics = Metrics(model="ctr")
    async with Live("/runs/ctr", build, on_event=metrics) as live:
        metrics.watch(live)

    try:
        metrics.observe(await Loader(path, tables, tensors).aload())
    except AsyncLoaderError as error:
        metrics.failed(error)
        raise
    ```

    Several listeners are one function: `on_event=lambda event: (metrics(event), spans(event))`.

    Every series has the label `model`. Any number of these may share a registry; those of the same
    model count together. May be used from any thread.

    Args:
        registry: Where the metrics are registered; `None` is prometheus_client's own, which
            `start_http_server` serves.
        model: The label's value: give each model in a process its own.
    """

    def __init__(
        self, registry: CollectorRegistry | None = None, *, model: str = "default"
    ) -> None:
        self._model = model
        self._on = _families(REGISTRY if registry is None else registry)
        # A series that is not there before its first event has no rate when it matters.
        for outcome in ("loaded", "failed", "refused", "cancelled"):
            self._on.loads.labels(model, outcome)
        for by in ("check", "memory"):
            self._on.refusals.labels(model, by)
        for counter in self._on.plain_counters:
            counter.labels(model)
        self._on.seconds.labels(model)

    def __repr__(self) -> str:
        return f"<Metrics {self._model!r}>"

    def __call__(self, event: Event) -> None:
        """Take in what happened to a service's model: `Live(..., on_event=metrics)`."""
        on, model = self._on, self._model
        match event:
            case LoadStarted():
                if event.attempt > 1:
                    on.retries.labels(model).inc()
            case LoadFinished():
                self.observe(event.report)
            case LoadFailed():
                self.failed(event.error)
            case LoadCancelled():
                on.loads.labels(model, "cancelled").inc()
            case VersionRefused():
                self._refused(by_check=event.error is not None)
            case Swapped():
                on.swaps.labels(model).inc()
            case RolledBack():
                on.rollbacks.labels(model).inc()
            case Freed():
                on.freed.labels(model).inc(event.nbytes)

    def observe(self, report: LoadReport) -> None:
        """Take in a load that went well."""
        on, model = self._on, self._model
        on.loads.labels(model, "loaded").inc()
        on.read.labels(model).inc(report.bytes_read)
        on.verified.labels(model).inc(report.bytes_verified)
        on.read_retries.labels(model).inc(report.retries)
        on.seconds.labels(model).observe(report.seconds)
        on.recis_time.labels(model).set(report.seconds * _MILLI)
        on.recis_size.labels(model).set(report.bytes_read)
        if report.lag is not None:
            self._note_lag(report.lag)

    def failed(self, error: BaseException) -> None:
        """Take in what a load raised."""
        self._on.loads.labels(self._model, "failed").inc()
        self._on.failures.labels(self._model, _kind(error)).inc()

    def watch(self, live: _HasState) -> None:
        """Read the state of a `Live` whenever the registry is scraped, from now on.

        It is not kept alive by this. Once it serves no more, another one may take its place.

        Raises:
            ValueError: If another one that serves is watched under the name of this model.
        """
        self._on.watched.add(self._model, live)

    def _refused(self, *, by_check: bool) -> None:
        self._on.refusals.labels(self._model, "check" if by_check else "memory").inc()
        if not by_check:  # what `check` refuses was loaded, and counted as that
            self._on.loads.labels(self._model, "refused").inc()

    def _note_lag(self, lag: LoopLag) -> None:
        on, model = self._on, self._model
        on.lag_p50.labels(model).set(lag.p50)
        on.lag_p99.labels(model).set(lag.p99)
        on.lag_worst.labels(model).set(lag.worst)
        on.lag_bound.labels(model).set(lag.bound)
        on.held_back.labels(model).inc(lag.held_back)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Families:
    """The metrics of one registry, each registered once, for all models."""

    loads: Counter
    read: Counter
    verified: Counter
    read_retries: Counter
    held_back: Counter
    swaps: Counter
    rollbacks: Counter
    refusals: Counter
    failures: Counter
    retries: Counter
    freed: Counter
    seconds: Histogram
    lag_p50: Gauge
    lag_p99: Gauge
    lag_worst: Gauge
    lag_bound: Gauge
    recis_time: Gauge
    recis_size: Gauge
    watched: _Watched

    @property
    def plain_counters(self) -> tuple[Counter, ...]:
        """Those whose only label is the model."""
        return (
            *(self.read, self.verified, self.read_retries, self.held_back, self.swaps),
            *(self.rollbacks, self.retries, self.freed),
        )

    @classmethod
    def on(cls, registry: CollectorRegistry) -> _Families:
        """Register them."""

        def counter(name: str, meaning: str, *labels: str) -> Counter:
            return Counter(f"asyncloader_{name}", meaning, ("model", *labels), registry=registry)

        def gauge(name: str, meaning: str) -> Gauge:
            return Gauge(name, meaning, ("model",), registry=registry)

        of_last = "of the last load with max_loop_lag or pressure"
        watched = _Watched()
        registry.register(watched)
        return cls(
            loads=counter("loads_total", "Loads that ended, by outcome", "outcome"),
            read=counter("read_bytes_total", "Bytes read from storage by loads that went well"),
            verified=counter("verified_bytes_total", "Bytes of those compared with digests"),
            read_retries=counter("read_retries_total", "Calls on storage that were tried again"),
            held_back=counter("held_back_seconds_total", "Time that loads took longer by pacing"),
            swaps=counter("swaps_total", "Versions that began to serve"),
            rollbacks=counter("rollbacks_total", "Versions that began to serve again"),
            refusals=counter("refusals_total", "Versions that do not serve, by who said so", "by"),
            failures=counter("failures_total", "Loads that failed, by kind of error", "error"),
            retries=counter("retries_total", "Loads begun that were not the first try"),
            freed=counter("freed_bytes_total", "Memory of versions that was given back"),
            seconds=Histogram(
                "asyncloader_load_seconds",
                "How long loads took that went well",
                ("model",),
                registry=registry,
                buckets=_BUCKETS,
            ),
            lag_p50=gauge("asyncloader_loop_lag_p50_seconds", f"Median loop lag {of_last}"),
            lag_p99=gauge(
                "asyncloader_loop_lag_p99_seconds", f"Loop lag, 99th percentile, {of_last}"
            ),
            lag_worst=gauge("asyncloader_loop_lag_worst_seconds", f"Longest loop lag {of_last}"),
            lag_bound=gauge("asyncloader_loop_lag_bound_seconds", f"The max_loop_lag {of_last}"),
            recis_time=gauge(
                "recis_framework_load_time", "How long the last load took, in milliseconds"
            ),
            recis_size=gauge("recis_framework_load_size", "Bytes read by the last load"),
            watched=watched,
        )


# A registry takes a name once, and cannot be asked for what it has.
_known: WeakKeyDictionary[CollectorRegistry, _Families] = WeakKeyDictionary()
_lock = threading.Lock()


def _families(registry: CollectorRegistry) -> _Families:
    """Return the metrics of a registry, registered now if they were not yet."""
    with _lock:
        families = _known.get(registry)
        if families is None:
            families = _known[registry] = _Families.on(registry)
        return families


def _kind(error: BaseException) -> str:
    """Name the nearest class that is Python's or ours: users' own would be labels without end."""
    modules = ("builtins", "asyncloader.errors")
    return next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ in modules)


class _Watched:
    """Reads the state of each model's `Live` when the registry is scraped."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lives: WeakValueDictionary[str, _HasState] = WeakValueDictionary()

    def add(self, model: str, live: _HasState) -> None:
        with self._lock:
            other = self._lives.get(model)
            if other is not None and other is not live and other.state.versions:
                raise ValueError(
                    f"another Live is watched as model {model!r}, and serves: "
                    "give each its own Metrics(model=...)"
                )
            self._lives[model] = live

    def describe(self) -> Iterable[Metric]:
        return _Scrape().families

    def collect(self) -> Iterable[Metric]:
        with self._lock:
            lives = list(self._lives.items())
        scrape = _Scrape()
        for model, live in lives:
            scrape.add(model, live.state)
        return scrape.families


class _Scrape:
    """The state of all models at one moment: gauges made anew, so what is gone leaves no series."""

    def __init__(self) -> None:
        self._versions = _gauge("versions", "Versions in memory")
        self._memory = _gauge("memory_bytes", "Memory of all versions, as predicted")
        self._users = _gauge("users", "Blocks of use() that pin a version")
        self._following = _gauge("following", "1 if new versions are taken in")
        self._loading = _gauge("load_in_progress", "1 while a version is being loaded")
        self._ratio = _gauge("load_progress_ratio", "How much of that load is done, 0 to 1")
        self._age = _gauge(
            "serving_version_age_seconds", "Time since the version that serves was loaded"
        )
        self._serving = InfoMetricFamily(
            "asyncloader_serving_version", "The version that serves", labels=["model"]
        )

    @property
    def families(self) -> list[Metric]:
        return [
            *(self._versions, self._memory, self._users, self._following),
            *(self._loading, self._ratio, self._age, self._serving),
        ]

    def add(self, model: str, state: LiveState) -> None:
        for family, value in (
            (self._versions, len(state.versions)),
            (self._memory, state.nbytes),
            (self._users, sum(version.users for version in state.versions)),
            (self._following, state.following),
            (self._loading, state.loading is not None),
            (self._ratio, _done(state)),
        ):
            family.add_metric([model], float(value))
        for version in state.versions:
            if version.serving:
                self._add_serving(model, version)

    def _add_serving(self, model: str, version: LiveVersion) -> None:
        self._age.add_metric([model], max(time.time() - version.loaded_at, 0.0))
        self._serving.add_metric([model], {"version": version.version})


def _gauge(name: str, meaning: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"asyncloader_{name}", meaning, labels=["model"])


def _done(state: LiveState) -> float:
    progress = state.progress
    if progress is None or not progress.bytes_total:
        return 0.0
    return progress.bytes_done / progress.bytes_total
