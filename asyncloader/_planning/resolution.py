"""Decides for each name of a model which entry of a bank it comes from.

Entries are walked from the last to the first. A name goes to the first of them that loads it, does
not exclude it, and has it; so what a later entry excludes or lacks falls through to earlier ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from asyncloader._checkpoint.joined import label
from asyncloader._checkpoint.parts import ID

from .hints import did_you_mean
from .names import OPTIMIZER, is_pattern
from .origins import Origin, Resolution
from .renames import renamed

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from .bank import Entry
    from .names import ModelNames, SourceNames


class Resolving:
    """Gives tables and tensors to entries at once, then plain values as they are read.

    Takes the entries as they stand in the bank, the resumed run last; one without a source is not
    used, but its names are checked. Whoever has one calls `words_of` and `take_words` for each
    entry that has a source, from the last to the first, and then `result`.
    """

    def __init__(
        self, model: ModelNames, sources: Sequence[tuple[Entry, SourceNames | None]]
    ) -> None:
        self._model = model
        self._sources = sources
        self._origins: dict[str, Origin] = {}
        self._asked = set[str]()  # and not found so far
        self._turns = {entry.number: _Turn(entry) for entry, _ in sources}
        for entry, source in reversed(sources):
            self._select(self._turns[entry.number])
            if source is not None:
                self._take(self._turns[entry.number], source)

    def words_of(self, entry: Entry) -> set[str]:
        """Return the plain values that an entry takes if it has them, and no later one has taken.

        The optimizer's state is among them where parameters come from the entry.
        """
        turn = self._turns[entry.number]
        follows = {OPTIMIZER} if turn.gives_parameters and OPTIMIZER not in turn.excluded else set()
        words = set(filter(self._model.is_word, turn.wanted)) | follows
        return words - self._origins.keys()

    def take_words(
        self, entry: Entry, source: SourceNames, words: set[str], there: Collection[str]
    ) -> None:
        """Give an entry the plain values, of `words`, that are there."""
        turn = self._turns[entry.number]
        for word in words.intersection(there):
            self._origins[word] = Origin(entry=entry.number, path=source.path, name=word)
        lacking = words.difference(there)
        turn.lack([word for word in turn.wanted if word in lacking and turn.wanted[word]], source)

    def result(self) -> Resolution:
        entries = [entry for entry, _ in self._sources]
        clearing = {entry.number for entry in entries if entry.hashtable_clear}
        ids = {child: self._origins.get(f"{child}@{ID}") for child in self._model.tables}
        sources = {entry.number: of for entry, of in self._sources if of is not None}
        return Resolution(
            paths={number: of.path for number, of in sources.items()},
            origins={name: self._origins[name] for name in self._model if name in self._origins},
            missing=tuple(self._missing()),
            unexpected=tuple(self._unexpected(sources.values())),
            cleared=tuple(child for child, of in ids.items() if of and of.entry in clearing),
            problems=tuple(text for one in self._turns.values() for text in one.problems),
            warnings=tuple(text for one in self._turns.values() for text in one.warnings),
        )

    def _select(self, turn: _Turn) -> None:
        """Note the names that an entry loads, and whether each must be there; and the others."""
        entry, model = turn.entry, self._model
        if entry.kinds is not None:
            kinds = {name: model.kind(name) for name in model}
            turn.wanted = {
                n: entry.strict and k == "dense" for n, k in kinds.items() if k in entry.kinds
            }
            turn.excluded = kinds.keys() - turn.wanted.keys()
            return
        chosen: dict[str, bool] = {}
        absent = []
        for pattern in entry.load:
            found = model.matching(pattern)
            for name in found:
                chosen[name] = chosen.get(name, False) or name == pattern
            if not found and is_pattern(pattern):
                turn.warn(f"load {pattern!r} matches no name of the model")
            elif not found:
                absent.append(pattern)
        hints = did_you_mean(absent, [*model, *model.tables] if absent else [])
        for name in absent:
            turn.refuse(f"the model has no {name!r}, which load names{hints[name]}")
        for pattern in entry.exclude:
            found = model.matching(pattern)
            turn.excluded.update(found)
            if not found:
                turn.warn(f"exclude {pattern!r} matches no name of the model")
        turn.wanted = {n: chosen[n] for n in model if n in chosen and n not in turn.excluded}

    def _take(self, turn: _Turn, source: SourceNames) -> None:
        """Give an entry the tables and tensors that it loads and has, and no later one has."""
        entry, model = turn.entry, self._model
        free = [n for n in turn.wanted if n not in self._origins and not model.is_word(n)]
        renames = renamed(entry, free, model, turn.problems, turn.warnings)
        lacking = []
        for name in free:
            theirs = renames.get(name, name)
            if source.has(theirs, model, name):
                self._origins[name] = Origin(entry=entry.number, path=source.path, name=theirs)
                turn.gives_parameters |= source.is_of_model(theirs)
                continue
            self._asked.add(name)
            if turn.wanted[name]:
                lacking.append(theirs)
        mine = set(free)
        for table in model.tables.keys() & {*entry.load}:
            names = [name for name in model.group(table) if name in mine]
            if names and not any(name in self._origins for name in names):
                lacking.append(renames.get(names[0], names[0]).rpartition("@")[0])
        turn.lack(lacking, source)

    def _missing(self) -> Iterator[str]:
        """Yield the tables, slots and tensors that are nowhere."""
        lost = self._asked - self._origins.keys()
        for child in self._model.tables:
            names = self._model.group(child)
            if lost.issuperset(names):
                yield child
            else:
                yield from (name for name in names if name in lost)
        yield from (name for name in self._model.tensors if name in lost)

    def _unexpected(self, sources: Iterable[SourceNames]) -> Iterator[str]:
        """Yield what a checkpoint has and the model has not, under any name."""
        used = {str(origin) for origin in self._origins.values()}
        for source in dict.fromkeys(sources):
            for name in source.catalog.names():
                if name not in self._model and label(source.path, name) not in used:
                    yield label(source.path, name)


@dataclass(slots=True)
class _Turn:
    """What one entry wants, and what is wrong with it."""

    entry: Entry
    wanted: Mapping[str, bool] = field(default_factory=dict)  # whether each must be there
    excluded: set[str] = field(default_factory=set)
    gives_parameters: bool = False
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def refuse(self, problem: str) -> None:
        self.problems.append(f"{self.entry}: {problem}")

    def warn(self, warning: str) -> None:
        self.warnings.append(f"{self.entry}: {warning}")

    def lack(self, names: Sequence[str], source: SourceNames) -> None:
        """Tell of names that the checkpoint must have and has not."""
        hints = did_you_mean(names, source.catalog.names() if names else [], rename="oname")
        known = f" (its checkpoint is {source.path})" if source.path != self.entry.path else ""
        tell = self.warn if self.entry.ignore_error else self.refuse
        for name in names:
            tell(f"has no {name!r}, which its load names{known}{hints[name]}")
