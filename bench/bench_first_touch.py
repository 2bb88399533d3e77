"""How fast the first load of a process is, as users have it: nobody has touched memory for it.

Where a virtual machine reports free pages to its host, memory that has been free for some seconds
is several times dearer to touch than memory that was in use just before; so both are measured, each
load in a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from bench._cache import warm
from bench._measure import Times, best
from bench._raw import shards
from bench._results import Goal, Results, Speed

if TYPE_CHECKING:
    from bench._cases import TableCase
    from bench._measure import Role
    from bench._scale import Scale

KINDS: dict[str, tuple[str, Role]] = {
    "ours": ("asyncloader", "ours"),
    "small": ("raw, small pages", "raw"),
    "huge": ("raw, huge pages", "raw"),
}
ROUNDS = 4
STATES = {"rested": 5.0, "touched": 0.0}
"""Seconds of rest before each load."""


def seconds(case: TableCase, scale: Scale, kind: str, state: str) -> float:
    """Measure one load in a process of its own."""
    rest = STATES[state] if scale.most_rounds else 0.0
    run = subprocess.run(
        [sys.executable, "-m", "bench._first_touch", case.path, str(scale.width), kind, str(rest)],
        check=True,
        capture_output=True,
        text=True,
    )
    return float(run.stdout)


@pytest.mark.parametrize("state", STATES)
def test_f1_the_first_load_of_a_process(
    state: str, one_rank: TableCase, results: Results, scale: Scale
) -> None:
    warm(shards(one_rank.path))
    taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(max(1, scale.rounds(ROUNDS))):
        kinds = [*KINDS]
        for kind in kinds[number % 3 :] + kinds[: number % 3]:  # each follows each
            taken[kind].append(seconds(one_rank, scale, kind, state))

    speed = Speed(
        case="F1",
        what=f"a table into fresh memory, {state}, each load in a process of its own",
        nbytes=one_rank.nbytes,
        times=[
            Times(name=name, role=role, seconds=taken[kind], nbytes=one_rank.nbytes)
            for kind, (name, role) in KINDS.items()
        ],
    )

    results.speeds.append(speed)
    ours = best(speed.times, "ours")
    assert ours is not None
    ratio = speed.ratio(ours)
    assert ratio is not None
    results.figure("F1", f"{state}: of the best raw read", ratio, "", Goal("≥", 0.8))
