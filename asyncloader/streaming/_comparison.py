"""Compares what the checkpoint has for a name with what filled its memory under another."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from asyncloader._concurrency import for_each, run_jobs
from asyncloader.storage import read_exactly

from ._tensors import copy_elements

if TYPE_CHECKING:
    from asyncloader.checkpoint import Block
    from asyncloader.planning import LoadPlan, TensorLoad
    from asyncloader.storage import Storage

    from ._budget import ByteBudget
    from ._destinations import Destinations
    from ._staging import StagingPool
    from ._threads import Threads

__all__ = ["Comparison"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Finds tied tensors that the checkpoint holds twice, with different values."""

    plan: LoadPlan
    tensors: Destinations
    storage: Storage
    threads: Threads
    budget: ByteBudget
    staging: StagingPool
    parallel: int
    chunk_bytes: int

    async def run(self) -> list[str]:
        """Return a warning for each; the memory has to be filled.

        Raises:
            ReadError: If the storage failed.
        """
        if not self.plan.again:
            return []
        numbers = {name: number for number, name in enumerate(self.plan.tensors.names)}
        warnings: list[str] = []

        async def compare(load: TensorLoad) -> None:
            filler = self.plan.shared[load.name]
            block = self.plan.tensors.block(numbers[filler])
            if not await self._same(load, block):
                warnings.append(
                    f"tensors {load.name!r} and {filler!r} are one memory, but the checkpoint has "
                    f"different values for them: it holds those of {filler!r} now"
                )

        await for_each(self.plan.again, compare, workers=self.parallel, name="asyncloader-compare")
        return sorted(warnings)

    async def _same(self, load: TensorLoad, filler: Block) -> bool:
        block = load.block
        if (block.shard, block.offset) == (filler.shard, filler.offset):
            return True
        if block.digests is not None and filler.digests is not None:
            return block.digests == filler.digests
        [number] = self.tensors.targets.numbers([load.name])
        tensor = self.tensors.held[number]
        if f"torch.{block.dtype.torch}" != str(tensor.dtype):
            return True  # converted on its way: two roundings may differ where the values do not
        step = max(self.chunk_bytes // tensor.itemsize, 1) * tensor.itemsize
        for begin in range(0, block.nbytes, step):
            length = min(step, block.nbytes - begin)
            async with self.budget.reserve(length):
                buffer = self.staging.take(length)
                values = buffer[:length]
                view = values.numpy().data
                await read_exactly(self.storage, block.shard, block.offset + begin, [view])
                look = partial(_holds, tensor, begin // tensor.itemsize, values)
                [same] = await run_jobs(self.threads.kernels, [look])
                self.staging.give(buffer)
            if not same:
                return False
        return True


def _holds(tensor: torch.Tensor, start: int, values: torch.Tensor) -> bool:
    """Say whether a tensor's elements from `start` on have these bytes, uint8 `[n]`."""
    held = torch.empty(values.nbytes // tensor.itemsize, dtype=tensor.dtype)
    copy_elements(tensor, start, held)
    return torch.equal(held.view(torch.uint8), values)
