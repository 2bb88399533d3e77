"""`asyncloader inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from asyncloader import tools
from asyncloader.options import ReadOptions

from ._options import JsonFlag, LinksFlag, PathArgument, examples
from ._output import print_json

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
    found = tools.inspect(path, options=ReadOptions(follow_symlinks=follow_symlinks))
    if json:
        print_json(found)
        return
    from ._inspect_view import inspection_view
    from ._terminal import show

    show(inspection_view(found, everything=all_))
