"""Metrics of loads and versions, as a scrape of the registry shows them."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from asyncloader import (
    Freed,
    LiveState,
    Loader,
    LoadFailed,
    LoadTimeoutError,
    LoopLag,
    Progress,
    ReadError,
    Swapped,
    VersionRefused,
)
from asyncloader.metrics import Metrics
from tests.live import Events, build, damage, live, publish, version_in
from tests.support import nothing_left_behind

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from asyncloader import Event, LoadReport, Model

LAG = LoopLag(p50=0.001, p99=0.004, worst=0.02, bound=0.005, paces=((0.0, 0.5),), held_back=1.5)


class Scrape:
    """What Prometheus would store of a registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.text = generate_latest(registry).decode()
        self.families = list(text_string_to_metric_families(self.text))
        samples = [sample for family in self.families for sample in family.samples]
        self._values = {(one.name, frozenset(one.labels.items())): one.value for one in samples}
        assert len(self._values) == len(samples), "a series twice"
        assert len({family.name for family in self.families}) == len(self.families)

    def __call__(self, name: str, model: str = "ctr", **labels: str) -> float | None:
        """Return the value of a series, or `None` if there is none."""
        return self._values.get((name, frozenset({"model": model, **labels}.items())))

    def labels(self, name: str) -> list[dict[str, str]]:
        """Return the labels of all series of a name."""
        return [dict(labels) for one, labels in self._values if one == name]


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry(auto_describe=True)


@pytest.fixture
def metrics(registry: CollectorRegistry) -> Metrics:
    return Metrics(registry, model="ctr")


class Both:
    """Hands events to metrics first, and then to whoever waits for them."""

    def __init__(self, metrics: Metrics) -> None:
        self.events, self._metrics = Events(), metrics

    def __call__(self, event: Event) -> None:
        self._metrics(event)
        self.events(event)


async def loaded(path: Path, *, max_loop_lag: float | None = None) -> LoadReport:
    return await Loader(path, *build(), max_loop_lag=max_loop_lag).aload()


async def test_a_load_is_counted_with_its_bytes_and_time(
    tmp_path: Path, registry: CollectorRegistry, metrics: Metrics
) -> None:
    report = await loaded(publish(tmp_path, 1))
    metrics.observe(report)
    metrics.observe(replace(report, bytes_verified=7, seconds=3.0, retries=2))

    scrape = Scrape(registry)

    assert scrape("asyncloader_loads_total", outcome="loaded") == 2
    assert scrape("asyncloader_loads_total", outcome="failed") == 0
    assert scrape("asyncloader_read_bytes_total") == 2 * report.bytes_read > 0
    assert scrape("asyncloader_verified_bytes_total") == report.bytes_verified + 7
    assert scrape("asyncloader_read_retries_total") == 2
    assert scrape("asyncloader_load_seconds_count") == 2
    assert scrape("asyncloader_load_seconds_sum") == pytest.approx(report.seconds + 3)
    assert scrape("asyncloader_load_seconds_bucket", le="5.0") == 2
    assert scrape("asyncloader_load_seconds_bucket", le="2.5") == (report.seconds <= 2.5)


async def test_recis_names_say_how_the_last_load_went_in_its_units(
    tmp_path: Path, registry: CollectorRegistry, metrics: Metrics
) -> None:
    assert Scrape(registry)("recis_framework_load_time") is None
    report = await loaded(publish(tmp_path, 1))
    metrics.observe(replace(report, seconds=9.0))
    metrics.observe(replace(report, seconds=0.25))

    scrape = Scrape(registry)

    assert scrape("recis_framework_load_time") == 250
    assert scrape("recis_framework_load_size") == report.bytes_read


async def test_loop_lag_is_that_of_the_last_load_that_watched_it(
    tmp_path: Path, registry: CollectorRegistry, metrics: Metrics
) -> None:
    path = publish(tmp_path, 1)
    plain = await loaded(path)
    paced = await loaded(path, max_loop_lag=0.005)
    assert paced.lag is not None
    metrics.observe(paced)
    metrics.observe(replace(plain, lag=LAG))
    metrics.observe(plain)

    scrape = Scrape(registry)

    shown = [scrape(f"asyncloader_loop_lag_{of}_seconds") for of in ("p50", "p99", "worst")]
    assert shown == [0.001, 0.004, 0.02]
    assert scrape("asyncloader_loop_lag_bound_seconds") == 0.005
    held_back = scrape("asyncloader_held_back_seconds_total")
    assert held_back == pytest.approx(1.5 + paced.lag.held_back)


class OursError(LoadTimeoutError):
    """A user's own."""


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ReadError("a", 0, 1, "no"), "ReadError"),
        (OursError("a", 1.0), "LoadTimeoutError"),
        (FileNotFoundError(2, "no"), "FileNotFoundError"),
        (json.JSONDecodeError("no", "", 0), "ValueError"),
        (torch.OutOfMemoryError("no"), "RuntimeError"),
        (type("Version17Error", (Exception,), {})("no"), "Exception"),
        (asyncio.CancelledError(), "BaseException"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_failures_are_counted_under_classes_of_python_and_ours_only(
    registry: CollectorRegistry, metrics: Metrics, error: BaseException, kind: str
) -> None:
    metrics.failed(error)
    scrape = Scrape(registry)
    assert scrape.labels("asyncloader_failures_total") == [{"model": "ctr", "error": kind}]
    assert scrape("asyncloader_loads_total", outcome="failed") == 1


async def test_a_service_that_swaps_and_rolls_back(
    tmp_path: Path, registry: CollectorRegistry, metrics: Metrics
) -> None:
    publish(tmp_path, 1)
    both = Both(metrics)
    async with live(tmp_path, on_event=both, keep=2) as it:
        metrics.watch(it)
        publish(tmp_path, 2)
        await both.events.until(Swapped, version="v2")
        with it.use():
            scrape = Scrape(registry)
            age = scrape("asyncloader_serving_version_age_seconds")
            assert age is not None
            assert 0 <= age <= time.time() - it.current.loaded_at
        assert scrape("asyncloader_versions") == 2
        assert scrape("asyncloader_memory_bytes") == it.state.nbytes > 0
        assert scrape("asyncloader_users") == 1
        assert scrape("asyncloader_following") == 1
        assert scrape("asyncloader_load_in_progress") == 0
        serving = [{"model": "ctr", "version": "v2"}]
        assert scrape.labels("asyncloader_serving_version_info") == serving
        assert scrape("asyncloader_loads_total", outcome="loaded") == 2
        assert (scrape("asyncloader_swaps_total"), scrape("asyncloader_rollbacks_total")) == (2, 0)

        await it.rollback()

        scrape = Scrape(registry)
        assert (scrape("asyncloader_swaps_total"), scrape("asyncloader_rollbacks_total")) == (2, 1)
        assert scrape("asyncloader_following") == 0
        serving = [{"model": "ctr", "version": "v1"}]
        assert scrape.labels("asyncloader_serving_version_info") == serving

    scrape = Scrape(registry)
    freed = sum(event.nbytes for event in both.events.seen if isinstance(event, Freed))
    assert scrape("asyncloader_freed_bytes_total") == freed > 0
    assert scrape("asyncloader_versions") == 0
    assert scrape.labels("asyncloader_serving_version_info") == []
    assert scrape.labels("asyncloader_serving_version_age_seconds") == []


async def test_a_service_whose_versions_fail_or_are_refused(
    tmp_path: Path, registry: CollectorRegistry, metrics: Metrics
) -> None:
    publish(tmp_path, 1)
    both = Both(metrics)
    builds: list[Any] = [build, build, MemoryError("full"), build]

    def flaky() -> object:
        make = builds.pop(0) if builds else build
        if isinstance(make, Exception):
            raise make
        return make()

    def check(model: Model) -> None:
        if version_in(model) == 3:
            raise ValueError("scores have drifted")

    async with live(tmp_path, build=flaky, on_event=both, check=check):
        damage(publish(tmp_path / "..", 2).rename(tmp_path / "v2"))
        await both.events.until(LoadFailed, version="v2")
        publish(tmp_path, 3)
        await both.events.until(VersionRefused, version="v3")

    scrape = Scrape(registry)
    assert scrape("asyncloader_failures_total", error="TruncatedShardError") == 1
    assert scrape("asyncloader_failures_total", error="MemoryError") == 1
    assert scrape("asyncloader_retries_total") == 1
    assert scrape("asyncloader_refusals_total", by="check") == 1
    assert scrape("asyncloader_loads_total", outcome="loaded") == 2  # the check came after
    assert scrape("asyncloader_loads_total", outcome="failed") == 2
    assert scrape("asyncloader_loads_total", outcome="refused") == 0


async def test_a_version_that_would_not_fit_is_refused_and_no_load(
    tmp_path: Path, registry: CollectorRegistry, metrics: Metrics
) -> None:
    publish(tmp_path, 1)
    async with live(tmp_path) as it:
        most = 2 * it.current.nbytes
    both = Both(metrics)
    async with live(tmp_path, on_event=both, max_memory=most):
        publish(tmp_path, 2)
        await both.events.until(VersionRefused)

    scrape = Scrape(registry)
    assert scrape("asyncloader_refusals_total", by="memory") == 1
    assert scrape("asyncloader_refusals_total", by="check") == 0
    assert scrape("asyncloader_loads_total", outcome="loaded") == 1
    assert scrape("asyncloader_loads_total", outcome="refused") == 1


async def test_a_load_under_way_is_seen(
    tmp_path: Path, registry: CollectorRegistry, metrics: Metrics
) -> None:
    publish(tmp_path, 1)
    scrapes = []

    def listen(progress: object) -> None:
        scrapes.append(Scrape(registry))

    it = live(tmp_path, loader_options={"progress": listen})
    metrics.watch(it)
    async with it:
        assert scrapes[-1]("asyncloader_load_in_progress") == 1
        assert scrapes[-1]("asyncloader_load_progress_ratio") == 1
        assert scrapes[-1]("asyncloader_versions") == 0
        assert Scrape(registry)("asyncloader_load_progress_ratio") == 0


class Still:
    """A `Live` that stands still."""

    def __init__(self, progress: Progress | None) -> None:
        self.state = LiveState(
            versions=(), following=True, loading="v1", progress=progress, problem=None, nbytes=0
        )


@pytest.mark.parametrize(("done", "total", "ratio"), [(1, 4, 0.25), (0, 0, 0.0), (None, None, 0.0)])
def test_progress_is_a_ratio(
    registry: CollectorRegistry,
    metrics: Metrics,
    done: int | None,
    total: int | None,
    ratio: float,
) -> None:
    moment = None
    if done is not None and total is not None:
        moment = Progress(bytes_done=done, bytes_total=total, seconds=1.0, current="w")
    still = Still(moment)
    metrics.watch(still)
    assert Scrape(registry)("asyncloader_load_progress_ratio") == ratio


async def test_two_models_share_a_registry(tmp_path: Path, registry: CollectorRegistry) -> None:
    runs = {"a": tmp_path / "a", "b": tmp_path / "b"}
    for run in runs.values():
        run.mkdir()
        publish(run, 1)
    one, other = (Metrics(registry, model=model) for model in runs)
    async with (
        live(runs["a"], on_event=one) as first,
        live(runs["b"], on_event=other) as second,
    ):
        one.watch(first)
        other.watch(second)
        other.failed(OSError())

        scrape = Scrape(registry)

        for model in runs:
            assert scrape("asyncloader_swaps_total", model) == 1
            assert scrape("asyncloader_versions", model) == 1
            assert scrape("asyncloader_serving_version_info", model, version="v1") == 1
        assert scrape("asyncloader_failures_total", "a", error="OSError") is None
        assert scrape("asyncloader_failures_total", "b", error="OSError") == 1


async def test_a_model_has_one_live_at_a_time(
    tmp_path: Path, registry: CollectorRegistry, metrics: Metrics
) -> None:
    publish(tmp_path, 1)
    with nothing_left_behind():
        async with live(tmp_path) as first, live(tmp_path) as second:
            metrics.watch(first)
            metrics.watch(first)
            with pytest.raises(ValueError, match="model 'ctr', and serves: give each its own"):
                Metrics(registry, model="ctr").watch(second)
    metrics.watch(second)  # the first one was left
    async with live(tmp_path) as third:
        metrics.watch(third)
        assert Scrape(registry)("asyncloader_versions") == 1


def test_watching_keeps_nothing_alive(registry: CollectorRegistry, metrics: Metrics) -> None:
    still = Still(None)
    metrics.watch(still)
    assert Scrape(registry)("asyncloader_following") == 1
    del still
    assert Scrape(registry)("asyncloader_following") is None


def test_many_threads_count_together(tmp_path: Path, registry: CollectorRegistry) -> None:
    report = Loader(publish(tmp_path, 1), *build()).load()
    together = threading.Barrier(8)

    def work() -> None:
        together.wait(10)
        mine = Metrics(registry, model="ctr")  # whose families the first one registers
        for _ in range(50):
            mine.observe(report)
            mine.failed(ValueError())
        Scrape(registry)

    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(work) for _ in range(8)]:
            done.result()

    scrape = Scrape(registry)
    assert scrape("asyncloader_loads_total", outcome="loaded") == 400
    assert scrape("asyncloader_read_bytes_total") == 400 * report.bytes_read
    assert scrape("asyncloader_failures_total", error="ValueError") == 400


def offered(registry: CollectorRegistry) -> Iterator[tuple[str, str, str]]:
    for family in registry.collect():
        yield family.name, family.type, family.documentation


async def test_names_follow_the_conventions(
    tmp_path: Path, registry: CollectorRegistry, metrics: Metrics
) -> None:
    """Prometheus wants base units, and counters that say so."""
    metrics.observe(replace(await loaded(publish(tmp_path, 1)), lag=LAG))
    text = Scrape(registry).text
    for name, kind, meaning in offered(registry):
        assert meaning
        if kind == "counter":
            assert f"# TYPE {name}_total counter" in text
        if not name.startswith("recis_framework_"):
            assert name.startswith("asyncloader_")
            assert "milli" not in name
            assert name.endswith("_seconds") or "lag" not in name


def test_by_default_it_is_the_registry_that_everybody_serves() -> None:
    metrics = Metrics(model="in the registry of all")
    metrics.failed(KeyError())
    assert Scrape(REGISTRY)(
        "asyncloader_failures_total", "in the registry of all", error="KeyError"
    )
    assert repr(metrics) == "<Metrics 'in the registry of all'>"


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_package_does_without_what_its_extras_need() -> None:
    code = """if True:
        import sys, asyncloader
        for name in asyncloader.__all__:
            getattr(asyncloader, name)
        roots = {name.partition(".")[0] for name in sys.modules}
        sys.exit(bool(roots & {"prometheus_client", "opentelemetry"}))
    """
    done = python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("module", "needs", "extra"),
    [
        ("asyncloader.metrics", "prometheus_client", "metrics"),
        ("asyncloader.otel", "opentelemetry", "otel"),
    ],
)
def test_who_lacks_a_package_is_told_how_to_get_it(module: str, needs: str, extra: str) -> None:
    code = f"""if True:
        import sys

        class Missing:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == {needs!r}:
                    raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

        sys.meta_path.insert(0, Missing())
        import {module}
    """
    done = python(code)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: {module} needs ")
    assert f"pip install 'asyncloader[{extra}]'" in last
