"""What a person who watches is shown, as JSON."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import orjson

from examples.serve.feed import message

if TYPE_CHECKING:
    from collections.abc import Iterable

    from asyncloader import Event, Live, LoadFinished
    from examples.serve.pulse import Pulse

__all__ = ["event_message", "history_message", "model_status", "state_message"]


def model_status(live: Live, last: LoadFinished | None) -> dict[str, Any]:
    """Describe the model: its versions, what is being loaded, and how the last load went."""
    state = live.state
    return {
        "serving": next((one.version for one in state.versions if one.serving), None),
        "versions": [dataclasses.asdict(version) for version in state.versions],
        "nbytes": state.nbytes,
        "users": sum(version.users for version in state.versions),
        "following": state.following,
        "loading": state.loading,
        "progress": None if state.progress is None else dataclasses.asdict(state.progress),
        "problem": None if state.problem is None else _event(state.problem),
        "last_load": None if last is None else _load(last),
    }


def state_message(
    live: Live, last: LoadFinished | None, pulse: Pulse, rows: dict[str, Any] | None
) -> bytes:
    """Return what changes all the time."""
    state = {
        "model": model_status(live, last),
        "lag": pulse.lag,
        "sample": pulse.samples[-1] if pulse.samples else None,
        "answered": pulse.answered,
        "requests_per_second": pulse.rate,
        "rows": rows,
    }
    return message("state", orjson.dumps(state))


def event_message(event: Event) -> bytes:
    """Return what has happened."""
    return message("happened", orjson.dumps(_event(event)))


def history_message(events: Iterable[Event], pulse: Pulse) -> bytes:
    """Return what happened before somebody began to watch."""
    history = {"events": [_event(event) for event in events], "samples": list(pulse.samples)}
    return message("history", orjson.dumps(history))


def _event(event: Event) -> dict[str, Any]:
    text = str(event).removeprefix(f"{event.location}: ")
    return {"kind": type(event).__name__, "version": event.version, "at": event.at, "text": text}


def _load(event: LoadFinished) -> dict[str, Any]:
    report = event.report
    return {
        "version": event.version,
        "at": event.at,
        "bytes_read": report.bytes_read,
        "seconds": report.seconds,
        "rows": sum(table.rows for table in report.tables.values()),
        "verified": report.verified,
        "lag": None if report.lag is None else dataclasses.asdict(report.lag),
    }
