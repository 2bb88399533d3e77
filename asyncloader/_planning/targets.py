"""Describes destinations, as plain values, and the conversions that their dtypes allow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from asyncloader._checkpoint.blocks import Columns
from asyncloader._checkpoint.dtypes import TensorType
from asyncloader._checkpoint.parts import ID
from asyncloader._display import AsDict

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from collections.abc import Set as AbstractSet

    from asyncloader._checkpoint.dtypes import DType
    from asyncloader._checkpoint.slices import Slice


LoadInfo = dict[str, dict[str, list[str]]]
"""The plan that a `filter_func` may change: `{destination: {source: [slot, …]}}`."""

Casting = Literal["widen", "any"]
"""Which conversions a load may make."""

# To which dtypes each goes without the loss of a value.
_WIDER = {
    "float8_e4m3fn": {"float16", "bfloat16", "float32", "float64"},
    "float8_e5m2": {"float16", "bfloat16", "float32", "float64"},
    "float8_e4m3fnuz": {"float16", "bfloat16", "float32", "float64"},
    "float8_e5m2fnuz": {"float16", "bfloat16", "float32", "float64"},
    "float8_e8m0fnu": {"bfloat16", "float32", "float64"},  # powers of two, from -127 to 127
    "float16": {"float32", "float64"},
    "bfloat16": {"float32", "float64"},
    "float32": {"float64"},
    "float64": set[str](),
    "int8": {"int16", "int32", "int64"},
    "int16": {"int32", "int64"},
    "int32": {"int64"},
    "int64": set[str](),
    "uint8": {"uint16", "int16", "uint32", "int32", "uint64", "int64"},
    "uint16": {"uint32", "int32", "uint64", "int64"},
    "uint32": {"uint64", "int64"},
    "uint64": set[str](),
}
# An integer that stands where a float is wanted is a quantized value without its scale, or a count;
# a bool is a mask. None of them means the number that `Tensor.to` would make of it.
_FLOATS = {name for name in _WIDER if "float" in name}
_INTEGERS = _WIDER.keys() - _FLOATS


@dataclass(eq=False, repr=False, kw_only=True)
class TensorTargets(Columns[TensorType]):
    """Dense tensors by name. Equal numbers in `memory` are the same memory; `None`: none is."""

    memory: Sequence[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.memory is None or len(self.memory) == len(self)

    def at(self, number: int) -> TensorType:
        return self.types[int(self.kinds[number])]


@dataclass(frozen=True, slots=True, kw_only=True)
class TableTarget:
    """A hash table."""

    name: str
    children: tuple[str, ...]
    slice: Slice
    slots: Mapping[str, TensorType]  # a row of each slot but the ids
    locates: bool = False  # whether rows stay in the checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """All that a load may fill. No tensor has the name of a table's child."""

    tensors: TensorTargets
    tables: Mapping[str, TableTarget]  # by child, so a coalesced table stands here several times


def default_load_info(targets: Targets) -> LoadInfo:
    """Map every child of every table, and every tensor, to itself."""
    info: LoadInfo = {
        child: {child: [ID, *target.slots]} for child, target in targets.tables.items()
    }
    return info | {name: {name: []} for name in targets.tensors}


def checked_load_info(info: object) -> LoadInfo:
    """Return the value of a `filter_func`; raise a `TypeError` if its form is wrong."""
    form = "{destination: {source: [slot, ...]}}"
    if not isinstance(info, dict):
        raise TypeError(f"filter_func must return the dict {form}, got {type(info).__name__}")
    for destination, sources in info.items():
        if not isinstance(destination, str) or not isinstance(sources, dict):
            raise TypeError(f"filter_func must return {form}, got {destination!r}: {sources!r}")
        for source, slots in sources.items():
            names = isinstance(slots, list | tuple) and all(isinstance(s, str) for s in slots)
            if not isinstance(source, str) or not names:
                got = f"{destination!r}: {{{source!r}: {slots!r}}}"
                raise TypeError(f"filter_func must return {form}, got {got}")
    return info


@dataclass(frozen=True, slots=True, kw_only=True)
class Cast(AsDict):
    """Values that are converted on their way to a destination.

    Attributes:
        name: The destination: a dense tensor, or `table@slot`.
        source: The dtype in the checkpoint, as torch spells it: `bfloat16`.
        target: The destination's dtype.
    """

    name: str
    source: str
    target: str

    def __str__(self) -> str:
        return f"{self.name}: {self.source} to {self.target}"


def can_cast(source: DType, target: DType, casting: Casting | None) -> bool:
    """Say whether values may be converted; `None` allows no conversion."""
    if casting is None:
        return False
    if casting == "widen":
        return target.torch in _WIDER.get(source.torch, ())
    return any({source.torch, target.torch} <= kind for kind in (_FLOATS, _INTEGERS))


def misfit(have: TensorType, want: TensorType, casting: Casting | None) -> str | None:
    """Return `None` if values fit, perhaps converted.

    Otherwise return the end of a sentence about them: how to have them converted, if only their
    dtypes differ.
    """
    if have.shape != want.shape:
        return ""
    if have.dtype == want.dtype or can_cast(have.dtype, want.dtype, casting):
        return None
    if can_cast(have.dtype, want.dtype, "widen"):
        return '; cast="widen" converts it, and loses no value'
    if can_cast(have.dtype, want.dtype, "any"):
        return '; cast="any" converts it as Tensor.to() does: it rounds, and may lose values'
    return "; cast= converts only floats to floats, and integers to integers"


def misfit_on_disk(have: DType, want: DType, others: AbstractSet[DType]) -> str | None:
    """Do as `misfit` for rows that stay on the disk, beside those of `others`."""
    widens = have.torch in {"bfloat16", "float16"} and want.torch == "float32"
    if have != want and not widens:
        return (
            "; rows that stay on the disk are converted from bfloat16 and float16 to float32 only"
        )
    if others - {have}:
        return "; rows that stay on the disk are of one dtype in all parts"
    return None


def checked_cast(cast: object) -> Casting | None:
    """Return an allowed `cast`; raise a `ValueError` if it is not allowed."""
    allowed: tuple[Casting | None, ...] = (None, "widen", "any")
    for known in allowed:
        if cast == known:
            return known
    raise ValueError(f"cast is 'widen', 'any' or None, got {cast!r}")
