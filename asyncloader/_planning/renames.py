"""Under which names a checkpoint holds what an entry of a bank takes: RecIS's `oname`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .hints import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .bank import Entry
    from .names import ModelNames


def renamed(
    entry: Entry, free: Sequence[str], model: ModelNames, problems: list[str], warnings: list[str]
) -> dict[str, str]:
    """Return the checkpoint's names of the names that an entry may take, where a pair gives them.

    A `*` stands for any text, all else for itself. The first pair that fits counts.
    """
    found: dict[str, str] = {}
    absent = []
    for ours, theirs in entry.renames:
        bare = ours in model.tables
        left, right = (f"{ours}@*", f"{theirs}@*") if bare else (ours, theirs)
        fits = re.compile("(.*)".join(map(re.escape, left.split("*"))), re.DOTALL).fullmatch
        matches = {name: match for name in free if (match := fits(name)) is not None}
        for name, match in matches.items():
            found.setdefault(name, _filled(right, match.groups()))
        if matches or "*" in ours:
            continue
        if ours in model or bare:
            warnings.append(f"{entry}: oname {ours!r} is not loaded from this entry")
        else:
            absent.append(ours)
    hints = did_you_mean(absent, list(model) if absent else [])
    into = warnings if entry.ignore_error else problems
    into += [f"{entry}: the model has no {n!r}, which oname renames{hints[n]}" for n in absent]
    problems += [f"{entry}: {problem}" for problem in _complete(free, model, found)]
    return found


def _filled(pattern: str, texts: Sequence[str]) -> str:
    """Put texts in the places of the stars of a pattern."""
    first, *others = pattern.split("*")
    return first + "".join(text + part for text, part in zip(texts, others, strict=True))


def _complete(free: Sequence[str], model: ModelNames, found: dict[str, str]) -> list[str]:
    """Have a pair for one slot of a table count for all: ids and rows belong together.

    Return what is wrong.
    """
    problems = []
    tables: dict[str, set[str]] = {}
    for name, theirs in found.items():
        if name in model.slots:
            child, slot = model.slots[name]
            tables.setdefault(child, set()).add(theirs.removesuffix(f"@{slot}"))
            if not theirs.endswith(f"@{slot}"):
                problems.append(
                    f"oname makes {theirs!r} of {name!r}: tables can be renamed, slots cannot"
                )
    for name in free:
        child, slot = model.slots.get(name, ("", ""))
        if child not in tables or name in found:
            continue
        if len(tables[child]) > 1:
            of = ", ".join(map(repr, sorted(tables[child])))
            problems.append(
                f"oname takes slots of {child!r} from several tables, {of}: name {name!r}, too"
            )
        found[name] = f"{min(tables[child])}@{slot}"
    return problems
