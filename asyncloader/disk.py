"""For users whose tables do not fit into memory: rows stay in the checkpoint."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from ._checkpoint.parts import ID
from ._disk_table.table import DiskTable
from ._disk_table.warming import EMBEDDING
from .loader import Loader
from .options import ReadOptions
from .reader import CheckpointReader

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence

    import torch

    from ._checkpoint.slices import Slice
    from ._disk_table.readers import HasReaders
    from ._ready_stores import Source

__all__ = ["open_table"]


@contextlib.asynccontextmanager
async def open_table(
    checkpoint_path: Source,
    name: str,
    *,
    slots: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    slice: Slice | None = None,  # noqa: A002  # RecIS's name
    cache_bytes: int = 0,
    concurrency: int = 8,
    direct_io: bool = False,
    runtime: HasReaders | None = None,
    options: ReadOptions | None = None,
) -> AsyncIterator[DiskTable]:
    """Open one table of a checkpoint, whose rows stay where they are; close it at the end.

    ```python
    async with open_table("run/ckpt_30", "item_emb") as table:
        rows = await table.alookup(ids)
    ```

    Args:
        checkpoint_path: A folder that holds `index`, or its URL, which wants `cache_dir` in
            `options`: rows stay in copies there.
        name: The table's name there.
        slots: Further slots to open, besides `embedding`.
        dtype: Of the embedding; `None` is that in the checkpoint. It may be float32 where that is
            bfloat16 or float16.
        slice: The ids to take; by default all.
        cache_bytes: As of `DiskTable`.
        concurrency: As of `DiskTable`.
        direct_io: As of `DiskTable`, for rows.
        runtime: As of `DiskTable`.
        options: How ids are read; its `stall_timeout` is for rows, too.

    Raises:
        KeyError: If there is no such table or slot; it lists what there is.
        CheckpointError: If the checkpoint is missing, unreadable, or contradicts itself.
        PlanError: If its rows cannot stay anywhere: of a URL without `cache_dir`.
        ReadError: If the storage failed.
    """
    how = ReadOptions.of(options, {})
    async with CheckpointReader(checkpoint_path, options=how) as reader:
        _check_names(await reader.atensor_names(), name, slots)
        shapes = {
            slot: await reader.atensor_shape(f"{name}@{slot}") for slot in (EMBEDDING, *slots)
        }
        dtypes = {slot: await reader.atensor_dtype(f"{name}@{slot}") for slot in shapes}
    table = DiskTable(
        shapes[EMBEDDING][1:],
        dtype=dtypes[EMBEDDING] if dtype is None else dtype,
        name=name,
        slice=slice,
        cache_bytes=cache_bytes,
        concurrency=concurrency,
        direct_io=direct_io,
        stall_timeout=how.stall_timeout,
        runtime=runtime,
    )
    for slot in slots:
        table.add_slot(slot, shapes[slot][1:], dtypes[slot])
    try:
        loader = Loader(checkpoint_path, {name: table}, strict=True, cast="widen", options=how)
        await loader.aload()
        yield table
    finally:
        table.close()


def _check_names(known: Iterable[str], table: str, slots: Iterable[str]) -> None:
    """Refuse a table or slot that is not there.

    Raises:
        KeyError: It lists what there is.
    """
    tables: dict[str, list[str]] = {}
    for name in known:
        owner, at, slot = name.rpartition("@")
        if at and slot != ID:
            tables.setdefault(owner, []).append(slot)
    if table not in tables:
        raise KeyError(f"no table {table!r}, there is: {', '.join(sorted(tables)) or 'none'}")
    for slot in slots:
        if slot not in tables[table]:
            have = ", ".join(sorted(tables[table]))
            raise KeyError(f"table {table!r} has no slot {slot!r}, it has: {have}")
