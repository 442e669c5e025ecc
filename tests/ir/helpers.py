"""Small questions that the tests ask of jaxprs."""

from collections import Counter

import jax
from jax.extend import core

from statefun import ir

PASSES = {name: getattr(ir, name) for name in ir.OPTIMIZATIONS}


def inner(jaxpr):
    """The jaxprs inside the equations of `jaxpr`, and so on down."""
    for sub in core.subjaxprs(jaxpr):
        yield sub
        yield from inner(sub)


def names(jaxpr):
    """How often each primitive occurs, in all depths."""
    count = Counter(e.primitive.name for e in jaxpr.eqns)
    for sub in core.subjaxprs(jaxpr):
        count += names(sub)
    return count


def top(jaxpr):
    """The primitives of the outermost equations, in order."""
    return [e.primitive.name for e in jaxpr.eqns]


def find(jaxpr, name):
    """The first equation of that primitive, in any depth."""
    for j in (jaxpr, *inner(jaxpr)):
        for eqn in j.eqns:
            if eqn.primitive.name == name:
                return eqn
    raise AssertionError(f"no {name} in {jaxpr}")


def well_formed(jaxpr, original):
    """Passes `check_jaxpr`, has the signature of `original`, and names that fit."""
    core.check_jaxpr(jaxpr.jaxpr)
    assert [str(a) for a in jaxpr.in_avals] == [str(a) for a in original.in_avals]
    assert list(jaxpr.out_avals) == list(original.out_avals)  # weak types included
    assert jaxpr.effects == original.effects
    for j in (jaxpr, *inner(jaxpr)):
        info = j.debug_info
        assert info.arg_names is None or len(info.arg_names) == len(j.invars)
        assert info.result_paths is None or len(info.result_paths) == len(j.outvars)
    info, before = jaxpr.debug_info, original.debug_info
    assert info.arg_names == before.arg_names
    assert info.result_paths == before.result_paths


def checked(name, jaxpr):
    """The pass `name` on `jaxpr`, well-formed, and with nothing left to do."""
    run = PASSES[name]
    once = run(jaxpr)
    well_formed(once, jaxpr)
    assert run(once) is once, f"{name} is not idempotent"
    return once


def trace(fn, *args):
    return jax.make_jaxpr(fn)(*args)
