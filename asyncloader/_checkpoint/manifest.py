"""Reads the headers of chosen shards."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from asyncloader._storage.protocol import opening_error, read_exactly, read_text
from asyncloader._threads.jobs import for_each, run_jobs, undisturbed
from asyncloader.errors import CheckpointChangedError, CheckpointError, ReadError

from .files import INDEX, SIDECAR
from .header import FIRST, PREFIX, ShardHeader, header_length, parse_header
from .problems import Problem, Problems

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from concurrent.futures import Executor

    from asyncloader._storage.protocol import Storage

    from .blocks import Block
    from .index import Catalog, Place


# Most headers fit, and one read is half the time of two.
_FIRST_READ = 16 << 10
# Objects take ten times the room of their text, and of several texts that are parsed on threads no
# two at a time: Python makes objects on one thread only. So large ones take turns.
_LARGE = 1 << 20


@dataclass(frozen=True, slots=True)
class Manifest:
    """A checkpoint's names, and the blocks of all shards whose headers were read."""

    location: str
    catalog: Catalog
    headers: Mapping[str, ShardHeader]

    def block(self, place: Place) -> Block:
        """Return the block at a place whose header was read.

        Raises:
            CheckpointError: If the shard does not have it.
        """
        blocks = self.headers[place.shard].blocks
        found = blocks.get(place.key)
        source = self.catalog.source
        if found is None and self.catalog.recis and "/part_" in place.key:
            # RecIS's saver indexes `x/part_0^ ` but writes `x/part_0`.
            found = blocks.get(place.key.removesuffix("^ "))
        if found is None:
            problem = (
                f"{source} says that it stands here, but the header does not have it; "
                "copy both files again"
            )
            raise CheckpointError(self.location, problem, place.shard, place.key)
        return found

    @property
    def oddities(self) -> tuple[Problem, ...]:
        """Oddities that do no harm."""
        surplus = (
            Problem(shard, None, f"{header.surplus} bytes after the last block, ignored")
            for shard, header in sorted(self.headers.items())
            if header.surplus
        )
        return (*self.catalog.oddities, *surplus)

    @property
    def warnings(self) -> tuple[str, ...]:
        """The same in words."""
        return tuple(map(str, self.oddities))


async def read_manifest(
    storage: Storage,
    catalog: Catalog,
    shards: Iterable[str],
    *,
    parallel: int,
    executor: Executor,
    problems: Problems | None = None,
) -> Manifest:
    """Read the headers of `shards`, `parallel` at a time; parse them on threads.

    A program that replaces a checkpoint takes its `index` away first and puts the new one there
    last. So where `index` is still the one that was read, once all shards are open, they belong to
    it.

    Args:
        storage: The folder.
        catalog: Its names.
        shards: The files.
        parallel: How many headers are read at a time.
        executor: For parsing.
        problems: Receives the problems of headers; if `None`, the first one is raised.

    Raises:
        CheckpointChangedError: If it was replaced meanwhile.
        CheckpointError: For the first shard, in the order of names, that is no good; the others
            are notes on it.
        ReadError: If the storage failed.
    """
    headers: dict[str, ShardHeader] = {}
    failures: dict[str, CheckpointError] = {}
    turns = asyncio.Lock()
    problems = Problems(storage.location) if problems is None else problems

    async def read(shard: str) -> None:
        if catalog.header is not None and catalog.header.shard == shard:
            headers[shard] = catalog.header
            return
        try:
            headers[shard] = await read_header(
                storage, shard, executor=executor, catalog=catalog, turns=turns, problems=problems
            )
        except CheckpointError as error:
            failures[shard] = error
        except ReadError as error:
            problems.error(error)

    await for_each(shards, read, workers=parallel, name="asyncloader-header")
    await check_unchanged(storage, catalog.source)  # first: it explains the failures
    if failures:
        first, *others = (failures[shard] for shard in sorted(failures))
        for other in others:
            first.add_note(f"also: {other}")
        for error in (first, *others):
            problems.error(error)
    return Manifest(storage.location, catalog, headers)


async def check_unchanged(storage: Storage, source: str) -> None:
    """Look whether the file that names everything is still the one that was read.

    Raises:
        CheckpointChangedError: If it is not.
        CheckpointError: If it cannot be looked at.
    """
    try:
        changed = await storage.changed([source])
    except OSError as error:
        raise opening_error(storage.location, source, error) from error
    if changed:
        problem = (
            "was replaced, or removed, while the checkpoint was being read; read it again, with a "
            "new CheckpointReader if you use one"
        )
        raise CheckpointChangedError(storage.location, problem, source)


async def read_header(
    storage: Storage,
    shard: str,
    *,
    executor: Executor,
    catalog: Catalog,
    turns: asyncio.Lock,
    problems: Problems,
) -> ShardHeader:
    """Read one header; a large one when it is its turn.

    Args:
        storage: The folder.
        shard: The file.
        executor: For parsing.
        catalog: The folder's names.
        turns: Held while a large header is read.
        problems: Receives the problems of blocks and digests.

    Raises:
        CheckpointError: If nothing can be made of it.
        ReadError: If the storage failed.
    """
    where, digests = storage.location, None
    if catalog.sidecar is not None:
        digests = catalog.sidecar.shards.get(shard)
        if digests is None:
            problems.add(f"{INDEX} names it, but {SIDECAR} has no digests of it", shard)
    size = await _size_of(storage, shard, catalog)
    start = bytearray(min(_FIRST_READ, size))
    await read_exactly(storage, shard, 0, [memoryview(start)])
    length = header_length(where, shard, bytes(start[:FIRST]), size)
    async with turns if length > _LARGE else contextlib.nullcontext():
        text = start[PREFIX : PREFIX + length]
        try:
            text += await read_text(storage, shard, PREFIX + len(text), length - len(text))
        except ValueError as error:
            raise CheckpointError(where, f"its header is not JSON: {error}", shard) from error
        parse = partial(
            parse_header, problems, shard, text, size, recis=catalog.recis, digests=digests
        )
        if len(text) <= _FIRST_READ:  # done before a thread could have begun
            return parse()
        [header] = await run_jobs(executor, [undisturbed(parse)])
        return header


async def _size_of(storage: Storage, shard: str, catalog: Catalog) -> int:
    where = storage.location
    try:
        return await storage.size(shard)
    except FileNotFoundError as error:
        named = f"the file is missing, but {catalog.source} names it"
        problem = f"{named}; copy it, or take another checkpoint"
        raise CheckpointError(where, problem, shard) from error
    except OSError as error:
        raise opening_error(where, shard, error) from error
