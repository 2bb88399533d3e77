"""Writes all of a checkpoint into one plain safetensors file, a piece at a time."""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from asyncloader._checkpoint.parts import ID
from asyncloader._loading.progress import Meter
from asyncloader._saving.layout import WriteBlock, lay_out_shard
from asyncloader._saving.save_id import fresh_save_id
from asyncloader._storage.folder import LocalFolder
from asyncloader._threads.jobs import run_jobs
from asyncloader._tools.scanning import scan
from asyncloader.errors import AsyncLoaderError, CheckpointError, SaveError

from .source import METADATA, describe_tables, key_of, metadata_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from asyncloader._checkpoint.blocks import Block
    from asyncloader._checkpoint.manifest import Stored
    from asyncloader._checkpoint.slices import Slice
    from asyncloader._loading.progress import Progress
    from asyncloader._loading.session import Session
    from asyncloader._saving.layout import ShardLayout
    from asyncloader._storage.folder import WritableFile
    from asyncloader._tools.content import Content


_ID_BYTES = 8


@dataclass(slots=True, kw_only=True)
class Written:
    """What was written."""

    files: list[str]
    ranks: int | None
    nbytes: int
    verified: int
    """Bytes that were read and compared with digests."""

    ids: Counter[str]
    """By table."""

    duplicates: Counter[str]
    """Rows that gave way to a later one of the same id, by table."""


class _Copy(NamedTuple):
    """A block, and where it goes."""

    block: Block
    at: int
    """First byte within the file."""


async def write_file(
    session: Session,
    content: Content,
    path: Path,
    *,
    parallel: int,
    overwrite: bool,
    progress: Callable[[Progress], object] | None,
) -> Written:
    """Write the file beside its place, sync it, and move it there.

    If it fails, or is cancelled, before the move, nothing is left. Afterwards the file is written.

    Raises:
        ValueError: If two things would have the same name there.
        CheckpointError: If bytes are not those that were written, a file is another one by now, or
            ids lie outside the slices that their blocks claim.
        ReadError: If the source failed.
        SaveError: If the file could not be written; or it was, but may not outlive a power loss.
    """
    await _refuse_strays(session, content)
    folder = LocalFolder(path.parent)
    draft = f".{fresh_save_id()}.safetensors.tmp"
    reads = session.threads.reads
    [(layout, copies)] = await run_jobs(
        session.threads.kernels, [partial(_lay_out, draft, content)]
    )
    meter, held = Meter(sum(content.sizes.values()), progress), contextlib.ExitStack()

    def begin() -> WritableFile:
        file = held.enter_context(contextlib.closing(folder.create(draft)))
        file.write(0, [memoryview(layout.head)])
        return file

    def publish() -> None:
        if not overwrite and path.exists():  # it was not, when we began
            raise SaveError(str(path), "has come into being meanwhile; nothing was replaced")
        folder.move(draft, path.name)  # whatever fails from here on, the file is written
        try:
            folder.sync("")
        except OSError as error:
            problem = f"is written, but may not outlive a power loss: {error}"
            raise SaveError(str(path), problem) from error

    def give_up() -> None:
        with contextlib.suppress(OSError):
            folder.remove(draft)

    try:
        try:
            [file] = await run_jobs(reads, [begin])
            verified = await _copy(session, file, copies, meter, parallel)
            await run_jobs(reads, [file.sync])
        finally:
            await run_jobs(reads, [held.close])
        await session.check_unchanged(sorted({copy.block.shard for copy in copies}))
        meter.finish()
        await run_jobs(reads, [publish])
    except BaseException as error:
        await run_jobs(reads, [give_up])
        if isinstance(error, OSError) and not isinstance(error, AsyncLoaderError):
            raise SaveError(str(path), f"could not be written: {error}") from error
        raise
    return Written(
        files=[path.name],
        ranks=None,
        nbytes=layout.size,
        verified=verified,
        ids=Counter({name: table.ids.rows for name, table in content.tables.items()}),
        duplicates=Counter(),
    )


async def _copy(
    session: Session, file: WritableFile, copies: Sequence[_Copy], meter: Meter, parallel: int
) -> int:
    """Copy blocks as they lie on disk, and return how many bytes were compared with digests."""
    check = session.verifier.check

    def put(number: int, position: int, view: memoryview) -> int:
        block, at = copies[number]
        verified = check(block, position, view)
        file.write(at + position, [view])
        return len(verified)

    return sum(
        await scan(
            session,
            [block for block, _ in copies],
            put,
            meter=meter,
            executor=session.threads.reads,
            workers=parallel,
        )
    )


async def _refuse_strays(session: Session, content: Content) -> None:
    """Refuse ids outside the slices that their blocks claim, which no load takes.

    In a plain file no block claims any, and they would be as good as the others.

    Raises:
        CheckpointError: If a table has some.
        ReadError: If the storage failed.
    """
    manifest = content.manifest
    for name in content.tables:
        parts = [part for part in manifest.catalog.tables[name][ID] if not part.slice.is_whole]
        claims = [part.slice for part in parts]

        def count(number: int, _: int, view: memoryview, claims: list[Slice] = claims) -> int:
            outside = claims[number].strays(np.frombuffer(view, np.int64))
            return int(np.count_nonzero(outside))

        blocks = [manifest.block(part.place) for part in parts]
        strays = sum(await scan(session, blocks, count, meter=Meter(0), grain=_ID_BYTES))
        if strays:
            problem = (
                f"table {name!r} has {strays:,} ids outside the slices that their blocks claim, "
                "which no load takes; convert it to a folder first, which leaves them out"
            )
            raise CheckpointError(session.location, problem)


def _lay_out(file: str, content: Content) -> tuple[ShardLayout, list[_Copy]]:
    """Decide what stands where: tables first, the ids before the slots.

    Raises:
        ValueError: If two things would have the same name there.
    """
    blocks: dict[str, WriteBlock] = {}
    stored: dict[WriteBlock, Stored] = {}
    for key, one in _entries(content):
        if key == "__metadata__":
            raise ValueError(f"{one.name!r} would stand under {key!r}, which is no tensor's name")
        if key in blocks:
            other = stored[blocks[key]].name
            raise ValueError(
                f"{other!r} and {one.name!r} would both stand under {key!r}; a plain file has no "
                "other name for them"
            )
        blocks[key] = WriteBlock(
            name=key, table=None, slice=None, dtype=one.dtype, shape=one.shape, nbytes=one.nbytes
        )
        stored[blocks[key]] = one
    layout = lay_out_shard(file, blocks, _metadata(content))
    copies, end = list[_Copy](), len(layout.head)
    for placed in layout.blocks:
        at = placed.offset
        for block in stored[placed.block].blocks:
            assert at == end, "copies fill the file, and none writes over its neighbour"
            copies.append(_Copy(block, at))
            at = end = at + block.nbytes
    assert end == layout.size, "copies fill the file"
    return layout, copies


def _entries(content: Content) -> Iterator[tuple[str, Stored]]:
    for name, table in content.tables.items():
        yield key_of(name, ID), table.ids
        for slot, stored in table.slots.items():
            yield key_of(name, slot), stored
    yield from content.tensors.items()


def _metadata(content: Content) -> dict[str, str]:
    # Without a "format" some readers of Hugging Face's refuse a file.
    metadata = {"format": "pt", **metadata_of(content.manifest)}
    metadata.pop(METADATA, None)
    return metadata | ({METADATA: describe_tables(content)} if content.tables else {})
