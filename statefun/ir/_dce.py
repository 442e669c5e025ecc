"""Dead code elimination: keeps what an output or an effect needs.

One walk backwards over the equations with the set of variables that are needed.
`DROP_RULES` say which inputs of a call the needed outputs depend on, so liveness
propagates into loops and branches, and out again.
"""

from __future__ import annotations

from jax.core import ShapedArray
from jax.extend.core import Literal, Var, jaxprs_in_params

from ._calls import DROP_RULES
from ._jaxpr import AnyJaxpr, ClosedJaxpr, Eqn, Mask, keep, rebuild
from ._purity import may_go
from ._walk import CALLS


class _Prune:
    """What each jaxpr needs for which outputs, determined once."""

    def __init__(self) -> None:
        # Keyed by identity; the jaxprs are held so that no id is used twice.
        self.held: dict[int, AnyJaxpr] = {}
        self.found: dict[tuple[int, Mask], tuple[list[Eqn], Mask]] = {}
        self.made: dict[tuple[int, Mask, Mask], AnyJaxpr] = {}
        self.may_all_go: dict[int, bool] = {}

    def needs(self, jaxpr: AnyJaxpr, wanted: Mask) -> Mask:
        return self._backwards(jaxpr, wanted)[1]

    def cut(self, jaxpr: AnyJaxpr, ins: Mask, outs: Mask) -> AnyJaxpr:
        key = (id(jaxpr), ins, outs)
        if key not in self.made:
            eqns, _ = self._backwards(jaxpr, outs)
            new = self.made[key] = self._cut(jaxpr, eqns, ins, outs)
            # All that is left is needed: no second look is necessary.
            self.held[id(new)] = new
            self.made[(id(new), (True,) * sum(ins), (True,) * sum(outs))] = new
        return self.made[key]

    def _cut(self, jaxpr: AnyJaxpr, eqns: list[Eqn], ins: Mask, outs: Mask) -> AnyJaxpr:
        closed = isinstance(jaxpr, ClosedJaxpr)
        consts = None
        if closed and jaxpr.consts:
            read = {v for e in eqns for v in e.invars if v.__class__ is not Literal}
            read |= {v for v in keep(jaxpr.outvars, outs) if v.__class__ is not Literal}
            used = [v in read for v in jaxpr.constvars]
            if not all(used):
                consts = (keep(jaxpr.constvars, used), keep(jaxpr.consts, used))
        same = len(eqns) == len(jaxpr.eqns) and all(
            a is b for a, b in zip(eqns, jaxpr.eqns, strict=True)
        )
        if same and consts is None and all(ins) and all(outs):
            return jaxpr
        return rebuild(
            jaxpr, eqns, jaxpr.outvars, keep_in=ins, keep_out=outs, consts=consts
        )

    def _backwards(self, jaxpr: AnyJaxpr, wanted: Mask) -> tuple[list[Eqn], Mask]:
        key = (id(jaxpr), wanted)
        if key in self.found:
            return self.found[key]
        self.held[id(jaxpr)] = jaxpr
        needed = {v for v in keep(jaxpr.outvars, wanted) if v.__class__ is not Literal}
        kept: list[Eqn] = []
        for eqn in reversed(jaxpr.eqns):
            outs = tuple([v in needed for v in eqn.outvars])
            if True not in outs and self._may_go(eqn):
                continue
            if eqn.primitive in CALLS:
                eqn = self._call(eqn, outs)
            needed.update([v for v in eqn.invars if v.__class__ is Var])
            kept.append(eqn)
        kept.reverse()
        # A ref that is passed in stays passed in, read or not.
        ins = tuple(
            [v in needed or not isinstance(v.aval, ShapedArray) for v in jaxpr.invars]
        )
        self.found[key] = (kept, ins)
        return kept, ins

    def _may_go(self, eqn: Eqn) -> bool:
        return may_go(eqn) and all(map(self._all_may_go, jaxprs_in_params(eqn.params)))

    def _all_may_go(self, jaxpr: AnyJaxpr) -> bool:
        key = id(jaxpr)
        if key not in self.may_all_go:
            self.held[key] = jaxpr
            self.may_all_go[key] = all(map(self._may_go, jaxpr.eqns))
        return self.may_all_go[key]

    def _call(self, eqn: Eqn, outs: Mask) -> Eqn:
        rule = DROP_RULES.get(eqn.primitive)
        new = None if rule is None else rule(eqn, outs, self)
        if new is not None:
            return new
        params = eqn.params
        for name in CALLS[eqn.primitive]:
            body = params[name]
            whole = (True,) * len(body.invars), (True,) * len(body.outvars)
            if (cut := self.cut(body, *whole)) is not body:
                params = {**params, name: cut}
        return eqn if params is eqn.params else eqn.replace(params=params)


class Dce:
    """The pass as the pipeline calls it; remembers which jaxprs are clean."""

    def __init__(self) -> None:
        self.prune = _Prune()

    def __call__(self, jaxpr: AnyJaxpr) -> AnyJaxpr:
        return self.prune.cut(
            jaxpr, (True,) * len(jaxpr.invars), (True,) * len(jaxpr.outvars)
        )


def dce(jaxpr: ClosedJaxpr) -> ClosedJaxpr:
    """Removes what no output and no effect needs.

    Descends into jit, checkpoint, cond, scan and while: removes their unused outputs,
    the carries that only fed those, the inputs that are no longer read, and constants.
    Equations with an effect stay, and those that take a ref, and calls whose body JAX
    hides (loops under `jax_scan3`): what they do is not known. So do the inputs and
    outputs of `jaxpr` itself, of custom_jvp and custom_vjp (their rules take every
    argument), of jits with `keep_unused`, and every ref.

    **Arguments:**

    - `jaxpr`: a jaxpr, for instance from `jax.make_jaxpr`.

    **Returns:** a jaxpr with the same inputs, outputs and effects; `jaxpr` itself if
    there is nothing to do.

    !!! example

        ```python
        import jax, jax.numpy as jnp
        from statefun.ir import dce

        jaxpr = jax.make_jaxpr(lambda x: (jnp.sin(x), x + 1)[1])(2.0)
        print(dce(jaxpr))  # add alone
        ```

    Source: liveness as in Aho, Lam, Sethi and Ullman, *Compilers*, 9.2; what a
    call may lose follows the rules of JAX's own dead code elimination.
    """
    return Dce()(jaxpr)
