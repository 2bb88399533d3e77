"""Compiles kernels, keeps their machine code on disk, and has the functions that kernels share.

`kernels` says what a word is.
"""

from __future__ import annotations

import functools
import logging
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import xxhash
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.core.caching import CompileResultCacheImpl, FunctionCache, IndexDataCacheFile
from numba.core.serialize import dumps
from numba.extending import intrinsic

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numba.core.base import BaseContext
    from numba.core.typing.context import Context
    from numba.core.typing.templates import Signature

    from .schema import Longs, Words

    Kernel = TypeVar("Kernel", bound=Callable[..., object])


_log = logging.getLogger(__name__)
_njit: Any = njit  # Numba's types leave out that it can make no wrappers

ZERO, ONE, LINE = np.uint64(0), np.uint64(1), np.uint64(8)
_S24, _S32, _S33, _S40 = (np.uint64(n) for n in (24, 32, 33, 40))
ROW = np.uint64(2**40 - 1)
_LOW32 = np.uint64(2**32 - 1)
# MurmurHash3's 64-bit finaliser: https://github.com/aappleby/smhasher
_MIX1, _MIX2 = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)


class _Checked(CompileResultCacheImpl):
    """Machine code with a digest: damaged code that still unpickles would end the process."""

    def reduce(self, cres: object) -> tuple[str, bytes]:
        code = dumps(super().reduce(cres))  # type: ignore[no-untyped-call]
        return xxhash.xxh3_128_hexdigest(code), code

    def rebuild(self, target_context: object, payload: tuple[str, bytes]) -> object:
        digest, code = payload
        if xxhash.xxh3_128_hexdigest(code) != digest:
            raise ValueError("its digest is another one")
        reduced = pickle.loads(code)  # noqa: S301  # Numba's own cache unpickles it, too
        return super().rebuild(target_context, reduced)  # type: ignore[no-untyped-call]


class KernelCache(FunctionCache):
    """Numba's cache on disk; its methods raise `OSError`, or any error if a file is damaged.

    Args:
        function: The kernel.
        shared: Files with functions that it calls.
    """

    _impl_class = _Checked

    def __init__(self, function: Callable[..., object], shared: Sequence[str] = ()) -> None:
        super().__init__(function)  # type: ignore[no-untyped-call]
        # Numba's own goes by the time and length of the kernel's file. Files that come out of a
        # wheel may all be of one time, and functions that kernels share are in other files.
        sources = tuple(map(_digest, (function.__code__.co_filename, __file__, *shared)))
        place = self._cache_path, self._impl.filename_base
        self._cache_file = IndexDataCacheFile(*place, sources)  # type: ignore[no-untyped-call]


@functools.cache
def _digest(file: str) -> str:
    return xxhash.xxh3_128_hexdigest(Path(file).read_bytes())


class _Forgiving:
    """A cache whose failures cost time, and nothing else."""

    def __init__(self, cache: Any, problem: Callable[[Exception], None]) -> None:  # noqa: ANN401
        self._cache = cache
        self._problem = problem

    def __getattr__(self, name: str) -> object:
        return getattr(self._cache, name)

    def load_overload(self, sig: object, target_context: object) -> object:
        try:
            return self._cache.load_overload(sig, target_context)
        except Exception as error:  # noqa: BLE001  # a damaged pickle raises any error
            self._problem(error)
        try:
            self._cache.flush()  # a damaged index would stand in the way of a new entry
        except Exception as error:  # noqa: BLE001  # not of the disk alone: Numba has errors of its own
            self._problem(error)
        return None

    def save_overload(self, sig: object, data: object) -> None:
        try:
            self._cache.save_overload(sig, data)
        except Exception as error:  # noqa: BLE001  # as above
            self._problem(error)


class Compiler:
    """Compiles functions for given signatures, at once.

    If the cache has no place, no room, or damaged files, every process compiles anew. That is
    logged once.

    Args:
        cache: Makes the cache of a function; raises if there is no place for it.
    """

    def __init__(self, cache: Callable[[Callable[..., object]], object]) -> None:
        self._cache = cache
        self._has_warned = False

    def __call__(self, signature: str) -> Callable[[Kernel], Kernel]:
        def compiled(function: Kernel) -> Kernel:
            dispatcher = _njit(nogil=True, no_cfunc_wrapper=True)(function)
            # `cache=True` would put Numba's own here: if that fails, the compiler fails.
            try:
                dispatcher._cache = _Forgiving(self._cache(function), self._warn)  # noqa: SLF001
            except (OSError, RuntimeError) as error:  # no place
                self._warn(error)
            dispatcher.compile(signature)
            dispatcher.disable_compile()
            return dispatcher  # type: ignore[no-any-return]

        return compiled

    def _warn(self, error: Exception) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        _log.warning(
            "the cache of compiled kernels cannot be used, so they are compiled anew, which takes "
            "seconds: %s: %s. Set NUMBA_CACHE_DIR to a folder that can be written to",
            type(error).__name__,
            error,
        )


def inline(function: Kernel) -> Kernel:
    """Compile a function that only kernels call."""
    return _njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)  # type: ignore[no-any-return]


@intrinsic
def prefetch(
    _typing: Context, array: types.Array, at: types.Integer
) -> tuple[Signature, Callable[..., object]]:
    """Fetch `array[at]` into the cache, and do not wait for it; the item need not be there."""

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
    # Each table draws a seed: ids that collide in one process do not in the next, so that no file
    # can be made to turn the index into a list.
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
    """Return an id's tag, in its place within a word."""
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


@inline
def owner_of(firsts: Longs, row: int) -> int:
    """Return the number of the segment, the run, or the part of a row, by their first rows."""
    low, high = 0, firsts.shape[0]
    while high - low > 1:
        middle = (low + high) >> 1
        if firsts[middle] <= row:
            low = middle
        else:
            high = middle
    return low
