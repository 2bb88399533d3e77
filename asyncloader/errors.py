"""Every exception that this package raises on purpose.

Arguments that make no sense are plain `ValueError` or `TypeError`, raised where they are passed.
"""

from __future__ import annotations

from errno import ENOENT, ETIMEDOUT
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

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
# Set on classes: `OSError` takes arguments of ours for its own facts.
_TIMED_OUT = (ETIMEDOUT, "timed out", None)


def _named(things: Sequence[object], most: int) -> str:
    """Name the first things, and say how many more there are."""
    more = len(things) - most
    return ", ".join(map(str, things[:most])) + (f" and {more} more" if more > 0 else "")


class AsyncLoaderError(Exception):
    """Base of all asyncloader errors.

    Attributes:
        touched: The names of the tensors that the failed load had begun to write to.
    """

    touched: tuple[str, ...] = ()


class CheckpointError(AsyncLoaderError):
    """The checkpoint on disk is unreadable or contradicts itself.

    Attributes:
        location: The checkpoint, as the storage names it.
        problem: What is wrong and, where there is a remedy, what to do about it.
        shard: The file within the checkpoint that is to blame, if it is one file.
        key: The block within that file that is to blame, if it is one block.
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
        # OSError took our arguments for its own facts.
        self.errno, self.strerror, self.filename = ENOENT, problem, location


class CheckpointChangedError(CheckpointError):
    """The checkpoint was replaced or written to while it was read. Read it again."""


class TruncatedShardError(CheckpointError):
    """A shard file ends before a block that it declares.

    Attributes:
        begin: The first byte of the range that cannot be read, from the start of the file.
        end: One past the last byte of the range.
        size: The length of the file in bytes.
    """

    def __init__(
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
        problems: All that is wrong, a line for each problem.
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
        offset: The first byte of the range, from the start of the file.
        length: The number of bytes in the range.
        problem: The storage's message.
        location: The checkpoint, as the storage names it.
        names: The tensors and tables that the bytes are for.
    """

    location: str = ""
    names: tuple[str, ...] = ()

    def __init__(self, shard: str, offset: int, length: int, problem: str) -> None:
        super().__init__()
        self.args = (shard, offset, length, problem)
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

    The thread that asked cannot be interrupted. If it gets an answer later, it writes the bytes to
    memory that is not used any more, or to dense tensors, which `touched` names. Such a tensor
    cannot be loaded into before that: take a new one.
    """

    errno, strerror, filename = _TIMED_OUT


class LoadTimeoutError(AsyncLoaderError, TimeoutError):
    """The load took longer than its `timeout`. Tables are as they were.

    Attributes:
        location: The checkpoint, as the storage names it.
        seconds: The time that was allowed.
        under_way: The files and byte ranges in flight at that time, the oldest first.
    """

    errno, strerror, filename = _TIMED_OUT

    def __init__(self, location: str, seconds: float, under_way: Iterable[str] = ()) -> None:
        super().__init__()
        self.under_way = tuple(under_way)
        self.args = (location, seconds, self.under_way)
        self.location = location
        self.seconds = seconds

    def __str__(self) -> str:
        named = _named(self.under_way, _READS_NAMED)
        reading = f"; reading then: {named}" if named else ""
        return f"{self.location}: not loaded within {self.seconds:g} seconds{reading}"


class SaveError(AsyncLoaderError):
    """A checkpoint could not be saved. An `OSError`, if there was one, is the `__cause__`.

    Attributes:
        location: The folder that was to become the checkpoint.
        problem: What is wrong and, where there is a remedy, what to do about it.
        file: The file within the folder that is to blame, if it is one file.
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
        ranks: The ranks whose parts are missing.
        seconds: How long the save waited for them.
    """

    errno, strerror, filename = _TIMED_OUT

    def __init__(self, location: str, ranks: Iterable[int], seconds: float) -> None:
        self.ranks = tuple(ranks)
        named = _named(self.ranks, _RANKS_NAMED)
        owner = "their parts" if len(self.ranks) != 1 else "its part"
        problem = (
            f"rank{'s' * (len(self.ranks) != 1)} {named} did not write {owner} within "
            f"{seconds:g} seconds, so nothing was committed; do they save to the same folder, "
            "with the same shard_num and the same save_id?"
        )
        super().__init__(location, problem)
        self.args = (location, self.ranks, seconds)
        self.seconds = seconds
