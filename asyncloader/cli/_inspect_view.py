"""How `asyncloader inspect` looks."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from asyncloader._checkpoint.parts import ID
from asyncloader._display import size_text
from asyncloader._tools.folders import RunSummary

from ._terminal import (
    Name,
    count,
    escaped,
    facts,
    grid_of_numbers,
    indented,
    more,
    path_line,
    plural,
    shape_text,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import RenderableType

    from asyncloader._tools.folders import VersionSummary
    from asyncloader._tools.summary import CheckpointSummary, TableSummary, TensorSummary

    from ._terminal import Fact

_SHOWN = 20
_LONGEST = 200
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
    most = None if everything else _SHOWN
    parts: list[RenderableType] = [_head(summary)]
    if summary.tables:
        parts += ["", _tables(summary.tables[:most])]
        parts += more(len(summary.tables), most, "more tables")
    if summary.tensors:
        parts += ["", _tensors(summary.tensors[:most])]
        parts += more(len(summary.tensors), most, "more tensors")
    return Group(*parts)


def _head(summary: CheckpointSummary) -> RenderableType:
    held = [
        f"{plural(len(summary.tables), 'table')} of {plural(summary.ids, 'id')}",
        plural(len(summary.tensors), "tensor"),
    ]
    lines: list[Fact] = [
        path_line(summary.location),
        ("size", f"{size_text(summary.bytes)} in {plural(summary.shards, 'shard')}"),
        ("holds", ", ".join(held if summary.tables else held[1:])),
        ("digests", _DIGESTS[summary.digests]),
    ]
    if summary.kind != "safetensors file":
        lines.insert(1, ("state", Text("committed", "green")))
    lines += [
        ("saving", Text(f"{escaped(name)}: another save, under way or cut off", "yellow"))
        for name in summary.saving
    ]
    lines += metadata_lines(summary.metadata)
    lines += [("warning", Text(escaped(warning), "yellow")) for warning in summary.warnings]
    return facts(summary.kind, lines)


def metadata_lines(metadata: Mapping[str, Mapping[str, str]]) -> list[Fact]:
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
    rest = [f"and {count(len(shown) - _SHOWN)} more; --json has them"] * (len(shown) > _SHOWN)
    return [
        ("metadata", Text(_cut(escaped(one)), overflow="fold")) for one in shown[:_SHOWN] + rest
    ]


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


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
    most = None if everything else _SHOWN
    committed = sum(version.committed for version in run.versions)
    newest = Text("none", "yellow") if run.latest is None else Text(escaped(run.latest), "green")
    lines: list[Fact] = [
        path_line(run.location),
        ("holds", f"{plural(len(run.versions), 'version')}, {count(committed)} committed"),
        ("latest", newest),
    ]
    parts: list[RenderableType] = [facts(run.kind, lines)]
    if run.versions:
        parts += ["", _versions(run.versions[-(most or 0) :])]
        parts += more(len(run.versions), most, "older ones")
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
