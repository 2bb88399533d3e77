"""Which parts make a table: the rules for slots, ids and slices that belong together.

Each rank that saved a table wrote a part of each slot, for the ids of its slice. The rows of a part
belong to the ids of the part of the same slice, in the same order.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from .format import SIDECAR
from .problems import Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from .blocks import Block
    from .index import Part
    from .sidecar import PartRows
    from .slices import Slice


ID = "id"  # the slot that holds the ids
_IDS = "int64"
_SHOWN = 4


def table_problems(
    table: str,
    slots: Mapping[str, Sequence[Part]],
    blocks: Mapping[str, Mapping[Slice, Block]],
) -> Iterator[Problem]:
    """Yield why the parts of a table do not fit together.

    `slots` has the parts of each slot, in the order of their slices; `blocks` the sound blocks.
    """
    for slot, of_slot in blocks.items():
        yield from row_problems(f"{table}@{slot}", list(of_slot.values()))
        yield from repeated(table, slot, slots[slot])
    if ID not in slots:
        yield Problem("", table, "the table has no ids, so its rows belong to no id")
        return
    yield from _slice_problems(table, [part.slice for part in slots[ID]])
    for slot, parts in slots.items():
        yield from without_rows(table, slot, slots[ID], parts)
        for where in _lacking(slots[ID], parts):
            text = f"has a part for slice {where}, of which there are no ids"
            yield Problem("", f"{table}@{slot}", text)
        for where, block in blocks[slot].items():
            if where in blocks[ID]:
                yield from count_problems(f"{table}@{slot}", blocks[ID][where], block)
    for block in blocks[ID].values():
        yield from id_problems(f"{table}@{ID}", block)


def row_problems(name: str, blocks: Sequence[Block]) -> Iterator[Problem]:
    """Yield which parts of a slot have no rows, or rows of another kind than its first part."""
    for block in blocks:
        first = blocks[0]
        if block is first and not block.shape:
            yield Problem(block.shard, block.key, f"{name}: is a scalar, it has no rows")
        elif not block.shape or (block.dtype, block.shape[1:]) != (first.dtype, first.shape[1:]):
            text = (
                f"is {block.dtype} {list(block.shape)}, but another part of {name!r}, "
                f"{first.key!r} in {first.shard}, is {first.dtype} {list(first.shape)}: "
                "their rows differ"
            )
            yield Problem(block.shard, block.key, text)


def repeated(table: str, slot: str, parts: Sequence[Part]) -> Iterator[Problem]:
    """Yield parts of one slice: which of them belongs to the ids is unknown."""
    for one, other in itertools.pairwise(parts):
        if one.slice == other.slice:
            first, second = one.place, other.place
            text = (
                f"{table}@{slot}: claims slice {one.slice}, as {first.key!r} in {first.shard} does"
            )
            yield Problem(second.shard, second.key, text)


def without_rows(
    table: str, slot: str, ids: Iterable[Part], parts: Iterable[Part]
) -> Iterator[Problem]:
    """Yield the slices that have ids but no rows of a slot."""
    for where in _lacking(parts, ids):
        text = f"has no part for slice {where}, of which there are ids"
        yield Problem("", f"{table}@{slot}", text)


def _lacking(parts: Iterable[Part], others: Iterable[Part]) -> list[Slice]:
    """Return the slices of `others`, each once, that `parts` do not have."""
    held = {part.slice for part in parts}
    return [where for where in dict.fromkeys(part.slice for part in others) if where not in held]


def count_problems(name: str, ids: Block, block: Block) -> Iterator[Problem]:
    """Yield that a part of a slot has not as many rows as there are ids."""
    if block.shape and block.rows != ids.rows:
        text = (
            f"{name} has {block.rows} rows, but there are {ids.rows} ids "
            f"({ids.key!r} in {ids.shard})"
        )
        yield Problem(block.shard, block.key, text)


def id_problems(name: str, block: Block) -> Iterator[Problem]:
    """Yield that a block holds no ids."""
    if block.dtype.torch != _IDS or len(block.shape) != 1:
        text = f"{name} is {block.dtype} {list(block.shape)}; ids are {_IDS} [n]"
        yield Problem(block.shard, block.key, text)


def spread_problems(told: PartRows, ids: Block) -> Iterator[Problem]:
    """Yield that the sidecar has another number of ids of a part than there are."""
    if told.rows != ids.rows:
        text = (
            f"has {ids.rows} ids of slice {told.slice}, but {SIDECAR} says {told.rows}; "
            "copy both files again"
        )
        yield Problem(ids.shard, ids.key, text)


def _slice_problems(table: str, slices: Sequence[Slice]) -> Iterator[Problem]:
    """Yield that slices are of different sizes, or which ids lie in none of them."""
    if len({one.size for one in slices}) > 1:
        named = ", ".join(map(str, sorted(set(slices))[:_SHOWN]))
        yield Problem("", table, f"its slices are of different sizes: {named}")
        return
    for begin, end in gaps(slices, 0, slices[0].size):
        text = f"positions [{begin}, {end}) lie in no slice: the part of a rank is missing"
        yield Problem("", table, text)


def overlaps(slices: Iterable[Slice]) -> Iterator[tuple[Slice, Slice]]:
    """Yield each slice that has ids in common with an earlier one: the earlier one, and it."""
    last: Slice | None = None
    for one in sorted(one for one in slices if one.begin < one.end):
        if last is not None and (one.size != last.size or one.begin < last.end):
            yield last, one
        if last is None or one.end > last.end:
            last = one


def gaps(slices: Iterable[Slice], begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the positions `[begin, end)` that lie in no slice; all slices are of one size."""
    for one in sorted(one for one in slices if one.begin < one.end):
        if one.begin >= end:
            break
        if one.begin > begin:
            yield begin, one.begin
        begin = max(begin, one.end)
    if begin < end:
        yield begin, end
