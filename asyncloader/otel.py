"""OpenTelemetry spans of the steps of a load, of loads and of swaps.

Needs OpenTelemetry's API: `pip install 'asyncloader[otel]'`. The program's SDK decides which spans
are kept, and where they go.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from ._serving import events

try:
    from opentelemetry.context import Context
    from opentelemetry.trace import Status, StatusCode, get_current_span, set_span_in_context
except ImportError as error:
    raise ImportError(
        "asyncloader.otel needs opentelemetry-api: pip install 'asyncloader[otel]'",
        name=error.name,
    ) from error

if TYPE_CHECKING:
    from collections.abc import Callable

    from opentelemetry.trace import Span as OpenSpan
    from opentelemetry.trace import Tracer

    from ._loading.progress import Span

__all__ = ["LiveSpans", "trace_to"]

_NANO = 1e9
_SAMPLES = 5


def trace_to(tracer: Tracer) -> Callable[[Span], None]:
    """Return a listener for `Loader(trace=...)` that records each step as a span.

    ```python
    tracer = opentelemetry.trace.get_tracer("my-service")
    with tracer.start_as_current_span("load the model"):
        await Loader(path, tables, tensors, trace=trace_to(tracer)).aload()
    ```

    The spans are `asyncloader.plan`, `.read`, `.verify`, `.copy`, `.index` and `.commit`, children
    of the span that is current where the load is started. Their attributes are `asyncloader.name`
    (a shard, a table, a part of planning), `asyncloader.lane` (the asyncio task) and, for a step
    with bytes, `asyncloader.bytes`.

    Each step is a span: a load of 10 GB has 600 reads or more, and so many spans. The span of a
    step that failed looks like any other; the error is the load's.

    Times are right to a millisecond, by the clock at this call; setting the clock afterwards does
    not move them.

    Args:
        tracer: Makes the spans.
    """
    return partial(_record, tracer, epoch=_epoch(), context=None)


class LiveSpans:
    """Records loads of a `Live` as spans `asyncloader.load`, and swaps as `asyncloader.swap`.

    ```python
    spans = LiveSpans(tracer)
    options = {"trace": spans.trace}
    async with Live("/runs/ctr", build, on_event=spans, loader_options=options) as live:
        ...
    ```

    For several listeners, pass a function: `on_event=lambda event: (metrics(event), spans(event))`.

    Each try of a load is a span. It begins when the load begins, and ends when the load has failed,
    or when its version serves or was refused: it includes `check`, and an event `loaded` says when
    `check` began. Its `asyncloader.outcome` is `served`, `failed`, `refused` or `cancelled`; status
    and exception are recorded if it failed or was refused. A swap is a span without length, a child
    of the load that brought the version; the steps of the load are its children too, if `trace`
    listens to them. Other attributes are `asyncloader.version`, `.location`, `.attempt`, `.bytes`,
    `.memory_bytes`, `.retry_in_seconds`, and, of swaps, `.previous` and `.back`.

    A load is a child of the span that is current at the call that asked for it (entering, `load()`,
    `rollback()`). A load that follows the run folder is a child of the span in which the `Live` was
    entered, if that span is still recorded when the load begins; otherwise it is its own trace.

    Belongs to one `Live`, and to its event loop.

    Args:
        tracer: Makes the spans.
    """

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._load: _Load | None = None

    def __repr__(self) -> str:
        return f"<LiveSpans: {'no load' if self._load is None else self._load.location}>"

    def __call__(self, event: events.Event) -> None:
        """Record an event: `Live(..., on_event=spans)`."""
        match event:
            case events.LoadStarted():
                self._begin(event)
            case events.LoadFinished():
                self._note_loaded(event)
            case events.LoadFailed():
                self._note_failed(event)
            case events.VersionRefused():
                self._end(event, "refused", error=event.error, problem=event.reason)
            case events.LoadCancelled():
                self._end(event, "cancelled")
            case events.Swapped() | events.RolledBack():
                self._swap(event)

    def trace(self, step: Span) -> None:
        """Record a step of the load under way: `loader_options={"trace": spans.trace}`."""
        load = self._load
        if load is None:
            _record(self._tracer, step, epoch=_epoch(), context=None)
        else:
            _record(self._tracer, step, epoch=load.epoch, context=set_span_in_context(load.span))

    def _begin(self, event: events.LoadStarted) -> None:
        span = self._tracer.start_span(
            "asyncloader.load",
            _open_context(),
            attributes=_attributes(
                version=event.version, location=event.location, attempt=event.attempt
            ),
            start_time=_nanoseconds(event.at),
        )
        self._load = _Load(span, event.location, _epoch())

    def _note_loaded(self, event: events.LoadFinished) -> None:
        if self._load is not None:
            self._load.span.set_attribute("asyncloader.bytes", event.report.bytes_read)
            self._load.span.set_attribute("asyncloader.memory_bytes", event.nbytes)
            self._load.span.add_event("loaded", timestamp=_nanoseconds(event.at))

    def _note_failed(self, event: events.LoadFailed) -> None:
        if self._load is not None and event.retry_in is not None:
            self._load.span.set_attribute("asyncloader.retry_in_seconds", event.retry_in)
        problem = f"{type(event.error).__name__}: {event.error}"
        self._end(event, "failed", error=event.error, problem=problem)

    def _swap(self, event: events.Swapped | events.RolledBack) -> None:
        # A rollback at once is told before the end of the load that it gives up.
        load = self._load
        brought = load if load is not None and load.location == event.location else None
        context = _open_context() if brought is None else set_span_in_context(brought.span)
        attributes = _attributes(
            version=event.version,
            location=event.location,
            back=isinstance(event, events.RolledBack),
            previous=event.previous,
        )
        at = _nanoseconds(event.at)
        swap = self._tracer.start_span(
            "asyncloader.swap", context, attributes=attributes, start_time=at
        )
        swap.end(at)
        if brought is not None:
            self._end(event, "served")

    def _end(
        self,
        event: events.Event,
        outcome: str,
        *,
        error: Exception | None = None,
        problem: str = "",
    ) -> None:
        load, self._load = self._load, None
        if load is None:
            return
        if error is not None:
            load.span.record_exception(error, timestamp=_nanoseconds(event.at))
        if problem:
            load.span.set_status(Status(StatusCode.ERROR, problem))
        load.span.set_attribute("asyncloader.outcome", outcome)
        load.span.end(_nanoseconds(event.at))


class _Load(NamedTuple):
    """A load under way."""

    span: OpenSpan
    location: str
    epoch: int


def _open_context() -> Context | None:
    """Return `None` for the current context, or an empty one if the current span has ended.

    Following goes on in the context in which `Live` was entered: otherwise a year of loads would be
    one trace, that of the program's start.
    """
    return None if get_current_span().is_recording() else Context()


def _record(tracer: Tracer, step: Span, *, epoch: int, context: Context | None) -> None:
    """Record a step that is over as a span."""
    attributes = _attributes(name=step.name, lane=step.lane, bytes=step.nbytes or None)
    start = epoch + _nanoseconds(step.start)
    span = tracer.start_span(
        f"asyncloader.{step.step}", context, attributes=attributes, start_time=start
    )
    span.end(start + _nanoseconds(step.seconds))


def _attributes(**values: str | int | None) -> dict[str, str | int]:
    return {f"asyncloader.{name}": one for name, one in values.items() if one is not None}


def _epoch() -> int:
    """Return when `time.perf_counter` was 0, in nanoseconds since 1970."""
    # The quickest of several looks: a look that is interrupted between two clocks is wrong.
    looks = [
        (time.perf_counter_ns(), time.time_ns(), time.perf_counter_ns()) for _ in range(_SAMPLES)
    ]
    before, now, after = min(looks, key=lambda look: look[2] - look[0])
    return now - (before + after) // 2


def _nanoseconds(seconds: float) -> int:
    return round(seconds * _NANO)
