"""Loads one table, or reads its files plainly, into fresh memory, and prints the seconds.

python -m bench._first_touch FOLDER WIDTH KIND REST

KIND is `ours`, or `huge` or `small` for plain reads by two threads into pages of that kind. REST is
how many seconds memory is to be free before; if 0, twice as much as is needed is touched and given
back just before.
"""

from __future__ import annotations

import mmap
import sys
import time
from pathlib import Path

from asyncloader import HashTable, Loader
from bench._measure import fault_in
from bench._raw import carry_out, file_reads, room_for, shards
from examples.made_up import SLOTS

_THREADS = 2


def main(folder: str, width: str, kind: str, rest: str) -> None:
    """Rest or touch, then measure."""
    files = shards(Path(folder))
    size = room_for(files)
    table = HashTable([int(width)], name="emb")
    for slot in SLOTS[1:]:
        table.add_slot(slot, [int(width)])
    if float(rest):
        time.sleep(float(rest))
    else:
        fault_in(size)
    begin = time.perf_counter()
    if kind == "ours":
        Loader(folder, {"emb": table}, strict=True, verify="off").load()
    else:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE if kind == "huge" else mmap.MADV_NOHUGEPAGE)
        carry_out(file_reads(files, memoryview(memory)), threads=_THREADS)
    print(time.perf_counter() - begin)


if __name__ == "__main__":
    main(*sys.argv[1:])
