"""`asyncloader inspect`, `show`, `verify`, `diff`, `bank`: they look, and change nothing."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import orjson
import typer

from asyncloader import tools
from asyncloader.options import ReadOptions

from ._common import (
    DirectFlag,
    JsonFlag,
    LinksFlag,
    PathArgument,
    examples,
    print_json,
    progress,
    with_texts,
)

if TYPE_CHECKING:
    from asyncloader._tools.showing import ShownTable, ShownTensor

_NO = 1  # the exit code where the answer is no
_BITS = 64  # of an id

INSPECT_EPILOG = examples(
    ("asyncloader inspect runs/ctr", "the checkpoints of a training run"),
    ("asyncloader inspect runs/ctr/1200", "what one of them holds"),
    ("asyncloader inspect model.safetensors --all", "all of its tensors"),
)
SHOW_EPILOG = examples(
    ("asyncloader show runs/ctr/1200 tower.0.weight", "a tensor"),
    ("asyncloader show runs/ctr/1200 item_emb", "a table, slot by slot"),
    ("asyncloader show runs/ctr/1200 item_emb@embedding", "one slot, its first rows"),
    ("asyncloader show runs/ctr/1200 item_emb --id -5", "all about one id"),
    codes="Exit codes: 0, shown; 1, the table does not hold this id; 2, it failed.",
)
VERIFY_EPILOG = examples(
    ("asyncloader verify runs/ctr/1200", "is all of it as it was written?"),
    ("asyncloader verify model.safetensors", "one file"),
    ("asyncloader verify runs/ctr/1200 --json", "for a script; `ok` says whether"),
    codes="Exit codes: 0, no problems; 1, there are some; 2, it could not be looked at.",
)
DIFF_EPILOG = examples(
    ("asyncloader diff runs/ctr/1200 runs/ctr/1300", "what did these steps change?"),
    ("asyncloader diff before after && echo same", "did resharding change anything?"),
    codes="Exit codes: 0, they hold the same; 1, they differ; 2, one of them cannot be read.",
)
BANK_EPILOG = examples(
    ("asyncloader bank bank.json", "which entry does each name come from?"),
    ("asyncloader bank bank.json --like runs/ctr/1200", "of the names of this model"),
    ("asyncloader bank bank.json --resume runs/ctr", "if the run goes on"),
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

    List tables (ids with their rows: embeddings, and the optimizer's state), tensors, their shapes
    and sizes; say whether the checkpoint is finished, and whether its bytes can be verified. Of a
    folder in which a training run keeps its checkpoints, list the checkpoints.

    Reads names and headers only, so it takes no time, even if the checkpoint is large.
    """
    found = tools.inspect(path, options=ReadOptions(follow_symlinks=follow_symlinks))
    if json:
        print_json(found)
        return
    from ._content_views import inspection_view
    from ._terminal import show

    show(inspection_view(found, everything=all_))


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


_Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="What to show: a tensor, a table, or one slot of a table (TABLE@SLOT); "
        "`asyncloader inspect` lists them.",
    ),
]
_Id = Annotated[
    int | None,
    typer.Option(
        "--id",
        metavar="ID",
        parser=_as_id,
        help="Find this id in the table, and print what is kept for it: a whole number of 64 "
        "bits, signed or not, decimal or hexadecimal (0x…).",
    ),
]


def show_one(
    path: PathArgument,
    name: _Name,
    *,
    rows: Annotated[int, typer.Option(min=0, metavar="N", help="How many rows to print.")] = 5,
    id_: _Id = None,
    follow_symlinks: LinksFlag = False,
    json: JsonFlag = False,
) -> None:
    """Show a tensor, a table, or the rows of an id.

    Of a tensor: dtype, shape, first rows, and statistics of its values (range, mean, spread, how
    many are zero, NaN or infinite). Of a table that has been written twice for the same id the
    last row counts, as when it is loaded.

    Reads piece by piece: the tensor or table need not fit into memory.
    """
    from asyncloader._threads.blocking import run_blocking
    from asyncloader._tools.showing import FoundId, look_at, look_for

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
        from ._content_views import view_of
        from ._terminal import show

        show(view_of(found))
    if missing:
        raise typer.Exit(_NO)


def verify(
    path: PathArgument,
    *,
    direct_io: DirectFlag = None,
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
    options = ReadOptions(
        direct_io="auto" if direct_io is None else direct_io, follow_symlinks=follow_symlinks
    )
    with progress("verifying") as listener:
        found = tools.verify(path, progress=listener, options=options)
    if json:
        print_json({"ok": found.ok} | {name: getattr(found, name) for name in found.__slots__})
    else:
        from ._result_views import verification_view
        from ._terminal import show

        show(verification_view(found))
    if not found.ok:
        raise typer.Exit(_NO)


def diff(
    a: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="A checkpoint: a folder that RecIS wrote, a .safetensors file, or a folder of "
            "these.",
        ),
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="The one to compare it with.")],
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
        from ._result_views import difference_view
        from ._terminal import show

        show(difference_view(found, everything=all_))
    if not found.equal:
        raise typer.Exit(_NO)


def bank(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="A JSON file with the bank: a list of entries, "
            '[{"path": …, "load": […], …}, …]. Paths are relative to where you are.',
        ),
    ],
    *,
    like: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="A checkpoint whose names are those of the model; by default the model has all "
            "names that the bank's checkpoints have.",
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="A run folder whose newest checkpoint comes first."),
    ] = None,
    rank: Annotated[int, typer.Option(min=0, metavar="N", help="Whose io_state_N.pt counts.")] = 0,
    follow_symlinks: LinksFlag = False,
    json: JsonFlag = False,
) -> None:
    """Say from which of several checkpoints each part of a model comes.

    The later entries of the bank come before the earlier ones; what an entry excludes or lacks
    falls through to those before it. The bank is the one that asyncloader.Loader.from_bank takes,
    and RecIS's `model_bank`. Reads names only.
    """
    from asyncloader._planning.bank import Bank
    from asyncloader._threads.blocking import run_blocking
    from asyncloader._tools.banks import resolve_bank

    given = Bank.of(_entries_in(file), resume=resume, rank=rank)
    options = ReadOptions(follow_symlinks=follow_symlinks)
    found = run_blocking(partial(resolve_bank, given, like=like, options=options))
    if json:
        print_json(asdict(found))
        return
    from ._terminal import show

    show(found.__rich__())


def _entries_in(file: str) -> object:
    try:
        entries: object = orjson.loads(Path(file).read_bytes())
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
    if not isinstance(entries, list):
        raise ValueError(f"{file}: a bank is a list of entries")  # noqa: TRY004  # it is data
    return entries
