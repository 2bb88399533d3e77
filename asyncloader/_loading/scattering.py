"""Writes chosen rows of a block to places of a table, which may lie anywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from .buffers import torch_dtype
from .filling import Filling

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from asyncloader._checkpoint.blocks import Block
    from asyncloader._table.protocol import PlacingUpdate

    from .filling import Step
    from .verifier import Verifier


class Scattering(Filling):
    """Writes rows by way of staging memory: a read that was given up never reaches the table.

    The copy is cheap, as the bytes are in the cache: 10 ns a row of 128 bytes.

    Args:
        block: All of it is on disk.
        rows: `[n]`, ascending positions in the block.
        places: `[n]`, where the table wants them.
        update: Of that table.
        slot: The table's slot.
        verifier: Compares bytes with digests.
    """

    def __init__(
        self,
        block: Block,
        rows: NDArray[np.int64],
        *,
        places: NDArray[np.int64],
        update: PlacingUpdate,
        slot: str,
        verifier: Verifier,
    ) -> None:
        super().__init__(block, rows, torch.empty(0, device="meta"), verifier)
        self._places, self._update, self._slot = places, update, slot

    def _pick(self, step: Step, source: NDArray[np.uint8], rows: NDArray[np.int64]) -> None:
        row = np.dtype((np.void, self._row_bytes))
        is_dense = len(source) == len(rows) * self._row_bytes
        picked = source if is_dense else np.take(source.view(row), rows).view(np.uint8)
        values = torch.from_numpy(picked).view(torch_dtype(self.block.dtype))
        shaped = values.view(len(rows), *self.block.shape[1:])
        self._update.write(self._slot, self._places[step.low : step.high], shaped)
