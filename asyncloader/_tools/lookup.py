"""Finds what a name on the command line means."""

from __future__ import annotations

import heapq
import os
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from asyncloader._checkpoint.stored import stored_names
from asyncloader._planning.hints import did_you_mean

if TYPE_CHECKING:
    from asyncloader._checkpoint.index import Catalog


# As many as `did_you_mean` compares.
_LIKELY = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A dense tensor (no table), a slot of a table, or (no slot either) all of a table."""

    name: str
    table: str | None = None
    slot: str | None = None


def find_target(location: str, catalog: Catalog, name: str) -> Target:
    """Return what goes by a name: a tensor, or else a table's slot, or else a table.

    Raises:
        KeyError: If there is nothing.
    """
    if name in catalog.tensors:
        return Target(name=name)
    return find_table(location, catalog, name)


def find_table(location: str, catalog: Catalog, name: str) -> Target:
    """Return the slot or the table that goes by a name.

    Raises:
        KeyError: If there is nothing.
    """
    table, at, slot = name.rpartition("@")
    if at and slot in catalog.tables.get(table, {}):
        return Target(name=name, table=table, slot=slot)
    if name in catalog.tables:
        return Target(name=name, table=name)
    if name in catalog.tensors:
        raise KeyError(f"{location}: {name!r} is a dense tensor, it has no ids; a table has")
    known = [*catalog.tables, *stored_names(catalog)]
    likely = heapq.nlargest(_LIKELY, known, partial(_in_common, name))
    raise KeyError(
        f"{location}: nothing in it is called {name!r}{did_you_mean([name], likely)[name]}; "
        "`asyncloader inspect --all` lists what there is"
    )


def _in_common(one: str, other: str) -> int:
    return len(os.path.commonprefix((one, other)))  # noqa: RUF071  # any text, not only paths
