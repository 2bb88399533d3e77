"""Reads the entries of a shard's header: dtypes, shapes, offsets.

All entries are read at once, column by column: each different pair of dtype and shape is looked at
once, and offsets are compared as arrays. If one is wrong, each entry is looked at by itself; the
wrong ones are named, and the others are read again.
"""

from __future__ import annotations

from itertools import chain, repeat
from operator import itemgetter, le
from reprlib import repr as shown  # shortens, and takes lists nested a thousand deep
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from .blocks import Blocks, numbered
from .dtypes import DTYPES, RECIS_DTYPES, dtype_called, torch_type
from .format import SIDECAR
from .sidecar import DIGEST_CHUNK

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from .dtypes import DType
    from .problems import Problems
    from .sidecar import ShardDigests


FIELDS = ("dtype", "shape", "data_offsets")  # the members of an entry, which has no others

_INT64_MAX = 2**63 - 1
# Of an offset. Where the data begins, at most `MAX_HEADER`, is added to it.
_OFFSET_MAX = _INT64_MAX - 2**30
_FIELDS = itemgetter(*FIELDS)
_PAIR = 2


def read_entries(
    problems: Problems,
    shard: str,
    entries: Mapping[str, Any],
    *,
    start: int,
    digests: ShardDigests | None,
    recis: bool,
) -> Blocks:
    """Return the blocks that a header declares; `problems` receives the wrong entries.

    Data begins at byte `start`; `recis` says whether dtypes may be spelled as RecIS does.
    """
    dtypes = RECIS_DTYPES if recis else DTYPES
    blocks = _blocks(shard, entries, dtypes, start)
    if blocks is None:
        sound = {}
        for key, entry in entries.items():
            if (problem := _problem_of(entry, dtypes)) is None:
                sound[key] = entry
            else:
                problems.add(problem, shard, key)
        blocks = _blocks(shard, sound, dtypes, start)
        assert blocks is not None, "the columns say that an entry is wrong, and no entry is"
    if digests is not None:
        blocks.digests = checked_digests(problems, blocks, digests.blocks)
    return blocks


def _blocks(
    shard: str, entries: Mapping[str, Any], dtypes: Mapping[str, DType], start: int
) -> Blocks | None:
    """Read all entries at once; return `None` if one of them is wrong."""
    values = entries.values()
    if not are_all(values, dict) or not set(map(len, values)) <= {len(FIELDS)}:
        return None
    try:
        names, shapes, ranges = zip(*map(_FIELDS, values), strict=True) if values else ((), (), ())
        # As text, the hash of which is another one in each process. That of a tuple of sizes is
        # not: of a million shapes that were made to have one hash, a dict would take hours.
        texts, kinds = numbered(map(orjson.dumps, zip(names, shapes, strict=True)))
        types = [_type(name, shape, dtypes) for name, shape in map(orjson.loads, texts)]
    except (KeyError, TypeError, ValueError):  # TypeError: lists too deep to be written
        return None
    if not _are_ranges(ranges):
        return None
    bounds = np.fromiter(chain.from_iterable(ranges), np.int64, 2 * len(ranges)).reshape(-1, 2)
    nbytes = bounds[:, 1] - bounds[:, 0]
    taken = np.array([_nbytes(dtype, shape) for dtype, shape in types], np.int64)[kinds]
    if ((taken >= 0) & (taken != nbytes)).any():
        return None
    return Blocks(
        list(entries),
        [torch_type(dtype, shape) for dtype, shape in types],
        kinds,
        shard=shard,
        offsets=bounds[:, 0] + start,
        nbytes=nbytes,
    )


def _problem_of(entry: object, dtypes: Mapping[str, DType]) -> str | None:
    if not isinstance(entry, dict) or not entry.keys() >= set(FIELDS):
        return f"its entry lacks dtype, shape or data_offsets: {shown(entry)}"
    if more := entry.keys() - set(FIELDS):
        return f"its entry has {shown(min(more))} besides dtype, shape and data_offsets"
    name, shape, bounds = _FIELDS(entry)
    try:
        taken = _nbytes(*_type(name, shape, dtypes))
    except ValueError as error:
        return str(error)
    if not _are_ranges([bounds]):
        return f"data_offsets {shown(bounds)} are not [begin, end]"
    held = bounds[1] - bounds[0]
    if taken in {-1, held}:
        return None
    return (
        f"data_offsets {bounds} hold {held} bytes, but {name} of shape {shown(shape)} takes "
        f"{taken}; the file is corrupt (RecIS 1.0.0 writes this for rows of rank 2 or 3)"
    )


def checked_digests(
    problems: Problems, blocks: Blocks, known: Mapping[str, tuple[str, ...]]
) -> Mapping[str, tuple[str, ...]]:
    """Return the digests of all blocks that have one for each chunk."""
    counts = np.fromiter(map(len, map(known.get, blocks, repeat(()))), np.int64, len(blocks))
    refused = set()
    for number in np.flatnonzero(counts != -(-blocks.nbytes // DIGEST_CHUNK)).tolist():
        block = blocks.at(number)
        problem = f"{SIDECAR} has {counts[number]} digests for its {block.nbytes} bytes"
        problems.add(problem, block.shard, block.key)
        refused.add(block.key)
    return {key: of for key, of in known.items() if key not in refused} if refused else known


def are_all(values: Iterable[object], kind: type) -> bool:
    """Say whether all are of that type, and not of one derived from it: `true` is no number."""
    return set(map(type, values)) <= {kind}


def _type(
    name: object, shape: object, dtypes: Mapping[str, DType]
) -> tuple[DType, tuple[int, ...]]:
    """Return dtype and shape; raise a `ValueError` if they are none."""
    dtype = dtype_called(name, dtypes) if isinstance(name, str) else None
    if dtype is None:
        raise ValueError(f"unknown dtype {shown(name)}; known are {', '.join(dtypes)}")
    if not isinstance(shape, list) or not _are_sizes(shape, _INT64_MAX):
        raise ValueError(f"shape {shown(shape)} is not a list of sizes")
    if _is_immense(shape, dtype.bits):
        raise ValueError(f"shape {shown(shape)} is beyond what 64 bits can count")
    return dtype, tuple(shape)


def _are_sizes(numbers: Sequence[Any], limit: int) -> bool:
    if not are_all(numbers, int):
        return False
    return min(numbers, default=0) >= 0 and max(numbers, default=0) <= limit


def _are_ranges(values: Sequence[Any]) -> bool:
    """Say whether these are lists `[begin, end]`."""
    if not are_all(values, list) or not set(map(len, values)) <= {_PAIR}:
        return False
    bounds = list(chain.from_iterable(values))
    return _are_sizes(bounds, _OFFSET_MAX) and all(map(le, bounds[::2], bounds[1::2]))


def _is_immense(shape: Sequence[int], bits: int | None) -> bool:
    """Say whether strides overflow, in torch or elsewhere, though the bytes do not show it."""
    if bits is not None and 0 not in shape:
        return False
    return _product((size for size in shape if size), 1) > _INT64_MAX


def _nbytes(dtype: DType, shape: Sequence[int]) -> int:
    """Return the bytes of a tensor; -1 if that is unknown, `_INT64_MAX` if no file has so many."""
    if dtype.bits is None:
        return -1
    size = 0 if 0 in shape else _product(shape, dtype.bits)
    return _INT64_MAX if size % 8 else min(size // 8, _INT64_MAX)


def _product(sizes: Iterable[int], first: int) -> int:
    """Multiply sizes that are not 0, until the product is immense."""
    for size in sizes:
        first *= size
        if first > 8 * _INT64_MAX:
            break
    return first
