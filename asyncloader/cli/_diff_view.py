"""How `asyncloader diff` looks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ._terminal import (
    Name,
    count,
    escaped,
    facts,
    grid_of_numbers,
    indented,
    more,
    number_text,
    path_line,
    plural,
    shape_text,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

    from asyncloader._tools.diffing.difference import (
        Change,
        Difference,
        Kind,
        Names,
        SlotDifference,
        TableDifference,
        TensorDifference,
    )

    from ._terminal import Fact

_SHOWN = 20


def difference_view(found: Difference, *, everything: bool) -> RenderableType:
    """Show how two checkpoints differ."""
    tables = [table for table in found.tables if everything or not table.equal]
    tensors = [tensor for tensor in found.tensors if everything or not tensor.equal]
    most = None if everything else _SHOWN
    parts: list[RenderableType] = [_head(found)]
    only = [*_names("only in A", found.only_in_a), *_names("only in B", found.only_in_b)]
    if only:
        parts += ["", _only(only[:most]), *more(len(only), most, "more names")]
    if tables:
        grid = _tables(tables[:most], everything=everything)
        parts += ["", grid, *more(len(tables), most, "more tables")]
    if tensors:
        parts += ["", _tensors(tensors[:most]), *more(len(tensors), most, "more tensors")]
    return Group(*parts)


def _head(found: Difference) -> RenderableType:
    same = [
        plural(sum(table.equal for table in found.tables), "table"),
        plural(sum(tensor.equal for tensor in found.tensors), "tensor"),
    ]
    whole = not found.only_in_a and not found.only_in_b
    result = Text("equal", "green") if found.equal else Text("different", "bold yellow")
    lines: list[Fact] = [
        path_line(found.a, "A"),
        path_line(found.b, "B"),
        ("result", result),
        ("equal", ", ".join(same) + ("" if whole else ", in what both have")),
        ("time", f"{found.seconds:.2f} s"),
        *(("note", Text(escaped(note), "yellow")) for note in found.notes),
    ]
    return facts(None, lines)


def _names(title: str, names: Names) -> Iterator[tuple[str, str, str]]:
    for kind, of_kind in (
        ("table", names.tables),
        ("slot", names.slots),
        ("tensor", names.tensors),
    ):
        yield from ((title, kind, name) for name in of_kind)


def _only(names: list[tuple[str, str, str]]) -> RenderableType:
    grid = Table.grid(padding=(0, 2, 0, 0))
    for title, kind, name in names:
        style = "red" if title.endswith("A") else "green"
        grid.add_row(Text(title, style), Text(kind, "dim"), Name(name))
    return indented(grid)


def _tables(tables: list[TableDifference], *, everything: bool) -> RenderableType:
    titles = ("only in A", "only in B", "in both", "differ", "largest change")
    grid = grid_of_numbers("table", *titles)
    for table in tables:
        grid.add_row(
            Name(table.name, "bold"),
            Text(count(table.lost), "red" if table.lost else ""),
            Text(count(table.gained), "green" if table.gained else ""),
            count(table.kept),
            "",
            "",
        )
        for slot in table.slots:
            if everything or not slot.equal:
                grid.add_row(Name(slot.name, indent=2), "", "", *_slot(slot))
    return indented(grid)


def _slot(slot: SlotDifference) -> list[RenderableType]:
    if slot.a != slot.b:
        return ["", "", _kinds(slot.a, slot.b)]
    return ["", count(slot.different), _change(slot.change)]


def _tensors(tensors: list[TensorDifference]) -> RenderableType:
    grid = grid_of_numbers("tensor", "elements", "differ", "largest change")
    for tensor in tensors:
        cells: list[RenderableType] = [
            count(tensor.elements),
            count(tensor.change.different),
            _change(tensor.change),
        ]
        if tensor.a != tensor.b:
            cells = ["", "", _kinds(tensor.a, tensor.b)]
        grid.add_row(Name(tensor.name), *cells)
    return indented(grid)


def _kinds(a: Kind, b: Kind) -> Text:
    return Text(f"{_kind(a)} → {_kind(b)}", "yellow")


def _kind(kind: Kind) -> str:
    return f"{kind.dtype} {shape_text(kind.shape)}"


def _change(change: Change) -> str:
    if not change.different:
        return ""
    texts = [] if change.largest is None else [number_text(change.largest)]
    texts += [f"{count(change.infinite)} infinite"] if change.infinite else []
    texts += [f"{count(change.nans)} NaN"] if change.nans else []
    return ", ".join(texts) or "no numbers"
