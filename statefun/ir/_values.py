"""Atoms seen as values: scalars, literals, types."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Literal, Var, primitives

from ._jaxpr import Atom, Eqn

_FLOATS = ("float16", "bfloat16", "float32", "float64")


@functools.cache
def kind(dtype: Any) -> str:
    """`bool`, `int`, `float` or `complex`; `other` for whatever is less common.

    That is keys, and the types of four and eight bits that NumPy knows by hearsay
    only: some have no infinity, some saturate, and not every operation exists.
    """
    if not isinstance(dtype, np.dtype):
        return "other"
    if dtype.name in _FLOATS:
        return "float"
    return {"b": "bool", "i": "int", "u": "int", "c": "complex"}.get(
        dtype.kind, "other"
    )


def literal_value(atom: Atom) -> np.ndarray | None:
    """The scalar that a literal holds, in the type it is used at."""
    if atom.__class__ is not Literal or atom.aval.shape:
        return None
    return np.asarray(atom.val, dtype=atom.aval.dtype)


def splat_value(atom: Atom, defs: dict[Var, Eqn]) -> np.ndarray | None:
    """The scalar that every element of `atom` holds, where that can be seen."""
    if atom.__class__ is Literal:
        return literal_value(atom)
    eqn = defs.get(atom)
    if eqn is None or eqn.primitive is not primitives.broadcast_in_dim_p:
        return None
    return literal_value(eqn.invars[0])


@functools.lru_cache(maxsize=4096)
def plain(aval: Any) -> bool:
    """Whether shape, dtype and weak type say it all: no mesh, no memory space."""
    return isinstance(aval, ShapedArray) and aval == ShapedArray(
        aval.shape, aval.dtype, weak_type=aval.weak_type
    )


def make_literal(value: Any, aval: Any) -> Literal | None:
    """A literal of exactly the type `aval`, or None where there is none.

    A weak type has to be carried by a Python scalar: evaluating the jaxpr asks the
    value, not the annotation, for its type. In between sizes (a weak float16) no
    Python scalar has that type.
    """
    value = np.asarray(value)
    if not plain(aval) or aval.shape or value.shape or value.dtype != aval.dtype:
        return None
    if not aval.weak_type:
        return Literal(value, aval)
    scalar = value.item()
    if jax.dtypes.canonicalize_dtype(type(scalar)) != aval.dtype:
        return None
    back = np.asarray(scalar, aval.dtype)
    return Literal(scalar, aval) if back.tobytes() == value.tobytes() else None


def literable(aval: Any) -> bool:
    """Whether a literal may have this type: ask before computing one."""
    return make_literal(np.zeros((), aval.dtype), aval) is not None


def make_splat(value: Any, eqn: Eqn) -> Literal | Eqn | None:
    """What yields `value` in every element of `eqn`'s output: a literal or `eqn'`."""
    (out,) = eqn.outvars
    if not plain(out.aval):
        return None
    scalar = ShapedArray((), out.aval.dtype, weak_type=out.aval.weak_type)
    literal = make_literal(np.asarray(value, out.aval.dtype), scalar)
    if literal is None or not out.aval.shape:
        return literal
    return eqn.replace(
        primitive=primitives.broadcast_in_dim_p,
        invars=[literal],
        params={
            "shape": out.aval.shape,
            "broadcast_dimensions": (),
            "sharding": None,
        },
    )
