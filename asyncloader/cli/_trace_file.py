"""Writes the steps of a load as Chrome's trace viewer and Perfetto (ui.perfetto.dev) read them.

A JSON object, `{"traceEvents": [...]}`, with an event for each step: `ph` is `X`, complete; `ts`
and `dur` are microseconds; `tid` is the lane. Events whose `ph` is `M` name process and lanes.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, BinaryIO

import orjson

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asyncloader._loading.progress import Span

_MICRO = 1e6
_DIGITS = 3


def write_trace(file: BinaryIO, location: str, spans: Sequence[Span]) -> None:
    """Write what a load did.

    Raises:
        OSError: If it cannot be written.
    """
    file.write(orjson.dumps(trace_of(location, spans, process=os.getpid())))
    file.flush()


def trace_of(location: str, spans: Sequence[Span], *, process: int) -> dict[str, Any]:
    """Return the document, its times counted from the first step on."""
    begin = min((span.start for span in spans), default=0.0)
    in_order = sorted(spans, key=lambda span: (span.start, -span.seconds))
    lanes = {lane: n for n, lane in enumerate(dict.fromkeys(span.lane for span in in_order), 1)}
    title = f"asyncloader load {os.fsencode(location).decode(errors='backslashreplace')}"
    events = [_naming("process_name", title, process)]
    events += [_naming("thread_name", lane, process, tid) for lane, tid in lanes.items()]
    events += [
        {
            "name": f"{span.step} {span.name}",
            "cat": span.step,
            "ph": "X",
            "ts": round((span.start - begin) * _MICRO, _DIGITS),
            "dur": round(span.seconds * _MICRO, _DIGITS),
            "pid": process,
            "tid": lanes[span.lane],
            "args": {"name": span.name, "bytes": span.nbytes},
        }
        for span in in_order
    ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _naming(what: str, name: str, process: int, lane: int = 0) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": process, "tid": lane, "args": {"name": name}}
