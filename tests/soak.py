"""Loads of all kinds, one after the other, in a process that shall not grow."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import re
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import uvloop

from asyncloader import AsyncLoaderError, HashTable, Loader, Runtime, Saver
from tests.checkpoints import filled, flip
from tests.faulty import FaultyStorage, raises
from tests.oracle import TableData, declare_header_length, truncate
from tests.steps import Steps

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

TURNS = ["whole", "whole", "cancelled", "cancelled", "damaged", "failing"]
"""A third of each: what succeeds, what is cancelled, what fails."""

_SIZES, _WIDTH = 6, 8
_ENXIO = 6  # no fault of those that are tried again


class _Malloc(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


@dataclass(frozen=True, slots=True)
class Held:
    """What a process holds on to."""

    kib: int
    """All that it has of memory, but for what it shares with others."""

    allocated: int
    """What somebody has asked the C library for and not given back, in KiB; 0 if it cannot say."""

    blocks: int
    """Likewise, of Python, in objects."""

    descriptors: int
    threads: int


def held() -> Held:
    """Measure this process, once all that can be given back is."""
    gc.collect()
    library = ctypes.CDLL(None)
    library.malloc_trim(0)
    allocated = 0
    if hasattr(library, "mallinfo2"):
        library.mallinfo2.restype = _Malloc
        allocated = library.mallinfo2().uordblks >> 10
    # Not all of Pss: libraries that other processes have loaded, too, count in part, so it would
    # change by 100 MiB when one of them ends.
    match = re.search(
        r"^Pss_Anon: *(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE
    )
    assert match is not None
    return Held(
        kib=int(match[1]),
        allocated=allocated,
        blocks=sys.getallocatedblocks(),
        descriptors=_count("/proc/self/fd"),
        threads=_count("/proc/self/task"),
    )


def _count(folder: str) -> int:
    return len(os.listdir(folder))  # noqa: PTH208  # they vanish while one looks


def cut(shard: Path) -> None:
    truncate(shard, by=8)


def garble(shard: Path) -> None:
    declare_header_length(shard, 1 << 62)


def flip_a_bit(shard: Path) -> None:
    flip(shard, -1)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "cut": cut,
    "garbled": garble,
    "flipped": flip_a_bit,
    "gone": Path.unlink,
}


@dataclass
class Soak:
    """Checkpoints, sound and damaged, and loads of them."""

    base: Path
    chance: random.Random
    wide: list[int] = field(default_factory=list)
    """How long the tensor of each is."""

    outcomes: Counter[str] = field(default_factory=Counter)

    def prepare(self) -> None:
        """Write checkpoints of several sizes, and of each a copy for every kind of damage."""
        for number in range(_SIZES):
            rows, wide = (int(10 ** self.chance.uniform(1, most)) for most in (4.8, 6.3))
            content = TableData(
                ids=torch.arange(rows) * 7919, slots={"embedding": torch.ones(rows, _WIDTH)}
            )
            tables = {name: filled(content, name=name) for name in ("t", "u")}
            tensors = {"w": torch.ones(wide), "b": torch.ones(3)}
            self.wide.append(wide)
            for how in ("sound", *DAMAGES):
                path = self.base / f"{number}-{how}"
                Saver(path=path, hashtables=tables, tensors=tensors, parallel=4).save()
                if how in DAMAGES:
                    shards = path.glob("*.safetensors")
                    DAMAGES[how](max(shards, key=lambda shard: shard.stat().st_size))

    async def load(self, kind: str) -> None:
        """Load a random checkpoint, in one of the ways that there are."""
        number = self.chance.randrange(_SIZES)
        how = self.chance.choice(list(DAMAGES)) if kind == "damaged" else "sound"
        tables = {name: HashTable([_WIDTH], name=name) for name in ("t", "u")}
        tensors = {"w": torch.zeros(self.wide[number]), "b": torch.zeros(3)}
        path = self.base / f"{number}-{how}"
        loader = partial(Loader, path, tables, tensors, strict=True, chunk_bytes=1 << 18)
        outcome = await self._attempt(loader, kind)
        if outcome == "loaded":
            assert bool((tensors["w"] == 1).all())
            assert len(tables["t"]) == len(tables["u"]) > 0
        else:
            assert not len(tables["t"]) + len(tables["u"])
        self.outcomes[f"{kind}, {outcome}"] += 1

    async def _attempt(self, loader: Callable[..., Loader], kind: str) -> str:
        if kind == "cancelled":
            step = self.chance.randrange(1, 90)
            was = await Steps(range(step, step + 1)).run(loader(parallel=4).aload)
            return "cancelled" if was else "loaded"
        try:
            if kind == "failing":
                last = self.chance.randrange(2, 12)
                gone = raises(OSError(_ENXIO, "the disk is gone"), at=lambda one: one.number > last)
                wrap = partial(FaultyStorage, fault=gone)
                async with Runtime(parallel=4, wrap_storage=wrap) as runtime:
                    await loader(runtime=runtime).aload()
            else:
                await loader(parallel=4).aload()
        except AsyncLoaderError:
            return "failed"
        return "loaded"


def soak(base: str, loads: int, seed: int) -> dict[str, Any]:
    """Load so many times; return what this process held on to early on, and at the end."""
    it = Soak(Path(base), random.Random(seed))
    it.prepare()
    turns = [TURNS[number % len(TURNS)] for number in range(loads)]
    it.chance.shuffle(turns)

    async def load(kinds: Sequence[str]) -> None:
        for kind in kinds:
            await it.load(kind)

    # Whatever is imported, compiled or remembered once is, then; and the C library has as much
    # memory as it ever needs at a time, which takes it some hundred loads.
    uvloop.run(load(TURNS * max(2, loads // (2 * len(TURNS)))))
    before = held()
    it.outcomes.clear()
    uvloop.run(load(turns))
    return {"before": asdict(before), "after": asdict(held()), "outcomes": it.outcomes}
