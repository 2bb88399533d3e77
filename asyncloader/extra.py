"""What RecIS's trainer saves beside a model: its step, its dense optimizer, its place in the data.

Nothing that a file names is called: `torch.load(weights_only=True)` reads plain values alone.
"""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack

from ._arguments import check_count
from ._checkpoint.catalog import read_file
from ._checkpoint.format import EXTRA, IO_COUNT, IO_STATE
from ._loading.banking import checkpoint_of
from ._loading.extras import LIMIT, check_no_pickle, read_values
from ._loading.opening import open_session
from ._storage.looks import Looks
from ._threads.blocking import run_blocking
from .errors import CheckpointError
from .options import ReadOptions

if TYPE_CHECKING:
    from collections.abc import Collection

    from ._loading.session import Session
    from ._ready_stores import Source
    from .options import ReadKeywords

__all__ = ["aread_extra", "aread_io_state", "read_extra", "read_io_state"]

_COUNT_BYTES = 64  # of a file that holds one number
_SHOWN = 20
_RANK = re.compile(r"io_state_(\d{1,9})\.pt", re.ASCII)


async def aread_extra(
    path: Source,
    *,
    limit: int = LIMIT,
    options: ReadOptions | None = None,
    **read: Unpack[ReadKeywords],
) -> dict[str, Any]:
    """Read `extra.pt` of a checkpoint, on the caller's event loop.

    RecIS 1.0.0 saves `global_step`, `dense_optimizer` and `train_window_io`; later releases call
    the optimizer's state `recis.dense.optim.`, and add `train_epoch`.

    Args:
        path: A checkpoint's folder; or a run folder, whose newest finished checkpoint is read.
        limit: Bytes that the file, and what it unpacks to, may have. Reading takes twice its size.
        options: How to read. Where `Saver` wrote the file, its digest is compared.
        **read: Fields of `ReadOptions`, which go before `options`.

    Returns:
        What was saved, by name; tensors are on the CPU.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument makes no sense.
        CheckpointNotFoundError: If there is no finished checkpoint.
        CheckpointError: If the file is missing, damaged, larger than `limit`, or asks for more than
            plain values need; nothing of it was called then.
        ReadError: If the storage failed.
    """
    return await _read(path, EXTRA, limit, ReadOptions.of(options, read))


async def aread_io_state(
    path: Source,
    rank: int = 0,
    *,
    limit: int = LIMIT,
    options: ReadOptions | None = None,
    **read: Unpack[ReadKeywords],
) -> dict[str, Any]:
    """Read how far a rank was in its data, on the caller's event loop: `io_state_<rank>.pt`.

    Args:
        path: A checkpoint's folder; or a run folder, whose newest finished checkpoint is read.
        rank: Whose. As many ranks have to resume as saved.
        limit: Bytes that the file, and what it unpacks to, may have. Reading takes twice its size.
        options: How to read. Where `Saver` wrote the file, its digest is compared.
        **read: Fields of `ReadOptions`, which go before `options`.

    Returns:
        By data set (`train_io`, `eval_io`), the state of each of its workers.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument makes no sense.
        CheckpointNotFoundError: If there is no finished checkpoint.
        CheckpointError: If that rank saved none; or as `aread_extra`.
        ReadError: If the storage failed.
    """
    if type(rank) is not int:
        raise TypeError(f"rank must be an int, got {rank!r}")
    if rank < 0:
        raise ValueError(f"rank must not be negative, got {rank}")
    return await _read(path, IO_STATE.format(rank=rank), limit, ReadOptions.of(options, read))


def read_extra(
    path: Source,
    *,
    limit: int = LIMIT,
    options: ReadOptions | None = None,
    **read: Unpack[ReadKeywords],
) -> dict[str, Any]:
    """Read `extra.pt` of a checkpoint; see `aread_extra`."""
    return run_blocking(partial(aread_extra, path, limit=limit, options=options, **read))


def read_io_state(
    path: Source,
    rank: int = 0,
    *,
    limit: int = LIMIT,
    options: ReadOptions | None = None,
    **read: Unpack[ReadKeywords],
) -> dict[str, Any]:
    """Read how far a rank was in its data; see `aread_io_state`."""
    return run_blocking(partial(aread_io_state, path, rank, limit=limit, options=options, **read))


async def _read(path: Source, file: str, limit: int, options: ReadOptions) -> dict[str, Any]:
    check_count(limit, "limit")
    location, options = options.at(path, "path")
    with Looks(
        location, stall_timeout=options.stall_timeout, storage_options=options.storage_options
    ) as looks:
        location = await checkpoint_of(looks, location)
    async with open_session(location, options) as session:
        if session.file is not None:
            problem = f"is a file: give the folder of a checkpoint, which {file!r} is in"
            raise CheckpointError(location, problem)
        catalog = await session.catalog(whole=False)
        if not await session.has(file):
            names = await session.listed()
            check_no_pickle(location, file, names)
            raise await _missing(session, file, names)
        digests = None if catalog.sidecar is None else catalog.sidecar.files
        return await read_values(session, file, limit=limit, digests=digests)


async def _missing(session: Session, file: str, names: Collection[str]) -> CheckpointError:
    """Return the error of a file that is not there."""
    found = _RANK.fullmatch(file)
    if found is None:
        problem = "is not there: RecIS's trainer writes it if it has something to save in it"
        return CheckpointError(session.location, problem, file)
    text = b""
    if IO_COUNT in names:
        text = bytes(await read_file(session.storage, IO_COUNT, _COUNT_BYTES)).strip()
    ranks = f"{int(text)} rank{'s' * (int(text) != 1)}" if text.isdigit() else ""
    saved = sorted(int(one[1]) for one in map(_RANK.fullmatch, names) if one is not None)
    if not ranks:
        which = ", ".join(map(str, saved[:_SHOWN])) or "none"
        problem = f"is not there: ranks that saved their place in the data: {which}"
    elif int(found[1]) < int(text):
        problem = (
            f"is not there, though {IO_COUNT!r} says that there were {ranks}: copy it, or wait "
            "until that rank has written it"
        )
    else:
        problem = (
            f"is not there: {ranks} saved their place in the data ({IO_COUNT!r}), counted from 0; "
            "resume with as many"
        )
    return CheckpointError(session.location, problem, file)
