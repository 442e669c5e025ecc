"""Dropout, SpectralNorm, Recurrent, EMA, and switching modes."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import statefun as sf
from statefun import nn
from statefun._rng import Rng


def assert_close(a, b, rtol=1e-5):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6)


# -- Dropout ------------------------------------------------------------------------


def test_dropout_draws_another_mask_at_each_call():
    dropout = nn.Dropout(0.5, rng=Rng(0))
    run = sf.filter_jit(dropout)
    first, second = run(jnp.ones(64)), run(jnp.ones(64))
    assert set(np.unique(first)) == {0.0, 2.0}
    assert (first != second).any()


def test_dropout_with_a_key_equals_equinox_and_leaves_the_rng():
    key, x = jax.random.key(3), jnp.arange(8.0)
    dropout = nn.Dropout(0.3, rng=Rng(0))
    assert_close(dropout(x, key=key), eqx.nn.Dropout(0.3)(x, key=key))
    assert_close(dropout(x), eqx.nn.Dropout(0.3)(x, key=Rng(0)()))


def test_dropout_masks_differ_by_lane():
    dropout = nn.Dropout(0.5, rng=Rng(0))
    out = sf.filter_vmap(dropout)(jnp.ones((4, 64)))
    assert len({tuple(row) for row in np.asarray(out).tolist()}) == 4


def test_dropout_is_off_in_inference_and_draws_nothing():
    rng = Rng(0)
    dropout = nn.Dropout(0.5, rng=rng)
    before = jax.random.key_data(rng.value)
    assert_close(nn.inference_mode(dropout)(jnp.ones(8)), jnp.ones(8))
    assert_close(dropout(jnp.ones(8), inference=True), jnp.ones(8))
    assert_close(nn.Dropout(0)(jnp.ones(8)), jnp.ones(8))
    assert (jax.random.key_data(rng.value) == before).all()


def test_dropout_without_a_source_of_keys_is_an_error():
    with pytest.raises(
        RuntimeError, match="Dropout was called in training without a key"
    ):
        nn.Dropout(0.5)(jnp.ones(3))
    with pytest.raises(TypeError, match="should be a `statefun.Rng`"):
        nn.Dropout(0.5, rng=jax.random.key(0))
    with pytest.raises(ValueError, match="`p` is 1.0"):
        nn.Dropout(1.0)


# -- SpectralNorm -------------------------------------------------------------------


def test_spectral_norm_equals_equinox():
    key = jax.random.key(0)
    linear = eqx.nn.Linear(3, 4, key=key)
    theirs, state = eqx.nn.make_with_state(eqx.nn.SpectralNorm)(
        linear, "weight", key=key
    )
    ours = nn.SpectralNorm(linear, "weight", key=key)
    run = sf.filter_jit(ours)
    x = jnp.arange(3.0)
    for _ in range(3):
        expected, state = theirs(x, state)
        assert_close(run(x), expected, 1e-4)
    for a, b in zip(ours.uv.value, state.get(theirs.uv_index), strict=True):
        assert_close(a, b, 1e-4)
    grads = sf.filter_grad(lambda m: jnp.sum(m(x) ** 2))(ours).layer.weight
    expected = eqx.filter_grad(lambda m: jnp.sum(m(x, state)[0] ** 2))(theirs)
    assert_close(grads, expected.layer.weight, 1e-3)


def test_spectral_norm_converges_to_a_norm_of_one_and_stays_in_inference():
    key = jax.random.key(0)
    conv = eqx.nn.Conv2d(2, 3, 2, key=key)
    layer = nn.SpectralNorm(conv, "weight", 20, key=key)
    x = jax.random.normal(key, (2, 4, 4))
    layer(x)
    sigma = jnp.linalg.norm(conv.weight.reshape(3, -1), 2)
    expected = eqx.tree_at(lambda c: c.weight, conv, conv.weight / sigma)(x)
    evaluate = nn.inference_mode(layer)
    before = layer.uv.value
    assert_close(evaluate(x), expected, 1e-3)
    assert all((a == b).all() for a, b in zip(before, layer.uv.value, strict=True))


def test_spectral_norm_iterates_once_for_all_lanes():
    key = jax.random.key(0)
    linear = eqx.nn.Linear(3, 4, key=key)
    lanes, alone = (nn.SpectralNorm(linear, "weight", key=key) for _ in range(2))
    x = jnp.arange(6.0).reshape(2, 3)
    out = sf.filter_jit(sf.filter_vmap(lanes))(x)
    assert_close(out[0], alone(x[0]), 1e-4)
    for a, b in zip(lanes.uv.value, alone.uv.value, strict=True):
        assert_close(a, b, 1e-4)


def test_spectral_norm_of_a_vector_is_refused():
    linear = eqx.nn.Linear(3, 4, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"`bias` has shape \(4,\)"):
        nn.SpectralNorm(linear, "bias", key=jax.random.key(0))


# -- Recurrent ----------------------------------------------------------------------

CELLS = {"gru": eqx.nn.GRUCell, "lstm": eqx.nn.LSTMCell}


def unrolled(cell, xs):
    zeros = jnp.zeros(cell.hidden_size)
    hidden = (zeros, zeros) if isinstance(cell, eqx.nn.LSTMCell) else zeros
    out = []
    for x in xs:
        hidden = cell(x, hidden)
        out.append(hidden[0] if isinstance(hidden, tuple) else hidden)
    return jnp.stack(out)


@pytest.mark.parametrize("kind", CELLS)
def test_a_recurrent_cell_equals_equinox_with_its_hidden_state_threaded(kind):
    cell = CELLS[kind](2, 4, key=jax.random.key(0))
    xs = jax.random.normal(jax.random.key(1), (5, 2))
    expected = unrolled(cell, xs)
    layer = nn.Recurrent(cell)
    read = sf.filter_jit(lambda xs: sf.scan(lambda _, x: (None, layer(x)), None, xs)[1])
    assert_close(jnp.concatenate([read(xs[:3]), read(xs[3:])]), expected)
    layer.reset()
    assert_close(layer(xs[0]), expected[0])


@pytest.mark.parametrize("kind", CELLS)
def test_every_example_of_a_batch_has_its_hidden_state(kind):
    cell = CELLS[kind](2, 4, key=jax.random.key(0))
    xs = jax.random.normal(jax.random.key(1), (3, 5, 2))
    expected = jax.vmap(lambda x: unrolled(cell, x))(xs)
    layer = nn.Recurrent(cell, batch_shape=3)
    assert_close(jnp.stack([layer(xs[:, i]) for i in range(5)], 1), expected)
    single = nn.Recurrent(cell)
    batch = jax.tree.map(lambda x: jnp.stack([x] * 3), single.hidden.value)
    single.hidden.value = batch
    run = sf.filter_vmap(single, state_axes=[(single.hidden, 0)])
    assert_close(jnp.stack([run(xs[:, i]) for i in range(5)], 1), expected)


def test_a_hidden_state_that_lanes_would_share_is_an_error():
    layer = nn.Recurrent(eqx.nn.GRUCell(2, 4, key=jax.random.key(0)))
    with pytest.raises(sf.StateError, match="differs along the mapped axis .*'hidden'"):
        sf.filter_vmap(layer)(jnp.arange(6.0).reshape(3, 2))
    assert not layer.hidden.value.any()


def test_reset_may_be_for_some_examples_only():
    cell = eqx.nn.LSTMCell(2, 4, key=jax.random.key(0))
    layer = nn.Recurrent(cell, batch_shape=(3,))
    layer(jnp.ones((3, 2)))
    before = layer.hidden.value
    layer.reset(jnp.array([False, True, False]))
    for old, new in zip(before, layer.hidden.value, strict=True):
        assert (new[1] == 0).all()
        assert (new[::2] == old[::2]).all()


def test_gradients_flow_through_the_hidden_state_inside_of_one_call():
    cell = eqx.nn.GRUCell(2, 4, key=jax.random.key(0))
    xs = jax.random.normal(jax.random.key(1), (5, 2))
    model = sf.Param(nn.Recurrent(cell))

    def loss():
        layer = model.value
        return jnp.sum(sf.scan(lambda _, x: (None, layer(x)), None, xs)[1] ** 2)

    grads = sf.filter_grad(loss, wrt=model)()
    expected = eqx.filter_grad(lambda c: jnp.sum(unrolled(c, xs) ** 2))(cell)
    assert_close(grads.cell.weight_hh, expected.weight_hh, 1e-4)


def test_other_cells_start_from_what_is_given():
    layer = nn.Recurrent(lambda x, h: h + x, hidden=jnp.array(1.0))
    layer_out = nn.Recurrent(lambda x, h: h + x, hidden=jnp.ones(2))(jnp.ones(2))
    assert_close(layer_out, 2.0)
    assert float(layer.hidden.value) == 1.0
    with pytest.raises(ValueError, match="does not say its `hidden_size`"):
        nn.Recurrent(lambda x, h: h)


def test_an_input_of_another_batch_shape_is_an_error():
    layer = nn.Recurrent(eqx.nn.GRUCell(2, 4, key=jax.random.key(0)), batch_shape=3)
    with pytest.raises(
        ValueError, match=r"an input of shape \(2, 2\), but takes \(3, inp"
    ):
        layer(jnp.ones((2, 2)))
    with pytest.raises(ValueError, match="given an input of shape"):
        layer(jnp.ones((3, 5, 2)))


# -- EMA ----------------------------------------------------------------------------


def test_an_average_follows_its_params():
    w, n = sf.Param(jnp.zeros(2), name="w"), sf.State(jnp.array(0))
    ema = nn.EMA({"w": w, "tied": w, "n": n}, decay=0.9)
    assert ema.average["w"] is ema.average["tied"]
    assert ema.average["n"] is n
    step = sf.filter_jit(ema.update)
    expected = 0.0
    for i in range(3):
        w.value = jnp.full(2, float(i))
        step()
        expected = 0.9 * expected + 0.1 * i
    assert_close(ema.average["w"].value, expected)
    assert_close(w.value, 2.0)


def test_an_average_of_a_network_is_used_like_the_network():
    model = sf.Param(eqx.nn.Linear(2, 2, key=jax.random.key(0)))
    ema = nn.EMA(model, 0.5)
    before = model.value
    model.value = jax.tree.map(lambda x: x + 1, model.value)
    ema.update()
    assert_close(ema.average.value.weight, before.weight + 0.5)
    assert ema.average.value(jnp.ones(2)).shape == (2,)


def test_an_average_of_coarse_params_may_be_finer():
    w = sf.Param({"w": jnp.ones(2, jnp.bfloat16), "n": jnp.arange(2)})
    ema = nn.EMA(w, 0.999, dtype=jnp.float32)
    w.value = {"w": jnp.full(2, 2.0, jnp.bfloat16), "n": jnp.arange(2) + 1}
    ema.update()
    assert_close(ema.average.value["w"], 1.001)
    assert (ema.average.value["n"] == jnp.arange(2) + 1).all()
    assert ema.average.value["n"].dtype == jnp.int32


def test_an_average_is_kept_in_a_compiled_step_and_shares_the_statistics():
    class Net(eqx.Module):
        scale: sf.Param
        norm: nn.BatchNorm

        def __call__(self, x):
            return self.norm(x) * self.scale.value[None]

    net, traces = Net(sf.Param(jnp.ones(3)), nn.BatchNorm(3)), []
    ema = nn.EMA(net, 0.9)
    optimizer = sf.Optimizer(optax.sgd(0.1), net)

    @sf.filter_jit
    def step(x):
        traces.append(1)
        optimizer.update(sf.filter_grad(lambda: jnp.sum(net(x) ** 2), wrt=net)())
        ema.update()

    average = net.scale.value
    for key in jax.random.split(jax.random.key(0), 3):
        step(jax.random.normal(key, (4, 3)))
        average = 0.9 * average + 0.1 * net.scale.value
    assert_close(ema.average.scale.value, average)
    assert ema.average.norm.count is net.norm.count and int(net.norm.count.value) == 3
    assert len(traces) == 1
    x = jnp.ones((1, 3))
    assert_close(
        nn.inference_mode(ema.average)(x) / average[None],
        nn.inference_mode(net)(x) / net.scale.value[None],
    )


def test_an_average_of_nothing_is_refused():
    with pytest.raises(TypeError, match="EMA was given a tree without any Param"):
        nn.EMA(sf.State(jnp.ones(2)), 0.9)
    with pytest.raises(ValueError, match="`decay` is 2"):
        nn.EMA(sf.Param(jnp.ones(2)), 2)


# -- modes --------------------------------------------------------------------------


class Net(eqx.Module):
    norm: nn.BatchNorm
    dropout: nn.Dropout
    theirs: eqx.nn.Dropout

    def __init__(self):
        self.norm = nn.BatchNorm(3)
        self.dropout = nn.Dropout(0.5, rng=Rng(0))
        self.theirs = eqx.nn.Dropout(0.5)

    def __call__(self, x, key=None):
        return self.theirs(self.dropout(self.norm(x)), key=key)


def test_modes_share_all_states():
    net = Net()
    evaluate = nn.inference_mode(net)
    for a, b in zip(sf.states(net).values(), sf.states(evaluate).values(), strict=True):
        assert a is b
    x = jnp.arange(12.0).reshape(4, 3)
    net(x, jax.random.key(0))
    assert_close(evaluate(x), nn.inference_mode(net)(x))
    assert int(evaluate.norm.count.value) == 1
    train = nn.train_mode(evaluate)
    assert not (
        train.norm.inference or train.dropout.inference or train.theirs.inference
    )


def test_a_network_in_a_param_switches_without_a_copy():
    model = sf.Param(Net(), name="model")
    evaluate = nn.inference_mode(model)
    assert next(iter(sf.states(evaluate).values())) is model
    x = jnp.arange(12.0).reshape(4, 3)
    run = sf.filter_jit(lambda m, x: m.value(x))
    first = run(evaluate, x)
    model.value = eqx.tree_at(lambda n: n.norm.bias, model.value, jnp.ones(3))
    assert_close(run(evaluate, x), first + 1)
    assert model.value.dropout.inference is False
    assert nn.train_mode(evaluate).value.dropout.inference is False


def test_both_modes_of_one_param_may_meet_in_one_function():
    model = sf.Param(eqx.nn.Dropout(0.5))
    modes = {"train": nn.train_mode(model), "evaluate": nn.inference_mode(model)}

    @sf.filter_jit
    def f(modes, x, key):
        return modes["train"].value(x, key=key), modes["evaluate"].value(x)

    class Pair(eqx.Module):
        modes: dict

        def __getitem__(self, k):
            return self.modes[k]

    noisy, clean = f(Pair(modes), jnp.ones(64), jax.random.key(0))
    assert_close(clean, 1.0)
    assert (noisy == 0).any()


def test_flags_in_states_in_states_are_switched():
    inner = sf.State(eqx.nn.Dropout(0.5))
    outer = sf.Param({"inner": inner, "x": jnp.ones(2)})
    evaluate = nn.inference_mode(outer)
    assert evaluate.value["inner"].value.inference is True
    assert inner.value.inference is False


def test_looking_for_flags_is_no_read():
    model = sf.Param(Net())
    fn = sf.StatefulFunction(lambda x: nn.inference_mode(model).value.norm(x))
    x = jnp.ones((4, 3))
    fn.make_jaxpr(x)
    rng = model.value.dropout.rng
    assert not any(s is rng for s in fn.get_states(x))


def test_what_has_no_flags_is_left_as_it_is():
    w = sf.Param(jnp.ones(2))
    tree = {"w": w, "linear": eqx.nn.Linear(2, 2, key=jax.random.key(0))}
    assert nn.inference_mode(tree)["w"] is w
    assert nn.inference_mode(w) is w
