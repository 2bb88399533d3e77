"""The hash table that users make, look ids up in, and hand to a loader."""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING

import torch

from asyncloader._checkpoint.slices import Slice, gen_slice

from .schema import Encoding, Initializer, Slot, as_ids, as_slot, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from .schema import Children, Longs
    from .snapshot import TableSnapshot
    from .state import TableState
    from .update import TableUpdate


EMBEDDING = "embedding"
ID = "id"


class HashTable(torch.nn.Module):
    """Ids (any int64) → rows: an embedding and further slots, such as the optimizer's state.

    Constructor and names are as in RecIS's `HashTable`. Lookups take no lock and may run in any
    number of threads, also while the table is loaded into or changed: a lookup sees the table
    before or after the change, never in between. Changes come one at a time. Each builds the next
    version beside the present one: `insert` copies the id index (2 ms per million ids that the
    table holds) and `delete` builds it anew (80 ms), so pass them many ids at once. A change while
    another change or a load is under way is a `RuntimeError`.

    A coalesced table merges several children. In memory its ids are *encoded*: the lower 52 bits
    are the id, the upper 12 the child's number. With `child=`, ids are the plain ids of that child
    (of which only the lower 52 bits count); without it, ids are encoded.

    ```python
    table = HashTable([16], name="item_emb")
    table.add_slot("sparse_adamw_exp_avg", [16])
    table.insert(torch.tensor([7, -1]), torch.ones(2, 16))
    table(torch.tensor([[7, 8]]))  # [1, 2, 16]; zeros for 8
    ```

    Rows are no parameters: gradients do not flow into them, `state_dict()` is without them, and
    `to()` leaves them where they are.

    Args:
        embedding_shape: Shape of one row.
        block_size: Capacity grows by a multiple of so many rows.
        dtype: The dtype of the embedding.
        device: The device of the rows. The id index stays on the host.
        coalesced: Whether the table merges `children`.
        children: Their names on disk, at most 4094; by default the table's own name.
        slice: The ids that the table accepts, by their position on disk; by default all.
        initializer: The value of an embedding before it is written: a number, or a function that
            fills a `[n, *embedding_shape]` tensor in place. `None` is 0.0.
        name: The table's name on disk.
    """

    def __init__(  # noqa: PLR0917  # RecIS's order
        self,
        embedding_shape: Sequence[int],
        block_size: int = 1024,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        coalesced: bool = False,  # noqa: FBT001, FBT002  # RecIS's order
        children: Sequence[str] | None = None,
        slice: Slice | None = None,  # noqa: A002  # RecIS's name
        initializer: Initializer | None = None,
        name: str = "hashtable",
    ) -> None:
        super().__init__()
        from .state import TableState, Turn  # noqa: PLC0415  # numba, which takes half a second

        if type(block_size) is not int or block_size <= 0:
            raise ValueError(f"block_size must be a positive int, got {block_size!r}")
        if slice is not None and not isinstance(slice, Slice):
            raise TypeError(f"slice must be a Slice, as gen_slice() makes, got {slice!r}")
        self.name = name
        self.slice = gen_slice() if slice is None else slice
        self._encoding = Encoding.of(name, children, coalesced=coalesced)
        initial = 0.0 if initializer is None else initializer
        embedding = as_slot(EMBEDDING, embedding_shape, dtype, initial)
        self._turn = Turn()
        self._state = TableState.empty({EMBEDDING: embedding}, torch.device(device), block_size)

    def extra_repr(self) -> str:
        slots = self._state.slots.values()
        return shown(self.name, len(self), slots, self.slice, self._encoding)

    def __len__(self) -> int:
        return self._state.index.count

    def __bool__(self) -> bool:
        return True  # otherwise `if table:` would ask whether it holds ids

    def __copy__(self) -> HashTable:
        return copy.deepcopy(self)  # two tables must not append to the same memory

    @property
    def device(self) -> torch.device:
        """The device of the rows."""
        return self._state.device

    @property
    def block_size(self) -> int:
        """Capacity grows by a multiple of so many rows."""
        return self._state.block_size

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
        return dict(self._state.slots)

    def add_slot(
        self,
        name: str,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        initializer: Initializer = 0.0,
    ) -> None:
        """Add a slot; ids that are there get its initial value.

        Raises:
            ValueError: If there is such a slot already, or the name is `id`.
        """
        if name == ID or name in self._state.slots:
            raise ValueError(f"table {self.name!r} already has a slot {name!r}")
        slot = as_slot(name, shape, dtype, initializer)
        self._change(lambda state: state.with_slot(slot))

    def ids(self, child: str | None = None) -> torch.Tensor:
        """Return the ids, int64 `[n]`: a child's as they stand on disk, or all, encoded."""
        state = self._state
        encoded = state.ids[self._rows_of(state, child)]
        return torch.from_numpy(encoded if child is None else self._encoding.decode(encoded))

    def rows(self, slot: str = EMBEDDING, child: str | None = None) -> torch.Tensor:
        """Return a copy of a slot's rows, `[n, *shape]`, in the order of `ids(child)`.

        The order changes only when the table does.
        """
        state = self._state
        self._slot_of(state, slot)
        return state.gather(slot, self._rows_of(state, child))

    def lookup(
        self, ids: torch.Tensor, slot: str = EMBEDDING, child: str | None = None
    ) -> torch.Tensor:
        """Return the rows of ids of any shape, `[*ids.shape, *shape]`; zeros for ids not there.

        Raises:
            KeyError: If there is no such slot or child.
            TypeError: If the ids are not integers.
        """
        state = self._state
        spec = self._slot_of(state, slot)
        wanted, shape = as_ids(ids)
        return state.lookup(slot, self._encoding.encode(wanted, child)).view(*shape, *spec.shape)

    async def alookup(
        self, ids: torch.Tensor, slot: str = EMBEDDING, child: str | None = None
    ) -> torch.Tensor:
        """Do as `lookup`, at once: what awaits rows need not know whether they stay on the disk."""
        return self.lookup(ids, slot, child)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of ids of any shape; zeros for ids not there."""
        return self.lookup(ids)

    def contains(self, ids: torch.Tensor, child: str | None = None) -> torch.Tensor:
        """Say which ids are there: bool, of the shape of `ids` and on their device."""
        wanted, shape = as_ids(ids)
        rows, _ = self._state.find(self._encoding.encode(wanted, child))
        return torch.from_numpy(rows >= 0).view(shape).to(torch.as_tensor(ids).device)

    def insert(
        self,
        ids: torch.Tensor,
        rows: torch.Tensor,
        slot: str = EMBEDDING,
        child: str | None = None,
    ) -> None:
        """Give ids, int64 `[n]`, rows of one slot, `[n, *shape]`.

        The other slots of a new id get their initial values; those of a known id stay. If an id is
        given twice, the later row stays.

        Raises:
            KeyError: If there is no such slot or child.
            TypeError: If dtypes do not fit.
            ValueError: If shapes do not fit, or an id is not in the table's slice.
        """
        from .update import insert  # noqa: PLC0415  # numba

        spec = self._slot_of(self._state, slot)
        plain, _ = as_ids(ids)
        spec.check_rows(rows, len(plain))
        encoded = self._encoding.encode(plain, child)
        on_disk = self._encoding.decode(encoded)
        stray = on_disk[self.slice.strays(on_disk)]
        if len(stray):
            more = f", and {len(stray) - 1:,} others are not" if len(stray) > 1 else ""
            raise ValueError(
                f"table {self.name!r}: id {stray[0]} is not in slice {self.slice}{more}"
            )
        insert(self.begin(most=len(plain), expected=len(plain)), encoded, rows, slot)

    def delete(self, ids: torch.Tensor, child: str | None = None) -> int:
        """Take ids out, and return how many were there."""
        from .update import delete  # noqa: PLC0415  # numba

        encoded = self._encoding.encode(as_ids(ids)[0], child)
        before, after = self._change(partial(delete, ids=encoded))
        return before.index.count - after.index.count

    def clear(self) -> None:
        """Take all ids out, and give their memory back; the slots stay."""
        self._change(lambda state: state.empty(state.slots, state.device, state.block_size))

    def reserve(self, n: int) -> None:
        """Reserve room, so that the table can grow to `n` ids in one piece."""
        self._change(lambda state: state.with_room(n))

    def snapshot(self) -> TableSnapshot:
        """Return the table at this moment, for savers. Takes no lock, and copies no row."""
        from .snapshot import TableSnapshot  # noqa: PLC0415  # loads do without

        return TableSnapshot(self.name, self.children, self.slice, self._state, self._encoding)

    def begin(self, *, most: int, expected: int) -> TableUpdate:
        """Begin an update of at most `most` rows, about `expected` of them, for loaders.

        Raises:
            RuntimeError: If another update of the table is under way.
            MemoryError: If there is no room.
        """
        from .update import TableUpdate  # noqa: PLC0415  # numba

        self._turn.begin(self.name)
        try:
            return TableUpdate(
                self._state, self._encoding, most=most, expected=expected, publish=self._publish
            )
        except BaseException:
            self._publish(None)
            raise

    def _change(self, change: Callable[[TableState], TableState]) -> tuple[TableState, TableState]:
        """Swap the state for another one, and return both."""
        self._turn.begin(self.name)
        before, after = self._state, None
        try:
            after = change(before)
        finally:
            self._publish(after)
        return before, after

    def _publish(self, state: TableState | None) -> None:
        """End an update with its state, or with `None` if the table stays as it is."""
        if state is not None:
            self._state = state
        self._turn.end()

    def _slot_of(self, state: TableState, name: str) -> Slot:
        if name not in state.slots:
            known = ", ".join(state.slots)
            raise KeyError(f"table {self.name!r} has no slot {name!r}, only {known}")
        return state.slots[name]

    def _rows_of(self, state: TableState, child: str | None) -> Longs:
        rows = state.live_rows()
        if child is None:
            return rows
        return rows[self._encoding.are_of(state.ids[rows], child)]
