"""What Numba has no name for: telling the processor which memory will be wanted soon.

Numba's cache looks at the file of a kernel alone: who changes this one has to touch `_kernels.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

if TYPE_CHECKING:
    from collections.abc import Callable

    from numba.core.base import BaseContext
    from numba.core.typing.context import Context
    from numba.core.typing.templates import Signature


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
