"""Prometheus metrics of loads, and of the versions of a model.

Needs prometheus_client: `pip install 'asyncloader[metrics]'`.
"""

from __future__ import annotations

import itertools
import threading
import time
from typing import TYPE_CHECKING, Protocol
from weakref import WeakKeyDictionary, WeakValueDictionary

from ._serving import events

try:
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        InfoMetricFamily,
    )
except ImportError as error:
    raise ImportError(
        "asyncloader.metrics needs prometheus-client: pip install 'asyncloader[metrics]'",
        name=error.name,
    ) from error

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from prometheus_client.core import Metric

    from ._disk_table.stats import TableStats
    from ._loading.report import LoadReport
    from ._serving.events import LiveState

__all__ = ["Metrics"]

_COUNTERS = {
    "loads": ("Loads that ended, by outcome", "outcome", "loaded failed refused cancelled"),
    "read_bytes": ("Bytes read from storage by loads that went well",),
    "verified_bytes": ("Bytes of those compared with digests",),
    "read_retries": ("Calls on storage that were tried again",),
    "held_back_seconds": ("Time that loads took longer by pacing",),
    "swaps": ("Versions that began to serve",),
    "rollbacks": ("Versions that began to serve again",),
    "refusals": ("Versions that do not serve, by who said so", "by", "check memory"),
    "failures": ("Loads that failed, by kind of error", "error", ""),
    "retries": ("Loads begun that were not the first try",),
    "freed_bytes": ("Memory of versions that was given back",),
}
"""By name: the meaning; for a label besides `model`, its name and its known values."""

_OF_LAST = "of the last load with max_loop_lag or pressure"
_GAUGES = {
    "asyncloader_loop_lag_p50_seconds": f"Median loop lag {_OF_LAST}",
    "asyncloader_loop_lag_p99_seconds": f"Loop lag, 99th percentile, {_OF_LAST}",
    "asyncloader_loop_lag_worst_seconds": f"Longest loop lag {_OF_LAST}",
    "asyncloader_loop_lag_bound_seconds": f"The max_loop_lag {_OF_LAST}",
    "recis_framework_load_time": "How long the last load took, in milliseconds",
    "recis_framework_load_size": "Bytes read by the last load",
}
"""Set by loads; by name."""

_STATE_GAUGES = {
    "versions": "Versions in memory",
    "memory_bytes": "Memory of all versions, as predicted",
    "users": "Blocks of use() that pin a version",
    "following": "1 if new versions are taken in",
    "load_in_progress": "1 while a version is being loaded",
    "load_progress_ratio": "How much of that load is done, 0 to 1",
    "serving_version_age_seconds": "Time since the version that serves was loaded",
}
"""Read from the state of each `Live` when the registry is scraped; by name."""

_OF_TABLES = {
    "lookups": "Lookups that ended well",
    "failures": "Lookups that raised an error",
    "ids": "Ids that were asked for",
    "hits": "Ids whose rows the cache had",
    "absent": "Ids without a row",
    "rows_read": "Rows that were read from files",
    "bytes_read": "Bytes of those rows",
    "waits": "Rows read that were not in the page cache",
    "retries": "Reads that were tried again",
}
"""Of each `DiskTable` of the version that serves, from 0 again with each version; by name."""

_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000)
"""Seconds: from a small model in the page cache to a terabyte from a cold disk."""


class _HasState(Protocol):
    """A `Live`, whose module this one may not import. Its state is read on any thread."""

    @property
    def state(self) -> LiveState: ...


class Metrics:
    """Counts loads, and shows the state of a `Live`, in a Prometheus registry.

    It is a listener for `Live`. With a plain `Loader`, tell it of each load:

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

    For several listeners, pass a function: `on_event=lambda event: (metrics(event), spans(event))`.

    Every series has the label `model`. Any number of `Metrics` may share a registry; those of one
    model count together. May be used from any thread.

    Args:
        registry: The registry for the metrics; `None` is prometheus_client's own, which
            `start_http_server` serves.
        model: The value of the label: each model in a process needs its own.
    """

    def __init__(
        self, registry: CollectorRegistry | None = None, *, model: str = "default"
    ) -> None:
        self._model = model
        registry = REGISTRY if registry is None else registry
        with _lock:
            if registry not in _known:
                _known[registry] = _Families(registry)
            self._all = _known[registry]
        # A series that begins with its first event has no rate at that event.
        for name, (_, *label) in _COUNTERS.items():
            for value in [(one,) for one in label[1].split()] if label else [()]:
                self._all.counters[name].labels(model, *value)
        self._all.seconds.labels(model)

    def __repr__(self) -> str:
        return f"<Metrics {self._model!r}>"

    def __call__(self, event: events.Event) -> None:
        """Count an event of a `Live`: `Live(..., on_event=metrics)`."""
        match event:
            case events.LoadStarted():
                self._count("retries", event.attempt > 1)
            case events.LoadFinished():
                self.observe(event.report)
            case events.LoadFailed():
                self.failed(event.error)
            case events.LoadCancelled():
                self._count("loads", 1, "cancelled")
            case events.VersionRefused(error=None):
                self._count("refusals", 1, "memory")
                self._count("loads", 1, "refused")
            case events.VersionRefused():  # by `check`, once its load was counted as loaded
                self._count("refusals", 1, "check")
            case events.Swapped():
                self._count("swaps", 1)
            case events.RolledBack():
                self._count("rollbacks", 1)
            case events.Freed():
                self._count("freed_bytes", event.nbytes)

    def observe(self, report: LoadReport) -> None:
        """Count a load that went well."""
        self._count("loads", 1, "loaded")
        self._count("read_bytes", report.bytes_read)
        self._count("verified_bytes", report.bytes_verified)
        self._count("read_retries", report.retries)
        self._all.seconds.labels(self._model).observe(report.seconds)
        self._set("recis_framework_load_time", report.seconds * 1e3)
        self._set("recis_framework_load_size", report.bytes_read)
        if report.lag is not None:
            for part in ("p50", "p99", "worst", "bound"):
                self._set(f"asyncloader_loop_lag_{part}_seconds", getattr(report.lag, part))
            self._count("held_back_seconds", report.lag.held_back)

    def failed(self, error: BaseException) -> None:
        """Count a load that raised an error."""
        # The nearest class of Python's or ours: classes of users would be labels without end.
        ours = ("builtins", "asyncloader.errors")
        kind = next(kind for kind in type(error).__mro__ if kind.__module__ in ours)
        self._count("loads", 1, "failed")
        self._count("failures", 1, kind.__name__)

    def watch(self, live: _HasState) -> None:
        """Read the state of a `Live` whenever the registry is scraped, from now on.

        This does not keep the `Live` alive. Once it does not serve any more, another one may take
        its place.

        Raises:
            ValueError: If another `Live` that serves is watched under the name of this model.
        """
        self._all.watch(self._model, live)

    def _count(self, name: str, amount: float, *label: str) -> None:
        self._all.counters[name].labels(self._model, *label).inc(amount)

    def _set(self, name: str, value: float) -> None:
        self._all.gauges[name].labels(self._model).set(value)


class _Families:
    """The metrics of one registry, each registered once, for all models."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.counters = {
            name: Counter(
                f"asyncloader_{name}_total", meaning, ("model", *label[:1]), registry=registry
            )
            for name, (meaning, *label) in _COUNTERS.items()
        }
        self.gauges = {
            name: Gauge(name, meaning, ("model",), registry=registry)
            for name, meaning in _GAUGES.items()
        }
        self.seconds = Histogram(
            "asyncloader_load_seconds",
            "How long loads took that went well",
            ("model",),
            registry=registry,
            buckets=_BUCKETS,
        )
        self._lock = threading.Lock()
        self._lives: WeakValueDictionary[str, _HasState] = WeakValueDictionary()
        registry.register(self)

    def watch(self, model: str, live: _HasState) -> None:
        with self._lock:
            other = self._lives.get(model)
            if other is not None and other is not live and other.state.versions:
                raise ValueError(
                    f"another Live is watched as model {model!r}, and serves: "
                    "give each its own Metrics(model=...)"
                )
            self._lives[model] = live

    def collect(self) -> Iterable[Metric]:
        """Make the gauges of states anew, so that a version that is gone leaves no series."""
        gauges = {
            name: GaugeMetricFamily(f"asyncloader_{name}", meaning, labels=["model"])
            for name, meaning in _STATE_GAUGES.items()
        }
        serving = InfoMetricFamily(
            "asyncloader_serving_version", "The version that serves", labels=["model"]
        )
        with self._lock:
            lives, now = list(self._lives.items()), time.time()
        for model, live in lives:
            state = live.state
            done = 0.0
            if state.progress is not None and state.progress.bytes_total:
                done = state.progress.bytes_done / state.progress.bytes_total
            values = {
                "versions": len(state.versions),
                "memory_bytes": state.nbytes,
                "users": sum(version.users for version in state.versions),
                "following": state.following,
                "load_in_progress": state.loading is not None,
                "load_progress_ratio": done,
            }
            for version in state.versions:
                if version.serving:
                    values["serving_version_age_seconds"] = max(now - version.loaded_at, 0)
                    serving.add_metric([model], {"version": version.version})
            for name, value in values.items():
                gauges[name].add_metric([model], float(value))
        return [*gauges.values(), serving, *_of_tables((m, live.state.tables) for m, live in lives)]

    describe = collect  # called once, at registration


def _of_tables(found: Iterable[tuple[str, Mapping[str, TableStats]]]) -> Iterator[Metric]:
    labels = ["model", "table"]
    counters = {
        name: CounterMetricFamily(f"asyncloader_table_{name}", meaning, labels=labels)
        for name, meaning in _OF_TABLES.items()
    }
    name = "asyncloader_table_lookup_seconds"
    seconds = HistogramMetricFamily(name, "How long lookups took", labels=labels)
    for model, tables in found:
        for table, stats in tables.items():
            for name, family in counters.items():
                family.add_metric([model, table], getattr(stats, name))
            buckets = zip(stats.latency, itertools.accumulate(stats.latency.values()), strict=True)
            seconds.add_metric([model, table], list(buckets), stats.seconds)
    yield from (*counters.values(), seconds)


# A registry takes a name once, and cannot say which names it has.
_known: WeakKeyDictionary[CollectorRegistry, _Families] = WeakKeyDictionary()
_lock = threading.Lock()
