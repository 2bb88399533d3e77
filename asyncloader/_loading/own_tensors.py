"""Reads whole checkpoints of dense tensors, without being told what is in them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Unpack

from asyncloader._arguments import checked_path
from asyncloader._threads.blocking import run_blocking
from asyncloader.options import ReadOptions

from .contents import Contents
from .reading import read_stored
from .session import open_session

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    from torch import Tensor

    from asyncloader.options import ReadKeywords


async def aload_tensors(
    checkpoint_path: str | os.PathLike[str],
    names: Iterable[str] | None = None,
    *,
    options: ReadOptions | None = None,
    **read: Unpack[ReadKeywords],
) -> dict[str, Tensor]:
    """Read tensors into memory of their own, on the caller's event loop.

    Args:
        checkpoint_path: A folder that holds `index`; a safetensors file; or a folder of these, as
            Hugging Face's are.
        names: What to read, and in which order to return it; a slot of a table is `table@slot`,
            its ids are `table@id`. Without names, all dense tensors, in the checkpoint's order.
        options: How to read.
        **read: Fields of `ReadOptions`, which go before `options`.

    Returns:
        The tensors by name.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument makes no sense.
        KeyError: If there are no such names; it lists all of them.
        CheckpointError: If the checkpoint is missing, unreadable, or contradicts itself.
        ReadError: If the storage failed.
    """
    path = checked_path(checkpoint_path, "checkpoint_path")
    if isinstance(names, str):
        raise TypeError(f"names are several, got one text; write [{names!r}]")
    wanted = None if names is None else tuple(names)
    async with open_session(path, ReadOptions.of(options, read)) as session:
        contents = Contents()
        if wanted is None:
            wanted = tuple((await contents.catalog(session)).tensors)
        return await read_stored(session, await contents.find(session, wanted))


def load_tensors(
    checkpoint_path: str | os.PathLike[str],
    names: Iterable[str] | None = None,
    *,
    options: ReadOptions | None = None,
    **read: Unpack[ReadKeywords],
) -> dict[str, Tensor]:
    """Read tensors into memory of their own; see `aload_tensors`."""
    return run_blocking(partial(aload_tensors, checkpoint_path, names, options=options, **read))
