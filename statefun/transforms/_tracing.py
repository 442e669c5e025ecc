"""`filter_eval_shape`, `filter_make_jaxpr` and `filter_closure_convert`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.extend.core as jec
import jax.numpy as jnp
import jax.tree_util as jtu

from .._state import access
from .._state.cell import Value
from .._state.static import static_key, treedef_key
from .._state.structure import flatten, is_shaped
from .._trace.names import named_at
from .._trace.result import unpack
from ._twin import (
    Wrapper,
    note_checks,
    run_pure,
    split_arrays,
    trace_body,
    transaction,
    values_of,
)


def filter_eval_shape(fun: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """As `equinox.filter_eval_shape`, for functions that read and write States.

    No State changes.

    **Arguments:**

    - `fun`: the function.
    - `args`, `kwargs`: its arguments. A `jax.ShapeDtypeStruct` may stand for an array,
        in the function as well, if that is a module, and in States.

    **Returns:** the result with a `jax.ShapeDtypeStruct` for every array. States that
    the function creates hold such structs, too.

    !!! example

        ```python
        import equinox as eqx, jax, statefun as sf

        make = lambda key: {"net": sf.Param(eqx.nn.Linear(2, 3, key=key))}
        sf.filter_eval_shape(lambda key: sf.freeze(make(key)), jax.random.key(0))
        ```
    """

    def inner(fun: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        run = lambda: fun(*args, **kwargs)  # noqa: E731
        return run_pure(run, keeps=True, view=_materialize, ends=True)[0]

    # The function is passed on because it may be a module of shapes itself.
    return transaction(lambda: unpack(eqx.filter_eval_shape(inner, fun, args, kwargs)))


def _materialize(_: Any, value: Value) -> Value:
    """Arrays in place of the structs that a State may hold; they are never computed."""
    flat, structure = value
    if not any(isinstance(x, jax.ShapeDtypeStruct) for x in structure.statics):
        return value
    return flatten(
        jtu.tree_map(
            lambda x: (
                jnp.zeros(x.shape, x.dtype)
                if isinstance(x, jax.ShapeDtypeStruct)
                else x
            ),
            structure.unflatten(flat),
        )
    )


class _MakeJaxpr(Wrapper):
    _fun: Callable

    @property
    def __wrapped__(self) -> Callable:
        return self._fun

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        def inner(*args: Any, **kwargs: Any) -> Any:
            run = lambda: self._fun(*args, **kwargs)  # noqa: E731
            return run_pure(run, keeps=True, ends=True)[0]

        return transaction(lambda: eqx.filter_make_jaxpr(inner)(*args, **kwargs))


def filter_make_jaxpr(
    fun: Callable[..., Any],
) -> Callable[..., tuple[jec.ClosedJaxpr, Any, Any]]:
    """As `equinox.filter_make_jaxpr`, for functions that read and write States.

    No State changes. The States' present values are closed-over constants of the jaxpr;
    [`statefun.make_jaxpr`][] makes them inputs, and says which they are.

    **Arguments:**

    - `fun`: the function.

    **Returns:** a function with the arguments of `fun` that returns the jaxpr, the
    result's arrays as `jax.ShapeDtypeStruct`s, and the static part of the result.

    !!! example

        ```python
        import jax.numpy as jnp, statefun as sf

        w = sf.State(jnp.ones(3))
        jaxpr, shapes, static = sf.filter_make_jaxpr(lambda x: w.value * x)(jnp.ones(3))
        ```
    """
    return eqx.module_update_wrapper(_MakeJaxpr(fun))


def _layout(tree: Any) -> Any:
    leaves, treedef = jtu.tree_flatten(tree)
    keys = [None if is_shaped(x) else static_key(x) for x in leaves]
    return treedef_key(treedef), tuple(keys)


class _Converted(Wrapper):
    """A function as a jaxpr, with what it closed over as leaves."""

    program: Any = eqx.field(static=True)
    layout: Any = eqx.field(static=True)  # of the arguments
    consts: list[Any]

    def _run(self, args: tuple, kwargs: dict) -> Any:
        arrays, _ = split_arrays((args, kwargs))
        expected = [(a.shape, a.dtype) for a in self.program.in_avals]
        same = [(x.shape, x.dtype) for x in arrays] == expected
        if not same or _layout((args, kwargs)) != self.layout:
            raise ValueError(
                "a closure-converted function has to be called with arguments of the "
                "structure, shapes and dtypes that it was converted for."
            )
        note_checks(self.program)
        values = values_of(self.program.reads)
        leaves, writes = self.program(arrays, values, self.consts)
        access.write(writes)
        return self.program.out.build(leaves)


def filter_closure_convert(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """As `equinox.filter_closure_convert`, for functions that read and write States.

    No State changes at the conversion. The converted function reads and writes States
    when it is called, as `fn` does.

    **Arguments:**

    - `fn`: the function; arrays and tracers that it closes over become leaves of what is
        returned.
    - `args`, `kwargs`: arguments like those of later calls; a `jax.ShapeDtypeStruct` may
        stand for an array.

    **Returns:** a callable module.

    **Raises:** `ValueError` when it is called with arguments of other shapes or dtypes.

    !!! example

        ```python
        import jax.numpy as jnp, statefun as sf

        count = sf.State(jnp.array(0))
        scale = jnp.array(3.0)

        def f(x):
            count.value += 1
            return x * scale

        g = sf.filter_closure_convert(f, jnp.array(1.0))
        g(jnp.array(2.0))
        ```
    """

    def run() -> _Converted:
        arrays, build = split_arrays((args, kwargs), is_shaped)
        paths = [
            p for p, x in jtu.tree_leaves_with_path((args, kwargs)) if is_shaped(x)
        ]

        def flat(*leaves: Any) -> Any:
            args, kwargs = build(leaves)
            return fn(*args, **kwargs)

        program = trace_body(flat, arrays, named_at(fn, paths))
        consts = list(program.consts)
        return _Converted(program.without_consts(), _layout((args, kwargs)), consts)

    return transaction(run)
