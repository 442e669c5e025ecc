"""States that are read in a raw loop, branch or checkpoint, with no twin around it.

JAX keeps the jaxpr of such a body by the identity of the function, and uses it again
whenever the same function is passed. A value that was read while it was traced would be
the old one by then. So what goes into the jaxpr is not the value but the question for it:
a callback, that is asked in each run. That is slower than a twin, and right.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._cell import Cell, Value, committed
from ._errors import StateTraceError, lesson
from ._structure import flat_of, leaves_of


def look_up_at_run_time(cell: Cell) -> Value:
    """The value as tracers, that are the State's present arrays in every run.

    **Raises:** when it runs, `statefun.StateTraceError` (inside of JAX's own error) if
    the State holds something of another structure, shape or dtype by then.
    """
    flat, structure = committed(cell)
    before = leaves_of(flat, structure)
    data = [_data(x) for x in before]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in data]

    def present() -> list[np.ndarray]:
        flat, now = committed(cell)
        arrays = [_data(x) for x in leaves_of(flat, now)]
        same = now is structure and all(
            (x.shape, x.dtype) == (s.shape, s.dtype)
            for x, s in zip(arrays, shapes, strict=True)
        )
        if not same:
            raise _changed(cell)
        return [np.asarray(x) for x in arrays]

    found = jax.pure_callback(present, shapes)
    return flat_of(
        [_like(x, b) for x, b in zip(found, before, strict=True)], structure
    ), structure


def _is_key(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _data(x: jax.Array) -> jax.Array:
    """What NumPy can hold: the bits of random keys."""
    return jax.random.key_data(x) if _is_key(x) else x


def _like(data: Any, x: jax.Array) -> Any:
    return (
        jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        if _is_key(x)
        else data
    )


def _changed(cell: Cell) -> StateTraceError:
    return StateTraceError(
        lesson(
            f"{cell.describe()} was read inside a raw JAX transform, and has since changed "
            "its structure, shape or dtype.",
            "JAX has kept the jaxpr of the function that reads it, which is of the old "
            "type.",
            "use the transform of the same name from statefun, which traces again, or "
            "pass a new function.",
        )
    )
