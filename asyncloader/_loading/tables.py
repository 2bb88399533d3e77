"""What hash tables can take."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from torch import Tensor

from asyncloader._checkpoint.dtypes import BY_TORCH
from asyncloader._planning.targets import RowType, TableTarget

if TYPE_CHECKING:
    from collections.abc import Mapping

    from asyncloader._table.protocol import LoadableTable, SavableTable


_log = logging.getLogger("asyncloader")

_UNNAMED = "hashtable"
"""The name of a table without a name of its own, in RecIS, too."""


def check_tables(
    tables: Mapping[str, LoadableTable] | Mapping[str, SavableTable],
    tensors: Mapping[str, object],
    *,
    able: str,
) -> None:
    """Refuse tables and tensors whose names could not be told apart.

    Args:
        tables: By any name.
        tensors: By name.
        able: The method that they are there for.

    Raises:
        TypeError: If one is no table.
        ValueError: If two take the same ids, or a tensor has the name of a table's child.
    """
    owners: dict[str, str] = {}
    for name, table in tables.items():
        if type(name) is not str or not hasattr(table, able):
            hint = "; dense tensors are passed as tensors=" if isinstance(table, Tensor) else ""
            problem = f"hashtables maps names to HashTables, got {name!r}: {type(table)}"
            raise TypeError(problem + hint)
        if list(table.children) == [_UNNAMED] != [name]:
            _log.warning(
                "hashtables[%r] is called %r on disk, the name of the table itself: make it with "
                "HashTable(..., name=%r)", name, _UNNAMED, name,
            )  # fmt: skip
        for child in table.children:
            if child in tensors:
                raise ValueError(f"both a tensor and a table (hashtables[{name!r}]) are {child!r}")
            other = owners.setdefault(child, name)
            if other != name:
                raise ValueError(
                    f"hashtables {other!r} and {name!r} both take the ids of {child!r}"
                )


def describe_tables(tables: Mapping[str, LoadableTable]) -> dict[str, TableTarget]:
    """Describe the destinations, by the name of each child.

    Raises:
        ValueError: If a slot has a dtype that no checkpoint holds.
    """
    targets: dict[str, TableTarget] = {}
    for name, table in tables.items():
        slots = {}
        for slot in table.slots().values():
            dtype = BY_TORCH.get(str(slot.dtype).removeprefix("torch."))
            if dtype is None:
                raise ValueError(f"hashtables[{name!r}]: no checkpoint can hold {slot.dtype}")
            slots[slot.name] = RowType(shape=slot.shape, dtype=dtype)
        target = TableTarget(
            name=name, children=tuple(table.children), slice=table.slice, slots=slots
        )
        targets |= dict.fromkeys(table.children, target)
    return targets
