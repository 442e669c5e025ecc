"""`filter_jvp`, `filter_vjp`, the Jacobians and the Hessian."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefun as sf

JACOBIANS = ("filter_jacfwd", "filter_jacrev", "filter_hessian")


@pytest.fixture
def w():
    return sf.Param(jnp.array([1.0, 2.0]), name="w")


@pytest.fixture
def count():
    return sf.State(jnp.array(0), name="count")


class Holder(eqx.Module):
    w: sf.Param
    mean: sf.State
    bias: jax.Array

    def __init__(self):
        self.w = sf.Param(jnp.array([1.0, 2.0]), name="w")
        self.mean = sf.State(jnp.zeros(2), name="mean")
        self.bias = jnp.array([3.0, 4.0])

    def __call__(self, x):
        self.mean.value = self.mean.value + x
        return self.w.value * x + self.bias


# -- as in Equinox ------------------------------------------------------------------


def test_filter_linearize_is_there_exactly_if_equinox_has_one():
    assert hasattr(sf, "filter_linearize") == hasattr(eqx, "filter_linearize")


def pure(x, y=1.0):
    return {"out": x**3 * y, "n": 3, "x": x[0]}


def test_without_states_jvp_is_that_of_equinox():
    x = jnp.arange(3.0)
    for primals, tangents in (
        ((x,), (jnp.ones(3),)),
        ((x, 2.0), (jnp.ones(3), None)),
        ((x, jnp.array(2.0)), (None, jnp.array(1.0))),
        ((x, jnp.array(2.0)), (jnp.ones(3), jnp.array(1.0))),
    ):
        ours = sf.filter_jvp(pure, primals, tangents)
        theirs = eqx.filter_jvp(pure, primals, tangents)
        assert eqx.tree_equal(ours, theirs, typematch=True)
    ours = sf.filter_jvp(pure, (x,), (x,), y=jnp.array(2.0))
    theirs = eqx.filter_jvp(pure, (x,), (x,), y=jnp.array(2.0))
    assert eqx.tree_equal(ours, theirs, typematch=True)


def test_without_states_vjp_is_that_of_equinox():
    def f(tree, y):
        return {"a": tree["x"] * y, "b": jnp.sum(tree["x"])}

    primals = {"x": jnp.arange(3.0), "n": 3, "i": jnp.array(1)}, jnp.array(2.0)
    cotangent = {"a": jnp.ones(3), "b": jnp.array(2.0)}
    (ours, pull), (theirs, raw_pull) = (
        sf.filter_vjp(f, *primals),
        eqx.filter_vjp(f, *primals),
    )
    assert eqx.tree_equal(ours, theirs, typematch=True)
    assert eqx.tree_equal(pull(cotangent), raw_pull(cotangent), typematch=True)

    def with_aux(x, y):
        return x * y, {"label": "aux", "x": x}

    out, pull, aux = sf.filter_vjp(with_aux, *(jnp.arange(3.0), 2.0), has_aux=True)
    raw_out, raw_pull, raw_aux = eqx.filter_vjp(
        with_aux, jnp.arange(3.0), 2.0, has_aux=True
    )
    assert eqx.tree_equal((out, aux), (raw_out, raw_aux), typematch=True)
    assert eqx.tree_equal(pull(jnp.ones(3)), raw_pull(jnp.ones(3)), typematch=True)


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", JACOBIANS)
def test_without_states_jacobians_are_those_of_equinox(name, jitted):
    def f(x, y, n=2):
        return jnp.sin(x) * y * n

    x, y = jnp.arange(3.0), jnp.array(2.0)
    ours, theirs = getattr(sf, name)(f), getattr(eqx, name)(f)
    if jitted:
        ours, theirs = sf.filter_jit(ours), eqx.filter_jit(theirs)
    assert eqx.tree_equal(ours(x, y), theirs(x, y), typematch=True)
    assert eqx.tree_equal(ours(x, y=y, n=3), theirs(x, y=y, n=3), typematch=True)


@pytest.mark.parametrize("name", JACOBIANS)
def test_aux_of_jacobians_is_as_in_equinox(name):
    def f(x):
        return x**2, {"x": x, "two": jnp.array(2)}

    x = jnp.arange(3.0)
    ours, theirs = getattr(sf, name)(f, has_aux=True), getattr(eqx, name)(f, True)
    assert eqx.tree_equal(ours(x), theirs(x), typematch=True)


@pytest.mark.parametrize("name", JACOBIANS)
def test_jacobians_of_modules_are_as_in_equinox(name):
    net = eqx.nn.Linear(2, 3, key=jax.random.key(0))
    f = lambda net, x: net(x)  # noqa: E731
    ours, theirs = getattr(sf, name)(f), getattr(eqx, name)(f)
    assert eqx.tree_equal(ours(net, jnp.ones(2)), theirs(net, jnp.ones(2)))


def test_errors_are_of_the_types_that_equinox_raises():
    x = jnp.ones(2)
    cases = [
        lambda m: m.filter_jvp(pure, (x,), (x, x)),
        lambda m: m.filter_jvp(pure, x, x),
        lambda m: m.filter_jvp(pure, (x,), (jnp.ones(3),)),
        lambda m: m.filter_jvp(pure, (x, 1.0), (x, 1.0)),
        lambda m: m.filter_jvp(pure, (jnp.array([1, 2]),), (jnp.array([1, 2]),)),
        lambda m: m.filter_vjp(pure, x)[1](x),
        lambda m: m.filter_vjp(lambda x: x, x, has_aux=True),
        lambda m: m.filter_jacfwd(lambda x: x)(),
        lambda m: m.filter_jacrev(lambda x: x, has_aux=True)(x),
        lambda m: m.filter_jacrev(lambda x: "text")(x),
        lambda m: m.filter_hessian(lambda x: x)(),
        lambda m: m.filter_hessian(lambda x: x)(jnp.array(1)),
    ]
    for i, case in enumerate(cases):
        try:
            case(eqx)
        except Exception as error:
            theirs = type(error)
        else:
            case(sf)
            continue
        with pytest.raises(theirs):
            case(sf)
            pytest.fail(f"case {i} raised nothing, and Equinox {theirs}")


# -- jvp ----------------------------------------------------------------------------


def test_jvp_reads_and_writes_states_as_primal_values(w, count):
    def f(x):
        count.value += 1
        w.value = w.value * x
        return jnp.sum(w.value)

    out, tangent = sf.filter_jvp(f, (jnp.array([3.0, 4.0]),), (jnp.ones(2),))
    assert (out, tangent) == (11.0, 3.0)
    assert count.value == 1
    assert np.array_equal(w.value, [3.0, 8.0])


def tangents_of(holder, **given):
    """A `Holder` of tangents, None where nothing is given."""
    names = ("w", "mean", "bias")
    none = eqx.tree_at(lambda h: [h.w, h.mean, h.bias], holder, [None] * 3)
    leaves = [given.get(name) for name in names]
    return eqx.tree_at(
        lambda h: [h.w, h.mean, h.bias], none, leaves, is_leaf=lambda x: x is None
    )


def test_jvp_takes_a_tangent_in_the_place_of_a_state():
    holder = Holder()
    given = tangents_of(holder, w=jnp.ones(2), bias=jnp.ones(2))
    out, tangent = sf.filter_jvp(
        lambda h, x: h(x), (holder, jnp.array([5.0, 6.0])), (given, None)
    )
    assert np.array_equal(out, [8.0, 16.0])
    assert np.array_equal(tangent, [6.0, 7.0])
    assert np.array_equal(holder.mean.value, [5.0, 6.0])


def test_jvp_of_a_state_that_occurs_twice_takes_the_tangent_once(w):
    class Tied(eqx.Module):
        a: sf.Param
        b: sf.Param

    tied = Tied(w, w)
    given = eqx.tree_at(lambda t: [t.a, t.b], tied, [jnp.ones(2), jnp.ones(2)])
    out, tangent = sf.filter_jvp(lambda t: t.a.value * t.b.value, (tied,), (given,))
    assert np.array_equal(out, [1.0, 4.0])
    assert np.array_equal(tangent, [2.0, 4.0])


def test_jvp_without_a_tangent_for_a_state_takes_it_as_constant():
    holder = Holder()
    out, tangent = sf.filter_jvp(
        lambda x, h: h(x),
        (jnp.array([5.0, 6.0]), holder),
        (jnp.ones(2), tangents_of(holder)),
    )
    assert np.array_equal(out, [8.0, 16.0])
    assert np.array_equal(tangent, [1.0, 2.0])


# -- vjp ----------------------------------------------------------------------------


def test_vjp_gives_cotangents_of_the_params_of_its_primals():
    holder = Holder()
    out, pull = sf.filter_vjp(lambda h, x: h(x), holder, jnp.array([5.0, 6.0]))
    assert np.array_equal(out, [8.0, 16.0])
    assert np.array_equal(holder.mean.value, [5.0, 6.0])
    holder_bar, x_bar = pull(jnp.ones(2))
    assert np.array_equal(holder_bar.w, [5.0, 6.0])
    assert np.array_equal(holder_bar.bias, [1.0, 1.0])
    assert holder_bar.mean is None
    assert np.array_equal(x_bar, [1.0, 2.0])


def test_pulling_back_again_changes_no_state(w, count):
    def f(x):
        count.value += 1
        return w.value * x

    _, pull = sf.filter_vjp(f, jnp.ones(2))
    w.value = jnp.zeros(2)  # later values don't reach what was linearised before
    for _ in range(3):
        assert np.array_equal(pull(jnp.ones(2))[0], [1.0, 2.0])
    assert count.value == 1


def test_vjp_under_jit_can_be_pulled_back_in_there(w, count):
    @sf.filter_jit
    def run(x):
        def f(x):
            count.value += 1
            return w.value * x, "static"

        out, pull, aux = sf.filter_vjp(f, x, has_aux=True)
        return out, pull(jnp.ones(2))[0], aux

    out, bar, aux = run(jnp.array([2.0, 3.0]))
    assert np.array_equal(out, [2.0, 6.0])
    assert np.array_equal(bar, [1.0, 2.0])
    assert (aux, int(count.value)) == ("static", 1)


# -- Jacobians and the Hessian ------------------------------------------------------


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", ["filter_jacfwd", "filter_jacrev"])
def test_jacobians_with_respect_to_states(w, count, name, jitted):
    def f(x):
        count.value += 1
        return w.value**2 * x

    run = getattr(sf, name)(f, wrt=[w, w, count])
    first, again, none = (sf.filter_jit(run) if jitted else run)(jnp.array([3.0, 4.0]))
    assert np.array_equal(first, [[6.0, 0.0], [0.0, 16.0]])
    assert np.array_equal(again, first)
    assert none is None
    assert count.value == 1


@pytest.mark.parametrize("name", ["filter_jacfwd", "filter_jacrev"])
def test_jacobians_of_the_params_of_the_first_argument(name):
    holder = Holder()
    jacobian = getattr(sf, name)(lambda h, x: h(x))(holder, jnp.array([5.0, 6.0]))
    assert np.array_equal(jacobian.w, [[5.0, 0.0], [0.0, 6.0]])
    assert np.array_equal(jacobian.bias, np.eye(2))
    assert jacobian.mean is None
    assert np.array_equal(holder.mean.value, [5.0, 6.0])


@pytest.mark.parametrize("name", ["filter_jacfwd", "filter_jacrev"])
def test_a_state_in_wrt_that_is_never_read_has_zeros(w, name):
    unused = sf.State(jnp.ones(3), name="unused")
    jacobian = getattr(sf, name)(lambda x: w.value * x, wrt=(w, unused))(jnp.ones(2))
    assert np.array_equal(jacobian[1], np.zeros((2, 3)))


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_the_hessian_with_respect_to_states(w, count, jitted):
    b = sf.State(jnp.array(3.0), name="b")

    def f(x):
        count.value += 1
        return jnp.sum(w.value**2 * b.value * x)

    run = sf.filter_hessian(f, wrt={"w": w, "b": b})
    hessian = (sf.filter_jit(run) if jitted else run)(jnp.ones(2))
    want = jax.hessian(lambda t: jnp.sum(t["w"] ** 2 * t["b"]))(
        {"w": jnp.array([1.0, 2.0]), "b": jnp.array(3.0)}
    )
    assert eqx.tree_equal(hessian, want)
    assert count.value == 1


def test_the_hessian_of_the_params_of_the_first_argument():
    holder = Holder()
    hessian = sf.filter_hessian(lambda h, x: jnp.sum(h(x) ** 2))(holder, jnp.ones(2))
    want = jax.hessian(lambda t: jnp.sum((t[0] + t[1]) ** 2))(
        (holder.w.value, holder.bias)
    )
    assert np.array_equal(hessian.w.w, want[0][0])
    assert np.array_equal(hessian.w.bias, want[0][1])
    assert np.array_equal(hessian.bias.w, want[1][0])
    assert np.array_equal(holder.mean.value, [1.0, 1.0])


@pytest.mark.parametrize("name", JACOBIANS)
def test_aux_comes_with_what_was_written(w, count, name):
    def f(x):
        count.value += 1
        return jnp.sum(w.value * x), {"n": count.value, "x": x}

    jacobian, aux = getattr(sf, name)(f, has_aux=True, wrt=w)(jnp.ones(2))
    assert jacobian.shape == ((2, 2) if name == "filter_hessian" else (2,))
    assert aux["n"] == 1
    assert np.array_equal(aux["x"], [1.0, 1.0])
    assert count.value == 1


# -- whatever the transform ---------------------------------------------------------


RUNS = {
    "filter_jvp": lambda f: sf.filter_jvp(f, (jnp.ones(2),), (jnp.ones(2),)),
    "filter_vjp": lambda f: sf.filter_vjp(f, jnp.ones(2)),
    "filter_jacfwd": lambda f: sf.filter_jacfwd(f)(jnp.ones(2)),
    "filter_jacrev": lambda f: sf.filter_jacrev(f)(jnp.ones(2)),
    "filter_hessian": lambda f: sf.filter_hessian(f)(jnp.ones(2)),
}


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", RUNS)
def test_a_function_that_raises_changes_no_state(name, jitted, w, count):
    def f(x):
        count.value += 1
        w.value = w.value * x
        raise RuntimeError("stop")

    run = lambda: RUNS[name](f)  # noqa: E731
    with pytest.raises(RuntimeError, match="stop"):
        (sf.filter_jit(run) if jitted else run)()
    assert count.value == 0
    assert np.array_equal(w.value, [1.0, 2.0])


@pytest.mark.parametrize("name", RUNS)
def test_the_function_runs_once_and_its_writes_hold_no_tracer(name, w, count):
    runs = []

    def f(x):
        runs.append(0)
        count.value += 1
        w.value = w.value + x
        return jnp.sum(w.value * x)

    with jax.checking_leaks():
        RUNS[name](f)
    assert len(runs) == 1
    assert count.value == 1
    assert np.array_equal(w.value, [2.0, 3.0])


@pytest.mark.parametrize("name", RUNS)
def test_a_bare_state_as_the_result_is_refused(name, count):
    with pytest.raises(TypeError, match=r"^State 'count' .* was returned"):
        RUNS[name](lambda x: count)


def test_reverse_over_forward_over_states_is_right(w):
    """A Hessian-vector product in the hand-made way, of a State."""

    def loss(x):
        return jnp.sum(w.value**3 * x)

    def directional(x):
        tangent = jnp.array([1.0, 0.0])
        grad = sf.filter_grad(loss, wrt=w)
        return jnp.sum(grad(x) * tangent)

    product = sf.filter_grad(directional, wrt=w)(jnp.ones(2))
    assert np.array_equal(product, [6.0, 0.0])


# -- backward rules of raw custom derivatives -----------------------------------------


@pytest.fixture
def annealed():
    """A State that a raw backward rule reads, and functions that write it before."""
    strength = sf.State(jnp.float32(1), name="strength")

    @jax.custom_vjp
    def reverse(x):
        return x

    reverse.defvjp(lambda x: (x, None), lambda _, g: (-strength.value * g,))

    def write_and_reverse(x):
        strength.value = 2.0
        return reverse(x)

    return strength, reverse, write_and_reverse


def by_vjp(f):
    return lambda x: sf.filter_vjp(f, x)[1](jnp.float32(1))[0]


def in_scan(f):
    return lambda x: sf.scan(lambda c, _: (f(c), None), x, length=2)[0]


BACKWARD = {
    "grad": sf.filter_grad,
    "jacrev": sf.filter_jacrev,
    "hessian": sf.filter_hessian,
    "vjp": by_vjp,
    "jit of grad": lambda f: sf.filter_jit(sf.filter_grad(f)),
    "grad of jit": lambda f: sf.filter_grad(sf.filter_jit(f)),
    "jit of vjp": lambda f: sf.filter_jit(by_vjp(f)),
    "vmap of grad": lambda f: lambda x: sf.filter_vmap(sf.filter_grad(f))(x[None])[0],
    "grad of checkpoint": lambda f: sf.filter_grad(sf.filter_checkpoint(f)),
    "grad of scan": lambda f: sf.filter_grad(in_scan(f)),
    "grad in scan": lambda f: in_scan(sf.filter_grad(f)),
}


@pytest.mark.parametrize("twin", BACKWARD)
def test_a_raw_backward_rule_may_not_read_what_the_function_has_written(twin, annealed):
    strength, _, f = annealed
    run = BACKWARD[twin](f)
    for _ in range(2):  # again from JAX's caches
        strength.value = 1.0
        with pytest.raises(sf.StateTraceError, match="'strength'.*has written"):
            run(jnp.float32(1))
    assert strength.value == (2 if twin == "vjp" else 1)


@pytest.mark.parametrize("twin", BACKWARD)
def test_a_raw_backward_rule_reads_what_the_function_leaves_alone(twin, annealed):
    strength, reverse, _ = annealed
    other = sf.State(jnp.float32(0))

    def f(x):
        other.value += 1
        return reverse(x)

    run = BACKWARD[twin](f)
    for value in (1.0, 3.0):
        strength.value = value
        want = {"hessian": 0, "grad of scan": value**2}.get(twin, -value)
        assert run(jnp.float32(1)) == want


def test_a_raw_backward_rule_may_not_write_what_the_function_has_written():
    last = sf.State(jnp.float32(0), name="last")

    @jax.custom_vjp
    def f(x):
        return x

    def backward(_, g):
        last.value = 5.0
        return (g,)

    f.defvjp(lambda x: (x, None), backward)

    def write_and_call(x):
        last.value = 1.0
        return f(x)

    with pytest.raises(sf.StateTraceError, match="'last'"):
        sf.filter_grad(write_and_call)(jnp.float32(1))
    assert last.value == 0


def test_a_refused_backward_rule_leaves_the_states_usable(annealed):
    strength, _, f = annealed

    @sf.filter_jit
    def caught(x):
        with pytest.raises(sf.StateTraceError):
            sf.filter_grad(f)(x)
        strength.value += 1
        return strength.value

    assert caught(jnp.float32(1)) == 2
    assert strength.value == 2


class Pair(eqx.Module):
    a: sf.Param
    b: sf.Param


ONE, TWO = jnp.array(1.0), jnp.array(2.0)


@pytest.mark.parametrize(
    "given", [(ONE, ONE), (ONE, None), (None, ONE), (ONE, ONE * 1)]
)
def test_a_state_in_two_places_has_the_tangent_given_in_either(given):
    w = sf.Param(jnp.array(3.0), name="w")

    def f(pair):
        return 2 * pair.a.value + 5 * pair.b.value

    out, tangent = sf.filter_jvp(f, (Pair(w, w),), (Pair(*given),))
    assert out == 21 and tangent == 7
    _, tangent = sf.filter_jvp(
        lambda x, y: f(Pair(x.a, y.a)),
        *zip(
            (Pair(w, w), Pair(given[0], None)),
            (Pair(w, w), Pair(given[1], None)),
            strict=True,
        ),
    )
    assert tangent == 7


@pytest.mark.parametrize("given", [(ONE, TWO), (ONE, jnp.ones(2))])
def test_a_state_in_two_places_has_no_two_tangents(given):
    w = sf.Param(jnp.array(3.0), name="w")
    with pytest.raises(sf.StateValueError, match=r"two tangents for Param 'w'"):
        sf.filter_jvp(lambda pair: pair.a.value, (Pair(w, w),), (Pair(*given),))


def test_tangents_of_states_inside_others_are_used():
    inner = sf.Param(jnp.array(2.0), name="inner")
    outer = sf.Param({"w": jnp.array(3.0), "inner": inner}, name="outer")

    def f(pair):
        return pair.a.value["w"] * pair.a.value["inner"].value

    for at, expected in (({"w": ONE, "inner": ONE}, 5), ({"w": None, "inner": ONE}, 3)):
        _, tangent = sf.filter_jvp(f, (Pair(outer, inner),), (Pair(at, None),))
        assert tangent == expected
    with pytest.raises(
        sf.StateValueError, match="tangent of Param 'outer' .* structure"
    ):
        sf.filter_jvp(f, (Pair(outer, inner),), (Pair({"x": ONE}, None),))
