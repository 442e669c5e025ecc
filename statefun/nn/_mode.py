"""Switching between training and inference."""

from __future__ import annotations

from typing import Any, TypeVar

import equinox as eqx
import jax.tree_util as jtu

from .._state import access
from .._state.cell import UNSET
from .._state.state import State

T = TypeVar("T")


class InMode(eqx.Module):
    """A State whose value is seen with all `inference` flags set to one value.

    `inference_mode` puts it in the place of a State that holds a network. Nothing is
    copied: `.value` is the State's own value with other flags.

    **Attributes:**

    - `state`: the State.
    - `inference`: the flag.
    """

    state: State
    inference: bool

    @property
    def value(self) -> Any:
        """The State's value, with the flags set."""
        return inference_mode(self.state.value, self.inference)


def inference_mode(pytree: T, value: bool = True) -> T:
    """As `equinox.nn.inference_mode`, for trees with States in them.

    The result shares all States with the tree that was given: what training changes, it
    sees. Flags in the value of a State (a network in a `Param`) are set, too: in the
    result an [`statefun.nn.InMode`][] stands for such a State, whose `.value` has them
    set.

    **Arguments:**

    - `pytree`: any pytree, or a State.
    - `value`: what the flags are set to.

    **Returns:** a tree like `pytree`.

    !!! example

        ```python
        import equinox as eqx, jax, jax.numpy as jnp, statefun as sf

        layers = [eqx.nn.Linear(2, 2, key=jax.random.key(0)), eqx.nn.Dropout()]
        model = sf.Param(eqx.nn.Sequential(layers))
        evaluate = sf.nn.inference_mode(model)
        evaluate.value(jnp.ones(2))  # no dropout
        ```
    """
    if _has_flags(pytree):
        pytree = eqx.nn.inference_mode(pytree, value)

    def inside(leaf: Any) -> Any:
        if isinstance(leaf, State) and _mentions_flags(leaf):
            return InMode(leaf, value)
        return leaf

    return jtu.tree_map(inside, pytree, is_leaf=lambda x: isinstance(x, InMode))


def train_mode(pytree: T) -> T:
    """`inference_mode(pytree, False)`: all `inference` flags set to False.

    **Arguments:**

    - `pytree`: any pytree, or a State.

    **Returns:** the same pytree with other flags.

    !!! example

        ```python
        import statefun as sf

        dropout = sf.nn.inference_mode(sf.nn.Dropout(rng=sf.Rng(0)))
        sf.nn.train_mode(dropout).inference  # False
        ```
    """
    return inference_mode(pytree, False)


def _flagged(x: Any) -> bool:
    return hasattr(x, "inference")


def _has_flags(tree: Any) -> bool:
    return any(map(_flagged, jtu.tree_leaves(tree, is_leaf=_flagged)))


def _mentions_flags(state: State) -> bool:
    """Whether the State's value has flags, or a State in it has.

    The value is inspected without a read: a State in which a function only looks for
    flags must not become an input of it.
    """
    flat, structure = access.current(state._cell)
    value = state.value if flat is UNSET else structure.unflatten(flat)
    return _has_flags(value) or any(
        _mentions_flags(leaf)
        for leaf in jtu.tree_leaves(value)
        if isinstance(leaf, State)
    )
