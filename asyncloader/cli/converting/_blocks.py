"""The bytes of what is stored, read by position on whatever thread asks for them."""

from __future__ import annotations

import itertools
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from asyncloader.checkpoint import DIGEST_CHUNK
from asyncloader.errors import ReadError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from asyncloader.checkpoint import Block
    from asyncloader.checkpoint.stored import Stored
    from asyncloader.streaming import Arena, Verifier

__all__ = ["BlockFiles", "StoredSource"]

# An arena aligns every piece of memory that it lends.
_ALIGNMENT = 16


class BlockFiles:
    """The files of a checkpoint's folder. Safe to use from several threads.

    A file is opened for every read, which takes microseconds beside megabytes: nothing stays open,
    and no two threads share a position. One that is replaced meanwhile is an error.

    Args:
        root: The folder.
    """

    def __init__(self, root: str) -> None:
        self._root = Path(root)
        self._seen: dict[str, tuple[int, ...]] = {}
        self._lock = threading.Lock()
        self.bytes_verified = 0

    def read(self, shard: str, offset: int, view: memoryview) -> None:
        """Fill a view.

        Raises:
            ReadError: If that failed.
        """
        try:
            problem = self._read(shard, offset, view)
        except OSError as error:
            raise ReadError(shard, offset, view.nbytes, str(error)) from error
        if problem is not None:
            raise ReadError(shard, offset, view.nbytes, problem)

    def _read(self, shard: str, offset: int, view: memoryview) -> str | None:
        with (self._root / shard).open("rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            if self._seen.setdefault(shard, identity) != identity:
                return "the file was replaced meanwhile"
            file.seek(offset)
            done = 0
            while done < view.nbytes:
                count = file.readinto(view[done:])
                if not count:
                    return f"the file ends {view.nbytes - done} bytes early"
                done += count
        return None

    def count_verified(self, nbytes: int) -> None:
        """Take note that so many bytes were verified."""
        with self._lock:
            self.bytes_verified += nbytes


class StoredSource:
    """What is stored under one name, all blocks one after the other: a `ByteSource`.

    Where there are digests every byte is verified. A write may begin or end within a chunk that has
    a digest; such a chunk is read whole, by both writes that it belongs to.

    Args:
        stored: It.
        files: What holds the blocks.
        verifier: Compares digests.
    """

    def __init__(self, stored: Stored, files: BlockFiles, verifier: Verifier) -> None:
        self._blocks = stored.blocks
        self._ends = list(itertools.accumulate(block.nbytes for block in stored.blocks))
        self._files = files
        self._verifier = verifier
        self._chunk = 0
        if len(stored.blocks) > 1:  # one alone is cut where chunks end
            sizes = [block.nbytes for block in stored.blocks if block.digests is not None]
            self._chunk = min(max(sizes, default=0), DIGEST_CHUNK)
        self.slack = self._chunk + _ALIGNMENT if self._chunk else 0

    def read(self, begin: int, end: int, arena: Arena, /) -> memoryview:
        """Read, and verify."""
        out = arena.take(end - begin).numpy().data
        spare = arena.take(self._chunk).numpy().data if self._chunk else memoryview(b"")
        for block, first, last, position in self._pieces(begin, end):
            self._fill(block, first, last, out[position : position + last - first], spare)
        return out

    def done(self) -> None:
        """Nothing is kept."""

    def _pieces(self, begin: int, end: int) -> Iterator[tuple[Block, int, int, int]]:
        """Yield blocks, first and last byte within them, and where these go."""
        for block, stop in zip(self._blocks, self._ends, strict=True):
            start = stop - block.nbytes
            first, last = max(begin, start), min(end, stop)
            if first < last:
                yield block, first - start, last - start, first - begin

    def _fill(
        self, block: Block, first: int, last: int, out: memoryview, spare: memoryview
    ) -> None:
        if block.digests is None:
            self._files.read(block.shard, block.offset + first, out)
            return
        for chunk in range(first - first % DIGEST_CHUNK, last, DIGEST_CHUNK):
            stop = min(chunk + DIGEST_CHUNK, block.nbytes)
            low, high = max(chunk, first), min(stop, last)
            whole = (low, high) == (chunk, stop)
            view = out[low - first : high - first] if whole else spare[: stop - chunk]
            self._files.read(block.shard, block.offset + chunk, view)
            self._verifier.check(block, chunk, view)
            if not whole:
                out[low - first : high - first] = view[low - chunk : high - chunk]
            self._files.count_verified(high - low)
