"""Says which values may be converted to another dtype on their way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from asyncloader._display import AsDict

if TYPE_CHECKING:
    from asyncloader._checkpoint.dtypes import DType


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Cast(AsDict):
    """Values that are converted on their way to a destination."""

    name: str
    """The destination: a dense tensor, or `table@slot`."""

    source: str
    """The dtype in the checkpoint, as torch spells it: `bfloat16`."""

    target: str
    """The destination's dtype."""

    def __str__(self) -> str:
        return f"{self.name}: {self.source} to {self.target}"


def can_cast(source: DType, target: DType, casting: Casting | None) -> bool:
    """Say whether values may be converted; `None` allows no conversion."""
    if casting is None:
        return False
    if casting == "widen":
        return target.torch in _WIDER.get(source.torch, ())
    return any({source.torch, target.torch} <= kind for kind in (_FLOATS, _INTEGERS))


def cast_hint(source: DType, target: DType) -> str:
    """Return the end of a sentence that says dtypes differ: how to have them converted."""
    if can_cast(source, target, "widen"):
        return '; cast="widen" converts it, and loses no value'
    if can_cast(source, target, "any"):
        return '; cast="any" converts it as Tensor.to() does: it rounds, and may lose values'
    return "; cast= converts only floats to floats, and integers to integers"


def checked_cast(cast: object) -> Casting | None:
    """Return an allowed `cast`.

    Raises:
        ValueError: If it is something else.
    """
    allowed: tuple[Casting | None, ...] = (None, "widen", "any")
    for known in allowed:
        if cast == known:
            return known
    raise ValueError(f"cast is 'widen', 'any' or None, got {cast!r}")
