"""How every pass reads and rebuilds a jaxpr and the jaxprs inside it.

A pass is a function `rewrite(jaxpr, walk) -> jaxpr`. It rewrites one jaxpr, and
asks `walk` for those inside. Two rules make the passes compose:

- a pass that finds nothing to do returns the object it was given, so that `is`
  tells whether anything changed, all the way up;
- a `Walk` rewrites each jaxpr object once and hands out the same result for it
  each time. Twelve layers that call one inner jit call one inner jit afterwards,
  and JAX still lowers it once.

Going through an equation's jaxprs is safe only where their meaning is known:
`CALLS` lists those primitives, the jaxprs of any other are left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax.core import ShapedArray
from jax.extend.core import Literal, Var, primitives

from ._jaxpr import AnyJaxpr, Atom, Eqn, rebuild

Env = dict[Var, Atom]
Visit = Callable[[Eqn, Env], Eqn | None]
Rewrite = Callable[[AnyJaxpr, "Walk"], AnyJaxpr]

# Primitive -> the parameters that hold its jaxprs (one, or a tuple of them).
CALLS: dict[Any, tuple[str, ...]] = {
    primitives.jit_p: ("jaxpr",),
    primitives.scan_p: ("jaxpr",),
    primitives.while_p: ("cond_jaxpr", "body_jaxpr"),
    primitives.cond_p: ("branches",),
    primitives.remat_p: ("jaxpr",),
    primitives.custom_jvp_call_p: ("call_jaxpr",),
    primitives.custom_vjp_call_p: ("call_jaxpr",),
}


class Walk:
    """One pass at work: what each jaxpr object it met became.

    It also knows its own results, and does not rewrite them again: passes are
    idempotent, and that is what makes a second round over an unchanged jaxpr free.
    """

    def __init__(self, rewrite: Rewrite) -> None:
        self.rewrite = rewrite
        self.depth = 0
        # Keyed by identity; the jaxprs are held so that no id is used twice.
        self.memo: dict[Any, tuple[AnyJaxpr, Any]] = {}

    def __call__(self, jaxpr: AnyJaxpr) -> AnyJaxpr:
        known = self.memo.get(id(jaxpr))
        if known is not None:
            return known[1]
        self.depth += 1
        try:
            new = self.rewrite(jaxpr, self)
        finally:
            self.depth -= 1
        self.memo[id(jaxpr)] = (jaxpr, new)
        self.memo[id(new)] = (new, new)
        return new

    def descend(self, eqn: Eqn) -> Eqn:
        """`eqn` with the jaxprs inside it rewritten."""
        params = eqn.params
        for name in CALLS.get(eqn.primitive, ()):
            old = eqn.params[name]
            if isinstance(old, tuple):
                new = tuple(map(self, old))
                same = all(a is b for a, b in zip(new, old, strict=True))
            else:
                new = self(old)
                same = new is old
            if not same:
                params = {**params, name: new}
        return eqn if params is eqn.params else eqn.replace(params=params)


def substitute(eqn: Eqn, env: Env) -> Eqn:
    """`eqn` reading what `env` says its operands are."""
    for v in eqn.invars:
        if v.__class__ is not Literal and v in env:
            break
    else:
        return eqn
    return eqn.replace(invars=[read(env, v) for v in eqn.invars])


def read(env: Env, atom: Atom) -> Atom:
    return atom if atom.__class__ is Literal else env.get(atom, atom)


def alias(env: Env, var: Var, atom: Atom) -> bool:
    """Let `atom` stand for `var`, if they agree in all that a type says.

    That includes the weak type and the sharding. Only arrays: a ref, or anything
    else that has an identity, stands for itself.
    """
    aval = var.aval
    if not isinstance(aval, ShapedArray) or aval != atom.aval:
        return False
    env[var] = atom
    return True


def forward(jaxpr: AnyJaxpr, walk: Walk, visit: Visit) -> AnyJaxpr:
    """Go through the equations in order, with `visit` deciding about each.

    `visit(eqn, env)` sees an equation with its operands and inner jaxprs already
    rewritten. It returns the equation to keep, or None once `env` holds a stand-in
    for each of its outputs. The order of what is kept never changes.
    """
    env: Env = {}
    eqns: list[Eqn] = []
    changed = False
    for old in jaxpr.eqns:
        eqn = substitute(old, env) if env else old
        new = visit(walk.descend(eqn) if eqn.primitive in CALLS else eqn, env)
        changed = changed or new is not old
        if new is not None:
            eqns.append(new)
    outvars = [read(env, v) for v in jaxpr.outvars]
    if not changed and all(a is b for a, b in zip(outvars, jaxpr.outvars, strict=True)):
        return jaxpr
    return rebuild(jaxpr, eqns, outvars)
