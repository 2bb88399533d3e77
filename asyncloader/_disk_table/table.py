"""The table whose rows stay on the disk: what users make, hand to a loader, and look ids up in."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from asyncloader._arguments import check_switch
from asyncloader._checkpoint.parts import ID
from asyncloader._checkpoint.slices import Slice, gen_slice
from asyncloader._table.schema import Encoding, as_ids, as_slot, checked_out, shown

from .warming import EMBEDDING, Warming

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from asyncloader._table.protocol import SavableSnapshot
    from asyncloader._table.schema import Children, Longs, Slot

    from .places import DiskState
    from .readers import HasReaders
    from .stats import TableStats
    from .update import DiskUpdate


_NEVER = "a DiskTable is read-only: to change rows, load them into a HashTable, and save that"


class DiskTable(Warming):
    """Ids (any int64) → rows that stay on the disk: for tables that do not fit into memory.

    A `Loader` or a `Live` "loads" it as it does a `HashTable`: ids are read, and where the rows of
    each slot stand is noted; 8 bytes an id where the checkpoint has them sorted, as our `Saver`
    writes them, 12 otherwise. Rows are read when they are asked for, from the shards, which stay as
    they are, on a file system of this machine; of a URL, from copies in `cache_dir`. Files are held
    open: after their checkpoint was removed or replaced, rows are those of the one that was loaded;
    after it was written to, a lookup is a `CheckpointChangedError`, and never a wrong row. A row
    has no digest of its own: `verify="require"` reads and compares all rows once, at the load.

    ```python
    table = DiskTable([64], name="item_emb", cache_bytes=2 << 30)
    await Loader(path, {"item_emb": table}).aload()
    rows = await table.alookup(ids)  # [*ids.shape, 64]; zeros for ids not there
    ```

    Any number of lookups may run at a time, on any event loops and threads. Names, slices, slots
    and children are those of `HashTable`.

    Args:
        embedding_shape: Shape of one row.
        dtype: The dtype of the embedding for the caller. It may be float32 where that on the disk
            is bfloat16 or float16, with `cast="widen"` of the loader.
        coalesced: Whether the table merges `children`.
        children: Their names on disk, at most 4094; by default the table's own name.
        slice: The ids that the table accepts, by their position on disk; by default all.
        name: The table's name on disk.
        cache_bytes: Memory for rows that are asked for often, in bytes; 0 is none.
        concurrency: Lookups that read at a time, each on one thread; the others wait in order.
        direct_io: Whether rows are read past the page cache (Linux AIO, `O_DIRECT`), where that is
            possible: half of the processor time a row that the page cache has not, and more for
            one that it has.
        stall_timeout: Seconds after which a lookup is given up with `ReadStalledError` if the disk
            gives no answer; `None` waits for ever.
        runtime: Its threads and its cache are used, in place of `cache_bytes`, `concurrency` and
            `stall_timeout`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument makes no sense.
    """

    def __init__(
        self,
        embedding_shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        *,
        coalesced: bool = False,
        children: Sequence[str] | None = None,
        slice: Slice | None = None,  # noqa: A002  # RecIS's name
        name: str = "hashtable",
        cache_bytes: int = 0,
        concurrency: int = 8,
        direct_io: bool = False,
        stall_timeout: float | None = 120.0,
        runtime: HasReaders | None = None,
    ) -> None:
        super().__init__()
        from asyncloader._table.state import Turn  # noqa: PLC0415  # numba, which takes half a second

        from .lookups import Lookups  # noqa: PLC0415  # as above
        from .places import DiskState  # noqa: PLC0415
        from .readers import RowReaders  # noqa: PLC0415

        if slice is not None and not isinstance(slice, Slice):
            raise TypeError(f"slice must be a Slice, as gen_slice() makes, got {slice!r}")
        self.name = name
        self.slice = gen_slice() if slice is None else slice
        self._encoding = Encoding.of(name, children, coalesced=coalesced)
        self._slots = {EMBEDDING: as_slot(EMBEDDING, embedding_shape, dtype, 0.0)}
        if runtime is not None and cache_bytes:
            raise ValueError("cache_bytes is the runtime's: give it row_cache_bytes")
        if runtime is None:
            readers = RowReaders(
                concurrency=concurrency, cache_bytes=cache_bytes, stall_timeout=stall_timeout
            )
        else:
            readers = runtime.row_readers
        self._owns_readers = runtime is None
        self._is_closed = False
        self._turn = Turn()
        self._state = DiskState()
        check_switch(direct_io, "direct_io")
        self._lookups = Lookups(name, readers, readers.reader(direct_io=direct_io))

    def extra_repr(self) -> str:
        return shown(self.name, len(self), self._slots.values(), self.slice, self._encoding)

    def __len__(self) -> int:
        return self._state.count

    def __bool__(self) -> bool:
        return True  # otherwise `if table:` would ask whether it holds ids

    def __deepcopy__(self, memo: dict[int, object]) -> DiskTable:
        """Return a table of the same rows, files and cache, which loads by itself."""
        other = type(self).__new__(type(self))
        torch.nn.Module.__init__(other)
        for name, value in vars(self).items():
            if not hasattr(other, name):
                setattr(other, name, value)
        vars(other).update(_slots=dict(self._slots), _turn=type(self._turn)(), _owns_readers=False)
        memo[id(self)] = other
        return other

    def __copy__(self) -> DiskTable:
        return copy.deepcopy(self)

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError(
            f"table {self.name!r} is a DiskTable, which holds files open: make one in the other "
            "process, and load it there"
        )

    @property
    def coalesced(self) -> bool:
        """Whether the table merges several children."""
        return self._encoding.coalesced

    @property
    def children(self) -> Children:  # RecIS's name, and callable too
        """The names of its ids on disk; its own name, unless it is coalesced."""
        return self._encoding.children

    def slots(self) -> Mapping[str, Slot]:
        """Return the slots by name, `embedding` first."""
        return dict(self._slots)

    def add_slot(self, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> None:
        """Add a slot, such as an optimizer's state; loads that follow say where its rows stand.

        Raises:
            ValueError: If there is such a slot already, or the name is `id`.
        """
        if name == ID or name in self._slots:
            raise ValueError(f"table {self.name!r} already has a slot {name!r}")
        self._slots[name] = as_slot(name, shape, dtype, 0.0)

    def ids(self, child: str | None = None) -> torch.Tensor:
        """Return the ids, int64 `[n]`: a child's as they stand on disk, or all, encoded."""
        ids = self._ids_of(self._held(), child)
        return torch.from_numpy(ids if child is None else self._encoding.decode(ids))

    def rows(self, slot: str = EMBEDDING, child: str | None = None) -> torch.Tensor:
        """Read all rows of a slot, `[n, *shape]`, in the order of `ids(child)`, and block."""
        state, spec = self._held(), self._slot(slot)
        ids = self._ids_of(state, child)
        rows = torch.empty((len(ids), *spec.shape), dtype=spec.dtype)
        self._lookups.run_here(state, spec, ids, rows)
        return rows

    def contains(self, ids: torch.Tensor, child: str | None = None) -> torch.Tensor:
        """Say which ids are there: bool, of the shape of `ids`. Reads nothing."""
        wanted, shape = as_ids(ids)
        return torch.from_numpy(self._held().has(self._encoding.encode(wanted, child))).view(shape)

    async def alookup(
        self,
        ids: torch.Tensor,
        slot: str = EMBEDDING,
        child: str | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the rows of ids of any shape, `[*ids.shape, *shape]`; zeros for ids not there.

        The event loop is free meanwhile; each lookup reads on one thread. One that is cancelled
        ends what its thread does, and waits for that: a moment.

        Args:
            ids: Of any shape and whole-number dtype; an id that is there twice is read once.
            slot: The slot.
            child: The child whose ids they are; without it, ids of a coalesced table are encoded.
            out: Where the rows go, in place of new memory: contiguous, in host memory, of the shape
                and dtype of the result. After an error its values are anything.

        Raises:
            KeyError: If there is no such slot or child.
            TypeError: If the ids are not integers, or `out` is of another dtype.
            RuntimeError: If the table was closed.
            ValueError: If `out` is of another shape, or is not contiguous host memory.
            CheckpointChangedError: If a shard was written to since the load.
            ReadError: If the disk failed, again and again.
            ReadStalledError: If the disk gave no answer for `stall_timeout`.
        """
        wanted, result = self._wanted(ids, slot, child, out)
        await self._lookups.run(self._held(), self._slots[slot], wanted, result)
        return result

    def lookup(
        self,
        ids: torch.Tensor,
        slot: str = EMBEDDING,
        child: str | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Do as `alookup`, and block the calling thread meanwhile: for scripts."""
        wanted, result = self._wanted(ids, slot, child, out)
        self._lookups.run_here(self._held(), self._slots[slot], wanted, result)
        return result

    def close(self) -> None:
        """Let go of ids and files; lookups that are under way end well, others raise an error.

        It may be loaded again.
        """
        from .places import DiskState  # noqa: PLC0415  # numba

        self._state, self._is_closed = DiskState(), True
        if self._owns_readers:
            self._lookups.close()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of ids, as `lookup` does."""
        return self.lookup(ids)

    def stats(self) -> TableStats:
        """Return what the lookups came to since the table was made."""
        return self._lookups.stats(self._state)

    def begin(self, *, most: int, expected: int) -> DiskUpdate:  # noqa: ARG002  # of the Protocol
        """Begin a load; see `LoadableTable`."""
        from .update import DiskUpdate  # noqa: PLC0415  # numba

        self._turn.begin(self.name)
        try:
            return DiskUpdate(
                self._state,
                self._encoding,
                most=most,
                publish=self._publish,
                join=self._lookups.join,
            )
        except BaseException:
            self._turn.end()
            raise

    def insert(self, *_: object, **__: object) -> None:
        """Raise `TypeError`: the table is read-only."""
        raise TypeError(_NEVER)

    delete = clear = insert

    def snapshot(self) -> SavableSnapshot:
        """Raise `TypeError`: what is in the checkpoint need not be saved."""
        raise TypeError(
            f"table {self.name!r} is a DiskTable: its rows are in a checkpoint already; copy that "
            "(`asyncloader convert`)"
        )

    def _publish(self, state: DiskState | None) -> None:
        if state is not None:
            self._state, self._is_closed = state, False
        self._turn.end()

    def _ids_of(self, state: DiskState, child: str | None) -> Longs:
        ids = state.all_ids()
        return ids if child is None else ids[self._encoding.are_of(ids, child)]

    def _wanted(
        self, ids: torch.Tensor, slot: str, child: str | None, out: torch.Tensor | None
    ) -> tuple[Longs, torch.Tensor]:
        """Return ids, encoded, and the memory of the result."""
        spec = self._slot(slot)
        wanted, shape = as_ids(ids)
        result = checked_out(out, (*shape, *spec.shape), spec.dtype)
        return self._encoding.encode(wanted, child), result
