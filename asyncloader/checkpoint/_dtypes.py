"""The element types of a safetensors file, without torch."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BY_TORCH", "DTYPES", "RECIS_DTYPES", "DType"]


@dataclass(frozen=True, slots=True)
class DType:
    """One element type."""

    name: str
    """As the shard header spells it: `F32`."""

    torch: str
    """As torch spells it, without the `torch.`: `float32`."""

    itemsize: int
    """Bytes an element."""

    def __str__(self) -> str:
        return self.torch


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
)

DTYPES = {dtype.name: dtype for dtype in _KNOWN}
"""By the header's spelling."""

RECIS_DTYPES = DTYPES | {"bool": _KNOWN[0]}
"""Likewise; RecIS's own saver writes `bool` in lower case, which safetensors refuses."""

BY_TORCH = {dtype.torch: dtype for dtype in _KNOWN}
"""By torch's name."""
