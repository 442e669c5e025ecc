"""`checkify`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
from jax.experimental import checkify as jax_checkify

from .._state import access
from .._trace.names import named
from ._twin import Wrapper, split_arrays, trace_body, values_of


class _Checkified(Wrapper):
    _fun: Callable
    _errors: frozenset = eqx.field(static=True)

    @property
    def __wrapped__(self) -> Callable:
        return self._fun

    def _run(self, args: tuple, kwargs: dict) -> Any:
        arrays, build = split_arrays((args, kwargs))

        def run(*leaves: Any) -> Any:
            args, kwargs = build(leaves)
            return self._fun(*args, **kwargs)

        program = trace_body(run, arrays, named(self._fun, args, kwargs))
        error, (leaves, new) = jax_checkify.checkify(program.__call__, self._errors)(
            arrays, values_of(program.reads), list(program.consts)
        )
        access.write(new)
        return error, program.out.build(leaves)


def checkify(
    f: Callable[..., Any], errors: frozenset = jax_checkify.user_checks
) -> Callable[..., tuple[jax_checkify.Error, Any]]:
    """As `jax.experimental.checkify.checkify`, for functions that use States.

    States are written as the function leaves them, even if a check has failed: that is
    known only when the error is inspected. `filter_jit(f, checkify=True)` inspects it
    first, and writes nothing if a check has failed.

    **Arguments:**

    - `f`: the function, with `jax.experimental.checkify.check`s in it.
    - `errors`: which kinds of error to look for, as in JAX.

    **Returns:** a function with the arguments of `f` that returns `(error, out)`.

    !!! example

        ```python
        import jax.numpy as jnp, statefun as sf
        from jax.experimental import checkify

        last = sf.State(jnp.array(0.0))

        def f(x):
            checkify.check(x > 0, "x is {x}, but has to be positive", x=x)
            last.value = x
            return jnp.log(x)

        error, out = sf.filter_jit(sf.checkify(f))(jnp.array(2.0))
        error.throw()
        ```
    """
    return eqx.module_update_wrapper(_Checkified(f, errors))
