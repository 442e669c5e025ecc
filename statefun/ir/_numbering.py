"""Value numbering: keys that are equal exactly if two equations are.

An equation's key is its primitive, its parameters by value, and its operands:
variables as they are, literals by type and bits. Keys never reach from one jaxpr
into another, so what checkpoint computes again inside its own jaxpr stays apart
from the first time. Inner jaxprs are compared by a key of their own, in which
variables are replaced by the order in which they are bound.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jax.extend.core import Jaxpr, Literal, Var

from ._jaxpr import AnyJaxpr, Atom, ClosedJaxpr, Eqn, consts_of
from ._purity import COMMUTATIVE, PURE, PURE_CALLS, commutes, touches_only_arrays
from ._values import kind
from ._walk import CALLS


def likeness(eqn: Eqn) -> Any:
    """What equal equations always share: primitive and variables. Cheap, and rarely
    shared by others, so that few equations ever need a key."""
    atoms = [None if v.__class__ is Literal else v for v in eqn.invars]
    if eqn.primitive in COMMUTATIVE:
        return (eqn.primitive, frozenset(atoms))
    return (eqn.primitive, *atoms)


class Numbers:
    """Keys of equations, and numbers of jaxprs: equal ones get one number."""

    def __init__(self) -> None:
        # By identity; the jaxprs are held, so that no id is used twice.
        self.jaxprs: dict[int, tuple[AnyJaxpr, int | None]] = {}
        self.numbers: dict[Any, int] = {}
        # Classes whose values are keys as they are.
        self.opaque: set[type] = set()

    def key(self, eqn: Eqn, name: Callable[[Var], Any]) -> Any:
        """The key by which two equations are equal; None if it equals no other."""
        primitive, params = eqn.primitive, eqn.params
        if eqn.effects or not touches_only_arrays(eqn):
            return None
        if primitive not in PURE:
            if primitive not in PURE_CALLS or not self._mergeable(eqn):
                return None
        operands: Any = tuple(
            [_literal(v) if v.__class__ is Literal else name(v) for v in eqn.invars]
        )
        if primitive in COMMUTATIVE and commutes(eqn):
            operands = frozenset(operands)
        values = [self._value(v) for v in params.values()]
        return (primitive, eqn.ctx, operands, *params, *values)

    def number(self, jaxpr: AnyJaxpr) -> int | None:
        """The number of a jaxpr, or None if two runs of it can't be merged."""
        known = self.jaxprs.get(id(jaxpr))
        if known is None:
            number, key = None, self._jaxpr_key(jaxpr)
            if key is not None:
                try:
                    number = self.numbers.setdefault(key, len(self.numbers))
                except TypeError:  # a parameter that cannot be hashed
                    pass
            known = self.jaxprs[id(jaxpr)] = (jaxpr, number)
        return known[1]

    def _value(self, value: Any) -> Any:
        """A key that distinguishes 1, True and 1.0, and -0.0 and 0.0."""
        cls = value.__class__
        if cls in self.opaque:
            return (cls, value)
        if cls is tuple or cls is list:
            for item in value:
                if item.__class__ is not int:
                    return (cls, *map(self._value, value))
            return (cls, None, *value)
        if cls is float or cls is complex:
            return (cls, repr(value))
        if isinstance(value, (tuple, list)):
            return (cls, *map(self._value, value))
        if isinstance(value, np.integer):  # an axis, as good as an int
            return (int, int(value))
        if isinstance(value, (np.ndarray, np.generic)):
            return (np.ndarray, value.shape, value.dtype, value.tobytes())
        if isinstance(value, Jaxpr) or isinstance(value, ClosedJaxpr):
            number = self.number(value)
            return (cls, id(value)) if number is None else (Jaxpr, number)
        self.opaque.add(cls)
        return (cls, value)

    def _mergeable(self, eqn: Eqn) -> bool:
        if any(eqn.params.get("donated_invars", ())):
            return False
        for name in CALLS[eqn.primitive]:
            held = eqn.params[name]
            for jaxpr in held if isinstance(held, tuple) else (held,):
                if self.number(jaxpr) is None:
                    return False
        return True

    def _jaxpr_key(self, jaxpr: AnyJaxpr) -> Any:
        if jaxpr.effects:
            return None
        bound: dict[Var, int] = {}
        variables = (*jaxpr.constvars, *jaxpr.invars)
        for v in variables:
            bound[v] = len(bound)
        body = []
        for eqn in jaxpr.eqns:
            key = self.key(eqn, bound.__getitem__)
            if key is None:
                return None
            for v in eqn.outvars:
                bound[v] = len(bound)
            body.append((key, tuple([v.aval for v in eqn.outvars])))
        consts = tuple([id(c) for c in consts_of(jaxpr)])
        avals = tuple([v.aval for v in variables])
        outs = tuple(
            [_literal(v) if v.__class__ is Literal else bound[v] for v in jaxpr.outvars]
        )
        return (avals, consts, tuple(body), outs)


def _literal(atom: Atom) -> Any:
    if kind(atom.aval.dtype) == "other":
        return (Literal, id(atom))
    value = np.asarray(atom.val, dtype=atom.aval.dtype)
    return (atom.aval, value.tobytes())
