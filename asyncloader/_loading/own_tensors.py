"""Reads whole checkpoints of dense tensors, without being told what is in them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from asyncloader._arguments import check_timeout, checked_path, checked_switch
from asyncloader._threads.blocking import run_blocking

from .contents import Contents
from .reading import read_stored
from .resources import CHUNK_BYTES, INFLIGHT_BYTES, PARALLEL, Limits
from .session import STALL_TIMEOUT, Access, checked_verify, open_session

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    from torch import Tensor

    from asyncloader._checkpoint.catalog import Verify


async def aload_tensors(
    checkpoint_path: str | os.PathLike[str],
    names: Iterable[str] | None = None,
    *,
    parallel: int = PARALLEL,
    verify: Verify = "auto",
    direct_io: bool = False,
    follow_symlinks: bool = False,
    stall_timeout: float | None = STALL_TIMEOUT,
) -> dict[str, Tensor]:
    """Read tensors into memory of their own, on the caller's event loop.

    Args:
        checkpoint_path: A folder that holds `index`; a safetensors file; or a folder of these, as
            Hugging Face's are.
        names: What to read, and in which order to return it; a slot of a table is `table@slot`,
            its ids are `table@id`. Without names, all dense tensors, in the checkpoint's order.
        parallel: Reads at a time, as far as memory for reads under way, 128 MiB, has room for them.
        verify: Whether they are compared with the digests that `Saver` wrote along: `"auto"`,
            where there are some; `"require"`, always, and a checkpoint without is an error;
            `"off"`.
        direct_io: Whether files are read past the page cache; see `Loader`.
        follow_symlinks: Whether symbolic links may lead out of the folder, as those in the cache of
            Hugging Face do; see `Loader`.
        stall_timeout: Seconds that one read may take; see `Loader`.

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
    limits = Limits(parallel=parallel, chunk_bytes=CHUNK_BYTES, max_inflight_bytes=INFLIGHT_BYTES)
    checked = checked_verify(verify)
    check_timeout(stall_timeout, "stall_timeout")
    access = Access(
        direct_io=checked_switch(direct_io, "direct_io"),
        follow_symlinks=checked_switch(follow_symlinks, "follow_symlinks"),
        stall_timeout=stall_timeout,
    )
    async with open_session(
        path, limits=limits, verify=checked, timeout=None, access=access
    ) as session:
        contents = Contents()
        if wanted is None:
            wanted = tuple((await contents.catalog(session)).tensors)
        return await read_stored(session, await contents.find(session, wanted))


def load_tensors(
    checkpoint_path: str | os.PathLike[str],
    names: Iterable[str] | None = None,
    *,
    parallel: int = PARALLEL,
    verify: Verify = "auto",
    direct_io: bool = False,
    follow_symlinks: bool = False,
    stall_timeout: float | None = STALL_TIMEOUT,
) -> dict[str, Tensor]:
    """Read tensors into memory of their own; see `aload_tensors`."""
    return run_blocking(
        partial(
            aload_tensors,
            checkpoint_path,
            names,
            parallel=parallel,
            verify=verify,
            direct_io=direct_io,
            follow_symlinks=follow_symlinks,
            stall_timeout=stall_timeout,
        )
    )
