"""How the results of `diff`, `load`, `verify` and `convert` look."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from asyncloader._display import escaped, size_text

from ._terminal import (
    Name,
    count,
    facts,
    grid_of_numbers,
    holds,
    number_text,
    odd_fact,
    path_fact,
    plural,
    section,
    shape_text,
    shown,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import RenderableType

    from asyncloader._loading.report import LoadReport
    from asyncloader._tools.converting import Conversion, ConvertedTable
    from asyncloader._tools.difference import (
        Change,
        Difference,
        SlotDifference,
        TableDifference,
        TensorDifference,
    )
    from asyncloader._tools.verifying import Finding, Verification

    from ._terminal import Fact

_NAMED = 8


def difference_view(found: Difference, *, everything: bool) -> RenderableType:
    """Show how two checkpoints differ."""
    same = f"{plural(sum(table.equal for table in found.tables), 'table')}, "
    same += plural(sum(tensor.equal for tensor in found.tensors), "tensor")
    sides = (("only in A", "red", found.only_in_a), ("only in B", "green", found.only_in_b))
    only = [
        (Text(title, style), Text(kind, "dim"), Name(name))
        for title, style, names in sides
        for kind in ("table", "slot", "tensor")
        for name in getattr(names, f"{kind}s")
    ]
    result = Text("equal", "green") if found.equal else Text("different", "bold yellow")
    lines: list[Fact] = [
        path_fact(found.a, "A"),
        path_fact(found.b, "B"),
        ("result", result),
        ("equal", f"{same}, in what both have" if only else same),
        ("time", f"{found.seconds:.2f} s"),
        *(odd_fact("note", note) for note in found.notes),
    ]
    tables = [table for table in found.tables if everything or not table.equal]
    tensors = [tensor for tensor in found.tensors if everything or not tensor.equal]
    draw_tables = partial(_different_tables, everything=everything)
    return Group(
        facts(None, lines),
        *section(only, _rows, "more names", everything=everything),
        *section(tables, draw_tables, "more tables", everything=everything),
        *section(tensors, _different_tensors, "more tensors", everything=everything),
    )


def _rows(rows: Iterable[tuple[RenderableType, ...]]) -> RenderableType:
    grid = Table.grid(padding=(0, 2, 0, 0))
    for row in rows:
        grid.add_row(*row)
    return grid


def _different_tables(tables: Sequence[TableDifference], *, everything: bool) -> RenderableType:
    titles = ("only in A", "only in B", "in both", "differ", "largest change")
    grid = grid_of_numbers("table", *titles)
    for table in tables:
        lost = Text(count(table.lost), "red" if table.lost else "")
        gained = Text(count(table.gained), "green" if table.gained else "")
        grid.add_row(Name(table.name, "bold"), lost, gained, count(table.kept), "", "")
        for slot in table.slots:
            if everything or not slot.equal:
                cells = "", count(slot.different), _change(slot.change)
                grid.add_row(Name(slot.name, indent=2), "", "", *(_kinds(slot) or cells))
    return grid


def _different_tensors(tensors: Sequence[TensorDifference]) -> RenderableType:
    grid = grid_of_numbers("tensor", "elements", "differ", "largest change")
    for tensor in tensors:
        change = tensor.change
        cells = count(tensor.elements), count(change.different), _change(change)
        grid.add_row(Name(tensor.name), *(_kinds(tensor) or cells))
    return grid


def _kinds(found: SlotDifference | TensorDifference) -> tuple[RenderableType, ...]:
    """Return the cells for two things of which the dtypes or the shapes differ."""
    if found.a == found.b:
        return ()
    one, other = (f"{kind.dtype} {shape_text(kind.shape)}" for kind in (found.a, found.b))
    return "", "", Text(f"{one} → {other}", "yellow")


def _change(change: Change) -> str:
    if not change.different:
        return ""
    texts = [] if change.largest is None else [number_text(change.largest)]
    texts += [f"{count(change.infinite)} infinite"] if change.infinite else []
    texts += [f"{count(change.nans)} NaN"] if change.nans else []
    return ", ".join(texts) or "no numbers"


def load_view(report: LoadReport, kernels: float, rest: float) -> RenderableType:
    """Show the report of a load, and the seconds before it; its strings are markup."""
    harmless = replace(
        report,
        location=escaped(report.location),
        tables={shown(name): counts for name, counts in report.tables.items()},
        casts=tuple(replace(cast, name=shown(cast.name)) for cast in report.casts),
        missing=tuple(map(shown, report.missing)),
        unexpected=tuple(map(shown, report.unexpected)),
        warnings=tuple(map(escaped, report.warnings)),
    )
    before = f"before that: {kernels:.3f} s for kernels, {rest:.3f} s for names and memory"
    return Group(harmless, "", Text(before, "dim"))


def verification_view(found: Verification) -> RenderableType:
    """Show all findings, then a summary."""
    read = f"{plural(found.files, 'file')}, {plural(found.blocks, 'block')}"
    rate = found.bytes_read / max(found.seconds, 1e-9) / 1e9
    result = Text("no problems", "green")
    if found.problems:
        result = Text(plural(len(found.problems), "problem"), "bold red")
    compared = Text(f"{count(found.digests)} compared")
    lines: list[Fact] = [
        path_fact(found.location),
        ("result", result),
        ("holds", holds(found.tables, found.ids, found.tensors)),
        ("read", f"{read}, {size_text(found.bytes_read)}"),
        ("digests", compared if found.digests else Text("none compared", "dim")),
        ("time", f"{found.seconds:.2f} s, {rate:.2f} GB/s"),
    ]
    parts: list[RenderableType] = []
    if found.problems or found.notes:
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        for finding in (*found.problems, *found.notes):
            style = "bold red" if finding.severity == "problem" else "yellow"
            grid.add_row(Text(finding.severity, style), _text_of(finding))
        parts = [grid, ""]
    return Group(*parts, facts(found.kind, lines))


def _text_of(finding: Finding) -> Text:
    where = [] if finding.file is None else [Text(shown(finding.file), "bold")]
    where += [] if finding.name is None else [Text(shown(finding.name), "cyan")]
    return Text(": ").join([*where, Text(escaped(finding.text))])


def conversion_view(done: Conversion) -> RenderableType:
    """Show the file or folder that was written."""
    where = plural(len(done.files), "file")
    if done.ranks is not None:
        where += f", as {plural(done.ranks, 'rank')} would"
    ids = sum(table.ids for table in done.tables)
    lines: list[Fact] = [
        path_fact(done.destination),
        ("from", Text(escaped(done.source), overflow="fold")),
        ("written", f"{size_text(done.bytes_written)} to {where}"),
        ("holds", holds(len(done.tables), ids, len(done.tensors))),
    ]
    slots = list(dict.fromkeys(slot for table in done.tables for slot in table.slots))
    if slots:
        more = f" and {count(len(slots) - _NAMED)} more" if len(slots) > _NAMED else ""
        lines.append(("slots", Text(", ".join(map(shown, slots[:_NAMED])) + more)))
    verified = Text("compared", "green") if done.bytes_verified else Text("none to compare", "dim")
    lines += [("digests", verified), ("time", f"{done.seconds:.2f} s")]
    lines += [("left out", text) for table in done.tables for text in _left_out(table)]
    if done.left_out:
        files = ", ".join(map(shown, done.left_out[:_NAMED]))
        more = f" and {count(len(done.left_out) - _NAMED)} more" if done.left_out[_NAMED:] else ""
        lines.append(("left out", Text(f"{files}{more}: copy what you need", "yellow")))
    return facts(done.kind, lines)


def _left_out(table: ConvertedTable) -> list[Text]:
    texts = []
    if table.duplicates:
        texts.append(f"{plural(table.duplicates, 'row')} of which a later one has the same id")
    if table.strays:
        texts.append(f"{plural(table.strays, 'row')} whose id is not in the slice of its block")
    return [Text(f"{shown(table.name)}: {text}", "yellow") for text in texts]
