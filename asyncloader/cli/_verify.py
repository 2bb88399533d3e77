"""`asyncloader verify`."""

from __future__ import annotations

import typer

from asyncloader import tools
from asyncloader.options import ReadOptions

from ._options import DirectFlag, JsonFlag, LinksFlag, PathArgument, examples
from ._output import print_json, progress

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
    options = ReadOptions(direct_io=direct_io, follow_symlinks=follow_symlinks)
    with progress("verifying") as listener:
        found = tools.verify(path, progress=listener, options=options)
    if json:
        print_json({"ok": found.ok} | {name: getattr(found, name) for name in found.__slots__})
    else:
        from ._result_views import verification_view
        from ._terminal import show

        show(verification_view(found))
    if not found.ok:
        raise typer.Exit(_PROBLEMS)
