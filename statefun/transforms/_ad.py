"""`filter_jvp`, `filter_vjp`, and the Jacobians and the Hessian."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax.tree_util as jtu

from .._errors import StateValueError, message
from .._state.cell import Cell
from .._state.state import State, held
from .._state.structure import same
from .._trace.result import unpack
from ._twin import (
    Opened,
    Wrapper,
    close_states,
    hold,
    is_param,
    only_states,
    open_states,
    run_pure,
    transaction,
    values_at,
)


def filter_jvp(
    fn: Callable[..., Any],
    primals: Sequence[Any],
    tangents: Sequence[Any],
    **kwargs: Any,
) -> tuple[Any, Any]:
    """As `equinox.filter_jvp`, for functions that read and write States.

    **Arguments:**

    - `fn`: the function. What it writes to States comes out as primal values.
    - `primals`: where to evaluate it.
    - `tangents`: of the structure of `primals`, with None for what is not differentiated.
        In the place of a State in `primals` may stand a tangent of its value; for one
        that occurs twice, the same one in both places, or None in one of them.
    - `kwargs`: keyword arguments of `fn`; not differentiated.

    **Returns:** `(primals_out, tangents_out)`.

    **Raises:** `ValueError` if the structures of `primals` and `tangents` differ, or if a
    State is given two tangents.

    !!! example

        ```python
        import jax.numpy as jnp, statefun as sf

        scale = sf.State(jnp.array(3.0))
        sf.filter_jvp(lambda x: x * scale.value, (jnp.array(2.0),), (jnp.array(1.0),))
        ```
    """

    def run() -> tuple[Any, Any]:
        try:
            opened, opened_tangents, states = _open_both(primals, tangents)
        except StateValueError:
            raise
        except ValueError:  # Equinox says what is wrong
            return eqx.filter_jvp(fn, primals, tangents, **kwargs)

        def inner(*args: Any) -> Any:
            args, inside = close_states(args, states)
            return run_pure(lambda: fn(*args, **kwargs), inside)

        (out, written), (tangents_out, _) = eqx.filter_jvp(
            inner, opened, opened_tangents
        )
        written.write()
        return unpack(out), tangents_out

    return transaction(run)


def _open_both(primals: Any, tangents: Any) -> tuple[Any, Any, dict[Cell, State]]:
    """Opens the States in whose place there is a tangent, each once.

    **Returns:** the primals and the tangents, and the States.

    **Raises:** `ValueError` if the structures of `primals` and `tangents` differ;
    `StateValueError` if those of a State and its tangent do, or if it has two tangents.
    """
    states: dict[Cell, State] = {}
    given: dict[Cell, Any] = {}

    def pair(leaf: Any, tangent: Any) -> tuple[Any, Any]:
        if not isinstance(leaf, State) or tangent is None:
            return leaf, tangent
        cell = leaf._cell
        if cell in states:
            _check_tied(cell, given[cell], tangent)
            return Opened(None, cell), Opened(None, cell)
        states[cell], given[cell] = leaf, tangent
        try:
            value, tangent = pairs(held(leaf), tangent)
        except StateValueError:
            raise
        except ValueError as error:
            raise StateValueError(
                message(
                    f"the tangent of {cell.describe()} has another structure than what "
                    "it holds.",
                    f"{error}",
                    "give a tangent of the structure of `.value`, with None for what is "
                    "not differentiated.",
                )
            ) from error
        return Opened(value, cell), Opened(tangent, cell)

    def pairs(tree: Any, tangents: Any) -> tuple[Any, Any]:
        leaves, treedef = jtu.tree_flatten(tree)
        parts = treedef.flatten_up_to(tangents)
        both = [pair(x, t) for x, t in zip(leaves, parts, strict=True)]
        return treedef.unflatten(x for x, _ in both), treedef.unflatten(
            t for _, t in both
        )

    return *pairs(primals, tangents), states


def _check_tied(cell: Cell, first: Any, second: Any) -> None:
    if jtu.tree_structure(first) == jtu.tree_structure(second):
        try:
            if all(map(same, jtu.tree_leaves(first), jtu.tree_leaves(second))):
                return
        except TypeError:  # traced: one can't tell
            pass
    raise StateValueError(
        message(
            f"`filter_jvp` was given two tangents for {cell.describe()}.",
            "it stands in two places, but is one State, and has one tangent.",
            "give the same tangent in both places, or None in one of them.",
        )
    )


def filter_vjp(fun: Callable[..., Any], *primals: Any, has_aux: bool = False) -> tuple:
    """As `equinox.filter_vjp`, for functions that read and write States.

    **Arguments:**

    - `fun`: the function. What it writes to States comes out as primal values.
    - `primals`: where to evaluate it. Inexact arrays are differentiated, and so are the
        values of the `Param`s in here.
    - `has_aux`: whether `fun` returns a pair of result and auxiliary data.

    **Returns:** `(out, vjp_fn)`, or `(out, vjp_fn, aux)`. `vjp_fn` takes a cotangent of
    `out` and returns a tuple of those of `primals`, with the cotangent of its value in
    the place of a `Param`.

    !!! example

        ```python
        import jax.numpy as jnp, statefun as sf

        scale = sf.State(jnp.array(3.0))
        out, vjp_fn = sf.filter_vjp(lambda x: x * scale.value, jnp.array(2.0))
        (grad,) = vjp_fn(jnp.array(1.0))
        ```
    """

    def run() -> tuple:
        opened, states = open_states(primals, is_param)

        def inner(*args: Any) -> Any:
            args, inside = close_states(args, states)
            out, written = run_pure(lambda: fun(*args), inside)
            out, aux = out if has_aux else (out, None)
            return out, (aux, written)

        out, vjp_fn, (aux, written) = eqx.filter_vjp(inner, *opened, has_aux=True)
        written.write()

        def pull(*cotangents: Any) -> Any:
            def backward() -> Any:
                hold(written.values)
                return values_at(vjp_fn(*cotangents))

            return (
                transaction(backward)
                if written.values
                else values_at(vjp_fn(*cotangents))
            )

        return (out, pull, unpack(aux)) if has_aux else (unpack(out), pull)

    return transaction(run)


def differentiable(
    fun: Callable[..., Any], has_aux: bool, wrt: Any, args: tuple, kwargs: dict
) -> tuple[Any, tuple, Callable[..., Any]]:
    """Turns a function into one that Equinox can differentiate in its first argument.

    **Returns:** what is differentiated: the first argument with its `Param`s opened, or
    the States of `wrt`; the other arguments; and a function of these that returns its
    result, with the user's auxiliary data and the updates as auxiliary data.
    """
    if wrt is None:
        diff, states = open_states(args[0], is_param)
        rest = args[1:]
    else:
        diff, states = open_states(only_states(wrt), lambda s: True)
        rest = args

    def inner(diff: Any, *rest: Any) -> Any:
        closed, inside = close_states(diff, states)
        head = (closed,) if wrt is None else ()
        run = lambda: fun(*head, *rest, **kwargs)  # noqa: E731
        out, written = run_pure(run, inside, backward=True)
        out, aux = out if has_aux else (out, None)
        return out, (aux, written)

    return diff, rest, inner


class _Jacobian(Wrapper):
    _fun: Callable
    _has_aux: bool = eqx.field(static=True)
    _wrt: Any
    _transform: Callable = eqx.field(static=True)

    @property
    def __wrapped__(self) -> Callable:
        return self._fun

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        if self._wrt is None and not args:
            return self._transform(self._fun)(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    def _run(self, args: tuple, kwargs: dict) -> Any:
        diff, rest, inner = differentiable(
            self._fun, self._has_aux, self._wrt, args, kwargs
        )
        jacobian, (aux, written) = self._transform(inner, has_aux=True)(diff, *rest)
        written.write()
        jacobian = values_at(jacobian)
        return (jacobian, unpack(aux)) if self._has_aux else jacobian


def filter_jacfwd(
    fun: Callable[..., Any], has_aux: bool = False, *, wrt: Any = None
) -> Callable[..., Any]:
    """As `equinox.filter_jacfwd`, for functions that read and write States.

    **Arguments:**

    - `fun`: the function. What it writes to States comes out as primal values.
    - `has_aux`: whether `fun` returns a pair of result and auxiliary data.
    - `wrt`: a State, or a tree of States: differentiates with respect to their values in
        place of the first argument.

    **Returns:** a function with the arguments of `fun` that returns the Jacobian, or
    `(jacobian, aux)`. The Jacobian has the structure of the result, with the structure
    of what is differentiated in the place of each leaf; its arrays have the shapes
    `(*out.shape, *in.shape)`.

    !!! example

        ```python
        import jax.numpy as jnp, statefun as sf

        w = sf.Param(jnp.ones((2, 3)))
        sf.filter_jacfwd(lambda x: w.value @ x, wrt=w)(jnp.ones(3)).shape  # (2, 2, 3)
        ```
    """
    return _Jacobian(fun, has_aux, wrt, eqx.filter_jacfwd)


def filter_jacrev(
    fun: Callable[..., Any], has_aux: bool = False, *, wrt: Any = None
) -> Callable[..., Any]:
    """As `equinox.filter_jacrev`, for functions that read and write States.

    As [`statefun.filter_jacfwd`][], but evaluated in reverse mode.

    **Arguments:** and **Returns:** as of [`statefun.filter_jacfwd`][].

    !!! example

        ```python
        import jax.numpy as jnp, statefun as sf

        w = sf.Param(jnp.ones((2, 3)))
        sf.filter_jacrev(lambda x: w.value @ x, wrt=w)(jnp.ones(3)).shape  # (2, 2, 3)
        ```
    """
    return _Jacobian(fun, has_aux, wrt, eqx.filter_jacrev)


def filter_hessian(
    fun: Callable[..., Any], has_aux: bool = False, *, wrt: Any = None
) -> Callable[..., Any]:
    """As `equinox.filter_hessian`, for functions that read and write States.

    **Arguments:** as of [`statefun.filter_jacfwd`][].

    **Returns:** a function with the arguments of `fun` that returns the Hessian, or
    `(hessian, aux)`.

    !!! example

        ```python
        import jax.numpy as jnp, statefun as sf

        w = sf.Param(jnp.ones(3))
        sf.filter_hessian(lambda: (w.value**3).sum(), wrt=w)().shape  # (3, 3)
        ```
    """
    return _Jacobian(fun, has_aux, wrt, eqx.filter_hessian)
