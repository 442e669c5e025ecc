"""Common subexpressions: what is one, and what only looks like one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import ClosedJaxpr, Literal, Primitive, jaxpr_as_fun

from statefun import ir
from tests.ir.helpers import checked, find, names, top, trace
from tests.ir.programs import DTYPES, kind, specials
from tests.ir.reference import bits, run

NAME = "cse"
X = jnp.arange(3.0)
Y = jnp.arange(3.0) - 1
N = jnp.arange(3)


def left(fn, *args):
    """How many of each primitive are left."""
    jaxpr = trace(fn, *args)
    merged = checked(NAME, jaxpr)
    before, after = run(jaxpr, *args), run(merged, *args)
    assert [bits(a) for a in before] == [bits(a) for a in after]
    return names(merged)


def gelu(x):
    return jax.jit(lambda x: x * jnp.tanh(x))(x)


TABLE = {
    "twice": (lambda x: lax.sin(x) + lax.sin(x), (X,), {"sin": 1, "add": 1}),
    "a chain": (
        lambda x: lax.exp(lax.sin(x)) * lax.exp(lax.sin(x)),
        (X,),
        {"sin": 1, "exp": 1, "mul": 1},
    ),
    "operands in either order": (
        lambda x, y: (x + y) * (y + x),
        (X, Y),
        {"add": 1, "mul": 1},
    ),
    "literals in either order": (
        lambda x: lax.add(x, np.float32(2)) * lax.add(np.float32(2), x),
        (X,),
        {"add": 1, "mul": 1},
    ),
    "equality in either order": (
        lambda x, y: (x == y) & (y == x),
        (X, Y),
        {"eq": 1, "and": 1},
    ),
    "maximum of integers": (
        lambda x: lax.max(x, x[::-1]) + lax.max(x[::-1], x),
        (N,),
        {"rev": 1, "max": 1, "add": 1},
    ),
    "same splat": (
        lambda x: (
            lax.full((3,), np.float32(2)) * x,
            lax.full((3,), np.float32(2)) / x,
        ),
        (X,),
        {"broadcast_in_dim": 1, "mul": 1, "div": 1},
    ),
    "equal jits": (
        lambda x: gelu(x) + gelu(x),
        (X,),
        {"jit": 1, "mul": 1, "tanh": 1, "add": 1},
    ),
    "equal scans": (
        lambda x: (
            lax.scan(lambda c, y: (c + y, c), 0.0, x)[0]
            - lax.scan(lambda c, y: (c + y, c), 0.0, x)[0]
        ),
        (X,),
        None,
    ),
    "inside a jit": (
        lambda x: jax.jit(lambda x: lax.sin(x) + lax.sin(x))(x),
        (X,),
        {"jit": 1, "sin": 1, "add": 1},
    ),
    "draws with the same key": (
        lambda k: jax.random.bits(k) ^ jax.random.bits(k),
        (jax.random.key(1),),
        {"random_bits": 1, "xor": 1},
    ),
    "several outputs": (
        lambda x: [
            a + b for a, b in zip(lax.top_k(x, 2), lax.top_k(x, 2), strict=True)
        ],
        (X,),
        {"top_k": 1, "add": 2},
    ),
}


@pytest.mark.parametrize(("fn", "args", "want"), TABLE.values(), ids=TABLE)
def test_before_and_after(fn, args, want):
    got = left(fn, *args)
    if want is None:
        assert got["scan"] == 1
    else:
        assert dict(got) == want


def test_jaxprs_are_compared_by_value():
    # Two traces of two functions: other objects, other variables, same equations.
    fns = [jax.jit(lambda x: lax.sin(x) * 2 + 1) for _ in range(2)]
    jaxpr = trace(lambda x: fns[0](x) + fns[1](x), X)
    bodies = [e.params["jaxpr"] for e in jaxpr.eqns[:2]]
    assert bodies[0] is not bodies[1]
    assert names(checked(NAME, jaxpr))["jit"] == 1


def body(k):
    return jax.jit(lambda x: lax.sin(x) * k)


UNLIKE = {
    "order of a difference": (lambda x, y: (x - y) + (y - x), (X, Y)),
    "maximum of floats": (lambda x, y: lax.max(x, y) - lax.max(y, x), (X, Y)),
    "complex product": (
        lambda x, y: lax.mul(x, y) - lax.mul(y, x),
        (X.astype(np.complex64), Y.astype(np.complex64)),
    ),
    "0.0 and -0.0": (lambda x: (x * np.float32(0.0)) / (x * np.float32(-0.0)), (X,)),
    "draws with two keys": (
        lambda k, m: jax.random.bits(k) ^ jax.random.bits(m),
        (jax.random.key(1), jax.random.key(1)),
    ),
    "draws of two shapes": (
        lambda k: (jax.random.bits(k, (2,)), jax.random.bits(k, (3,))),
        (jax.random.key(1),),
    ),
    "jits with other literals": (lambda x: body(2.0)(x) + body(3.0)(x), (X,)),
    "other axes": (lambda x: (x.sum(0), x.sum(1)), (jnp.ones((3, 3)),)),
    "barriers": (
        lambda x: lax.optimization_barrier(x) + lax.optimization_barrier(x),
        (X,),
    ),
    "copies": (lambda x: jnp.copy(x) * jnp.copy(x), (X,)),
}


@pytest.mark.parametrize(("fn", "args"), UNLIKE.values(), ids=UNLIKE)
def test_unlike_equations_stay_apart(fn, args):
    jaxpr = trace(fn, *args)
    assert len(jaxpr.eqns) > 1
    assert checked(NAME, jaxpr) is jaxpr


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_commuted_operands_agree(dtype):
    """For all pairs of special values, of which at most one is NaN."""
    values = specials(dtype)
    x, y = (v.ravel() for v in np.meshgrid(values, values))
    with np.errstate(all="ignore"):
        one_nan = ~((x != x) & (y != y))
    x, y = x[one_nan], y[one_nan]
    for op in (lax.add, lax.mul, lax.max, lax.min, lax.bitwise_and, lax.eq):
        try:
            jaxpr = trace(lambda x, y, op=op: (op(x, y), op(y, x)), x, y)
        except TypeError:  # no bits in a float, no order in complex numbers
            continue
        merged = checked(NAME, jaxpr)
        want = op in (lax.add, lax.eq) or kind(dtype) == "int"
        want = want and not (kind(dtype) == "complex" and op is lax.add)
        want = want or (op is lax.mul and kind(dtype) == "float")
        assert (len(merged.eqns) == 1) == want
        assert [bits(a) for a in run(merged, x, y)] == [
            bits(a) for a in run(jaxpr, x, y)
        ]


# -- what it must never do


def test_never_merges_callbacks():
    seen = []

    def note(x):
        seen.append(float(np.asarray(x)[1]))
        return np.asarray(x)

    def fn(x):
        jax.debug.callback(note, x)
        jax.debug.callback(note, x)
        a = io_callback(note, X, x, ordered=True)
        b = io_callback(note, X, x, ordered=True)
        return a + b

    jaxpr = trace(fn, X)
    merged = checked(NAME, jaxpr)
    assert merged is jaxpr
    run(merged, X)
    assert seen == [1.0] * 4


def test_never_merges_calls_that_hold_a_callback():
    seen = []

    @jax.jit
    def noisy(x):
        jax.debug.callback(lambda v: seen.append(1), x)
        return lax.sin(x)

    jaxpr = trace(lambda x: noisy(x) + noisy(x), X)
    assert checked(NAME, jaxpr) is jaxpr
    run(jaxpr, X)
    assert len(seen) == 2


def test_never_merges_reads_across_a_write():
    def fn(x):
        ref = jax.new_ref(x)
        before = ref[...]
        ref[...] = before * 2
        after = ref[...]
        jax.ref.addupdate(ref, (...,), x)
        jax.ref.addupdate(ref, (...,), x)
        return before, after, ref[...]

    jaxpr = trace(fn, X)
    merged = checked(NAME, jaxpr)
    assert names(merged) == names(jaxpr)
    assert [list(v) for v in jaxpr_as_fun(merged)(X)] == [
        [0, 1, 2],
        [0, 2, 4],
        [0, 4, 8],
    ]


def test_never_merges_two_refs():
    def fn(x):
        a, b = jax.new_ref(x), jax.new_ref(x)
        a[0] = 7.0
        return a[...], b[...]

    jaxpr = trace(fn, X)
    assert names(checked(NAME, jaxpr))["new_ref"] == 2
    assert [list(v) for v in jaxpr_as_fun(ir.cse(jaxpr))(X)] == [[7, 1, 2], [0, 1, 2]]


def test_never_merges_draws_from_hidden_state():
    jaxpr = trace(lambda: lax.rng_uniform(0.0, 1.0, ()) - lax.rng_uniform(0.0, 1.0, ()))
    assert names(checked(NAME, jaxpr))["rng_uniform"] == 2


def test_never_merges_a_foreign_primitive():
    foreign = Primitive("foreign")
    foreign.def_abstract_eval(lambda x: x)
    jaxpr = trace(lambda x: foreign.bind(x) + foreign.bind(x), X)
    assert checked(NAME, jaxpr) is jaxpr
    inside = trace(lambda x: jax.jit(foreign.bind)(x) + jax.jit(foreign.bind)(x), X)
    assert checked(NAME, inside) is inside


def test_never_merges_pure_callbacks():
    fn = functools.partial(jax.pure_callback, lambda x: x, X)
    jaxpr = trace(lambda x: fn(x) + fn(x), X)
    assert checked(NAME, jaxpr) is jaxpr


def test_never_defeats_checkpoint():
    block = jax.checkpoint(lambda x: lax.sin(lax.sin(x)))
    jaxpr = trace(lambda x: block(x) + block(x), X)
    assert checked(NAME, jaxpr) is jaxpr  # twice on purpose

    grads = trace(jax.value_and_grad(lambda x: block(block(x)).sum()), X)
    best = ir.optimize_jaxpr(grads)
    assert names(best)["remat2"] == names(grads)["remat2"] == 2
    # four forward, and inside each checkpoint one that is computed again
    assert names(best)["sin"] == names(grads)["sin"] == 6
    remats = [e for e in best.eqns if e.primitive.name == "remat2"]
    assert [names(e.params["jaxpr"])["sin"] for e in remats] == [1, 1]
    assert all(
        e.params["prevent_cse"] for e in best.eqns if e.primitive.name == "remat2"
    )


def test_checkpoint_is_still_cleaned_inside():
    jaxpr = trace(lambda x: jax.checkpoint(lambda x: lax.sin(x) + lax.sin(x))(x), X)
    assert names(checked(NAME, jaxpr))["sin"] == 1


def test_never_changes_a_gradient_that_does_not_add_up():
    @jax.custom_vjp
    def clip(x):
        return x

    clip.defvjp(lambda x: (x, None), lambda _, ct: (jnp.clip(ct, -1, 1),))

    def fn(x):
        return (3 * clip(x) + 3 * clip(x)).sum()

    jaxpr = trace(fn, X)
    merged = checked(NAME, jaxpr)
    got = jax.grad(lambda x: jaxpr_as_fun(merged)(x)[0])(X)
    assert list(jax.grad(fn)(X)) == list(got) == [2, 2, 2]


def test_never_merges_what_is_to_run_in_two_places():
    def fn(x):
        y = lax.sin(x)
        with set_xla_metadata(stream="other"):
            return y + lax.sin(x)

    jaxpr = trace(fn, X)
    assert checked(NAME, jaxpr) is jaxpr


def test_never_merges_jits_that_donate():
    fn = jax.jit(lambda x: lax.sin(x), donate_argnums=0)
    jaxpr = trace(lambda x: fn(x) + fn(x), X)
    assert checked(NAME, jaxpr) is jaxpr


def test_never_mixes_up_literals_of_two_types():
    weak = Literal(1.0, jax.core.ShapedArray((), np.float32, weak_type=True))
    strong = Literal(np.float32(1), jax.core.ShapedArray((), np.float32))
    jaxpr = trace(lambda x: (x + np.float32(1), x + np.float32(1)), X)
    first, second = jaxpr.eqns
    eqns = [
        first.replace(invars=[first.invars[0], weak]),
        second.replace(invars=[second.invars[0], strong]),
    ]
    jaxpr = ClosedJaxpr(jaxpr.jaxpr.replace(eqns=eqns), [])
    assert ir.cse(jaxpr) is jaxpr


PARAMS = [
    1,
    True,
    1.0,
    0.0,
    -0.0,
    "1",
    None,
    (1,),
    (True,),
    (1.0,),
    ((1,),),
    (),
    ("1",),
]


def test_parameters_are_compared_by_type_and_value():
    jaxpr = trace(lambda x: tuple(lax.sin(x) for _ in PARAMS * 2), X)
    eqns = [
        eqn.replace(params={**eqn.params, "extra": value})
        for eqn, value in zip(jaxpr.eqns, PARAMS * 2, strict=True)
    ]
    jaxpr = ClosedJaxpr(jaxpr.jaxpr.replace(eqns=eqns), [])
    merged = ir.cse(jaxpr)
    assert [e.params["extra"] for e in merged.eqns] == PARAMS
    assert merged.jaxpr.outvars[: len(PARAMS)] == merged.jaxpr.outvars[len(PARAMS) :]


def test_parameters_that_cannot_be_hashed():
    jaxpr = trace(lambda x: (lax.sin(x), lax.sin(x), lax.cos(x), lax.cos(x)), X)
    extras = [np.arange(3), np.arange(3), {1: 2}, {1: 2}]
    eqns = [
        eqn.replace(params={**eqn.params, "extra": value})
        for eqn, value in zip(jaxpr.eqns, extras, strict=True)
    ]
    jaxpr = ClosedJaxpr(jaxpr.jaxpr.replace(eqns=eqns), [])
    assert top(ir.cse(jaxpr)) == ["sin", "cos", "cos"]


def test_dropped_outputs_are_not_read():
    def fn(x):
        values, _ = lax.top_k(x, 2)
        _, places = lax.top_k(x, 2)
        return values, places

    jaxpr = trace(lambda x: jax.jit(fn)(x), X)
    pruned = ir.dce(jaxpr)
    for candidate in (jaxpr, pruned):
        merged = checked(NAME, candidate)
        assert [bits(v) for v in run(merged, X)] == [bits(v) for v in run(jaxpr, X)]


def test_values_do_not_leak_between_jaxprs():
    def fn(x):
        y = lax.sin(x)
        return lax.cond(True, lambda x: lax.sin(x), lambda x: lax.sin(x) + 1, x) + y

    jaxpr = trace(fn, X)
    assert names(checked(NAME, jaxpr)) == names(jaxpr)
    assert find(jaxpr, "cond")
