"""Reads the header of a shard file. Bytes in, frozen values out.

A shard is a safetensors file: 8 bytes little-endian header length, that many bytes of JSON
`{key: {"dtype", "shape", "data_offsets": [begin, end]}}`, then the data; offsets count from its
first byte. Nothing that a header says is believed before it is checked against the length of the
file: a block that this module returns lies within the file, overlaps no other, and is as long as
its dtype and shape demand.
"""

from __future__ import annotations

from dataclasses import dataclass
from reprlib import repr as shown  # shortens, and takes lists nested a thousand deep
from typing import TYPE_CHECKING

import orjson

from asyncloader.errors import CheckpointError, TruncatedShardError

from ._dtypes import DTYPES
from ._files import SIDECAR
from ._sidecar import chunk_count, digest_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ._dtypes import DType
    from ._sidecar import ShardDigests

__all__ = ["MAX_HEADER", "PREFIX", "Block", "ShardHeader", "header_length", "parse_header"]

PREFIX = 8
# As much as safetensors itself allows: room for a million tensors in one shard.
MAX_HEADER = 100_000_000
_METADATA = "__metadata__"
_INT64_MAX = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Block:
    """Where one tensor's bytes stand."""

    shard: str
    """File name within the checkpoint."""

    key: str
    """Its name in the header."""

    dtype: DType
    shape: tuple[int, ...]

    offset: int
    """First byte, from the start of the file."""

    nbytes: int

    digests: tuple[str, ...] | None = None
    """Of each chunk of its bytes, where they are known: see `_sidecar`."""

    @property
    def rows(self) -> int:
        """Length of the first dimension; 1 for a scalar."""
        return self.shape[0] if self.shape else 1


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """What one shard file declares."""

    shard: str
    blocks: Mapping[str, Block]

    surplus: int
    """Bytes after the last block."""


def header_length(location: str, shard: str, prefix: bytes, size: int) -> int:
    """Return the length of the header in bytes, once it is known to be possible.

    Args:
        location: The checkpoint, for messages.
        shard: The file's name.
        prefix: The file's first bytes, at most 8.
        size: The file's length.

    Raises:
        TruncatedShardError: If the file ends within its header.
        CheckpointError: If the length is absurd.
    """
    if len(prefix) < PREFIX:
        raise TruncatedShardError(location, shard, None, 0, PREFIX, size)
    length = int.from_bytes(prefix[:PREFIX], "little")
    if length > MAX_HEADER or length < len("{}"):
        problem = f"declares a header of {length} bytes; this is not a safetensors file"
        raise CheckpointError(location, problem, shard)
    if PREFIX + length > size:
        raise TruncatedShardError(location, shard, None, PREFIX, PREFIX + length, size)
    return length


def parse_header(
    location: str,
    shard: str,
    text: bytes | bytearray | memoryview,
    size: int,
    digests: ShardDigests | None = None,
) -> ShardHeader:
    """Read the JSON of a header.

    Args:
        location: The checkpoint, for messages.
        shard: The file's name.
        text: The header, without the 8 bytes before it.
        size: The file's length in bytes.
        digests: What the sidecar says of the shard.

    Raises:
        CheckpointError: If it is not such JSON, the offsets contradict each other, or the digests
            are not those of this header.
        TruncatedShardError: If the file ends before its last block does.
    """
    try:
        entries = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise CheckpointError(location, f"its header is not JSON: {error}", shard) from error
    if not isinstance(entries, dict):
        raise CheckpointError(location, "its header is not a JSON object", shard)
    start = PREFIX + len(text)
    if digests is not None:
        _check_digest(location, shard, text, digests.header)
    entries.pop(_METADATA, None)
    blocks = {}
    for key, entry in entries.items():
        problem = _problem(entry)
        if problem:
            raise CheckpointError(location, problem, shard, key)
        begin, end = entry["data_offsets"]
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        known = None if digests is None else digests.blocks.get(key, ())
        if known is not None and len(known) != chunk_count(end - begin):
            problem = f"{SIDECAR} has {len(known)} digests for its {end - begin} bytes"
            raise CheckpointError(location, problem, shard, key)
        blocks[key] = Block(shard, key, dtype, shape, start + begin, end - begin, known)
    end = _check_layout(location, list(blocks.values()), start, size)
    return ShardHeader(shard, blocks, size - end)


def _check_digest(
    location: str, shard: str, text: bytes | bytearray | memoryview, wanted: str
) -> None:
    found = digest_of(len(text).to_bytes(PREFIX, "little") + bytes(text))
    if found != wanted:
        end = PREFIX + len(text)
        problem = f"bytes [0, {end}), its header, are not those that were written: {SIDECAR} has "
        problem += f"the digest {wanted}, they have {found}; copy the file again"
        raise CheckpointError(location, problem, shard)


def _problem(entry: object) -> str | None:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        return f"its entry lacks dtype, shape or data_offsets: {shown(entry)}"
    name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        return f"unknown dtype {shown(name)}; known are {', '.join(DTYPES)}"
    if not _are_sizes(shape):
        return f"shape {shown(shape)} is not a list of sizes"
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:  # noqa: PLR2004
        return f"data_offsets {shown(offsets)} are not [begin, end]"
    if (taken := _nbytes(shape, dtype.itemsize)) != offsets[1] - offsets[0]:
        return (
            f"data_offsets {offsets} hold {offsets[1] - offsets[0]} bytes, but {dtype.name} of "
            f"shape {shown(shape)} takes {taken}; the file is corrupt "
            "(RecIS 1.0.0 writes this for rows of rank 2 or 3)"
        )
    return None


def _are_sizes(values: object) -> bool:
    if not isinstance(values, list):
        return False
    return all(type(value) is int and 0 <= value <= _INT64_MAX for value in values)


def _nbytes(shape: Sequence[int], itemsize: int) -> int:
    """Return the bytes of a tensor, or any number that is more than a file can have."""
    size = 0 if 0 in shape else itemsize
    for length in shape:
        size *= length
        if size > _INT64_MAX:
            break
    return size


def _check_layout(location: str, blocks: Sequence[Block], start: int, size: int) -> int:
    """Return where the last block ends, or raise if any two overlap or one lies outside."""
    end, before = start, None
    for block in sorted((block for block in blocks if block.nbytes), key=lambda b: b.offset):
        if block.offset < end:
            problem = (
                f"bytes [{block.offset}, {block.offset + block.nbytes}) overlap those of "
                f"{before!r}, which end at {end}"
            )
            raise CheckpointError(location, problem, block.shard, block.key)
        end, before = block.offset + block.nbytes, block.key
        if end > size:
            raise TruncatedShardError(location, block.shard, block.key, block.offset, end, size)
    return end
