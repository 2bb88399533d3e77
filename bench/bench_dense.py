"""How fast dense tensors load, into memory that is there already, from a warm page cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bench import _dense
from bench._measure import interleave
from bench._peers import NAMES
from bench._results import Goal, Results, Speed, against_peers, against_raw

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Sequence

    from bench._cases import DenseCase
    from bench._scale import Scale

pytestmark = pytest.mark.filterwarnings("ignore")  # what peers warn of is theirs to mend


# Of 100,000 small tensors, two take longer than all others together, a minute and half of one, and
# the third as long as its sister.
NOT_SMALL = ("torch DCP", "tensorizer", "torch.load")


def measure(
    case: DenseCase, runner: asyncio.Runner, name: str, names: Sequence[str], *, rounds: int
) -> Speed:
    tensors = case.destination()
    peers, skipped = _dense.peers(case, tensors, names)
    _dense.warm_all(case, names)
    contenders = [*_dense.raw(case, tensors), _dense.ours(case, tensors, runner), *peers]
    each = next(iter(tensors.values())).nbytes // 1024
    return Speed(
        case=name,
        what=f"{len(tensors):,} tensors of {each:,} KiB, warm",
        nbytes=case.nbytes,
        times=interleave(contenders, rounds=rounds),
        skipped=skipped,
    )


def test_d1_large_tensors(
    dense: DenseCase, runner: asyncio.Runner, results: Results, scale: Scale
) -> None:
    speed = measure(dense, runner, "D1", NAMES, rounds=scale.rounds(7))

    results.speeds.append(speed)
    against_raw(results, speed, Goal("≥", 0.9))
    against_peers(results, speed, Goal("≥", 1))


def test_d3_small_tensors(
    small: DenseCase, runner: asyncio.Runner, results: Results, scale: Scale
) -> None:
    names = [name for name in NAMES if name not in NOT_SMALL]
    speed = measure(small, runner, "D3", names, rounds=scale.rounds(7))

    results.speeds.append(speed)
    against_peers(results, speed, Goal("≥", 3))
    assert speed.raw is not None
    assert speed.ours is not None
    each = (speed.ours.median - speed.raw.median) / len(small.truth)
    results.figure("D3", "planning and bookkeeping", each * 1e6, "µs a tensor", Goal("≤", 10))
