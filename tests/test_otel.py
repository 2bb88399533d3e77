"""Spans of loads and swaps, as an exporter of OpenTelemetry's SDK gets them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import NoOpTracer, StatusCode

from asyncloader import Loader, LoadFailed, Span, Swapped, TruncatedShardError, VersionRefused
from asyncloader.otel import LiveSpans, trace_to
from tests.live import Events, build, damage, live, publish, version_in
from tests.support import nothing_left_behind

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.trace import Tracer

    from asyncloader import Event, Model

MILLI = 1_000_000
"""Nanoseconds."""


class Exported:
    """Where spans go, and a tracer that makes them."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer: Tracer = self.provider.get_tracer("tests")

    def spans(self, name: str = "asyncloader.") -> list[ReadableSpan]:
        """Return those whose name begins so, in the order in which they ended."""
        return [one for one in self._exporter.get_finished_spans() if one.name.startswith(name)]

    def span(self, name: str, **attributes: object) -> ReadableSpan:
        """Return the one of a name of which all of this is true."""
        wanted = {f"asyncloader.{key}": value for key, value in attributes.items()}.items()
        [found] = [one for one in self.spans(name) if wanted <= dict(one.attributes or {}).items()]
        return found


@pytest.fixture
def exported() -> Iterator[Exported]:
    exported = Exported()
    yield exported
    exported.provider.shutdown()


class Both:
    """Hands events to spans first, and then to whoever waits for them."""

    def __init__(self, spans: LiveSpans) -> None:
        self.events, self._spans = Events(), spans

    def __call__(self, event: Event) -> None:
        self._spans(event)
        self.events(event)


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return {name.removeprefix("asyncloader."): of for name, of in (span.attributes or {}).items()}


def is_child(span: ReadableSpan, parent: ReadableSpan) -> bool:
    return span.parent is not None and span.parent.span_id == parent.context.span_id


def times(span: ReadableSpan) -> tuple[int, int]:
    """Return begin and end, in nanoseconds since 1970."""
    assert span.start_time is not None
    assert span.end_time is not None
    return span.start_time, span.end_time


@pytest.mark.parametrize("blocking", [False, True])
async def test_steps_are_children_of_the_span_that_is_current_where_the_load_starts(
    tmp_path: Path, exported: Exported, *, blocking: bool
) -> None:
    path = publish(tmp_path, 1)
    listener = trace_to(exported.tracer)
    loader = Loader(path, *build(), trace=listener)
    begin = time.time_ns()

    with exported.tracer.start_as_current_span("mine"):
        if blocking:
            await asyncio.to_thread(loader.load)
        else:
            await loader.aload()

    end = time.time_ns()
    mine, steps = exported.span("mine"), exported.spans()
    assert {one.name for one in steps} >= {
        "asyncloader.plan",
        "asyncloader.read",
        "asyncloader.index",
        "asyncloader.commit",
    }
    assert all(is_child(one, mine) for one in steps)
    for step in steps:
        first, last = times(step)
        assert begin - MILLI <= first <= last <= end + MILLI
    read_at = [times(one)[0] for one in exported.spans("asyncloader.read")]
    assert times(exported.span("asyncloader.commit"))[0] >= max(read_at)


async def test_there_is_a_span_for_each_read(tmp_path: Path, exported: Exported) -> None:
    path = publish(tmp_path, 1)
    report = await Loader(
        path, *build(), chunk_bytes=1024, verify="off", trace=trace_to(exported.tracer)
    ).aload()
    reads = exported.spans("asyncloader.read")
    assert len(reads) == report.reads > 2
    assert sum(attributes(one)["bytes"] for one in reads) == report.bytes_read
    assert all(one.parent is None for one in reads)


def test_a_step_is_told_as_it_was(exported: Exported) -> None:
    listener = trace_to(exported.tracer)
    now, start = time.time_ns(), time.perf_counter()
    listener(Span(step="read", name="a.bin", lane="t-1", start=start, seconds=0.25, nbytes=7))
    listener(Span(step="commit", name="all", lane="t-2", start=start - 5, seconds=0.0, nbytes=0))

    read, commit = exported.spans()

    assert (read.name, commit.name) == ("asyncloader.read", "asyncloader.commit")
    assert attributes(read) == {"name": "a.bin", "lane": "t-1", "bytes": 7}
    assert attributes(commit) == {"name": "all", "lane": "t-2"}
    first, last = times(read)
    assert abs(first - now) <= MILLI
    assert last - first == 250 * MILLI
    assert abs(times(commit)[0] - (now - 5000 * MILLI)) <= MILLI


async def test_a_version_that_comes_to_serve(tmp_path: Path, exported: Exported) -> None:
    publish(tmp_path, 1)
    spans = LiveSpans(exported.tracer)
    both = Both(spans)
    assert repr(spans) == "<LiveSpans: no load>"
    begin = time.time_ns()
    it = live(tmp_path, on_event=both, loader_options={"trace": spans.trace})
    async with contextlib.AsyncExitStack() as stack:
        with exported.tracer.start_as_current_span("startup"):
            await stack.enter_async_context(it)
        publish(tmp_path, 2)
        await both.events.until(Swapped, version="v2")

    startup = exported.span("startup")
    first = exported.span("asyncloader.load", version="v1")
    second = exported.span("asyncloader.load", version="v2")
    assert is_child(first, startup)
    assert second.parent is None  # the program had long started
    assert second.context.trace_id != first.context.trace_id
    facts = attributes(second)
    assert facts.pop("bytes") > 0
    assert facts.pop("memory_bytes") > 0
    assert facts == {
        "version": "v2",
        "location": str(tmp_path / "v2"),
        "attempt": 1,
        "outcome": "served",
    }
    assert second.status.status_code is StatusCode.UNSET
    [loaded] = second.events
    assert loaded.name == "loaded"
    load_begin, load_end = times(second)
    assert begin - MILLI <= load_begin <= loaded.timestamp <= load_end <= time.time_ns() + MILLI

    swap = exported.span("asyncloader.swap", version="v2")
    assert is_child(swap, second)
    assert times(swap) == (load_end, load_end)
    assert attributes(swap) == {
        "version": "v2",
        "location": str(tmp_path / "v2"),
        "previous": "v1",
        "back": False,
    }
    steps = [
        one for one in exported.spans() if one.name not in {"asyncloader.load", "asyncloader.swap"}
    ]
    assert sum(is_child(one, first) for one in steps) == sum(is_child(one, second) for one in steps)
    of_second = [one for one in steps if is_child(one, second)]
    assert "asyncloader.commit" in {one.name for one in of_second}
    for step in of_second:
        step_begin, step_end = times(step)
        assert load_begin - MILLI <= step_begin
        assert step_end <= load_end + MILLI


async def test_a_load_that_fails_and_is_tried_again(tmp_path: Path, exported: Exported) -> None:
    publish(tmp_path, 1)
    both = Both(LiveSpans(exported.tracer))
    faults: list[Exception | None] = [None, OSError(5, "a bad day")]

    def flaky() -> object:
        if faults and (fault := faults.pop(0)) is not None:
            raise fault
        return build()

    async with live(tmp_path, build=flaky, on_event=both):
        publish(tmp_path, 2)
        await both.events.until(Swapped, version="v2")

    failed = exported.span("asyncloader.load", version="v2", attempt=1)
    assert attributes(failed)["outcome"] == "failed"
    assert attributes(failed)["retry_in_seconds"] >= 0.01
    assert failed.status.status_code is StatusCode.ERROR
    assert failed.status.description == "OSError: [Errno 5] a bad day"
    [event] = failed.events
    assert event.name == "exception"
    assert dict(event.attributes or {})["exception.type"] == "OSError"
    again = exported.span("asyncloader.load", version="v2", attempt=2)
    assert attributes(again)["outcome"] == "served"
    assert times(again)[0] >= times(failed)[1]


async def test_a_corrupt_version(tmp_path: Path, exported: Exported) -> None:
    damage(publish(tmp_path, 1))
    spans = LiveSpans(exported.tracer)
    with pytest.raises(TruncatedShardError):
        async with live(tmp_path, on_event=spans, loader_options={"trace": spans.trace}):
            pass
    failed = exported.span("asyncloader.load")
    assert failed.status.status_code is StatusCode.ERROR
    assert "retry_in_seconds" not in attributes(failed)
    assert all(is_child(one, failed) for one in exported.spans("asyncloader.plan"))
    assert exported.spans("asyncloader.swap") == []


async def test_a_version_that_the_check_refuses(tmp_path: Path, exported: Exported) -> None:
    publish(tmp_path, 1)
    both = Both(LiveSpans(exported.tracer))

    def check(model: Model) -> None:
        if version_in(model) == 2:
            raise ValueError("scores have drifted")

    async with live(tmp_path, on_event=both, check=check):
        publish(tmp_path, 2)
        await both.events.until(VersionRefused)

    refused = exported.span("asyncloader.load", version="v2")
    assert attributes(refused)["outcome"] == "refused"
    assert refused.status.status_code is StatusCode.ERROR
    assert refused.status.description == "check raised ValueError: scores have drifted"
    assert [event.name for event in refused.events] == ["loaded", "exception"]


async def test_a_version_that_would_not_fit(tmp_path: Path, exported: Exported) -> None:
    publish(tmp_path, 1)
    with pytest.raises(Exception, match="max_memory"):
        async with live(tmp_path, on_event=LiveSpans(exported.tracer), max_memory=1):
            pass
    refused = exported.span("asyncloader.load")
    assert refused.status.status_code is StatusCode.ERROR
    assert refused.events == ()


async def test_going_back_belongs_to_who_asked_for_it(tmp_path: Path, exported: Exported) -> None:
    publish(tmp_path, 1)
    both = Both(LiveSpans(exported.tracer))
    async with live(tmp_path, on_event=both, keep=2) as it:
        publish(tmp_path, 2)
        await both.events.until(Swapped, version="v2")
        with exported.tracer.start_as_current_span("back"):
            await it.rollback()
        with exported.tracer.start_as_current_span("forth"):
            publish(tmp_path / "..", 9)
            await it.load(tmp_path / ".." / "v9")

    back = exported.span("asyncloader.swap", back=True)
    assert is_child(back, exported.span("back"))  # no load was needed
    assert attributes(back)["previous"] == "v2"
    forth = exported.span("asyncloader.load", version="v9")
    assert is_child(forth, exported.span("forth"))
    assert is_child(exported.span("asyncloader.swap", version="v9"), forth)


class Gate:
    """A check that holds a version back, for ever if nobody cancels it."""

    def __init__(self, version: int) -> None:
        self.reached = asyncio.Event()
        self._version = version

    async def __call__(self, model: Model) -> None:
        if version_in(model) == self._version:
            self.reached.set()
            await asyncio.Event().wait()


async def test_a_load_that_is_given_up_for_another_version(
    tmp_path: Path, exported: Exported
) -> None:
    publish(tmp_path, 1)
    gate = Gate(3)
    both = Both(LiveSpans(exported.tracer))
    async with live(tmp_path, on_event=both, keep=2, check=gate) as it:
        publish(tmp_path, 2)
        await both.events.until(Swapped, version="v2")
        publish(tmp_path, 3)
        await gate.reached.wait()
        await it.rollback()

    given_up = exported.span("asyncloader.load", version="v3")
    assert attributes(given_up)["outcome"] == "cancelled"
    assert given_up.status.status_code is StatusCode.UNSET
    assert not is_child(exported.span("asyncloader.swap", back=True), given_up)


async def test_a_load_that_is_given_up_by_leaving(tmp_path: Path, exported: Exported) -> None:
    publish(tmp_path, 1)
    gate = Gate(2)
    spans = LiveSpans(exported.tracer)
    with nothing_left_behind():
        async with live(tmp_path, on_event=spans, check=gate):
            publish(tmp_path, 2)
            await gate.reached.wait()
            assert repr(spans) == f"<LiveSpans: {tmp_path / 'v2'}>"

    assert attributes(exported.span("asyncloader.load", version="v2"))["outcome"] == "cancelled"


async def test_what_was_heard_too_late_does_no_harm(tmp_path: Path, exported: Exported) -> None:
    """A listener may be put in while a load is under way."""
    spans = LiveSpans(exported.tracer)
    location = str(tmp_path / "v1")
    spans(LoadFailed(version="v1", location=location, error=OSError(), attempt=1, retry_in=None))
    spans(Swapped(version="v1", location=location, previous=None))
    spans.trace(Span(step="plan", name="names", lane="t", start=0.0, seconds=0.0, nbytes=0))
    assert [one.name for one in exported.spans()] == ["asyncloader.swap", "asyncloader.plan"]


async def test_a_program_without_an_sdk_goes_on(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    spans = LiveSpans(NoOpTracer())
    async with live(tmp_path, on_event=spans, loader_options={"trace": spans.trace}) as it:
        assert it.current.version == "v1"
