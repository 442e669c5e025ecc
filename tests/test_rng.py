"""`Rng`: every draw, iteration, lane and device has a key of its own."""

import copy
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import statefun as sf
from statefun._rng import Rng


def data(keys):
    return np.asarray(jax.random.key_data(keys))


def distinct(keys):
    rows = data(keys).reshape(-1, data(keys).shape[-1])
    return len({tuple(row) for row in rows.tolist()}) == len(rows)


def draws(n, seed=7):
    """The first `n` keys of a stream, drawn eagerly."""
    rng = Rng(seed)
    return data(jnp.stack([rng() for _ in range(n)]))


def scanned(rng, n):
    return sf.scan(lambda _, x: (None, rng()), None, None, length=n)[1]


def test_every_draw_is_another_typed_key():
    rng = Rng(0)
    keys = [rng() for _ in range(10)]
    assert all(jnp.issubdtype(k.dtype, jax.dtypes.prng_key) for k in keys)
    assert all(k.shape == () for k in keys)
    assert distinct(jnp.stack([*keys, rng.value]))


def test_split_gives_as_many_keys_as_asked_for():
    rng = Rng(0)
    assert rng.split().shape == (2,)
    assert rng.split(5).shape == (5,)
    assert rng.split((2, 3)).shape == (2, 3)
    rng = Rng(0)
    assert distinct(jnp.concatenate([rng.split(4), rng.split(4), rng()[None]]))


def test_a_seed_and_its_key_give_the_same_stream():
    assert (data(Rng(3)()) == data(Rng(jax.random.key(3))())).all()
    assert (data(Rng(np.int64(3))()) == data(Rng(jnp.array(3))())).all()
    assert not (data(Rng(3)()) == data(Rng(4)())).all()


def test_an_implementation_may_be_chosen():
    assert Rng(0, impl="rbg")().dtype == jax.random.key(0, impl="rbg").dtype


def test_jit_draws_what_eager_mode_draws():
    rng = Rng(7)
    draw = sf.filter_jit(lambda: rng())
    assert (data(jnp.stack([draw() for _ in range(3)])) == draws(3)).all()


def test_a_compiled_function_is_not_traced_again_for_the_next_key():
    rng, traces = Rng(7), []

    @sf.filter_jit
    def draw():
        traces.append(1)
        return rng()

    for _ in range(3):
        draw()
    rng.value = jax.random.key(1)
    draw()
    assert len(traces) == 1


def test_scan_draws_what_eager_mode_draws():
    rng = Rng(7)
    assert (data(scanned(rng, 5)) == draws(5)).all()
    rng = Rng(7)
    jitted = sf.filter_jit(lambda: scanned(rng, 5))
    assert (data(jitted()) == draws(5)).all()


def test_the_other_loops_draw_what_eager_mode_draws():
    rng = Rng(7)
    assert (data(sf.map(lambda x: rng(), jnp.arange(4))) == draws(4)).all()
    rng = Rng(7)
    keys = jax.random.split(jax.random.key(0), 4)
    keys = sf.fori_loop(0, 4, lambda i, ks: ks.at[i].set(rng()), keys)
    assert (data(keys) == draws(4)).all()


def test_a_branch_advances_only_if_it_is_taken():
    rng = Rng(7)

    @sf.filter_jit
    def f(p):
        return sf.cond(p, lambda: rng(), lambda: jax.random.key(0))

    f(False)
    assert (data(f(True)) == draws(1)[0]).all()


def test_vmap_over_one_element_draws_what_eager_mode_draws():
    rng = Rng(7)
    f = sf.filter_vmap(lambda x: (rng(), rng()))
    first, second = f(jnp.zeros(1))
    third = rng()
    stream = jnp.stack([first[0], second[0], third])
    assert (data(stream) == draws(3)).all()


def test_every_lane_draws_its_own_keys():
    rng = Rng(7)
    before = rng.value
    f = sf.filter_vmap(lambda x: jnp.stack([rng(), rng()]))
    keys = [f(jnp.zeros(4)), f(jnp.zeros(4)), rng(), before]
    assert distinct(jnp.concatenate([k.reshape(-1) for k in keys]))
    assert rng.value.shape == ()


def test_lanes_are_distinct_under_jit_in_either_order():
    def run(wrap):
        rng = Rng(7)
        return wrap(lambda x: rng())(jnp.zeros(4))

    eager = run(sf.filter_vmap)
    assert distinct(eager)
    outer = run(lambda f: sf.filter_jit(sf.filter_vmap(f)))
    inner = run(lambda f: sf.filter_vmap(sf.filter_jit(f)))
    assert (data(outer) == data(eager)).all()
    assert (data(inner) == data(eager)).all()


def test_a_function_that_was_compiled_outside_still_draws_for_every_lane():
    rng = Rng(7)
    draw = sf.filter_jit(lambda x: rng())
    draw(jnp.zeros(()))
    assert distinct(sf.filter_vmap(draw)(jnp.zeros(4)))


class Noise(eqx.Module):
    rng: Rng

    @sf.filter_jit
    def __call__(self, x):
        return self.rng()


def test_the_rng_of_a_module_argument_draws_for_every_lane():
    noise = Noise(Rng(7))
    noise(jnp.zeros(()))
    assert distinct(sf.filter_vmap(noise)(jnp.zeros(4)))
    step = sf.filter_vmap(lambda m, x: m(x), in_axes=(None, 0))
    assert distinct(step(noise, jnp.zeros(4)))


def test_lanes_of_nested_vmaps_are_distinct():
    rng = Rng(7)
    f = sf.filter_vmap(sf.filter_vmap(lambda x: rng()))
    first, second = f(jnp.zeros((3, 4))), f(jnp.zeros((3, 4)))
    assert first.shape == (3, 4)
    assert distinct(jnp.stack([first, second]))


def test_iterations_inside_of_lanes_and_lanes_inside_of_iterations_are_distinct():
    rng = Rng(7)
    inside = sf.filter_vmap(lambda x: scanned(rng, 3))(jnp.zeros(4))
    vmapped = sf.filter_vmap(lambda x: rng())
    around = sf.scan(lambda _, x: (None, vmapped(jnp.zeros(4))), None, None, length=3)[
        1
    ]
    assert distinct(jnp.stack([inside.T, around]))


def test_the_stream_goes_on_the_same_however_often_the_lanes_draw():
    def after(n):
        rng = Rng(7)
        sf.filter_vmap(lambda x: rng.split(n) if n < 3 else [rng(), rng()])(
            jnp.zeros(4)
        )
        return data(rng())

    assert (after(1) == after(2)).all()
    assert (after(1) == after(3)).all()


def test_an_rng_that_no_lane_draws_from_stays():
    rng = Rng(7)
    sf.filter_vmap(lambda x: x + jnp.sum(jax.random.key_data(rng.value)).astype(float))(
        jnp.zeros(4)
    )
    assert (data(rng.value) == data(jax.random.key(7))).all()


def test_a_mapped_rng_draws_in_each_lane_what_it_would_alone():
    keys = jax.random.split(jax.random.key(0), 3)
    rng = Rng(keys)
    f = sf.filter_vmap(lambda x: jnp.stack([rng(), rng()]), state_axes=[(Rng, 0)])
    got = f(jnp.zeros(3))
    for key, mine in zip(keys, got, strict=True):
        alone = Rng(key)
        assert (data(mine) == data(jnp.stack([alone(), alone()]))).all()
    assert rng.value.shape == (3,)


def test_members_of_an_ensemble_have_streams_of_their_own():
    keys = jax.random.split(jax.random.key(0), 3)
    ensemble = sf.filter_vmap(lambda k: Noise(Rng(k)))(keys)
    assert ensemble.rng.value.shape == (3,)
    got = sf.filter_vmap(lambda m: m(0), state_axes=0, axis_size=3)(ensemble)
    assert (data(got) == data(jnp.stack([Rng(k)() for k in keys]))).all()


def test_every_device_draws_its_own_key():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    rng = Rng(7)
    before = rng.value

    def f(x):
        return rng()[None]

    g = sf.filter_jit(sf.shard_map(f, mesh=mesh, in_specs=(P("d"),), out_specs=P("d")))
    keys = jnp.concatenate([g(jnp.zeros(4)), g(jnp.zeros(4)), before[None]])
    assert distinct(keys)
    assert rng.value.shape == ()


def test_one_device_draws_what_eager_mode_draws():
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    rng, alone = Rng(7), Rng(7)

    def f(x):
        return jnp.stack([rng(), rng()])

    got = sf.shard_map(f, mesh=mesh, in_specs=(P("d"),), out_specs=P("d"))(jnp.zeros(1))
    assert (data(got) == data(jnp.stack([alone(), alone()]))).all()
    assert (data(rng.value) == data(alone.value)).all()


def test_lanes_on_devices_draw_their_own_keys():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    rng = Rng(7)
    lanes = sf.filter_vmap(lambda x: rng())
    f = sf.filter_jit(
        sf.shard_map(lanes, mesh=mesh, in_specs=(P("d"),), out_specs=P("d"))
    )
    assert distinct(jnp.concatenate([f(jnp.zeros(8)), f(jnp.zeros(8))]))


def test_checkpointed_gradients_see_the_noise_of_the_forward_pass():
    rng, w = Rng(7), sf.Param(jnp.array(2.0))

    def loss(x):
        return jnp.sum(w.value**2 * x * jax.random.normal(rng(), (3,)))

    plain = sf.filter_grad(loss, wrt=w)(1.0)
    rng.value = jax.random.key(7)
    again = sf.filter_grad(sf.filter_checkpoint(loss), wrt=w)(1.0)
    np.testing.assert_allclose(plain, again, rtol=1e-6)
    assert (data(rng()) == draws(2)[1]).all()


def test_a_saved_value_resumes_the_stream():
    rng = Rng(7)
    rng()
    saved = jax.random.key_data(rng.value)
    rest = [rng(), rng()]
    new = Rng(0)
    sf.update(new, jax.random.wrap_key_data(saved))
    assert (data(jnp.stack([new(), new()])) == data(jnp.stack(rest))).all()


@pytest.mark.parametrize("copied", [copy.deepcopy, sf.clone])
def test_a_copy_goes_on_by_itself(copied):
    rng = Rng(7)
    other = copied(rng)
    assert isinstance(other, Rng)
    assert (data(other()) == draws(1)[0]).all()
    assert (data(rng()) == draws(1)[0]).all()


def test_pickle_keeps_the_position():
    rng = Rng(7)
    rng()
    other = pickle.loads(pickle.dumps(rng))
    assert (data(other()) == draws(2)[1]).all()


def test_a_failed_function_draws_nothing():
    rng = Rng(7)

    @sf.filter_jit
    def f():
        rng()
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        f()
    assert (data(rng()) == draws(1)[0]).all()


def test_a_key_of_the_old_kind_is_refused():
    old = jax.random.PRNGKey(0)
    with pytest.raises(
        TypeError, match=r"a key of the old kind \(an array uint32\[2\]\)"
    ):
        Rng(old)
    rng = Rng(0)
    with pytest.raises(sf.StateTypeError, match="a key of the old kind"):
        rng.value = old
    assert (data(rng()) == draws(1, 0)[0]).all()


@pytest.mark.parametrize("given", [1.5, True, "seed", None, jnp.ones(2)])
def test_what_is_no_seed_and_no_key_is_refused(given):
    with pytest.raises(
        TypeError, match=r"Rng was given .*, which is neither a seed nor a key"
    ):
        Rng(given)


def test_a_draw_from_an_array_of_keys_outside_of_lanes_is_refused():
    rng = Rng(jax.random.split(jax.random.key(0), 3))
    with pytest.raises(
        ValueError, match=r"which holds an array of keys of shape \(3,\)"
    ):
        rng()


def test_rngs_leak_no_tracer(checking_leaks):
    rng = Rng(7)
    sf.filter_jit(sf.filter_vmap(lambda x: scanned(rng, 2)))(jnp.zeros(3))
    rng()
