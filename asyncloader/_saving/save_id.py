"""Tells one save from another, so that a dead save's part is not taken for this one's.

Ranks agree through torch.distributed's store, and not by a collective: collectives of the program
may be under way at the same time, and cannot be cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import uuid
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from torch import distributed

from asyncloader._threads.jobs import settled
from asyncloader.errors import SaveError, SaveTimeoutError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from concurrent.futures import Executor

    from torch._C._distributed_c10d import Store


T = TypeVar("T")

_LOOK = 0.02
"""Seconds between two looks for rank 0's answer."""


def fresh_save_id() -> str:
    """Return an id that no other save has."""
    return uuid.uuid4().hex[:12]


@contextlib.asynccontextmanager
async def agreed_save_id(
    path: str,
    rank: int,
    ranks: int,
    *,
    timeout: float | None,  # noqa: ASYNC109  # with an error of ours
    executor: Executor,
) -> AsyncIterator[str]:
    """Yield an id that rank 0 draws for all ranks, for the length of a save into the folder `path`.

    Each rank counts its saves to a path, so the n-th of one belongs to the n-th of the others. If a
    rank begins its n-th when rank 0's is over, it is out of step: a `SaveError`.
    """
    store = _store(rank, ranks)
    ask = partial(_asked, executor)
    base = f"asyncloader/{ranks}/{os.path.normpath(path)}"  # noqa: ASYNC240  # text alone
    count = await ask(store.add, f"{base}/saves/{rank}", 1)
    key, over = f"{base}/id/{count}", f"{base}/over/{count}"
    if rank == 0:
        save_id = fresh_save_id()
        await ask(store.set, key, save_id)
        try:
            yield save_id
        finally:
            await ask(store.set, over, "yes")
        return
    clock = asyncio.get_running_loop().time
    start = clock()
    while not await ask(store.check, [key]):
        if timeout is not None and clock() - start > timeout:
            raise SaveTimeoutError(path, [0], timeout)
        await asyncio.sleep(_LOOK)
    if await ask(store.check, [over]):
        problem = (
            f"rank {rank}'s save number {count} to this folder is over on rank 0, which did not "
            "wait any longer: some rank has left out a save. Pass save_id, the same on all ranks "
            "and another one for each try"
        )
        raise SaveError(path, problem)
    told: bytes = await ask(store.get, key)
    yield told.decode()


async def _asked(executor: Executor, call: Callable[..., T], *arguments: object) -> T:
    loop = asyncio.get_running_loop()
    return await settled(loop.run_in_executor(executor, partial(call, *arguments)))


def _store(rank: int, ranks: int) -> Store:
    if not distributed.is_available() or not distributed.is_initialized():
        raise ValueError(
            f"rank {rank} of {ranks} cannot know what the others save: pass save_id, the same on "
            "all ranks and another one for each try (a count of the job's starts and the step, "
            "say), or initialise torch.distributed"
        )
    if (distributed.get_rank(), distributed.get_world_size()) != (rank, ranks):
        raise ValueError(
            f"torch.distributed says rank {distributed.get_rank()} of "
            f"{distributed.get_world_size()}, but this saver is shard {rank} of {ranks}: pass "
            "save_id, the same on all ranks and another one for each try"
        )
    # The only way to the store by which the ranks found each other.
    store: Store = distributed.distributed_c10d._get_default_store()  # noqa: SLF001
    return store
