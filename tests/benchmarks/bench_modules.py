"""Modules as arguments, beside `jax.jit` on a flat list and `eqx.filter_jit`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

import statefun as sf

from ._harness import OURS, Contender, Row, calls

PURE = "jax.jit, flat list"
EQUINOX = "eqx.filter_jit"


class Layer(eqx.Module):
    weight: Any
    bias: Any
    width: int = eqx.field(static=True)


class Scale(eqx.Module):
    weight: Any


class Net(eqx.Module):
    """100 nodes and 120 arrays."""

    layers: tuple
    scales: tuple

    def __call__(self) -> jax.Array:
        return self.layers[0].weight + self.scales[0].weight


def _net(made: Callable[[jax.Array], Any] = lambda x: x) -> Net:
    layers = tuple(Layer(made(jnp.ones(())), made(jnp.ones(())), 1) for _ in range(23))
    return Net(layers, tuple(Scale(made(jnp.ones(()))) for _ in range(74)))


def _timed(call: Callable[[], Any]) -> Contender:
    last: list[Any] = [jnp.ones(())]

    def once() -> None:
        last[0] = call()

    return Contender(once, lambda: last[0])


def _first_and_last(leaves: list[Any]) -> Any:
    return leaves[0] + leaves[-1]


def _same(_: bool) -> Mapping[str, Contender]:
    net = _net()
    leaves = jtu.tree_leaves(net)
    pure = jax.jit(_first_and_last)
    ours, equinox = sf.filter_jit(lambda n: n()), eqx.filter_jit(lambda n: n())
    return {
        OURS: _timed(lambda: ours(net)),
        PURE: _timed(lambda: pure(leaves)),
        EQUINOX: _timed(lambda: equinox(net)),
    }


def _new(_: bool) -> Mapping[str, Contender]:
    """The module is another object at each call: one of its arrays is replaced."""
    net = _net()
    leaves, treedef = jtu.tree_flatten(net)
    ours, equinox = sf.filter_jit(lambda n: n()), eqx.filter_jit(lambda n: n())
    return {
        OURS: _timed(lambda: ours(treedef.unflatten(leaves))),
        EQUINOX: _timed(lambda: equinox(treedef.unflatten(leaves))),
    }


class Params(eqx.Module):
    params: tuple

    @sf.filter_jit
    def __call__(self) -> Any:
        values = [p.value for p in self.params]
        return sum(values[1:], values[0])


def _params(decorated: bool) -> Callable[[bool], Mapping[str, Contender]]:
    def build(_: bool) -> Mapping[str, Contender]:
        net = Params(tuple(sf.Param(jnp.ones(())) for _ in range(20)))
        leaves = [jnp.ones(()) for _ in range(20)]
        pure = jax.jit(lambda xs: sum(xs[1:], xs[0]))
        passed = sf.filter_jit(
            lambda n: sum((p.value for p in n.params[1:]), n.params[0].value)
        )
        return {
            OURS: _timed(net if decorated else lambda: passed(net)),
            PURE: _timed(lambda: pure(leaves)),
        }

    return build


def _anew(_: bool) -> Mapping[str, Contender]:
    x = jnp.ones(())

    def f(x: Any) -> Any:
        return x + 1

    kept = sf.filter_jit(f)
    return {
        OURS: _timed(lambda: sf.filter_jit(f)(x)),
        "the kept function": _timed(lambda: kept(x)),
    }


ROWS = [
    Row("the same module passed", calls(_same), {PURE: 1.20, EQUINOX: 0.35}),
    Row("a new module passed", calls(_new), {EQUINOX: 0.90}),
    Row("a module of 20 Params passed", calls(_params(False)), {PURE: 1.25}),
    Row("a module of 20 Params called", calls(_params(True)), {PURE: 1.25}),
    Row("filter_jit(f)(x) written anew", calls(_anew), {"the kept function": 3}),
]
