"""The twins of transforms beside the functions that they stand for.

On both sides the same arithmetic: statefun's function writes one State, the other takes
its value as one more input and gives it back as one more output. Outside of jit that is a
call of the transform by itself. Inside, both stand in the same `filter_jit`, which reads
and writes the State for the raw transform: what is compared is what the twin adds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

import statefun as sf

from . import _transformer as net
from ._harness import OURS, Contender, Row, calls, first_calls

WIDTH, LENGTH = 8, 10


class Case(NamedTuple):
    """One transform with a function for it, built for a State.

    **Fields:**

    - `ours`: of the State, `x -> y`; the State is read and written inside.
    - `theirs`: `(value, x) -> (value, y)`, without a State.
    """

    ours: Callable[[sf.State], Callable[[Any], Any]]
    theirs: Callable[[], Callable[[Any, Any], tuple[Any, Any]]]


def _cell(weight: Any, carry: Any, x: Any) -> Any:
    return jnp.tanh(weight @ carry + x)


def _loss(weight: Any, x: Any) -> Any:
    for _ in range(3):
        x = jnp.tanh(weight @ x)
    return jnp.sum(x**2)


def _weight() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (WIDTH, WIDTH))


def _scan() -> Case:
    weight, xs = _weight(), jnp.ones((LENGTH, WIDTH))

    def ours(state: sf.State) -> Callable[[Any], Any]:
        def body(carry: Any, x: Any) -> Any:
            state.value = state.value + 1.0
            carry = _cell(weight, carry, x)
            return carry, carry

        return lambda x: sf.scan(body, x, xs)[1]

    def theirs() -> Callable[[Any, Any], tuple[Any, Any]]:
        def body(carry: Any, x: Any) -> Any:
            value, carry = carry
            carry = _cell(weight, carry, x)
            return (value + 1.0, carry), carry

        def run(value: Any, x: Any) -> tuple[Any, Any]:
            (value, _), ys = jax.lax.scan(body, (value, x), xs)
            return value, ys

        return run

    return Case(ours, theirs)


def _cond() -> Case:
    weight = _weight()

    def ours(state: sf.State) -> Callable[[Any], Any]:
        def step(x: Any) -> Any:
            state.value = state.value + 1.0
            return _cell(weight, x, x)

        def stay(x: Any) -> Any:
            return x

        return lambda x: sf.cond(True, step, stay, x)

    def theirs() -> Callable[[Any, Any], tuple[Any, Any]]:
        def step(value: Any, x: Any) -> Any:
            return value + 1.0, _cell(weight, x, x)

        def stay(value: Any, x: Any) -> Any:
            return value, x

        return lambda value, x: jax.lax.cond(True, step, stay, value, x)

    return Case(ours, theirs)


def _grad() -> Case:
    weight = _weight()

    def ours(state: sf.State) -> Callable[[Any], Any]:
        def loss(x: Any) -> Any:
            state.value = state.value + 1.0
            return _loss(weight, x)

        return sf.filter_grad(loss)

    def theirs() -> Callable[[Any, Any], tuple[Any, Any]]:
        def loss(x: Any, value: Any) -> Any:
            return _loss(weight, x), value + 1.0

        grad = eqx.filter_grad(loss, has_aux=True)

        def run(value: Any, x: Any) -> tuple[Any, Any]:
            y, value = grad(x, value)
            return value, y

        return run

    return Case(ours, theirs)


def _vmap() -> Case:
    weight, xs = _weight(), jnp.ones((LENGTH, WIDTH))

    def ours(state: sf.State) -> Callable[[Any], Any]:
        def lane(x: Any, y: Any) -> Any:
            state.value = state.value + 1.0
            return _loss(weight, x + y)

        vmapped = sf.filter_vmap(lane, in_axes=(None, 0))
        return lambda x: vmapped(x, xs)

    def theirs() -> Callable[[Any, Any], tuple[Any, Any]]:
        def lane(value: Any, x: Any, y: Any) -> Any:
            return value + 1.0, _loss(weight, x + y)

        axes = {"in_axes": (None, None, 0), "out_axes": (None, 0)}
        vmapped = eqx.filter_vmap(lane, **axes)
        return lambda value, x: vmapped(value, x, xs)

    return Case(ours, theirs)


def _eager(case: Case, against: str) -> Callable[[bool], Mapping[str, Contender]]:
    def build(_: bool) -> Mapping[str, Contender]:
        x = jnp.ones(WIDTH)
        state, value = sf.State(jnp.array(0.0)), jnp.array(0.0)
        ours, theirs = case.ours(state), case.theirs()

        def call() -> None:
            nonlocal value
            value, _ = theirs(value, x)

        return {
            OURS: Contender(lambda: ours(x), lambda: state.value),
            against: Contender(call, lambda: value),
        }

    return build


def _jitted(case: Case, against: str) -> Callable[[bool], Mapping[str, Contender]]:
    def build(_: bool) -> Mapping[str, Contender]:
        x = jnp.ones(WIDTH)
        one, other = sf.State(jnp.array(0.0)), sf.State(jnp.array(0.0))
        ours, theirs = sf.filter_jit(case.ours(one)), case.theirs()

        @sf.filter_jit
        def raw(x: Any) -> Any:
            other.value, y = theirs(other.value, x)
            return y

        return {
            OURS: Contender(lambda: ours(x), lambda: one.value),
            against: Contender(lambda: raw(x), lambda: other.value),
        }

    return build


# -- tracing ------------------------------------------------------------------------


def _traces() -> Mapping[str, Callable[[], Any]]:
    """The gradient of a transformer's loss, to a jaxpr."""
    weights, _, tokens = net.start()
    model = sf.Param(weights)

    def loss(tokens: Any) -> Any:
        return net.loss_fn(model.value, tokens)

    def ours() -> Any:
        grad = sf.filter_value_and_grad(loss, wrt=model)
        return sf.make_jaxpr(lambda tokens: grad(tokens))(tokens)[0]

    def theirs() -> Any:
        grad = eqx.filter_value_and_grad(lambda m, tokens: net.loss_fn(m, tokens))
        return eqx.filter_make_jaxpr(lambda m, tokens: grad(m, tokens))(
            weights, tokens
        )[0]

    return {OURS: ours, "eqx.filter_value_and_grad": theirs}


CASES = {
    "scan": (_scan, "jax.lax.scan"),
    "cond": (_cond, "jax.lax.cond"),
    "grad": (_grad, "eqx.filter_grad"),
    "vmap": (_vmap, "eqx.filter_vmap"),
}

ROWS = [
    *(
        Row(f"{name}, outside of jit", calls(_eager(case(), raw)), {raw: 1.3})
        for name, (case, raw) in CASES.items()
    ),
    *(
        Row(f"{name}, inside jit", calls(_jitted(case(), raw)), {raw: 1.05})
        for name, (case, raw) in CASES.items()
    ),
    Row(
        "trace of a transformer's value and gradient",
        first_calls(_traces),
        {"eqx.filter_value_and_grad": 1.15},
    ),
]
