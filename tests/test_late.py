"""States that raw loops, branches and checkpoints read with no twin around them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import statefun as sf

X = jnp.ones(2)


def scanned(body, x=X):
    return jax.lax.scan(body, x, None, length=2)[0]


def test_a_body_that_jax_has_kept_sees_the_present_value():
    factor = sf.State(jnp.array(2.0))
    runs = []

    def body(carry, _):  # one object: JAX traces it once, and keeps the jaxpr
        runs.append(())
        return carry * factor.value, None

    for value in (2.0, 3.0, 5.0):
        factor.value = value
        assert jnp.array_equal(scanned(body), X * value**2)
    assert len(runs) == 1


def test_a_gradient_through_such_a_body_sees_the_present_value():
    factor = sf.State(jnp.array(2.0))

    def body(carry, _):
        return carry * factor.value, None

    for value in (2.0, 3.0):
        factor.value = value
        grad = jax.grad(lambda x: scanned(body, x).sum())(X)
        assert jnp.array_equal(grad, jnp.full(2, value**2))


def test_random_keys_and_modules_are_put_together_again():
    key = sf.State(jax.random.key(0))
    linear = sf.Param(eqx.nn.Linear(2, 2, key=jax.random.key(1)))

    def body(carry, _):
        return linear.value(carry) + jax.random.normal(key.value, (2,)), None

    for seed in (0, 7):
        key.value = jax.random.key(seed)
        expected = X
        for _ in range(2):
            noise = jax.random.normal(key.value, (2,))
            expected = linear.value(expected) + noise
        assert jnp.allclose(scanned(body), expected)


def test_several_states_and_a_twin_inside():
    a, b = sf.State(jnp.array(2.0)), sf.State(jnp.array(1.0))

    def body(carry, _):
        slope = sf.filter_grad(lambda x: a.value * x**2 + b.value)(carry)
        return carry - 0.25 * slope, None

    x = jnp.array(1.0)
    assert scanned(body, x) == 0.0
    a.value = 1.0
    assert scanned(body, x) == 0.25


def test_a_jitted_function_may_be_called_inside():
    factor = sf.State(jnp.array(2.0))
    times = sf.filter_jit(lambda x: x * factor.value)

    def body(carry, _):
        return times(carry), None

    assert jnp.array_equal(scanned(body), X * 4)
    factor.value = 3.0
    assert jnp.array_equal(scanned(body), X * 9)


@pytest.mark.parametrize("now", [jnp.ones(3), jnp.array(1), (1.0, 2.0)])
def test_a_value_of_another_type_is_an_error_that_names_the_state(now, capfd):
    factor = sf.State(jnp.array(2.0), name="factor")

    def body(carry, _):
        return carry * factor.value, None

    scanned(body)
    factor.value = now
    # JAX wraps what a callback raises in an error of its own, which shows it.
    with pytest.raises(Exception, match="State 'factor' .* has since changed"):
        jax.block_until_ready(scanned(body))


def test_a_write_there_is_refused():
    total = sf.State(jnp.array(0.0), name="total")

    def body(carry, _):
        total.value += 1
        return carry, None

    with pytest.raises(
        sf.StateTraceError, match=r"^State 'total' .* was written inside"
    ):
        scanned(body)
    assert total.value == 0
