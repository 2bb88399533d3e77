"""The blocks of a checkpoint by name: reads the headers of chosen shards, and finds tensors."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from asyncloader._storage.protocol import opening_error, read_exactly, read_text
from asyncloader._threads.jobs import for_each, run_jobs, undisturbed
from asyncloader.errors import CheckpointChangedError, CheckpointError, ReadError

from .archive import SIGNATURE
from .format import DENSE_SUFFIX, INDEX, PREFIX, SAFETENSORS, SIDECAR
from .header import FIRST, ShardHeader, header_length, parse_header
from .parts import row_problems
from .problems import Problem, Problems
from .torch_file import parse_archive, read_archive

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from concurrent.futures import Executor

    from asyncloader._storage.protocol import Storage, ThreadedStorage

    from .blocks import Block
    from .dtypes import DType
    from .index import Catalog, Place


# Most headers fit, and one read is half the time of two.
_FIRST_READ = 16 << 10
# Objects take ten times the room of their text. Threads cannot parse several texts at the same
# time: one thread at a time makes Python objects. So large headers take turns.
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
        if found is None and self.catalog.recis and "/part_" in place.key:
            # RecIS's saver indexes `x/part_0^ ` but writes `x/part_0`.
            found = blocks.get(place.key.removesuffix(DENSE_SUFFIX))
        if found is None:
            problem = (
                f"{self.catalog.source} says that it stands here, but the header does not have it; "
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One tensor on disk, in one or more blocks whose rows follow each other."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    blocks: tuple[Block, ...]

    @property
    def rows(self) -> int:
        """Length of the first dimension; a scalar raises a `ValueError`."""
        if not self.shape:
            raise ValueError(f"{self.name!r} is a scalar, it has no rows")
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that all blocks take on disk."""
        return sum(block.nbytes for block in self.blocks)

    @property
    def memory(self) -> int:
        """Bytes that it takes in memory; the bytes on disk if torch lacks its dtype."""
        itemsize = self.dtype.itemsize
        return self.nbytes if itemsize is None else math.prod(self.shape) * itemsize

    def window(self, begin: int, end: int) -> Stored:
        """Return the rows `[begin, end)`; raise a `ValueError` if one of them is not there."""
        if not 0 <= begin <= end <= self.rows:
            raise ValueError(f"{self.name!r} has {self.rows} rows, not [{begin}, {end})")
        ends = itertools.accumulate(block.rows for block in self.blocks)
        cuts = (
            block.window(max(begin - (last - block.rows), 0), min(end - last, 0) + block.rows)
            for block, last in zip(self.blocks, ends, strict=True)
        )
        return replace(
            self,
            shape=(end - begin, *self.shape[1:]),
            blocks=tuple(block for block in cuts if block is not None),
        )


def stored_tensor(manifest: Manifest, name: str) -> Stored:
    """Return the tensor of a name whose headers were read.

    Raises:
        CheckpointError: If its blocks do not fit together, or a shard lacks one.
    """
    blocks = tuple(manifest.block(place) for place in manifest.catalog.places(name))
    first, shape = blocks[0], blocks[0].shape
    if len(blocks) > 1:
        Problems(manifest.location).take(row_problems(name, blocks))
        shape = (sum(block.rows for block in blocks), *shape[1:])
    return Stored(name=name, dtype=first.dtype, shape=shape, blocks=blocks)


async def read_manifest(
    storage: ThreadedStorage,
    catalog: Catalog,
    shards: Iterable[str],
    *,
    parallel: int,
    executor: Executor,
    problems: Problems | None = None,
) -> Manifest:
    """Read the headers of `shards`, `parallel` at a time; parse them on threads.

    A program that replaces a checkpoint takes its `index` away first and puts the new one there
    last. So if `index` is still the file that was read, once all shards are open, they belong to
    it. `problems` receives the problems of headers; if it is `None`, the first one is raised.

    Raises:
        CheckpointChangedError: If it was replaced meanwhile.
        CheckpointError: For the first damaged shard, in the order of names; the others are notes on
            it.
        ReadError: If the storage failed.
    """
    headers: dict[str, ShardHeader] = {}
    failures: dict[str, CheckpointError] = {}
    turns = asyncio.Lock()
    problems = Problems(storage.location) if problems is None else problems

    async def read(shard: str) -> None:
        if (known := catalog.headers.get(shard)) is not None:
            headers[shard] = known
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
    """See that the file of the names, `source`, is still the one that was read.

    Raises:
        CheckpointChangedError: If it is another one.
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
    storage: ThreadedStorage,
    shard: str,
    *,
    executor: Executor,
    catalog: Catalog,
    turns: asyncio.Lock,
    problems: Problems,
) -> ShardHeader:
    """Read one header, a large one while it holds `turns`.

    `problems` receives the problems of blocks and digests.

    Raises:
        CheckpointError: If the file has no such header.
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
    if start.startswith(SIGNATURE) and not shard.endswith(SAFETENSORS):
        archive = await read_archive(storage, shard, size, executor=executor)
        [header] = await run_jobs(
            executor, [undisturbed(partial(parse_archive, problems, archive, digests))]
        )
        return header
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
