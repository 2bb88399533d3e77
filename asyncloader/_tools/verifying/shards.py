"""Reads the headers of shards, each by itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import orjson

from asyncloader._checkpoint.blocks import Blocks
from asyncloader._checkpoint.header import (
    FIRST,
    PREFIX,
    ShardHeader,
    check_covered,
    header_length,
    parse_header,
)
from asyncloader._checkpoint.sidecar import digest_of
from asyncloader._storage.protocol import read_exactly, read_text
from asyncloader._threads.jobs import for_each, run_jobs
from asyncloader.errors import CheckpointError, ReadError

from .sifting import Sifted, sift

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from asyncloader._loading.session import Session

    from .findings import Findings


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
    session: Session, files: Iterable[str], source: str, findings: Findings, *, recis: bool
) -> dict[str, Shard]:
    """Read headers, and tell of those that are no good.

    Args:
        session: The checkpoint.
        files: Which.
        source: The file that names them.
        findings: Receives what is wrong.
        recis: Whether they are RecIS's.

    Returns:
        What could be read, by file.
    """
    shards: dict[str, Shard] = {}

    async def read(file: str) -> None:
        try:
            shards[file] = await _read(session, file, findings, recis=recis)
        except CheckpointError as error:
            findings.error(error)
        except ReadError as error:
            findings.problem(f"its header cannot be read: {error.problem}", file=file)
        except FileNotFoundError:
            text = f"the file is missing, but {source} names it"
            findings.problem(f"{text}; copy it, or take another checkpoint", file=file)
        except OSError as error:
            findings.problem(f"cannot be opened: {error.strerror or error}", file=file)

    await for_each(files, read, workers=session.options.parallel, name="asyncloader-header")
    return shards


async def _read(session: Session, file: str, findings: Findings, *, recis: bool) -> Shard:
    storage, where = session.storage, session.location
    size = await storage.size(file)
    start = bytearray(min(FIRST, size))
    await read_exactly(storage, file, 0, [memoryview(start)])
    length = header_length(where, file, bytes(start), size)
    try:
        text = await read_text(storage, file, PREFIX, length)
    except ValueError as error:
        raise CheckpointError(where, f"its header is not JSON: {error}", file) from error
    rules = _Rules(where=where, file=file, size=size, recis=recis)
    parse = partial(_parse, rules, bytes(start[:PREFIX]), text, findings)
    [shard] = await run_jobs(session.threads.kernels, [parse])
    return shard


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rules:
    """What a header is read by."""

    where: str
    file: str
    size: int
    recis: bool

    def parse(self, text: bytes | bytearray) -> ShardHeader:
        return parse_header(self.where, self.file, text, self.size, recis=self.recis)


def _parse(rules: _Rules, prefix: bytes, text: bytearray, findings: Findings) -> Shard:
    sifted = _sifted(rules, text)
    for error in sifted.errors:
        findings.error(error)
    return Shard(
        header=sifted.parsed or ShardHeader(rules.file, Blocks.of(rules.file, ()), 0),
        refused=frozenset(error.key for error in sifted.errors if error.key is not None),
        start=PREFIX + len(text),
        digest=digest_of(prefix + text),
    )


def _sifted(rules: _Rules, text: bytearray) -> Sifted[object, ShardHeader]:
    try:
        return Sifted(rules.parse(text), {}, ())
    except CheckpointError as error:
        entries = _entries(text)
        if entries is None:
            raise
        found = sift(entries, partial(_some, rules, len(text)))
        # Where no entry is to blame, the text is: a key stands there twice.
        return found if found.errors else replace(found, errors=(error,))


def _entries(text: bytearray) -> dict[str, object] | None:
    try:
        entries = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(entries, dict):
        return None
    entries.pop(_METADATA, None)
    return entries


def _some(rules: _Rules, length: int, entries: Mapping[str, object]) -> ShardHeader:
    """Read some entries as if there were no others; the data stays where it is."""
    return rules.parse(orjson.dumps(entries).ljust(length))


def check_layout(shard: Shard, findings: Findings, *, recis: bool) -> None:
    """Tell of bytes that belong to no block, and of blocks of which only the bytes are known."""
    file = shard.header.shard
    _note_strange_dtypes(shard.header.blocks, findings)
    if shard.refused:
        return  # these may be theirs
    try:
        check_covered(file, shard.header, surplus=recis)
    except CheckpointError as error:
        findings.error(error)
    if shard.header.surplus and recis:
        findings.note(f"{shard.header.surplus} bytes after the last block, ignored", file=file)


def _note_strange_dtypes(blocks: Blocks, findings: Findings) -> None:
    if all(dtype.itemsize is not None for dtype, _ in blocks.types):
        return
    for block in blocks.values():
        if block.dtype.itemsize is None:
            text = f"is {block.dtype.name}, which torch does not have, so it cannot be loaded"
            findings.note(text, file=block.shard, name=block.key)
