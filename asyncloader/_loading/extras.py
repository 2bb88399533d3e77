"""The plain values beside a checkpoint's tensors: files of `torch.save` that are read whole.

Only `torch.load(weights_only=True)` unpickles them, and only from an archive that is made here: it
has the files that our own list names, of the sizes that were checked, so that no other reading of
a hostile archive counts.
"""

from __future__ import annotations

import re
import struct
import zipfile
import zlib
from functools import partial
from io import BytesIO
from typing import TYPE_CHECKING, Any

import torch

from asyncloader._checkpoint.format import EXTRA, IO_STATE, SIDECAR
from asyncloader._checkpoint.sidecar import digest_of
from asyncloader._checkpoint.torch_file import read_archive
from asyncloader._planning.names import IO_WORDS, OPTIMIZER, WORDS
from asyncloader._storage.protocol import opening_error, read_exactly
from asyncloader._threads.jobs import for_each, run_jobs
from asyncloader.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from collections.abc import Set as AbstractSet

    from asyncloader._checkpoint.archive import Archive, Entry

    from .session import Session


LIMIT = 4 << 30  # bytes: the state of a dense optimizer takes twice its model's
_LONGEST = 200  # letters of what a file or torch says
_OLD_OPTIMIZER = "dense_optimizer"  # RecIS 1.0.0's name
# How torch's messages name what a pickle asks for, and may not.
_GLOBAL = re.compile(r"(?:GLOBAL|function|add_safe_globals`,? but got) (<[^>]+>|\S+)")
_REASON = re.compile(r"WeightsUnpickler error:\s*(.+)")


async def read_words(
    session: Session, *, rank: int, words: AbstractSet[str], digests: Mapping[str, str] | None
) -> dict[str, Any]:
    """Return the values that a checkpoint has for words of a model; opens no other file.

    Raises:
        CheckpointError: If a file cannot be read as plain values.
        ReadError: If the storage failed.
    """
    names = await session.listed()
    io_state = IO_STATE.format(rank=rank)
    values: dict[str, Any] = {}
    for file, held in ((EXTRA, set(WORDS).difference(IO_WORDS)), (io_state, IO_WORDS)):
        if words.isdisjoint(held):
            continue
        check_no_pickle(session.location, file, names)
        if file in names:
            read = await read_values(session, file, limit=LIMIT, digests=digests)
            if _OLD_OPTIMIZER in read:
                read.setdefault(OPTIMIZER, read[_OLD_OPTIMIZER])
            values |= {word: read[word] for word in held if word in read}
    return {word: values[word] for word in WORDS if word in values and word in words}


def check_no_pickle(location: str, file: str, names: Collection[str]) -> None:
    """Refuse a file that is there as a bare pickle alone, as later releases of RecIS read it."""
    twin = f"{file.removesuffix('.pt')}.pkl"
    if file in names or twin not in names:
        return
    problem = (
        "is a bare pickle, a program that runs when it is read, so it was not read; where you "
        f"trust its author, read it with pickle.load, and torch.save its content as {file!r}"
    )
    raise CheckpointError(location, problem, twin)


async def read_values(
    session: Session, file: str, *, limit: int, digests: Mapping[str, str] | None
) -> dict[str, Any]:
    """Read a file of `torch.save` that holds a dict of plain values.

    Args:
        session: The checkpoint.
        file: Its file.
        limit: Bytes that the file, and what it unpacks to, may have.
        digests: Of files, from the sidecar; `None` if there are none that count.

    Raises:
        CheckpointError: If it is too large, damaged, or holds something else.
        ReadError: If the storage failed.
    """
    storage, kernels = session.storage, session.threads.kernels
    wanted = None if digests is None else digests.get(file)
    if wanted is None and session.options.verify == "require":
        problem = f"{SIDECAR} has no digest of it, and verify='require' asks for one"
        raise CheckpointError(session.location, problem, file)
    try:
        size = await storage.size(file)
    except OSError as error:
        raise opening_error(session.location, file, error) from error
    _check_size(session.location, file, size, limit)
    archive = await read_archive(storage, file, size, executor=kernels)
    _check_size(session.location, file, sum(one.size for one in archive.entries.values()), limit)
    content = [await _read_whole(session, file, size)]
    await session.check_unchanged([file])
    job = partial(_values, session.location, archive, content, wanted)
    [values] = await run_jobs(kernels, [job])
    return values


def _check_size(location: str, file: str, size: int, limit: int) -> None:
    if size > limit:
        problem = (
            f"holds {size:,} bytes, and at most {limit:,} are read; if that is right, give "
            "read_extra() or read_io_state() a larger limit=, and exclude its names from a bank"
        )
        raise CheckpointError(location, problem, file)


async def _read_whole(session: Session, file: str, size: int) -> bytearray:
    content, most = bytearray(size), session.options.read_bytes
    view = memoryview(content)

    async def read(begin: int) -> None:
        piece = view[begin : begin + most]
        async with session.budget.reserve(piece.nbytes):
            await read_exactly(session.storage, file, begin, [piece])

    workers = min(session.options.parallel, -(-size // most))
    await for_each(range(0, size, most), read, workers=workers, name="asyncloader-values")
    return content


def _values(
    location: str, archive: Archive, content: list[bytearray], digest: str | None
) -> dict[str, Any]:
    """Return the values in a whole archive; belongs on a thread.

    Takes the only item of `content`, so that its memory is free before values take as much again.
    """
    file = archive.shard
    if digest is not None and (found := digest_of(content[0])) != digest:
        problem = (
            f"is not what was written: {SIDECAR} has the digest {digest}, it has {found}; copy it "
            "again"
        )
        raise CheckpointError(location, problem, file)
    try:
        remade = _remade(archive, content.pop())
    except (zlib.error, struct.error, ValueError) as error:
        raise CheckpointError(location, f"{error}; copy it again", file) from error
    try:
        values = torch.load(remade, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch raises is not documented
        raise CheckpointError(location, _refusal(str(error)), file) from error
    if not isinstance(values, dict):
        raise CheckpointError(location, f"holds a {type(values).__name__}, not a dict", file)
    return values


def _remade(archive: Archive, content: bytearray) -> BytesIO:
    """Return the archive as torch writes it; raise if it does not hold what its list says."""
    remade = BytesIO()
    with zipfile.ZipFile(remade, "w") as made, memoryview(content) as view:
        for name, entry in archive.entries.items():
            begin = archive.begins[name]
            unpacked = _unpacked(entry, view[begin : begin + entry.packed])
            made.writestr(f"archive/{name}", unpacked)
            if len(unpacked) != entry.size or entry.crc not in {0, made.infolist()[-1].CRC}:
                raise ValueError(f"{name!r} in it is damaged")
    remade.seek(0)
    return remade


def _unpacked(entry: Entry, packed: memoryview) -> memoryview | bytes:
    if entry.is_stored:
        return packed
    return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, entry.size + 1)


def _refusal(message: str) -> str:
    """Say why torch refused a file, given torch's message."""
    if (found := _GLOBAL.search(message)) is not None:
        return (
            f"asks for {found[1][:_LONGEST]!r}, which is more than plain values need, so nothing "
            "of it was called; where you trust its author, torch.serialization.add_safe_globals "
            "allows it, or read the file with torch.load(weights_only=False), and save plain "
            "values instead"
        )
    reason = _REASON.search(message)
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    told = reason[1].strip() if reason is not None else (lines or ["no reason given"])[0]
    return (
        f"cannot be read as plain values: {told[:_LONGEST]}; save it anew, a dict of tensors, "
        "numbers and text, with torch.save"
    )
