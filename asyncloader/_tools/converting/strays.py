"""Finds ids outside the slices that their blocks claim, which no load takes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from asyncloader._planning.load_info import ID
from asyncloader._tools.windows import in_windows
from asyncloader.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from asyncloader._checkpoint.slices import Slice
    from asyncloader._loading.session import Session

    from .source import Source


async def refuse_strays(session: Session, source: Source) -> None:
    """Read all ids of a checkpoint that is to become one plain file, where nobody claims any.

    There they would be as good as the others.

    Raises:
        CheckpointError: If a table has some.
        ReadError: If the storage failed.
    """
    for table in source.tables:
        parts = source.manifest.catalog.tables[table.name][ID]
        strays = 0
        for part in parts:
            block = source.manifest.block(part.place)
            stored = replace(table.ids, shape=block.shape, blocks=(block,))
            count = partial(_strays, part.slice)
            strays += sum(await in_windows(session, stored, count, advance=lambda _: None))
        if strays:
            problem = (
                f"table {table.name!r} has {strays:,} ids outside the slices that their blocks "
                "claim, which no load takes; convert it to a folder first, which leaves them out"
            )
            raise CheckpointError(session.location, problem)


def _strays(claimed: Slice, ids: Tensor) -> int:
    if claimed.is_whole:
        return 0
    return int(np.count_nonzero(claimed.strays(ids.numpy())))
