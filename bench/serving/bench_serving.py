"""How late a service's answers are while a version of 1 GB comes in, by the way it does."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.torch import save_file

from asyncloader import Saver
from bench._cache import warm
from bench._results import Goal, Latency, Results
from bench.serving._processes import DEADLINE, RATE, asking, fetch, serving
from examples.serve.model import build, fill, name_of, tower

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from bench._scale import Scale

AT_ONCE = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A way to take in a version."""

    name: str
    arguments: tuple[str, ...] = ()
    follows: bool = False
    """Whether the service finds it by itself."""

    asked: bool = False
    """Whether a request has it loaded from one safetensors file."""


NOTHING = Way(name="no load")
CONTRACT = Way(name="Live, max_loop_lag=0.005", follows=True)
FULL = Way(name="Live, full speed", follows=True, arguments=("--full-speed",))
THREAD = Way(name="to_thread(load_file), copy_", asked=True)
BLOCKING = Way(name="load_file, copy_ on the loop", asked=True, arguments=("--blocking",))
WAYS = (NOTHING, CONTRACT, FULL, THREAD, BLOCKING)


@dataclass(slots=True)
class Seen:
    """What came of all rounds of one way."""

    late: list[float] = field(default_factory=list)
    late_while_loading: list[float] = field(default_factory=list)
    failed: int = 0
    loads: list[float] = field(default_factory=list)


@pytest.fixture(scope="module")
def versions(scratch: Callable[[str], Path], scale: Scale) -> Path:
    """Save two versions of the example's model, and one again as a safetensors file."""
    folder = scratch("serving")
    for version in (1, 2):
        if (folder / name_of(version) / "index").exists():
            continue
        tables, _ = build()
        for first in range(0, scale.served_ids, AT_ONCE):
            fill(tables, version, range(first, min(first + AT_ONCE, scale.served_ids)))
        path = folder / name_of(version)
        Saver(path=path, hashtables=tables, tensors=tower(version)).save()
        kept = {f"{name}.rows": table.rows() for name, table in tables.items()}
        kept |= {f"{name}.ids": table.ids() for name, table in tables.items()}
        save_file(kept, folder / f"{name_of(version)}.safetensors")
    return folder


def test_serving(versions: Path, results: Results, scale: Scale, tmp_path: Path) -> None:
    seen = {way: Seen() for way in WAYS}
    for number in range(max(scale.rounds(2), 1)):
        for way in WAYS:
            serve_once(way, seen[way], versions, tmp_path / f"{number}-{WAYS.index(way)}", scale)
    for way, one in seen.items():
        assert not one.failed, f"{way.name}: {one.failed} requests failed"
        results.latencies.append(latency(way.name, one))
    note_goals(results, {way: latency(way.name, one) for way, one in seen.items()})


def note_goals(results: Results, by_way: Mapping[Way, Latency]) -> None:
    nothing, contract, full = (by_way[way] for way in (NOTHING, CONTRACT, FULL))
    if contract.load is None or full.load is None:
        raise LookupError("nothing was loaded")
    for what, value, unit, goal in (
        ("p99, beside no load", contract.p99 / nothing.p99, "times as late", Goal("≤", 1.5)),
        ("worst", contract.worst * 1e3, "ms", Goal("≤", 50)),
        ("the load, beside full speed", contract.load / full.load, "times as long", Goal("≤", 3)),
    ):
        results.figure("serving", f"{CONTRACT.name}: {what}", value, unit, goal)


def latency(name: str, seen: Seen) -> Latency:
    p50, p99, p999 = np.percentile(seen.late, [50, 99, 99.9]).tolist()
    loading = seen.late_while_loading
    return Latency(
        case="serving",
        what=name,
        answers=len(seen.late),
        failed=seen.failed,
        p50=p50,
        p99=p99,
        p999=p999,
        worst=max(seen.late),
        while_loading=float(np.percentile(loading, 99)) if loading else None,
        load=float(np.median(seen.loads)) if seen.loads else None,
    )


def serve_once(way: Way, seen: Seen, versions: Path, run: Path, scale: Scale) -> None:
    """Serve in a process of its own, ask from another, and have a version come in midway."""
    file = versions / "v2.safetensors"
    staged = run / ".v2"  # whoever follows does not look there
    run.mkdir()
    for source, target in ((versions / "v1", run / "v1"), (versions / "v2", staged)):
        shutil.copytree(source, target, copy_function=os.link)
    warm([file, *staged.iterdir()])
    arguments = (*way.arguments, *(("--file", str(file)) if way.asked else ()))
    with serving(run, arguments) as url:
        answers = asking(f"{url}/rank", scale.served_seconds)
        time.sleep(scale.served_seconds / 3)
        began = time.time()
        took = None
        if way.follows:
            staged.rename(run / "v2")
            took = until_it_serves(url, "v2")
        elif way.asked:
            took = float(fetch(f"{url}/load", b""))
        got = answers()
    begin = got["began"]
    seen.late += got["late"]
    seen.failed += got["failed"]
    if took is not None:
        seen.loads.append(took)
        due = begin + np.arange(len(got["late"])) / RATE
        there = (due >= began) & (due <= began + max(took, 1 / RATE) + 0.2)
        seen.late_while_loading += np.array(got["late"])[there].tolist()
    shutil.rmtree(run)


def until_it_serves(url: str, version: str) -> float:
    """Wait until a version serves, and return the seconds that its load took."""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        time.sleep(0.2)
        model = json.loads(fetch(f"{url}/model"))
        if model["serving"] == version:
            return float(model["last_load"]["seconds"])
    raise TimeoutError(f"{version} does not serve after {DEADLINE} s")
