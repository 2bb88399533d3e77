"""What of a checkpoint RecIS 1.0.0 could not read, or would read wrongly."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from asyncloader._checkpoint.format import EXTRA, IO_COUNT, MODEL
from asyncloader._display import listed

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from .layout import ShardLayout, WriteBlock


RESERVED_IDS = (-1, -2)
"""What RecIS's map of ids on a GPU marks its free and its deleted places with."""

_DTYPES = frozenset({"BOOL", "I8", "U8", "I16", "I32", "I64", "F16", "BF16", "F32", "F64"})
_MOST_DIMS = 2  # of a slot's block: rows, and the values of a row


def recis_problems(layouts: Sequence[ShardLayout]) -> Iterator[str]:
    """Yield a sentence for each thing that RecIS cannot read, as far as names and shapes tell."""
    for layout in layouts:
        if layout.file == MODEL:  # torch reads it
            continue
        blocks = [placed.block for placed in layout.blocks]
        odd = [f"{one.name!r} ({one.dtype})" for one in blocks if one.dtype.name not in _DTYPES]
        if odd:
            yield (
                f"RecIS refuses all of {layout.file}, since it does not know the dtype of "
                f"{listed(tuple(odd))}"
            )
    yield from _tables([placed.block for layout in layouts for placed in layout.blocks])


def _tables(blocks: Sequence[WriteBlock]) -> Iterator[str]:
    slots = [block for block in blocks if block.table is not None]
    count = Counter(block.table for block in slots)
    if found := _named(table for table in count if table is not None and "^" in table):
        yield f"RecIS's loader fails at the names of tables {found}, which hold '^'"
    if found := _named(table for table in count if table is not None and "@" in table):
        yield f"RecIS's ModelBank refuses the names of tables {found}, which hold '@'"
    if found := _named(block.name for block in slots if "^" in block.slot):
        yield f"RecIS's loader fails at the names of slots {found}, which hold '^'"
    if found := _named(block.name for block in slots if len(block.shape) > _MOST_DIMS):
        yield f"RecIS loads wrong values, in silence, into {found}, whose rows are no vectors"
    if found := _named(table for table, of_it in count.items() if table and of_it == 1):
        yield f"RecIS's loader fails at tables of ids alone: {found}"


def _named(names: Iterator[str]) -> str:
    return listed(tuple(repr(name) for name in names))


def reserved_problems(ids: Mapping[str, Sequence[int]]) -> Iterator[str]:
    """Yield a sentence for each table with ids that RecIS keeps for itself."""
    for table, of_it in ids.items():
        which = " and ".join(map(str, of_it))
        yield f"RecIS's map of ids on a GPU keeps {which} for itself: table {table!r} holds that id"


def state_problems(files: Collection[str]) -> Iterator[str]:
    """Yield a sentence if RecIS would leave one of rank 0's files alone."""
    if IO_COUNT in files and EXTRA not in files:
        yield f"RecIS reads no io_state without {EXTRA}: pass extra, an empty dict will do"
