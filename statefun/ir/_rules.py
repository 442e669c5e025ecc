"""What the rules of algebraic simplification have in common.

A rule gets an equation and the equations that define some of its operands. It
answers with the atom or the equation that may stand for it, or None. It need not
look at types: an atom of another type than the output is refused by the pass.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jax.extend.core import Literal, Var

from ._jaxpr import Atom, Eqn
from ._values import kind, literal_value, splat_value

Defs = dict[Var, Eqn]
Answer = Atom | Eqn | None
Rule = Callable[[Eqn, Defs], Answer]


def kind_of(eqn: Eqn) -> str:
    return kind(eqn.outvars[0].aval.dtype)


def producer(eqn: Eqn, defs: Defs, primitive: object) -> Eqn | None:
    """The equation that made the first operand, if it is one of `primitive`.

    Both must have been traced in one context: an operation to be done elsewhere
    (`compute_on`) is not drawn into its neighbor.
    """
    x = eqn.invars[0]
    inner = defs.get(x) if x.__class__ is Var else None
    if inner is None or inner.primitive is not primitive or inner.ctx is not eqn.ctx:
        return None
    return inner


def twice(eqn: Eqn, defs: Defs) -> Answer:
    """For what undoes itself."""
    inner = producer(eqn, defs, eqn.primitive)
    return None if inner is None else inner.invars[0]


def beside(eqn: Eqn, defs: Defs, test: Callable[[np.ndarray], bool]) -> Answer:
    """The operand beside one whose every element passes `test`."""
    x, y = eqn.invars
    if y.__class__ is Literal or y in defs:
        value = splat_value(y, defs)
        if value is not None and test(value):
            return x
    if x.__class__ is Literal or x in defs:
        value = splat_value(x, defs)
        if value is not None and test(value):
            return y
    return None


def constant(eqn: Eqn, defs: Defs) -> bool:
    """Whether an operand may be seen to be constant, told at a glance."""
    for v in eqn.invars:
        if v.__class__ is Literal or v in defs:
            return True
    return False


def is_zero(value: np.ndarray) -> bool:
    return bool(value == 0)


def is_one(value: np.ndarray) -> bool:
    return bool(value == 1)


def same(x: Atom, y: Atom) -> bool:
    if x is y:
        return True
    a, b = literal_value(x), literal_value(y)
    return a is not None and b is not None and a.tobytes() == b.tobytes()
