"""When to try again what could not be loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tenacity import AsyncRetrying, retry_if_exception, wait_exponential, wait_random

from asyncloader.errors import (
    CheckpointChangedError,
    CheckpointError,
    CheckpointNotFoundError,
    ReadError,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tenacity import RetryCallState

__all__ = ["may_pass", "retrying"]

_LONGEST = 60.0
# What torch says on the host, and Python of threads: neither has a class of its own for it.
_NO_ROOM = ("not enough memory", "can't allocate memory", "can't start new thread")


def may_pass(error: BaseException) -> bool:
    """Say whether a fault may be gone the next time.

    Storage fails and recovers, a checkpoint that was replaced meanwhile can be read anew, memory
    becomes free. What is corrupt stays so, and so does what does not fit the model.
    """
    if isinstance(error, CheckpointError):
        # Of files that cannot be opened or read the cause says why; one that is missing stays so.
        cause = error.__cause__
        storage = isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError)
        return storage or isinstance(error, CheckpointChangedError | CheckpointNotFoundError)
    if isinstance(error, OSError | MemoryError | ReadError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_ROOM)


def retrying(
    *,
    pause: float,
    sleep: Callable[[float], Awaitable[None]],
    failed: Callable[[RetryCallState], None],
) -> AsyncRetrying:
    """Return what tries again for as long as the fault may pass, with growing pauses.

    Args:
        pause: Seconds before the second try; twice as long before each next, a minute at most. To
            each up to a second is added at random, so that many services do not try at once.
        sleep: Waits; what it raises ends the tries.
        failed: Called before each pause.
    """
    return AsyncRetrying(
        retry=retry_if_exception(may_pass),
        wait=wait_exponential(multiplier=pause, max=_LONGEST) + wait_random(0, min(pause, 1)),
        sleep=sleep,
        before_sleep=failed,
        reraise=True,
    )
