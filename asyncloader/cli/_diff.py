"""`asyncloader diff`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from asyncloader import tools
from asyncloader.options import ReadOptions

from ._options import JsonFlag, LinksFlag, examples
from ._output import print_json, progress, with_texts

_DIFFERENT = 1
_KIND = "a folder that RecIS wrote, a .safetensors file, or a folder of these."

EPILOG = examples(
    ("asyncloader diff runs/ctr/1200 runs/ctr/1300", "what did these steps change?"),
    ("asyncloader diff before after && echo same", "did resharding change anything?"),
    codes="Exit codes: 0, they hold the same; 1, they differ; 2, one of them cannot be read.",
)


def diff(
    a: Annotated[
        str, typer.Argument(metavar="A", help=f"A checkpoint: {_KIND}", show_default=False)
    ],
    b: Annotated[
        str, typer.Argument(metavar="B", help="The one to compare it with.", show_default=False)
    ],
    *,
    all_: Annotated[
        bool, typer.Option("--all", help="List everything: also what is equal.")
    ] = False,
    follow_symlinks: LinksFlag = False,
    json: JsonFlag = False,
) -> None:
    """Say how two checkpoints differ.

    Which tables, slots and tensors only one of them has; which ids came and went; how many rows and
    elements are others, and by how much at most. How many ranks wrote them, and in which order
    rows stand, makes no difference. Values are compared bit for bit: of those that differ the
    largest change is that of the numbers, where two NaN are the same.

    Reads all of both, in little memory: about 1.5 GB, whatever their size.
    """
    options = ReadOptions(follow_symlinks=follow_symlinks)
    with progress("comparing") as listener:
        found = tools.diff(a, b, progress=listener, options=options)
    if json:
        print_json(with_texts(asdict(found)))
    else:
        from ._diff_view import difference_view
        from ._terminal import show

        show(difference_view(found, everything=all_))
    if not found.equal:
        raise typer.Exit(_DIFFERENT)
