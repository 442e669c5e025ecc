"""Which equations may go, be computed once instead of twice, or now instead of later."""

from __future__ import annotations

from jax.core import ShapedArray
from jax.extend.core import primitives

from ._jaxpr import Eqn
from ._values import kind
from ._walk import CALLS

# Same operands, same result, nothing else: JAX's own primitives, without those
# that draw from hidden state, leave memory uninitialized, make tokens, or exist to
# keep two equal things apart or in place (remat, checkpoint names, device_put).
# A primitive from elsewhere is never merged, whatever it says about its effects.
_APART = {
    "call_p",
    "closed_call_p",
    "copy_p",
    "create_token_p",
    "after_all_p",
    "custom_jvp_call_p",
    "custom_lin_p",
    "custom_vjp_call_p",
    "device_put_p",
    "empty2_p",
    "get_p",
    "linear_solve_p",
    "name_p",
    "remat_p",
    "rng_uniform_p",
    "swap_p",
}
PURE = {
    p
    for name, p in vars(primitives).items()
    if name.endswith("_p") and name not in _APART
} - set(CALLS)
# Nor a custom_vjp: its backward rule need not be linear, and a gradient clipped
# twice and added is not the sum clipped once.
PURE_CALLS = set(CALLS) - {primitives.remat_p, primitives.custom_vjp_call_p}

# These hide a program in a parameter and need not say what it does: a loop under
# `jax_scan3` has no effects, whatever its body prints or writes to a ref.
_SILENT = {"call_hi_primitive"}


def touches_only_arrays(eqn: Eqn) -> bool:
    """Whether no operand is a ref, a token, or anything else with an identity."""
    return all(isinstance(v.aval, ShapedArray) for v in eqn.invars)


def may_go(eqn: Eqn) -> bool:
    """Whether `eqn` is there for its results only, except for the jaxprs inside."""
    return (
        not eqn.effects
        and touches_only_arrays(eqn)
        and eqn.primitive.name not in _SILENT
    )


_ANY_KIND = {primitives.eq_p, primitives.ne_p}
_REAL = {primitives.add_p, primitives.mul_p, primitives.add_jaxvals_p}
_EXACT = {
    primitives.and_p,
    primitives.max_p,
    primitives.min_p,
    primitives.or_p,
    primitives.xor_p,
}
COMMUTATIVE = _ANY_KIND | _REAL | _EXACT


def commutes(eqn: Eqn) -> bool:
    """Whether the operands may be swapped without changing the result.

    Not `max` and `min` of floats (of 0.0 and -0.0 either may come out), nor a
    complex product (its two halves round differently). A float sum or product may
    be swapped: only when both operands are NaN does the order choose which of the
    two comes out, and XLA defines neither sign nor payload of a NaN.
    """
    if eqn.primitive in _ANY_KIND:
        return True
    of = kind(eqn.outvars[0].aval.dtype)
    return of == "int" or of == ("bool" if eqn.primitive in _EXACT else "float")
