"""Compares bytes with the digests that were written with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from asyncloader._checkpoint.sidecar import DIGEST_CHUNK, chunk_count, digest_of
from asyncloader.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from asyncloader._checkpoint.blocks import Block


@dataclass(frozen=True, slots=True)
class Verifier:
    """Checks what was read, by whole chunks: of a chunk that was read in part nothing is known.

    Attributes:
        location: The checkpoint, for messages.
        widen: Whether to read more than is wanted, so that every wanted byte lies in a whole chunk.
    """

    location: str
    widen: bool

    def window(self, block: Block, begin: int, end: int) -> tuple[int, int]:
        """Return which bytes of a block to read where `[begin, end)` are wanted."""
        if not self.widen or block.digests is None:
            return begin, end
        first, last = begin // DIGEST_CHUNK, chunk_count(end)
        return first * DIGEST_CHUNK, min(last * DIGEST_CHUNK, block.nbytes)

    def windows(
        self, block: Block, begins: NDArray[np.int64], chunk_bytes: int
    ) -> NDArray[np.int64] | None:
        """Return a number for the stretch of whole chunks that each of some bytes lies in.

        Reads that keep to one stretch read as many chunks whole as they can, and none twice.

        Args:
            block: The whole of it.
            begins: int64 `[n]`, ascending.
            chunk_bytes: About how long a stretch is.

        Returns:
            int64 `[n]`, a number each; `None` where there are no digests.
        """
        if block.digests is None:
            return None
        stretch: NDArray[np.int64] = begins // (max(chunk_bytes // DIGEST_CHUNK, 1) * DIGEST_CHUNK)
        return stretch

    def check(self, block: Block, begin: int, view: memoryview) -> range:
        """Check bytes of a block; belongs on a thread.

        Args:
            block: The whole of it.
            begin: First byte within the block.
            view: The bytes.

        Returns:
            Which bytes of the block were found to be what was written.

        Raises:
            CheckpointError: If some are not.
        """
        if block.digests is None:
            return range(begin, begin)
        end = begin + view.nbytes
        last = chunk_count(block.nbytes) if end >= block.nbytes else end // DIGEST_CHUNK
        chunks = range(chunk_count(begin), last)
        for number in chunks:
            first = number * DIGEST_CHUNK
            last = min(first + DIGEST_CHUNK, block.nbytes)
            found = digest_of(view[first - begin : last - begin])
            if found != block.digests[number]:
                problem = (
                    f"bytes [{block.offset + first}, {block.offset + last}) are not those that "
                    f"were written: their digest should be {block.digests[number]}, it is {found}; "
                    "copy the file again, or take another checkpoint"
                )
                raise CheckpointError(self.location, problem, block.shard, block.key)
        if not chunks:
            return range(begin, begin)
        return range(chunks.start * DIGEST_CHUNK, min(chunks.stop * DIGEST_CHUNK, block.nbytes))
