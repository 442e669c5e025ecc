"""Under what a trace is filed: the arguments' static part, avals, JAX's configuration."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from .. import _compat


class CacheKey(NamedTuple):
    """What a traced function is filed under; hashable and immutable.

    **Attributes:**

    - `static_args`, `static_kwargs`: tree structure and static leaves of the positional
        and the keyword arguments. `1`, `1.0` and `True` are different.
    - `dyn_args`, `dyn_kwargs`: the abstract values (shape, dtype, weak type, sharding)
        of their arrays.
    """

    static_args: Any
    dyn_args: tuple
    static_kwargs: Any
    dyn_kwargs: tuple


# JAX keys its own caches by its configuration (x64, matmul precision, mesh, …) and offers
# no public way to ask for the key. A jitted function that hands out a new object whenever
# it is traced answers the question without one.
_mark = jax.jit(lambda: {object(): ()})


def jax_configuration() -> Any:
    """Equal for two calls exactly if `jax.jit` would not retrace between them."""
    if _compat.jit_disabled():
        return None
    with _compat.eval_context(), _compat.trace_generation(0):
        (mark,) = _mark()
    return mark
