"""Reports, events and states as JSON takes them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from asyncloader import HashTable, Loader, Saver
from tests.live import Events, damage, live, publish

if TYPE_CHECKING:
    from pathlib import Path

    from asyncloader._loading.progress import Progress, Span


def through_json(value: Any) -> dict[str, Any]:  # noqa: ANN401  # whatever has to_dict
    found: dict[str, Any] = json.loads(json.dumps(value.to_dict(), allow_nan=False))
    assert found == value.to_dict()
    return found


def test_reports_progress_and_spans_are_json(tmp_path: Path) -> None:
    table = HashTable([2], name="t")
    table.insert(torch.tensor([2**62, -5]), torch.ones(2, 2))
    saved = Saver(path=tmp_path, hashtables={"t": table}, tensors={"w": torch.ones(3)}).save()
    fresh = HashTable([2], name="t")
    progress: list[Progress] = []
    spans: list[Span] = []

    report = Loader(
        tmp_path, {"t": fresh}, {"w": torch.zeros(3)}, progress=progress.append, trace=spans.append
    ).load()

    assert through_json(saved)["tables"] == {"t": 2}
    found = through_json(report)
    assert (found["tensors"], found["tables"]["t"]["new"]) == ({"w": "loaded"}, 2)
    assert found["location"] == str(tmp_path)
    assert through_json(progress[-1])["bytes_total"] == progress[-1].bytes_total
    assert {through_json(span)["name"] for span in spans} == {span.name for span in spans}


async def test_a_bound_that_is_none_is_no_infinity(tmp_path: Path) -> None:
    """`jq` and browsers do not read `Infinity`."""
    Saver(path=tmp_path, tensors={"w": torch.ones(3)}).save()
    report = await Loader(tmp_path, {}, {"w": torch.zeros(3)}, pressure=lambda: 0).aload()
    assert through_json(report)["lag"]["bound"] is None


async def test_states_and_events_are_json_with_errors_as_text(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    events = Events()
    async with live(tmp_path, events) as it:
        damage(publish(tmp_path / "..", 2).rename(tmp_path / "v2"))
        while it.state.problem is None:
            await events.next()
        state = through_json(it.state)
    assert state["versions"][0]["version"] == "v1"
    assert state["problem"]["kind"] == "LoadFailed"
    assert state["problem"]["error"]["type"] == "TruncatedShardError"
    assert [through_json(event)["kind"] for event in events.seen] == [
        type(event).__name__ for event in events.seen
    ]
