"""Which inputs and outputs of a call can be removed, and how.

A rule gets an equation, which of its outputs are needed, and `Prune`. It returns the
equation without what is not needed, or None where the call must keep its signature. A
call keeps every input that it holds a ref or an effect on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from jax.extend.core import primitives

from ._jaxpr import AnyJaxpr, Eqn, Mask, keep, scan_counts, scan_params


@runtime_checkable
class Prune(Protocol):
    def needs(self, jaxpr: AnyJaxpr, wanted: Mask) -> Mask:
        """Which inputs the needed outputs and the effects of `jaxpr` depend on."""
        ...

    def cut(self, jaxpr: AnyJaxpr, ins: Mask, outs: Mask) -> AnyJaxpr:
        """`jaxpr` with these inputs and outputs only."""
        ...


Rule = Callable[[Eqn, Mask, Prune], Eqn | None]


def _or(a: Mask, b: Mask) -> Mask:
    return tuple(x or y for x, y in zip(a, b, strict=True))


def _without(eqn: Eqn, ins: Mask, outs: Mask, params: dict[str, Any]) -> Eqn:
    """`eqn` with other parameters; the same object if they are the same."""
    if all(ins) and all(outs) and all(eqn.params[k] is v for k, v in params.items()):
        return eqn
    return eqn.replace(
        invars=keep(eqn.invars, ins),
        outvars=keep(eqn.outvars, outs),
        params={**eqn.params, **params},
    )


def _tuples(eqn: Eqn, names: tuple[str, ...], mask: Mask) -> dict[str, Any]:
    """Parameters with an entry per input (or output), shortened."""
    if all(mask):
        return {}
    return {name: tuple(keep(eqn.params[name], mask)) for name in names}


def _jit(eqn: Eqn, wanted: Mask, prune: Prune) -> Eqn | None:
    params = eqn.params
    body = params["jaxpr"]
    ins = prune.needs(body, wanted)
    if params["keep_unused"]:
        ins = (True,) * len(ins)
    return _without(
        eqn,
        ins,
        wanted,
        {
            "jaxpr": prune.cut(body, ins, wanted),
            **_tuples(eqn, ("in_shardings", "in_layouts", "donated_invars"), ins),
            **_tuples(eqn, ("out_shardings", "out_layouts"), wanted),
        },
    )


def _remat(eqn: Eqn, wanted: Mask, prune: Prune) -> Eqn | None:
    body = eqn.params["jaxpr"]
    ins = prune.needs(body, wanted)
    # `prevent_cse` may say for each input whether to fence it off.
    fences = ("prevent_cse",) if isinstance(eqn.params["prevent_cse"], tuple) else ()
    params = {"jaxpr": prune.cut(body, ins, wanted), **_tuples(eqn, fences, ins)}
    return _without(eqn, ins, wanted, params)


def _cond(eqn: Eqn, wanted: Mask, prune: Prune) -> Eqn | None:
    branches = eqn.params["branches"]
    ins: Mask = (False,) * (len(eqn.invars) - 1)
    for branch in branches:
        ins = _or(ins, prune.needs(branch, wanted))
    new = tuple(prune.cut(branch, ins, wanted) for branch in branches)
    if all(a is b for a, b in zip(new, branches, strict=True)):
        new = branches
    return _without(eqn, (True, *ins), wanted, {"branches": new})


def _scan(eqn: Eqn, wanted: Mask, prune: Prune) -> Eqn | None:
    counts = scan_counts(eqn)
    if counts is None:
        return None
    consts, carries = counts
    body = eqn.params["jaxpr"]
    carry, ys = wanted[:carries], wanted[carries:]
    while True:
        # A carry is needed if the body reads it to compute another that is needed.
        ins = prune.needs(body, carry + ys)
        grown = _or(carry, ins[consts : consts + carries])
        if grown == carry:
            break
        carry = grown
    ins = ins[:consts] + carry + ins[consts + carries :]
    outs = carry + ys
    params = {"jaxpr": prune.cut(body, ins, outs)}
    if not (all(ins) and all(outs)):
        params |= scan_params(eqn, ins, outs)
    return _without(eqn, ins, outs, params)


def _while(eqn: Eqn, wanted: Mask, prune: Prune) -> Eqn | None:
    params = eqn.params
    test, body = params["cond_jaxpr"], params["body_jaxpr"]
    of_test, of_body = params["cond_nconsts"], params["body_nconsts"]
    test_ins = prune.needs(test, (True,))
    carry = _or(wanted, test_ins[of_test:])
    while True:
        body_ins = prune.needs(body, carry)
        grown = _or(carry, body_ins[of_body:])
        if grown == carry:
            break
        carry = grown
    test_ins = test_ins[:of_test] + carry
    body_ins = body_ins[:of_body] + carry
    return _without(
        eqn,
        test_ins[:of_test] + body_ins,
        carry,
        {
            "cond_jaxpr": prune.cut(test, test_ins, (True,)),
            "body_jaxpr": prune.cut(body, body_ins, carry),
            "cond_nconsts": sum(test_ins[:of_test]),
            "body_nconsts": sum(body_ins[:of_body]),
        },
    )


# custom_jvp and custom_vjp are missing on purpose: their rules take every argument and
# return every result.
DROP_RULES: dict[Any, Rule] = {
    primitives.jit_p: _jit,
    primitives.remat_p: _remat,
    primitives.cond_p: _cond,
    primitives.scan_p: _scan,
    primitives.while_p: _while,
}
