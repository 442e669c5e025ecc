"""`filter_checkpoint`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

from .._state import access
from .._trace.names import named
from ._twin import (
    Wrapper,
    note_checks,
    split_arrays,
    trace_body,
    values_of,
)


class _Checkpoint(Wrapper):
    _fun: Callable
    _prevent_cse: bool = eqx.field(static=True)
    _policy: Callable[..., bool] | None = eqx.field(static=True)

    @property
    def __wrapped__(self) -> Callable:
        return self._fun

    def _run(self, args: tuple, kwargs: dict) -> Any:
        arrays, build = split_arrays((args, kwargs))

        def run(*leaves: Any) -> Any:
            args, kwargs = build(leaves)
            return self._fun(*args, **kwargs)

        program = trace_body(run, arrays, named(self._fun, args, kwargs))
        note_checks(program)
        values = values_of(program.reads)
        pure = jax.checkpoint(
            program.__call__, prevent_cse=self._prevent_cse, policy=self._policy
        )
        leaves, writes = pure(arrays, values, list(program.consts))
        access.write(writes)
        return program.out.build(leaves)


def filter_checkpoint(
    fun: Callable | None = None,
    *,
    prevent_cse: bool = True,
    policy: Callable[..., bool] | None = None,
) -> Any:
    """As `equinox.filter_checkpoint`, for functions that read and write States.

    The values that the function writes are outputs of the checkpointed computation: no
    State is written again when the backward pass recomputes it.

    **Arguments:**

    - `fun`: the function; may be left out, to use the rest as a decorator.
    - `prevent_cse`, `policy`: as in `jax.checkpoint`.

    **Returns:** a function that does the same, and keeps fewer intermediate values for
    the backward pass.

    !!! example

        ```python
        import jax.numpy as jnp, statefun as sf

        w = sf.Param(jnp.ones(3))
        calls = sf.State(jnp.array(0))

        @sf.filter_checkpoint
        def layer(x):
            calls.value += 1
            return jnp.tanh(w.value * x)

        sf.filter_grad(lambda x: layer(x).sum(), wrt=w)(jnp.ones(3))
        ```
    """
    if fun is None:
        return functools.partial(
            filter_checkpoint, prevent_cse=prevent_cse, policy=policy
        )
    return eqx.module_update_wrapper(_Checkpoint(fun, prevent_cse, policy))
