"""Fills memory with chosen rows of a block: what to read at once, and what becomes of it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from .tensors import plain_bytes, torch_dtype

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from asyncloader._checkpoint.blocks import Block

    from .verification import Verifier

# Bytes of rows that are picked before they are copied or converted: more would be memory that
# the budget has not counted.
_PICKED = 256 << 10


def row_groups(
    rows: NDArray[np.int64],
    *,
    most: int,
    gap: int,
    runs: bool = False,
    windows: NDArray[np.int64] | None = None,
) -> Iterator[tuple[int, int]]:
    """Group ascending positions into spans worth one read.

    Args:
        rows: int64 `[n]`, ascending.
        most: The most rows that a span covers.
        gap: The most unwanted rows between two neighbours of a span.
        runs: Whether a span without any unwanted row may be longer.
        windows: int64 `[n]`, ascending; only rows with the same number are read at once, but for
            such long spans.

    Yields:
        `(i, j)`: `rows[i:j]` are read at once.
    """
    breaks = np.flatnonzero(np.diff(rows) > gap + 1) + 1
    for low, high in zip([0, *breaks.tolist()], [*breaks.tolist(), len(rows)], strict=True):
        if runs and rows[high - 1] - rows[low] == high - 1 - low:
            yield low, high
            continue
        i = low
        while i < high:
            j = min(int(np.searchsorted(rows, rows[i] + most)), high)
            if windows is not None:
                j = min(int(np.searchsorted(windows, windows[i], side="right")), j)
            yield i, j
            i = j


class Step(NamedTuple):
    """Bytes that are read at once."""

    begin: int
    """First wanted byte of the block."""

    end: int

    low: int
    """Number of the first of the rows that are picked out of them."""

    high: int

    at: int | None
    """Where in the target's memory they go as they lie, or `None` if rows are picked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Filling:
    """Fills memory with chosen rows of a block."""

    block: Block
    rows: NDArray[np.int64] | range
    """`[n]`, ascending positions in the block."""

    target: torch.Tensor
    """`[n, *shape]`."""

    memory: memoryview | None
    """The target's, if the file's bytes can go there as they lie."""

    row_bytes: int
    verifier: Verifier

    @classmethod
    def of(
        cls,
        block: Block,
        rows: NDArray[np.int64] | range,
        target: torch.Tensor,
        verifier: Verifier,
    ) -> Filling:
        """Return the way to fill `target`."""
        return cls(
            block=block,
            rows=rows,
            target=target,
            memory=plain_bytes(target) if target.dtype == torch_dtype(block.dtype) else None,
            row_bytes=block.nbytes // block.rows,
            verifier=verifier,
        )

    def steps(self, *, most: int, gap: int) -> Iterator[Step]:
        """Cut the bytes into steps of about `most`; read gaps of up to `gap` along."""
        wide, rows = self.row_bytes, self.rows
        groups: Iterable[tuple[int, int]] = [(0, len(rows))]
        if self.memory is None or int(rows[-1]) - int(rows[0]) >= len(rows):
            rows = np.asarray(rows)
            groups = row_groups(
                rows,
                most=max(most // wide, 1),
                gap=gap // wide,
                runs=self.memory is not None,
                windows=self.verifier.windows(self.block, rows * wide, most),
            )
        for low, high in groups:
            begin, end = int(rows[low]) * wide, (int(rows[high - 1]) + 1) * wide
            if self.memory is None or end - begin > (high - low) * wide:
                yield Step(begin, end, low, high, None)
                continue
            step = max(most, wide)
            cuts = [begin, *range((begin // step + 1) * step, end, step), end]
            for one, other in itertools.pairwise(cuts):
                yield Step(one, other, low, high, low * wide + one - begin)

    def window(self, step: Step) -> tuple[int, int]:
        """Return which bytes of the block to read."""
        return self.verifier.window(self.block, step.begin, step.end)

    def staged(self, step: Step) -> int:
        """Return how much memory a step needs besides the target."""
        first, last = self.window(step)
        direct = step.at is not None and (first, last) == (step.begin, step.end)
        return 0 if direct else last - first

    def room(self, steps: Iterable[Step], usual: int) -> int:
        """Return how much memory steps need besides the target, one after the other."""
        most = max(map(self.staged, steps), default=0)
        return max(most, usual) if most else 0  # buffers of the usual size are used again

    def done(self, steps: Iterable[Step], verified: int, *, last: bool) -> Done:
        """Count what was done."""
        read = wanted = 0
        for step in steps:
            first, end = self.window(step)
            read += end - first
            whole = step.at is not None
            wanted += step.end - step.begin if whole else (step.high - step.low) * self.row_bytes
        return Done(read, wanted, verified, last)

    def view(self, step: Step, buffer: torch.Tensor) -> memoryview:
        """Return the memory to read to."""
        if self.memory is not None and step.at is not None and not self.staged(step):
            return self.memory[step.at : step.at + step.end - step.begin]
        first, last = self.window(step)
        return buffer[: last - first].numpy().data

    def take(self, step: Step, view: memoryview) -> int:
        """Compare what was read with its digests, and take what is wanted; belongs on a thread.

        Returns:
            How many wanted bytes were found to be what was written.
        """
        first, _ = self.window(step)
        checked = self.verifier.check(self.block, first, view)
        inner = np.frombuffer(view, np.uint8)[step.begin - first : step.end - first]
        if step.at is None:
            self._pick(step, inner)
            rows = np.asarray(self.rows[step.low : step.high])
            return self.row_bytes * rows_within(rows, checked, self.row_bytes)
        if self.memory is not None and self.staged(step):
            np.frombuffer(self.memory, np.uint8)[step.at :][: len(inner)] = inner
        return max(min(checked.stop, step.end) - max(checked.start, step.begin), 0)

    def _pick(self, step: Step, source: NDArray[np.uint8]) -> None:
        """Copy chosen rows. Not by torch: it would start threads for that on every thread."""
        row = np.dtype((np.void, self.row_bytes))
        rows = np.asarray(self.rows[step.low : step.high]) - self.rows[step.low]
        if self.memory is not None:
            out = np.frombuffer(self.memory, row)[step.low : step.high]
            np.take(source.view(row), rows, out=out, mode="clip")
            return
        dtype = torch_dtype(self.block.dtype)
        many = max(_PICKED // self.row_bytes, 1)
        with torch.inference_mode(self.target.is_inference()):
            for low in range(0, len(rows), many):
                some = rows[low : low + many]
                picked = torch.from_numpy(np.take(source.view(row), some).view(np.uint8))
                target = self.target[step.low + low :][: len(some)]
                target.copy_(picked.view(dtype).view(target.shape))


class Done(NamedTuple):
    """What became of a batch, in bytes."""

    read: int
    wanted: int
    verified: int
    last: bool


def batches_of(steps: Iterable[Step], most: int) -> Iterator[tuple[list[Step], bool]]:
    """Put steps of about `most` bytes together: for so long a thread cannot be interrupted.

    Yields:
        Some steps, and whether they are the last.
    """
    batch: list[Step] = []
    nbytes = 0
    for step in steps:
        if batch and nbytes + step.end - step.begin > most:
            yield batch, False
            batch, nbytes = [], 0
        batch.append(step)
        nbytes += step.end - step.begin
    yield batch, True


def rows_within(rows: NDArray[np.int64], checked: range, row_bytes: int) -> int:
    """Count the rows whose bytes all lie within a range.

    Args:
        rows: int64 `[n]`, ascending; positions in the block.
        checked: Bytes of the block.
        row_bytes: Bytes a row.
    """
    first = -(-checked.start // row_bytes)
    last = checked.stop // row_bytes
    low, high = np.searchsorted(rows, [first, max(last, first)])
    return int(high - low)
