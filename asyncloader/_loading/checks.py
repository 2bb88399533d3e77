"""Which tensors and tables can be loaded and saved, and how to replace the others."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from operator import attrgetter
from typing import TYPE_CHECKING, Literal

import torch
from torch.nn.parameter import is_lazy

from asyncloader._checkpoint.dtypes import BY_TORCH, TensorType
from asyncloader._disk_table.table import DiskTable
from asyncloader._planning.targets import TableTarget

if TYPE_CHECKING:
    from asyncloader._checkpoint.dtypes import DType
    from asyncloader._table.protocol import LoadableTable, SavableTable


_log = logging.getLogger("asyncloader")

_UNNAMED = "hashtable"
"""The name of a table without a name of its own, in RecIS, too."""

_PLAIN = {torch.Tensor, torch.nn.Parameter}

_SPARSE = {
    "filled": "fill a dense one (`to_dense()`), and convert that afterwards",
    "saved": "pass its `to_dense()`, or its indices and values under names of their own",
}
_QUANTIZED = {
    "filled": "fill a float tensor, and quantize that afterwards",
    "saved": "pass its `dequantize()`, or its `int_repr()`, scale and zero point",
}


def check_tensors(tensors: Mapping[str, object], *, able: Literal["filled", "saved"]) -> None:
    """Refuse objects that are no tensors, and tensors without memory that can be used as it lies.

    Raises:
        TypeError: If one is no tensor, or a name is no text.
        ValueError: If one has no plain memory; the message says what to pass in its place.
    """
    given: list[torch.Tensor] = []
    for name, tensor in tensors.items():
        if type(name) is not str or not isinstance(tensor, torch.Tensor):
            wrong = f"tensors maps names to torch tensors, got {name!r}: {type(tensor)}"
            raise TypeError(wrong + _remedy(tensor))
        given.append(tensor)
    if _are_plain(given):
        return
    for name, tensor in zip(tensors, given, strict=True):
        problem = _problem(tensor, able)
        if problem:
            raise ValueError(
                f"tensors[{name!r}] {problem}; only plain strided tensors can be {able}"
            )


def _remedy(value: object) -> str:
    if isinstance(value, bool | int | float):
        return f"; pass torch.tensor({value!r})"
    if isinstance(value, Mapping):
        return "; make it flat, with a name for each tensor"
    return ""


def _are_plain(tensors: list[torch.Tensor]) -> bool:
    """Say whether all are surely plain, as nearly always; asked of all at once."""
    return (
        set(map(type, tensors)) <= _PLAIN
        and set(map(attrgetter("layout"), tensors)) <= {torch.strided}
        and not any(map(attrgetter("is_meta"), tensors))
        and not any(map(attrgetter("is_quantized"), tensors))
        and not any(map(attrgetter("is_nested"), tensors))
        and all(map(_has_memory, tensors))
    )


def _has_memory(tensor: torch.Tensor) -> bool:
    try:
        if not tensor.data_ptr():  # empty, or let go of for now; or there never was any
            tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _problem(  # noqa: PLR0911  # one for each kind
    tensor: torch.Tensor, able: Literal["filled", "saved"]
) -> str | None:
    """Return why a tensor cannot be filled or saved, and a remedy; `None` if it can."""
    if is_lazy(tensor):
        return "is not initialized yet: run its module once, with some batch, and then pass it"
    if any(kind.__name__ == "FakeTensor" for kind in type(tensor).__mro__):
        return "is a fake tensor, which has no values: make it outside of FakeTensorMode"
    if hasattr(tensor, "to_local"):
        return f"is a {type(tensor).__name__}, spread over processes: pass its `.to_local()`"
    if tensor.is_meta:
        return (
            "is on the meta device and has no memory: give its module some first, "
            "`module.to_empty(device='cpu')`, and then pass its tensors"
        )
    if tensor.is_nested:
        return "is nested: pass its `.values()`"
    if tensor.layout != torch.strided:
        return f"is laid out as {tensor.layout}: {_SPARSE[able]}"
    if tensor.is_quantized:
        return f"is quantized: {_QUANTIZED[able]}"
    if not _has_memory(tensor):
        return (
            f"is a {type(tensor).__name__} without memory of its own, a wrapper, or one that "
            "`torch.func` or `functionalize` made: pass the plain tensors that it stands for"
        )
    return None


def stored_dtype(dtype: torch.dtype) -> DType | None:
    """Return a dtype as checkpoints know it, or `None` if no checkpoint can hold it."""
    return BY_TORCH.get(str(dtype).removeprefix("torch."))


def check_tables(
    tables: Mapping[str, LoadableTable] | Mapping[str, SavableTable],
    tensors: Mapping[str, object],
    *,
    able: str,
) -> None:
    """Refuse tables without the method `able`, and names that could not be told apart.

    Raises:
        TypeError: If one is no table.
        ValueError: If two take the same ids, or a tensor has the name of a table's child.
    """
    owners: dict[str, str] = {}
    for name, table in tables.items():
        if type(name) is not str or not hasattr(table, able):
            dense = isinstance(table, torch.Tensor)
            hint = "; dense tensors are passed as tensors=" if dense else ""
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
            dtype = stored_dtype(slot.dtype)
            if dtype is None:
                raise ValueError(f"hashtables[{name!r}]: no checkpoint can hold {slot.dtype}")
            slots[slot.name] = TensorType(dtype, slot.shape)
        children = tuple(table.children)
        locates = isinstance(table, DiskTable)
        target = TableTarget(
            name=name, children=children, slice=table.slice, slots=slots, locates=locates
        )
        targets |= dict.fromkeys(children, target)
    return targets
