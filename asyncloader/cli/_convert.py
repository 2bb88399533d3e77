"""`asyncloader convert`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from asyncloader._memory.sizes import size_text
from asyncloader._threads.blocking import run_blocking
from asyncloader._tools.converting.convert import Conversion, ConvertedTable, Options, aconvert
from asyncloader._tools.stages import telling
from asyncloader.cli._progress import progress_bar
from asyncloader.options import ReadOptions

from ._inspect_view import facts, plural
from ._names import escaped, shown
from ._options import JsonFlag, LinksFlag, examples
from ._output import count, print_json, show

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["EPILOG", "conversion_view", "convert"]

_PARALLEL = 8
_NAMED = 8

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
    ] = _PARALLEL,
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
    options = Options(
        shards=shards,
        slots=_names(slots),
        tables=_names(tables),
        parallel=parallel,
        overwrite=overwrite,
    )
    with progress_bar() as tell:
        listen = telling(tell, "converting")
        run = partial(
            aconvert,
            source,
            destination,
            options,
            progress=listen,
            read=ReadOptions(follow_symlinks=follow_symlinks),
        )
        done = run_blocking(run)
    if json:
        print_json(done)
    else:
        show(conversion_view(done))


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(filter(None, text.split(",")))


def conversion_view(done: Conversion) -> RenderableType:
    """Show what was written."""
    rows = sum(table.ids for table in done.tables)
    held = f"{plural(len(done.tables), 'table')} of {plural(rows, 'id')}"
    where = plural(len(done.files), "file")
    if done.ranks is not None:
        where += f", as {plural(done.ranks, 'rank')} would"
    lines: list[tuple[str, RenderableType]] = [
        ("from", Text(escaped(done.source), overflow="fold")),
        ("written", f"{size_text(done.bytes_written)} to {where}"),
        ("holds", f"{held}, {plural(len(done.tensors), 'tensor')}"),
    ]
    slots = list(dict.fromkeys(slot for table in done.tables for slot in table.slots))
    if slots:
        more = f" and {count(len(slots) - _NAMED)} more" if len(slots) > _NAMED else ""
        lines.append(("slots", Text(", ".join(map(shown, slots[:_NAMED])) + more)))
    verified = Text("compared", "green") if done.bytes_verified else Text("none to compare", "dim")
    lines += [("digests", verified), ("time", f"{done.seconds:.2f} s")]
    lines += [("left out", text) for table in done.tables for text in _left_out(table)]
    return facts(done.kind, done.destination, lines)


def _left_out(table: ConvertedTable) -> list[Text]:
    texts = []
    if table.duplicates:
        texts.append(f"{plural(table.duplicates, 'row')} of which a later one has the same id")
    if table.strays:
        texts.append(f"{plural(table.strays, 'row')} whose id is not in the slice of its block")
    return [Text(f"{shown(table.name)}: {text}", "yellow") for text in texts]
