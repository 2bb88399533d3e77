"""The yardstick: the same bytes, read by plain threads that do nothing else.

How many threads are best depends on the machine and on the memory, so one, two and four of them
are contenders of every case; the fastest is *raw*.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from asyncloader._memory.allocation import zeros
from bench._measure import Contender

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

STEP = 8 << 20
THREADS = (1, 2, 4)
MOST_VIEWS = 1024
"""As many as Linux takes in one call (`IOV_MAX`)."""


@dataclass(frozen=True, slots=True)
class Read:
    """One call of `preadv`."""

    file: Path
    offset: int
    views: list[memoryview]
    size: int
    """Bytes to be read, which may be fewer than there is room for."""


def shards(path: Path) -> list[Path]:
    """Return the shard files of a checkpoint."""
    return sorted(path.glob("*.safetensors"))


def size_of(files: Sequence[Path]) -> int:
    """Return the bytes of all files together."""
    return sum(file.stat().st_size for file in files)


def room_for(files: Sequence[Path]) -> int:
    """Return the bytes that `file_reads` needs: whole steps of every file."""
    return sum(-(-file.stat().st_size // STEP) * STEP for file in files)


def blocks(shard: Path) -> Iterator[tuple[str, int, int]]:
    """Yield key, first byte and end of what a shard holds, in file order."""
    with shard.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        yield key, 8 + length + begin, 8 + length + end


def tensor_name(key: str) -> str:
    """Return a dense tensor's name, given its key in a shard."""
    return key.removesuffix("^ ")


def tensor_reads(files: Sequence[Path], tensors: Mapping[str, Tensor]) -> list[Read]:
    """Return the reads that fill tensors: small ones together, large ones in steps."""
    return [read for file in files for read in _shard_reads(file, tensors)]


def _shard_reads(file: Path, tensors: Mapping[str, Tensor]) -> Iterator[Read]:
    views: list[memoryview] = []
    start = size = 0
    for key, begin, end in blocks(file):
        memory = tensors[tensor_name(key)].view(-1).view(torch.uint8).numpy().data
        for at in range(0, end - begin, STEP):
            view = memory[at : at + STEP]
            if views and (size + len(view) > STEP or len(views) == MOST_VIEWS):
                yield Read(file, start, views, size)
                views, size = [], 0
            start = start if views else begin + at
            views.append(view)
            size += len(view)
    if views:
        yield Read(file, start, views, size)


def file_reads(files: Sequence[Path], memory: memoryview) -> list[Read]:
    """Return the reads that take in whole files, each read to a step of memory of its own."""
    reads: list[Read] = []
    for file in files:
        size = file.stat().st_size
        for offset in range(0, size, STEP):
            at = len(reads) * STEP
            reads.append(Read(file, offset, [memory[at : at + STEP]], min(STEP, size - offset)))
    return reads


def carry_out(reads: Sequence[Read], *, threads: int, flags: int = 0) -> None:
    """Read it all, by so many threads; `flags` are for opening the files."""
    with contextlib.ExitStack() as stack:
        opened: dict[Path, int] = {}
        for read in reads:
            if read.file not in opened:
                opened[read.file] = os.open(read.file, os.O_RDONLY | flags)
                stack.callback(os.close, opened[read.file])
        todo = iter(reads)  # shared: one call of next() on a list's iterator is atomic
        short: list[Read] = []
        workers = [
            threading.Thread(target=_work, args=(todo, opened, short)) for _ in range(threads)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if short:
            raise EOFError(f"{short[0].file} ends before {short[0].offset + short[0].size}")


def _work(todo: Iterator[Read], opened: Mapping[Path, int], short: list[Read]) -> None:
    short += [
        read for read in todo if os.preadv(opened[read.file], read.views, read.offset) != read.size
    ]


def threads_text(threads: int) -> str:
    """Return how many threads there are, in words."""
    return f"{threads} thread{'s' * (threads > 1)}"


def _carry_out_into(reads: Sequence[Read], threads: int, _: object) -> None:
    carry_out(reads, threads=threads)


def raw_into_tensors(
    files: Sequence[Path],
    tensors: Mapping[str, Tensor],
    *,
    poison: Callable[[object], object],
    check: Callable[[], object],
) -> list[Contender]:
    """Return the contenders that read straight into tensors."""
    reads = tensor_reads(files, tensors)
    return [
        Contender(
            name=f"raw, {threads_text(threads)}",
            role="raw",
            run=partial(_carry_out_into, reads, threads),
            poison=poison,
            check=lambda _: check(),
        )
        for threads in THREADS
    ]


def raw_into_fresh(files: Sequence[Path]) -> list[Contender]:
    """Return the contenders that read into memory as tables take it: fresh huge pages."""
    room = room_for(files)

    def run(threads: int, memory: Tensor) -> Tensor:
        carry_out(file_reads(files, memory.numpy().data), threads=threads)
        return memory

    def check(memory: Tensor) -> None:
        for read in file_reads(files, memory.numpy().data):
            wanted = np.fromfile(read.file, np.uint8, read.size, offset=read.offset)
            assert np.array_equal(np.frombuffer(read.views[0], np.uint8)[: read.size], wanted)

    return [
        Contender(
            name=f"raw, {threads_text(threads)}",
            role="raw",
            prepare=lambda: zeros((room,), torch.uint8),
            run=partial(run, threads),
            check=check,
            fresh=room,
        )
        for threads in THREADS
    ]
