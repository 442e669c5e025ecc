"""Models that thread Equinox's own State: the same numbers without threading."""

import copy
import io

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import statefun as sf
from statefun import nn
from statefun.optim import Optimizer


class Net(eqx.Module):
    """As somebody else would write it."""

    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    spectral: eqx.nn.SpectralNorm

    def __init__(self, mode, key):
        a, b, c = jax.random.split(key, 3)
        self.first = eqx.nn.Linear(3, 8, key=a)
        self.norm = eqx.nn.BatchNorm(8, axis_name="batch", mode=mode)
        self.spectral = eqx.nn.SpectralNorm(eqx.nn.Linear(8, 2, key=b), "weight", key=c)

    def __call__(self, x, state):
        x, state = self.norm(self.first(x), state)
        return self.spectral(jax.nn.tanh(x), state)


def make(mode="batch", seed=0):
    return eqx.nn.make_with_state(Net)(mode, jax.random.key(seed))


def data(step):
    x = jax.random.normal(jax.random.key(step), (16, 3))
    return x, jnp.sin(x[:, :2])


def assert_same(a, b):
    a, b = (jax.tree.leaves(eqx.filter(t, eqx.is_array)) for t in (a, b))
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.fixture(autouse=True)
def promotion():
    # Equinox's own BatchNorm mixes dtypes.
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("mode", ["batch", "ema"])
def test_twenty_steps_equal_hand_threaded_equinox(mode):
    tx = optax.adam(1e-2)
    by_hand, state = make(mode)
    opt_state = tx.init(eqx.filter(by_hand, eqx.is_inexact_array))

    @eqx.filter_jit
    def hand_step(model, state, opt_state, x, y):
        def loss(model, state):
            run = jax.vmap(
                model, axis_name="batch", in_axes=(0, None), out_axes=(0, None)
            )
            out, state = run(x, state)
            return jnp.mean((out - y) ** 2), state

        grads, state = eqx.filter_grad(loss, has_aux=True)(model, state)
        updates, opt_state = tx.update(grads, opt_state)
        return eqx.apply_updates(model, updates), state, opt_state, grads

    model = sf.Param(nn.from_equinox(*make(mode)))
    optimizer = Optimizer(tx, model)

    @sf.filter_jit
    def step(x, y):
        def loss():
            return jnp.mean(
                (sf.filter_vmap(model.value, axis_name="batch")(x) - y) ** 2
            )

        grads = sf.filter_grad(loss, wrt=model)()
        optimizer.update(grads)
        return grads

    for i in range(20):
        x, y = data(i)
        by_hand, state, opt_state, expected = hand_step(by_hand, state, opt_state, x, y)
        assert_same(step(x, y), expected)
    got, got_state = nn.to_equinox(model)
    assert_same(got, by_hand)
    assert_same(got_state, state)


def test_the_state_goes_on_from_call_to_call_and_stays_in_inference():
    module = nn.from_equinox(*make())
    run = sf.filter_vmap(module, axis_name="batch")
    x, _ = data(0)
    first = nn.to_equinox(module)[1]
    run(x)
    second = nn.to_equinox(module)[1]
    assert any(
        (a != b).any()
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    )
    evaluate = nn.inference_mode(module)
    fn = sf.StatefulFunction(sf.filter_vmap(evaluate, axis_name="batch"))
    fn.make_jaxpr(x)
    assert fn.get_write_states(x) == ()
    fn(x)
    assert_same(nn.to_equinox(module)[1], second)


def test_the_pair_that_was_given_is_not_changed():
    model, state = make()
    before = jax.tree.map(lambda x: x, state)
    module = nn.from_equinox(model, state)
    sf.filter_vmap(module, axis_name="batch")(data(0)[0])
    assert_same(state, before)
    # Equinox still takes it: it was not used up.
    run = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    run(data(0)[0], state)


def test_two_layers_made_separately_never_share_a_state():
    pairs = [
        eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, axis_name="batch", mode="ema")
        for _ in range(2)
    ]
    # Equinox gives both the same marker.
    assert pairs[0][0].ema_state_index.marker == pairs[1][0].ema_state_index.marker
    both = [nn.from_equinox(*pair) for pair in pairs]
    again = nn.from_equinox(*pairs[0])
    chain = sf.filter_vmap(lambda x: both[1](2 * both[0](x)), axis_name="batch")
    sf.filter_jit(chain)(data(0)[0])
    assert len(sf.states([*both, again])) == 3
    mean, var = zip(
        *(nn.to_equinox(m)[1].get(m.model.ema_state_index) for m in both), strict=True
    )
    np.testing.assert_allclose(mean[0], jnp.mean(data(0)[0], 0), rtol=1e-4)
    np.testing.assert_allclose(var[1], jnp.full(3, 4.0), rtol=1e-4)
    assert nn.to_equinox(again)[1].get(again.model.ema_first_time_index)


def test_what_is_given_back_can_be_saved_and_called():
    module = nn.from_equinox(*make())
    x, _ = data(0)
    run = sf.filter_vmap(module, axis_name="batch")
    run(x)
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, nn.to_equinox(module))
    file.seek(0)
    other = nn.from_equinox(*eqx.tree_deserialise_leaves(file, make(seed=1)))
    evaluate = [nn.inference_mode(m) for m in (module, other)]
    out = [sf.filter_vmap(m, axis_name="batch")(x) for m in evaluate]
    np.testing.assert_allclose(out[0], out[1], rtol=1e-6)
    model, state = nn.to_equinox(module)
    hand = jax.vmap(
        eqx.nn.inference_mode(model),
        axis_name="batch",
        in_axes=(0, None),
        out_axes=(0, None),
    )
    np.testing.assert_allclose(hand(x, state)[0], out[0], rtol=1e-6)


def test_models_whose_state_was_made_by_hand_can_be_copied():
    layer = eqx.nn.BatchNorm(3, axis_name="batch", mode="ema")
    module = nn.from_equinox(layer, eqx.nn.State(layer))
    for m in (module, copy.deepcopy(module), sf.clone(module)):
        sf.filter_vmap(m, axis_name="batch")(data(0)[0])


@pytest.mark.parametrize("mode", ["batch", "ema"])
def test_loaded_statistics_are_used_and_trained_on_as_the_docs_say(mode):
    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
        3, axis_name="batch", mode=mode, momentum=0.9
    )
    mean, var = jnp.array([1.0, 2.0, 3.0]), jnp.array([4.0, 9.0, 16.0])
    if mode == "ema":
        index, seen = norm.ema_state_index, (norm.ema_first_time_index, False)
    else:
        index, seen = norm.batch_state_index, (norm.batch_counter, 10_000)
    state = state.set(index, (mean, var)).set(seen[0], jnp.array(seen[1]))
    module, (x, _) = nn.from_equinox(norm, state), data(0)
    evaluate = sf.filter_vmap(nn.inference_mode(module), axis_name="batch")

    def expected():
        return (x - mean[None]) / jnp.sqrt(var[None] + 1e-5)

    np.testing.assert_allclose(evaluate(x), expected(), atol=1e-4)
    sf.filter_vmap(module, axis_name="batch")(x)
    mean = 0.9 * mean + 0.1 * jnp.mean(x, 0)
    var = 0.9 * var + 0.1 * jnp.var(x, 0)
    np.testing.assert_allclose(evaluate(x), expected(), atol=1e-4)


def test_a_state_may_be_passed_by_keyword_and_outputs_may_be_several():
    class Two(eqx.Module):
        norm: eqx.nn.BatchNorm

        def __init__(self):
            self.norm = eqx.nn.BatchNorm(3, axis_name="batch", mode="ema")

        def __call__(self, x, *, memory):
            y, memory = self.norm(x, memory)
            return x, y, memory

    module = nn.from_equinox(*eqx.nn.make_with_state(Two)(), state_argname="memory")
    x, y = sf.filter_vmap(module, axis_name="batch")(data(0)[0])
    assert x.shape == y.shape == (16, 3)


def test_a_model_that_returns_no_state_is_refused():
    module = nn.from_equinox(lambda x, state: x, make()[1])
    with pytest.raises(TypeError, match="function did not return its state"):
        module(jnp.ones(3))


def test_what_is_no_equinox_state_is_refused():
    with pytest.raises(TypeError, match="`state` is a dict"):
        nn.from_equinox(make()[0], {})
    with pytest.raises(TypeError, match="`to_equinox` was given a Linear"):
        nn.to_equinox(eqx.nn.Linear(2, 2, key=jax.random.key(0)))
