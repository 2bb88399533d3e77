"""A bank: the entries that say which checkpoint a model's names come from. RecIS's ModelBank.

Entries are read and checked here; `resolution` says what follows from them.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from asyncloader._arguments import checked_source

from .hints import did_you_mean
from .names import WORDS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from collections.abc import Set as AbstractSet


Entries = Sequence[Any] | str | os.PathLike[str]
"""A list of paths and of dicts, or one path."""

KINDS = ("sparse", "dense", "extra", "sparse_opt", "io_state")
"""The switches of a `load_conf`."""

_SWITCHES = ("is_dynamic", "hashtable_clear", "ignore_error", "skip")
_FIELDS = ("path", "load", "exclude", "oname", *_SWITCHES)
_CONF_FIELDS = ("load", "exclude", "strict")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One entry of a bank.

    Attributes:
        number: Its place in the list, from 0; -1 is the run that is resumed.
        path: A checkpoint, or a run folder, whose newest checkpoint counts.
        load: Patterns of the model's names.
        exclude: The same; they win over `load`.
        kinds: The kinds of names to load, in place of patterns; `None` are the patterns.
        renames: Pairs of patterns, of the model's names and of the checkpoint's.
        strict: Whether a dense tensor that the checkpoint lacks is an error.
        is_dynamic: Whether to load again when the run has a newer checkpoint.
        hashtable_clear: Whether the tables whose ids come from here are emptied first.
        ignore_error: Whether what is missing is a warning.
        skip: Whether the entry is not used.
    """

    number: int
    path: str
    load: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    kinds: frozenset[str] | None = None
    renames: tuple[tuple[str, str], ...] = ()
    strict: bool = False
    is_dynamic: bool = False
    hashtable_clear: bool = True
    ignore_error: bool = False
    skip: bool = False

    def __str__(self) -> str:
        name = f"entry {self.number}" if self.number >= 0 else "resume"
        return f"{name} ({self.path})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bank:
    """What one model is loaded from.

    Attributes:
        entries: Later ones come before earlier ones.
        resume: The run folder that comes before all of them, if its list names a checkpoint.
        rank: Whose `io_state_<rank>.pt` counts.
        words: The plain values that are of use, so that they are read where entries want them.
    """

    entries: tuple[Entry, ...]
    resume: str | None = None
    rank: int = 0
    words: AbstractSet[str] = frozenset(WORDS)

    @classmethod
    def of(
        cls,
        entries: object,
        *,
        load_conf: Mapping[str, Any] | None = None,
        resume: str | os.PathLike[str] | None = None,
        rank: int = 0,
    ) -> Bank:
        """Read entries as users write them.

        Raises:
            TypeError: If they are no list of entries, nor a bank already.
            ValueError: With all that is wrong in any of them.
        """
        if isinstance(entries, Bank):
            if load_conf is not None or resume is not None or rank:
                raise TypeError("load_conf, resume and rank are those of the Bank: leave them out")
            return entries
        if isinstance(entries, str | os.PathLike):
            entries = [entries]
        if not isinstance(entries, Sequence):
            raise TypeError(f"a bank is a list of entries {{'path': …}}, got {entries!r}")
        if type(rank) is not int or rank < 0:
            raise ValueError(f"rank is a number from 0 on, got {rank!r}")
        problems: list[str] = []
        conf = None if load_conf is None else _read_conf(load_conf, problems)
        found = [_read_entry(number, given, conf, problems) for number, given in enumerate(entries)]
        if problems:
            lines = "".join(f"\n  - {problem}" for problem in problems)
            count = len(problems)
            raise ValueError(f"{count} problem{'s' * (count != 1)} in the bank:{lines}")
        return cls(
            entries=tuple(entry for entry in found if entry is not None),
            resume=None if resume is None else checked_source(resume, "resume"),
            rank=rank,
        )

    def at(self, paths: Mapping[str, str]) -> Bank:
        """Return the bank with other paths of its dynamic entries."""
        entries = (
            replace(one, path=paths[one.path]) if one.is_dynamic and not one.skip else one
            for one in self.entries
        )
        return replace(self, entries=tuple(entries))

    @property
    def location(self) -> str:
        """What to call it in messages."""
        paths = [entry.path for entry in self.entries if not entry.skip]
        paths += [] if self.resume is None else [self.resume]
        return " + ".join(dict.fromkeys(paths)) or "an empty bank"


def resuming(path: str) -> Entry:
    """Return the entry of a run that goes on: it comes before all others."""
    return Entry(number=-1, path=path, ignore_error=True)


def _read_entry(
    number: int, given: object, conf: Mapping[str, Any] | None, problems: list[str]
) -> Entry | None:
    entry = {"path": given} if isinstance(given, str | os.PathLike) else given
    if not isinstance(entry, Mapping):
        problems.append(f"entry {number} is {given!r}, not a dict with a path")
        return None
    own: list[str] = []
    values = dict(_fields(entry, own)) | {"path": _path(entry.get("path"), own)}
    problems += [f"entry {number}: {problem}" for problem in own]
    if own:
        return None
    if conf is not None and not values.keys() & {"load", "exclude"}:
        values |= conf
    return Entry(number=number, **values)


def _path(path: object, problems: list[str]) -> str:
    try:
        text = checked_source(path, "path")  # type: ignore[arg-type]  # it says what is wrong
    except (TypeError, ValueError) as error:
        problems.append(str(error))
        return ""
    if not text.strip():
        problems.append(f"path is blank: {text!r}")
    return text


def _fields(entry: Mapping[str, object], problems: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield the fields that an entry has, but for its path."""
    for name, value in entry.items():
        if name in {"load", "exclude"}:
            yield name, tuple(_patterns(name, value, problems))
        elif name == "oname":
            yield "renames", tuple(_pairs(value, problems))
        elif name in _SWITCHES:
            if not isinstance(value, bool):
                problems.append(f"{name} is True or False, got {value!r}")
            yield name, value
        elif name != "path":
            hint = did_you_mean([str(name)], _FIELDS)[str(name)]
            problems.append(f"there is no field {name!r}{hint}; the fields are {_list(_FIELDS)}")


def _patterns(name: str, value: object, problems: list[str]) -> Iterator[str]:
    if isinstance(value, str) or not isinstance(value, Collection):
        problems.append(f"{name} is a list of patterns, got {value!r}")
        return
    for pattern in sorted(value, key=str) if isinstance(value, set | frozenset) else value:
        if not isinstance(pattern, str):
            problems.append(f"{name} is a list of patterns, got {pattern!r} in it")
        elif pattern:
            yield pattern
        elif name == "load":
            problems.append("load has the empty pattern '', which matches no name")
        # RecIS's documents call [""] the default of `exclude`: it excludes nothing.


def _pairs(value: object, problems: list[str]) -> Iterator[tuple[str, str]]:
    maps = [value] if isinstance(value, Mapping) else value
    if isinstance(maps, str) or not isinstance(maps, Collection):
        problems.append(f"oname is a list of dicts {{model name: checkpoint name}}, got {value!r}")
        return
    for pairs in maps:
        if not isinstance(pairs, Mapping):
            problems.append(f"oname is a list of dicts, got {pairs!r} in it")
            continue
        for ours, theirs in pairs.items():
            if not (isinstance(ours, str) and isinstance(theirs, str) and ours and theirs):
                problems.append(f"oname maps names to names, got {ours!r}: {theirs!r}")
            elif ours.count("*") != theirs.count("*"):
                problems.append(
                    f"oname {ours!r}: {theirs!r} has not as many * on both sides: each * of the "
                    "checkpoint's name stands for what the same * of the model's name matched"
                )
            else:
                yield ours, theirs


def _read_conf(conf: object, problems: list[str]) -> Mapping[str, Any]:
    """Return the fields of entries that have RecIS 1.0.0's switches."""
    if not isinstance(conf, Mapping):
        problems.append(f"load_conf is a dict of {_list(_CONF_FIELDS)}, got {conf!r}")
        return {}
    problems += [
        f"load_conf has no field {name!r}; the fields are {_list(_CONF_FIELDS)}"
        for name in conf
        if name not in _CONF_FIELDS
    ]
    strict = conf.get("strict", True)
    if not isinstance(strict, bool):
        problems.append(f"load_conf: strict is True or False, got {strict!r}")
    load, exclude = (
        _kinds(name, conf.get(name, default), problems)
        for name, default in (("load", ["*"]), ("exclude", []))
    )
    return {"kinds": load - exclude, "strict": strict}


def _kinds(name: str, value: object, problems: list[str]) -> frozenset[str]:
    found = set[str]()
    for kind in _patterns(f"load_conf: {name}", value, problems):
        if kind == "*":
            found |= {*KINDS}
        elif kind in KINDS:
            found.add(kind)
        else:
            problems.append(f"load_conf: {name} has {kind!r}, which is none of {_list(KINDS)}")
    return frozenset(found)


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)
