"""What loading into a table must do, in plain dicts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import torch

from .values import Slice, flat_bytes

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from torch import Tensor

    from .values import Part

RowBytes: TypeAlias = dict[str, bytes]
"""By slot, a row's raw bytes, so that NaN compare bit for bit."""

SlotSpec: TypeAlias = "tuple[tuple[int, ...], torch.dtype, Tensor | float]"
"""Shape of one row, dtype, initial value (a number, or a row)."""

_ID_BITS = 52


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Rows of one source, counted by what became of them."""

    loaded: int
    """Rows that were taken, those that a later row replaced included."""

    new: int
    """Ids among them that the table did not hold before."""

    duplicates: int
    """Rows whose id, as the table holds it, came before in the same source."""

    dropped: int
    """Rows outside the slice that their block claims."""

    foreign: int
    """Rows within their block's claim that are not in the table's slice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTable:
    """A table as a dict of rows."""

    slots: Mapping[str, SlotSpec]
    """In the table's order, without `id`."""

    slice: tuple[int, int, int] = (0, 65536, 65536)
    """`(begin, end, size)` of the ids that this rank holds."""

    children: Sequence[str] = ()
    """Names on disk; the position is the child's index."""

    coalesced: bool = False

    rows: dict[int, RowBytes] = field(default_factory=dict)
    """By id as the table holds it (encoded when coalesced)."""

    def put(self, ids: Tensor, slots: Mapping[str, Tensor]) -> None:
        """Set rows directly, by ids as the table holds them, with no slice looked at."""
        self._check(slots)
        for key, values in _each_row(ids, slots):
            self.rows[key] = {**self._row(key), **values}

    def apply(self, child: str | int, parts: Iterable[Part], listed: Collection[str]) -> Outcome:
        """Load one source into a child, named or by index, one part after the other.

        Slots that are not listed, or listed and not in a part, keep their values; those of a
        new id get their initial ones. `id` may be listed or not.
        """
        number = child if isinstance(child, int) else list(self.children).index(child)
        if unknown := set(listed) - {"id", *self.slots}:
            raise KeyError(f"the table has no slots {unknown}")
        before, seen = set(self.rows), set[int]()
        loaded = dropped = foreign = 0
        for part in parts:
            wanted = {name: slot for name, slot in part.slots.items() if name in listed}
            self._check(wanted)
            for disk_id, values in _each_row(part.ids, wanted):
                if not part.claim.accepts(disk_id):
                    dropped += 1
                elif not Slice(*self.slice).accepts(disk_id):
                    foreign += 1
                else:
                    key = encode_id(disk_id, number) if self.coalesced else disk_id
                    self.rows[key] = {**self._row(key), **values}
                    seen.add(key)
                    loaded += 1
        return Outcome(
            loaded=loaded,
            new=len(seen - before),
            duplicates=loaded - len(seen),
            dropped=dropped,
            foreign=foreign,
        )

    def _check(self, slots: Mapping[str, Tensor]) -> None:
        for name, slot in slots.items():
            shape, dtype, _ = self.slots[name]
            if (slot.shape[1:], slot.dtype) != (shape, dtype):
                raise ValueError(f"{name!r} is {dtype} {shape}, not {slot.dtype} {slot.shape[1:]}")

    def _row(self, key: int) -> RowBytes:
        """Return the row of an id, or a fresh one."""
        if key in self.rows:
            return self.rows[key]
        return {name: _initial(spec) for name, spec in self.slots.items()}


def encode_id(disk_id: int, child: int) -> int:
    """Return a child's id as a coalesced table holds it, as a signed 64-bit number."""
    encoded = disk_id % (1 << _ID_BITS) | child << _ID_BITS
    return encoded - (1 << 64) if encoded >= 1 << 63 else encoded


def rows_of(ids: Tensor, slots: Mapping[str, Tensor]) -> dict[int, RowBytes]:
    """Turn tensors into rows to compare with `ModelTable.rows`; ids must not repeat."""
    rows = dict(_each_row(ids, slots))
    if len(rows) != len(ids):
        raise ValueError(f"{len(ids) - len(rows)} of {len(ids)} ids repeat")
    return rows


def _each_row(ids: Tensor, slots: Mapping[str, Tensor]) -> Iterable[tuple[int, RowBytes]]:
    columns = {name: _split_rows(slot) for name, slot in slots.items()}
    for row, key in enumerate(ids.tolist()):
        yield key, {name: column[row] for name, column in columns.items()}


def _split_rows(slot: Tensor) -> list[bytes]:
    raw = flat_bytes(slot).numpy().tobytes()
    size = len(raw) // max(1, len(slot))
    return [raw[row * size : (row + 1) * size] for row in range(len(slot))]


def _initial(spec: SlotSpec) -> bytes:
    shape, dtype, value = spec
    return flat_bytes(torch.as_tensor(value, dtype=dtype).expand(shape)).numpy().tobytes()
