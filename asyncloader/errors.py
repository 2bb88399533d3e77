"""Every exception that this package raises on purpose.

Arguments that make no sense are plain `ValueError` or `TypeError`, raised where they are passed.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "AsyncLoaderError",
    "CheckpointChangedError",
    "CheckpointError",
    "CheckpointNotFoundError",
    "LoadTimeoutError",
    "PlanError",
    "ReadError",
    "ReadStalledError",
    "SaveError",
    "SaveTimeoutError",
    "TruncatedShardError",
]

_RANKS_NAMED = 20
_READS_NAMED = 4


class AsyncLoaderError(Exception):
    """Base of all asyncloader errors.

    Attributes:
        touched: Names of the tensors that a load which failed had begun to write to.
    """

    touched: tuple[str, ...] = ()


class CheckpointError(AsyncLoaderError):
    """What stands on disk is unreadable or contradicts itself.

    Attributes:
        location: The checkpoint, as the storage names it.
        problem: What is wrong, and what to do about it where something can be done.
        shard: The file within the checkpoint, if one is to blame.
        key: The block within that file, if one is to blame.
    """

    def __init__(
        self, location: str, problem: str, shard: str | None = None, key: str | None = None
    ) -> None:
        super().__init__(location, problem, shard, key)  # all of it in args, so that it pickles
        self.location = location
        self.problem = problem
        self.shard = shard
        self.key = key

    def __str__(self) -> str:
        where = self.location if self.shard is None else f"{self.location}: {self.shard}"
        block = "" if self.key is None else f" block {self.key!r}:"
        return f"{where}:{block} {self.problem}"


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no committed checkpoint at the location."""

    def __init__(
        self, location: str, problem: str, shard: str | None = None, key: str | None = None
    ) -> None:
        super().__init__(location, problem, shard, key)
        # OSError read its own facts from our arguments.
        self.errno, self.strerror, self.filename = errno.ENOENT, problem, location


class CheckpointChangedError(CheckpointError):
    """The checkpoint was replaced, or written to, while it was being read. Read it again."""


class TruncatedShardError(CheckpointError):
    """A shard file ends before a block that it declares.

    Attributes:
        begin: First byte of the range that cannot be read, from the start of the file.
        end: One past its last byte.
        size: Length of the file in bytes.
    """

    def __init__(  # each is a fact that the handler may ask for
        self, location: str, shard: str, key: str | None, begin: int, end: int, size: int
    ) -> None:
        early = f"{end - size} bytes early" if size else "so it is empty"
        problem = (
            f"bytes [{begin}, {end}) are not there: the file ends at {size}, {early}; copy it "
            "again, or take an older checkpoint"
        )
        super().__init__(location, problem, shard, key)
        self.args = (location, shard, key, begin, end, size)
        self.begin = begin
        self.end = end
        self.size = size


class PlanError(AsyncLoaderError):
    """The checkpoint and the targets disagree. Nothing was written.

    Attributes:
        location: The checkpoint, as the storage names it.
        problems: Everything that is wrong, a line each.
    """

    def __init__(self, location: str, problems: Iterable[str]) -> None:
        self.location = location
        self.problems = tuple(problems)
        super().__init__(location, self.problems)

    def __str__(self) -> str:
        count = len(self.problems)
        lines = "".join(f"\n  - {problem}" for problem in self.problems)
        return f"{self.location}: {count} problem{'s' * (count != 1)}, nothing was loaded:{lines}"


class ReadError(AsyncLoaderError):
    """The storage failed to deliver a byte range. The `OSError` is the `__cause__`.

    Attributes:
        shard: The file within the checkpoint.
        offset: First byte of the range, from the start of the file.
        length: Bytes in the range.
        problem: What the storage said.
        location: The checkpoint, as the storage names it.
        names: The tensors and tables that wanted these bytes, or some of them.
    """

    location: str = ""
    names: tuple[str, ...] = ()

    def __init__(self, shard: str, offset: int, length: int, problem: str) -> None:
        super().__init__(shard, offset, length, problem)
        self.shard = shard
        self.offset = offset
        self.length = length
        self.problem = problem

    def __str__(self) -> str:
        where = f"{self.location}: {self.shard}" if self.location else self.shard
        wanted = f" (wanted by {', '.join(map(repr, self.names))})" if self.names else ""
        begin, end = self.offset, self.offset + self.length
        which = f" bytes [{begin}, {end}):" if self.length else ""
        return f"{where}:{which} {self.problem}{wanted}"


class ReadStalledError(ReadError, TimeoutError):
    """The storage gave no answer for a byte range within `stall_timeout`. Tables are as they were.

    The thread that asked cannot be interrupted. Should it ever get an answer, it writes that to
    memory that nobody uses any more; but for dense tensors, which `touched` names. Those cannot be
    loaded into again before it has: take new ones.
    """

    def __init__(self, shard: str, offset: int, length: int, problem: str) -> None:
        super().__init__(shard, offset, length, problem)
        # OSError read its own facts from our arguments.
        self.args = (shard, offset, length, problem)
        self.errno, self.strerror, self.filename = errno.ETIMEDOUT, "timed out", None


class LoadTimeoutError(AsyncLoaderError, TimeoutError):
    """The load took longer than its `timeout`. Tables are as they were.

    Attributes:
        location: The checkpoint, as the storage names it.
        seconds: The time that was allowed.
        under_way: The files and byte ranges that were being read then, the longest first.
    """

    def __init__(self, location: str, seconds: float, under_way: Iterable[str] = ()) -> None:
        self.under_way = tuple(under_way)
        super().__init__(location, seconds, self.under_way)
        self.args = (location, seconds, self.under_way)
        self.errno, self.strerror, self.filename = errno.ETIMEDOUT, "timed out", None
        self.location = location
        self.seconds = seconds

    def __str__(self) -> str:
        named = ", ".join(self.under_way[:_READS_NAMED])
        more = len(self.under_way) - _READS_NAMED
        reading = f"; reading then: {named}" if named else ""
        also = f" and {more} more" if more > 0 else ""
        return f"{self.location}: not loaded within {self.seconds:g} seconds{reading}{also}"


class SaveError(AsyncLoaderError):
    """A checkpoint could not be saved. An `OSError`, if there was one, is the `__cause__`.

    Attributes:
        location: The folder that was to become the checkpoint.
        problem: What is wrong, and what to do about it where something can be done.
        file: The file within the folder, if one is to blame.
    """

    def __init__(self, location: str, problem: str, file: str | None = None) -> None:
        super().__init__(location, problem, file)
        self.location = location
        self.problem = problem
        self.file = file

    def __str__(self) -> str:
        where = self.location if self.file is None else f"{self.location}: {self.file}"
        return f"{where}: {self.problem}"


class SaveTimeoutError(SaveError, TimeoutError):
    """Other ranks did not write their parts in time. Nothing was committed.

    Attributes:
        ranks: Those whose parts are missing.
        seconds: How long they were waited for.
    """

    def __init__(self, location: str, ranks: Iterable[int], seconds: float) -> None:
        self.ranks = tuple(ranks)
        named = ", ".join(map(str, self.ranks[:_RANKS_NAMED]))
        more = len(self.ranks) - _RANKS_NAMED
        also = f" and {more} more" if more > 0 else ""
        problem = (
            f"rank{'s' * (len(self.ranks) != 1)} {named}{also} did not write their parts within "
            f"{seconds:g} seconds, so nothing was committed; do they save to the same folder, "
            "with the same shard_num and the same save_id?"
        )
        super().__init__(location, problem)
        self.args = (location, self.ranks, seconds)
        self.errno, self.strerror = errno.ETIMEDOUT, "timed out"
        self.seconds = seconds
