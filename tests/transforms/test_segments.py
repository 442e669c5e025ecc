"""`checkpoint=` of loops: the same results, and less kept for the backward pass."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefun as sf
from statefun.transforms._segments import BRANCHES, segments

SIZE = 3


def recurrent(n: int):
    """A loss that goes through `n` steps of a cell, and the States that it touches."""
    w = sf.Param(0.5 * jax.random.normal(jax.random.key(0), (SIZE, SIZE)), name="w")
    hidden = sf.State(jnp.zeros(SIZE), name="hidden")
    count = sf.State(jnp.array(0), name="count")
    rng = sf.Rng(0)
    xs = jax.random.normal(jax.random.key(1), (n, SIZE))

    def body(carry, x):
        count.value += 1
        noise = 0.1 * jax.random.normal(rng(), (SIZE,))
        hidden.value = jnp.tanh(w.value @ hidden.value + x + noise)
        return carry + hidden.value.sum(), hidden.value[:2]

    return w, body, xs, (hidden, count, rng)


def close(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert jax.typeof(a) == jax.typeof(b)
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


LOOPS = {
    "scan": lambda w, body, xs, how: sf.scan(body, jnp.array(0.0), xs, **how),
    "scan, reverse": lambda w, body, xs, how: sf.scan(
        body, jnp.array(0.0), xs, reverse=True, **how
    ),
    "scan, unroll": lambda w, body, xs, how: sf.scan(
        body, jnp.array(0.0), xs, unroll=2, **how
    ),
    "scan, split transpose": lambda w, body, xs, how: sf.scan(
        body, jnp.array(0.0), xs, _split_transpose=True, **how
    ),
    "scan, length": lambda w, body, xs, how: sf.scan(
        lambda c, _: body(c, xs[0]), jnp.array(0.0), length=len(xs), **how
    ),
    "map": lambda w, body, xs, how: sf.map(lambda x: body(x[0], x), xs, **how),
    "map, batches": lambda w, body, xs, how: sf.map(
        lambda x: jnp.tanh(w.value @ x), xs, batch_size=2, **how
    ),
    "fori_loop": lambda w, body, xs, how: sf.fori_loop(
        0, len(xs), lambda i, c: body(c, xs[i])[0], jnp.array(0.0), **how
    ),
}


def assert_same_with(loop, checkpoint, wrap):
    def run(how):
        w, body, xs, states = recurrent(11)
        given = sf.State(xs, name="xs")

        def loss():
            out = LOOPS[loop](w, body, given.value, how)
            return sum(jnp.sum(y**2) for y in jax.tree.leaves(out)), out

        grad = sf.filter_value_and_grad(loss, wrt=(w, given), has_aux=True)
        return wrap(grad)(), [s.value for s in states]

    close(run({"checkpoint": checkpoint}), run({}))


@pytest.mark.parametrize("checkpoint", ["sqrt", "recursive", 4])
@pytest.mark.parametrize("loop", LOOPS)
def test_values_gradients_and_states_are_those_without_checkpoints(loop, checkpoint):
    assert_same_with(loop, checkpoint, sf.filter_jit)


@pytest.mark.parametrize("loop", ["scan", "map", "fori_loop"])
def test_so_they_are_outside_of_jit(loop):
    assert_same_with(loop, "sqrt", lambda f: f)


@pytest.mark.parametrize("checkpoint", ["sqrt", "recursive", 3])
@pytest.mark.parametrize("n", [0, 1, 2, 17, 101])
def test_every_length_works_and_states_are_written_once_a_step(n, checkpoint):
    _, body, xs, states = recurrent(n)
    _, same, _, others = recurrent(n)
    ours = sf.scan(body, jnp.array(0.0), xs, checkpoint=checkpoint)
    theirs = sf.scan(same, jnp.array(0.0), xs)
    assert eqx.tree_equal(ours, theirs, typematch=True)
    for mine, other in zip(states, others, strict=True):
        assert jnp.array_equal(mine.value, other.value)
    assert states[1].value == n


@pytest.mark.parametrize("checkpoint", ["sqrt", "recursive", 4])
def test_the_body_runs_once_and_writes_once_in_a_nest_of_transforms(checkpoint):
    runs = 0
    _, body, xs, (hidden, count, _) = recurrent(11)

    def counted(carry, x):
        nonlocal runs
        runs += 1
        return body(carry, x)

    @sf.filter_jit
    def step(scales):
        def loss(scale):
            inner = lambda c, x: sf.scan(counted, c, x, checkpoint=checkpoint)  # noqa: E731
            two = jnp.stack([xs, xs]) * scale
            return sf.scan(inner, jnp.array(0.0), two, checkpoint=checkpoint)[0]

        return sf.filter_vmap(
            sf.filter_grad(loss), state_axes=[(hidden, 0), (count, 0)]
        )(scales)

    hidden.value, count.value = jnp.zeros((2, SIZE)), jnp.zeros(2, int)
    assert jnp.all(jnp.isfinite(step(jnp.ones(2))))
    assert (runs, count.value.tolist()) == (1, [22, 22])


@pytest.mark.parametrize("checkpoint", ["sqrt", "recursive", 4])
def test_second_and_forward_derivatives_go_through_segments(checkpoint):
    def f(x, checkpoint=None):
        body = lambda c, _: (jnp.sin(c * x), None)  # noqa: E731
        return sf.scan(body, x, length=7, checkpoint=checkpoint)[0]

    x = jnp.array(1.5)
    for derivative in (jax.hessian, jax.jacfwd, lambda f: jax.grad(jax.grad(f))):
        ours = derivative(lambda x: f(x, checkpoint))(x)
        np.testing.assert_allclose(ours, derivative(f)(x), rtol=1e-4)


@pytest.mark.parametrize("checkpoint", ["sqrt", "recursive", 4])
def test_segments_work_without_compilation(checkpoint):
    w, body, xs, (_, count, _) = recurrent(11)
    with jax.disable_jit():
        loss = lambda: sf.scan(body, jnp.array(0.0), xs, checkpoint=checkpoint)[0]  # noqa: E731
        sf.filter_grad(loss, wrt=w)()
    assert count.value == 11


@pytest.mark.parametrize("checkpoint", ["sqrt", "recursive", 4])
def test_segments_leave_no_tracer(checkpoint, checking_leaks):
    w, body, xs, (_, count, _) = recurrent(11)
    loss = lambda: sf.scan(body, jnp.array(0.0), xs, checkpoint=checkpoint)[0]  # noqa: E731
    sf.filter_jit(sf.filter_grad(loss, wrt=w))()
    assert count.value == 11


def test_a_state_made_in_a_segment_and_returned_comes_out_stacked():
    class Made(eqx.Module):
        state: sf.State

    make = lambda c, x: (c, Made(sf.State(2 * x)))  # noqa: E731
    _, made = sf.scan(make, None, jnp.arange(7.0), checkpoint=3)
    assert jnp.array_equal(made.state.value, 2 * jnp.arange(7.0))


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_a_check_that_fails_in_a_segment_changes_no_state(jitted):
    total = sf.State(jnp.array(0.0), name="total")

    def body(c, x):
        total.value += eqx.error_if(x, x > 5, "x is too large")
        return c + total.value, None

    def run(xs):
        return sf.scan(body, jnp.array(0.0), xs, checkpoint="sqrt")[0]

    run = sf.filter_jit(sf.filter_grad(run)) if jitted else run
    with pytest.raises(Exception, match="x is too large"):
        run(jnp.arange(9.0))
    assert total.value == 0.0
    run(jnp.arange(5.0))
    assert total.value == 10.0


@pytest.mark.parametrize("checkpoint", ["sqr", 0, -3, 1.5, True, ("sqrt",)])
@pytest.mark.parametrize("loop", ["scan", "map", "fori_loop"])
def test_what_is_no_checkpoint_is_refused(loop, checkpoint):
    total = sf.State(jnp.array(0.0), name="total")

    def body(x):
        total.value += 1
        return x

    run = {
        "scan": lambda how: sf.scan(lambda c, x: (body(c), x), 0.0, jnp.ones(3), **how),
        "map": lambda how: sf.map(body, jnp.ones(3), **how),
        "fori_loop": lambda how: sf.fori_loop(0, 3, lambda i, c: body(c), 0.0, **how),
    }[loop]
    with pytest.raises(ValueError, match=rf"^`checkpoint` of `{loop}` is "):
        run({"checkpoint": checkpoint})
    assert total.value == 0.0


def test_a_checkpointed_fori_loop_needs_bounds_that_are_known_when_tracing():
    run = lambda n: sf.fori_loop(0, n, lambda i, x: x + i, 0, checkpoint="sqrt")  # noqa: E731
    with pytest.raises(ValueError, match=r"^a checkpointed `fori_loop` needs loop"):
        sf.filter_jit(run)(jnp.array(3))


@pytest.mark.parametrize("checkpoint", ["sqrt", 2])
def test_a_bar_counts_segments_and_is_drawn_once(checkpoint, capfd):
    pytest.importorskip("jax_tqdm")
    w, body, xs, (_, count, _) = recurrent(9)

    def loss():
        how = {"checkpoint": checkpoint, "progress": "cells"}
        return sf.scan(body, jnp.array(0.0), xs, **how)[0]

    sf.filter_jit(sf.filter_grad(loss, wrt=w))()
    jax.effects_barrier()
    assert count.value == 9
    printed = capfd.readouterr().err
    assert printed.count("cells: 100%") == 1


# -- what is kept -------------------------------------------------------------------


def temporaries(n: int, checkpoint) -> int:
    w, body, xs, _ = recurrent(n)
    loss = lambda: sf.scan(body, jnp.array(0.0), xs, checkpoint=checkpoint)[0]  # noqa: E731
    compiled = sf.filter_jit(sf.filter_grad(loss, wrt=w)).lower().compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_what_is_kept_grows_as_the_checkpoint_says():
    plain = temporaries(4096, None)
    assert temporaries(4096, "sqrt") < 0.1 * plain
    # Of a tenth of the elements a level down there is a copy.
    assert temporaries(4096, "recursive") < 0.3 * plain
    assert temporaries(4096, 64) < 0.1 * plain
    assert temporaries(4096, "sqrt") < 3 * temporaries(1024, "sqrt")


@pytest.mark.parametrize("n", [1, 7, 16, 17, 997, 4096, 9973, 10_000, 10_007, 10**6])
def test_lengths_of_segments_add_up(n):
    for checkpoint in ("sqrt", "recursive", 13, 10**7):
        nests = list(segments(n, checkpoint))
        assert sum(map(math.prod, nests)) == n
        assert len(nests) <= 3
        assert all(min(nest) >= 1 and len(nest) >= 2 for nest in nests)
    assert all(max(nest) <= 2 * BRANCHES for nest in segments(n, "recursive"))
    assert max(max(nest) for nest in segments(n, "sqrt")) <= max(1.6 * n**0.5 + 2, 7)
