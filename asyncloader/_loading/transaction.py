"""Runs a load from its first byte to its end: all or nothing."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch

from asyncloader._storage.protocol import read_exactly
from asyncloader._threads.jobs import for_each, run_jobs

from .buffers import boxes, torch_dtype
from .stream import stream

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from asyncloader._checkpoint.blocks import Block
    from asyncloader._planning.plan import TensorLoad
    from asyncloader._table.protocol import UpdateCounts

    from .load import Load

T = TypeVar("T")

_STEP = 1 << 16
"""Elements that are converted at a time."""


async def run(load: Load) -> None:
    """Read everything, and make it ready for `load.commit()`.

    Afterwards, or after a failure, call `load.commit()` or `load.abort()`: no thread writes any
    more then.
    """
    await or_take_back(load, _run(load))


async def _run(load: Load) -> None:
    await load.prepare()
    await stream(load)
    load.warnings = await _compare_tied(load)
    await load.session.check_unchanged(load.plan.shards)
    await load.finish()


async def or_take_back(load: Load, work: Awaitable[T]) -> T:
    """Await something before the commit; if that fails, take out of tables what shows already."""
    try:
        return await work
    except BaseException:
        await load.take_back()
        raise


async def complete(load: Load) -> dict[str, UpdateCounts]:
    """Run a load and commit it, or abort it; return the counts of each table."""
    try:
        await run(load)
    except BaseException:
        load.abort()
        raise
    return load.commit()


async def _compare_tied(load: Load) -> list[str]:
    """Return a warning for each two tied tensors that have different values in the checkpoint."""
    plan = load.plan
    if not plan.again:
        return []
    numbers = {name: number for number, name in enumerate(plan.tensors.names)}
    warnings: list[str] = []

    async def compare(again: TensorLoad) -> None:
        filler = plan.shared[again.name]
        if not await _same(load, again, filler, plan.tensors.block(numbers[filler])):
            warnings.append(
                f"tensors {again.name!r} and {filler!r} are one memory, but the checkpoint has "
                f"different values for them: it holds those of {filler!r} now"
            )

    workers = load.session.options.parallel
    await for_each(plan.again, compare, workers=workers, name="asyncloader-compare")
    return sorted(warnings)


async def _same(load: Load, again: TensorLoad, filler: str, filled: Block) -> bool:
    """Say whether the memory would hold the same had `again` filled it, not `filler`'s block."""
    block, dtype = again.block, torch_dtype(again.block.dtype)
    chosen = load.tensors.targets.numbers([again.name, filler])
    tensor, other = map(load.tensors.held.__getitem__, chosen)
    views = [(one.is_conj(), one.is_neg()) for one in (tensor, other)]
    if block.dtype == filled.dtype and views[0] == views[1]:
        if (block.shard, block.offset) == (filled.shard, filled.offset):
            return True
        if block.digests is not None and block.digests == filled.digests:
            return True
        if block.digests is not None and filled.digests is not None and dtype == tensor.dtype:
            return False  # other values may become the same ones where they are converted
    step = max(load.chunk_bytes // dtype.itemsize, 1) * dtype.itemsize
    for begin in range(0, block.nbytes, step):
        length = min(step, block.nbytes - begin)
        async with load.session.budget.reserve(length):
            buffer = load.staging.take(length)
            view = buffer[:length].numpy().data
            await read_exactly(load.storage, block.shard, block.offset + begin, [view])
            values = torch.frombuffer(view, dtype=dtype)
            look = partial(_holds, tensor, begin // dtype.itemsize, values)
            [same] = await run_jobs(load.threads.kernels, [look])
            del view, values, look
            load.staging.give(buffer)
        if not same:
            return False
    return True


def _holds(tensor: torch.Tensor, start: int, values: torch.Tensor) -> bool:
    """Say whether a tensor's elements from `start` on are these once converted, `[n]`."""
    for at in range(0, len(values), _STEP):
        wanted = values[at : at + _STEP].to(tensor.dtype)
        held = torch.empty_like(wanted)
        for box, part in boxes(tensor, start + at, held):
            part.copy_(box)
        if not torch.equal(held.view(torch.uint8), wanted.view(torch.uint8)):
            return False
    return True
