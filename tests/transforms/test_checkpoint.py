"""`filter_checkpoint`: Equinox's, and States that are written exactly once."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

import statefun as sf

X = jnp.arange(1.0, 4.0)


@pytest.fixture
def w():
    return sf.Param(jnp.array(2.0), name="w")


@pytest.fixture
def count():
    return sf.State(jnp.array(0), name="count")


# -- as in Equinox ------------------------------------------------------------------


PURE = {
    "array": (lambda x: jnp.sin(x) * x, (X,), {}),
    "static arguments": (lambda x, f, n=1: f(x) * n, (X, jnp.cos), {"n": 3}),
    "trees": (lambda t, y: {"a": t["x"] * y, "n": 3}, ({"x": X, "s": "a"}, 2.0), {}),
    "module": (
        lambda net, x: net(x),
        (eqx.nn.Linear(3, 2, key=jax.random.key(0)), X),
        {},
    ),
    "integers": (lambda n, x: x * n.astype(x.dtype), (jnp.array(3), X), {}),
}


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("case", PURE)
def test_without_states_it_is_equinox(case, jitted):
    fun, args, kwargs = PURE[case]
    ours, theirs = sf.filter_checkpoint(fun), eqx.filter_checkpoint(fun)
    if jitted:
        ours, theirs = sf.filter_jit(ours), eqx.filter_jit(theirs)
    assert eqx.tree_equal(
        ours(*args, **kwargs), theirs(*args, **kwargs), typematch=True
    )


@pytest.mark.parametrize("case", ["array", "module"])
def test_without_states_gradients_are_those_of_equinox(case):
    fun, args, _ = PURE[case]

    def loss(transform):
        return lambda *args: jnp.sum(transform(fun)(*args) ** 2)

    ours = eqx.filter_jit(eqx.filter_grad(loss(sf.filter_checkpoint)))(*args)
    theirs = eqx.filter_jit(eqx.filter_grad(loss(eqx.filter_checkpoint)))(*args)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_decorator_wrapped_and_method_are_as_in_equinox(count):
    @sf.filter_checkpoint(policy=jax.checkpoint_policies.dots_saveable)
    def layer(x):
        return jnp.sin(x)

    assert layer.__name__ == "layer"
    assert layer.__wrapped__(X).shape == (3,)
    assert np.array_equal(layer(X), jnp.sin(X))

    class Module(eqx.Module):
        scale: jax.Array
        seen: sf.State

        @sf.filter_checkpoint
        def __call__(self, x):
            self.seen.value += 1
            return self.scale * x

    module = Module(jnp.array(2.0), count)
    assert np.array_equal(module(X), 2 * X)
    grad = sf.filter_grad(lambda m, x: jnp.sum(m(x)))(module, X)
    assert grad.scale == 6.0
    assert count.value == 2


def test_errors_are_of_the_types_that_equinox_raises():
    cases = [
        lambda m: m.filter_checkpoint(lambda x: x, bogus=1),
        lambda m: m.filter_checkpoint(lambda x: x)(),
        lambda m: m.filter_checkpoint(3)(X),
        lambda m: m.filter_checkpoint(lambda x: x @ jnp.ones((5, 5)))(X),
        lambda m: m.filter_checkpoint(lambda x: float(x[0]))(X),
    ]
    for case in cases:
        with pytest.raises(Exception) as theirs:
            case(eqx)
        with pytest.raises(type(theirs.value)):
            case(sf)


# -- what is kept for the backward pass ---------------------------------------------


def residual_bytes(fun, *args):
    """What a linearised function holds on to."""
    _, pull = jax.vjp(fun, *args)
    return sum(x.nbytes for x in jax.tree.leaves(pull) if isinstance(x, jax.Array))


def test_it_keeps_as_little_as_equinox_and_does_what_the_policy_says(w):
    def layer(x):
        for _ in range(5):
            x = jnp.sin(x * w.value)
        return x

    x = jnp.ones(100)
    keep_all = jax.checkpoint_policies.everything_saveable
    plain = residual_bytes(layer, x)
    ours = residual_bytes(lambda x: sf.filter_checkpoint(layer)(x), x)
    theirs = residual_bytes(
        lambda x: eqx.filter_checkpoint(lambda x, w: _layer(x, w))(x, w.value), x
    )
    assert ours <= theirs + 8  # the State's value beside
    assert ours < plain / 2
    kept = residual_bytes(lambda x: sf.filter_checkpoint(layer, policy=keep_all)(x), x)
    assert kept > ours


def _layer(x, w):
    for _ in range(5):
        x = jnp.sin(x * w)
    return x


@pytest.mark.parametrize("prevent_cse", [True, False])
def test_prevent_cse_reaches_jax(prevent_cse):
    run = sf.filter_checkpoint(jnp.sin, prevent_cse=prevent_cse)
    jaxpr = jax.make_jaxpr(run)(X)
    (eqn,) = [e for e in jaxpr.eqns if "prevent_cse" in e.params]
    assert bool(eqn.params["prevent_cse"]) == prevent_cse


# -- States -------------------------------------------------------------------------


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_under_a_gradient_a_state_is_updated_exactly_once(w, count, jitted):
    mean = sf.State(jnp.array(0.0), name="mean")

    @sf.filter_checkpoint
    def layer(x):
        count.value += 1
        mean.value = 0.5 * mean.value + 0.5 * jnp.mean(x)
        return jnp.sin(w.value * x)

    run = sf.filter_value_and_grad(lambda x: jnp.sum(layer(x)), wrt=w)
    run = sf.filter_jit(run) if jitted else run
    value, grad = run(X)
    want = jax.value_and_grad(lambda w: jnp.sum(jnp.sin(w * X)))(jnp.array(2.0))
    np.testing.assert_allclose((value, grad), want, rtol=1e-6)
    assert count.value == 1
    assert mean.value == 1.0
    run(X)
    assert count.value == 2
    assert mean.value == 1.5


def test_the_gradient_goes_through_what_the_layer_writes_and_a_later_one_reads(w):
    carry = sf.State(jnp.array(1.0), name="carry")

    @sf.filter_checkpoint
    def layer(x):
        carry.value = carry.value * w.value
        return x * carry.value

    def loss(x):
        return layer(layer(x))  # x * w * w**2

    value, grad = sf.filter_value_and_grad(loss, wrt=w)(jnp.array(5.0))
    assert (float(value), float(grad)) == (40.0, 60.0)
    assert carry.value == 4.0


def test_checkpoints_in_a_row_in_a_scan_in_a_gradient(w, count):
    @sf.filter_checkpoint
    def layer(x):
        count.value += 1
        return jnp.tanh(w.value * x)

    @sf.filter_jit
    def step(x):
        def loss(x):
            return sf.scan(lambda c, _: (layer(layer(c)), None), x, length=3)[0]

        return sf.filter_grad(loss, wrt=w)(x)

    def pure(w):
        x = jnp.array(0.5)
        for _ in range(6):
            x = jnp.tanh(w * x)
        return x

    np.testing.assert_allclose(
        step(jnp.array(0.5)), jax.grad(pure)(jnp.array(2.0)), rtol=1e-5
    )
    assert count.value == 6


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_without_a_gradient_it_does_what_the_function_does(w, count, jitted):
    @sf.filter_checkpoint
    def layer(x, label):
        count.value += 1
        w.value = w.value + 1
        return x * w.value, label

    run = sf.filter_jit(layer) if jitted else layer
    for i in (1, 2):
        out, label = run(X, "name")
        assert np.array_equal(out, X * (2 + i))
        assert (label, int(count.value)) == ("name", i)


def test_a_state_made_inside_and_returned_has_its_value():
    class Made(eqx.Module):
        s: sf.State

    made = sf.filter_checkpoint(lambda x: Made(sf.State(2 * x, name="made")))(X)
    assert np.array_equal(made.s.value, 2 * X)


def test_a_bare_state_is_no_result(count):
    with pytest.raises(TypeError, match=r"^State 'count' .* was returned"):
        sf.filter_checkpoint(lambda x: count)(X)


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("graded", [False, True])
def test_a_function_that_raises_changes_no_state(w, count, jitted, graded):
    @sf.filter_checkpoint
    def layer(x):
        count.value += 1
        w.value = w.value * 2
        raise RuntimeError("stop")

    run = sf.filter_grad(lambda x: jnp.sum(layer(x))) if graded else layer
    with pytest.raises(RuntimeError, match="stop"):
        (sf.filter_jit(run) if jitted else run)(X)
    assert (int(count.value), float(w.value)) == (0, 2.0)


def test_the_body_runs_once_and_leaves_no_tracer(w, count, checking_leaks):
    runs = []

    @sf.filter_checkpoint
    def layer(x):
        runs.append(0)
        count.value += 1
        return w.value * x

    sf.filter_grad(lambda x: jnp.sum(layer(x)), wrt=w)(X)
    assert (len(runs), int(count.value)) == (1, 1)


def test_names_for_policies_work(w):
    policy = jax.checkpoint_policies.save_only_these_names("kept")

    @sf.filter_checkpoint(policy=policy)
    def layer(x):
        y = checkpoint_name(jnp.sin(w.value * x), "kept")
        return jnp.sin(y)

    grad = sf.filter_grad(lambda x: jnp.sum(layer(x)), wrt=w)(X)
    want = jax.grad(lambda w: jnp.sum(jnp.sin(jnp.sin(w * X))))(jnp.array(2.0))
    np.testing.assert_allclose(grad, want, rtol=1e-6)
