"""Tells a slot whose name holds `@` from a table whose name does."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

T = TypeVar("T")

_ID = "id"


def with_long_slots(tables: Mapping[str, Mapping[str, T]]) -> dict[str, dict[str, T]]:
    """Return tables and their slots, given those that names split at their last `@` come to.

    `t@a@b` is slot `b` of a table `t@a`, if that has ids; else slot `a@b` of `t`, if that has. A
    table without ids anywhere stays as it is, for a message that names it.
    """
    found = {table: dict(slots) for table, slots in tables.items()}
    for table in [table for table, slots in tables.items() if "@" in table and _ID not in slots]:
        owner, rest = table, ""
        while "@" in owner:
            owner, _, part = owner.rpartition("@")
            rest = f"{part}@{rest}"
            if _ID in tables.get(owner, ()):
                found[owner] |= {f"{rest}{slot}": held for slot, held in found.pop(table).items()}
                break
    return found


def split_name(tables: Mapping[str, Collection[str]], name: str) -> tuple[str, str]:
    """Return table and slot of `table@slot`; two texts that are none if there is no such slot."""
    at = name.rfind("@")
    while at > 0 and name[at + 1 :] not in tables.get(name[:at], ()):
        at = name.rfind("@", 0, at)
    return name[: max(at, 0)], name[at + 1 :]
