"""`while_loop(max_steps=)`: a gradient in reverse mode, and an end when it is over."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefun as sf

CHECKPOINTS = ["sqrt", "recursive", 3, None]


@pytest.fixture
def count():
    return sf.State(jnp.array(0), name="count")


def newton(count, **how):
    """Square root of `x`, by as many steps as it takes."""

    def run(x):
        def body(y):
            count.value += 1
            return (y + x / y) / 2

        return sf.while_loop(lambda y: jnp.abs(y * y - x) > 1e-3, body, x, **how)

    return run


def unrolled(x):
    y, steps = x, 0
    while abs(float(y * y - x)) > 1e-3:
        y, steps = (y + x / y) / 2, steps + 1
    return y, steps


def gradient(x, steps):
    def run(x):
        y = x
        for _ in range(steps):
            y = (y + x / y) / 2
        return y

    return jax.grad(run)(x)


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_value_gradient_and_states_are_those_of_the_steps_taken(
    checkpoint, jitted, count
):
    run = newton(count, max_steps=20, checkpoint=checkpoint)
    grad = sf.filter_value_and_grad(run)
    grad = sf.filter_jit(grad) if jitted else grad
    for x in (1.0, 2.0, 100.0):  # no step, some, and many
        x = jnp.array(x)
        value, steps = unrolled(x)
        count.value = jnp.array(0)
        ours = grad(x)
        np.testing.assert_allclose(ours[0], value, rtol=1e-6)
        np.testing.assert_allclose(ours[1], gradient(x, steps), rtol=1e-5)
        assert count.value == steps


@pytest.mark.parametrize("max_steps", [1, 2, 3, 17, 10**6])
def test_without_a_gradient_it_is_the_loop_without_a_bound(max_steps, count):
    def run(**how):
        def body(c):
            count.value += 1
            return {"i": c["i"] + 1, "x": c["x"] * 2}

        init = {"i": 0, "x": jnp.ones(2)}
        return sf.while_loop(lambda c: c["i"] < min(max_steps, 40), body, init, **how)

    for checkpoint in CHECKPOINTS:
        ours = run(max_steps=max_steps, checkpoint=checkpoint)
        assert eqx.tree_equal(ours, run(), typematch=True)
    assert count.value == 2 * len(CHECKPOINTS) * min(max_steps, 40)


def test_condition_and_body_run_once_and_write_once_in_a_nest_of_transforms(count):
    runs = []

    def loss(x):
        def body(y):
            runs.append("body")
            count.value += 1
            return y * x

        def condition(y):
            runs.append("condition")
            return y < 10

        return sf.while_loop(condition, body, x, max_steps=30)

    def outer(x):
        return sf.scan(lambda c, _: (loss(c) / 4, None), x, length=2)[0]

    grad = sf.filter_jit(sf.filter_grad(sf.filter_checkpoint(outer)))(jnp.array(2.0))
    assert runs == ["body", "condition"]
    # 2 → 16 (3 steps), / 4 → 4 → 16 (1 step), / 4; x⁴ / 4, squared, / 4
    assert count.value == 4
    assert grad == 8 * 2.0**7 / 64


@pytest.mark.parametrize("checkpoint", ["sqrt", "recursive", 100])
def test_steps_that_are_not_taken_do_not_run(checkpoint, count):
    seen = []

    def body(x):
        jax.debug.callback(lambda: seen.append(1))
        count.value += 1
        return jnp.sin(x) * 2

    def run(x):
        how = {"max_steps": 10**4, "checkpoint": checkpoint}
        return sf.while_loop(lambda x: count.value < 3, body, x, **how)

    sf.filter_jit(run)(jnp.array(1.0))
    jax.effects_barrier()
    assert len(seen) == count.value == 3
    seen.clear()
    count.value = jnp.array(0)
    sf.filter_jit(sf.filter_grad(run))(jnp.array(1.0))
    jax.effects_barrier()
    assert count.value == 3
    assert len(seen) <= 3 * 5  # once, and once more for each level


def test_lanes_stop_each_by_itself_and_all_with_the_last():
    seen = []
    count = sf.State(jnp.zeros(3, int), name="count")

    def run(limit):
        def body(x):
            jax.debug.callback(lambda x: seen.append(1), x)
            count.value += 1
            return x * 2

        return sf.while_loop(lambda x: x < limit, body, limit * 0 + 1, max_steps=10**6)

    mapped = sf.filter_vmap(sf.filter_value_and_grad(run), state_axes=[(count, 0)])
    limits = jnp.array([1.0, 3.0, 10.0])
    values, _ = sf.filter_jit(mapped)(limits)
    jax.effects_barrier()
    assert values.tolist() == [1.0, 4.0, 16.0]
    assert count.value.tolist() == [0, 2, 4]
    assert len(seen) <= 3 * 4 * 2  # in every lane 4 steps, and these once more


def test_a_gradient_in_lanes_is_that_of_each():
    xs = jnp.array([1.0, 2.0, 50.0])

    def loss(x):
        def body(y):
            return (y + x / y) / 2

        return sf.while_loop(lambda y: jnp.abs(y * y - x) > 1e-3, body, x, max_steps=20)

    mapped = sf.filter_jit(sf.filter_vmap(sf.filter_grad(loss)))(xs)
    for x, found in zip(xs, mapped, strict=True):
        np.testing.assert_allclose(found, gradient(x, unrolled(x)[1]), rtol=1e-5)


# -- the bound ----------------------------------------------------------------------


def doubling(count, **how):
    def body(x):
        count.value += 1
        return x * 2

    return lambda x: sf.while_loop(lambda x: x < 16, body, x, **how)


WAYS = {
    "eager": lambda f: f,
    "jit": sf.filter_jit,
    "grad": sf.filter_grad,
    "jit of grad": lambda f: sf.filter_jit(sf.filter_grad(f)),
    "scan": lambda f: lambda x: sf.scan(lambda c, _: (f(c), None), x, length=1)[0],
    "checkpoint": lambda f: sf.filter_jit(sf.filter_checkpoint(f)),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_bound_that_is_reached_is_an_error_and_changes_no_state(way, count):
    run = WAYS[way](doubling(count, max_steps=3))
    run(jnp.array(2.0))
    assert count.value == 3  # exactly enough
    with pytest.raises(
        Exception, match=r"`while_loop` has run its body \(.*body\) `max_steps=3` times"
    ):
        jax.block_until_ready(run(jnp.array(1.0)))
    assert count.value == 3


def test_a_bound_that_is_reached_in_one_lane_is_an_error():
    count = sf.State(jnp.zeros(2, int), name="count")
    run = doubling(count, max_steps=3)
    mapped = sf.filter_jit(sf.filter_vmap(run, state_axes=[(count, 0)]))
    with pytest.raises(Exception, match="and its condition still holds"):
        jax.block_until_ready(mapped(jnp.array([2.0, 1.0])))
    assert count.value.tolist() == [0, 0]


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_without_throw_it_says_whether_it_is_done(jitted, count):
    run = doubling(count, max_steps=3, throw=False)
    run = sf.filter_jit(run) if jitted else run
    out, done = run(jnp.array(2.0))
    assert (out, done, count.value) == (16.0, True, 3)
    out, done = run(jnp.array(1.0))
    assert (out, done, count.value) == (8.0, False, 6)
    assert isinstance(done, jax.Array) and done.dtype == bool


def test_without_throw_nothing_is_waited_for(count):
    run = doubling(count, max_steps=3, throw=False)
    assert "callback" not in str(sf.make_jaxpr(run)(jnp.array(1.0)))
    assert "callback" in str(sf.make_jaxpr(doubling(count, max_steps=3))(jnp.ones(())))


# -- what goes around ---------------------------------------------------------------


@pytest.mark.parametrize("throw", [True, False])
def test_modules_keys_and_random_states_go_around(key, throw, count):
    rng = sf.Rng(0)
    linear = eqx.nn.Linear(2, 2, key=key)

    def run(**how):
        def body(carry):
            net, x, key = carry
            count.value += 1
            draw = jax.random.normal(rng(), (2,))
            return net, net(x) + draw, jax.random.split(key)[0]

        init = (linear, jnp.ones(2), key)
        return sf.while_loop(lambda _: count.value < 3, body, init, **how)

    _, x, last = run()
    after = jax.random.key_data(rng.value)
    rng.value, count.value = jax.random.key(0), jnp.array(0)
    out = run(max_steps=5, throw=throw)
    _, y, again = out if throw else out[0]
    np.testing.assert_allclose(x, y, rtol=1e-6)
    assert jnp.array_equal(jax.random.key_data(last), jax.random.key_data(again))
    assert jnp.array_equal(jax.random.key_data(rng.value), after)


def test_the_gradient_reaches_states_that_body_and_condition_read(count):
    rate = sf.Param(jnp.array(0.5), name="rate")
    limit = sf.State(jnp.array(3), name="limit")

    def loss(x):
        def body(x):
            count.value += 1
            return x * rate.value

        return sf.while_loop(lambda _: count.value < limit.value, body, x, max_steps=9)

    assert sf.filter_jit(sf.filter_grad(loss, wrt=rate))(2.0) == 2 * 3 * 0.5**2
    limit.value, count.value = jnp.array(1), jnp.array(0)
    assert sf.filter_jit(sf.filter_grad(loss, wrt=rate))(2.0) == 2


@pytest.mark.parametrize("checkpoint", ["sqrt", None])
def test_a_bounded_loop_works_without_compilation(checkpoint, count):
    run = doubling(count, max_steps=5, checkpoint=checkpoint)
    with jax.disable_jit():
        assert run(jnp.array(1.0)) == 16.0
        assert sf.filter_grad(run)(jnp.array(4.0)) == 4.0
    assert count.value == 6


def test_a_bounded_loop_leaves_no_tracer(checking_leaks, count):
    # Equinox's check by itself leaves one on jax 0.10.
    run = doubling(count, max_steps=20, checkpoint="recursive", throw=False)
    assert sf.filter_jit(sf.filter_grad(lambda x: run(x)[0]))(jnp.array(4.0)) == 4.0
    assert count.value == 2


def test_eager_calls_with_the_same_body_trace_it_once(count):
    runs = 0

    def body(x):
        nonlocal runs
        runs += 1
        count.value += 1
        return x * 2

    condition = lambda x: x < 16  # noqa: E731
    for _ in range(3):
        sf.while_loop(condition, body, jnp.array(1.0), max_steps=5)
    assert (runs, count.value) == (1, 12)


def test_temporaries_follow_the_checkpoint():
    w = sf.Param(jnp.eye(8), name="w")

    def temporaries(checkpoint):
        def loss(n):
            body = lambda c: (c[0] + 1, jnp.tanh(w.value @ c[1]))  # noqa: E731
            how = {"max_steps": 4096, "checkpoint": checkpoint}
            init = jnp.array(0), jnp.ones(8)
            return sf.while_loop(lambda c: c[0] < n, body, init, **how)[1].sum()

        grad = sf.filter_jit(sf.filter_grad(loss, wrt=w))
        compiled = grad.lower(jnp.array(3)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    plain = temporaries(None)
    assert temporaries("sqrt") < 0.1 * plain
    assert temporaries("recursive") < 0.1 * plain


# -- errors -------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [0, -1, 2.0, True, "5", 2**31])
def test_what_is_no_bound_is_refused(bad, count):
    with pytest.raises(ValueError, match=r"^`max_steps` of `while_loop` is "):
        doubling(count, max_steps=bad)(jnp.array(1.0))
    assert count.value == 0


def test_a_bound_has_to_be_known_when_tracing(count):
    with pytest.raises(ValueError, match=r"^`max_steps` of `while_loop` is "):
        sf.filter_jit(lambda n: doubling(count, max_steps=n)(1.0))(jnp.array(3))
    assert count.value == 0


def test_a_flag_without_a_bound_is_refused(count):
    with pytest.raises(ValueError, match=r"^`while_loop` was given `throw=False`"):
        doubling(count, throw=False)(jnp.array(1.0))


def test_a_wrong_checkpoint_is_refused(count):
    with pytest.raises(ValueError, match=r"^`checkpoint` of `while_loop` is 'sqr'"):
        doubling(count, max_steps=3, checkpoint="sqr")(jnp.array(1.0))


def test_a_condition_that_writes_is_refused(count):
    def condition(x):
        count.value += 1
        return x < 3

    with pytest.raises(
        sf.StateTraceError, match=r"^the condition of `while_loop` wrote"
    ):
        sf.while_loop(condition, lambda x: x + 1, 0, max_steps=5)
    assert count.value == 0


@pytest.mark.parametrize("out", [jnp.ones(2, bool), jnp.array(1), (jnp.array(True),)])
def test_a_condition_that_is_no_boolean_is_refused_as_in_jax(out):
    for run in (jax.lax.while_loop, sf.while_loop):
        with pytest.raises(TypeError, match="cond_fun"):
            run(lambda x: out, lambda x: x, 0)
    with pytest.raises(TypeError, match="cond_fun must return a boolean scalar"):
        sf.while_loop(lambda x: out, lambda x: x, 0, max_steps=3)
