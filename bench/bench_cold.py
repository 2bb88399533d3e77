"""How fast dense tensors load that are not in the page cache."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from asyncloader._memory.allocation import zeros
from bench import _dense
from bench._cache import cached, evict
from bench._measure import Contender, interleave
from bench._raw import (
    THREADS,
    blocks,
    carry_out,
    file_reads,
    room_for,
    tensor_name,
    threads_text,
)
from bench._results import Goal, Results, Speed, against_raw

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from bench._cases import DenseCase
    from bench._scale import Scale

pytestmark = pytest.mark.filterwarnings("ignore")  # what peers warn of is theirs to mend

PEERS = ("safetensors load_file", "torch.load", "runai-model-streamer")


def cold(files: Sequence[Path]) -> None:
    """Have nothing of the files in the page cache, or skip the case."""
    evict(files)
    if cached(files) > 0.001:
        pytest.skip(f"the page cache of {files[0].parent} cannot be emptied")


def sequential(case: DenseCase) -> Iterator[Contender]:
    """Yield the plainest reads of the device, from one file's start to the last one's end.

    Buffered, and past the page cache where the file system lets us: the fastest is the yardstick.
    """
    files = case.files()
    memory = zeros((room_for(files),), torch.uint8).fill_(1)
    reads = file_reads(files, memory.numpy().data)

    def run(threads: int, flags: int, _: object) -> None:
        carry_out(reads, threads=threads, flags=flags)

    def check(_: object) -> None:
        at = 0
        for file in files:
            for key, begin, end in blocks(file):
                wanted = case.truth[tensor_name(key)].numpy().view(np.int64).reshape(-1)
                got = memory[at + begin : at + end].numpy().view(np.int64)
                assert np.array_equal(got, wanted), key
            at += room_for([file])

    for flags in (0, os.O_DIRECT) if takes_direct(files[0]) else (0,):
        for threads in THREADS:
            yield Contender(
                name=f"raw{', O_DIRECT' if flags else ''}, {threads_text(threads)}",
                role="raw",
                prepare=partial(cold, files),
                run=partial(run, threads, flags),
                poison=lambda _: memory.fill_(0),
                check=check,
            )


def takes_direct(file: Path) -> bool:
    """Say whether the file system lets programs read past the page cache."""
    try:
        os.close(os.open(file, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def test_d2_large_tensors_from_a_cold_cache(
    dense: DenseCase, runner: asyncio.Runner, results: Results, scale: Scale
) -> None:
    tensors = dense.destination()
    peers, skipped = _dense.peers(dense, tensors, PEERS, cold)
    contenders = [
        *sequential(dense),
        _dense.ours(dense, tensors, runner, cold),
        _dense.ours(dense, tensors, runner, cold, direct_io=True),
        _dense.ours(dense, tensors, runner, cold, direct_io=False),
        *peers,
    ]

    speed = Speed(
        case="D2",
        what=f"{len(tensors):,} tensors of {dense.nbytes // len(tensors) // 1024:,} KiB, cold",
        nbytes=dense.nbytes,
        times=interleave(contenders, rounds=scale.rounds(2)),
        skipped=skipped,
    )

    results.speeds.append(speed)
    against_raw(results, speed, Goal("≥", 0.9))
    for direct_io in (True, False):
        against_raw(results, speed, None, name=_dense.named(direct_io))
