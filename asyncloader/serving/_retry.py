"""When to try again what could not be loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tenacity import AsyncRetrying, retry_if_exception, wait_exponential, wait_random

from asyncloader.errors import CheckpointChangedError, ReadError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tenacity import RetryCallState

__all__ = ["may_pass", "retrying"]

_LONGEST = 60.0


def may_pass(error: BaseException) -> bool:
    """Say whether a fault may be gone the next time.

    Storage fails and recovers, a checkpoint that was replaced meanwhile can be read anew, memory
    becomes free. What is corrupt stays so, and so does what does not fit the model.
    """
    return isinstance(error, (OSError, MemoryError, ReadError, CheckpointChangedError))


def retrying(
    *,
    pause: float,
    sleep: Callable[[float], Awaitable[None]],
    failed: Callable[[RetryCallState], None],
) -> AsyncRetrying:
    """Return what tries again for as long as the fault may pass, with growing pauses.

    Args:
        pause: Seconds before the second try, about; twice as long before each next, a minute at
            most.
        sleep: Waits; what it raises ends the tries.
        failed: Called before each pause.
    """
    return AsyncRetrying(
        retry=retry_if_exception(may_pass),
        wait=wait_exponential(multiplier=pause, max=_LONGEST) + wait_random(0, pause),
        sleep=sleep,
        before_sleep=failed,
        reraise=True,
    )
