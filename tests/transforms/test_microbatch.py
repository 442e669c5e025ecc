"""`microbatch=` of `filter_grad` and `filter_value_and_grad`: the gradient of a batch, by
parts."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import statefun as sf


@pytest.fixture
def w():
    return sf.Param(jax.random.normal(jax.random.key(0), (3,)), name="w")


X = jax.random.normal(jax.random.key(1), (12, 3))
Y = jax.random.normal(jax.random.key(2), (12,))


def mean_loss(w):
    return lambda x, y: jnp.mean((x @ w.value - y) ** 2)


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("count", [1, 2, 3, 12])
def test_the_gradient_of_a_mean_is_that_of_the_whole_batch(w, count, jitted):
    wrap = sf.filter_jit if jitted else lambda f: f
    whole = sf.filter_value_and_grad(mean_loss(w), wrt=w)(X, Y)
    parts = sf.filter_value_and_grad(mean_loss(w), wrt=w, microbatch=count)
    loss, grad = wrap(parts)(X, Y)
    np.testing.assert_allclose(loss, whole[0], rtol=1e-6)
    np.testing.assert_allclose(grad, whole[1], rtol=1e-5)
    only = sf.filter_grad(mean_loss(w), wrt=w, microbatch=count)(X, Y)
    np.testing.assert_allclose(only, grad, rtol=1e-6)
    assert jax.typeof(grad) == jax.typeof(whole[1])
    assert jax.typeof(loss) == jax.typeof(whole[0])


def test_without_wrt_the_first_argument_is_left_whole_and_so_are_keywords(key):
    net = eqx.nn.MLP(3, "scalar", 4, 1, key=key)  # with an activation function in it

    seen = []

    def loss(net, batch, *, scale, label):
        seen.append((batch["x"].shape, batch["kind"], label))
        return scale * jnp.mean((jax.vmap(net)(batch["x"]) - batch["y"]) ** 2)

    batch = {"x": X, "y": np.asarray(Y), "kind": "k"}
    more = {"scale": jnp.array(2.0), "label": "l"}
    whole = eqx.filter_grad(loss)(net, batch, **more)
    parts = sf.filter_grad(loss, microbatch=3)(net, batch, **more)
    assert seen == [((12, 3), "k", "l"), ((4, 3), "k", "l")]
    assert jax.tree.structure(whole) == jax.tree.structure(parts)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_states_advance_once_for_each_part_in_order(w, jitted):
    norm = sf.nn.BatchNorm(3)
    rng = sf.Rng(0)
    mean = sf.metrics.Mean()
    count = sf.State(jnp.array(0), name="count")
    runs = 0

    def loss(x, y):
        nonlocal runs
        runs += 1
        count.value += 1
        noise = 0.1 * jax.random.normal(rng(), y.shape)
        out = jnp.mean((norm(x) @ w.value - y + noise) ** 2)
        mean.update(out)
        return out

    whole = lambda: [  # noqa: E731
        jax.tree.leaves(sf.freeze((norm, mean, count))),
        jax.random.key_data(rng.value),
    ]
    start = sf.freeze((norm, mean, count, rng))
    grad = sf.filter_value_and_grad(loss, wrt=w)
    several = [grad(X[i : i + 4], Y[i : i + 4]) for i in (0, 4, 8)]
    expected, runs = whole(), 0
    sf.update((norm, mean, count, rng), start)
    parts = sf.filter_value_and_grad(loss, wrt=w, microbatch=3)
    found, gradient = (sf.filter_jit(parts) if jitted else parts)(X, Y)
    assert (runs, count.value) == (1, 3)
    for a, b in zip(jax.tree.leaves(whole()), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    np.testing.assert_allclose(
        found, jnp.mean(jnp.stack([v for v, _ in several])), 1e-5
    )
    mean_grad = jnp.mean(jnp.stack([g for _, g in several]), axis=0)
    np.testing.assert_allclose(gradient, mean_grad, rtol=1e-4)


def test_loss_and_aux_are_averaged_or_collected(w):
    def loss(x, y):
        error = x @ w.value - y
        aux = {"mae": jnp.abs(error).mean(), "name": "run", "none": None}
        return jnp.mean(error**2), aux

    how = {"wrt": w, "has_aux": True, "microbatch": 3}
    (value, aux), grad = sf.filter_value_and_grad(loss, **how)(X, Y)
    (whole, whole_aux), _ = sf.filter_value_and_grad(loss, wrt=w, has_aux=True)(X, Y)
    np.testing.assert_allclose(value, whole, rtol=1e-5)
    np.testing.assert_allclose(aux.pop("mae"), whole_aux["mae"], rtol=1e-5)
    assert aux == {"name": "run", "none": None}

    (values, aux), same = sf.filter_value_and_grad(loss, collect=True, **how)(X, Y)
    assert values.shape == aux["mae"].shape == (3,)
    np.testing.assert_allclose(values.mean(), whole, rtol=1e-5)
    assert jnp.array_equal(same, grad)
    grad, aux = sf.filter_grad(loss, collect=True, **how)(X, Y)
    assert aux["mae"].shape == (3,)


def test_collected_aux_may_be_anything(w):
    class Made(eqx.Module):
        state: sf.State

    def loss(x):
        out = x @ w.value
        return out.mean(), (out, jnp.argmax(out), Made(sf.State(out.sum())))

    how = {"wrt": w, "has_aux": True, "microbatch": 4, "collect": True}
    (_, (out, best, made)), _ = sf.filter_value_and_grad(loss, **how)(X)
    np.testing.assert_allclose(out.reshape(12), X @ w.value, rtol=1e-5)
    assert best.shape == (4,) and made.state.value.shape == (4,)


NO_MEAN = {
    "an array": lambda out: {"out": out},
    "an integer": lambda out: {"out": jnp.argmax(out)},
    "a key": lambda out: {"out": jax.random.key(0)},
    "a State": lambda out: {"out": sf.metrics.Mean()},
}


@pytest.mark.parametrize("case", NO_MEAN)
def test_aux_that_has_no_mean_is_refused(w, case):
    count = sf.State(jnp.array(0), name="count")

    def loss(x):
        count.value += 1
        out = x @ w.value
        return out.mean(), NO_MEAN[case](out)

    with pytest.raises(TypeError, match=r"^aux\['out'\].* has no mean over microb"):
        sf.filter_grad(loss, wrt=w, has_aux=True, microbatch=3)(X)
    assert count.value == 0


def test_gradients_of_low_precision_add_up_in_single_precision():
    w = sf.Param(jnp.zeros((), jnp.bfloat16), name="w")
    xs = jnp.ones(1024, jnp.bfloat16)
    grad = sf.filter_grad(lambda x: (x * w.value).mean(), wrt=w, microbatch=1024)(xs)
    assert grad.dtype == jnp.bfloat16 and grad == 1.0  # 256 in eight bits of mantissa


def test_tied_and_unread_states_and_integers_have_their_gradients(w):
    other = sf.Param(jnp.ones(2), name="other")
    whole = sf.State((jnp.array(1), jnp.ones(3)), name="whole")

    def loss(x):
        return jnp.mean(x @ (w.value * whole.value[1]))

    wrt = {"a": w, "b": [w, other, whole]}
    parts = sf.filter_grad(loss, wrt=wrt, microbatch=4)(X)
    once = sf.filter_grad(loss, wrt=wrt)(X)
    assert jax.tree.structure(parts) == jax.tree.structure(once)
    for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(once), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_it_decorates_binds_and_nests(w):
    class Module(eqx.Module):
        scale: jax.Array

        @sf.filter_grad(wrt=w, microbatch=2)
        def grad(self, x):
            return jnp.mean(x @ w.value) * self.scale

    with pytest.raises(ValueError, match="is an array without axes"):
        Module(jnp.array(2.0)).grad(X)

    grad = sf.filter_grad(mean_loss(w), wrt=w, microbatch=2)
    lanes = sf.filter_jit(sf.filter_vmap(grad))(
        jnp.stack([X, 2 * X]), jnp.stack([Y, Y])
    )
    np.testing.assert_allclose(lanes[1], grad(2 * X, Y), rtol=1e-5)
    second = sf.filter_jacfwd(lambda: grad(X, Y), wrt=w)()
    np.testing.assert_allclose(second, 2 * X.T @ X / 12, rtol=1e-4, atol=1e-6)


def test_it_leaves_no_tracer_and_works_without_compilation(w, checking_leaks):
    grad = sf.filter_grad(mean_loss(w), wrt=w, microbatch=3)
    jitted = sf.filter_jit(grad)(X, Y)
    with jax.disable_jit():
        np.testing.assert_allclose(grad(X, Y), jitted, rtol=1e-5)


# -- errors -------------------------------------------------------------------------


class Counted(eqx.Module):
    x: jax.Array
    count: sf.State


WRONG = {
    "not divisible": (5, (X, Y), r"in `microbatch=5` equal parts .* 12 \(`x`\), 12"),
    "sizes differ": (2, (X, Y[:6]), r"its sizes differ: 12 \(`x`\), 6 \(`y`\)"),
    "no axes": (2, (X, Y[0]), r"`y` is an array without axes"),
    "nothing": (2, ("x", None), r"in `microbatch=2` parts, and there is none"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_cut_is_refused_with_its_sizes(w, case):
    count, args, match = WRONG[case]
    runs = sf.State(jnp.array(0), name="runs")

    def loss(x, y):
        runs.value += 1
        return jnp.mean(x @ w.value)

    for wrap in (lambda f: f, sf.filter_jit):
        with pytest.raises(ValueError, match=match):
            wrap(sf.filter_grad(loss, wrt=w, microbatch=count))(*args)
    assert runs.value == 0


def test_a_state_in_what_is_cut_is_refused_and_named(w):
    batch = Counted(X, sf.State(jnp.zeros(12), name="seen"))
    loss = lambda batch: jnp.mean(batch.x @ w.value)  # noqa: E731
    with pytest.raises(
        sf.StateTypeError, match=r"^State 'seen' .* is in an argument .* `batch.count`"
    ):
        sf.filter_grad(loss, wrt=w, microbatch=3)(batch)


@pytest.mark.parametrize("bad", [0, -2, 1.5, True, "2"])
def test_what_is_no_number_of_parts_is_refused(w, bad):
    with pytest.raises(
        ValueError, match=r"^`microbatch` of `filter_value_and_grad` is "
    ):
        sf.filter_grad(mean_loss(w), wrt=w, microbatch=bad)


def test_collecting_without_parts_is_refused(w):
    with pytest.raises(ValueError, match=r"^`collect=True` of `filter_value_and_grad`"):
        sf.filter_value_and_grad(mean_loss(w), wrt=w, collect=True)


def test_a_loss_that_raises_in_a_part_changes_no_state(w):
    count = sf.State(jnp.array(0), name="count")

    def loss(x):
        count.value += 1
        return eqx.error_if(jnp.mean(x @ w.value), x[0, 0] > 1e5, "too large")

    grad = sf.filter_jit(sf.filter_value_and_grad(loss, wrt=w, microbatch=3))
    with pytest.raises(Exception, match="too large"):
        grad(X.at[8].set(1e6))
    assert count.value == 0
    grad(X)
    assert count.value == 3


# -- elsewhere ----------------------------------------------------------------------


def test_optax_microbatches_may_read_states_and_may_not_write_them(w):
    count = sf.State(jnp.array(0), name="count")

    def loss(x, y):
        return mean_loss(w)(x, y)

    def counting(x, y):
        count.value += 1
        return loss(x, y)

    def run(loss):
        grad = sf.filter_value_and_grad(loss, wrt=w)
        mean = optax.microbatching.AccumulationType.MEAN
        parts = optax.microbatching.microbatch(grad, (0, 1), 4, mean)
        return sf.filter_jit(parts)(X, Y)

    ours = sf.filter_value_and_grad(loss, wrt=w, microbatch=3)(X, Y)
    for a, b in zip(run(loss), ours, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    with pytest.raises(
        sf.StateTraceError, match=r"^State 'count' .* was written inside"
    ):
        run(counting)
    assert count.value == 0
    with pytest.raises(sf.StateTraceError, match="microbatch="):
        run(counting)


def test_temporaries_of_parts_are_a_fraction():
    weights = sf.Param(jnp.ones((8, 64)), name="weights")

    def temporaries(count):
        def loss(x):
            for _ in range(4):
                x = jnp.sin(x @ weights.value) @ weights.value.T
            return jnp.mean(x**2)

        grad = sf.filter_jit(sf.filter_grad(loss, wrt=weights, microbatch=count))
        compiled = grad.lower(jnp.ones((4096, 8))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(8) < 0.25 * temporaries(None)
