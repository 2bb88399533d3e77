"""The commands of the command line as functions: look into checkpoints, compare, convert them.

Each tool comes twice: `inspect(path)` for scripts and notebooks, `await ainspect(path)` for the
caller's own event loop. Results are frozen dataclasses.
"""

from __future__ import annotations

import functools
from inspect import signature
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from ._arguments import check_names, check_progress, checked_source, checked_target
from ._loading.progress import listening
from .options import ReadOptions

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Collection, Coroutine

    from torch import Tensor

    from ._loading.progress import Progress
    from ._ready_stores import Source
    from ._table.hashtable import HashTable
    from ._tools.converting import Conversion
    from ._tools.difference import Difference
    from ._tools.inspecting import CheckpointSummary
    from ._tools.run_summary import RunSummary
    from ._tools.verifying import Verification

__all__ = [
    "aconvert",
    "adiff",
    "aempty_like",
    "ainspect",
    "averify",
    "convert",
    "diff",
    "empty_like",
    "inspect",
    "verify",
]

P = ParamSpec("P")
T = TypeVar("T")


def _blocking(call: Callable[P, Coroutine[object, object, T]]) -> Callable[P, T]:
    """Return the twin of a coroutine function that blocks until the result is there."""

    @functools.wraps(call)
    def run(*args: P.args, **keywords: P.kwargs) -> T:
        from ._threads.blocking import run_blocking

        try:
            signature(call).bind(*args, **keywords)
        except TypeError as error:  # Python's own would name the twin
            raise TypeError(f"{run.__name__}(): {error}") from None
        return run_blocking(functools.partial(call, *args, **keywords))

    run.__name__ = run.__qualname__ = call.__name__.removeprefix("a")
    return run


async def ainspect(
    path: Source, *, options: ReadOptions | None = None
) -> CheckpointSummary | RunSummary:
    """Say what a checkpoint holds. Reads its names and headers alone.

    Args:
        path: A folder that RecIS or `Saver` wrote, a safetensors file, or a folder of these as
            Hugging Face's are; or a run folder, in which a trainer keeps its checkpoints.
        options: How to read.

    Returns:
        Tables, tensors, their sizes, whether bytes can be verified, and oddities. Of a run
        folder, the versions in it.

    Raises:
        CheckpointError: If there is no committed checkpoint, or it is unreadable.
        ReadError: If the storage failed.
    """
    from ._tools.inspecting import look_into

    return await look_into(*ReadOptions.of(options, {}).at(path, "path"))


async def averify(
    path: Source,
    *,
    progress: Callable[[Progress], object] | bool | None = None,
    options: ReadOptions | None = None,
) -> Verification:
    """Look at every byte of a checkpoint, and list all problems.

    Checks every rule of the format; whether all parts of each table are there and fit together, and
    each id comes once and lies in its slice; and, if `Saver` saved digests, whether every byte is
    still the one that was written. Takes 8 bytes of memory for each id of the largest table.

    Args:
        path: As `inspect` takes it, but no run folder.
        progress: Called with a `Progress`, at most ten times a second; `True` shows a bar.
        options: How to read. Digests are always compared, even if `verify` is off.

    Returns:
        All problems and notes, and how much was read; `ok` says whether there is no problem.

    Raises:
        CheckpointNotFoundError: If there is no checkpoint.
        CheckpointError: If the folder cannot be listed, or the file is no safetensors file.
        ReadError: If the storage gave no answer.
        MemoryError: If the ids of a table do not fit into memory.
    """
    from ._tools.verifying import averify as run

    check_progress(progress)
    location, how = ReadOptions.of(options, {}).at(path, "path")
    with listening(progress, "verifying") as listener:
        return await run(location, progress=listener, options=how)


async def adiff(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    budget: int = 1 << 30,
    progress: Callable[[Progress], object] | bool | None = None,
    options: ReadOptions | None = None,
) -> Difference:
    """Say how two checkpoints differ, also if other ranks wrote them, or in another order.

    Lists names, shapes and dtypes that only one of them has; ids gained and lost; and, for each
    slot and tensor, how many rows or elements differ, and the largest change. Equal means equal to
    the last bit, but two NaN are the same.

    Args:
        a: As `inspect` takes it, but no run folder.
        b: The checkpoint to compare it with.
        budget: Memory for the rows and elements of both that are compared at a time, in bytes.
        progress: Called with a `Progress`, at most ten times a second; `True` shows a bar.
        options: How to read.

    Returns:
        The difference; `equal` says whether there is none.

    Raises:
        CheckpointError: If one of them is missing, unreadable, or contradicts itself.
        PlanError: If one of them does not fit together.
        ReadError: If the storage failed.
    """
    from ._tools.diffing import adiff as run

    check_progress(progress)
    paths = checked_source(a, "a"), checked_source(b, "b")
    how = ReadOptions.of(options, {})
    with listening(progress, "comparing") as listener:
        return await run(*paths, budget=budget, progress=listener, options=how)


async def aconvert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    shards: int | None = None,
    slots: Collection[str] | None = None,
    tables: Collection[str] | None = None,
    parallel: int = 8,
    overwrite: bool = False,
    progress: Callable[[Progress], object] | bool | None = None,
    options: ReadOptions | None = None,
) -> Conversion:
    """Turn a checkpoint into another form of itself: one plain file, a folder, other ranks.

    A destination that ends in `.safetensors` becomes one plain file, in little memory; any other
    becomes a folder in RecIS's format, for which one rank's part has to fit into memory.

    Args:
        source: As `inspect` takes it, but no run folder.
        destination: The file or folder to write. An old one stays as it is until all is written.
        shards: Write a folder as so many ranks would; `None` takes as many as wrote the source.
        slots: Keep only these slots of tables, and the ids; `None` keeps all.
        tables: Names in plain files to take for tables. `None` takes those that look like a table
            and have each id once.
        parallel: Shard files of each rank, and writes at a time.
        overwrite: Whether to replace an old file or folder.
        progress: Called with a `Progress`, at most ten times a second; `True` shows a bar.
        options: How to read.

    Returns:
        The files that were written, and the rows that were left out.

    Raises:
        CheckpointError: If the source is missing, unreadable, or contradicts itself.
        PlanError: If it does not fit together.
        ReadError: If the storage failed.
        SaveError: If the destination must not be written, or could not be; or a file was written,
            but may not outlive a power loss.
        ValueError: If two tensors would have the same name there, or one has a name that no tensor
            can have; or an argument makes no sense.
        MemoryError: If there is no room.
    """
    from ._tools.converting import aconvert as run

    check_progress(progress)
    check_names(slots, "slots")
    check_names(tables, "tables")
    paths = checked_source(source, "source"), checked_target(destination, "destination")
    how = ReadOptions.of(options, {})
    with listening(progress, "converting") as listener:
        return await run(
            *paths,
            shards=shards,
            slots=slots,
            tables=tables,
            parallel=parallel,
            overwrite=overwrite,
            progress=listener,
            options=how,
        )


async def aempty_like(
    path: Source, *, options: ReadOptions | None = None
) -> tuple[dict[str, HashTable], dict[str, Tensor]]:
    """Make empty tables, and tensors of zeros, for all that a checkpoint holds.

    Memory is taken when it is first written to. To load everything:

    ```python
    tables, tensors = empty_like(path)
    Loader(path, tables, tensors).load()
    ```

    Args:
        path: As `inspect` takes it, but no run folder.
        options: How to read.

    Returns:
        Tables and tensors by name, of the dtypes and shapes that are stored. Tensors of dtypes that
        this version of torch lacks are left out.

    Raises:
        CheckpointError: If the checkpoint is missing, unreadable, or contradicts itself; if a table
            has no embeddings or no ids; if torch does not have the dtype of one of its slots.
        ReadError: If the storage failed.
        MemoryError: If there is no room.
    """
    from ._tools.allocation import allocate

    made = await allocate(*ReadOptions.of(options, {}).at(path, "path"))
    return made.tables, made.tensors


inspect = _blocking(ainspect)
verify = _blocking(averify)
diff = _blocking(adiff)
convert = _blocking(aconvert)
empty_like = _blocking(aempty_like)
