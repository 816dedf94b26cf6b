"""Room to write in, inside compiled loops, in a form that the compiler knows as well as what it had allocated itself."""

# mypy: ignore-errors
# The types in here are numba's.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array


def _matrix(_context: Any, flat: Any, rows: Any, columns: Any) -> tuple[Any, Callable[..., Any]]:
    """The beginning of a vector as a matrix; ``columns`` is a constant.

    Its strides are known when the loops are compiled; those of an argument are not, which costs the polishing loop what
    `benchmarks/bench_gptq.py` notices.
    """
    made_type = types.Array(flat.dtype, 2, "C")
    width = columns.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source = context.make_array(signature.args[0])(context, builder, arguments[0])
        made = context.make_array(made_type)(context, builder)
        size = context.get_abi_sizeof(context.get_data_type(flat.dtype))

        def number(value: int) -> Any:
            return context.get_constant(types.intp, value)

        height = context.cast(builder, arguments[1], signature.args[1], types.intp)
        populate_array(
            made,
            data=source.data,
            shape=[height, number(width)],
            strides=[number(width * size), number(size)],
            itemsize=number(size),
            meminfo=None,
        )
        return made._getvalue()

    return made_type(flat, rows, columns), generate


matrix: Any = intrinsic(prefer_literal=True)(_matrix)
