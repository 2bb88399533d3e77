"""Compares the files in an archive of `torch.save` with their checksums. Needs no torch."""

from __future__ import annotations

import zlib
from functools import partial
from typing import TYPE_CHECKING

from asyncloader._storage.protocol import read_exactly
from asyncloader._threads.jobs import for_each, run_jobs
from asyncloader.errors import ReadError

if TYPE_CHECKING:
    from asyncloader._checkpoint.archive import Archive, Entry
    from asyncloader._checkpoint.problems import AllProblems
    from asyncloader._loading.session import Session


async def check_sums(session: Session, archive: Archive, problems: AllProblems) -> None:
    """Read all files of an archive that have a checksum; tell of those that have another one."""

    async def check(entry: Entry) -> None:
        begin = archive.begins[entry.name]
        try:
            text = await _damage(session, archive.shard, entry, begin)
        except ReadError as error:
            problems.error(error)
        else:
            if text:
                problems.add(f"{text}; copy it again", archive.shard, entry.name)

    wanted = [entry for entry in archive.entries.values() if entry.crc]  # torch need not compute it
    await for_each(wanted, check, workers=session.options.parallel, name="asyncloader-sum")


async def _damage(  # one branch for each thing that can be wrong
    session: Session, shard: str, entry: Entry, begin: int
) -> str:
    """Say what is wrong with the bytes of an entry, if anything is."""
    machine = None if entry.is_stored else zlib.decompressobj(-zlib.MAX_WBITS)
    step, found, size, read = session.options.read_bytes, 0, 0, entry.packed

    def take(view: memoryview) -> None:
        nonlocal found, size
        left: bytes | memoryview = view
        while left:
            some = left if machine is None else machine.decompress(left, step)
            left = b"" if machine is None or machine.eof else machine.unconsumed_tail
            found, size = zlib.crc32(some, found), size + len(some)

    for offset in range(0, entry.packed, step):
        length = min(step, entry.packed - offset)
        async with session.budget.reserve(length):
            view = memoryview(bytearray(length))
            await read_exactly(session.storage, shard, begin + offset, [view])
            try:
                await run_jobs(session.threads.kernels, [partial(take, view)])
            except zlib.error as error:
                return f"its compressed bytes are damaged: {error}"
            if size > entry.size or (machine is not None and machine.eof):
                read = offset + length
                break
    if machine is not None:
        rest = machine.flush()
        found, size = zlib.crc32(rest, found), size + len(rest)
        if behind := entry.packed - read + len(machine.unused_data):
            return f"{behind:,} bytes stand behind its compressed bytes"
    if size != entry.size:
        return f"it holds {size} bytes, the archive's list says {entry.size}"
    if found != entry.crc:
        return f"its checksum should be {entry.crc:08x}, it is {found:08x}"
    return ""
