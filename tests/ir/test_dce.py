"""Dead code: what goes, what a call loses with it, and what must stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback
from jax.extend.core import jaxpr_as_fun

from statefun import ir
from tests.ir.helpers import PASSES, checked, find, names, top, trace
from tests.ir.reference import bits, run

NAME = "dce"
X = jnp.arange(3.0)
Y = jnp.ones(3)


def pruned(fn, *args):
    jaxpr = trace(fn, *args)
    new = checked(NAME, jaxpr)
    assert [bits(v) for v in run(new, *args)] == [bits(v) for v in run(jaxpr, *args)]
    want = jax.jit(fn)(*args)
    got = jax.jit(jaxpr_as_fun(new))(*args)
    assert all(map(np.array_equal, jax.tree.leaves(want), got))
    return new


def test_unused_equations_go():
    jaxpr = pruned(lambda x: (lax.sin(x), lax.cos(x) * 2, x + 1)[2], X)
    assert top(jaxpr) == ["add"]


def test_unused_constants_go():
    big = np.arange(1000.0, dtype=np.float32)
    jaxpr = pruned(lambda x: (x + 1, jnp.asarray(big) * 2)[0], X)
    assert jaxpr.consts == []


def test_inputs_and_outputs_stay():
    jaxpr = trace(lambda x, y: (x, 1.0, x), X, Y)
    assert checked(NAME, jaxpr) is jaxpr
    assert len(jaxpr.in_avals) == 2 and len(jaxpr.out_avals) == 3


def test_jit_loses_outputs_and_inputs():
    inner = jax.jit(lambda x, y, z: (lax.sin(x), lax.cos(y), z))
    jaxpr = pruned(lambda x, y: inner(x, y, x)[0], X, Y)
    (eqn,) = jaxpr.eqns
    assert len(eqn.invars) == len(eqn.outvars) == 1
    for name in ("in_shardings", "in_layouts", "donated_invars"):
        assert len(eqn.params[name]) == 1
    for name in ("out_shardings", "out_layouts"):
        assert len(eqn.params[name]) == 1
    info = eqn.params["jaxpr"].debug_info
    assert info.arg_names == ("x",)


def test_jit_keeps_the_right_sharding_and_donation():
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    inner = jax.jit(
        lambda x, y: (x + 1, y + 2),
        in_shardings=(None, here),
        out_shardings=(None, here),
        donate_argnums=1,
    )
    (eqn,) = pruned(lambda x, y: inner(x, y)[1], X, jnp.copy(Y)).eqns
    assert eqn.params["in_shardings"] == eqn.params["out_shardings"] == (here,)
    assert eqn.params["donated_invars"] == (True,)


def test_jit_that_keeps_unused_keeps_its_inputs():
    inner = jax.jit(lambda x, y: (x + 1, y + 2), keep_unused=True)
    (eqn,) = pruned(lambda x, y: inner(x, y)[1], X, Y).eqns
    assert len(eqn.invars) == 2 and len(eqn.outvars) == 1


def test_cond_loses_outputs_and_inputs_of_all_branches():
    def fn(p, x, y, z):
        return lax.cond(
            p, lambda x, y, z: (x, y * 2), lambda x, y, z: (y, x * 3), x, y, z
        )[0]

    jaxpr = pruned(fn, True, X, Y, Y)
    eqn = find(jaxpr, "cond")
    assert len(eqn.invars) == 3 and len(eqn.outvars) == 1  # index, x, y
    assert "mul" not in names(jaxpr)


def test_scan_loses_carries_that_only_fed_themselves():
    def fn(x):
        def step(carry, x):
            a, b, c = carry
            return (a + x, b * 2, c + b), (a, b)

        (a, _, _), (ys, _) = lax.scan(step, (0.0, 1.0, 2.0), x)
        return a, ys

    jaxpr = pruned(fn, X)
    eqn = find(jaxpr, "scan")
    assert len(eqn.params["jaxpr"].in_avals) == 2 and len(eqn.outvars) == 2
    assert "mul" not in names(jaxpr)


def test_scan_keeps_a_carry_that_feeds_another():
    def fn(x):
        def step(carry, x):
            a, b, c, d = carry
            return (a + b, b + c, c + x, d + 1), None

        return lax.scan(step, (0.0, 1.0, 2.0, 3.0), x)[0][0]

    jaxpr = pruned(fn, X)
    assert len(find(jaxpr, "scan").outvars) == 3


def test_scan_loses_constants_and_xs():
    def fn(x, y, z):
        def step(carry, xs):
            return carry + xs[0] + y.sum(), (xs[1] * z, carry)

        return lax.scan(step, 0.0, (x, x))[1][1]

    eqn = find(pruned(fn, X, Y, Y), "scan")
    assert len(eqn.params["jaxpr"].in_avals) == 3  # y or its sum, carry, one xs


def test_while_loses_carries():
    def fn(x, y):
        def body(state):
            i, a, b = state
            return i + 1, a * x, b + y

        return lax.while_loop(lambda s: s[0] < 3, body, (0, x, y))[1]

    jaxpr = pruned(fn, X, Y)
    eqn = find(jaxpr, "while")
    assert len(eqn.outvars) == 2 and eqn.params["body_nconsts"] == 1


def test_while_keeps_what_its_condition_reads():
    def fn(x, y):
        def body(state):
            a, b = state
            return a + 1, b + y

        return lax.while_loop(lambda s: s[1].sum() < 9, body, (x, y))[0]

    assert len(find(pruned(fn, X, Y), "while").outvars) == 2


def test_checkpoint_loses_outputs():
    block = jax.checkpoint(lambda x, y: (lax.sin(x), lax.cos(y)))
    jaxpr = pruned(lambda x, y: block(x, y)[0], X, Y)
    eqn = find(jaxpr, "remat2")
    assert len(eqn.invars) == len(eqn.outvars) == 1
    assert "cos" not in names(jaxpr)


def test_through_all_depths():
    def fn(x):
        def step(carry, x):
            pair = jax.jit(lambda a, b: (a + x, lax.cond(a > 0, jnp.sin, jnp.cos, b)))
            return pair(*carry), None

        return lax.scan(step, (0.0, 1.0), x)[0][0]

    jaxpr = pruned(fn, X)
    left = names(jaxpr)
    assert left["scan"] == left["jit"] == left["add"] == 1
    assert not {"cond", "sin", "cos", "gt"} & set(left)


def test_custom_rules_keep_their_arguments():
    @jax.custom_jvp
    def f(x, y):
        return lax.sin(x), lax.cos(y) * 2

    f.defjvp(lambda primals, tangents: (f(*primals), tangents))

    @jax.custom_vjp
    def g(x, y):
        unused = y * 3  # noqa: F841
        return lax.sin(x), lax.cos(x)

    g.defvjp(lambda x, y: (g(x, y), None), lambda _, ct: (ct[0], ct[1]))

    def fn(x, y):
        return (f(x, y)[0] + g(x, y)[0]).sum()

    jaxpr = pruned(fn, X, Y)
    for name in ("custom_jvp_call", "custom_vjp_call"):
        eqn = find(jaxpr, name)
        assert len(eqn.invars) == len(eqn.outvars) == 2
    assert names(jaxpr)["mul"] == 1  # g's dead one went
    want = jax.grad(fn, (0, 1))(X, Y)
    got = jax.grad(lambda *a: jaxpr_as_fun(jaxpr)(*a)[0], (0, 1))(X, Y)
    assert all(map(np.array_equal, want, got))


# -- what it must never do


def effects(seen):
    def note(tag, x):
        seen.append(tag)
        return np.asarray(x)

    def tell(tag, x):
        jax.debug.callback(lambda v: note(tag, v), x)
        io_callback(lambda v: note(-tag, v), x, x, ordered=True)

    return tell


WRAP = {
    "top": lambda fn, x: fn(x),
    "jit": lambda fn, x: jax.jit(lambda x: (fn(x), x + 1))(x),
    "cond": lambda fn, x: lax.cond(
        x.sum() > 0, lambda x: (fn(x), x)[1], lambda x: x, x
    ),
    "scan": lambda fn, x: lax.scan(lambda c, y: ((fn(x), c)[1], y), 0.0, x),
    "while": lambda fn, x: lax.while_loop(
        lambda s: s[0] < 1, lambda s: (s[0] + 1, (fn(x), s[1])[1]), (0, x)
    ),
}


@pytest.mark.parametrize("wrap", WRAP.values(), ids=WRAP)
def test_never_removes_an_effect(wrap):
    seen = []
    tell = effects(seen)

    def fn(x):
        wrap(lambda x: tell(1, x), x)
        wrap(lambda x: tell(2, x), x)
        return x * 2

    jaxpr = trace(fn, X)
    run(jaxpr, X)
    want = list(seen)
    assert want[:4] == [1, -1, 2, -2] or len(want) == 12
    seen.clear()
    new = checked(NAME, jaxpr)
    run(new, X)
    assert seen == want
    best = ir.optimize_jaxpr(jaxpr)
    seen.clear()
    run(best, X)
    assert seen == want


def test_never_removes_a_write_to_a_ref():
    ref = jax.new_ref(X)

    def fn(ref, x):
        ref[0] = 5.0
        jax.jit(lambda x: ref.__setitem__(1, x[2]))(x)
        lax.fori_loop(0, 2, lambda i, _: jax.ref.addupdate(ref, 2, 1.0), None)
        return x * 2

    jaxpr = jax.make_jaxpr(fn)(ref, X)
    new = checked(NAME, jaxpr)
    for name in ("swap", "addupdate", "scan", "jit"):
        assert names(new)[name] == names(jaxpr)[name]
    best = ir.optimize_jaxpr(jaxpr)
    jaxpr_as_fun(best)(ref, X)
    assert list(ref[...]) == [5.0, 2.0, 4.0]


def test_never_drops_a_ref_that_is_passed():
    def fn(x):
        ref = jax.new_ref(x)
        jax.jit(lambda r, x: x + 1)(ref, x)
        return jax.jit(lambda r, x: x + 1)(ref, x)

    jaxpr = trace(fn, X)
    eqn = checked(NAME, jaxpr).eqns[-1]
    assert len(eqn.invars) == 2


@pytest.fixture(params=[False, True], ids=["scan", "scan3"])
def scan3(request):
    """Whether jax traces loops to a primitive that hides its body and its effects."""
    jax.config.update("jax_scan3", request.param)
    yield request.param
    jax.config.update("jax_scan3", False)


INSIDE = {
    "top": lambda loop, x: loop(x),
    "jit": lambda loop, x: jax.jit(loop)(x),
    "cond": lambda loop, x: lax.cond(x[0] > 0, loop, lambda x: x, x),
    "checkpoint": lambda loop, x: jax.checkpoint(loop)(x),
}


@pytest.mark.parametrize("around", INSIDE.values(), ids=INSIDE)
@pytest.mark.parametrize("name", PASSES)
def test_no_pass_drops_or_merges_loops_that_print(scan3, name, around):
    def loop(x):
        def step(carry, y):
            jax.debug.callback(lambda y: None, y)
            return carry, y * 2.0

        return lax.scan(step, (), x)[1]

    def fn(x):
        around(loop, x)
        return around(loop, x) + around(loop, x)

    jaxpr = trace(fn, X)
    before, after = names(jaxpr), names(PASSES[name](jaxpr))
    assert before["call_hi_primitive" if scan3 else "scan"] == 3
    for loop_name in ("scan", "call_hi_primitive"):
        assert after[loop_name] == before[loop_name]


@pytest.mark.parametrize("name", PASSES)
def test_no_pass_drops_or_merges_what_takes_a_ref(scan3, name):
    def fn(ref, x):
        def body(i, _):
            ref[i] = ref[i] + x[i]

        lax.fori_loop(0, 2, body, None)
        lax.fori_loop(0, 2, body, None)
        jax.jit(lambda r, x: x + 1)(ref, x)
        jax.jit(lambda r, x: x + 1)(ref, x)
        return ref[...]

    jaxpr = jax.make_jaxpr(fn)(jax.new_ref(X), X)
    best = PASSES[name](jaxpr)
    assert top(best) == top(jaxpr)
    ref = jax.new_ref(X)
    (out,) = jaxpr_as_fun(best)(ref, X)
    assert list(out) == [0.0, 3.0, 2.0]


def test_foreign_jaxprs_are_left_alone():
    fn = jax.shard_map(
        lambda x: (lax.sin(x), lax.cos(x) * 1.0)[0],
        mesh=jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,)),
        in_specs=jax.P(),
        out_specs=jax.P(),
    )
    jaxpr = trace(lambda x: (fn(x), x + 1)[0], X)
    assert jaxpr.eqns[0].primitive.name == "shard_map"
    best = ir.optimize_jaxpr(jaxpr)
    assert best.eqns[0].params["jaxpr"] is jaxpr.eqns[0].params["jaxpr"]
    assert top(best) == ["shard_map"]
