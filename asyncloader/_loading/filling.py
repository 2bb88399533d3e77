"""Fills memory with chosen rows of a block: which bytes to read at once, which to take."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from .buffers import plain_bytes, torch_dtype

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from asyncloader._checkpoint.blocks import Block

    from .verifier import Verifier

# Bytes of rows that are picked before they are copied or converted. The budget has not counted
# this memory, so it is little.
_PICKED = 256 << 10


def row_groups(
    rows: NDArray[np.int64],
    *,
    most: int,
    gap: int,
    runs: bool = False,
    windows: NDArray[np.int64] | None = None,
) -> Iterator[tuple[int, int]]:
    """Group ascending positions into spans, one for each read.

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
    """Bytes of a block that are read at once."""

    first: int  # not after `begin`: whole chunks may be read, to be verified
    last: int
    begin: int  # the first wanted byte
    end: int
    low: int  # the number of the first row that is picked out of them
    high: int
    at: int | None  # where in the target's memory they go as they lie; `None` if rows are picked

    @property
    def staged(self) -> int:
        """How much memory it needs besides the target."""
        direct = self.at is not None and (self.first, self.last) == (self.begin, self.end)
        return 0 if direct else self.last - self.first


@dataclass(slots=True)
class Batch:
    """Steps that a thread carries out without an interruption; bytes are counted."""

    steps: list[Step]
    wanted: int = 0
    is_last: bool = False
    verified: int = 0  # of the wanted bytes

    @property
    def read(self) -> int:
        return sum(step.last - step.first for step in self.steps)

    def room(self, usual: int) -> int:
        """Return how much memory the steps need besides the target, one after the other."""
        most = max((step.staged for step in self.steps), default=0)
        return max(most, usual) if most else 0  # buffers of the usual size are used again


class Filling:
    """Fills memory with chosen rows of a block.

    Args:
        block: All of it is on disk.
        rows: `[n]`, ascending positions in the block.
        target: `[n, *shape]`.
        verifier: Compares bytes with digests.
    """

    def __init__(
        self,
        block: Block,
        rows: NDArray[np.int64] | range,
        target: torch.Tensor,
        verifier: Verifier,
    ) -> None:
        self.block = block
        # The target's, if the file's bytes can go there as they lie.
        self.memory = plain_bytes(target) if target.dtype == torch_dtype(block.dtype) else None
        self._rows = rows
        self._target = target
        self._row_bytes = block.nbytes // block.rows
        self._verifier = verifier

    def batches(self, *, step: int, gap: int, most: int) -> Iterator[Batch]:
        """Put steps of about `most` bytes together: a thread carries out a batch in one go."""
        batch, nbytes = Batch([]), 0
        for one in self.steps(most=step, gap=gap):
            length = one.end - one.begin
            if batch.steps and nbytes + length > most:
                yield batch
                batch, nbytes = Batch([]), 0
            batch.steps.append(one)
            batch.wanted += (one.high - one.low) * self._row_bytes if one.at is None else length
            nbytes += length
        batch.is_last = True
        yield batch

    def steps(self, *, most: int, gap: int) -> Iterator[Step]:
        """Cut the bytes into steps of about `most`; read gaps of up to `gap` along."""
        wide, rows = self._row_bytes, self._rows
        groups: Iterable[tuple[int, int]] = [(0, len(rows))]
        if self.memory is None or int(rows[-1]) - int(rows[0]) >= len(rows):
            rows = np.asarray(rows)
            groups = row_groups(
                rows,
                most=max(most // wide, 1),
                gap=gap // wide,
                runs=self.memory is not None,
                windows=self._verifier.windows(self.block, rows * wide, most),
            )
        for low, high in groups:
            begin, end = int(rows[low]) * wide, (int(rows[high - 1]) + 1) * wide
            if self.memory is None or end - begin > (high - low) * wide:
                yield self._step(begin, end, low, high, None)
                continue
            step = max(most, wide)
            cuts = [begin, *range((begin // step + 1) * step, end, step), end]
            for one, other in itertools.pairwise(cuts):
                yield self._step(one, other, low, high, low * wide + one - begin)

    def view(self, step: Step, buffer: torch.Tensor) -> memoryview:
        if self.memory is not None and step.at is not None and not step.staged:
            return self.memory[step.at : step.at + step.end - step.begin]
        return buffer[: step.last - step.first].numpy().data

    def take(self, step: Step, view: memoryview) -> int:
        """Compare a step's bytes with digests, and take the wanted ones; belongs on a thread.

        Returns how many of the wanted bytes were verified.
        """
        checked = self._verifier.check(self.block, step.first, view)
        inner = np.frombuffer(view, np.uint8)[step.begin - step.first : step.end - step.first]
        if step.at is None:
            wide, rows = self._row_bytes, np.asarray(self._rows[step.low : step.high])
            self._pick(step, inner, rows - rows[0])
            first = -(-checked.start // wide)  # the first row that was checked whole
            low, high = np.searchsorted(rows, [first, max(checked.stop // wide, first)])
            return wide * int(high - low)
        if self.memory is not None and step.staged:
            np.frombuffer(self.memory, np.uint8)[step.at :][: len(inner)] = inner
        return max(min(checked.stop, step.end) - max(checked.start, step.begin), 0)

    def _step(self, begin: int, end: int, low: int, high: int, at: int | None) -> Step:
        first, last = self._verifier.window(self.block, begin, end)
        return Step(first, last, begin, end, low, high, at)

    def _pick(self, step: Step, source: NDArray[np.uint8], rows: NDArray[np.int64]) -> None:
        """Copy chosen rows. Not by torch: it would start threads for that on every thread."""
        row = np.dtype((np.void, self._row_bytes))
        if self.memory is not None:
            out = np.frombuffer(self.memory, row)[step.low : step.high]
            np.take(source.view(row), rows, out=out, mode="clip")
            return
        dtype = torch_dtype(self.block.dtype)
        many = max(_PICKED // self._row_bytes, 1)
        with torch.inference_mode(self._target.is_inference()):
            for low in range(0, len(rows), many):
                some = rows[low : low + many]
                picked = torch.from_numpy(np.take(source.view(row), some).view(np.uint8))
                target = self._target[step.low + low :][: len(some)]
                target.copy_(picked.view(dtype).view(target.shape))
