"""Rows on their way from one address to another, as kernels move them."""

from __future__ import annotations

import numpy as np

from asyncloader._table.compiling import inline
from asyncloader._table.native import copy, fetch, half_at, put_word

_SIGN, _EXPONENT, _FRACTION = np.uint64(0x8000), np.uint64(0x1F), np.uint64(0x3FF)
_LINE = 64
_MOST_FETCHED = 512


@inline
def _widened(half: np.uint64, form: int) -> np.uint64:
    """Return the bits of a float32 for those of a bfloat16 (form 1) or float16 (form 2)."""
    if form == 1:
        return half << np.uint64(16)
    sign = (half & _SIGN) << np.uint64(16)
    exponent = (half >> np.uint64(10)) & _EXPONENT
    fraction = half & _FRACTION
    if exponent == _EXPONENT:
        quiet = np.uint64(0x400000) if fraction else np.uint64(0)
        return sign | np.uint64(0x7F800000) | quiet | (fraction << np.uint64(13))
    if exponent == np.uint64(0):
        if fraction == np.uint64(0):
            return sign
        exponent = np.uint64(1)
        while not fraction & np.uint64(0x400):
            fraction <<= np.uint64(1)
            exponent -= np.uint64(1)
        fraction &= _FRACTION
    return sign | ((exponent + np.uint64(112)) << np.uint64(23)) | (fraction << np.uint64(13))


@inline
def put_row(target: int, source: int, width: int, form: int) -> None:
    """Copy a row of `width` bytes as it is (form 0), or widen it (1: bfloat16, 2: float16)."""
    if form == 0:
        copy(target, source, width)
        return
    for at in range(width >> 1):
        put_word(target + 4 * at, _widened(half_at(source + 2 * at), form))


@inline
def fetch_row(address: int, width: int) -> None:
    for at in range(0, min(width, _MOST_FETCHED), _LINE):
        fetch(address + at)
