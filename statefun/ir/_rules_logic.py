"""Identities of logic, bits, order and selection."""

from __future__ import annotations

import numpy as np
from jax.extend.core import Literal, primitives

from ._jaxpr import Eqn
from ._rules import Answer, Defs, Rule, beside, is_zero, kind_of, same, twice
from ._values import kind, make_splat, splat_value


def _is_ones(value: np.ndarray) -> bool:
    """All bits set."""
    return bool(value) if value.dtype == bool else bool(np.invert(value) == 0)


def _and(eqn: Eqn, defs: Defs) -> Answer:
    x, y = eqn.invars
    if same(x, y):
        return x
    if beside(eqn, defs, is_zero) is not None:
        return make_splat(0, eqn)
    return beside(eqn, defs, _is_ones)


def _or(eqn: Eqn, defs: Defs) -> Answer:
    x, y = eqn.invars
    if same(x, y):
        return x
    if beside(eqn, defs, _is_ones) is not None:
        return make_splat(np.invert(np.zeros((), eqn.outvars[0].aval.dtype)), eqn)
    return beside(eqn, defs, is_zero)


def _xor(eqn: Eqn, defs: Defs) -> Answer:
    x, y = eqn.invars
    return make_splat(0, eqn) if same(x, y) else beside(eqn, defs, is_zero)


def _shift(eqn: Eqn, defs: Defs) -> Answer:
    value = splat_value(eqn.invars[1], defs)
    return eqn.invars[0] if value is not None and is_zero(value) else None


def _extremum(eqn: Eqn, defs: Defs) -> Answer:
    # Of two NaNs either may come out: integers and booleans only.
    x, y = eqn.invars
    return x if kind_of(eqn) in ("int", "bool") and same(x, y) else None


def _select(eqn: Eqn, defs: Defs) -> Answer:
    which, *cases = eqn.invars
    if all(same(cases[0], case) for case in cases[1:]):
        return cases[0]
    value = splat_value(which, defs)
    if value is not None:
        # Out of range is undefined, and XLA's answer differs between backends.
        return cases[int(value)] if 0 <= int(value) < len(cases) else None
    if len(cases) != 2:
        return None
    inner = None if which.__class__ is Literal else defs.get(which)
    if inner is not None and inner.primitive is primitives.not_p:
        if inner.ctx is eqn.ctx and kind(which.aval.dtype) == "bool":
            return eqn.replace(invars=[inner.invars[0], cases[1], cases[0]])
    if kind_of(eqn) == "bool" and kind(which.aval.dtype) == "bool":
        off, on = (splat_value(case, defs) for case in cases)
        if off is not None and on is not None and off != on:
            if bool(on):
                return which
            if which.aval == eqn.outvars[0].aval:
                return eqn.replace(
                    primitive=primitives.not_p, invars=[which], params={}
                )
    return None


LOGIC_RULES: dict[object, Rule] = {
    primitives.and_p: _and,
    primitives.or_p: _or,
    primitives.xor_p: _xor,
    primitives.not_p: twice,
    primitives.shift_left_p: _shift,
    primitives.shift_right_logical_p: _shift,
    primitives.shift_right_arithmetic_p: _shift,
    primitives.max_p: _extremum,
    primitives.min_p: _extremum,
    primitives.select_n_p: _select,
}
