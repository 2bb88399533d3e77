"""Reads what a checkpoint says about itself: names first, then the headers of chosen shards."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from asyncloader._concurrency import for_each, run_jobs
from asyncloader.errors import CheckpointError, CheckpointNotFoundError
from asyncloader.storage import read_exactly, read_small, read_text

from ._header import PREFIX, Block, ShardHeader, header_length, parse_header
from ._index import INDEX, TENSORKEY, Catalog, Place, parse_catalog
from ._safetensors import SHARDED, SINGLE, catalog_of_file, parse_weight_map
from ._sidecar import SIDECAR, ShardDigests, Sidecar, check_files, parse_sidecar

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from concurrent.futures import Executor

    from asyncloader.storage import Storage

__all__ = ["Manifest", "Verify", "read_catalog", "read_manifest"]

Verify = Literal["auto", "require", "off"]
"""Whether bytes are compared with digests: where there are any, always or not at all, or never."""

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
        surplus = (
            f"{header.shard}: {header.surplus} bytes after the last block, ignored"
            for _, header in sorted(self.headers.items())
            if header.surplus
        )
        return (*self.catalog.warnings, *surplus)


async def read_catalog(
    storage: Storage, *, executor: Executor, verify: Verify, file: str | None = None
) -> Catalog:
    """Read which names there are, and where; parse on a thread, the loop goes on meanwhile.

    A folder that has `index` is a checkpoint of RecIS's, others are Hugging Face's.

    Args:
        storage: The folder.
        executor: For parsing.
        file: The one safetensors file to look at, instead of the folder that holds it.
        verify: Whether to take the digests along, if there are any.

    Raises:
        CheckpointNotFoundError: If there is no committed checkpoint, or no such file.
        CheckpointError: If a file that says so is no good.
        ReadError: If the storage failed.
    """
    where = storage.location
    if file is not None:
        try:
            return _without_digests(where, verify, await _read_file(storage, executor, file))
        except _ABSENT as error:
            problem = f"cannot be opened: {error.strerror}"
            raise CheckpointNotFoundError(f"{where}/{file}", problem) from error
    try:
        return await _read_recis(storage, executor, verify)
    except _ABSENT as error:
        absent = error
    for read in (_read_sharded, _read_file):
        try:
            return _without_digests(where, verify, await read(storage, executor))
        except _ABSENT as error:
            absent = error
    problem = (
        f"no finished checkpoint here: {absent.strerror}; looked for {INDEX!r}, which "
        f"RecIS's have and which is written last, and for {SHARDED!r} and {SINGLE!r}. Give the "
        "folder that holds one of them, or a file whose name ends in .safetensors"
    )
    raise CheckpointNotFoundError(where, problem) from absent


async def _read_recis(storage: Storage, executor: Executor, verify: Verify) -> Catalog:
    where = storage.location
    index = await _read_json(storage, INDEX)
    try:
        tensorkey = await _read_json(storage, TENSORKEY)
    except _ABSENT as error:
        raise CheckpointError(where, f"cannot be opened: {error}", TENSORKEY) from error
    try:
        sidecar = bytearray() if verify == "off" else await _read_json(storage, SIDECAR)
    except _ABSENT:
        sidecar = bytearray()

    def parse() -> Catalog:
        catalog = parse_catalog(where, index, tensorkey)
        if not sidecar:
            return _without_digests(where, verify, catalog)
        return _with_digests(where, verify, catalog, sidecar, {INDEX: index, TENSORKEY: tensorkey})

    [catalog] = await run_jobs(executor, [parse])
    return catalog


def _with_digests(
    where: str,
    verify: Verify,
    catalog: Catalog,
    text: bytearray,
    others: Mapping[str, bytearray],
) -> Catalog:
    sidecar = parse_sidecar(where, text)
    if sidecar is None:
        odd = f"{SIDECAR} is of a format that is not known here, so nothing is verified"
    elif check_files(where, sidecar, others):
        return replace(catalog, sidecar=sidecar)
    else:
        odd = f"{SIDECAR} belongs to another save than {INDEX}, so nothing is verified"
    return replace(_without_digests(where, verify, catalog), warnings=(odd,))


def _without_digests(where: str, verify: Verify, catalog: Catalog) -> Catalog:
    """Return a catalog as it is, unless digests are required."""
    if verify == "require":
        problem = (
            f"has no digests that belong to it ({SIDECAR}), and verify='require' asks for them; "
            "save it with asyncloader.Saver, or load it with verify='auto'"
        )
        raise CheckpointError(where, problem)
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
    header = await _read_header(storage, name, executor=executor, catalog=Catalog({}, {}, name))
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
        if catalog.header is not None and catalog.header.shard == shard:
            headers[shard] = catalog.header
            return
        try:
            headers[shard] = await _read_header(storage, shard, executor=executor, catalog=catalog)
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
    storage: Storage, shard: str, *, executor: Executor, catalog: Catalog
) -> ShardHeader:
    where = storage.location
    digests = None if catalog.sidecar is None else _digests_of(where, shard, catalog.sidecar)
    try:
        size = await storage.size(shard)
    except FileNotFoundError as error:
        named = f"the file is missing, but {catalog.source} names it"
        problem = f"{named}; copy it, or take another checkpoint"
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
    parse = partial(parse_header, where, shard, memoryview(text), size, digests)
    [header] = await run_jobs(executor, [parse])
    return header


def _digests_of(where: str, shard: str, sidecar: Sidecar) -> ShardDigests:
    digests = sidecar.shards.get(shard)
    if digests is None:
        raise CheckpointError(where, f"{INDEX} names it, but {SIDECAR} has no digests of it", shard)
    return digests
