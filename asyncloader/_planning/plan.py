"""A load, decided: which blocks go where. Values only."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from asyncloader._checkpoint.blocks import Block
    from asyncloader._checkpoint.slices import Slice

    from .casts import Cast
    from .tensor_loads import TensorLoad, TensorLoads


@dataclass(frozen=True, slots=True, kw_only=True)
class PartLoad:
    """The blocks of one writing rank that fill rows of a table."""

    child: str
    """The destination."""

    source: str
    """The table's name on disk."""

    claimed: Slice
    """The slice that the blocks claim to hold."""

    layer: int
    """Number of the layer of the table's update that the rows belong to."""

    rank: int
    """Of two rows of a layer with the same id, the one of higher rank wins. Row i of this part has
    rank `rank + i`."""

    certain: bool
    """Whether the table wants every id that lies in the claimed slice."""

    expected: int
    """About how many rows the table wants."""

    reach: range
    """The rows that may be wanted: all, unless the checkpoint says where they stand. Then one more
    at either end, to see that it is right; these are not wanted."""

    ids: Block
    slots: Mapping[str, Block]

    def __post_init__(self) -> None:
        assert 0 <= self.reach.start <= self.reach.stop <= self.rows
        assert all(block.rows == self.rows for block in self.slots.values())

    @property
    def rows(self) -> int:
        """Rows on disk."""
        return self.ids.rows

    @property
    def row_bytes(self) -> int:
        """Bytes a row in all slots, the id not counted."""
        return sum(block.nbytes for block in self.slots.values()) // max(self.rows, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class TableLoad:
    """All that fills one table."""

    name: str
    slice: Slice
    layers: tuple[frozenset[str], ...]
    """The slots that the rows of each layer bring."""

    parts: tuple[PartLoad, ...]

    @property
    def most(self) -> int:
        """Rows that could come in."""
        return sum(len(part.reach) for part in self.parts)

    @property
    def expected(self) -> int:
        """Rows that will come in, about."""
        return sum(part.expected for part in self.parts)

    @property
    def nbytes(self) -> int:
        """Bytes to read, about; exact where every part is certain."""
        return sum(8 * len(part.reach) + part.expected * part.row_bytes for part in self.parts)


@dataclass(frozen=True, kw_only=True)
class LoadPlan:
    """All that a load will do. Only names and headers have been read."""

    location: str
    tensors: TensorLoads
    shared: Mapping[str, str]
    """Destinations whose memory is filled under another name, and that name."""

    again: Sequence[TensorLoad] = ()
    """The blocks of `shared` that the checkpoint has too: read only to be compared."""

    skipped: tuple[str, ...]
    """Tensors that load_info does not ask for."""

    tables: tuple[TableLoad, ...]
    missing: tuple[str, ...]
    """Asked for, not in the checkpoint: `tensor`, `table`, or `table@slot`."""

    unexpected: tuple[str, ...]
    """In the checkpoint, not asked for."""

    warnings: tuple[str, ...]

    casts: tuple[Cast, ...] = ()
    """The values that are converted to another dtype on their way, in the order of load_info."""

    @cached_property
    def nbytes(self) -> int:
        """Bytes to read; an estimate where only some rows of a block are wanted."""
        return int(self.tensors.nbytes.sum()) + sum(load.nbytes for load in self.tables)

    @cached_property
    def shards(self) -> tuple[str, ...]:
        """The shard files to read from."""
        blocks = []
        for table in self.tables:
            for part in table.parts:
                blocks += [part.ids, *part.slots.values()]
        blocks += [load.block for load in self.again]
        return tuple(sorted({*self.tensors.shards, *(block.shard for block in blocks)}))

    def __rich__(self) -> str:
        return str(self)  # not every block of every shard

    def __str__(self) -> str:
        rows = sum(table.expected for table in self.tables)
        return (
            f"{self.nbytes:,} bytes from {len(self.shards)} shards: {len(self.tensors)} tensors, "
            f"{len(self.tables)} tables (about {rows:,} rows); {len(self.missing)} missing, "
            f"{len(self.unexpected)} unexpected"
        ) + (f", {len(self.casts)} cast" if self.casts else "")
