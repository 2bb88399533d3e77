"""Where the names of a model come from, as values, and as a table."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from asyncloader._checkpoint.joined import label
from asyncloader._display import AsDict, escaped

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from rich.console import RenderableType

    from .names import ModelNames
    from .targets import LoadInfo


_FEW = 8
"""Names that begin alike and come from several places are shown one by one, if they are so few."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin(AsDict):
    """Where a name of the model comes from.

    Attributes:
        entry: The entry's place in the bank, from 0; -1 is the run that is resumed.
        path: The checkpoint's folder.
        name: The name in the checkpoint.
    """

    entry: int
    path: str
    name: str

    def __str__(self) -> str:
        return label(self.path, self.name)


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """Where each name of a model comes from. `str` and `rich.print` show a table.

    Attributes:
        paths: The checkpoint of each entry that is used, by its place in the bank.
        origins: By name of the model, those that an entry gives.
        missing: What an entry loads by a pattern, and no checkpoint has: tensors, tables, and
            `table@slot`.
        unexpected: What is in a checkpoint and is no name of the model.
        cleared: The tables, or children, whose ids are taken out first.
        problems: What is wrong.
        warnings: What is odd.
    """

    paths: Mapping[int, str]
    origins: Mapping[str, Origin]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    cleared: tuple[str, ...]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        return _as_text(self)

    def __rich__(self) -> RenderableType:
        return _as_table(self)

    def load_info(self, model: ModelNames) -> LoadInfo:
        """Return the load info over the names of a joined catalog; of a child, its ids first."""
        info: LoadInfo = {}
        for child, slots in model.tables.items():
            for slot in slots:
                if (origin := self.origins.get(f"{child}@{slot}")) is not None:
                    table = label(origin.path, origin.name.removesuffix(f"@{slot}"))
                    info.setdefault(child, {}).setdefault(table, []).append(slot)
        missing = set(self.missing)
        for name in model.tensors:
            if name in self.origins:
                info[name] = {str(self.origins[name]): []}
            elif name in missing:
                info[name] = {name: []}
        return info


class _Line(NamedTuple):
    name: str
    entry: str
    source: str  # the name in the checkpoint, if it is another one; or what happens without one


def _as_text(found: Resolution) -> str:
    lines = [tuple(map(escaped, line)) for line in _lines(found)]
    wide, numbers = (max((len(line[n]) for line in lines), default=0) for n in (0, 1))
    shown = [f"{name:{wide}}  {entry:{numbers}}  {source}" for name, entry, source in lines]
    return "\n".join([*_legend(found), *map(str.rstrip, shown), *_warnings(found)])


def _as_table(found: Resolution) -> RenderableType:
    from rich import box  # noqa: PLC0415  # only where it is shown
    from rich.console import Group  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    for title in ("name", "entry", "there it is"):
        table.add_column(title, overflow="fold")
    for line in _lines(found):
        table.add_row(*map(Text, map(escaped, line)), style=None if line.entry else "yellow")
    warnings = [Text(line, style="yellow") for line in _warnings(found)]
    return Group(*map(Text, _legend(found)), Text(), table, *warnings)


def _legend(found: Resolution) -> list[str]:
    used = Counter(origin.entry for origin in found.origins.values())
    return [
        f"{_entry(number)}: {escaped(path)}"
        + ("" if number in used else " (nothing comes from it)")
        for number, path in found.paths.items()
    ]


def _warnings(found: Resolution) -> list[str]:
    return [f"warning: {escaped(warning)}" for warning in found.warnings]


def _entry(number: int) -> str:
    return "resume" if number < 0 else str(number)


def _lines(found: Resolution) -> Iterator[_Line]:
    groups: dict[str, list[str]] = {}
    for name in found.origins:
        table, at, _ = name.rpartition("@")
        head, dot, rest = name.partition(".")
        group = f"{table}@" if at else f"{head}." if dot and rest else name
        groups.setdefault(group, []).append(name)
    for stem, names in groups.items():
        yield from _lines_of(found, stem, names)
    for name in found.missing:
        yield _Line(name, "", "keeps its values: no entry has it")


def _lines_of(found: Resolution, stem: str, names: Sequence[str]) -> Iterator[_Line]:
    """Yield a line for names that come from one place; or else one for each, if they are few."""
    stems = Counter((found.origins[name].entry, _stem_of(found, stem, name)) for name in names)
    (entry, theirs), count = next(iter(stems.items()))
    if count == len(names) > 1 and theirs is not None:
        yield _Line(f"{stem}* ({count})", _entry(entry), f"{theirs}*" if theirs != stem else "")
    elif len(names) > _FEW:
        for number, count in Counter(found.origins[name].entry for name in names).items():
            yield _Line(f"{stem}* ({count} of {len(names)})", _entry(number), "")
    else:
        for name in names:
            origin = found.origins[name]
            yield _Line(name, _entry(origin.entry), origin.name if origin.name != name else "")


def _stem_of(found: Resolution, stem: str, name: str) -> str | None:
    """Return what the beginning of a name is in the checkpoint, if only that differs there."""
    theirs, rest = found.origins[name].name, name.removeprefix(stem)
    return theirs.removesuffix(rest) if rest and theirs.endswith(rest) else None
