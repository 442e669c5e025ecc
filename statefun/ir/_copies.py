"""Copy propagation: uses the original instead of its copy.

Values do not change, so a copy of one is the value itself. What looks like a copy
but tells XLA or a person something is kept: `device_put`, sharding constraints,
`optimization_barrier`, `reduce_precision`, `stop_gradient`, checkpoint names.
"""

from __future__ import annotations

from jax.extend.core import DropVar, Literal, Var, primitives

from ._jaxpr import AnyJaxpr, ClosedJaxpr, Eqn, free_input, free_output
from ._rules import Answer, Defs
from ._rules_shape import noop_reshape
from ._walk import Env, Walk, alias, forward


def _copy(eqn: Eqn, defs: Defs) -> Answer:
    return eqn.invars[0]


def _convert(eqn: Eqn, defs: Defs) -> Answer:
    # To the same dtype, that is: `alias` compares the types, the weak one included.
    return eqn.invars[0] if eqn.params["sharding"] is None else None


_COPIES = {
    primitives.copy_p: _copy,
    primitives.convert_element_type_p: _convert,
    primitives.reshape_p: noop_reshape,
    primitives.broadcast_in_dim_p: noop_reshape,
}


def _passed_through(eqn: Eqn, env: Env) -> None:
    """Replaces what a jit returns unchanged, or twice, by where it came from."""
    params = eqn.params
    body = params["jaxpr"]
    position = {v: i for i, v in enumerate(body.invars)}
    first: dict[Var, Var] = {}
    for i, (inner, outer) in enumerate(zip(body.outvars, eqn.outvars, strict=True)):
        if inner.__class__ is Literal or outer.__class__ is DropVar:
            continue
        if not free_output(eqn, i):
            continue
        at = position.get(inner)
        if at is None:
            if (earlier := first.setdefault(inner, outer)) is not outer:
                alias(env, outer, earlier)
        elif free_input(eqn, at) and not params["donated_invars"][at]:
            alias(env, outer, eqn.invars[at])


def rewrite(jaxpr: AnyJaxpr, walk: Walk) -> AnyJaxpr:
    nothing: Defs = {}

    def visit(eqn: Eqn, env: Env) -> Eqn | None:
        if eqn.primitive is primitives.jit_p:
            _passed_through(eqn, env)
            return eqn
        rule = _COPIES.get(eqn.primitive)
        answer = rule(eqn, nothing) if rule is not None else None
        if answer is not None and alias(env, eqn.outvars[0], answer):
            return None
        return eqn

    return forward(jaxpr, walk, visit)


def copy_propagation(jaxpr: ClosedJaxpr) -> ClosedJaxpr:
    """Removes copies, and uses what they copied.

    A copy is a `copy`, a conversion to the dtype and weak type that the value has
    already, a reshape or broadcast to the same shape, or an output that an inner jit
    returns as it came in. None of these is one: `device_put`, a sharding constraint,
    `optimization_barrier`, `reduce_precision`, `stop_gradient`.

    **Arguments:**

    - `jaxpr`: a jaxpr, for instance from `jax.make_jaxpr`.

    **Returns:** a jaxpr with the same inputs, outputs and effects; `jaxpr` itself if
    there is nothing to do.

    !!! example

        ```python
        import jax, jax.numpy as jnp
        from statefun.ir import copy_propagation

        jaxpr = jax.make_jaxpr(lambda x: jnp.array(x, copy=True) + 1)(2.0)
        print(copy_propagation(jaxpr))  # add alone
        ```

    Source: copy propagation as in Aho, Lam, Sethi and Ullman, *Compilers*, 9.1.
    """
    return Walk(rewrite)(jaxpr)
