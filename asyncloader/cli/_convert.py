"""`asyncloader convert`."""

from __future__ import annotations

from typing import Annotated

import typer

from asyncloader import tools
from asyncloader.options import ReadOptions

from ._options import JsonFlag, LinksFlag, examples
from ._output import print_json, progress

EPILOG = examples(
    ("asyncloader convert runs/ctr/1200 ctr.safetensors", "one plain file, for any program"),
    ("asyncloader convert ctr.safetensors back", "and back again"),
    ("asyncloader convert runs/ctr/1200 small --slots embedding", "without the optimizer's state"),
    ("asyncloader convert runs/ctr/1200 wide --shards 16", "as 16 ranks would have saved it"),
    codes="Exit codes: 0, done; 2, it failed: unless the message says that the file is written, "
    "nothing was, and what was there is there still.",
)


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="What to convert: a folder that RecIS wrote, a .safetensors file, or a folder of "
            "these, as Hugging Face's are.",
            show_default=False,
        ),
    ],
    destination: Annotated[
        str,
        typer.Argument(
            metavar="DST",
            help="What to write: one file if it ends in .safetensors, else a folder in RecIS's "
            "format.",
            show_default=False,
        ),
    ],
    *,
    shards: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="R",
            help="Write a folder as R ranks would: as many as wrote the source, unless given. One "
            "rank's part has to fit into memory at a time.",
            show_default=False,
        ),
    ] = None,
    slots: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Keep only these slots of tables, separated by commas, and the ids.",
            show_default=False,
        ),
    ] = None,
    tables: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Of plain files: take these for tables, separated by commas, and nothing else. "
            "Without it, what looks like a table is one if it has each id once.",
            show_default=False,
        ),
    ] = None,
    parallel: Annotated[
        int,
        typer.Option(min=1, metavar="P", help="Shard files of each rank, and writes at a time."),
    ] = 8,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what is there, once all is written.")
    ] = False,
    follow_symlinks: LinksFlag = False,
    json: JsonFlag = False,
) -> None:
    """Turn a checkpoint into another form of itself.

    Into one plain .safetensors file: the ids of table T stand there as T.id and its slots as
    T.embedding and so on, row by row. Out of such a file, or others in which there are X.id, each
    id once, and X.embedding: into a folder in RecIS's format. From folder to folder: with other
    ranks, or fewer slots. Nothing gets lost on the way there and back.

    A plain file is written piece by piece, in little memory, whatever the size.
    """
    with progress("converting") as listener:
        done = tools.convert(
            source,
            destination,
            shards=shards,
            slots=_names(slots),
            tables=_names(tables),
            parallel=parallel,
            overwrite=overwrite,
            progress=listener,
            options=ReadOptions(follow_symlinks=follow_symlinks),
        )
    if json:
        print_json(done)
        return
    from ._result_views import conversion_view
    from ._terminal import show

    show(conversion_view(done))


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(filter(None, text.split(",")))
