"""Constant folding: small jaxprs before and after, and what it leaves alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback
from jax.extend.core import Literal, Primitive, jaxpr_as_fun

from statefun import ir
from statefun.ir import _evaluate
from tests.ir.helpers import checked, find, inner, names, top, trace, well_formed
from tests.ir.reference import bits, run

NAME = "constant_fold"
X = jnp.float32(3)
C = np.array([1.0, 2.0, 4.0], np.float32)
V = jnp.arange(3.0)


TABLE = {
    "scalars": (lambda x: x * (jnp.float32(2) + jnp.float32(1)), (X,), ["mul"]),
    "a chain": (lambda x: x + jnp.sqrt(jnp.float32(2) * 8) / 2, (X,), ["add"]),
    "transcendental": (lambda x: x + jnp.exp(jnp.float32(1)), (X,), ["add"]),
    "comparison": (lambda x: x * jnp.float32(jnp.float32(1) < 2), (X,), ["mul"]),
    "nan": (
        lambda x: x + lax.sub(jnp.float32(np.inf), jnp.float32(np.inf)),
        (X,),
        None,
    ),
    "an output": (lambda x: (x, jnp.int32(3) * 4)[1], (X,), []),
    "a closed-over scalar": (lambda x: x * np.float32(2), (X,), ["mul"]),
    "a closed-over array": (lambda x: x + lax.mul(jnp.asarray(C), C), (V,), ["add"]),
    "and then a scalar of it": (
        lambda x: x + lax.reduce_sum(jnp.asarray(C), (0,)),
        (X,),
        ["add"],
    ),
    "an output that is an array": (
        lambda x: (x, lax.neg(jnp.asarray(C)))[1],
        (V,),
        [],
    ),
}


@pytest.mark.parametrize(("fn", "args", "left"), TABLE.values(), ids=TABLE)
def test_before_and_after(fn, args, left):
    jaxpr = trace(fn, *args)
    folded = checked(NAME, jaxpr)
    assert left is None or top(folded) == left
    assert [bits(v) for v in run(folded, *args)] == [bits(v) for v in run(jaxpr, *args)]
    compiled = jax.jit(jaxpr_as_fun(folded))(*args)
    assert [v.aval for v in compiled] == [
        v.aval for v in jax.jit(jaxpr_as_fun(jaxpr))(*args)
    ]


def test_a_jit_called_with_literals_is_folded_for_them():
    jaxpr = trace(lambda x: jnp.var(x, ddof=0) * 2, V)
    assert names(jaxpr)["select_n"] > 0
    best = ir.optimize_jaxpr(jaxpr)
    assert names(best)["select_n"] == 0
    assert names(best).total() <= names(jaxpr).total() - 6
    assert bits(run(best, V)[0]) == bits(run(jaxpr, V)[0])


def call_with_flags(n):
    """A jit of n + 2 equations, called with three pairs of literals, one twice."""

    def body(x, flag, k):
        for _ in range(n):
            x = lax.sin(x)
        return lax.select(flag, x, k)

    fn = jax.jit(body)

    def many(x):
        for k in (1.0, 2.0, 3.0, 1.0):
            x = fn(x, True, k)
        return x

    return trace(many, X)


def test_calls_with_equal_literals_share_their_jaxpr():
    folded = checked(NAME, call_with_flags(2))
    bodies = [e.params["jaxpr"] for e in folded.eqns]
    assert bodies[0] is bodies[3]
    assert len({id(b) for b in bodies}) == 3
    assert all(isinstance(find(b, "select_n").invars[0], Literal) for b in bodies)
    assert bits(run(folded, X)[0]) == bits(run(call_with_flags(2), X)[0])


def test_never_copies_a_large_jit_for_its_literals():
    jaxpr = call_with_flags(40)
    assert checked(NAME, jaxpr) is jaxpr


def test_nothing_to_do_returns_the_object():
    jaxpr = trace(lambda x: x + 1, X)
    assert checked(NAME, jaxpr) is jaxpr


def test_folded_constants_may_go_anywhere():
    """A literal is no variable, and some consumers might want one."""
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = functools.partial(jax.shard_map, mesh=mesh, out_specs=jax.P())

    def fn(x):
        c = jnp.float32(2) + 1
        ref = jax.new_ref(c)
        ref[...] = ref[...] * x
        jax.ref.addupdate(ref, (...,), c)
        jax.debug.callback(lambda c: None, c)
        y = io_callback(lambda v: v, X, c, ordered=True)
        y += spread(lambda a, b: a * b, in_specs=(jax.P(), jax.P()))(x, c)
        y += lax.scan(lambda a, b: (a + b + c, a), c, jnp.ones(3))[0]
        y += lax.while_loop(lambda s: s < c, lambda s: s + c, c)
        y += lax.cond(c > 0, lambda c: c * 2, lambda c: c, c)
        y += jax.checkpoint(lambda c: jnp.sin(c) * c)(c) + jax.nn.relu(c)
        return jax.jit(lambda c: c, donate_argnums=0)(c) + y, ref[...], c

    jaxpr = trace(fn, X)
    best = ir.optimize_jaxpr(jaxpr)
    well_formed(best, jaxpr)
    assert not any(e.primitive.name == "add" and _constant(e) for e in best.eqns)
    got, want = jax.jit(jaxpr_as_fun(best))(X), jax.jit(fn)(X)
    assert [float(v) for v in got] == pytest.approx([float(v) for v in want])


def _constant(eqn):
    return all(isinstance(v, Literal) for v in eqn.invars)


# -- what it must never do


def test_never_touches_an_effect():
    seen = []

    def fn(x):
        jax.debug.callback(seen.append, jnp.float32(1) + 1)
        y = io_callback(lambda v: v, X, jnp.float32(2) * 2, ordered=True)
        return x + y

    jaxpr = trace(fn, X)
    folded = checked(NAME, jaxpr)
    assert top(folded) == ["debug_callback", "io_callback", "add"]
    assert isinstance(folded.eqns[0].invars[0], Literal)
    run(folded, X)
    assert len(seen) == 1


def test_never_draws():
    def fn(x):
        key = jax.random.key(0)
        return x + jax.random.uniform(key) + lax.rng_uniform(0.0, 1.0, ())

    jaxpr = trace(fn, X)
    folded = checked(NAME, jaxpr)
    for primitive in ("random_seed", "random_bits", "rng_uniform"):
        assert names(folded)[primitive] == names(jaxpr)[primitive] == 1


def test_never_blows_up_size():
    def fn(x):
        return x + lax.full((16,), 2.0) + lax.iota(np.float32, 16)

    jaxpr = trace(fn, jnp.zeros(16))
    assert checked(NAME, jaxpr) is jaxpr


@pytest.mark.parametrize(("size", "folds"), [(256, True), (257, False)])
def test_limit_is_1024_bytes(size, folds):
    big = np.arange(size, dtype=np.float32)
    jaxpr = trace(lambda x: x + lax.neg(jnp.asarray(big)), jnp.zeros(size))
    assert ("neg" not in names(checked(NAME, jaxpr))) == folds


def test_never_gives_an_inner_jaxpr_constants():
    fn = jax.jit(lambda x: x + lax.neg(lax.mul(jnp.asarray(C), C)))
    jaxpr = trace(lambda x: fn(x) * fn(x), V)
    folded = checked(NAME, jaxpr)

    def held(jaxpr):
        return [len(getattr(sub, "consts", ())) for sub in inner(jaxpr)]

    assert held(folded) == held(jaxpr)
    assert bits(run(folded, V)[0]) == bits(run(jaxpr, V)[0])


def test_never_reads_a_tracer():
    def outer(c):
        jaxpr = trace(lambda x: x + lax.neg(c), X)
        assert checked(NAME, jaxpr) is jaxpr
        return c

    jax.jit(outer)(X)


def test_works_inside_a_trace():
    def outer(x):
        jaxpr = trace(lambda x: x * jnp.exp(jnp.float32(1)), X)
        folded = checked(NAME, jaxpr)
        assert top(folded) == ["mul"]
        return jaxpr_as_fun(folded)(x)[0]

    assert float(jax.jit(outer)(X)) == float(X * jnp.exp(jnp.float32(1)))


def test_never_reads_a_constant_of_several_devices():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    c = jax.device_put(jnp.arange(4.0), jax.NamedSharding(mesh, jax.P("x")))
    jaxpr = trace(lambda x: x + lax.neg(c), jnp.zeros(4))
    assert checked(NAME, jaxpr) is jaxpr


def test_never_evaluates_a_foreign_primitive():
    calls = []
    foreign = Primitive("foreign")
    foreign.def_abstract_eval(lambda x: x)
    foreign.def_impl(lambda x: calls.append(1) or x)
    jaxpr = trace(lambda x: x + foreign.bind(jnp.float32(1)), X)
    assert checked(NAME, jaxpr) is jaxpr
    assert not calls


def test_never_raises_under_debug_nans():
    jaxpr = trace(lambda x: x + lax.log(jnp.float32(-1)), X)
    with jax.debug_nans(True):
        assert top(checked(NAME, jaxpr)) == ["add"]


def test_never_loses_a_weak_type():
    jaxpr = trace(lambda x: x * (lax.full((), 1.0) + 2.0), 2.0)
    for candidate in (jaxpr, trace(lambda: jnp.sqrt(4.0) * 2.0)):
        folded = checked(NAME, candidate)
        args = [2.0] * len(candidate.in_avals)
        (out,) = jax.jit(jaxpr_as_fun(folded))(*args)
        assert out.weak_type == candidate.out_avals[0].weak_type


def test_never_folds_a_weak_type_that_no_literal_has():
    # A weak float16 exists, but no Python scalar has that type.
    def fn(x):
        return x * (lax.convert_element_type(2.0, np.float16) + 1)

    jaxpr = trace(fn, jnp.float16(1))
    folded = checked(NAME, jaxpr)
    assert bits(run(folded, np.float16(1))[0]) == bits(run(jaxpr, np.float16(1))[0])


def test_equation_that_cannot_run_here_is_left(monkeypatch):
    def refuse(*args, **kwargs):
        raise NotImplementedError("no kernel")

    jaxpr = trace(lambda x: x + jnp.exp(jnp.float32(1)), X)
    assert "exp" not in names(ir.constant_fold(jaxpr))
    monkeypatch.setattr(type(find(jaxpr, "exp").primitive), "bind", refuse)
    assert ir.constant_fold(jaxpr) is jaxpr


def test_numpy_is_not_asked_about_nan_and_subnormals():
    eqn = find(trace(lambda x: x + x, X), "add")

    def asked(eqn, *values):
        values = [np.asarray(v, np.float32) for v in values]
        return _evaluate.with_numpy(eqn, values) is not None

    assert asked(eqn, 1e-37, 1e-37)
    assert not asked(eqn, np.nan, np.nan)
    assert not asked(eqn, 1e-40, 1e-40)
    eqn = find(trace(lambda x, y: x * y, X, X), "mul")
    assert not asked(eqn, 1.2e-38, 0.5)  # whose product is subnormal
    assert not asked(eqn, np.inf, 0)
