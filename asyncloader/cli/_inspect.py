"""`asyncloader inspect`."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from asyncloader._loading.session import open_session
from asyncloader._threads.blocking import run_blocking
from asyncloader._threads.jobs import run_jobs
from asyncloader._tools.allocation import shards_of
from asyncloader._tools.folders import RunSummary, run_folder, saves_in, unfinished
from asyncloader._tools.summary import CheckpointSummary, summarize
from asyncloader.errors import CheckpointNotFoundError
from asyncloader.options import ReadOptions

from ._inspect_view import checkpoint_view, run_view
from ._options import JsonFlag, LinksFlag, PathArgument, examples
from ._output import print_json, show

__all__ = ["EPILOG", "inspect", "look_into"]

EPILOG = examples(
    ("asyncloader inspect runs/ctr", "the checkpoints of a training run"),
    ("asyncloader inspect runs/ctr/1200", "what one of them holds"),
    ("asyncloader inspect model.safetensors --all", "all of its tensors"),
)


def inspect(
    path: PathArgument,
    *,
    all_: Annotated[
        bool, typer.Option("--all", help="List everything, however long the lists are.")
    ] = False,
    follow_symlinks: LinksFlag = False,
    json: JsonFlag = False,
) -> None:
    """Say what a checkpoint holds.

    Tables (ids with their rows: embeddings, and what the optimizer keeps for each), tensors, their
    shapes and sizes; whether it is finished; whether its bytes can be verified. Of a folder in
    which a training run keeps its checkpoints, list these.

    Reads names and headers only, so it takes no time whatever the size.
    """
    options = ReadOptions(follow_symlinks=follow_symlinks)
    found = run_blocking(partial(look_into, path, options))
    if json:
        print_json(found)
    elif isinstance(found, RunSummary):
        show(run_view(found, everything=all_))
    else:
        show(checkpoint_view(found, everything=all_))


async def look_into(
    path: str, options: ReadOptions | None = None
) -> CheckpointSummary | RunSummary:
    """Sum up what is there.

    Raises:
        CheckpointError: If there is no committed checkpoint, or it is unreadable.
        ReadError: If the storage failed.
    """
    async with open_session(path, options or ReadOptions()) as session:
        pool = session.threads.kernels
        try:
            catalog = await session.catalog()
        except CheckpointNotFoundError as error:
            run = await session.on_disk(partial(run_folder, path))
            if run is not None:
                return run
            problem = await session.on_disk(partial(unfinished, path))
            if problem is None:
                raise
            raise CheckpointNotFoundError(error.location, problem) from error
        manifest = await session.manifest(catalog, shards_of(catalog))
        saving = await session.on_disk(partial(saves_in, path))
        sum_up = partial(summarize, manifest, file=session.file, saving=saving)
        [summary] = await run_jobs(pool, [sum_up])
        return summary
