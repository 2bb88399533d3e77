"""Writes all of a checkpoint into one plain safetensors file, a piece at a time."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from asyncloader._loading.progress import Meter
from asyncloader._planning.load_info import ID
from asyncloader._saving.layout import WriteBlock, lay_out_shard
from asyncloader._saving.save_id import fresh_save_id
from asyncloader._storage.folder import LocalFolder
from asyncloader._threads.jobs import run_jobs
from asyncloader.errors import AsyncLoaderError, SaveError

from .copying import Copy, Copying
from .recognition import METADATA, describe_tables, key_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from asyncloader._checkpoint.stored import Stored
    from asyncloader._loading.progress import Progress
    from asyncloader._loading.session import Session
    from asyncloader._saving.layout import ShardLayout
    from asyncloader._storage.folder import WritableFile

    from .source import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What was written."""

    files: tuple[str, ...]
    bytes_written: int
    bytes_verified: int


def lay_out_file(file: str, source: Source) -> tuple[ShardLayout, list[Copy]]:
    """Decide what stands where: tables first, the ids before the slots.

    Args:
        file: Its name.
        source: What it shall hold.

    Raises:
        ValueError: If two things would have the same name there.
    """
    blocks: dict[str, WriteBlock] = {}
    stored: dict[WriteBlock, Stored] = {}
    for key, one in _entries(source):
        if key == "__metadata__":
            raise ValueError(f"{one.name!r} would stand under {key!r}, which is no tensor's name")
        if key in blocks:
            other = stored[blocks[key]].name
            raise ValueError(
                f"{other!r} and {one.name!r} would both stand under {key!r}; a plain file has no "
                "other name for them"
            )
        block = WriteBlock(
            name=key,
            table=None,
            slice=None,
            dtype=one.dtype,
            shape=one.shape,
            nbytes=one.nbytes,
        )
        blocks[key] = block
        stored[block] = one
    layout = lay_out_shard(file, 0, blocks, _metadata(source))
    places = ((placed.offset, stored[placed.block]) for placed in layout.blocks)
    copies = [copy for at, one in places for copy in _copies(at, one)]
    _check_tiles(layout, copies)
    return layout, copies


def _check_tiles(layout: ShardLayout, copies: Sequence[Copy]) -> None:
    """Make sure that copies fill the file, and that none writes over its neighbour.

    Raises:
        RuntimeError: If not.
    """
    end = len(layout.head)
    for block, at in copies:
        if at != end:
            raise RuntimeError(f"{block.key!r} would be written to {at}, but {end} is free")
        end += block.nbytes
    if end != layout.size:
        raise RuntimeError(f"{end} bytes would be written to a file of {layout.size}")


def _copies(at: int, stored: Stored) -> Iterator[Copy]:
    """Yield the blocks of what stands at an offset of the file, one after the other."""
    for block in stored.blocks:
        yield Copy(block, at)
        at += block.nbytes


def _entries(source: Source) -> Iterator[tuple[str, Stored]]:
    for table in source.tables:
        yield key_of(table.name, ID), table.ids
        for slot, stored in table.slots.items():
            yield key_of(table.name, slot), stored
    for stored in source.tensors:
        yield stored.name, stored


def _metadata(source: Source) -> dict[str, str]:
    # Without a "format" some readers of Hugging Face's refuse a file.
    metadata = {"format": "pt", **source.metadata}
    tables = {table.name: (table.slice_size, [ID, *table.slots]) for table in source.tables}
    metadata.pop(METADATA, None)
    return metadata | ({METADATA: describe_tables(tables)} if tables else {})


async def write_file(
    session: Session,
    source: Source,
    path: Path,
    *,
    parallel: int,
    overwrite: bool,
    progress: Callable[[Progress], object] | None,
) -> Written:
    """Write the file beside its place, sync it, and move it there.

    If it fails, or is cancelled, before the move, nothing is left. Afterwards the file is written.

    Args:
        session: The source.
        source: What it holds.
        path: The file.
        parallel: Writes at a time.
        overwrite: Whether to replace what is there by then.
        progress: Called on the event loop.

    Raises:
        ValueError: If two things would have the same name there.
        CheckpointError: If bytes are not those that were written, or a file is another one by now.
        ReadError: If the source failed.
        SaveError: If the file could not be written; or it was, but may not outlive a power loss.
    """
    folder = LocalFolder(path.parent)
    draft = f".{fresh_save_id()}.safetensors.tmp"
    threads = session.threads
    lay_out = partial(lay_out_file, draft, source)
    [(layout, copies)] = await run_jobs(threads.kernels, [lay_out])
    shards = sorted({copy.block.shard for copy in copies})
    meter, held = Meter(source.nbytes, progress), contextlib.ExitStack()

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
            [file] = await run_jobs(threads.reads, [begin])
            await Copying(session=session, file=file, copies=copies, meter=meter).run(parallel)
            await run_jobs(threads.reads, [file.sync])
        finally:
            await run_jobs(threads.reads, [held.close])
        await session.check_unchanged(shards)
        meter.finish()
        await run_jobs(threads.reads, [publish])
    except BaseException as error:
        await run_jobs(threads.reads, [give_up])
        if isinstance(error, OSError) and not isinstance(error, AsyncLoaderError):
            raise SaveError(str(path), f"could not be written: {error}") from error
        raise
    return Written(files=(path.name,), bytes_written=layout.size, bytes_verified=meter.verified)
