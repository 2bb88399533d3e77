"""When to try again what could not be loaded."""

from __future__ import annotations

import contextlib
import random
from typing import TYPE_CHECKING

import torch

from asyncloader.errors import (
    CheckpointChangedError,
    CheckpointError,
    CheckpointNotFoundError,
    PlanError,
    ReadError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .source import Files


_LONGEST = 60.0
_DOUBLINGS = 64  # a float would end at 1023
_LOOKS = 6
"""At a version that is damaged, each after twice the pause of the one before: a minute in all, if
the first pause is a second. No version is given up for good: once its files change, it is tried
anew."""
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


class Copying:
    """Tells a version that is damaged from one that is still being copied.

    `rsync`, `cp` and object stores bring `index` before the shards. A version whose files are
    missing, short or damaged is loaded again once they have changed, and given up once they have
    stood still for long.
    """

    def __init__(self) -> None:
        self._failed: Files | None = None
        self._error: Exception | None = None
        self._looks = 0

    @contextlib.contextmanager
    def of(self, files: Files) -> Iterator[None]:
        """Note what the load of these files raises, within the block.

        Raises:
            Exception: What the last load raised, if they are as they were then: so would the next.
        """
        if self._error is not None and self._failed == files:
            self._looks += 1
            raise self._error
        self._looks = 0
        try:
            yield
        except Exception as error:
            # Where no file says which shards there are, a missing one looks like a smaller model.
            partial = isinstance(error, PlanError) and not files.have_index
            if partial or (isinstance(error, CheckpointError) and not may_pass(error)):
                self._failed, self._error = files, error
            raise

    def may_pass(self, error: BaseException) -> bool:
        """Say whether to look again after an error."""
        if error is self._error:
            return self._looks < _LOOKS
        return may_pass(error)


def pause_after(attempt: int, pause: float) -> float:
    """Return the seconds between an attempt that failed, the first of which is 1, and the next.

    Each pause is twice as long as the one before, a minute at most. To each up to a second is added
    at random, so that many services do not try at once.
    """
    longer = pause * 2.0 ** min(attempt - 1, _DOUBLINGS)
    return min(longer, _LONGEST) + random.uniform(0, min(pause, 1))  # noqa: S311  # no secret
