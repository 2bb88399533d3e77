"""Reads every byte of every block once, and looks at it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from asyncloader._checkpoint.format import SIDECAR
from asyncloader._checkpoint.sidecar import DIGEST_CHUNK, digest_of
from asyncloader._tools.scanning import scan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asyncloader._checkpoint.blocks import Block
    from asyncloader._checkpoint.problems import AllProblems
    from asyncloader._loading.progress import Meter
    from asyncloader._loading.session import Session


_RANGES = 3
"""Byte ranges that one finding names."""


@dataclass(slots=True)
class Watched:
    """A block, and the problems of its bytes so far."""

    block: Block
    memory: memoryview | None = None
    """Where its bytes are kept; nowhere if `None`."""

    compared: int = 0
    damaged: list[int] = field(default_factory=list)
    """Numbers of the chunks whose digest is another one."""

    no_bools: list[tuple[int, int]] = field(default_factory=list)
    """For each read, the place of the first byte that is neither 0 nor 1, and their number."""

    def look(self, begin: int, view: memoryview) -> None:
        """Look at bytes from `begin` on, whole chunks of them; belongs on a thread."""
        if self.block.digests is not None:
            for start in range(0, view.nbytes, DIGEST_CHUNK):
                number = (begin + start) // DIGEST_CHUNK
                if digest_of(view[start : start + DIGEST_CHUNK]) != self.block.digests[number]:
                    self.damaged.append(number)
                self.compared += 1
        if self.block.dtype.torch == "bool":
            odd = np.flatnonzero(np.frombuffer(view, np.uint8) > 1)
            if len(odd):
                self.no_bools.append((begin + int(odd[0]), len(odd)))

    def tell(self, problems: AllProblems) -> None:
        """Tell all problems."""
        block = self.block
        if self.damaged:
            problems.add(
                f"bytes {self._ranges()} are not those that were written, {SIDECAR} has other "
                "digests; copy the file again, or take another checkpoint",
                block.shard,
                block.key,
            )
        if self.no_bools:
            count = sum(count for _, count in self.no_bools)
            text = f"{count:,} bytes of a bool tensor are neither 0 nor 1, the first at byte "
            text += f"{block.offset + min(self.no_bools)[0]} of the file"
            problems.add(text, block.shard, block.key)

    def _ranges(self) -> str:
        ranges: list[tuple[int, int]] = []
        for number in sorted(self.damaged):
            begin = self.block.offset + number * DIGEST_CHUNK
            end = min(begin + DIGEST_CHUNK, self.block.offset + self.block.nbytes)
            if ranges and ranges[-1][1] == begin:
                begin, _ = ranges.pop()
            ranges.append((begin, end))
        named = ", ".join(f"[{begin}, {end})" for begin, end in ranges[:_RANGES])
        more = len(ranges) - _RANGES
        return named + (f" and {more} more ranges" if more > 0 else "")


@dataclass(slots=True)
class Inspector:
    """Reads blocks of one checkpoint."""

    session: Session
    meter: Meter
    problems: AllProblems
    compared: int = 0
    """Digests."""

    async def inspect(self, watched: Sequence[Watched]) -> bool:
        """Look at all bytes of some blocks; return whether all of them could be read."""
        problems = len(self.problems.found)
        await scan(
            self.session,
            [one.block for one in watched],
            lambda number, begin, view: watched[number].look(begin, view),
            meter=self.meter,
            kept=[one.memory for one in watched],
            failed=self.problems.error,
        )
        complete = len(self.problems.found) == problems
        for one in watched:
            one.tell(self.problems)
            self.compared += one.compared
        return complete
