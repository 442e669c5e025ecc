"""`filter_grad` and `filter_value_and_grad`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx

from .._trace.result import unpack
from ._ad import differentiable
from ._microbatch import accumulate, as_microbatch
from ._twin import Wrapper, values_at


class _ValueAndGrad(Wrapper):
    _fun: Callable
    _has_aux: bool = eqx.field(static=True)
    _wrt: Any
    _microbatch: int | None = eqx.field(static=True)
    _collect: bool = eqx.field(static=True)
    _gradkwargs: dict[str, Any] = eqx.field(static=True)

    @property
    def __wrapped__(self) -> Callable:
        return self._fun

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        if self._wrt is None and not args:
            # Equinox raises its own error.
            return eqx.filter_value_and_grad(self._fun)(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    def _run(self, args: tuple, kwargs: dict) -> Any:
        def parts(args: tuple) -> tuple:
            return differentiable(self._fun, self._has_aux, self._wrt, args, kwargs)

        def gradient(args: tuple) -> tuple[Any, Any, Any]:
            diff, rest, inner = parts(args)
            transform = eqx.filter_value_and_grad(
                inner, has_aux=True, **self._gradkwargs
            )
            (loss, (aux, written)), grad = transform(diff, *rest)
            written.write()
            return loss, unpack(aux), grad

        if self._microbatch is None:
            loss, aux, grad = gradient(args)
        else:
            first = 1 if self._wrt is None else 0
            loss, aux, grad = accumulate(
                *(gradient, self._fun, parts(args)[0], args, first),
                *(self._microbatch, self._collect),
            )
        return ((loss, aux) if self._has_aux else loss), values_at(grad)


class _Grad(Wrapper):
    _value_and_grad: _ValueAndGrad

    @property
    def __wrapped__(self) -> Callable:
        return self._value_and_grad.__wrapped__

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        value, grad = self._value_and_grad(*args, **kwargs)
        return (grad, value[1]) if self._value_and_grad._has_aux else grad


def filter_value_and_grad(
    fun: Callable | None = None,
    *,
    has_aux: bool = False,
    wrt: Any = None,
    microbatch: int | None = None,
    collect: bool = False,
    **gradkwargs: Any,
) -> Any:
    """As `equinox.filter_value_and_grad`, for functions that read and write States.

    Differentiates with respect to the inexact arrays of the first argument and the
    values of the `Param`s in it; or, with `wrt`, the values of the States given there.
    What the function writes to States comes out as primal values: no gradient flows
    through it.

    **Arguments:**

    - `fun`: the function; returns a scalar, or with `has_aux` a pair of a scalar and
        anything. May be left out, to use the rest as a decorator.
    - `has_aux`: whether `fun` returns auxiliary data.
    - `wrt`: a State, or any tree of States. Those that the function never reads have a
        gradient of zeros. `Param`s in the value of a State are differentiated, too, here
        and in the first argument.
    - `microbatch`: in how many equal parts to cut the batch, to go through one after the
        other: less memory, and for a loss that is a mean over the batch the same
        gradient. Cut along their leading axis are the arrays of all positional arguments
        (without `wrt` the first is differentiated, and left whole). Keyword arguments
        and the closure are shared. What the function writes to States (statistics,
        random keys, metrics) it writes once for each part, in order.
    - `collect`: with `microbatch`, whether loss and aux come with a leading axis, an
        entry for each part. Else they are averaged; aux may then hold floating-point
        scalars, and non-array leaves.
    - `gradkwargs`: passed on to `jax.value_and_grad`.

    **Returns:** a function with the arguments of `fun` that returns `(value, grad)`, or
    `((value, aux), grad)`. `grad` has the structure of what is differentiated, with the
    gradient of its value in the place of each State and None for all other leaves that
    are not inexact arrays. A State that occurs twice has one gradient, the sum, in both
    places.

    **Raises:** `TypeError`, as Equinox does, if there is nothing to differentiate. With
    `microbatch`: `ValueError` if the sizes of the batch differ, or can't be divided;
    `TypeError` if aux holds what has no mean; `statefun.StateTypeError` if a State is in
    an argument that would be cut.

    !!! example

        ```python
        import jax.numpy as jnp, statefun as sf

        w = sf.Param(jnp.ones(3), name="w")

        def loss(x, y):
            return jnp.mean((w.value @ x - y) ** 2)

        value, grad = sf.filter_value_and_grad(loss, wrt=w)(jnp.ones(3), 1.0)
        w.value -= 0.1 * grad
        ```
    """
    options: dict[str, Any] = {"has_aux": has_aux, "wrt": wrt, **gradkwargs}
    options |= {"microbatch": microbatch, "collect": collect}
    if fun is None:
        return functools.partial(filter_value_and_grad, **options)
    eqx.filter_value_and_grad(fun, has_aux=has_aux, **gradkwargs)  # checks `gradkwargs`
    count = as_microbatch("filter_value_and_grad", microbatch, collect)
    return eqx.module_update_wrapper(
        _ValueAndGrad(fun, has_aux, wrt, count, collect, gradkwargs)
    )


def filter_grad(
    fun: Callable | None = None,
    *,
    has_aux: bool = False,
    wrt: Any = None,
    microbatch: int | None = None,
    collect: bool = False,
    **gradkwargs: Any,
) -> Any:
    """As `equinox.filter_grad`, for functions that read and write States.

    **Arguments:** as of [`statefun.filter_value_and_grad`][].

    **Returns:** a function with the arguments of `fun` that returns `grad`, or
    `(grad, aux)`.

    !!! example

        ```python
        import jax.numpy as jnp, statefun as sf

        w = sf.Param(jnp.ones(3))
        sf.filter_grad(lambda x: jnp.sum(w.value**2 * x), wrt=w)(2.0)
        ```
    """
    options: dict[str, Any] = {"has_aux": has_aux, "wrt": wrt, **gradkwargs}
    options |= {"microbatch": microbatch, "collect": collect}
    if fun is None:
        return functools.partial(filter_grad, **options)
    return eqx.module_update_wrapper(_Grad(filter_value_and_grad(fun, **options)))
