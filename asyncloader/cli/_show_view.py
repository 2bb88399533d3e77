"""How `asyncloader show` looks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from asyncloader._checkpoint.parts import ID
from asyncloader._display import size_text
from asyncloader._tools.finding import FoundId
from asyncloader._tools.showing import ShownTable, ShownTensor

from ._inspect_view import metadata_lines
from ._terminal import (
    Name,
    Numbers,
    count,
    facts,
    grid_of_numbers,
    indented,
    number_text,
    path_line,
    plural,
    shape_text,
    shown,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

    from asyncloader._tools.values import Statistics

    from ._terminal import Fact

_FEW = 8
"""Values of a row, where there are several rows."""


def view_of(found: FoundId | ShownTable | ShownTensor) -> RenderableType:
    """Show what `asyncloader show` has found."""
    if isinstance(found, FoundId):
        return id_view(found)
    return table_view(found) if isinstance(found, ShownTable) else tensor_view(found)


def tensor_view(tensor: ShownTensor) -> RenderableType:
    """Show a dense tensor or a slot."""
    several = f" in {count(tensor.parts)} parts" if tensor.parts > 1 else ""
    lines: list[Fact] = [
        path_line(tensor.location),
        (tensor.kind, Text(shown(tensor.name), "bold", overflow="fold")),
        ("dtype", Text(tensor.dtype, "cyan")),
        ("shape", shape_text(tensor.shape)),
        ("size", size_text(tensor.bytes) + several),
    ]
    if tensor.statistics is not None and tensor.shape:
        lines += _statistics(tensor.statistics)
    lines += metadata_lines(tensor.metadata)
    flat = len(tensor.shape) <= 1 and all(row.id is None for row in tensor.rows)
    if flat and tensor.rows:
        lines.append(("values" if tensor.shape else "value", _flat(tensor)))
    head = facts(tensor.kind, lines)
    return Group(head, "", _rows(tensor)) if tensor.rows and not flat else head


def _statistics(found: Statistics) -> list[Fact]:
    lines: list[Fact] = []
    if found.min is not None and found.max is not None:
        lines.append(("range", f"{number_text(found.min)} to {number_text(found.max)}"))
    if found.mean is not None and found.std is not None:
        lines.append(("mean", f"{number_text(found.mean)} ± {number_text(found.std)}"))
    if found.count:
        zeros = f"{_share(found)}, {count(found.zeros)} of {count(found.count)}"
        lines.append(("zeros", zeros))
    if odd := _odd(found):
        lines.append(("not finite", Text(odd, "yellow")))
    return lines


def _flat(tensor: ShownTensor) -> RenderableType:
    values = [value for row in tensor.rows for value in row.values]
    left = tensor.shape[0] - len(values) if tensor.shape else 0
    texts = [number_text(value) for value in values]
    return Text("  ".join(texts) + (f"  … {count(left)} more" if left else ""))


def _share(found: Statistics) -> str:
    return f"{found.zeros / max(found.count, 1):.1%}"


def _odd(found: Statistics) -> str:
    kinds = ((found.nans, "NaN"), (found.infinities, "infinite"))
    return ", ".join(f"{count(number)} {what}" for number, what in kinds if number)


def _rows(tensor: ShownTensor) -> RenderableType:
    with_ids = tensor.rows[0].id is not None
    grid = Table.grid(padding=(0, 3, 0, 0))
    grid.add_column(justify="right", style="dim", no_wrap=True)
    if with_ids:
        grid.add_column(justify="right", no_wrap=True, style="cyan")
    grid.add_column()
    grid.add_row("row", *([Text("id", "dim")] if with_ids else []), Text("   values", "dim"))
    for row in tensor.rows:
        left = row.omitted + max(len(row.values) - _FEW, 0)
        grid.add_row(
            count(row.number),
            *([str(row.id)] if with_ids else []),
            Numbers(row.values[:_FEW], left, one_line=True),
        )
    return indented(grid)


def table_view(table: ShownTable) -> RenderableType:
    """Show a table's slots, a line each."""
    slots = {slot.name.rpartition("@")[2]: slot for slot in table.slots}
    ids = slots.pop(ID, None)
    lines: list[Fact] = [
        path_line(table.location),
        ("table", Text(shown(table.name), "bold", overflow="fold")),
        ("size", size_text(table.bytes)),
        ("holds", f"{plural(table.ids, 'id')}, {plural(len(slots), 'slot')}"),
    ]
    found = None if ids is None else ids.statistics
    if found is not None and found.min is not None and found.max is not None:
        lines.append(("ids", f"{number_text(found.min)} to {number_text(found.max)}"))
    odd = any(slot.statistics and _odd(slot.statistics) for slot in slots.values())
    last = ["not finite"] if odd else []
    titles = ("dtype", "row", "min", "max", "mean", "std", "zeros", *last)
    grid = grid_of_numbers("slot", *titles, left=["dtype"], gap=2)
    for name, slot in slots.items():
        cells = _cells(slot.statistics)
        row = shape_text(slot.shape[1:])
        grid.add_row(Name(name), Text(slot.dtype, "cyan"), row, *cells[: None if odd else -1])
    return Group(facts(table.kind, lines), "", indented(grid))


def _cells(found: Statistics | None) -> list[RenderableType]:
    if found is None:
        return [""] * 6
    numbers = (found.min, found.max, found.mean, found.std)
    texts = ["" if number is None else number_text(number, 3) for number in numbers]
    return [*texts, _share(found), Text(_odd(found), "yellow")]


def id_view(found: FoundId) -> RenderableType:
    """Show what a table keeps for an id."""
    lines: list[Fact] = [
        path_line(found.location),
        ("table", Text(shown(found.table), "bold", overflow="fold")),
        ("id", Text(str(found.id), "cyan")),
        ("part", Text(f"{found.part}")),
    ]
    if found.found > 1:
        times = f"{count(found.found)} times; the last one counts"
        lines.append(("stands there", Text(times, "yellow")))
    grid = Table.grid(padding=(0, 3, 0, 0))
    grid.add_column()
    grid.add_column(style="cyan", no_wrap=True)
    grid.add_column()
    for slot in found.slots:
        values = Numbers(slot.row.values, slot.row.omitted, one_line=False)
        grid.add_row(Name(slot.name), slot.dtype, values)
    head = facts("id", lines)
    return Group(head, "", indented(grid)) if found.slots else head
