"""`state_axes` and `state_specs`: which States a mapped function holds a piece of."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax.tree_util as jtu

from .._state.cell import Cell
from .._state.state import State


def rule(spec: Any, is_whole: Callable[[Any], bool]) -> Callable[[State], Any]:
    """What `state_axes` says of a State: the first pair that matches decides.

    **Arguments:**

    - `spec`: None, something that holds for all States, or a list of pairs of a State, a
        kind or a predicate, and what holds for these.
    - `is_whole`: whether it is something that holds for all.
    """
    if spec is None or is_whole(spec):
        return lambda state: spec

    def matches(pattern: Any, state: State) -> bool:
        if isinstance(pattern, State):
            return pattern is state
        if isinstance(pattern, type):
            return isinstance(state, pattern)
        return bool(pattern(state))

    def find(state: State) -> Any:
        for pattern, item in spec:
            if matches(pattern, state):
                return item
        return None

    return find


def reachable(*roots: Any) -> dict[Cell, State]:
    """States that a function is likely to touch: in its arguments and its closure.

    What is missed here is found when it is read; that it is known before is only faster.
    """
    found: dict[Cell, State] = {}
    for root in roots:
        for state in _states_in(root, depth=3):
            found.setdefault(state._cell, state)
    return found


def _states_in(obj: Any, depth: int) -> Iterator[State]:
    for leaf in jtu.tree_leaves(obj):
        if isinstance(leaf, State):
            yield leaf
        elif callable(leaf) and depth > 0:
            for part in _parts(leaf):
                yield from _states_in(part, depth - 1)


def _parts(fun: Any) -> Iterator[Any]:
    if isinstance(fun, functools.partial):
        yield fun.func
        yield fun.args
        yield fun.keywords
    yield getattr(fun, "__self__", None)
    yield getattr(fun, "__wrapped__", None)
    for cell in getattr(fun, "__closure__", None) or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not assigned yet
            continue
