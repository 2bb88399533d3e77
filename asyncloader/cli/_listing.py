"""`asyncloader versions`: what a run folder holds."""

from __future__ import annotations

from typing import Annotated

import typer

from asyncloader import tools
from asyncloader.errors import CheckpointError, CheckpointNotFoundError

from ._common import JsonFlag, PathArgument, examples, print_json

EPILOG = examples(
    ("asyncloader versions runs/ctr", "the checkpoints that can be loaded, the newest last"),
    ("asyncloader versions s3://models/ctr | tail -1", "the newest one, in a bucket"),
    ("asyncloader versions runs/ctr --all", "also what is unfinished, or left of dead saves"),
)


def versions(
    path: PathArgument,
    *,
    all_: Annotated[
        bool,
        typer.Option(
            "--all",
            help="Show all that is there: unfinished checkpoints, and files of "
            "saves that are under way or dead.",
        ),
    ] = False,
    json: JsonFlag = False,
) -> None:
    """List the checkpoints of a training run.

    Print the path or URL of each checkpoint that is finished, a line for each, the newest last.
    """
    from asyncloader import runs
    from asyncloader._checkpoint.run_folder import sub_folder
    from asyncloader._tools.run_summary import RunSummary

    if not (all_ or json):
        finished = [one.name for one in runs.versions(path) if one.committed and not one.lack]
        for name in finished:
            typer.echo(sub_folder(path, name))
        if finished:
            return
    try:
        found = tools.inspect(path)
    except CheckpointNotFoundError as error:
        problem = "holds no checkpoints: give the folder of a training run, which does"
        raise CheckpointError(error.location, problem) from error
    if not isinstance(found, RunSummary):
        problem = "is a checkpoint itself, no folder of checkpoints: asyncloader inspect shows it"
        raise CheckpointError(found.location, problem)
    if json:
        print_json(found)
    elif all_:
        from ._run_view import run_view
        from ._terminal import show

        show(run_view(found, everything=True))
