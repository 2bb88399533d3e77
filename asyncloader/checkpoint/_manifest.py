"""Reads what a checkpoint says about itself: names first, then the headers of chosen shards."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from asyncloader._concurrency import for_each, run_jobs
from asyncloader.errors import CheckpointError, CheckpointNotFoundError
from asyncloader.storage import read_exactly, read_small, read_text

from ._header import PREFIX, Block, ShardHeader, header_length, parse_header
from ._index import INDEX, TENSORKEY, Catalog, Place, parse_catalog
from ._safetensors import SHARDED, SINGLE, catalog_of_file, parse_weight_map

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from concurrent.futures import Executor

    from asyncloader.storage import Storage

__all__ = ["Manifest", "read_catalog", "read_manifest"]

# A line of `index` takes some 60 bytes: room for 16 million blocks.
_MAX_JSON = 1 << 30
# Most headers fit, and one read is half the time of two.
_FIRST_READ = 16 << 10
# What a storage raises where there is no such file; it has a `strerror` that says what is missing.
_ABSENT = (FileNotFoundError, NotADirectoryError)


@dataclass(frozen=True, slots=True)
class Manifest:
    """A checkpoint's names, and the blocks of those shards whose headers were read."""

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
        if found is None and source == INDEX and "/part_" in place.key:
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
    def warnings(self) -> tuple[str, ...]:
        """What is odd but does no harm."""
        return tuple(
            f"{header.shard}: {header.surplus} bytes after the last block, ignored"
            for _, header in sorted(self.headers.items())
            if header.surplus
        )


async def read_catalog(storage: Storage, *, executor: Executor, file: str | None = None) -> Catalog:
    """Read which names there are, and where; parse on a thread, the loop goes on meanwhile.

    A folder that has `index` is a checkpoint of RecIS's, others are Hugging Face's.

    Args:
        storage: The folder.
        executor: For parsing.
        file: The one safetensors file to look at, instead of the folder that holds it.

    Raises:
        CheckpointNotFoundError: If there is no committed checkpoint, or no such file.
        CheckpointError: If a file that says so is no good.
        ReadError: If the storage failed.
    """
    where = storage.location
    if file is not None:
        try:
            return await _read_file(storage, executor, file)
        except _ABSENT as error:
            problem = f"cannot be opened: {error.strerror}"
            raise CheckpointNotFoundError(f"{where}/{file}", problem) from error
    absent: OSError | None = None
    for read in (_read_recis, _read_sharded, _read_file):
        try:
            return await read(storage, executor)
        except _ABSENT as error:
            absent = error
    problem = (
        f"no finished checkpoint here: {absent and absent.strerror}; looked for {INDEX!r}, which "
        f"RecIS's have and which is written last, and for {SHARDED!r} and {SINGLE!r}. Give the "
        "folder that holds one of them, or a file whose name ends in .safetensors"
    )
    raise CheckpointNotFoundError(where, problem) from absent


async def _read_recis(storage: Storage, executor: Executor) -> Catalog:
    where = storage.location
    index = await _read_json(storage, INDEX)
    try:
        tensorkey = await _read_json(storage, TENSORKEY)
    except _ABSENT as error:
        raise CheckpointError(where, f"cannot be opened: {error}", TENSORKEY) from error
    [catalog] = await run_jobs(executor, [partial(parse_catalog, where, index, tensorkey)])
    return catalog


async def _read_sharded(storage: Storage, executor: Executor) -> Catalog:
    text = await _read_json(storage, SHARDED)
    [catalog] = await run_jobs(executor, [partial(parse_weight_map, storage.location, text)])
    return catalog


async def _read_file(storage: Storage, executor: Executor, name: str = SINGLE) -> Catalog:
    try:
        await storage.size(name)
    except _ABSENT:
        raise
    except OSError as error:
        raise CheckpointError(storage.location, f"cannot be opened: {error}", name) from error
    header = await _read_header(storage, name, executor=executor, source=name)
    [catalog] = await run_jobs(executor, [partial(catalog_of_file, header)])
    return catalog


async def _read_json(storage: Storage, name: str) -> bytearray:
    """Return a file of names; let `_ABSENT` errors pass, and translate the others."""
    try:
        return await read_small(storage, name, limit=_MAX_JSON)
    except _ABSENT:
        raise
    except OSError as error:
        raise CheckpointError(storage.location, f"cannot be opened: {error}", name) from error


async def read_manifest(
    storage: Storage,
    catalog: Catalog,
    shards: Iterable[str],
    *,
    parallel: int,
    executor: Executor,
) -> Manifest:
    """Read the headers of `shards`, `parallel` at a time; parse them on threads.

    Raises:
        CheckpointError: For the first shard, in the order of names, that is no good; the others
            are notes on it.
        ReadError: If the storage failed.
    """
    headers: dict[str, ShardHeader] = {}
    failures: dict[str, CheckpointError] = {}

    async def read(shard: str) -> None:
        try:
            headers[shard] = await _read_header(
                storage, shard, executor=executor, source=catalog.source
            )
        except CheckpointError as error:
            failures[shard] = error

    await for_each(shards, read, workers=parallel, name="asyncloader-header")
    if failures:
        first, *others = (failures[shard] for shard in sorted(failures))
        for other in others:
            first.add_note(f"also: {other}")
        raise first
    return Manifest(storage.location, catalog, headers)


async def _read_header(
    storage: Storage, shard: str, *, executor: Executor, source: str
) -> ShardHeader:
    where = storage.location
    try:
        size = await storage.size(shard)
    except FileNotFoundError as error:
        problem = f"the file is missing, but {source} names it; copy it, or take another checkpoint"
        raise CheckpointError(where, problem, shard) from error
    except OSError as error:
        raise CheckpointError(where, f"cannot be opened: {error}", shard) from error
    start = bytearray(min(_FIRST_READ, size))
    await read_exactly(storage, shard, 0, [memoryview(start)])
    length = header_length(where, shard, bytes(start[:PREFIX]), size)
    if bytes(start[PREFIX : PREFIX + 1]) not in {b"{", b" "}:
        raise CheckpointError(where, "does not start with a safetensors header", shard)
    text = start[PREFIX : PREFIX + length]
    try:
        text += await read_text(storage, shard, PREFIX + len(text), length - len(text))
    except ValueError as error:
        raise CheckpointError(where, f"its header is not JSON: {error}", shard) from error
    parse = partial(parse_header, where, shard, memoryview(text), size)
    [header] = await run_jobs(executor, [parse])
    return header
