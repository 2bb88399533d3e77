"""Makes room for all that a checkpoint holds."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from asyncloader._checkpoint.dtypes import BY_TORCH
from asyncloader._checkpoint.index import Places
from asyncloader._checkpoint.slices import gen_slice
from asyncloader._checkpoint.stored import stored_tensor
from asyncloader._loading.reading import has_dtype, torch_dtype
from asyncloader._loading.session import open_session
from asyncloader._memory.allocation import zeros
from asyncloader._planning.casts import can_cast
from asyncloader._table.hashtable import HashTable
from asyncloader._threads.jobs import run_jobs
from asyncloader.errors import CheckpointError
from asyncloader.options import ReadOptions

from .room import check_room, free_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from asyncloader._checkpoint.index import Catalog
    from asyncloader._checkpoint.manifest import Manifest
    from asyncloader._checkpoint.slices import Slice
    from asyncloader._checkpoint.stored import Stored


EMBEDDING = "embedding"
ID = "id"


_whole = partial(gen_slice, 0, 1)


def nobody(*news: object) -> None:
    """Tell nobody."""


def every_slot(table: str, slot: str) -> bool:  # noqa: ARG001  # whichever it is
    """Take them all."""
    return True


async def allocate(
    path: str,
    *,
    slice_of: Callable[[int], Slice] = _whole,
    take: Callable[[str, str], bool] = every_slot,
    options: ReadOptions | None = None,
    kernels: Callable[[float], object] = nobody,
    floats: str | None = None,
    lacking: Callable[[str, str], object] = nobody,
) -> tuple[dict[str, HashTable], dict[str, Tensor]]:
    """Read names and headers, and return empty tables and zero tensors that take all of it.

    Each table on disk becomes a table of its own, also where several are children of one. Memory
    is taken when it is first written to: allocating costs next to nothing.

    Args:
        path: A RecIS folder, a safetensors file, or a folder of Hugging Face's.
        slice_of: The ids that a table accepts, given the slice size that the checkpoint has for
            it: `partial(gen_slice, rank, ranks)`; all of them by default.
        take: Says of a table and a slot besides `id` and `embedding` whether to have it.
        options: How to read.
        kernels: Told how many seconds it took to load the compiled kernels, or to compile them,
            if there are tables; on a thread.
        floats: The dtype to make all floats of, as torch spells it; each of its own by default.
        lacking: Told of each tensor that is left out, as torch has no such dtype, and of the dtype;
            on a thread.

    Raises:
        CheckpointError: If the checkpoint is missing, unreadable, or contradicts itself; if a table
            has no embeddings or no ids; if torch does not have the dtype of one of its slots.
        ReadError: If the storage failed.
        MemoryError: If there is no room.
    """
    async with open_session(path, options or ReadOptions()) as session:
        catalog = await session.catalog()
        manifest = await session.manifest(catalog, shards_of(catalog))
        make = _Maker(manifest, slice_of, take, kernels, floats, lacking).make
        # Off the loop: the first table imports, or even compiles, the kernels.
        [made] = await run_jobs(session.threads.kernels, [make])
    return made


def shards_of(catalog: Catalog) -> list[str]:
    """Return the names of all shard files, sorted."""
    parts = (part for slots in catalog.tables.values() for slot in slots.values() for part in slot)
    places = (*catalog.tensors.values(), *(part.place for part in parts))
    return sorted({place.shard for place in places})


def stored_slot(manifest: Manifest, table: str, slot: str) -> Stored:
    """Return what is stored of a slot, also where a dense tensor is called `table@slot`.

    Raises:
        CheckpointError: If its blocks do not fit together, or a shard lacks one.
    """
    tables_only = replace(manifest.catalog, tensors=Places({}, {}))
    return stored_tensor(replace(manifest, catalog=tables_only), f"{table}@{slot}")


@dataclass(frozen=True, slots=True)
class _Maker:
    manifest: Manifest
    slice_of: Callable[[int], Slice]
    take: Callable[[str, str], bool]
    kernels: Callable[[float], object]
    floats: str | None
    lacking: Callable[[str, str], object]

    def make(self) -> tuple[dict[str, HashTable], dict[str, Tensor]]:
        manifest = self.manifest
        tensors = list(self._tensors())
        check_room(manifest.location, self._nbytes(tensors), free_memory())
        if manifest.catalog.tables:
            begin = time.perf_counter()
            HashTable([1])  # the first one imports them
            self.kernels(time.perf_counter() - begin)
        tables = {name: self._table(name) for name in manifest.catalog.tables}
        return tables, {one.name: self._tensor(one) for one in tensors}

    def _tensors(self) -> Iterator[Stored]:
        """Yield those that torch can hold."""
        for name in self.manifest.catalog.tensors:
            stored = stored_tensor(self.manifest, name)
            if has_dtype(stored.dtype):
                yield self._cast(stored)
            else:
                self.lacking(name, stored.dtype.name)

    def _nbytes(self, tensors: Sequence[Stored]) -> int:
        """Return about how much memory all of it takes once it is filled."""
        nbytes = sum(stored.memory for stored in tensors)
        for table, parts in self.manifest.catalog.tables.items():
            part = self.slice_of(next(iter(parts.values()))[0].slice.size)
            share = (part.end - part.begin) / part.size
            taken = [slot for slot in parts if slot in {ID, EMBEDDING} or self.take(table, slot)]
            slots = (stored_slot(self.manifest, table, slot) for slot in taken)
            rows = sum(self._cast(stored).memory for stored in slots)
            nbytes += int(rows * share)
        return nbytes

    def _cast(self, stored: Stored) -> Stored:
        """Return what is stored as if it were of the dtype that is wanted."""
        if self.floats is None or not can_cast(stored.dtype, BY_TORCH[self.floats], "any"):
            return stored
        return replace(stored, dtype=BY_TORCH[self.floats])

    def _table(self, name: str) -> HashTable:
        slots = self.manifest.catalog.tables[name]
        for needed in (ID, EMBEDDING):
            if needed not in slots:
                problem = f"table {name!r} has no slot {needed!r}, so no table can be made for it"
                raise CheckpointError(self.manifest.location, problem)
        embedding, *others = self._slots(name, list(slots))
        table = HashTable(
            embedding.shape[1:],
            dtype=torch_dtype(self.manifest.location, embedding),
            slice=self.slice_of(slots[ID][0].slice.size),
            name=name,
        )
        for stored in others:
            slot = stored.name.rpartition("@")[2]
            table.add_slot(slot, stored.shape[1:], torch_dtype(self.manifest.location, stored))
        return table

    def _slots(self, table: str, slots: Sequence[str]) -> Iterator[Stored]:
        """Yield `embedding`, then the other slots to take, in the checkpoint's order."""
        yield self._slot(table, EMBEDDING)
        for slot in slots:
            if slot not in {ID, EMBEDDING} and self.take(table, slot):
                yield self._slot(table, slot)

    def _slot(self, table: str, slot: str) -> Stored:
        stored = self._cast(stored_slot(self.manifest, table, slot))
        if not stored.shape or 0 in stored.shape[1:]:
            problem = (
                f"slot {slot!r} of table {table!r} has the shape {list(stored.shape)}, "
                "which are no rows of anything"
            )
            raise CheckpointError(self.manifest.location, problem)
        return stored

    def _tensor(self, stored: Stored) -> Tensor:
        return zeros(stored.shape, torch_dtype(self.manifest.location, stored))
