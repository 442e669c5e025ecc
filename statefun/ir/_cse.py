"""Common subexpression elimination; `_numbering.py` decides what is equal."""

from __future__ import annotations

from typing import Any

from jax.extend.core import DropVar, JaxprEqn, Var

from ._jaxpr import AnyJaxpr, ClosedJaxpr, Eqn
from ._numbering import Numbers, likeness
from ._walk import Env, Rewrite, Walk, alias, forward


class _Table:
    """The first equation of each kind in one jaxpr."""

    def __init__(self, numbers: Numbers) -> None:
        self.numbers = numbers
        # By likeness: an equation that is alone so far, or several by their keys.
        self.alike: dict[Any, Eqn | dict[Any, list[Var]]] = {}

    def first(self, eqn: Eqn) -> list[Var] | None:
        """The outputs of an equal equation seen before; else remember this one."""
        like = likeness(eqn)
        known = self.alike.setdefault(like, eqn)
        if known is eqn:
            return None
        if isinstance(known, JaxprEqn):
            keys: dict[Any, list[Var]] = {}
            self._add(keys, known)
            known = self.alike[like] = keys
        return self._add(known, eqn)

    def _add(self, keys: dict[Any, list[Var]], eqn: Eqn) -> list[Var] | None:
        key = self.numbers.key(eqn, _itself)
        # A DropVar cannot be read: such an equation can't stand in for another.
        first = not any(v.__class__ is DropVar for v in eqn.outvars)
        try:
            if key is None:
                return None
            known = keys.get(key)
            if known is None and first:
                keys[key] = eqn.outvars
            return known
        except TypeError:  # a parameter that cannot be hashed
            return None


def _itself(var: Var) -> Var:
    return var


def make_rewrite() -> Rewrite:
    numbers = Numbers()

    def rewrite(jaxpr: AnyJaxpr, walk: Walk) -> AnyJaxpr:
        table = _Table(numbers)

        def visit(eqn: Eqn, env: Env) -> Eqn | None:
            first = table.first(eqn)
            if first is None:
                return eqn
            pairs = [
                (new, old)
                for new, old in zip(eqn.outvars, first, strict=True)
                if new.__class__ is not DropVar
            ]
            if any(new.aval != old.aval for new, old in pairs):
                return eqn
            return None if all([alias(env, *pair) for pair in pairs]) else eqn

        return forward(jaxpr, walk, visit)

    return rewrite


def cse(jaxpr: ClosedJaxpr) -> ClosedJaxpr:
    """Computes equal things once.

    Two equations are equal if they have one primitive, equal parameters, and equal
    operands: the same variables, or literals of one type and value. Operands of a
    commutative operation are compared in either order. Calls are equal if the
    jaxprs inside are, equation by equation.

    Never merged: anything with an effect, so no read of a ref across a write; two
    callbacks; draws from hidden state; checkpointed functions, whose point is to
    compute again; custom_vjp calls, whose gradients may not add up; primitives that
    do not come with JAX.

    **Arguments:**

    - `jaxpr`: a jaxpr, for instance from `jax.make_jaxpr`.

    **Returns:** a jaxpr with the same inputs, outputs and effects; `jaxpr` itself if
    there is nothing to do.

    !!! example

        ```python
        import jax
        from statefun.ir import cse

        jaxpr = jax.make_jaxpr(lambda x, y: (x + y) * (y + x))(1.0, 2.0)
        print(cse(jaxpr))  # one add, one mul
        ```

    Source: Click, *Global Code Motion, Global Value Numbering*, PLDI 1995.
    """
    return Walk(make_rewrite())(jaxpr)
