"""Compares bytes with the digests that were written with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from asyncloader.checkpoint import DIGEST_CHUNK, chunks_around, digest_of, whole_chunks
from asyncloader.errors import CheckpointError

if TYPE_CHECKING:
    from asyncloader.checkpoint import Block

__all__ = ["Verifier"]


@dataclass(frozen=True, slots=True)
class Verifier:
    """Checks what was read, by whole chunks: of a chunk that was read in part nothing is known."""

    location: str
    """The checkpoint, for messages."""

    widen: bool
    """Whether to read more than is wanted, so that every wanted byte lies in a whole chunk."""

    def window(self, block: Block, begin: int, end: int) -> tuple[int, int]:
        """Return which bytes of a block to read where `[begin, end)` are wanted."""
        if not self.widen or block.digests is None:
            return begin, end
        return chunks_around(begin, end, block.nbytes)

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
        chunks = whole_chunks(begin, begin + view.nbytes, block.nbytes)
        for number in chunks:
            first = number * DIGEST_CHUNK
            last = min(first + DIGEST_CHUNK, block.nbytes)
            found = digest_of(view[first - begin : last - begin])
            if found != block.digests[number]:
                raise self._failed(block, first, last, block.digests[number], found)
        if not chunks:
            return range(begin, begin)
        return range(chunks.start * DIGEST_CHUNK, min(chunks.stop * DIGEST_CHUNK, block.nbytes))

    def _failed(
        self, block: Block, first: int, last: int, wanted: str, found: str
    ) -> CheckpointError:
        problem = (
            f"bytes [{block.offset + first}, {block.offset + last}) are not those that were "
            f"written: their digest should be {wanted}, it is {found}; copy the file again, or "
            "take another checkpoint"
        )
        return CheckpointError(self.location, problem, block.shard, block.key)
