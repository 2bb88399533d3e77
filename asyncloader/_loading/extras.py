"""The plain values beside a checkpoint's tensors, by RecIS's words for them."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from asyncloader._planning.names import IO_WORDS, OPTIMIZER, WORDS
from asyncloader.errors import CheckpointError

if TYPE_CHECKING:
    from .session import Session


_EXTRA = "extra.pt"
_OLD_OPTIMIZER = "dense_optimizer"  # RecIS 1.0.0's name


async def read_words(session: Session, *, rank: int) -> dict[str, Any]:
    """Return the values that a checkpoint has for the words of a model.

    Raises:
        CheckpointError: If a file cannot be read as plain values.
    """
    folder = Path(session.storage.location)
    extra = await session.on_disk(partial(_values, folder, _EXTRA))
    io = await session.on_disk(partial(_values, folder, f"io_state_{rank}.pt"))
    extra.setdefault(OPTIMIZER, extra.pop(_OLD_OPTIMIZER, None))
    if extra[OPTIMIZER] is None:
        del extra[OPTIMIZER]
    found = {word: extra[word] for word in WORDS if word in extra}
    return found | {word: io[word] for word in IO_WORDS if word in io}


def _values(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not os.path.isfile(path):  # noqa: PTH113  # Path's own raises for odd names
        return {}
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(str(folder), f"cannot be read: {error}", name) from error
    if not isinstance(values, dict):
        raise CheckpointError(str(folder), f"is a {type(values).__name__}, not a dict", name)
    return values
