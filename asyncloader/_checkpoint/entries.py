"""Reads the entries of a shard's header: dtypes, shapes, offsets.

All of them at once, column by column; if anything is odd, the entries are looked at one by one to
say which one it is.
"""

from __future__ import annotations

from itertools import chain, repeat
from operator import itemgetter
from reprlib import repr as shown  # shortens, and takes lists nested a thousand deep
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from .blocks import Blocks, numbered
from .dtypes import DTYPES, RECIS_DTYPES, dtype_called, torch_type
from .files import SIDECAR
from .sidecar import DIGEST_CHUNK

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from .dtypes import DType
    from .problems import Problems
    from .sidecar import ShardDigests


FIELDS = ("dtype", "shape", "data_offsets")
"""What an entry has, and nothing else."""

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
    only_fields: bool,
    recis: bool,
) -> Blocks:
    """Return the blocks that a header declares.

    Args:
        problems: Receives the entries that are wrong.
        shard: The file's name.
        entries: As JSON has them.
        start: Where the data begins.
        digests: What the sidecar says of the shard.
        only_fields: Whether it is known that no entry has more than its fields.
        recis: Whether dtypes may be spelled as RecIS does.
    """
    dtypes = RECIS_DTYPES if recis else DTYPES
    try:
        if not only_fields:
            _check_lengths(entries)
        blocks = _blocks(shard, entries, dtypes, start)
    except _OddError:
        sound = {}
        for key, entry in entries.items():
            if (problem := _problem(entry, dtypes)) is None:
                sound[key] = entry
            else:
                problems.add(problem, shard, key)
        assert len(sound) < len(entries), "the columns are odd, and no entry is"
        blocks = _blocks(shard, sound, dtypes, start)
    if digests is not None:
        blocks.digests = _digests(problems, blocks, digests.blocks)
    return blocks


def _digests(
    problems: Problems, blocks: Blocks, known: Mapping[str, tuple[str, ...]]
) -> Mapping[str, tuple[str, ...]]:
    """Return the digests of those blocks that have one for each chunk."""
    counts = np.fromiter(map(len, map(known.get, blocks, repeat(()))), np.int64, len(blocks))
    wrong = np.flatnonzero(counts != -(-blocks.nbytes // DIGEST_CHUNK)).tolist()
    for number in wrong:
        block = blocks.at(number)
        problem = f"{SIDECAR} has {counts[number]} digests for its {block.nbytes} bytes"
        problems.add(problem, blocks.shard, block.key)
    refused = {blocks.at(number).key for number in wrong}
    return {key: of for key, of in known.items() if key not in refused} if refused else known


class _OddError(Exception):
    """Something is wrong with one of the entries."""


def _check_lengths(entries: Mapping[str, Any]) -> None:
    if any(isinstance(entry, dict) and len(entry) != len(FIELDS) for entry in entries.values()):
        raise _OddError


def _blocks(
    shard: str,
    entries: Mapping[str, Any],
    dtypes: Mapping[str, DType],
    start: int,
) -> Blocks:
    """Read all entries at once, column by column.

    Raises:
        _OddError: If `_problem` would name a problem of one of them.
    """
    try:
        rows = list(map(_FIELDS, entries.values()))
    except (KeyError, TypeError) as error:
        raise _OddError from error
    names, shapes, ranges = map(list, zip(*rows, strict=True)) if rows else ([], [], [])
    sound = _are_lists_of_sizes(shapes, _INT64_MAX) and _are_lists_of_sizes(ranges, _OFFSET_MAX)
    if not sound or not are_all(names, str):
        raise _OddError
    if any(map(_PAIR.__ne__, map(len, ranges))):
        raise _OddError
    different = set(names)
    called = {name: dtype for name in different if (dtype := dtype_called(name, dtypes))}
    if len(called) < len(different):
        raise _OddError
    # As text, the hash of which is another one in each process. That of a tuple of sizes is not: of
    # a million shapes that were made to have one hash, a dict would take hours.
    texts, kinds = numbered(map(orjson.dumps, zip(names, shapes, strict=True)))
    known = [(called[name], tuple(shape)) for name, shape in map(orjson.loads, texts)]
    bounds = np.fromiter(chain.from_iterable(ranges), np.int64, 2 * len(ranges)).reshape(-1, 2)
    if any(_is_immense(shape, dtype.bits) for dtype, shape in known):
        raise _OddError
    sizes = (-1 if (bits := dtype.bits) is None else _nbytes(shape, bits) for dtype, shape in known)
    taken = np.fromiter(sizes, np.int64, len(known))[kinds]
    nbytes = bounds[:, 1] - bounds[:, 0]
    if ((nbytes != taken) & (taken >= 0) | (nbytes < 0)).any():
        raise _OddError
    return Blocks(
        shard,
        entries,
        types=[torch_type(dtype, shape) for dtype, shape in known],
        kinds=kinds,
        offsets=bounds[:, 0] + start,
        nbytes=nbytes,
    )


def are_all(values: Iterable[object], kind: type) -> bool:
    """Say whether all are of that type, and not of one derived from it."""
    return set(map(type, values)) <= {kind}


def _are_lists_of_sizes(values: Sequence[Any], limit: int) -> bool:
    """Say whether these are lists of sizes; `true` is not one."""
    if not are_all(values, list):
        return False
    numbers = list(chain.from_iterable(values))
    if not numbers:
        return True
    return are_all(numbers, int) and min(numbers) >= 0 and max(numbers) <= limit


def _problem(entry: object, dtypes: Mapping[str, DType]) -> str | None:
    """Say what is wrong with an entry."""
    return _field_problem(entry, dtypes) or _size_problem(entry, dtypes)


def _field_problem(entry: object, dtypes: Mapping[str, DType]) -> str | None:
    if not isinstance(entry, dict) or not entry.keys() >= set(FIELDS):
        return f"its entry lacks dtype, shape or data_offsets: {shown(entry)}"
    if more := entry.keys() - set(FIELDS):
        return f"its entry has {shown(min(more))} besides dtype, shape and data_offsets"
    name, shape, offsets = _FIELDS(entry)
    if not isinstance(name, str) or dtype_called(name, dtypes) is None:
        return f"unknown dtype {shown(name)}; known are {', '.join(dtypes)}"
    if not _are_sizes(shape):
        return f"shape {shown(shape)} is not a list of sizes"
    if not _are_sizes(offsets, _OFFSET_MAX) or len(offsets) != _PAIR or offsets[0] > offsets[1]:
        return f"data_offsets {shown(offsets)} are not [begin, end]"
    return None


def _size_problem(entry: Any, dtypes: Mapping[str, DType]) -> str | None:  # noqa: ANN401  # sound
    name, shape, (begin, end) = _FIELDS(entry)
    dtype = dtype_called(name, dtypes)
    bits = None if dtype is None else dtype.bits
    if _is_immense(shape, bits):
        return f"shape {shown(shape)} is beyond what 64 bits can count"
    if bits is not None and (taken := _nbytes(shape, bits)) != end - begin:
        return (
            f"data_offsets {[begin, end]} hold {end - begin} bytes, but {name} of "
            f"shape {shown(shape)} takes {taken}; the file is corrupt "
            "(RecIS 1.0.0 writes this for rows of rank 2 or 3)"
        )
    return None


def _are_sizes(values: object, limit: int = _INT64_MAX) -> bool:
    if not isinstance(values, list):
        return False
    return all(type(value) is int and 0 <= value <= limit for value in values)


def _is_immense(shape: Sequence[int], bits: int | None) -> bool:
    """Say whether strides overflow, in torch or elsewhere, though the bytes do not show it."""
    if bits is not None and 0 not in shape:
        return False
    return _product((size for size in shape if size), 1) > _INT64_MAX


def _nbytes(shape: Sequence[int], bits: int) -> int:
    """Return the bytes of a tensor; `_INT64_MAX`, which no file has, if that is no such number."""
    size = 0 if 0 in shape else _product(shape, bits)
    return _INT64_MAX if size % 8 else min(size // 8, _INT64_MAX)


def _product(sizes: Iterable[int], first: int) -> int:
    """Multiply sizes that are not 0, until the product is immense."""
    for size in sizes:
        first *= size
        if first > 8 * _INT64_MAX:
            break
    return first
