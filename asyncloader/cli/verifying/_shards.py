"""Reads the headers of shards, each by itself."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import orjson

from asyncloader._concurrency import for_each, run_jobs
from asyncloader.checkpoint import Blocks, ShardHeader, digest_of
from asyncloader.checkpoint._header import PREFIX, header_length, parse_header
from asyncloader.errors import CheckpointError, ReadError
from asyncloader.storage import read_exactly, read_text

from ._sifting import sift

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from asyncloader._session import Session

    from ._findings import Findings

__all__ = ["Shard", "check_layout", "read_shards"]

_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One file."""

    header: ShardHeader
    """The blocks that are sound."""

    refused: frozenset[str]
    """Keys of those that are not."""

    start: int
    """Where data begins."""

    digest: str
    """Of all before."""


async def read_shards(
    session: Session, files: Iterable[str], source: str, findings: Findings
) -> dict[str, Shard]:
    """Read headers, and tell of those that are no good.

    Args:
        session: The checkpoint.
        files: Which.
        source: The file that names them.
        findings: Receives what is wrong.

    Returns:
        What could be read, by file.
    """
    shards: dict[str, Shard] = {}

    async def read(file: str) -> None:
        try:
            shards[file] = await _read(session, file, findings)
        except CheckpointError as error:
            findings.error(error)
        except ReadError as error:
            findings.problem(f"its header cannot be read: {error.problem}", file=file)
        except FileNotFoundError:
            text = f"the file is missing, but {source} names it"
            findings.problem(f"{text}; copy it, or take another checkpoint", file=file)
        except OSError as error:
            findings.problem(f"cannot be opened: {error.strerror or error}", file=file)

    await for_each(files, read, workers=session.limits.parallel, name="asyncloader-header")
    return shards


async def _read(session: Session, file: str, findings: Findings) -> Shard:
    storage, where = session.storage, session.location
    size = await storage.size(file)
    prefix = bytearray(min(PREFIX, size))
    await read_exactly(storage, file, 0, [memoryview(prefix)])
    length = header_length(where, file, bytes(prefix), size)
    try:
        text = await read_text(storage, file, PREFIX, length)
    except ValueError as error:
        raise CheckpointError(where, f"its header is not JSON: {error}", file) from error
    parse = partial(_parse, where, file, bytes(prefix), text, size, findings)
    [shard] = await run_jobs(session.threads.kernels, [parse])
    return shard


def _parse(  # noqa: PLR0917
    where: str, file: str, prefix: bytes, text: bytearray, size: int, findings: Findings
) -> Shard:
    sifted = sift(_entries(where, file, text, size), partial(_header, where, file, len(text), size))
    for error in sifted.errors:
        findings.error(error)
    return Shard(
        header=sifted.parsed or ShardHeader(file, Blocks.of(file, ()), 0),
        refused=frozenset(error.key for error in sifted.errors if error.key is not None),
        start=PREFIX + len(text),
        digest=digest_of(prefix + text),
    )


def _entries(where: str, file: str, text: bytearray, size: int) -> dict[str, Any]:
    try:
        entries = orjson.loads(text)
    except orjson.JSONDecodeError:
        entries = None
    if not isinstance(entries, dict):
        parse_header(where, file, text, size)  # raises, and says why
        return {}
    entries.pop(_METADATA, None)
    return entries


def _header(
    where: str, file: str, length: int, size: int, entries: Mapping[str, object]
) -> ShardHeader:
    """Read some entries as if there were no others; the data stays where it is."""
    return parse_header(where, file, orjson.dumps(entries).ljust(length), size)


def check_layout(shard: Shard, findings: Findings) -> None:
    """Note bytes that belong to no block."""
    file = shard.header.shard
    if shard.refused:
        return  # these may be theirs
    if shard.header.surplus:
        findings.note(f"{shard.header.surplus} bytes after the last block, ignored", file=file)
    end, lost = shard.start, 0
    for block in sorted(shard.header.blocks.values(), key=lambda block: block.offset):
        if block.nbytes:
            lost += block.offset - end
            end = block.offset + block.nbytes
    if lost:
        text = f"{lost} bytes between its blocks, ignored; safetensors itself refuses such files"
        findings.note(text, file=file)
