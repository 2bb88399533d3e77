"""A load, decided: which blocks go where. Values only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from asyncloader._checkpoint.blocks import numbered

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from numpy.typing import NDArray
    from rich.console import RenderableType

    from asyncloader._checkpoint.blocks import Block
    from asyncloader._checkpoint.slices import Slice

    from .origins import Resolution
    from .targets import Cast


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorLoad:
    """A block that fills the dense tensor `name`."""

    name: str
    block: Block


@dataclass(eq=False, repr=False, kw_only=True)
class TensorLoads(Sequence[TensorLoad]):
    """Blocks that fill dense tensors, in the order of load_info.

    A `TensorLoad` is made when a caller asks for it.

    Attributes:
        names: `[n]`, the destinations.
        shards: The different files that they come from.
        shard: int64 `[n]`; which of `shards` each comes from.
        offsets: int64 `[n]`; first byte, from the start of the file.
        nbytes: int64 `[n]`.
        digested: bool `[n]`; whether there are digests.
        block: Returns a block by its number.
        cast: bool `[n]`; whether it is converted to another dtype.
    """

    names: Sequence[str]
    shards: Sequence[str]
    shard: NDArray[np.int64]
    offsets: NDArray[np.int64]
    nbytes: NDArray[np.int64]
    digested: NDArray[np.bool_]
    block: Callable[[int], Block]
    cast: NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        self.cast = np.zeros(len(self), np.bool_)
        columns = self.shard, self.offsets, self.nbytes, self.digested
        assert {len(column) for column in columns} == {len(self)}

    @classmethod
    def of(cls, loads: Iterable[TensorLoad]) -> TensorLoads:
        """Return loads as columns. Several may have parts of one block."""
        known = list(loads)
        blocks = [load.block for load in known]
        shards, shard = numbered(block.shard for block in blocks)
        return cls(
            names=[load.name for load in known],
            shards=shards,
            shard=shard,
            offsets=np.array([block.offset for block in blocks], np.int64),
            nbytes=np.array([block.nbytes for block in blocks], np.int64),
            digested=np.array([block.digests is not None for block in blocks], np.bool_),
            block=blocks.__getitem__,
        )

    def __repr__(self) -> str:
        return f"<TensorLoads {len(self)} tensors>"

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, number: int, /) -> TensorLoad: ...

    @overload
    def __getitem__(self, number: slice, /) -> tuple[TensorLoad, ...]: ...

    def __getitem__(self, number: int | slice, /) -> TensorLoad | tuple[TensorLoad, ...]:
        if isinstance(number, slice):
            return tuple(self[one] for one in range(len(self))[number])
        return TensorLoad(name=self.names[number], block=self.block(number))


@dataclass(frozen=True, slots=True, kw_only=True)
class PartLoad:
    """The blocks of one writing rank that fill rows of a table.

    Attributes:
        child: The destination.
        source: The table's name on disk.
        claimed: The slice that the blocks claim to hold.
        layer: Number of the layer of the table's update that the rows belong to.
        rank: Of two rows of a layer with the same id, the one of higher rank wins. Row i of this
            part has rank `rank + i`.
        certain: Whether the table wants every id that lies in the claimed slice.
        expected: About how many rows the table wants.
        reach: The rows that may be wanted: all, unless the checkpoint says where they stand. Then
            one more at either end, to see that it is right; these are not wanted.
    """

    child: str
    source: str
    claimed: Slice
    layer: int
    rank: int
    certain: bool
    expected: int
    reach: range
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
    """All that fills one table.

    Attributes:
        layers: The slots that the rows of each layer bring.
        fills: The numbers of layers that bring no ids: they fill rows of ids that are there.
        cleared: The children whose ids are taken out first.
        locates: Whether rows stay in files, and ids alone come into memory.
    """

    name: str
    slice: Slice
    layers: tuple[frozenset[str], ...]
    parts: tuple[PartLoad, ...]
    fills: frozenset[int] = frozenset()
    cleared: tuple[str, ...] = ()
    locates: bool = False

    def row_blocks(self) -> dict[str, list[Block]]:
        """Return where the rows of all slots stand that may be wanted, by shard."""
        found: dict[str, list[Block]] = {}
        for part in self.parts:
            for block in part.slots.values():
                if (rows := block.window(part.reach.start, part.reach.stop)) is not None:
                    found.setdefault(block.shard, []).append(rows)
        return found

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
        ids = sum(8 * len(part.reach) for part in self.parts)
        if self.locates:
            return ids
        return ids + sum(part.expected * part.row_bytes for part in self.parts)


@dataclass(frozen=True, kw_only=True)
class LoadPlan:
    """All that a load will do. Only names and headers have been read.

    Attributes:
        location: The checkpoint.
        tensors: The blocks that fill dense tensors.
        shared: Destinations whose memory is filled under another name, and that name.
        again: The blocks of `shared` that the checkpoint has too: read only to be compared.
        skipped: Tensors that load_info does not ask for.
        tables: What fills each table.
        missing: Asked for, not in the checkpoint: `tensor`, `table`, or `table@slot`.
        unexpected: In the checkpoint, not asked for.
        warnings: Oddities that do no harm.
        casts: The values that are converted to another dtype on their way, in the order of
            load_info.
        bank: Where each name comes from, if the load is from several checkpoints.
        extra: The plain values that come with it, by RecIS's names; they have been read.
    """

    location: str
    tensors: TensorLoads
    shared: Mapping[str, str]
    again: Sequence[TensorLoad] = ()
    skipped: tuple[str, ...]
    tables: tuple[TableLoad, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    warnings: tuple[str, ...]
    casts: tuple[Cast, ...] = ()
    bank: Resolution | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def nbytes(self) -> int:
        """Bytes to read; an estimate where only some rows of a block are wanted."""
        return int(self.tensors.nbytes.sum()) + sum(load.nbytes for load in self.tables)

    @cached_property
    def shards(self) -> tuple[str, ...]:
        """The shard files to read from."""
        parts = (part for table in self.tables for part in table.parts)
        blocks = [block for part in parts for block in (part.ids, *part.slots.values())]
        blocks += [load.block for load in self.again]
        return tuple(sorted({*self.tensors.shards, *(block.shard for block in blocks)}))

    def __rich__(self) -> RenderableType:
        from rich.console import Group  # noqa: PLC0415  # only where it is shown

        line = self._line()  # not every block of every shard
        return line if self.bank is None else Group(self.bank, line)

    def __str__(self) -> str:
        return self._line() if self.bank is None else f"{self.bank}\n{self._line()}"

    def _line(self) -> str:
        rows = sum(table.expected for table in self.tables)
        return (
            f"{self.nbytes:,} bytes from {len(self.shards)} shards: {len(self.tensors)} tensors, "
            f"{len(self.tables)} tables (about {rows:,} rows); {len(self.missing)} missing, "
            f"{len(self.unexpected)} unexpected"
        ) + (f", {len(self.casts)} cast" if self.casts else "")
