"""Where an id's word stands in the index, for kernels: hash, part, line, tag, and the search.

`kernels` says what a word is. Numba's cache looks at the file of a kernel alone: after a change of
this file, touch `kernels.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.extending import intrinsic

if TYPE_CHECKING:
    from collections.abc import Callable

    from numba.core.base import BaseContext
    from numba.core.typing.context import Context
    from numba.core.typing.templates import Signature
    from numpy.typing import NDArray

    Longs = NDArray[np.int64]
    Words = NDArray[np.uint64]


ZERO, ONE, LINE = np.uint64(0), np.uint64(1), np.uint64(8)
_S24, _S32, _S33, _S40 = (np.uint64(n) for n in (24, 32, 33, 40))
ROW = np.uint64(2**40 - 1)
_LOW32 = np.uint64(2**32 - 1)
# MurmurHash3's 64-bit finaliser: https://github.com/aappleby/smhasher
_MIX1, _MIX2 = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)

inline = njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)


@intrinsic
def prefetch(
    _typing: Context, array: types.Array, at: types.Integer
) -> tuple[Signature, Callable[..., object]]:
    """Fetch `array[at]` into the cache, without waiting for it; there need not be such an item."""

    def generate(
        context: BaseContext, builder: ir.IRBuilder, _signature: Signature, values: list[ir.Value]
    ) -> object:
        data = context.make_array(array)(context, builder, values[0]).data  # type: ignore[no-untyped-call]
        item = builder.gep(data, [values[1]])
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [item.type, number, number, number])
        fetch = builder.module.declare_intrinsic("llvm.prefetch", [item.type], kind)
        builder.call(fetch, [item, number(0), number(3), number(1)])  # to read, keep, data
        return context.get_dummy_value()  # type: ignore[no-untyped-call]

    return types.void(array, at), generate


@inline
def hash_of(id_: np.int64, seed: np.uint64) -> np.uint64:
    # The seed is drawn per table: ids that collide in one process do not in the next, so that a
    # file cannot be made to turn the index into a list.
    h = np.uint64(id_) ^ seed
    h ^= h >> _S33
    h *= _MIX1
    h ^= h >> _S33
    h *= _MIX2
    h ^= h >> _S33
    return h


@inline
def part_of(h: np.uint64, parts: np.uint64) -> np.uint64:
    return ((h >> _S32) * parts) >> _S32


@inline
def home_of(h: np.uint64, part: np.uint64, capacity: np.uint64) -> np.uint64:
    """Return the first slot of an id's line."""
    line = (((h >> _S24) & _LOW32) * (capacity // LINE)) >> _S32
    return part * capacity + line * LINE


@inline
def tag_of(h: np.uint64) -> np.uint64:
    """Return an id's tag, where it stands in a word."""
    return (h | ONE) << _S40


@inline
def seek(
    words: Words, home: np.uint64, capacity: np.uint64, tag: np.uint64, ids: Longs, id_: np.int64
) -> np.uint64:
    """Return the slot in which an id stands, or the free one in which it would."""
    end = (home // capacity + ONE) * capacity
    slot = home
    there = words[slot]
    while there != ZERO and (there ^ tag > ROW or ids[(there & ROW) - ONE] != id_):
        slot += ONE
        if slot == end:
            slot -= capacity
        there = words[slot]
    return slot
