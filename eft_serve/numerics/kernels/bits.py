"""What the compiled kernels share: how they are compiled, and operations on bits that numba has no name for.

numba keeps compiled code beside the file of each kernel and looks at that file alone: after a change here, touch them.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any, TypeVar

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]
Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function, fastmath: Set[str] = frozenset()) -> Function:
    """At the first call, and kept beside its file or in the user's cache; where neither can be written, every time.

    Args:
        function: of arrays and numbers.
        fastmath: LLVM's liberties; with none every operation is rounded by itself, in the order that is written.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": set(fastmath)}
    try:
        found: Function = njit(cache=True, **options)(function)
    except RuntimeError:
        found = njit(**options)(function)
    return found


def _operation(result: Any, arguments: tuple[Any, ...], build: Callable[..., Any]) -> Any:
    """A function of compiled code that `build(builder, *values)` detokenizes in LLVM's instructions."""

    def typed() -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            return build(builder, *values)

        return result(*arguments), generate

    if len(arguments) == 1:
        return intrinsic(lambda typing, a: typed())
    return intrinsic(lambda typing, a, b: typed())


_INT, _FLOAT = ir.IntType(32), ir.FloatType()


def _const(value: int) -> Any:
    return ir.Constant(_INT, value)


def _in_order(builder: Any, bits: Any) -> Any:
    """Its own inverse: negative numbers' other bits are turned round."""
    return builder.xor(bits, builder.and_(builder.ashr(bits, _const(31)), _const(0x7FFFFFFF)))


def _build_order_key(builder: Any, number: Any) -> Any:
    return _in_order(builder, builder.bitcast(number, _INT))


def _build_from_order_key(builder: Any, key: Any) -> Any:
    return builder.bitcast(_in_order(builder, key), _FLOAT)


def _build_magnitude(builder: Any, number: Any) -> Any:
    return builder.and_(builder.bitcast(number, _INT), _const(0x7FFFFFFF))


def _build_times_power(builder: Any, number: Any, rounded: Any) -> Any:
    exponent = builder.shl(builder.bitcast(rounded, _INT), _const(23))
    return builder.bitcast(builder.add(builder.bitcast(number, _INT), exponent), _FLOAT)


def _build_as_float(builder: Any, bits: Any) -> Any:
    return builder.bitcast(bits, _FLOAT)


def _build_widen_bfloat16(builder: Any, half: Any) -> Any:
    return builder.bitcast(builder.shl(builder.zext(half, _INT), _const(16)), _FLOAT)


def _build_widen_float16(builder: Any, half: Any) -> Any:
    return builder.fpext(builder.bitcast(half, ir.HalfType()), _FLOAT)


def _pointer_to(item: Any) -> Callable[..., Any]:
    return lambda builder, address: builder.inttoptr(address, item.as_pointer())


order_key = _operation(types.int32, (types.float32,), _build_order_key)  # integers in the order of the numbers
from_order_key = _operation(types.float32, (types.int32,), _build_from_order_key)
magnitude = _operation(types.int32, (types.float32,), _build_magnitude)  # the bits without the sign
times_power = _operation(types.float32, (types.float32, types.float32), _build_times_power)  # 2ⁿ, n the lowest bits
as_float = _operation(types.float32, (types.int32,), _build_as_float)
widen_bfloat16 = _operation(types.float32, (types.uint16,), _build_widen_bfloat16)
widen_float16 = _operation(types.float32, (types.uint16,), _build_widen_float16)
float32_at = _operation(types.CPointer(types.float32), (types.int64,), _pointer_to(_FLOAT))  # type: ignore[no-untyped-call]
uint16_at = _operation(types.CPointer(types.uint16), (types.int64,), _pointer_to(ir.IntType(16)))  # type: ignore[no-untyped-call]
