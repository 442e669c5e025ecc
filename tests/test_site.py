"""States in the values of States of the arguments are States of the arguments, too."""

import gc
import weakref

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest

import statefun as sf


class Count(eqx.Module):
    n: sf.State

    def __init__(self, n=0):
        self.n = sf.State(jnp.asarray(n), name="n")


class Net(eqx.Module):
    weight: jax.Array
    first: Count
    second: Count

    def __init__(self, first, second, weight=1.0):
        self.weight = jnp.asarray(weight)
        self.first, self.second = first, second


class Model(eqx.Module):
    net: sf.Param

    def __init__(self, n=0):
        self.net = sf.Param(Net(Count(n), Count(10 * n)), name="net")

    def counts(self):
        net = self.net.value
        return int(net.first.n.value), int(net.second.n.value)


@pytest.fixture
def bump():
    @sf.filter_jit
    def bump(model, by):
        bump.traces += 1
        model.net.value.first.n.value += by
        return model.net.value.second.n.value

    bump.traces = 0
    return bump


def test_networks_in_a_param_share_one_program_whichever_states_they_hold(bump):
    one, two = Model(1), Model(2)
    assert int(bump(one, 5)) == 10
    assert int(bump(two, 7)) == 20
    assert int(bump(one, 5)) == 10
    assert (one.counts(), two.counts()) == ((11, 10), (9, 20))
    assert bump.traces == 2  # 5 and 7 are static


def test_nothing_of_an_earlier_network_stays_alive(bump):
    gone = []
    for n in range(3):
        model = Model(n)
        gone.append(weakref.ref(model.net.value.first.n))
        bump(model, 1)
    del model
    gc.collect()
    assert [r() for r in gone] == [None] * 3
    assert bump.traces == 1


class Layer(eqx.Module):
    linear: eqx.nn.Linear
    norm: sf.nn.BatchNorm

    def __call__(self, x):
        return self.norm(jax.vmap(self.linear)(x))


class Fold(eqx.Module):
    model: sf.Param
    optimizer: sf.Optimizer

    def __init__(self, seed):
        linear = eqx.nn.Linear(2, 3, key=jax.random.key(seed))
        self.model = sf.Param(Layer(linear, sf.nn.BatchNorm(3)), name="model")
        self.optimizer = sf.Optimizer(optax.sgd(1e-2, momentum=0.9), self.model)


def test_a_training_step_is_traced_once_for_all_folds():
    traces = []

    def step(fold, x):
        traces.append(None)
        loss = lambda: jnp.mean((fold.model.value(x) - x[:, :1]) ** 2)  # noqa: E731
        fold.optimizer.update(sf.filter_grad(loss, wrt=fold.model)())

    x = jax.random.normal(jax.random.key(9), (16, 2))
    jitted = sf.filter_jit(step)
    folds, bare = [Fold(s) for s in range(3)], [Fold(s) for s in range(3)]
    for fold, same in zip(folds, bare, strict=True):
        for _ in range(2):
            jitted(fold, x)
            step(same, x)
    assert len(traces) == 1 + 6
    for fold, same in zip(folds, bare, strict=True):
        pairs = zip(
            jax.tree.leaves(sf.freeze(fold)),
            jax.tree.leaves(sf.freeze(same)),
            strict=True,
        )
        for a, b in pairs:
            assert not eqx.is_array(a) or jnp.allclose(a, b, rtol=1e-3, atol=1e-4)


def test_how_states_are_shared_inside_is_part_of_the_key(bump):
    apart, count = Model(1), Count(3)
    shared = Model()
    shared.net.value = Net(count, count)
    assert int(bump(apart, 1)) == 10
    assert int(bump(shared, 1)) == 4
    assert shared.counts() == (4, 4)
    assert bump.traces == 2


def test_a_state_inside_that_is_an_argument_as_well_is_one_state():
    @sf.filter_jit
    def f(model, count):
        count.n.value += 1
        model.net.value.first.n.value *= 10
        return count.n.value

    model = Model(1)
    assert int(f(model, model.net.value.first)) == 20
    assert int(f(model, Count(7))) == 8
    assert model.counts() == (200, 10)


@pytest.mark.parametrize("by", ["closure", "state"])
def test_a_state_inside_that_is_reached_in_another_way_is_one_state(by):
    model, other = Model(1), Model(2)
    inner = model.net.value.first
    box = sf.State(inner)

    @sf.filter_jit
    def f(given):
        count = inner if by == "closure" else box.value
        count.n.value += 1
        given.net.value.first.n.value *= 10
        return count.n.value

    assert int(f(model)) == 20
    assert int(f(other)) == 21
    assert int(f(model)) == 220
    assert (model.counts()[0], other.counts()[0]) == (220, 20)


def test_states_inside_can_be_exchanged():
    @sf.filter_jit
    def swap(model):
        net = model.net.value
        model.net.value = Net(net.second, net.first, net.weight + 1)

    one, two = Model(1), Model(2)
    first, second = one.net.value.first.n, one.net.value.second.n
    swap(one)
    swap(two)
    assert (one.counts(), two.counts()) == ((10, 1), (20, 2))
    assert one.net.value.first.n is second and one.net.value.second.n is first
    swap(one)
    assert one.counts() == (1, 10)


def test_a_state_inside_can_be_put_into_another_state():
    box = sf.State(Count(5))

    @sf.filter_jit
    def f(model):
        box.value = model.net.value.first
        return box.value.n.value

    one, two = Model(1), Model(2)
    assert (int(f(one)), int(f(two)), int(f(one))) == (1, 2, 1)
    assert box.value.n is one.net.value.first.n


def test_a_new_structure_inside_is_seen(bump):
    model = Model(1)
    bump(model, 1)
    model.net.value = Net(Count(5), Count(6))
    assert int(bump(model, 1)) == 6
    assert bump.traces == 1
    model.net.value = Net(Count(5), Count(jnp.arange(2)))
    assert bump(model, 1).tolist() == [0, 1]
    assert bump.traces == 2


def test_states_inside_states_inside_states():
    class Outer(eqx.Module):
        model: sf.State

    @sf.filter_jit
    def f(outer):
        f.traces += 1
        outer.model.value.net.value.first.n.value += 1

    f.traces = 0
    outers = [Outer(sf.State(Model(n))) for n in range(3)]
    for outer in outers:
        f(outer)
    assert [o.model.value.counts()[0] for o in outers] == [1, 2, 3]
    assert f.traces == 1


def test_a_state_that_holds_itself_ends():
    class Ring(eqx.Module):
        me: sf.State
        n: jax.Array

    state = sf.State(jnp.zeros(()))
    state.value = Ring(state, jnp.zeros(()))
    ring = Ring(state, jnp.zeros(()))

    @sf.filter_jit
    def f(ring):
        ring.me.value = Ring(ring.me, ring.me.value.n + 1)
        return ring.me.value.me.value.n

    assert [float(f(ring)) for _ in range(2)] == [1.0, 2.0]


def test_twins_inside_and_around_see_them():
    @sf.filter_jit
    def inner(model):
        inner.traces += 1
        model.net.value.first.n.value += 1

    inner.traces = 0

    @sf.filter_jit
    def outer(models):
        for model in models:
            sf.scan(lambda c, _, m=model: (inner(m), None), None, length=3)
        return sf.filter_grad(lambda: loss(models[0]), wrt=models[0].net)()

    def loss(model):
        inner(model)
        return model.net.value.weight**2

    models = Model(1), Model(2)
    grads = outer(models)
    assert [m.counts()[0] for m in models] == [5, 5]
    leaves = jax.tree.leaves(grads)
    assert [float(x) for x in leaves if eqx.is_array(x)] == [2.0]
    assert inner.traces <= 2


def test_donated_states_hold_the_states_of_this_call():
    @sf.filter_jit(donate_states=True)
    def f(model):
        net = model.net.value
        model.net.value = Net(net.first, net.second, net.weight + 1)
        net.first.n.value += 1

    models = [Model(n) for n in range(3)]
    for model in models * 2:
        f(model)
    assert [m.counts()[0] for m in models] == [2, 3, 4]
    assert [float(m.net.value.weight) for m in models] == [3.0] * 3


def test_an_ahead_of_time_call_serves_every_network():
    def f(model):
        model.net.value.first.n.value += 1

    compiled = sf.filter_jit(f).lower(Model(1)).compile()
    models = [Model(n) for n in range(2)]
    for model in models:
        compiled(model)
    assert [m.counts()[0] for m in models] == [1, 2]


def test_errors_give_the_path_through_the_value():
    @sf.filter_jit
    def f(model):
        jax.lax.scan(lambda c, _: (write(model), None), None, length=2)

    def write(model):
        model.net.value.first.n.value = jnp.asarray(1)

    with pytest.raises(sf.StateTraceError, match=r"net\.value\.first\.n"):
        f(Model())
