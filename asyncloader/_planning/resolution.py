"""Decides for each name of a model which entry of a bank it comes from.

Entries are walked from the last to the first. A name goes to the first of them that loads it, does
not exclude it, and has it; so what a later entry excludes or lacks falls through to earlier ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from asyncloader._checkpoint.joined import label
from asyncloader._checkpoint.parts import ID

from .hints import hint_for
from .names import OPTIMIZER, is_pattern
from .origins import Origin, Resolution
from .renames import renamed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from .bank import Entry
    from .names import ModelNames, SourceNames


def resolve(model: ModelNames, sources: Sequence[tuple[Entry, SourceNames | None]]) -> Resolution:
    """Say where each name comes from; entries as they stand in the bank, the resumed run last.

    An entry without a source is not used, but its names are checked.
    """
    work = _Work(model)
    for entry, source in reversed(sources):
        told = work.problems, work.warnings
        work.problems, work.warnings = [], []
        wanted, excluded = work.selected(entry)
        if source is not None:
            work.take(entry, source, wanted)
            work.follow(entry, source, excluded)
        work.problems += told[0]  # in the order of the bank
        work.warnings += told[1]
    clearing = {entry.number for entry, _ in sources if entry.hashtable_clear}
    ids = {child: work.origins.get(f"{child}@{ID}") for child in model.tables}
    return Resolution(
        paths={entry.number: of.path for entry, of in sources if of is not None},
        origins={name: work.origins[name] for name in model if name in work.origins},
        missing=tuple(work.missing()),
        unexpected=tuple(work.unexpected(source for _, source in sources if source is not None)),
        cleared=tuple(child for child, of in ids.items() if of and of.entry in clearing),
        problems=tuple(work.problems),
        warnings=tuple(work.warnings),
    )


def wanted_words(model: ModelNames, entry: Entry) -> set[str]:
    """Return the plain values that an entry may take, so that they have to be read."""
    wanted, excluded = _Work(model).selected(entry)
    words = set(filter(model.is_word, wanted))
    if OPTIMIZER not in excluded and any(name in model.tensors for name in wanted):
        words.add(OPTIMIZER)
    return words


@dataclass(slots=True)
class _Work:
    """What the entries so far have taken."""

    model: ModelNames
    origins: dict[str, Origin] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)  # and not found so far
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def selected(self, entry: Entry) -> tuple[dict[str, bool], set[str]]:
        """Return the names that an entry loads, and whether each must be there; and the others."""
        if entry.kinds is not None:
            kinds = {name: self.model.kind(name) for name in self.model}
            chosen = {
                n: entry.strict and k == "dense" for n, k in kinds.items() if k in entry.kinds
            }
            return chosen, kinds.keys() - chosen.keys()
        chosen = {}
        for pattern in entry.load:
            for name in self._matching(entry, "load", pattern):
                chosen[name] = chosen.get(name, False) or name == pattern
        excluded = {n for one in entry.exclude for n in self._matching(entry, "exclude", one)}
        return {n: chosen[n] for n in self.model if n in chosen and n not in excluded}, excluded

    def _matching(self, entry: Entry, what: str, pattern: str) -> Sequence[str]:
        found = self.model.matching(pattern)
        if not found and what == "load" and not is_pattern(pattern):
            hint = hint_for(pattern, [*self.model, *self.model.tables])
            self.problems.append(f"{entry}: the model has no {pattern!r}, which load names{hint}")
        elif not found:
            self.warnings.append(f"{entry}: {what} {pattern!r} matches no name of the model")
        return found

    def take(self, entry: Entry, source: SourceNames, wanted: Mapping[str, bool]) -> None:
        """Give the entry what it loads and has, of the names that no later one has taken."""
        free = [name for name in wanted if name not in self.origins]
        renames = renamed(entry, free, self.model, self.problems, self.warnings)
        for name in free:
            theirs = renames.get(name, name)
            if source.has(theirs, self.model, name):
                self.origins[name] = Origin(entry=entry.number, path=source.path, name=theirs)
                continue
            self.asked.add(name)
            if wanted[name]:
                self._lacking(entry, source, theirs)
        for table in self.model.tables.keys() & {*entry.load}:
            names = [name for name in self.model.group(table) if name in free]
            if names and not any(name in self.origins for name in names):
                self._lacking(entry, source, renames.get(names[0], names[0]).rpartition("@")[0])

    def follow(self, entry: Entry, source: SourceNames, excluded: set[str]) -> None:
        """Give the optimizer's state to an entry that parameters come from."""
        if OPTIMIZER in self.origins or OPTIMIZER in excluded or OPTIMIZER not in source.words:
            return
        mine = (o for o in self.origins.values() if o.entry == entry.number)
        if any(source.is_of_model(origin.name) for origin in mine):
            own = Origin(entry=entry.number, path=source.path, name=OPTIMIZER)
            self.origins[OPTIMIZER] = own

    def _lacking(self, entry: Entry, source: SourceNames, name: str) -> None:
        hint = hint_for(name, source.catalog.names())
        known = f" (its checkpoint is {source.path})" if source.path != entry.path else ""
        into = self.warnings if entry.ignore_error else self.problems
        into.append(f"{entry}: has no {name!r}, which its load names{known}{hint}")

    def missing(self) -> Iterator[str]:
        """Yield the tables, slots and tensors that are nowhere; words need not be anywhere."""
        lost = {name for name in self.asked - self.origins.keys() if not self.model.is_word(name)}
        for child in self.model.tables:
            names = self.model.group(child)
            if lost.issuperset(names):
                yield child
            else:
                yield from (name for name in names if name in lost)
        yield from (name for name in self.model.tensors if name in lost)

    def unexpected(self, sources: Iterable[SourceNames]) -> Iterator[str]:
        """Yield what a checkpoint has and the model has not, under any name."""
        used = {str(origin) for origin in self.origins.values()}
        for source in dict.fromkeys(sources):
            for name in source.catalog.names():
                if name not in self.model and label(source.path, name) not in used:
                    yield label(source.path, name)
