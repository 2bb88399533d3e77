"""`asyncloader show`."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from asyncloader._loading.session import open_session
from asyncloader._threads.blocking import run_blocking
from asyncloader._tools.finding import FoundId, find_id
from asyncloader._tools.lookup import find_table, find_target
from asyncloader._tools.showing import ShownTable, ShownTensor, show_table, show_tensor
from asyncloader._tools.values import with_texts
from asyncloader.cli._progress import progress_bar
from asyncloader.options import ReadOptions

from ._names import shown
from ._options import JsonFlag, LinksFlag, PathArgument, examples
from ._output import complain, print_json, show
from ._show_view import id_view, table_view, tensor_view

if TYPE_CHECKING:
    from asyncloader._tools.stages import Tell

__all__ = ["EPILOG", "look_at", "look_for", "show_one"]

_NOT_THERE = 1
_BITS = 64

EPILOG = examples(
    ("asyncloader show runs/ctr/1200 tower.0.weight", "a tensor"),
    ("asyncloader show runs/ctr/1200 item_emb", "a table, slot by slot"),
    ("asyncloader show runs/ctr/1200 item_emb@embedding", "one slot, its first rows"),
    ("asyncloader show runs/ctr/1200 item_emb --id -5", "all about one id"),
    codes="Exit codes: 0, shown; 1, the table does not hold this id; 2, it failed.",
)


def _as_id(text: str) -> int:
    """Return the id that a text stands for: 64 bits, signed or not, decimal or hexadecimal."""
    is_hex = text.lower().startswith("0x")
    try:
        number = int(text, 16 if is_hex else 10)
    except ValueError:
        number = 1 << _BITS
    if not -(1 << _BITS - 1) <= number < 1 << _BITS:
        raise typer.BadParameter(
            f"{shown(text)} is no id: that is a whole number of {_BITS} bits, signed or not, "
            "decimal or hexadecimal (0x…)"
        )
    return number - (1 << _BITS) if number >= 1 << _BITS - 1 else number


def show_one(
    path: PathArgument,
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="What to show: a tensor, a table, or one slot of a table (TABLE@SLOT); "
            "`asyncloader inspect` lists them.",
            show_default=False,
        ),
    ],
    *,
    rows: Annotated[int, typer.Option(min=0, metavar="N", help="How many rows to print.")] = 5,
    id_: Annotated[
        int | None,
        typer.Option(
            "--id",
            metavar="ID",
            parser=_as_id,
            help="Find this id in the table, and print what is kept for it: a whole number of 64 "
            "bits, signed or not, decimal or hexadecimal (0x…).",
            show_default=False,
        ),
    ] = None,
    follow_symlinks: LinksFlag = False,
    json: JsonFlag = False,
) -> None:
    """Show a tensor, a table, or what a table keeps for an id.

    Of a tensor: dtype, shape, first rows, and what its values are like (range, mean, spread, how
    many are zero, NaN or infinite). Of a table that has been written twice for the same id the
    last row counts, as when it is loaded.

    Reads piece by piece: what is shown need not fit into memory.
    """
    options = ReadOptions(follow_symlinks=follow_symlinks)
    with progress_bar() as tell:
        if id_ is not None:
            found: FoundId | ShownTable | ShownTensor = run_blocking(
                partial(look_for, path, name, id_, tell=tell, options=options)
            )
        else:
            found = run_blocking(
                partial(look_at, path, name, rows=rows, tell=tell, options=options)
            )
    if json:
        print_json(with_texts(asdict(found)))
    elif isinstance(found, ShownTable):
        show(table_view(found))
    elif isinstance(found, ShownTensor):
        show(tensor_view(found))
    elif found.found:
        show(id_view(found))
    else:
        complain(f"{path}: table {shown(found.table)} has no id {found.id}")
    if isinstance(found, FoundId) and not found.found:
        raise typer.Exit(_NOT_THERE)


async def look_at(
    path: str, name: str, *, rows: int, tell: Tell, options: ReadOptions | None = None
) -> ShownTable | ShownTensor:
    """Say what goes by a name, and what it is like.

    Raises:
        KeyError: If there is no such name.
        CheckpointError: If there is no committed checkpoint, or it is unreadable.
        ReadError: If the storage failed.
    """
    async with open_session(path, options or ReadOptions()) as session:
        catalog = await session.catalog()
        target = find_target(session.location, catalog, name)
        if target.table is not None and target.slot is None:
            return await show_table(session, catalog, target.table, tell=tell)
        return await show_tensor(session, catalog, target, rows=rows, tell=tell)


async def look_for(
    path: str, name: str, id_: int, *, tell: Tell, options: ReadOptions | None = None
) -> FoundId:
    """Find an id in a table; raises what `look_at` does."""
    async with open_session(path, options or ReadOptions()) as session:
        catalog = await session.catalog()
        target = find_table(session.location, catalog, name)
        done = 0

        def advance(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            tell(done, 0, name)

        table = name if target.table is None else target.table
        return await find_id(session, catalog, table, id_, only=target.slot, advance=advance)
