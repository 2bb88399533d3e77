"""A stand-in for RecIS's table, with the interface and the oddities that RecIS's was seen to have.

Where RecIS leaves something open, the stand-in does what is least convenient; what would make the
real one unusable is an error here.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    Longs = NDArray[np.int64]

_FREE, _GONE = -1, -2
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


class IdMap:
    """Id → index: open addressing, a batch of ids at a time."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.keys: Longs = np.zeros(1 << bits, np.int64)
        self.values: Longs = np.full(1 << bits, _FREE, np.int64)
        self.used = 0  # those of deleted ids, too

    def find(self, ids: Longs) -> Longs:
        """Return the index of each id; -1 if it is not there."""
        found = np.full(len(ids), -1, np.int64)
        left, at = np.arange(len(ids)), self._home(ids)
        while len(left):
            values = self.values[at]
            hit = (self.keys[at] == ids[left]) & (values >= 0)
            found[left[hit]] = values[hit]
            going = ~hit & (values != _FREE)
            left, at = left[going], (at[going] + 1) & (len(self.keys) - 1)
        return found

    def add(self, ids: Longs, indices: Longs) -> None:
        """Add different ids that are not there."""
        if (self.used + len(ids)) * 2 > len(self.keys):
            live = self.values >= 0
            keys, values = self.keys[live], self.values[live]
            bits = max(self.bits, (4 * (len(keys) + len(ids))).bit_length())
            self.__init__(bits)  # type: ignore[misc]
            self.add(keys, values)
        self.used += len(ids)
        left, at = np.arange(len(ids)), self._home(ids)
        while len(left):
            free = self.values[at] == _FREE
            self.values[at[free]] = indices[left[free]]
            self.keys[at[free]] = ids[left[free]]
            going = self.values[at] != indices[left]
            left, at = left[going], (at[going] + 1) & (len(self.keys) - 1)

    def remove(self, ids: Longs) -> None:
        gone = np.isin(self.keys, ids) & (self.values >= 0)
        self.values[gone] = _GONE

    def items(self) -> tuple[Longs, Longs]:
        live = self.values >= 0
        return self.keys[live], self.values[live]

    def _home(self, ids: Longs) -> Longs:
        mixed = (ids.view(np.uint64) * _FACTOR) >> np.uint64(64 - self.bits)
        return mixed.astype(np.int64)


@dataclass(eq=False)
class StandInSlot:
    label: str
    rows_in_block: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    initial: float = 0.0
    memory: Callable[[tuple[int, ...], torch.dtype], Tensor] = field(kw_only=True)
    blocks: list[Tensor] = field(default_factory=list)

    def name(self) -> str:
        return self.label

    def block_size(self) -> int:
        return self.rows_in_block

    def flat_size(self) -> int:
        return int(np.prod(self.shape))

    def values(self) -> list[Tensor]:
        return list(self.blocks)

    def value(self) -> Tensor:
        return torch.cat([self.new(0), *self.blocks])

    def new(self, rows: int) -> Tensor:
        return self.initialized(torch.empty((rows, *self.shape), dtype=self.dtype))

    def initialized(self, rows: Tensor) -> Tensor:
        if self.initial:
            return rows.fill_(self.initial)
        rows.view(-1).view(torch.uint8).numpy().fill(0)  # torch would start threads for that
        return rows

    def grow(self, blocks: int) -> None:
        shape = (self.rows_in_block, *self.shape)
        self.blocks += [self.initialized(self.memory(shape, self.dtype)) for _ in range(blocks)]

    def pick(self, index: Longs) -> Tensor:
        """Return the rows of indices, in their order; of -1, the initial one."""
        out = torch.empty((len(index), *self.shape), dtype=self.dtype)
        if len(index) and index.min() < 0:
            self.initialized(out)
        numbers = index // self.rows_in_block
        order = np.argsort(numbers, kind="stable")
        order = order[np.searchsorted(numbers[order], 0) :]
        for here in np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1):
            if len(here):
                block = self.blocks[int(numbers[here[0]])]
                _voids(out)[here] = _voids(block)[index[here] % self.rows_in_block]
        return out


def _voids(rows: Tensor) -> NDArray[np.void]:
    flat = rows.reshape(len(rows), -1).view(torch.uint8).numpy()
    voids: NDArray[np.void] = flat.view(np.dtype((np.void, flat.shape[1])))[:, 0]
    return voids


def fresh(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return memory for a block."""
    return torch.empty(shape, dtype=dtype)


class SlotGroup:
    def __init__(self) -> None:
        self.items: dict[str, StandInSlot] = {}

    def slots(self) -> list[StandInSlot]:
        return list(self.items.values())

    def slot_by_name(self, name: str) -> StandInSlot:
        if name not in self.items:
            raise RuntimeError("_Map_base::at() was not in the map")
        return self.items[name]

    def slot_by_index(self, number: int) -> StandInSlot:
        return self.slots()[number]

    slot_index = slot_by_index


class ChildrenInfo:
    def __init__(self, children: Sequence[str], *, coalesced: bool) -> None:
        self._numbers = {name: number for number, name in enumerate(children)}
        self._coalesced = coalesced

    def children(self) -> list[str]:
        return list(self._numbers)

    def child_index(self, name: str) -> int:
        return self._numbers.setdefault(name, 0)  # an unknown name is registered

    def child_at(self, number: int) -> str:
        return self.children()[number]

    def has_child(self, name: str) -> bool:
        return name in self._numbers

    def is_coalesce(self) -> bool:
        return self._coalesced


@dataclass(eq=False)
class StandIn:
    """`torch.classes.recis.HashtableImpl`; there is no slice to be read from it."""

    shape: Sequence[int]
    dtype: torch.dtype = torch.float32
    block_size: int = 4
    children: Sequence[str] = ("t",)
    coalesced: bool = False
    initial: float = 0.0
    newer: bool = False
    """Whether it is of 1.1.28 or later."""

    shuffled: bool = False
    """Whether new indices come in a random order; reversed otherwise, as was seen."""

    before_lookup: Callable[[int], None] = lambda _: None
    """Gets the number of the call, and may raise."""

    after_lookup: Callable[[int], None] = lambda _: None
    """The same, once ids have come in."""

    room: int = 16
    """Ids that the map takes before it grows."""

    memory: Callable[[tuple[int, ...], torch.dtype], Tensor] = fresh
    """Returns memory for a block, of any values."""

    def __post_init__(self) -> None:
        self._info = ChildrenInfo(self.children, coalesced=self.coalesced)
        self._group = SlotGroup()
        self._map = IdMap((4 * self.room).bit_length())
        self._freed: list[int] = []
        self._end = 0
        self._lookups = 0
        self._busy = threading.Lock()
        self._random = np.random.default_rng(1)
        self.append("embedding", self.shape, self.dtype, self.initial)

    def hashtable_tag(self) -> int:
        return -1

    def append(
        self, name: str, shape: Sequence[int], dtype: torch.dtype, initial: float = 0.0
    ) -> None:
        """Append a slot, as RecIS's optimizers do."""
        slot = StandInSlot(name, self.block_size, tuple(shape), dtype, initial, memory=self.memory)
        self._group.items[name] = slot

    def slot_group(self) -> SlotGroup:
        return self._group

    def get_slot(self, name: str) -> StandInSlot:
        return self._group.slot_by_name(name)

    def children_info(self) -> ChildrenInfo:
        return self._info

    def embedding_lookup(self, ids: Tensor, readonly: bool) -> tuple[Tensor, Tensor]:
        assert self._busy.acquire(blocking=False), "two lookups at a time"
        try:
            wanted = ids.numpy()
            ordered = np.sort(wanted)
            assert (ordered[1:] != ordered[:-1]).all(), "an id twice makes it unusable"
            index = self._map.find(wanted)
            if not readonly:
                self._lookups += 1
                self.before_lookup(self._lookups)
                new = index < 0
                index[new] = self._new(int(new.sum()))
                self._map.add(wanted[new], index[new])
                self.after_lookup(self._lookups)
            rows = self._group.items["embedding"].pick(index)
            width = self.shape[0] if len(self.shape) > 1 else rows[:1].numel()
            ids.fill_(0)  # the caller has given them away
            return torch.from_numpy(index), rows.view(len(index), -1)[:, :width]
        finally:
            self._busy.release()

    def _new(self, count: int) -> Longs:
        freed = [self._freed.pop() for _ in range(min(count, len(self._freed)))]
        fresh = np.arange(self._end, self._end + count - len(freed))
        self._end += len(fresh)
        if self._end:
            more = self._end // self.block_size + 1 - len(self._group.items["embedding"].blocks)
            for slot in self._group.slots():
                slot.grow(more)
        given = np.array([*freed, *fresh], np.int64) if freed else fresh[::-1].copy()
        return self._random.permutation(given) if self.shuffled else given

    def ids_map(self, *child: str | None) -> tuple[Tensor, Tensor]:
        if len(child) != self.newer:
            raise RuntimeError("ids_map() is missing value for argument, or expected fewer")
        ids, index = self._map.items()
        return torch.from_numpy(ids), torch.from_numpy(index)

    def ids(self, *child: str | None) -> Tensor:
        return self.ids_map(*child)[0]

    def delete(self, ids: Tensor, index: Tensor, preserve_slot: str) -> None:
        self._map.remove(ids.numpy())
        for one in index.tolist():
            for slot in self._group.slots():
                if slot.label != preserve_slot:
                    slot.blocks[one // self.block_size][one % self.block_size] = slot.initial
        self._freed += index.tolist()

    def held(self) -> dict[int, dict[str, bytes]]:
        """Return all that it holds, by encoded id; for tests."""
        ids, index = self._map.items()
        rows = {slot.label: slot.pick(index) for slot in self._group.slots()}
        return {
            id_: {
                name: row[number].contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                for name, row in rows.items()
            }
            for number, id_ in enumerate(ids.tolist())
        }
