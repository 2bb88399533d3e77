"""The element types of a safetensors file, without torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping


_F4 = "F4"
# Of element types for which torch has no dtype, or none of that size.
_BITS = {_F4: 4, "F6_E2M3": 6, "F6_E3M2": 6}
# Torch's own names are in lower case, so no unknown type is taken for one of them.
_NAME = re.compile(r"[A-Z][A-Z0-9_]{0,31}")


@dataclass(frozen=True, slots=True)
class DType:
    """One element type.

    Attributes:
        name: As the shard header spells it: `F32`.
        torch: As torch spells it, without `torch.`: `float32`; as the header, if torch has none.
        itemsize: Bytes of one of torch's elements; `None` if torch has no such type.
    """

    name: str
    torch: str
    itemsize: int | None

    @property
    def bits(self) -> int | None:
        """Bits that one of the header's elements takes; `None` if that is not known."""
        return _BITS.get(self.name, None if self.itemsize is None else 8 * self.itemsize)

    @property
    def lack(self) -> str:
        """What it is, in words, if torch has no such type."""
        if self.is_refused:
            return f"a {self.name}, which is not read: ask for other tensors only"
        return f"{self.name}, which torch does not have"

    @property
    def is_refused(self) -> bool:
        """Whether this is no dtype, but the kind of a tensor that is not read at all."""
        return self.itemsize is None and _NAME.fullmatch(self.name) is None

    @property
    def is_number(self) -> bool:
        """Whether one of torch's elements is one of the header's; else no number is known."""
        return self.itemsize is not None and self.bits == 8 * self.itemsize

    def __str__(self) -> str:
        return self.torch


class TensorType(NamedTuple):
    """The dtype and shape of a tensor, or of one row of a slot."""

    dtype: DType
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


# https://github.com/huggingface/safetensors, `Dtype`; RecIS writes the first ten.
_KNOWN = (
    DType("BOOL", "bool", 1),
    DType("I8", "int8", 1),
    DType("U8", "uint8", 1),
    DType("I16", "int16", 2),
    DType("I32", "int32", 4),
    DType("I64", "int64", 8),
    DType("F16", "float16", 2),
    DType("BF16", "bfloat16", 2),
    DType("F32", "float32", 4),
    DType("F64", "float64", 8),
    DType("U16", "uint16", 2),
    DType("U32", "uint32", 4),
    DType("U64", "uint64", 8),
    DType("F8_E4M3", "float8_e4m3fn", 1),
    DType("F8_E5M2", "float8_e5m2", 1),
    DType("C64", "complex64", 8),
    DType("F8_E8M0", "float8_e8m0fnu", 1),
    DType("F8_E4M3FNUZ", "float8_e4m3fnuz", 1),
    DType("F8_E5M2FNUZ", "float8_e5m2fnuz", 1),
    DType(_F4, "float4_e2m1fn_x2", 1),
)

DTYPES = {dtype.name: dtype for dtype in _KNOWN}  # by the header's spelling
BY_TORCH = {dtype.torch: dtype for dtype in _KNOWN}  # by torch's name
# RecIS's own saver writes `bool` in lower case: safetensors refuses it.
RECIS_DTYPES = DTYPES | {"bool": _KNOWN[0]}


def dtype_called(name: str, known: Mapping[str, DType]) -> DType | None:
    """Return the element type that a header names, or `None` if no type can have that name.

    A type that is not known keeps no other tensor from being read.
    """
    found = known.get(name)
    return DType(name, name, None) if found is None and _NAME.fullmatch(name) else found


def torch_type(dtype: DType, shape: tuple[int, ...]) -> TensorType:
    """Return torch's dtype and shape, given the header's.

    Two `F4` are one element of torch's, along the last dimension. Where that is odd torch has none.
    """
    if dtype.name != _F4:
        return TensorType(dtype, shape)
    if not shape or shape[-1] % 2:
        return TensorType(DType(_F4, _F4, None), shape)
    return TensorType(dtype, (*shape[:-1], shape[-1] // 2))


def header_shape(dtype: DType, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the header's shape, given torch's dtype and shape.

    Raises:
        ValueError: If a header cannot express it.
    """
    if dtype.name != _F4 or dtype.itemsize is None:
        return shape
    if not shape:
        raise ValueError(f"a scalar of {dtype} is no {_F4}, of which two are one element: reshape")
    return (*shape[:-1], 2 * shape[-1])
