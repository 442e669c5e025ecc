"""The sequence: names, order, rounds, and use of the result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import jaxpr_as_fun

from statefun import ir
from statefun.ir import _pipeline
from tests.ir.helpers import PASSES, names, top, trace, well_formed
from tests.ir.reference import bits, run

X = jnp.arange(3.0)


def test_the_names():
    assert ir.OPTIMIZATIONS == (
        "constant_fold",
        "algebraic_simplification",
        "copy_propagation",
        "cse",
        "dce",
    )


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        (None, ()),
        ((), ()),
        ("cse", ("cse",)),
        (["dce", "cse"], ("dce", "cse")),
        (("dce", "dce"), ("dce", "dce")),
        (ir.OPTIMIZATIONS, ir.OPTIMIZATIONS),
    ],
)
def test_normalize(spec, names):
    assert ir.normalize_optimizations(spec) == names


@pytest.mark.parametrize("spec", ["dead_code", ["cse", "dead_code"], ""])
def test_unknown_names_raise_with_the_known_ones(spec):
    with pytest.raises(ValueError, match="Unknown optimization") as caught:
        ir.normalize_optimizations(spec)
    assert all(name in str(caught.value) for name in ir.OPTIMIZATIONS)
    with pytest.raises(ValueError, match="Unknown optimization"):
        ir.optimize_jaxpr(trace(jnp.sin, X), spec)


def test_what_is_no_name_raises():
    with pytest.raises(TypeError, match=r"by its name|Type-check"):
        ir.normalize_optimizations([ir.cse])


def test_no_rounds_raise():
    with pytest.raises(ValueError, match="max_iterations must be at least 1, not 0"):
        ir.optimize_jaxpr(trace(jnp.sin, X), max_iterations=0)


def test_a_sequence_runs_in_the_order_given(monkeypatch):
    ran = []

    def spy(name, make):
        def made():
            run = make()
            return lambda jaxpr: ran.append(name) or run(jaxpr)

        return made

    spies = {name: spy(name, make) for name, make in _pipeline._PASSES.items()}
    monkeypatch.setattr(_pipeline, "_PASSES", spies)
    jaxpr = trace(lambda x: (lax.sin(x) + lax.sin(x), x * 2)[0], X)
    ir.optimize_jaxpr(jaxpr, ["dce", "cse", "constant_fold"], max_iterations=1)
    assert ran == ["dce", "cse", "constant_fold"]
    ran.clear()
    ir.optimize_jaxpr(jaxpr)
    assert ran == [*ir.OPTIMIZATIONS] * 2  # the second round finds nothing


def test_order_matters():
    jaxpr = trace(lambda x: lax.sin(x * 1.0) + lax.sin(x), X)
    first = ("cse", "algebraic_simplification")
    one = ir.optimize_jaxpr(jaxpr, first, max_iterations=1)
    assert names(one)["sin"] == 2
    assert names(ir.optimize_jaxpr(jaxpr, first[::-1], max_iterations=1))["sin"] == 1
    assert names(ir.optimize_jaxpr(jaxpr, first, max_iterations=2))["sin"] == 1


def test_nothing_asked_for_is_nothing_done():
    jaxpr = trace(lambda x: x * 1.0, X)
    assert ir.optimize_jaxpr(jaxpr, None) is jaxpr
    assert ir.optimize_jaxpr(jaxpr, ()) is jaxpr


def test_nothing_to_do_returns_the_object():
    jaxpr = trace(lambda x: jnp.sin(x) + 1, X)
    assert ir.optimize_jaxpr(jaxpr) is jaxpr


def test_the_input_is_not_changed():
    jaxpr = trace(lambda x: (jnp.var(x * 1.0), jnp.sin(x))[0], X)
    before = str(jaxpr)
    ir.optimize_jaxpr(jaxpr)
    assert str(jaxpr) == before


def network(params, x):
    """Layers, a loop, a branch, a checkpoint, custom rules: a bit of everything."""

    def layer(x, w):
        h = jax.nn.relu(x @ w * 1.0)
        h = (h - h.mean(0)) * lax.rsqrt(jnp.var(h, 0, keepdims=True) + 1e-5)
        return jax.checkpoint(jax.nn.gelu)(h), h.sum()

    x, sums = lax.scan(layer, x, params["layers"])
    # Not on a sum of what was normalized: its sign is rounding noise.
    x = lax.cond(params["layers"].sum() > 0, lambda x: x**1, lambda x: x * 2, x)
    x = x + sums.sum()
    return jax.nn.logsumexp(x) + jnp.where(x > 0, x, x).sum()


def arguments():
    k = jax.random.key(0)
    layers = jax.random.normal(k, (3, 4, 4), jnp.float32)
    return {"layers": layers}, jax.random.normal(k, (5, 4), jnp.float32)


def allowed(fn):
    """Under the configuration of users: the strict one refuses parts of jax.nn."""

    def test():
        with (
            jax.numpy_dtype_promotion("standard"),
            jax.numpy_rank_promotion("allow"),
        ):
            fn()

    test.__name__ = fn.__name__
    return test


@allowed
def test_jit_grad_and_vmap_of_the_result():
    params, x = arguments()
    flat, tree = jax.tree.flatten((params, x))
    jaxpr = jax.make_jaxpr(network)(params, x)
    best = ir.optimize_jaxpr(jaxpr)
    well_formed(best, jaxpr)
    assert names(best).total() < names(jaxpr).total()

    def again(params, x):
        return jaxpr_as_fun(best)(*jax.tree.leaves((params, x)))[0]

    assert tree == jax.tree.structure((params, x))
    assert [bits(v) for v in run(best, *flat)] == [bits(v) for v in run(jaxpr, *flat)]
    batch = jnp.stack([x, x * 2])
    for transform, xs in (
        (jax.grad, x),
        (lambda f: jax.vmap(f, in_axes=(None, 0)), batch),
        (lambda f: lambda p, x: jax.jvp(f, (p, x), (p, x))[1], x),
    ):
        want, got = (jax.jit(transform(f))(params, xs) for f in (network, again))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, 1e-4, 1e-4)


@allowed
def test_gradient_programs_keep_their_bits():
    params, x = arguments()
    jaxpr = jax.make_jaxpr(jax.value_and_grad(network))(params, x)
    flat = jax.tree.leaves((params, x))
    want = [bits(v) for v in run(jaxpr, *flat)]
    for name, optimize in PASSES.items():
        once = optimize(jaxpr)
        well_formed(once, jaxpr)
        assert [bits(v) for v in run(once, *flat)] == want, name
        assert optimize(once) is once
    best = ir.optimize_jaxpr(jaxpr)
    well_formed(best, jaxpr)
    assert [bits(v) for v in run(best, *flat)] == want
    assert names(best).total() < 0.9 * names(jaxpr).total()


@allowed
def test_results_of_a_batched_gradient_stay():
    params, x = arguments()
    fn = jax.vmap(jax.grad(network), in_axes=(None, 0))
    args = params, jnp.stack([x, x * 2])
    jaxpr = jax.make_jaxpr(fn)(*args)
    best = ir.optimize_jaxpr(jaxpr)
    well_formed(best, jaxpr)
    flat = jax.tree.leaves(args)
    got, want = jax.jit(jaxpr_as_fun(best))(*flat), jax.tree.leaves(fn(*args))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, 1e-4, 1e-4)


def test_x64():
    with jax.enable_x64(True):
        x = jnp.arange(3.0)
        assert x.dtype == np.float64

        def fn(x):
            y = x * 1.0 + (jnp.float64(1) / 3) + jnp.int64(2).astype(np.float64)
            return lax.neg(lax.neg(y)) / jnp.sqrt(jnp.float64(2))

        jaxpr = trace(fn, x)
        best = ir.optimize_jaxpr(jaxpr)
        well_formed(best, jaxpr)
        assert top(best) == ["add", "add", "div"]
        assert bits(run(best, x)[0]) == bits(run(jaxpr, x)[0])
    # And without it: what 64 bits computed is left alone, not cut to 32.
    late = ir.optimize_jaxpr(jaxpr)
    with jax.enable_x64(True):
        assert bits(run(late, x)[0]) == bits(run(jaxpr, x)[0])


def test_equal_inner_jaxprs_stay_one_object():
    inner = jax.jit(lambda x: (jnp.sin(x) * 1.0 + jnp.sin(x), x))

    def fn(x):
        for _ in range(12):
            x = inner(x)[0]
        return x

    for optimize in (*PASSES.values(), ir.optimize_jaxpr):
        best = optimize(trace(fn, X))
        bodies = {id(e.params["jaxpr"]) for e in best.eqns}
        assert len(best.eqns) == 12 and len(bodies) == 1
