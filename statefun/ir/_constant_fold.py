"""Constant folding: evaluates what does not depend on any input.

Constants are literals, small closed-over arrays, and what was folded before. A jit
that is called with literals gets a jaxpr of its own for them: this is what removes the
branches that jax.numpy functions take on arguments such as `ddof=0`.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.extend.core import Literal, Var, jaxprs_in_params, primitives

from ._evaluate import evaluate
from ._jaxpr import (
    AnyJaxpr,
    ClosedJaxpr,
    Eqn,
    consts_of,
    free_input,
    free_output,
    rebuild,
)
from ._purity import PURE
from ._values import kind, literable, literal_value, make_literal, plain
from ._walk import CALLS, Env, Rewrite, Walk, alias, read, substitute

MAX_BYTES = 1024
MAX_EQUATIONS = 32

# Random draws are left to run time: their bits depend on the configuration.
_RANDOM = {p for p in PURE if p.name.startswith(("random_", "rng_", "threefry"))}
# Collectives have no value outside their mesh.
_COLLECTIVE = {
    primitives.all_gather_p,
    primitives.all_to_all_p,
    primitives.axis_index_p,
    primitives.pmax_p,
    primitives.pmin_p,
    primitives.ppermute_p,
    primitives.psum_p,
    primitives.ragged_all_to_all_p,
}
# For these the value is beside the point.
_MEANT = {
    primitives.stop_gradient_p,
    primitives.reduce_precision_p,
    primitives.sharding_constraint_p,
}
FOLDABLE = PURE - _RANDOM - _COLLECTIVE - _MEANT


def _small_constant(value: Any) -> np.ndarray | None:
    """A closed-over array as NumPy's, if it is small and on this machine."""
    if isinstance(value, Tracer):
        return None
    if isinstance(value, jax.Array):
        if value.is_deleted() or not value.is_fully_addressable:
            return None
        if len(value.devices()) != 1 or kind(value.dtype) == "other":
            return None
    elif not isinstance(value, (np.ndarray, np.generic, bool, int, float, complex)):
        return None
    if getattr(value, "nbytes", 0) > MAX_BYTES:
        return None
    return np.asarray(value)


class _Fold:
    """One jaxpr being folded; `known` are the variables whose value is constant."""

    def __init__(self, jaxpr: AnyJaxpr, walk: Walk, given: dict[int, Literal]) -> None:
        self.jaxpr = jaxpr
        self.walk = walk
        self.env: Env = {jaxpr.invars[i]: value for i, value in given.items()}
        self.known: dict[Var, np.ndarray] = {}
        for var, const in zip(_constvars(jaxpr), consts_of(jaxpr), strict=True):
            value = _small_constant(const)
            if value is None or value.dtype != getattr(var.aval, "dtype", None):
                continue
            literal = make_literal(value, var.aval)
            if literal is not None:
                self.env[var] = literal
            elif plain(var.aval):
                self.known[var] = value

    def value(self, atom: Any) -> np.ndarray | None:
        if atom.__class__ is Literal:
            return literal_value(atom)
        return self.known.get(atom)

    def fold(self, eqn: Eqn) -> bool:
        """Whether `eqn` has become a constant."""
        if not eqn.invars or eqn.primitive not in FOLDABLE or eqn.effects:
            return False
        values = []
        for atom in eqn.invars:
            value = self.value(atom)
            if value is None:
                return False
            values.append(value)
        if len(eqn.outvars) != 1 or not plain(aval := eqn.outvars[0].aval):
            return False
        if kind(aval.dtype) == "other" or not all(plain(v.aval) for v in eqn.invars):
            return False
        if not (self.may_hold_array(aval, values) if aval.shape else literable(aval)):
            return False
        result = evaluate(eqn, values)
        if result is None:
            return False
        if aval.shape:
            self.known[eqn.outvars[0]] = result
            return True
        literal = make_literal(result, aval)
        return literal is not None and alias(self.env, eqn.outvars[0], literal)

    def may_hold_array(self, aval: Any, values: list[np.ndarray]) -> bool:
        """Arrays become constants of the whole jaxpr, and never larger ones.

        A jaxpr inside a call has no place for constants of its own, and a splat is
        smaller as a broadcast than as an array.
        """
        size = aval.size * aval.dtype.itemsize
        return (
            self.walk.depth == 1
            and isinstance(self.jaxpr, ClosedJaxpr)
            and not aval.weak_type
            and size <= MAX_BYTES
            and size <= sum(v.nbytes for v in values)
        )

    def result(self, eqns: list[Eqn], changed: bool) -> AnyJaxpr:
        jaxpr = self.jaxpr
        outvars = [read(self.env, v) for v in jaxpr.outvars]
        if not changed and all(
            a is b for a, b in zip(outvars, jaxpr.outvars, strict=True)
        ):
            return jaxpr
        constvars, consts = list(_constvars(jaxpr)), list(consts_of(jaxpr))
        held = set(constvars)
        for atom in [*(v for e in eqns for v in e.invars), *outvars]:
            if atom.__class__ is Var and atom in self.known and atom not in held:
                held.add(atom)
                constvars.append(atom)
                consts.append(self.known[atom])
        closed = isinstance(jaxpr, ClosedJaxpr)
        pair = (constvars, consts) if closed else None
        return rebuild(jaxpr, eqns, outvars, consts=pair)


def _constvars(jaxpr: AnyJaxpr) -> list[Var]:
    # Those of an open jaxpr have no values: they are inputs.
    return jaxpr.constvars if consts_of(jaxpr) else []


def _size(jaxpr: AnyJaxpr) -> int:
    """How many equations `jaxpr` has, at all depths."""
    size = len(jaxpr.eqns)
    for eqn in jaxpr.eqns:
        if eqn.primitive in CALLS:
            size += sum(map(_size, jaxprs_in_params(eqn.params)))
    return size


def make_rewrite() -> Rewrite:
    variants: dict[Any, tuple[AnyJaxpr, AnyJaxpr]] = {}

    def specialize(eqn: Eqn, walk: Walk) -> Eqn:
        """A jit called with literals, with those known to its jaxpr."""
        body = eqn.params["jaxpr"]
        given, key = {}, [id(body)]
        for i, v in enumerate(eqn.invars):
            value = literal_value(v)
            if value is None or v.aval != body.invars[i].aval or not free_input(eqn, i):
                continue
            given[i] = v
            key += [i, value.tobytes()]
        if not given:
            return eqn
        key = tuple(key)
        if key not in variants:
            new = body
            if _size(body) <= MAX_EQUATIONS:
                walk.depth += 1
                new = run(body, walk, given)
                walk.depth -= 1
                walk.memo[id(new)] = (new, new)
            variants[key] = (body, new)  # the body is held: no id is used twice
        new = variants[key][1]
        return eqn if new is body else eqn.replace(params={**eqn.params, "jaxpr": new})

    def constant_outputs(eqn: Eqn, env: Env) -> None:
        for i, atom in enumerate(eqn.params["jaxpr"].outvars):
            if atom.__class__ is Literal and free_output(eqn, i):
                alias(env, eqn.outvars[i], atom)

    def run(jaxpr: AnyJaxpr, walk: Walk, given: dict[int, Literal]) -> AnyJaxpr:
        fold = _Fold(jaxpr, walk, given)
        eqns: list[Eqn] = []
        changed = False
        for old in jaxpr.eqns:
            eqn = walk.descend(substitute(old, fold.env) if fold.env else old)
            if eqn.primitive is primitives.jit_p:
                eqn = specialize(eqn, walk)
                constant_outputs(eqn, fold.env)
            elif fold.fold(eqn):
                changed = True
                continue
            changed = changed or eqn is not old
            eqns.append(eqn)
        return fold.result(eqns, changed)

    def rewrite(jaxpr: AnyJaxpr, walk: Walk) -> AnyJaxpr:
        return run(jaxpr, walk, {})

    return rewrite


def constant_fold(jaxpr: ClosedJaxpr) -> ClosedJaxpr:
    """Evaluates what depends on constants only.

    Constants are literals, and closed-over arrays of at most 1024 bytes that live
    on one device of this process. A result of at most 1024 bytes that is no larger
    than its operands replaces its equation: scalars as literals, everywhere; arrays
    as constants of the outermost jaxpr. An inner jit of at most 32 equations that is
    called with literals is folded for these.

    Never folded: effects, random draws, collectives, broadcasts and iotas (they
    are smaller than their value), primitives that do not come with JAX.

    **Arguments:**

    - `jaxpr`: a jaxpr, for instance from `jax.make_jaxpr`.

    **Returns:** a jaxpr with the same inputs, outputs and effects; `jaxpr` itself if
    there is nothing to do.

    !!! example

        ```python
        import jax, jax.numpy as jnp
        from statefun.ir import constant_fold

        jaxpr = jax.make_jaxpr(lambda x: x * (jnp.float32(2) + 1))(2.0)
        print(constant_fold(jaxpr))  # x times 3.0
        ```

    An operation that NumPy does not compute to the same bits, such as `exp`, is
    compiled and run once, on the default device: some tens of milliseconds for each
    kind of operation, the first time.
    """
    return Walk(make_rewrite())(jaxpr)
