"""RecIS's own table, `torch.classes.recis.HashtableImpl`, as one to load into and to save."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from asyncloader._checkpoint.slices import Slice, gen_slice

from .recis_object import described
from .recis_snapshot import RecISSnapshot
from .recis_update import RecISUpdate
from .schema import Encoding

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from .schema import Slot

_EMBEDDING = "embedding"
_MARK = "hashtable_tag"
"""The attribute by which RecIS itself tells its tables from tensors."""

_lock = threading.Lock()
_changing: set[int] = set()  # by `id`: the tables that are being loaded into


class RecISTable:
    """A table of RecIS, to be filled by a `Loader` and saved by a `Saver`.

    Both take RecIS's tables as they are: the values of a model's `state_dict()` that have
    `hashtable_tag`. Only for a table with a slice of its own is this class needed, as the slice
    cannot be read from the table:

    ```python
    table = RecISTable(model.state_dict()["emb"], slice=gen_slice(rank, ranks))
    Loader(path, {"emb": table}).load()
    ```

    Such a table cannot be filled unseen, as a `HashTable` can: ids and rows show as they come. All
    that can be checked is checked before. If a load fails or is cancelled nevertheless, ids that
    were new are taken out again; rows of ids that were there may be overwritten in part, and a note
    on the error names them. During a load no other may add or delete ids; rows may be looked up.

    A save does not see a moment of such a table either: its rows must stay as they are until the
    save is done. A save fails if ids came or went meanwhile; that a row changed is not noticed.

    Args:
        table: The object that RecIS made.
        slice: The ids that it accepts, by their position on disk; by default all.
        name: Its name in messages; by default that of its first child.

    Attributes:
        name: Its name in messages.
        slice: The ids that it accepts.
        children: The names under which its ids stand on disk.

    Raises:
        TypeError: If it is no table of RecIS.
        ValueError: If it has several children without being coalesced, or two have one number.
    """

    def __init__(
        self,
        table: Any,  # noqa: ANN401  # an object of C++, without a type that Python knows
        *,
        slice: Slice | None = None,  # noqa: A002  # RecIS's name
        name: str | None = None,
    ) -> None:
        if not hasattr(table, _MARK):
            raise TypeError(f"a table of RecIS has {_MARK}, {type(table)} has not")
        if slice is not None and not isinstance(slice, Slice):
            raise TypeError(f"slice must be a Slice, as gen_slice() makes, got {slice!r}")
        info = table.children_info()
        names = list(info.children())
        # Asked of known names only: RecIS registers the name of a child that it does not know.
        numbers = {child: info.child_index(child) for child in names}
        self.name = name or (names[0] if names else "hashtable")
        self.slice = gen_slice() if slice is None else slice
        self._table = table
        ordered = sorted(names, key=numbers.__getitem__)
        self._encoding = Encoding.of(self.name, ordered, coalesced=info.is_coalesce())
        if sorted(numbers.values()) != list(range(len(names))):
            raise ValueError(
                f"table {self.name!r}: its children are not numbered one by one ({numbers}): RecIS "
                "gives a child that it does not know the number 0 when asked for it by "
                "child_index(); make the table anew"
            )

    def __repr__(self) -> str:
        return f"<RecISTable {self.name!r}: children {list(self.children)}, slice {self.slice}>"

    @property
    def children(self) -> Sequence[str]:
        return self._encoding.children

    def slots(self) -> Mapping[str, Slot]:
        """Return the slots by name, `embedding` first; their initial values are RecIS's."""
        slots = {slot.name(): described(slot) for slot in self._table.slot_group().slots()}
        return {name: slots[name] for name in sorted(slots, key=_EMBEDDING.__ne__)}

    def problems(self, slots: Collection[str]) -> list[str]:
        """Say which of these slots cannot be filled: those that lack rows of ids that are there."""
        counts = {slot.name(): len(slot.values()) for slot in self._table.slot_group().slots()}
        most = max(counts.values(), default=0)
        return [
            f"slot {name!r} of table {self.name!r} was appended after the first id: it has "
            f"{counts[name]} blocks of rows, others have {most}; append slots (make the "
            "optimizer) before ids come in, or leave this one out with filter_func"
            for name in slots
            if counts.get(name, most) < most
        ]

    def begin(self, *, most: int, expected: int) -> RecISUpdate:  # noqa: ARG002  # as the protocol
        """Begin to fill the table.

        Raises:
            RuntimeError: If another load fills it.
        """
        with _lock:
            if id(self._table) in _changing:
                raise RuntimeError(
                    f"table {self.name!r} is being loaded; one update at a time: wait for that "
                    "one to end"
                )
            _changing.add(id(self._table))
        try:
            row_bytes = self.slots()[_EMBEDDING].row_bytes
            return RecISUpdate(self.name, self._table, self._encoding, row_bytes, self._end)
        except BaseException:
            self._end()
            raise

    def snapshot(self) -> RecISSnapshot:
        """Return the table for a save; rows must not change until it is done."""
        return RecISSnapshot(self.name, self.slice, self.slots(), self._table, self._encoding)

    def _end(self) -> None:
        with _lock:
            _changing.discard(id(self._table))


def adapted(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Return tables by name, those of RecIS as a `RecISTable`."""
    return {
        name: RecISTable(table, name=str(name)) if is_of_recis(table) else table
        for name, table in tables.items()
    }


def is_of_recis(table: object) -> bool:
    return hasattr(table, _MARK)


def identity(table: object) -> int:
    """Return a number that tells a table from others; of RecIS's, the same for all its wrappers."""
    return id(table._table if isinstance(table, RecISTable) else table)  # noqa: SLF001  # ours
