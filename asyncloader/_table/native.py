"""What kernels need of C: memory by address, and calls of functions of which the address is known.

A kernel gets the address of a system call as an argument, so that a test can hand in another one.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import TYPE_CHECKING, NamedTuple

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

if TYPE_CHECKING:
    from collections.abc import Callable

    from numba.core.base import BaseContext
    from numba.core.typing.context import Context
    from numba.core.typing.templates import Signature

    Generated = tuple[Signature, Callable[..., object]]

_BYTE, _INT, _LONG = ir.IntType(8), ir.IntType(32), ir.IntType(64)
# Linux 5.10: before it, a read that may not wait refuses without having the device begin.
_BEGINS = (5, 10)


class SystemCalls(NamedTuple):
    """Addresses of functions of C that a kernel calls.

    Attributes:
        preadv2: `ssize_t (int, const struct iovec *, int, off_t, int)`.
        errno_location: `int *(void)`.
        fadvise: `int (int, off_t, off_t, int)`; 0 where `preadv2` itself has the device begin.
        syscall: `long (long, ...)`.
    """

    preadv2: int
    errno_location: int
    fadvise: int = 0
    syscall: int = 0

    @classmethod
    def of_system(cls) -> SystemCalls | None:
        """Return those of this process; `None` where there is no such call."""
        if sys.platform != "linux" or sys.maxsize < 2**32:
            return None
        library = ctypes.CDLL(None)
        try:
            preadv2, location, fadvise, syscall = (
                ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
                for name in ("preadv2", "__errno_location", "posix_fadvise", "syscall")
            )
        except AttributeError:  # an old library of C
            return None
        release = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
        return cls(preadv2, location, 0 if release >= _BEGINS else fadvise, syscall)


def _pointer(builder: ir.IRBuilder, address: ir.Value, to: ir.Type) -> ir.Value:
    return builder.inttoptr(address, to.as_pointer())


def _call(builder: ir.IRBuilder, values: list[ir.Value], result: ir.Type) -> ir.Value:
    address, *rest = values
    kind = ir.FunctionType(result, [_LONG] * len(rest))
    return builder.call(_pointer(builder, address, kind), rest)


def _of_whole_numbers(count: int) -> Generated:
    """Return what calls a function that takes so many whole numbers, and returns one."""

    def generate(
        _context: BaseContext, builder: ir.IRBuilder, _signature: Signature, values: list[ir.Value]
    ) -> object:
        return _call(builder, values, _LONG)

    return types.int64(*[types.int64] * (1 + count)), generate


# fmt: off
@intrinsic
def call4(_typing: Context, _at: object, _a: object, _b: object, _c: object, _d: object) -> Generated:  # noqa: E501
    """Call the function at an address with four whole numbers."""
    return _of_whole_numbers(4)


@intrinsic
def call5(_typing: Context, _at: object, _a: object, _b: object, _c: object, _d: object, _e: object) -> Generated:  # noqa: E501
    """Call the function at an address with five whole numbers."""
    return _of_whole_numbers(5)


@intrinsic
def call6(_typing: Context, _at: object, _a: object, _b: object, _c: object, _d: object, _e: object, _f: object) -> Generated:  # noqa: E501
    """Call the function at an address with six whole numbers."""
    return _of_whole_numbers(6)
# fmt: on


@intrinsic
def errno(_typing: Context, _address: object) -> Generated:
    """Return the number of the last error of this thread; takes the address of its function."""

    def generate(
        _context: BaseContext, builder: ir.IRBuilder, _signature: Signature, values: list[ir.Value]
    ) -> object:
        place = _call(builder, values, _INT.as_pointer())
        return builder.sext(builder.load(place), _LONG)

    return types.int64(types.int64), generate


@intrinsic
def copy(_typing: Context, _target: object, _source: object, _count: object) -> Generated:
    """Copy bytes from one address to another."""

    def generate(
        context: BaseContext, builder: ir.IRBuilder, _signature: Signature, values: list[ir.Value]
    ) -> object:
        target, source, count = values
        byte = _BYTE.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, byte, _LONG, ir.IntType(1)])
        move = builder.module.declare_intrinsic("llvm.memcpy", [byte, byte, _LONG], kind)
        places = (_pointer(builder, one, _BYTE) for one in (target, source))
        builder.call(move, [*places, count, ir.IntType(1)(0)])
        return context.get_dummy_value()  # type: ignore[no-untyped-call]

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def wipe(_typing: Context, _target: object, _count: object) -> Generated:
    """Write zeros to an address."""

    def generate(
        context: BaseContext, builder: ir.IRBuilder, _signature: Signature, values: list[ir.Value]
    ) -> object:
        target, count = values
        byte = _BYTE.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, _BYTE, _LONG, ir.IntType(1)])
        fill = builder.module.declare_intrinsic("llvm.memset", [byte, _LONG], kind)
        place = _pointer(builder, target, _BYTE)
        builder.call(fill, [place, _BYTE(0), count, ir.IntType(1)(0)])
        return context.get_dummy_value()  # type: ignore[no-untyped-call]

    return types.void(types.int64, types.int64), generate


@intrinsic
def fetch(_typing: Context, _address: object) -> Generated:
    """Fetch what stands at an address into the cache, and do not wait for it."""

    def generate(
        context: BaseContext, builder: ir.IRBuilder, _signature: Signature, values: list[ir.Value]
    ) -> object:
        place = _pointer(builder, values[0], _BYTE)
        kind = ir.FunctionType(ir.VoidType(), [place.type, _INT, _INT, _INT])
        ahead = builder.module.declare_intrinsic("llvm.prefetch", [place.type], kind)
        builder.call(ahead, [place, _INT(0), _INT(3), _INT(1)])
        return context.get_dummy_value()  # type: ignore[no-untyped-call]

    return types.void(types.int64), generate


@intrinsic
def half_at(_typing: Context, _address: object) -> Generated:
    """Return the 16 bits at an address, as an unsigned number."""

    def generate(
        _context: BaseContext, builder: ir.IRBuilder, _signature: Signature, values: list[ir.Value]
    ) -> object:
        bits = builder.load(_pointer(builder, values[0], ir.IntType(16)), align=1)
        return builder.zext(bits, _LONG)

    return types.uint64(types.int64), generate


@intrinsic
def put_word(_typing: Context, _address: object, _bits: object) -> Generated:
    """Write 32 bits to an address."""

    def generate(
        context: BaseContext, builder: ir.IRBuilder, _signature: Signature, values: list[ir.Value]
    ) -> object:
        address, bits = values
        place = _pointer(builder, address, _INT)
        builder.store(builder.trunc(bits, _INT), place, align=1)
        return context.get_dummy_value()  # type: ignore[no-untyped-call]

    return types.void(types.int64, types.uint64), generate
