"""How `asyncloader inspect` and `asyncloader show` look."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from asyncloader._checkpoint.parts import ID
from asyncloader._display import size_text
from asyncloader._tools.run_summary import RunSummary

from ._facts import beside_facts, metadata_facts
from ._run_view import run_view
from ._terminal import (
    Name,
    Numbers,
    count,
    facts,
    grid_of_numbers,
    holds,
    indented,
    name_fact,
    number_text,
    odd_fact,
    path_fact,
    plural,
    section,
    shape_text,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from asyncloader._tools.inspecting import (
        CheckpointSummary,
        TableSummary,
        TensorSummary,
    )
    from asyncloader._tools.showing import FoundId, ShownTable, ShownTensor
    from asyncloader._tools.values import Statistics

    from ._terminal import Fact

_FEW = 8  # values of a row, where there are several rows
_DIGESTS = {
    "present": Text("of all bytes, to verify them by", "green"),
    "ignored": Text("not those of this save, so nothing can be verified", "yellow"),
    "absent": Text("none, so nothing can be verified", "dim"),
}


def inspection_view(found: CheckpointSummary | RunSummary, *, everything: bool) -> RenderableType:
    """Show a checkpoint, or a run folder."""
    if isinstance(found, RunSummary):
        return run_view(found, everything=everything)
    return checkpoint_view(found, everything=everything)


def checkpoint_view(summary: CheckpointSummary, *, everything: bool) -> RenderableType:
    """Show a checkpoint."""
    tables, tensors = summary.tables, summary.tensors
    held = holds(len(tables), summary.ids, len(tensors))
    lines: list[Fact] = [
        path_fact(summary.location),
        ("size", f"{size_text(summary.bytes)} in {plural(summary.shards, 'shard')}"),
        ("holds", held if tables else plural(len(tensors), "tensor")),
        ("digests", _DIGESTS[summary.digests]),
    ]
    if "file" not in summary.kind:
        lines.insert(1, ("state", Text("committed", "green")))
    another = "another save, under way or cut off"
    lines += [odd_fact("saving", f"{name}: {another}") for name in summary.saving]
    lines += beside_facts(summary.beside)
    lines += metadata_facts(summary.metadata)
    lines += [odd_fact("warning", warning) for warning in summary.warnings]
    return Group(
        facts(summary.kind, lines),
        *section(tables, _tables, "more tables", everything=everything),
        *section(tensors, _tensors, "more tensors", everything=everything),
    )


def _tables(tables: Sequence[TableSummary]) -> RenderableType:
    grid = grid_of_numbers("table", "ids", "parts", "dtype", "row", "size", left=["dtype"])
    for table in tables:
        numbers = [Text(count(number), "bold") for number in (table.ids, table.parts)]
        size = Text(size_text(table.bytes), "bold")
        grid.add_row(Name(table.name, "bold"), *numbers, "", "", size)
        for slot in table.slots:
            row = shape_text(slot.shape) if slot.name != ID else ""
            name, dtype = Name(slot.name, indent=2), Text(slot.dtype, "cyan")
            grid.add_row(name, "", "", dtype, row, size_text(slot.bytes))
    return grid


def _tensors(tensors: Sequence[TensorSummary]) -> RenderableType:
    grid = grid_of_numbers("tensor", "dtype", "shape", "size", left=["dtype"])
    for tensor in tensors:
        shape, size = shape_text(tensor.shape), size_text(tensor.bytes)
        grid.add_row(Name(tensor.name), Text(tensor.dtype, "cyan"), shape, size)
    return grid


def view_of(found: FoundId | ShownTable | ShownTensor) -> RenderableType:
    """Show the result of `asyncloader show`."""
    from asyncloader._tools.showing import FoundId, ShownTable

    if isinstance(found, FoundId):
        return id_view(found)
    return table_view(found) if isinstance(found, ShownTable) else tensor_view(found)


def tensor_view(tensor: ShownTensor) -> RenderableType:
    """Show a dense tensor or a slot."""
    several = f" in {count(tensor.parts)} parts" if tensor.parts > 1 else ""
    lines: list[Fact] = [
        path_fact(tensor.location),
        name_fact(tensor.kind, tensor.name),
        ("dtype", Text(tensor.dtype, "cyan")),
        ("shape", shape_text(tensor.shape)),
        ("size", size_text(tensor.bytes) + several),
    ]
    if tensor.statistics is not None and tensor.shape:
        lines += _statistics(tensor.statistics)
    lines += metadata_facts(tensor.metadata)
    flat = len(tensor.shape) <= 1 and all(row.id is None for row in tensor.rows)
    if flat and tensor.rows:
        lines.append(("values" if tensor.shape else "value", _flat(tensor)))
    head = facts(tensor.kind, lines)
    return Group(head, "", _rows(tensor)) if tensor.rows and not flat else head


def _range(found: Statistics, title: str = "range") -> list[Fact]:
    if found.min is None or found.max is None:
        return []
    return [(title, f"{number_text(found.min)} to {number_text(found.max)}")]


def _statistics(found: Statistics) -> list[Fact]:
    lines = _range(found)
    if found.mean is not None and found.std is not None:
        lines.append(("mean", f"{number_text(found.mean)} ± {number_text(found.std)}"))
    if found.count:
        zeros = f"{_share(found)}, {count(found.zeros)} of {count(found.count)}"
        lines.append(("zeros", zeros))
    if odd := _odd(found):
        lines.append(("not finite", Text(odd, "yellow")))
    return lines


def _flat(tensor: ShownTensor) -> RenderableType:
    texts = [number_text(value) for row in tensor.rows for value in row.values]
    left = tensor.shape[0] - len(texts) if tensor.shape else 0
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
        values = Numbers(row.values[:_FEW], left, one_line=True)
        grid.add_row(count(row.number), *([str(row.id)] if with_ids else []), values)
    return indented(grid)


def table_view(table: ShownTable) -> RenderableType:
    """Show a table's slots, a line each."""
    slots = {slot.name.removeprefix(f"{table.name}@"): slot for slot in table.slots}
    ids = slots.pop(ID, None)
    lines: list[Fact] = [
        path_fact(table.location),
        name_fact("table", table.name),
        ("size", size_text(table.bytes)),
        ("holds", f"{plural(table.ids, 'id')}, {plural(len(slots), 'slot')}"),
    ]
    if ids is not None and ids.statistics is not None:
        lines += _range(ids.statistics, "ids")
    odd = any(slot.statistics and _odd(slot.statistics) for slot in slots.values())
    last = ["not finite"] if odd else []
    titles = ("dtype", "row", "min", "max", "mean", "std", "zeros", *last)
    grid = grid_of_numbers("slot", *titles, left=["dtype"], gap=2)
    for name, slot in slots.items():
        cells = _cells(slot.statistics)[: None if odd else -1]
        grid.add_row(Name(name), Text(slot.dtype, "cyan"), shape_text(slot.shape[1:]), *cells)
    return Group(facts(table.kind, lines), "", indented(grid))


def _cells(found: Statistics | None) -> list[RenderableType]:
    if found is None:
        return [""] * 6
    numbers = (found.min, found.max, found.mean, found.std)
    texts = ["" if number is None else number_text(number, 3) for number in numbers]
    return [*texts, _share(found), Text(_odd(found), "yellow")]


def id_view(found: FoundId) -> RenderableType:
    """Show the rows of an id."""
    lines: list[Fact] = [
        path_fact(found.location),
        name_fact("table", found.table),
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
