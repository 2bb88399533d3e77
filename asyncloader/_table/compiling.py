"""Compiles kernels, and keeps their machine code on disk where that can be done."""

from __future__ import annotations

import logging
import pickle
from typing import TYPE_CHECKING, Any, TypeVar, cast

import xxhash
from numba import njit
from numba.core.caching import CompileResultCacheImpl, FunctionCache
from numba.core.serialize import dumps

if TYPE_CHECKING:
    from collections.abc import Callable

    Kernel = TypeVar("Kernel", bound=Callable[..., object])


_log = logging.getLogger(__name__)


class _Checked(CompileResultCacheImpl):
    """Machine code with a digest: a damaged one that still unpickles would end the process."""

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
    """Numba's cache on disk; its methods raise `OSError`, or anything if a file is damaged."""

    _impl_class = _Checked


class _Forgiving:
    """A cache that costs time where it fails, and nothing else."""

    def __init__(self, cache: Any, problem: Callable[[Exception], None]) -> None:  # noqa: ANN401
        self._cache = cache
        self._problem = problem

    def __getattr__(self, name: str) -> object:
        return getattr(self._cache, name)

    def load_overload(self, sig: object, target_context: object) -> object:
        try:
            return self._cache.load_overload(sig, target_context)
        except Exception as error:  # noqa: BLE001  # a damaged pickle raises anything
            self._problem(error)
        try:
            self._cache.flush()  # a damaged index would stand in the way of a new entry
        except Exception as error:  # noqa: BLE001  # Numba adds its own to those of the disk
            self._problem(error)
        return None

    def save_overload(self, sig: object, data: object) -> None:
        try:
            self._cache.save_overload(sig, data)
        except Exception as error:  # noqa: BLE001  # as above
            self._problem(error)


class Compiler:
    """Compiles functions for given signatures, at once.

    Where the cache has no place, no room, or damaged files, every process compiles anew. That is
    logged once.

    Args:
        cache: Makes the cache of a function; raises where it has no place for it.
    """

    def __init__(self, cache: Callable[[Callable[..., object]], object]) -> None:
        self._cache = cache
        self._has_warned = False

    def __call__(self, signature: str) -> Callable[[Kernel], Kernel]:
        def compiled(function: Kernel) -> Kernel:
            # Numba's types leave `no_cfunc_wrapper` out.
            njit_with = cast("Any", njit)
            dispatcher = njit_with(nogil=True, no_cfunc_wrapper=True)(function)
            # `cache=True` would put Numba's own here, which lets everything fail with it.
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
