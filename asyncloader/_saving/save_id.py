"""What tells one save from another, so that a dead save's part is not taken for this one's."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
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
"""Seconds between two looks at what rank 0 says."""

_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def checked_save_id(save_id: object) -> str:
    """Return a save_id as text.

    Raises:
        TypeError: If it is neither text nor a number.
        ValueError: If it cannot be a part of a file's name.
    """
    if type(save_id) is int:
        save_id = str(save_id)
    if not isinstance(save_id, str):
        raise TypeError(f"save_id is text or an int, got {save_id!r}")
    if _PLAIN.fullmatch(save_id) is None:
        raise ValueError(
            f"save_id becomes a part of a file's name: 1 to 100 of A-Z a-z 0-9 . _ -, and no sign "
            f"first, got {save_id!r}"
        )
    return save_id


def fresh_save_id() -> str:
    """Return one that no other save has."""
    return uuid.uuid4().hex[:12]


@contextlib.asynccontextmanager
async def agreed_save_id(
    given: str | None,
    path: str,
    rank: int,
    ranks: int,
    *,
    timeout: float | None,  # noqa: ASYNC109  # with an error of ours
    executor: Executor,
) -> AsyncIterator[str]:
    """Yield a save_id that all ranks have, for the length of a save.

    If none is given, rank 0 of several draws one and tells the others, through torch.distributed's
    store. Not by a collective: those of the program may be under way at the same time, and a
    collective cannot be cancelled. Each rank counts its saves to a path, so the n-th of one belongs
    to the n-th of the others; a rank whose n-th comes when rank 0's is over is out of step, and
    told so.

    Args:
        given: What the user gave.
        path: The folder.
        rank: Ours.
        ranks: How many there are.
        timeout: Seconds to wait for rank 0; `None` waits for ever.
        executor: For talking to the store.

    Raises:
        ValueError: If torch.distributed does not connect these ranks.
        SaveError: If the save that this would be a part of is over.
        SaveTimeoutError: If rank 0 did not tell in time.
    """
    if given is not None or ranks == 1:
        yield given or fresh_save_id()
        return
    store = _store(rank, ranks)
    loop = asyncio.get_running_loop()

    async def ask(call: Callable[..., T], *arguments: object) -> T:
        return await settled(loop.run_in_executor(executor, partial(call, *arguments)))

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
    start = loop.time()
    while not await ask(store.check, [key]):
        if timeout is not None and loop.time() - start > timeout:
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
