"""`asyncloader verify`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from asyncloader._memory.sizes import size_text
from asyncloader._threads.blocking import run_blocking
from asyncloader._tools.stages import telling
from asyncloader._tools.verifying.findings import Finding, Verification
from asyncloader._tools.verifying.verify import averify
from asyncloader.cli._progress import progress_bar
from asyncloader.options import ReadOptions

from ._inspect_view import facts, plural
from ._names import escaped, shown
from ._options import DirectFlag, JsonFlag, LinksFlag, PathArgument, examples
from ._output import count, print_json, show

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import RenderableType

__all__ = ["EPILOG", "verification_view", "verify"]

_PROBLEMS = 1

EPILOG = examples(
    ("asyncloader verify runs/ctr/1200", "is all of it as it was written?"),
    ("asyncloader verify model.safetensors", "one file"),
    ("asyncloader verify runs/ctr/1200 --json", "for a script; `ok` says whether"),
    codes="Exit codes: 0, no problems; 1, there are some; 2, it could not be looked at.",
)


def verify(
    path: PathArgument,
    *,
    direct_io: DirectFlag = False,
    follow_symlinks: LinksFlag = False,
    json: JsonFlag = False,
) -> None:
    """Look at every byte of a checkpoint, and list all that is wrong.

    Names, headers and offsets; whether all parts of each table are there and fit together, each id
    comes once and lies where it should; and, where asyncloader saved digests along, whether every
    byte is still the one that was written. Problems are what loses or falsifies rows; notes are
    odd, but do no harm.

    Reads all of it once, in little memory: besides 200 MB, 8 bytes for each id of its largest
    table.
    """
    with progress_bar() as tell:
        listen = telling(tell, "verifying")
        options = ReadOptions(direct_io=direct_io, follow_symlinks=follow_symlinks)
        run = partial(averify, path, progress=listen, options=options)
        found = run_blocking(run)
    if json:
        print_json(_as_json(found))
    else:
        show(verification_view(found))
    if not found.ok:
        raise typer.Exit(_PROBLEMS)


def _as_json(found: Verification) -> dict[str, object]:
    values = {name: getattr(found, name) for name in Verification.__slots__}
    return {"ok": found.ok, **values}


def verification_view(found: Verification) -> RenderableType:
    """Show all findings, then a summary."""
    held = f"{plural(found.tables, 'table')} of {plural(found.ids, 'id')}"
    read = f"{plural(found.files, 'file')}, {plural(found.blocks, 'block')}"
    rate = found.bytes_read / max(found.seconds, 1e-9) / 1e9
    lines: list[tuple[str, RenderableType]] = [
        ("result", _result(found)),
        ("holds", f"{held}, {plural(found.tensors, 'tensor')}"),
        ("read", f"{read}, {size_text(found.bytes_read)}"),
        ("digests", _digests(found)),
        ("time", f"{found.seconds:.2f} s, {rate:.2f} GB/s"),
    ]
    parts: list[RenderableType] = []
    if found.problems or found.notes:
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        _add(grid, found.problems, Text("problem", "bold red"))
        _add(grid, found.notes, Text("note", "yellow"))
        parts += [grid, ""]
    return Group(*parts, facts(found.kind, found.location, lines))


def _add(grid: Table, findings: Iterable[Finding], title: Text) -> None:
    for finding in findings:
        where = [] if finding.file is None else [Text(shown(finding.file), "bold")]
        where += [] if finding.name is None else [Text(shown(finding.name), "cyan")]
        grid.add_row(title, Text(": ").join([*where, Text(escaped(finding.text))]))


def _result(found: Verification) -> Text:
    if found.problems:
        return Text(plural(len(found.problems), "problem"), "bold red")
    return Text("no problems", "green")


def _digests(found: Verification) -> Text:
    if found.digests:
        return Text(f"{count(found.digests)} compared")
    return Text("none compared", "dim")
