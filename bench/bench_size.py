"""How the time grows with the size: twice of that shall be little more than twice of this."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from asyncloader import Loader
from bench._cache import warm
from bench._cases import DenseCase, dense_case, poison, tensor_loader
from bench._headers import tensor_names, write_headers
from bench._measure import Contender, interleave
from bench._results import Goal, Growth, Results

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from pathlib import Path

    from asyncloader import LoadPlan
    from bench._scale import Scale

MOST = Goal("≤", 2.2)


def note(results: Results, growth: Growth) -> None:
    results.growths.append(growth)
    what = f"{growth.what}, twice the size"
    results.figure("S1", what, growth.worst_doubling(), "times as long", MOST)


def test_s1_planning(
    scratch: Callable[[str], Path], runner: asyncio.Runner, results: Results, scale: Scale
) -> None:
    """Names and headers are read, too."""

    def contender(count: int) -> Contender:
        path = write_headers(scratch(f"headers-{count}"), count)

        def prepare() -> dict[str, torch.Tensor]:
            """Make them anew: a million objects that are kept slow the smaller sizes down."""
            memory = torch.zeros(count)
            return {name: memory[at : at + 1] for at, name in enumerate(tensor_names(count))}

        def run(tensors: dict[str, torch.Tensor]) -> LoadPlan:
            return runner.run(Loader(path, tensors=tensors, strict=True).plan())

        def check(plan: LoadPlan) -> None:
            assert len(plan.tensors) == count

        return Contender(name=f"{count:,}", role="variant", prepare=prepare, run=run, check=check)

    times = interleave([contender(count) for count in scale.blocks], rounds=scale.rounds(1))

    seconds = [one.seconds for one in times]
    what = "planning"
    note(results, Growth(case="S1", what=what, unit="blocks", sizes=scale.blocks, seconds=seconds))


def test_s1_loading(
    scratch: Callable[[str], Path], runner: asyncio.Runner, results: Results, scale: Scale
) -> None:
    """Parts of one checkpoint, into the same memory, which is touched."""
    shapes: dict[str, tuple[int, ...]] = {
        f"tensor.{number:03d}": (scale.side, scale.side) for number in range(scale.loads[-1])
    }
    case = dense_case(scratch("large"), shapes, writers=16)
    warm(case.files())
    memory = case.destination()

    def contender(count: int) -> Contender:
        names = list(shapes)[:count]
        tensors = {name: memory[name] for name in names}
        part = DenseCase(case.path, {name: case.truth[name] for name in names})
        return Contender(
            name=f"{count:,}",
            role="ours",
            run=lambda _: runner.run(tensor_loader(case.path, tensors).aload()),
            poison=lambda _: poison(tensors),
            check=lambda _: part.check(tensors),
        )

    times = interleave([contender(count) for count in scale.loads], rounds=scale.rounds(3))

    each = memory["tensor.000"].nbytes / 2**20
    growth = Growth(
        case="S1",
        what="loading",
        unit="MiB",
        sizes=[count * each for count in scale.loads],
        seconds=[one.seconds for one in times],
    )
    note(results, growth)
