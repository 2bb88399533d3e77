"""`asyncloader show`."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from asyncloader.options import ReadOptions

from ._options import JsonFlag, LinksFlag, PathArgument, examples
from ._output import print_json, progress, with_texts

if TYPE_CHECKING:
    from asyncloader._tools.showing import ShownTable, ShownTensor

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
        from ._terminal import shown

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
    from asyncloader._threads.blocking import run_blocking
    from asyncloader._tools.finding import FoundId, look_for
    from asyncloader._tools.showing import look_at

    options = ReadOptions(follow_symlinks=follow_symlinks)
    with progress("reading") as listener:
        if id_ is None:
            look = partial(look_at, path, name, rows=rows, options=options, progress=listener)
            found: FoundId | ShownTable | ShownTensor = run_blocking(look)
        else:
            find = partial(look_for, path, name, id_, options=options, progress=listener)
            found = run_blocking(find)
    missing = isinstance(found, FoundId) and not found.found
    if json:
        print_json(with_texts(asdict(found)))
    elif isinstance(found, FoundId) and missing:
        from ._terminal import complain, shown

        complain(f"{path}: table {shown(found.table)} has no id {found.id}")
    else:
        from ._show_view import view_of
        from ._terminal import show

        show(view_of(found))
    if missing:
        raise typer.Exit(_NOT_THERE)
