"""How `asyncloader versions`, and `inspect` of a run folder, look."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from asyncloader._display import escaped, size_text

from ._terminal import Name, count, facts, grid_of_numbers, indented, path_fact, plural, section

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from asyncloader._tools.run_summary import RunSummary, VersionSummary

    from ._terminal import Fact

_LACK = 60  # letters of what a version lacks


def run_view(run: RunSummary, *, everything: bool) -> RenderableType:
    """Show a run folder."""
    committed = sum(version.committed for version in run.versions)
    newest = Text("none", "yellow") if run.latest is None else Text(escaped(run.latest), "green")
    lines: list[Fact] = [
        path_fact(run.location),
        ("holds", f"{plural(len(run.versions), 'version')}, {count(committed)} committed"),
        ("latest", newest),
    ]
    newest_first = run.versions[::-1]
    versions = section(newest_first, _versions, "older ones", everything=everything)
    saving = [f"{one.name}/{name}" for one in run.versions for name in one.saving]
    if not saving:
        return Group(facts(run.kind, lines), *versions)
    title = Text("Of saves under way, or dead: the next save there removes what is dead", "yellow")
    left = section(saving, _named, "files and folders", everything=everything)
    return Group(facts(run.kind, lines), *versions, "", indented(title), *left)


def _named(names: Sequence[str]) -> RenderableType:
    return Text("\n".join(map(escaped, names)))


def _versions(newest_first: Sequence[VersionSummary]) -> RenderableType:
    titles = ("version", "state", "written", "size", "")
    grid = grid_of_numbers(*titles, left=("state", "written", ""))
    for version in reversed(newest_first):
        written = dt.datetime.fromtimestamp(version.modified, dt.UTC).astimezone()
        grid.add_row(
            Name(version.name, "bold" if version.latest else ""),
            _state(version),
            f"{written:%Y-%m-%d %H:%M}" if version.modified else "",  # no time of a store's folder
            size_text(version.bytes),
            Text("← latest", "green") if version.latest else Text(_short(version.lack)),
        )
    return grid


def _short(lack: str) -> str:
    """Leave room for the other columns; `--json` has all of it."""
    text = escaped(lack)
    return text if len(text) <= _LACK else f"{text[: _LACK - 1]}…"


def _state(version: VersionSummary) -> Text:
    if not version.committed:
        return Text("not committed", "yellow")
    return Text("incomplete", "yellow") if version.lack else Text("committed", "green")
