"""Rows that lie in blocks of equal size: row `i` is `blocks[i // size][i % size]`."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from .schema import Longs


def put_rows(blocks: Sequence[torch.Tensor], places: Longs, rows: torch.Tensor) -> None:
    """Copy rows in, `[n, *shape]` of the blocks' dtype; of two with one place, the later stays."""
    given = _flat(rows)
    for number, at, which in _by_block(places, len(blocks[0])):
        block = blocks[number]
        if block.is_cpu:  # not by torch: it would start threads for that on every thread
            _as_voids(block)[at] = _as_voids(given)[which]
        else:
            with torch.inference_mode(block.is_inference()):
                some = torch.from_numpy(given.numpy()[which])
                where = torch.from_numpy(at).to(block.device)
                _flat(block).index_copy_(0, where, some.to(block.device))


def take_rows(blocks: Sequence[torch.Tensor], places: Longs, out: torch.Tensor) -> None:
    """Copy rows out, to host memory, uint8 `[n, row_bytes]`."""
    for number, at, which in _by_block(places, len(blocks[0])):
        block = blocks[number]
        if block.is_cpu:
            _as_voids(out)[which] = _as_voids(block)[at]
        else:
            where = torch.from_numpy(at).to(block.device)
            out.numpy()[which] = _flat(block).index_select(0, where).cpu().numpy()


def _by_block(places: Longs, size: int) -> Iterator[tuple[int, Longs, Longs | slice]]:
    """Yield each block's number, rows within it, and which of `places` they are, in their order."""
    number, at = np.divmod(places, size)
    steps = np.diff(number)
    order: Longs | None = None
    if (steps < 0).any():
        order = np.argsort(number, kind="stable")
        number, at = number[order], at[order]
        steps = np.diff(number)
    cuts = [0, *(np.flatnonzero(steps) + 1).tolist(), len(places)]
    for low, high in itertools.pairwise(cuts if len(places) else []):
        which = slice(low, high) if order is None else order[low:high]
        yield int(number[low]), at[low:high], which


def _flat(rows: torch.Tensor) -> torch.Tensor:
    """Return rows as bytes, uint8 `[n, row_bytes]`, of the same memory."""
    return rows.detach().view(len(rows), -1).view(torch.uint8)


def _as_voids(rows: torch.Tensor) -> NDArray[np.void]:
    flat = _flat(rows).numpy()
    voids: NDArray[np.void] = flat.view(np.dtype((np.void, flat.shape[1])))[:, 0]
    return voids
