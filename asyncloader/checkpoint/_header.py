"""Reads the header of a shard file. Bytes in, frozen values out.

A shard is a safetensors file: 8 bytes little-endian header length, that many bytes of JSON
`{key: {"dtype", "shape", "data_offsets": [begin, end]}}`, then the data; offsets count from its
first byte. Nothing that a header says is believed before it is checked against the length of the
file: a block that this module returns lies within the file, overlaps no other, and is as long as
its dtype and shape demand.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, repeat
from operator import itemgetter
from reprlib import repr as shown  # shortens, and takes lists nested a thousand deep
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from asyncloader.errors import CheckpointError, TruncatedShardError

from ._blocks import Blocks
from ._dtypes import DTYPES
from ._files import SIDECAR
from ._sidecar import DIGEST_CHUNK, chunk_count, digest_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ._dtypes import DType
    from ._sidecar import ShardDigests

__all__ = ["MAX_HEADER", "PREFIX", "ShardHeader", "header_length", "parse_header"]

PREFIX = 8
# As much as safetensors itself allows: room for a million tensors in one shard.
MAX_HEADER = 100_000_000
_METADATA = "__metadata__"
_INT64_MAX = 2**63 - 1
# Of an offset. Where the data begins, at most `MAX_HEADER`, is added to it.
_OFFSET_MAX = _INT64_MAX - 2**30
_FIELDS = itemgetter("dtype", "shape", "data_offsets")
_PAIR = 2


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """What one shard file declares."""

    shard: str
    blocks: Blocks

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
    try:
        blocks = _blocks(shard, entries, start, digests)
    except _OddError:
        _explain(location, shard, entries, digests)
        raise  # not reached: whatever is odd has a problem that can be named
    end = _check_layout(location, blocks, start, size)
    return ShardHeader(shard, blocks, size - end)


class _OddError(Exception):
    """Something is wrong with one of the entries."""


def _blocks(
    shard: str, entries: Mapping[str, Any], start: int, digests: ShardDigests | None
) -> Blocks:
    """Read all entries at once, column by column; `_explain` finds out which one is wrong.

    Raises:
        _OddError: If `_problem` would name a problem of one of them.
    """
    try:
        rows = list(map(_FIELDS, entries.values()))
    except (KeyError, TypeError) as error:
        raise _OddError from error
    names, shapes, ranges = map(list, zip(*rows, strict=True)) if rows else ([], [], [])
    sound = _are_lists_of_sizes(shapes, _INT64_MAX) and _are_lists_of_sizes(ranges, _OFFSET_MAX)
    if not sound or not _are_all(names, str):
        raise _OddError
    if any(map(_PAIR.__ne__, map(len, ranges))):
        raise _OddError
    types: dict[tuple[str, tuple[int, ...]], int] = {}
    kinds = [
        types.setdefault(one, len(types)) for one in zip(names, map(tuple, shapes), strict=True)
    ]
    known = [(_dtype(name), shape) for name, shape in types]
    bounds = np.fromiter(chain.from_iterable(ranges), np.int64, 2 * len(ranges)).reshape(-1, 2)
    sizes = (min(_nbytes(shape, dtype.itemsize), _INT64_MAX) for dtype, shape in known)
    taken = np.fromiter(sizes, np.int64, len(known))
    of_kind = np.array(kinds, np.int64)
    nbytes = bounds[:, 1] - bounds[:, 0]
    if (nbytes != taken[of_kind]).any():
        raise _OddError
    of_keys = None if digests is None else digests.blocks
    if of_keys is not None:
        counts = map(len, map(of_keys.get, entries, repeat(())))
        if (np.fromiter(counts, np.int64, len(entries)) != -(-nbytes // DIGEST_CHUNK)).any():
            raise _OddError
    return Blocks(
        shard,
        entries,
        types=known,
        kinds=of_kind,
        offsets=bounds[:, 0] + start,
        nbytes=nbytes,
        digests=of_keys,
    )


def _are_all(values: Iterable[object], kind: type) -> bool:
    return set(map(type, values)) <= {kind}


def _are_lists_of_sizes(values: Sequence[Any], limit: int) -> bool:
    """Say whether these are lists of sizes; `true` is not one."""
    if not _are_all(values, list):
        return False
    numbers = list(chain.from_iterable(values))
    if not numbers:
        return True
    return _are_all(numbers, int) and min(numbers) >= 0 and max(numbers) <= limit


def _dtype(name: str) -> DType:
    dtype = DTYPES.get(name)
    if dtype is None:
        raise _OddError
    return dtype


def _explain(
    location: str, shard: str, entries: Mapping[str, object], digests: ShardDigests | None
) -> None:
    """Raise an error about the first entry that is wrong."""
    for key, entry in entries.items():
        problem = _problem(entry) or _digest_problem(entry, key, digests)
        if problem:
            raise CheckpointError(location, problem, shard, key)


def _digest_problem(entry: Any, key: str, digests: ShardDigests | None) -> str | None:  # noqa: ANN401
    if digests is None:
        return None
    begin, end = entry["data_offsets"]
    known = digests.blocks.get(key, ())
    if len(known) == chunk_count(end - begin):
        return None
    return f"{SIDECAR} has {len(known)} digests for its {end - begin} bytes"


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
    if not _are_sizes(offsets, _OFFSET_MAX) or len(offsets) != _PAIR or offsets[0] > offsets[1]:
        return f"data_offsets {shown(offsets)} are not [begin, end]"
    if (taken := _nbytes(shape, dtype.itemsize)) != offsets[1] - offsets[0]:
        return (
            f"data_offsets {offsets} hold {offsets[1] - offsets[0]} bytes, but {dtype.name} of "
            f"shape {shown(shape)} takes {taken}; the file is corrupt "
            "(RecIS 1.0.0 writes this for rows of rank 2 or 3)"
        )
    return None


def _are_sizes(values: object, limit: int = _INT64_MAX) -> bool:
    if not isinstance(values, list):
        return False
    return all(type(value) is int and 0 <= value <= limit for value in values)


def _nbytes(shape: Sequence[int], itemsize: int) -> int:
    """Return the bytes of a tensor, or any number that is more than a file can have."""
    size = 0 if 0 in shape else itemsize
    for length in shape:
        size *= length
        if size > _INT64_MAX:
            break
    return size


def _check_layout(location: str, blocks: Blocks, start: int, size: int) -> int:
    """Return where the last block ends, or raise if any two overlap or one lies outside."""
    filled = np.flatnonzero(blocks.nbytes)
    if not len(filled):
        return start
    by_offset = filled[np.argsort(blocks.offsets[filled], kind="stable")]
    begins = blocks.offsets[by_offset]
    ends = begins + blocks.nbytes[by_offset]
    wrong = (begins[1:] < ends[:-1]).nonzero()[0] + 1
    beyond = (ends > size).nonzero()[0]
    if not len(wrong) and not len(beyond):
        return int(ends[-1])
    keys = list(blocks)
    first = min([*wrong[:1].tolist(), *beyond[:1].tolist()])
    block = blocks[keys[by_offset[first]]]
    end = block.offset + block.nbytes
    if first in wrong[:1]:
        problem = (
            f"bytes [{block.offset}, {end}) overlap those of {keys[by_offset[first - 1]]!r}, "
            f"which end at {ends[first - 1]}"
        )
        raise CheckpointError(location, problem, block.shard, block.key)
    raise TruncatedShardError(location, block.shard, block.key, block.offset, end, size)
