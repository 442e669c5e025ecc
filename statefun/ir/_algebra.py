"""Algebraic simplification: replaces equations whose result is another atom.

Only identities that hold for every bit pattern of every input. That rules out the
famous ones on floats: `x + 0` turns -0.0 into 0.0, `x * 0` keeps NaN, `x - x` is
NaN at infinity. It also rules out all but subtraction of zero on complex numbers,
whose product mixes real and imaginary parts.

The rules are in `_rules_arith.py`, `_rules_logic.py` and `_rules_shape.py`.
"""

from __future__ import annotations

from jax.extend.core import JaxprEqn, primitives

from ._jaxpr import AnyJaxpr, ClosedJaxpr, Eqn
from ._rules import Defs
from ._rules_arith import ARITH_RULES
from ._rules_logic import LOGIC_RULES
from ._rules_shape import SHAPE_RULES
from ._walk import Env, Walk, alias, forward

RULES = {**ARITH_RULES, **LOGIC_RULES, **SHAPE_RULES}

# The primitives whose equations some rule inspects.
_WATCHED = {
    primitives.broadcast_in_dim_p,
    primitives.complex_p,
    primitives.neg_p,
    primitives.not_p,
    primitives.reshape_p,
    primitives.squeeze_p,
    primitives.transpose_p,
}


def rewrite(jaxpr: AnyJaxpr, walk: Walk) -> AnyJaxpr:
    defs: Defs = {}

    def visit(eqn: Eqn, env: Env) -> Eqn | None:
        # A rule returns a simpler equation, which may match another rule.
        while (rule := RULES.get(eqn.primitive)) is not None:
            answer = rule(eqn, defs)
            if answer is None:
                break
            if isinstance(answer, JaxprEqn):
                eqn = answer
            elif alias(env, eqn.outvars[0], answer):
                return None
            else:
                break
        if eqn.primitive in _WATCHED:
            defs[eqn.outvars[0]] = eqn
        return eqn

    return forward(jaxpr, walk, visit)


def algebraic_simplification(jaxpr: ClosedJaxpr) -> ClosedJaxpr:
    """Replaces equations that compute a value that exists already.

    `x * 1`, `x / 1`, `x - 0`, `x ** 1`, `x + (-0.0)`; on integers also `x + 0`,
    `x * 0`, `x - x`; `and`, `or`, `xor`, `not` and shifts with nothing to do;
    selects whose outcome is known; `neg` of `neg`; transposes, reshapes and
    broadcasts of their own kind; slices, pads and updates that cover everything.

    NaN, infinities, -0.0, dtypes and weak types are preserved. Two things are up to
    XLA, and not visible to this pass: compiled code already drops `x * 1`, while an
    eager `x * 1` on a CPU flushes subnormals to zero and makes a signaling NaN quiet.

    **Arguments:**

    - `jaxpr`: a jaxpr, for instance from `jax.make_jaxpr`.

    **Returns:** a jaxpr with the same inputs, outputs and effects; `jaxpr` itself if
    there is nothing to do. What only the replaced equations used stays, for `dce`.

    !!! example

        ```python
        import jax
        from statefun.ir import algebraic_simplification

        jaxpr = jax.make_jaxpr(lambda x: -(-(x * 1.0)) + 1)(2.0)
        print(algebraic_simplification(jaxpr))  # no mul, one neg left for dce
        ```
    """
    return Walk(rewrite)(jaxpr)
