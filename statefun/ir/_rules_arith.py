"""Identities of arithmetic."""

from __future__ import annotations

import numpy as np
from jax.extend.core import primitives

from ._jaxpr import Eqn
from ._rules import (
    Answer,
    Defs,
    Rule,
    beside,
    constant,
    is_one,
    is_zero,
    kind_of,
    producer,
    twice,
)
from ._values import make_splat, splat_value

_NATIVE = {np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64)}


def _is_plus_zero(value: np.ndarray) -> bool:
    parts = (np.real(value), np.imag(value)) if value.dtype.kind == "c" else (value,)
    return all(bool(p == 0) and not np.signbit(p) for p in parts)


def _is_minus_zero(value: np.ndarray) -> bool:
    return bool(value == 0) and bool(np.signbit(value))


def _add(eqn: Eqn, defs: Defs) -> Answer:
    if not constant(eqn, defs):
        return None
    if kind_of(eqn) == "int":
        return beside(eqn, defs, is_zero)
    # -0.0 is the float that adds nothing: 0.0 + -0.0 is 0.0.
    return beside(eqn, defs, _is_minus_zero) if kind_of(eqn) == "float" else None


def _sub(eqn: Eqn, defs: Defs) -> Answer:
    x, y = eqn.invars
    if x is y and kind_of(eqn) == "int":
        return make_splat(0, eqn)
    value = splat_value(y, defs)
    if value is None or not _is_plus_zero(value) or kind_of(eqn) == "other":
        return None
    return x


def _mul(eqn: Eqn, defs: Defs) -> Answer:
    if not constant(eqn, defs):
        return None
    if kind_of(eqn) not in ("int", "float"):
        return None
    if (x := beside(eqn, defs, is_one)) is not None:
        return x
    if kind_of(eqn) == "int" and beside(eqn, defs, is_zero) is not None:
        return make_splat(0, eqn)
    return None


def _div(eqn: Eqn, defs: Defs) -> Answer:
    x, y = eqn.invars
    value = splat_value(y, defs)
    if value is None or not is_one(value) or kind_of(eqn) not in ("int", "float"):
        return None
    return x


def _integer_pow(eqn: Eqn, defs: Defs) -> Answer:
    return eqn.invars[0] if eqn.params["y"] == 1 else None


def _neg(eqn: Eqn, defs: Defs) -> Answer:
    # A bfloat16 is negated as a float32, and comes back with one NaN for all.
    exact = kind_of(eqn) != "float" or eqn.outvars[0].aval.dtype in _NATIVE
    return twice(eqn, defs) if exact else None


def _part(position: int) -> Rule:
    def rule(eqn: Eqn, defs: Defs) -> Answer:
        inner = producer(eqn, defs, primitives.complex_p)
        return None if inner is None else inner.invars[position]

    return rule


ARITH_RULES: dict[object, Rule] = {
    primitives.add_p: _add,
    primitives.sub_p: _sub,
    primitives.mul_p: _mul,
    primitives.div_p: _div,
    primitives.integer_pow_p: _integer_pow,
    primitives.neg_p: _neg,
    primitives.real_p: _part(0),
    primitives.imag_p: _part(1),
}
