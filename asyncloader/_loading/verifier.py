"""Compares bytes that were read with the digests that were saved along."""

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
    """Compares whole chunks with their digests; a chunk that was read in part is not verified."""

    location: str  # the checkpoint, for messages
    widen: bool  # whether to read more, so that every wanted byte lies in a whole chunk

    def window(self, block: Block, begin: int, end: int) -> tuple[int, int]:
        """Return the bytes of a block to read where `[begin, end)` are wanted."""
        if not self.widen or block.digests is None:
            return begin, end
        first, last = begin // DIGEST_CHUNK, chunk_count(end)
        return first * DIGEST_CHUNK, min(last * DIGEST_CHUNK, block.nbytes)

    def windows(
        self, block: Block, begins: NDArray[np.int64], chunk_bytes: int
    ) -> NDArray[np.int64] | None:
        """Cut a block into stretches of whole chunks, and return the number of each byte's stretch.

        Reads that keep to one stretch, of about `chunk_bytes`, read as many chunks whole as they
        can, and none twice. Takes and returns int64 `[n]`; `None` where there are no digests.
        """
        if block.digests is None:
            return None
        stretch: NDArray[np.int64] = begins // (max(chunk_bytes // DIGEST_CHUNK, 1) * DIGEST_CHUNK)
        return stretch

    def check(self, block: Block, begin: int, view: memoryview) -> range:
        """Compare the bytes from `begin` on with the block's digests; belongs on a thread.

        Returns the bytes of the block that are verified.

        Raises:
            CheckpointError: If a chunk has another digest.
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
