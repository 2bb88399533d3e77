"""Writes all of a checkpoint, in either form.

One plain safetensors file is written a piece at a time. A folder in RecIS's format is written as so
many ranks would, one after the other.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from asyncloader._checkpoint.parts import ID
from asyncloader._checkpoint.slices import gen_slice
from asyncloader._display import listed
from asyncloader._loading.progress import Meter, Stages
from asyncloader._loading.reading import has_dtype
from asyncloader._saving.save import commit_of
from asyncloader._saving.save_id import fresh_save_id
from asyncloader._storage.folder import ConditionalFolder, is_unclear
from asyncloader._threads.jobs import run_jobs
from asyncloader.errors import CheckpointError, SaveError
from asyncloader.saver import Saver

from .allocation import load_part, row_bytes
from .content import check_room, free_memory
from .scanning import scan
from .source import lay_out
from .target import Written

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from asyncloader._checkpoint.blocks import Block
    from asyncloader._checkpoint.slices import Slice
    from asyncloader._loading.progress import Progress
    from asyncloader._loading.session import Session
    from asyncloader._saving.layout import WriteBlock
    from asyncloader._saving.ranks import Ranks
    from asyncloader._storage.folder import RenamingFolder, WritableFile

    from .content import Content
    from .target import Target

_log = logging.getLogger(__name__)


async def write_file(
    content: Content,
    target: Target,
    *,
    parallel: int,
    progress: Callable[[Progress], object] | None,
) -> Written:
    """Write the file beside its place, sync it, and move it there; or to its place in a store.

    If it fails, or is cancelled, before it is there, nothing is left. Afterwards it is written.

    Raises the errors of `asyncloader.tools.convert`, and `OSError`.
    """
    await _refuse_strays(content)
    session, folder = content.session, target.folder
    assert target.file is not None, "it is a file"
    is_renamed = not isinstance(folder, ConditionalFolder)
    draft = f".{fresh_save_id()}.safetensors.tmp" if is_renamed else target.file
    reads = session.threads.reads
    [(layout, copies)] = await run_jobs(session.threads.kernels, [partial(lay_out, draft, content)])
    meter, held = Meter(sum(content.sizes.values()), progress), contextlib.ExitStack()

    def begin() -> WritableFile:
        file = folder.create(draft, size=layout.size)
        held.callback(file.close)
        file.write(0, [memoryview(layout.head)])
        return file

    def give_up() -> None:
        if is_renamed:
            with contextlib.suppress(OSError):
                folder.remove(draft)

    try:
        try:
            [file] = await run_jobs(reads, [begin])
            copy = _copy_in_order if folder.writes_in_order else _copy
            verified = await copy(session, file, copies, meter, parallel)
            await session.check_unchanged(sorted({block.shard for block, _ in copies}))
            await run_jobs(reads, [file.sync])
        finally:
            await run_jobs(reads, [held.close])
        meter.finish()
        if not isinstance(folder, ConditionalFolder):
            await run_jobs(reads, [partial(_publish, folder, draft, target)])
    except BaseException:
        await run_jobs(reads, [give_up])
        raise
    ids = Counter({name: table.ids.rows for name, table in content.tables.items()})
    return Written(files=[target.file], nbytes=layout.size, verified=verified, ids=ids)


def _publish(folder: RenamingFolder, draft: str, target: Target) -> None:
    """Move a file to its place."""
    assert target.file is not None, "it is a file"
    if not target.overwrite and folder.stat(target.file) is not None:  # it was not, at first
        raise SaveError(target.location, "has come into being meanwhile; nothing was replaced")
    folder.move(draft, target.file)  # whatever fails from here on, the file is written
    try:
        folder.sync("")
    except OSError as error:
        problem = f"is written, but may not outlive a power loss: {error}"
        raise SaveError(target.location, problem) from error


async def _copy(
    session: Session,
    file: WritableFile,
    copies: Sequence[tuple[Block, int]],
    meter: Meter,
    parallel: int,
) -> int:
    """Copy blocks to their places; return how many bytes were compared with digests."""
    check = session.verifier.check

    def put(number: int, position: int, view: memoryview) -> int:
        block, at = copies[number]
        verified = check(block, position, view)
        file.write(at + position, [view])
        return len(verified)

    blocks = [block for block, _ in copies]
    reads = session.threads.reads
    return sum(await scan(session, blocks, put, meter=meter, executor=reads, workers=parallel))


async def _copy_in_order(
    session: Session,
    file: WritableFile,
    copies: Sequence[tuple[Block, int]],
    meter: Meter,
    _: int,
) -> int:
    """Copy blocks one read after the other, in the order of their places."""
    verified, run = 0, list(copies[:1])
    for copy in copies[1:]:
        (last, _), (block, _) = run[-1], copy
        # Reads go by the order of the source: as long as both orders are the same.
        if block.shard != last.shard or block.offset < last.offset:
            verified += await _copy(session, file, run, meter, 1)
            run = []
        run.append(copy)
    return verified + await _copy(session, file, run, meter, 1)


async def _refuse_strays(content: Content) -> None:
    """Raise `CheckpointError` for ids outside the slices that their blocks claim.

    No load takes them. In a plain file no block claims any, and they would be as good as the
    others.
    """
    session, manifest = content.session, content.manifest
    for name in content.tables:
        parts = [part for part in manifest.catalog.tables[name][ID] if not part.slice.is_whole]
        claims = [part.slice for part in parts]

        def count(number: int, _: int, view: memoryview, claims: list[Slice] = claims) -> int:
            outside = claims[number].strays(np.frombuffer(view, np.int64))
            return int(np.count_nonzero(outside))

        blocks = [manifest.block(part.place) for part in parts]
        strays = sum(await scan(session, blocks, count, meter=Meter(0)))
        if strays:
            problem = (
                f"table {name!r} has {strays:,} ids outside the slices that their blocks claim, "
                "which no load takes; convert it to a folder first, which leaves them out"
            )
            raise CheckpointError(session.location, problem)


async def write_folder(
    content: Content,
    target: Target,
    *,
    ranks: int | None,
    parallel: int,
    progress: Callable[[Progress], object] | None,
) -> Written:
    """Load each rank's part and save it; rank 0, which commits, comes last.

    There are as many ranks as wrote the source, unless told. Raises the errors of
    `asyncloader.tools.convert`.
    """
    session = content.session
    ranks = ranks or max((table.ranks for table in content.tables.values()), default=1)
    await run_jobs(session.threads.reads, [partial(_check, content, ranks)])
    save_id = fresh_save_id()
    stages = Stages(2 * sum(content.sizes.values()), progress)
    done = Written(files=[], ranks=ranks)

    async def write(rank: int) -> None:
        """Write one rank's part. Its rows are let go when this returns."""
        wanted = {
            name: (gen_slice(rank, ranks, table.slice_size), table.slots)
            for name, table in content.tables.items()
        }
        dense = content.tensors if rank == 0 else {}
        part = await load_part(content, wanted, dense, stages)
        saver = Saver(
            rank,
            ranks,
            parallel,
            target.location,
            part.tables,
            part.tensors,
            partial(_wanted, content),
            save_id=save_id,
            overwrite=target.overwrite,
            storage_options=session.options.storage_options,
            max_inflight_bytes=session.options.max_inflight_bytes,
            progress=stages.tell,
        )
        report = await saver.asave()
        stages.next()
        done.add(part, report)

    commit = commit_of(target.folder, save_id, 0, ranks, replaces=target.overwrite)
    try:
        await run_jobs(session.threads.reads, [commit.begin])  # other ranks wait for that
        for rank in reversed(range(ranks)):
            await write(rank)
    except BaseException as error:
        await run_jobs(session.threads.reads, [partial(_clean_up, commit, error)])
        for warning in commit.told:
            _log.warning("%s: %s", target.location, warning)
        raise
    return done


def _clean_up(commit: Ranks, error: BaseException) -> None:
    """Remove the files of all ranks: a `Saver` that fails removes those of its own.

    If the last one failed in its commit, and could not put the old files back, they are kept; in a
    store all of it is kept that is a checkpoint, or may be.
    """
    unsure = isinstance(error.__cause__, OSError) and is_unclear(error.__cause__)
    if not (unsure and isinstance(commit.folder, ConditionalFolder)):
        commit.abandon([], "")


def _check(content: Content, ranks: int) -> None:
    """Raise an error if the content cannot be saved as so many ranks; belongs on a thread."""
    for name, table in content.tables.items():
        if name in content.tensors:
            problem = f"both a tensor and a table are called {name!r}, which cannot be saved"
            raise CheckpointError(content.location, problem)
        if ranks > table.slice_size:
            problem = (
                f"table {name!r} has a slice size of {table.slice_size}, so at most as many ranks "
                f"can share it, not {ranks}"
            )
            raise CheckpointError(content.location, problem)
    slots = [stored for table in content.tables.values() for stored in table.slots.values()]
    lacking = tuple(
        f"{one.name!r} ({one.dtype.name})"
        for one in (*slots, *content.tensors.values())
        if not has_dtype(one.dtype)
    )
    if lacking:
        problem = (
            f"torch lacks the dtype of {listed(lacking)}, and a folder is written from torch's "
            "tensors; a destination that ends in .safetensors gets the bytes as they are"
        )
        raise CheckpointError(content.location, problem)
    part = sum(one.ids.rows * row_bytes(one.slots) for one in content.tables.values()) // ranks
    dense = sum(stored.nbytes for stored in content.tensors.values())
    what = f"the part of one of {ranks} ranks (with more --shards it is smaller)"
    check_room(what, part + dense, free_memory())


def _wanted(content: Content, blocks: list[WriteBlock]) -> list[WriteBlock]:
    """Leave out the embeddings of a table that has none: they are ours."""
    kept = {f"{name}@{slot}" for name, one in content.tables.items() for slot in (ID, *one.slots)}
    return [block for block in blocks if block.table is None or block.name in kept]
