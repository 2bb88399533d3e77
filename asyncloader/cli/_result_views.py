"""How the results of `load`, `verify` and `convert` look."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from asyncloader._display import size_text

from ._terminal import count, escaped, facts, path_line, plural, shown

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import RenderableType

    from asyncloader._loading.report import LoadReport
    from asyncloader._tools.converting.convert import Conversion, ConvertedTable
    from asyncloader._tools.verifying.findings import Finding, Verification

    from ._terminal import Fact

_NAMED = 8


def load_view(report: LoadReport, kernels: float, rest: float) -> RenderableType:
    """Show the report of a load, and the seconds before it; its strings are markup."""
    before = Text(
        f"before that: {kernels:.3f} s for kernels, {rest:.3f} s for names and memory", "dim"
    )
    return Group(_harmless(report), "", before)


def _harmless(report: LoadReport) -> LoadReport:
    """Return the report with names that a terminal can show."""
    return replace(
        report,
        location=escaped(report.location),
        tables={shown(name): counts for name, counts in report.tables.items()},
        casts=tuple(replace(cast, name=shown(cast.name)) for cast in report.casts),
        missing=tuple(map(shown, report.missing)),
        unexpected=tuple(map(shown, report.unexpected)),
        warnings=tuple(map(escaped, report.warnings)),
    )


def verification_view(found: Verification) -> RenderableType:
    """Show all findings, then a summary."""
    held = f"{plural(found.tables, 'table')} of {plural(found.ids, 'id')}"
    read = f"{plural(found.files, 'file')}, {plural(found.blocks, 'block')}"
    rate = found.bytes_read / max(found.seconds, 1e-9) / 1e9
    lines: list[Fact] = [
        path_line(found.location),
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
    return Group(*parts, facts(found.kind, lines))


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


def conversion_view(done: Conversion) -> RenderableType:
    """Show what was written."""
    rows = sum(table.ids for table in done.tables)
    held = f"{plural(len(done.tables), 'table')} of {plural(rows, 'id')}"
    where = plural(len(done.files), "file")
    if done.ranks is not None:
        where += f", as {plural(done.ranks, 'rank')} would"
    lines: list[Fact] = [
        path_line(done.destination),
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
    return facts(done.kind, lines)


def _left_out(table: ConvertedTable) -> list[Text]:
    texts = []
    if table.duplicates:
        texts.append(f"{plural(table.duplicates, 'row')} of which a later one has the same id")
    if table.strays:
        texts.append(f"{plural(table.strays, 'row')} whose id is not in the slice of its block")
    return [Text(f"{shown(table.name)}: {text}", "yellow") for text in texts]
