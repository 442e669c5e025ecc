"""Values of States that nothing may be differentiated with respect to.

A State may be read where its derivative would be lost on the way: in a function with a
custom derivative, whose rule knows of its arguments only, or by a solver of lineax, which
differentiates with respect to the arrays that it finds in its operator. Equinox converts
no closure of a function that has none, so that such an operator reads a State by a global
behind the solver's back. The derivative would be zero, and nobody would be told.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.tree_util as jtu
from jax.custom_derivatives import SymbolicZero

from .._errors import StateTraceError, message
from .._state.cell import Cell, Value, Values


def not_differentiated(
    values: Values, error: Callable[[Cell], StateTraceError]
) -> Values:
    """The values, such that differentiating with respect to them raises."""
    if not values:
        return values

    @jax.custom_jvp
    def identity(values: Values) -> Values:
        return values

    def rule(primals: Any, tangents: Any) -> Any:
        ((values,), (tangents,)) = primals, tangents
        for cell, (tangent, _) in tangents.items():
            leaves = jtu.tree_leaves(tangent, is_leaf=_is_zero)
            if not all(map(_is_zero, leaves)):
                raise error(cell)
        return values, tangents

    identity.defjvp(rule, symbolic_zeros=True)
    return identity(values)


def _is_zero(x: Any) -> bool:
    return isinstance(x, SymbolicZero)


def as_read_by_solver(cell: Cell, value: Value) -> Value:
    """The value of a State that is read, as a solver of lineax may see it.

    What its `init` makes of the operator is a constant to lineax, so it may use the
    value. Its `compute` runs when JAX compiles, too, when the State can't be reached.
    """
    lineax = sys.modules.get("lineax")
    if lineax is None:
        return value
    method = _method_of(vars(lineax).get("AbstractLinearSolver", ()))
    if method is None:
        return value
    if method != "init":
        raise _read_by_solver(cell)
    return not_differentiated(Values({cell: value}), _read_by_solver)[cell]


def _method_of(solver: Any) -> str | None:
    """The method of a solver under way, the outermost one."""
    found, frame = None, inspect.currentframe()
    while frame is not None:
        code = frame.f_code
        # Looking into a frame takes long, so its name is asked first.
        if code.co_name in ("init", "compute") and code.co_argcount:
            if isinstance(frame.f_locals.get(code.co_varnames[0]), solver):
                found = code.co_name
        frame = frame.f_back
    return found


def _read_by_solver(cell: Cell) -> StateTraceError:
    return StateTraceError(
        message(
            f"{cell.describe()} was read by a solver of lineax, in an operator that "
            "does not hold its value.",
            "lineax differentiates with respect to the arrays in an operator. Equinox "
            "does not convert a function without a closure (one that reaches the State "
            "by a global), nor an operator with the State as a leaf: the derivative "
            "would be silently zero.",
            "read the State before the operator is made, and use that array in it "
            "(`a = state.value`; `lx.FunctionLinearOperator(lambda x: a @ x, …)`).",
        )
    )
