"""How `asyncloader inspect` looks."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, TypeVar

from rich import box
from rich.console import Group
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from asyncloader._memory.sizes import size_text
from asyncloader._tools.allocation import ID

from ._names import Name, escaped
from ._output import count

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from rich.console import RenderableType

    from asyncloader._tools.folders import RunSummary, VersionSummary
    from asyncloader._tools.summary import CheckpointSummary, TableSummary, TensorSummary

__all__ = [
    "checkpoint_view",
    "facts",
    "grid_of_numbers",
    "indented",
    "metadata_lines",
    "plural",
    "run_view",
    "shape_text",
]

T = TypeVar("T")

_SHOWN = 20
_LONGEST = 200
# A line below the titles, and no room between columns but their padding.
_UNDERLINED = box.Box("    \n    \n ── \n    \n    \n    \n    \n    \n")
_DIGESTS = {
    "present": Text("of all bytes, to verify them by", "green"),
    "ignored": Text("not those of this save, so nothing can be verified", "yellow"),
    "absent": Text("none, so nothing can be verified", "dim"),
}


def checkpoint_view(summary: CheckpointSummary, *, everything: bool) -> RenderableType:
    """Show a checkpoint."""
    parts: list[RenderableType] = [_head(summary)]
    if summary.tables:
        parts += ["", _tables(_first(summary.tables, everything=everything))]
        parts += _more(len(summary.tables), "more tables", everything=everything)
    if summary.tensors:
        parts += ["", _tensors(_first(summary.tensors, everything=everything))]
        parts += _more(len(summary.tensors), "more tensors", everything=everything)
    return Group(*parts)


def _head(summary: CheckpointSummary) -> RenderableType:
    held = [
        f"{plural(len(summary.tables), 'table')} of {plural(summary.ids, 'id')}",
        plural(len(summary.tensors), "tensor"),
    ]
    lines: list[tuple[str, RenderableType]] = [
        ("size", f"{size_text(summary.bytes)} in {plural(summary.shards, 'shard')}"),
        ("holds", ", ".join(held if summary.tables else held[1:])),
        ("digests", _DIGESTS[summary.digests]),
    ]
    if summary.kind != "safetensors file":
        lines.insert(0, ("state", Text("committed", "green")))
    lines += [
        ("saving", Text(f"{escaped(name)}: another save, under way or cut off", "yellow"))
        for name in summary.saving
    ]
    lines += metadata_lines(summary.metadata)
    lines += [("warning", Text(escaped(warning), "yellow")) for warning in summary.warnings]
    return facts(summary.kind, summary.location, lines)


def metadata_lines(
    metadata: Mapping[str, Mapping[str, str]],
) -> list[tuple[str, RenderableType]]:
    """Show the free text of headers: once, where all files have the same."""
    if not metadata:
        return []
    first, *others = metadata.items()
    same = all(other == first[1] for _, other in others)
    shown = [
        f"{key}: {value}" if same else f"{file}: {key}: {value}"
        for file, pairs in ([first] if same else metadata.items())
        for key, value in pairs.items()
    ]
    more = [f"and {count(len(shown) - _SHOWN)} more; --json has them"] * (len(shown) > _SHOWN)
    return [
        ("metadata", Text(_cut(escaped(one)), overflow="fold")) for one in shown[:_SHOWN] + more
    ]


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def facts(kind: str, location: str, lines: Iterable[tuple[str, RenderableType]]) -> RenderableType:
    """Show what something is, where, and a few facts about it."""
    grid = Table.grid(padding=(0, 3, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    grid.add_row("path", Text(escaped(location), "bold", overflow="fold"))
    for title, value in lines:
        grid.add_row(title, value)
    return Panel(
        Padding(grid, (0, 1)),
        title=Text(kind, "bold cyan"),
        title_align="left",
        border_style="dim",
        expand=False,
    )


def indented(what: RenderableType) -> RenderableType:
    """Set something a little to the right, as wide as it is."""
    return Padding(what, (0, 2), expand=False)


def grid_of_numbers(first: str, *others: str, left: Iterable[str] = (), gap: int = 3) -> Table:
    """Return an empty table: names in its first column, then numbers, to the right.

    Args:
        first: The title of the names.
        others: Titles.
        left: Those of them that are no numbers.
        gap: Cells between columns.
    """
    table = Table(
        box=_UNDERLINED,
        show_edge=False,
        padding=(0, gap - 1, 0, 0),
        pad_edge=False,
        header_style="dim",
        border_style="dim",
    )
    table.add_column(first)
    for title in others:
        table.add_column(title, justify="left" if title in left else "right", no_wrap=True)
    return table


def _tables(tables: Sequence[TableSummary]) -> RenderableType:
    grid = grid_of_numbers("table", "ids", "parts", "dtype", "row", "size", left=["dtype"])
    for table in tables:
        grid.add_row(
            Name(table.name, "bold"),
            Text(count(table.ids), "bold"),
            Text(count(table.parts), "bold"),
            "",
            "",
            Text(size_text(table.bytes), "bold"),
        )
        for slot in table.slots:
            grid.add_row(
                Name(slot.name, indent=2),
                "",
                "",
                Text(slot.dtype, "cyan"),
                shape_text(slot.shape) if slot.name != ID else "",
                size_text(slot.bytes),
            )
    return indented(grid)


def _tensors(tensors: Sequence[TensorSummary]) -> RenderableType:
    grid = grid_of_numbers("tensor", "dtype", "shape", "size", left=["dtype"])
    for tensor in tensors:
        grid.add_row(
            Name(tensor.name),
            Text(tensor.dtype, "cyan"),
            shape_text(tensor.shape),
            size_text(tensor.bytes),
        )
    return indented(grid)


def run_view(run: RunSummary, *, everything: bool) -> RenderableType:
    """Show a run folder."""
    committed = sum(version.committed for version in run.versions)
    newest = Text("none", "yellow") if run.latest is None else Text(escaped(run.latest), "green")
    lines: list[tuple[str, RenderableType]] = [
        ("holds", f"{plural(len(run.versions), 'version')}, {count(committed)} committed"),
        ("latest", newest),
    ]
    parts: list[RenderableType] = [facts(run.kind, run.location, lines)]
    if run.versions:
        kept = run.versions if everything else run.versions[-_SHOWN:]
        parts += ["", _versions(kept)]
        parts += _more(len(run.versions), "older ones", everything=everything)
    return Group(*parts)


def _versions(versions: Sequence[VersionSummary]) -> RenderableType:
    titles = ("version", "state", "written", "size", "")
    grid = grid_of_numbers(*titles, left=("state", "written", ""))
    for version in versions:
        written = dt.datetime.fromtimestamp(version.modified, dt.UTC).astimezone()
        grid.add_row(
            Name(version.name, "bold" if version.latest else ""),
            Text(*(("committed", "green") if version.committed else ("not committed", "yellow"))),
            f"{written:%Y-%m-%d %H:%M}",
            size_text(version.bytes),
            Text("← latest" if version.latest else "", "green"),
        )
    return indented(grid)


def shape_text(shape: Sequence[int]) -> str:
    """Return a shape as people read it."""
    return " × ".join(map(count, shape)) if shape else "scalar"  # noqa: RUF001  # it is meant


def plural(number: int, noun: str) -> str:
    """Return `1 table`, `2 tables`."""
    return f"{count(number)} {noun}{'s' * (number != 1)}"


def _first(items: Sequence[T], *, everything: bool) -> Sequence[T]:
    return items if everything else items[:_SHOWN]


def _more(number: int, what: str, *, everything: bool) -> list[RenderableType]:
    if everything or number <= _SHOWN:
        return []
    text = Text(f"and {count(number - _SHOWN)} {what}; --all shows them", "dim italic")
    return [indented(text)]
