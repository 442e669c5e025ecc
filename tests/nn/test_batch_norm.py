"""`BatchNorm`: Equinox's numbers, with the running statistics in States."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import statefun as sf
from statefun import nn


def batches(n, *shape):
    keys = jax.random.split(jax.random.key(5), n)
    return [2 * jax.random.normal(k, shape) + 1 for k in keys]


def assert_close(a, b, rtol=1e-4):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-5)


class ByHand:
    """Equinox's layer with its state threaded."""

    def __init__(self, mode, inference=False):
        self.layer, self.state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
            3, axis_name="batch", momentum=0.9, mode=mode, inference=inference
        )

    def __call__(self, x, inference=False):
        run = jax.vmap(
            lambda x, s: self.layer(x, s, inference=inference),
            axis_name="batch",
            in_axes=(0, None),
            out_axes=(0, None),
        )
        with jax.numpy_dtype_promotion("standard"):
            out, self.state = run(x, self.state)
        return out


@pytest.mark.parametrize("mode", ["batch", "ema"])
@pytest.mark.parametrize("spatial", [(), (4, 2)])
def test_training_equals_equinox_with_and_without_vmap(mode, spatial):
    by_hand = ByHand(mode)
    plain = nn.BatchNorm(3, momentum=0.9, mode=mode)
    lanes = nn.BatchNorm(3, axis_name="batch", momentum=0.9, mode=mode)
    run_plain = sf.filter_jit(plain)
    run_lanes = sf.filter_jit(sf.filter_vmap(lanes, axis_name="batch"))
    for x in batches(3, 6, 3, *spatial):
        expected = by_hand(x)
        assert_close(run_plain(x), expected)
        assert_close(run_lanes(x), expected)
    if mode == "ema":
        mean, var = by_hand.state.get(by_hand.layer.ema_state_index)
    else:
        mean, var = by_hand.state.get(by_hand.layer.batch_state_index)
        var = var - 0.9**3  # Equinox starts at one
        mean, var = mean / (1 - 0.9**3), var / (1 - 0.9**3)
    for layer in (plain, lanes):
        assert_close(layer.running_mean.value, mean)
        assert_close(layer.running_var.value, var)
        assert int(layer.count.value) == 3


@pytest.mark.parametrize("mode", ["batch", "ema"])
def test_gradients_equal_those_of_equinox(mode):
    first, second = batches(2, 6, 3)
    by_hand = ByHand(mode)
    by_hand(first)
    state = by_hand.state

    def expected(x):
        run = jax.vmap(
            by_hand.layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None)
        )
        return jnp.sum(run(x, state)[0] ** 3)

    layer = nn.BatchNorm(3, momentum=0.9, mode=mode)
    layer(first)
    got = sf.filter_grad(lambda x: jnp.sum(layer(x) ** 3))(second)
    assert_close(got, jax.grad(expected)(second), 1e-3)


def test_inference_uses_unbiased_running_statistics_and_writes_nothing():
    layer = nn.BatchNorm(3, momentum=0.9)
    (x,) = batches(1, 64, 3)
    layer(x)
    mean, var = layer.statistics()
    assert_close(mean, jnp.mean(x, 0))
    assert_close(var, jnp.var(x, 0))
    evaluate = nn.inference_mode(layer)
    fn = sf.StatefulFunction(evaluate)
    fn.make_jaxpr(x)
    assert fn.get_write_states(x) == ()
    assert_close(evaluate(x), (x - mean[None]) / jnp.sqrt(var[None] + 1e-5))
    assert_close(evaluate(x[:1]), evaluate(x)[:1])
    assert int(layer.count.value) == 1


def test_ema_inference_equals_equinox():
    by_hand = ByHand("ema")
    layer = nn.BatchNorm(3, momentum=0.9, mode="ema")
    for x in batches(2, 6, 3):
        by_hand(x)
        layer(x)
    assert_close(layer(x, inference=True), by_hand(x, inference=True))


@pytest.mark.parametrize("mode", ["batch", "ema"])
def test_an_untrained_layer_leaves_its_input_in_inference(mode):
    (x,) = batches(1, 6, 3)
    assert_close(nn.BatchNorm(3, mode=mode, inference=True)(x), x)


def loaded(mode, **options):
    layer = nn.BatchNorm(3, momentum=0.9, mode=mode, **options)
    layer.running_mean.value = np.array([1.0, 2.0, 3.0], np.float32)
    layer.running_var.value = np.array([4.0, 9.0, 16.0], np.float32)
    return layer, *layer.statistics()


@pytest.mark.parametrize("mode", ["batch", "ema"])
@pytest.mark.parametrize("count", [0, 1, 10_000])
def test_inference_uses_the_statistics_that_were_loaded(mode, count):
    layer, mean, var = loaded(mode)
    layer.count.value = count
    (x,) = batches(1, 6, 3)
    assert_close(layer.statistics()[1], [4.0, 9.0, 16.0])
    expected = (x - mean[None]) / jnp.sqrt(var[None] + 1e-5)
    assert_close(nn.inference_mode(layer)(x), expected)


@pytest.mark.parametrize("mode", ["batch", "ema"])
@pytest.mark.parametrize("wrap", [lambda f: f, sf.filter_jit])
def test_every_batch_moves_loaded_statistics_by_the_momentum(mode, wrap):
    layer, mean, var = loaded(mode)
    run = wrap(lambda x: layer(x))
    for x in batches(3, 6, 3):
        run(x)
        mean = 0.9 * mean + 0.1 * jnp.mean(x, 0)
        var = 0.9 * var + 0.1 * jnp.var(x, 0)
        assert_close(layer.statistics()[0], mean)
        assert_close(layer.statistics()[1], var)


def test_loaded_statistics_are_told_apart_in_every_member_of_an_ensemble():
    members = sf.filter_vmap(lambda _: nn.BatchNorm(3, momentum=0.9))(jnp.zeros(2))
    members.running_mean.value = jnp.array([[0.0] * 3, [10.0] * 3])
    (x,) = batches(1, 6, 3)
    sf.filter_vmap(lambda layer: layer(x), state_axes=0)(members)
    new = jnp.mean(x, 0)
    assert_close(members.running_mean.value, jnp.stack([new, 9 + 0.1 * new]))


@pytest.mark.parametrize("momentum", [0.0, 0.99999, 1.0])
def test_extreme_momenta_give_exact_averages(momentum):
    layer = nn.BatchNorm(3, momentum=momentum)
    first, second = batches(2, 6, 3)
    layer(first)
    assert_close(layer.statistics()[0], jnp.mean(first, 0))
    layer(second)
    share = {0.0: 1.0, 0.99999: 1 / 1.99999, 1.0: 0.0}[momentum]
    mean = (1 - share) * jnp.mean(first, 0) + share * jnp.mean(second, 0)
    assert_close(layer.statistics()[0], mean)


def test_inference_needs_no_mapped_axis():
    layer = nn.BatchNorm(3, axis_name="batch", inference=True)
    assert_close(layer(jnp.ones(3)), jnp.ones(3))


def test_statistics_are_those_of_all_devices():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    (x,) = batches(1, 8, 3)
    plain = nn.BatchNorm(3)
    expected = plain(x)
    placed = jax.device_put(x, NamedSharding(mesh, P("d")))
    sharded = nn.BatchNorm(3)
    assert_close(sf.filter_jit(sharded)(placed), expected)
    mapped = nn.BatchNorm(3, axis_name="d", batch_axis=0)
    run = sf.shard_map(mapped, mesh=mesh, in_specs=(P("d"),), out_specs=P("d"))
    assert_close(sf.filter_jit(run)(x), expected)
    for layer in (sharded, mapped):
        assert_close(layer.running_mean.value, plain.running_mean.value)
        assert_close(layer.running_var.value, plain.running_var.value)


def test_lanes_and_devices_may_be_one_batch():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    (x,) = batches(1, 8, 3)
    plain, both = nn.BatchNorm(3), nn.BatchNorm(3, axis_name=("batch", "d"))

    def run(check_vma):
        return sf.shard_map(
            lambda x: sf.filter_vmap(both, axis_name="batch")(x),
            mesh=mesh,
            in_specs=(P("d"),),
            out_specs=P("d"),
            check_vma=check_vma,
        )

    with pytest.raises(
        NotImplementedError, match="JAX can't take the mean over .*'batch'"
    ):
        run(True)(x)
    assert_close(sf.filter_jit(run(False))(x), plain(x))
    assert_close(both.running_mean.value, plain.running_mean.value)
    assert_close(both.running_var.value, plain.running_var.value)


def test_the_batch_may_be_another_axis():
    (x,) = batches(1, 6, 3, 4)
    expected = nn.BatchNorm(3)(x)
    got = nn.BatchNorm(3, batch_axis=-1)(jnp.moveaxis(x, 0, -1))
    assert_close(jnp.moveaxis(got, -1, 0), expected)


def test_half_precision_keeps_statistics_in_single_precision():
    layer = nn.BatchNorm(3)
    (x,) = batches(1, 6, 3)
    assert layer(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert layer.running_mean.value.dtype == jnp.float32
    assert_close(layer.statistics()[0], jnp.mean(x, 0), 2e-2)


def test_statistics_inside_a_param_are_no_part_of_its_gradient():
    class Net(eqx.Module):
        norm: nn.BatchNorm
        linear: eqx.nn.Linear

        def __init__(self, key):
            self.norm = nn.BatchNorm(3)
            self.linear = eqx.nn.Linear(3, 1, key=key)

        def __call__(self, x):
            return jax.vmap(self.linear)(self.norm(x))

    model = sf.Param(Net(jax.random.key(0)))
    (x,) = batches(1, 6, 3)
    grads = sf.filter_jit(
        lambda: sf.filter_grad(lambda: jnp.sum(model.value(x) ** 2), wrt=model)()
    )()
    assert grads.norm.running_mean is None
    assert grads.norm.weight.shape == (3,)
    assert int(model.value.norm.count.value) == 1


def test_a_step_is_traced_once():
    layer, traces = nn.BatchNorm(3), []

    @sf.filter_jit
    def step(x):
        traces.append(1)
        return layer(x)

    for x in batches(3, 6, 3):
        step(x)
    assert len(traces) == 1


def test_layers_of_one_shape_share_a_trace():
    traces = []

    @sf.filter_jit
    def run(layer, x):
        traces.append(1)
        return layer(x)

    (x,), layers = batches(1, 6, 3), [nn.BatchNorm(3), nn.BatchNorm(3)]
    for layer in layers:
        run(layer, x)
    assert len(traces) == 1
    assert [int(layer.count.value) for layer in layers] == [1, 1]


def test_members_of_an_ensemble_have_statistics_of_their_own():
    members = sf.filter_vmap(lambda _: nn.BatchNorm(3))(jnp.zeros(2))
    (x,), alone = batches(1, 6, 3), nn.BatchNorm(3)
    scale = jnp.array([1.0, 5.0])
    run = sf.filter_vmap(lambda layer, s: layer(x * s), state_axes=0)
    out = run(members, scale)
    assert_close(out[1], alone(5 * x))
    assert members.running_mean.value.shape == (2, 3)
    assert_close(members.running_mean.value[1], alone.running_mean.value)


def test_a_wrong_axis_name_is_an_error_that_says_so():
    layer = nn.BatchNorm(3, axis_name="batch")
    with pytest.raises(NameError, match=r"outside of its mapped axes \('batch',\)"):
        sf.filter_vmap(layer, axis_name="other")(jnp.ones((4, 3)))
    with pytest.raises(NameError, match="outside of its mapped axes"):
        layer(jnp.ones(3))
    assert int(layer.count.value) == 0


def test_a_batch_of_one_in_training_is_an_error():
    layer = nn.BatchNorm(3)
    with pytest.raises(ValueError, match="given a batch of one in training"):
        layer(jnp.ones((1, 3)))
    lanes = nn.BatchNorm(3, axis_name="batch")
    with pytest.raises(ValueError, match="given a batch of one in training"):
        sf.filter_vmap(lanes, axis_name="batch")(jnp.ones((1, 3)))
    with pytest.raises(ValueError, match="given no batch in training"):
        layer(jnp.ones((0, 3)))
    layer(jnp.arange(12.0).reshape(1, 3, 4))  # with spatial axes there is a variance
    assert int(layer.count.value) == 1


@pytest.mark.parametrize("shape", [(6, 4), (3,), (4, 6, 3)])
def test_another_number_of_channels_is_an_error(shape):
    with pytest.raises(ValueError, match=r"BatchNorm\(3\) was given an array of shape"):
        nn.BatchNorm(3)(jnp.ones(shape))


def test_an_unknown_mode_is_an_error():
    with pytest.raises(ValueError, match="`mode` is 'other'"):
        nn.BatchNorm(3, mode="other")
