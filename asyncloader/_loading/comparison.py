"""Compares what the checkpoint has for a name with what filled its memory under another."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from asyncloader._storage.protocol import read_exactly
from asyncloader._threads.jobs import for_each, run_jobs

from .tensors import copy_elements, torch_dtype

if TYPE_CHECKING:
    from asyncloader._checkpoint.blocks import Block
    from asyncloader._planning.plan import LoadPlan
    from asyncloader._planning.tensor_loads import TensorLoad
    from asyncloader._storage.protocol import Storage
    from asyncloader._threads.budget import ByteBudget
    from asyncloader._threads.threads import Threads

    from .destinations import Destinations
    from .staging import StagingPool


_STEP = 1 << 16
"""Elements that are converted at a time."""


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
            if not await self._same(load, filler, block):
                warnings.append(
                    f"tensors {load.name!r} and {filler!r} are one memory, but the checkpoint has "
                    f"different values for them: it holds those of {filler!r} now"
                )

        await for_each(self.plan.again, compare, workers=self.parallel, name="asyncloader-compare")
        return sorted(warnings)

    async def _same(self, load: TensorLoad, filler: str, filled: Block) -> bool:
        """Say whether the memory would hold the same had `load` filled it, and not `filler`.

        Args:
            load: What was not loaded.
            filler: The name under which the memory was filled.
            filled: The block that filled it.
        """
        block, dtype = load.block, torch_dtype(load.block.dtype)
        tensor, other = map(self.tensors.held.__getitem__, self._numbers(load.name, filler))
        views = [(one.is_conj(), one.is_neg()) for one in (tensor, other)]
        if block.dtype == filled.dtype and views[0] == views[1]:
            if (block.shard, block.offset) == (filled.shard, filled.offset):
                return True
            if block.digests is not None and block.digests == filled.digests:
                return True
            if block.digests is not None and filled.digests is not None and dtype == tensor.dtype:
                return False  # other values may become the same ones where they are converted
        step = max(self.chunk_bytes // dtype.itemsize, 1) * dtype.itemsize
        for begin in range(0, block.nbytes, step):
            length = min(step, block.nbytes - begin)
            async with self.budget.reserve(length):
                buffer = self.staging.take(length)
                view = buffer[:length].numpy().data
                await read_exactly(self.storage, block.shard, block.offset + begin, [view])
                values = torch.frombuffer(view, dtype=dtype)
                look = partial(_holds, tensor, begin // dtype.itemsize, values)
                [same] = await run_jobs(self.threads.kernels, [look])
                del view, values, look
                self.staging.give(buffer)
            if not same:
                return False
        return True

    def _numbers(self, *names: str) -> list[int]:
        return self.tensors.targets.numbers(names)


def _holds(tensor: torch.Tensor, start: int, values: torch.Tensor) -> bool:
    """Say whether a tensor's elements from `start` on are these once converted, `[n]`."""
    for at in range(0, len(values), _STEP):
        wanted = values[at : at + _STEP].to(tensor.dtype)
        held = torch.empty_like(wanted)
        copy_elements(tensor, start + at, held)
        if not torch.equal(held.view(torch.uint8), wanted.view(torch.uint8)):
            return False
    return True
