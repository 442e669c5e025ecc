"""`Optimizer`: any optax transformation, with its state and the Params in States."""

import copy
import pickle

import cloudpickle
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import PartitionSpec as P

import statefun as sf
from statefun.optim import Optimizer

X = jax.random.normal(jax.random.key(1), (16, 3))
Y = jnp.sin(X[:, :2])


def network(seed=0):
    return eqx.nn.Linear(3, 2, key=jax.random.key(seed))


def mse(net, x=X, y=Y):
    return jnp.mean((jax.vmap(net)(x) - y) ** 2)


def by_hand(tx, steps, net=None, extra=False):
    """The same training in plain Equinox and optax."""
    net = network() if net is None else net
    params, static = eqx.partition(net, eqx.is_inexact_array)
    tx = optax.with_extra_args_support(tx)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(lambda p: mse(eqx.combine(p, static)))(params)
        updates, state = tx.update(
            grads, state, params, **({"value": value} if extra else {})
        )
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def trained(tx, steps, jit=True, extra=False):
    model = sf.Param(network())
    optimizer = Optimizer(tx, model)

    def step():
        value, grads = sf.filter_value_and_grad(lambda: mse(model.value), wrt=model)()
        optimizer.update(grads, **({"value": value} if extra else {}))

    step = sf.filter_jit(step) if jit else step
    for _ in range(steps):
        step()
    return model, optimizer


def assert_same(a, b, rtol=1e-5):
    a = jax.tree.leaves(eqx.filter(a, eqx.is_array))
    b = jax.tree.leaves(eqx.filter(b, eqx.is_array))
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6)


def a_mask(params):
    return jax.tree.map(lambda x: x.ndim == 2, params)


def a_label(params):
    return jax.tree.map(lambda x: "matrix" if x.ndim == 2 else "vector", params)


TRANSFORMS = {
    "sgd": lambda: optax.sgd(0.1, momentum=0.9),
    "adamw": lambda: optax.adamw(1e-2),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2)),
    "schedule": lambda: optax.adam(optax.cosine_decay_schedule(1e-2, 5)),
    "inject": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
    "injected schedule": lambda: optax.inject_hyperparams(optax.sgd)(
        learning_rate=optax.linear_schedule(0.1, 0.0, 5)
    ),
    "multi steps": lambda: optax.MultiSteps(
        optax.adam(1e-2), 3
    ).gradient_transformation(),
    "masked": lambda: optax.masked(optax.sgd(0.1), a_mask),
    "multi transform": lambda: optax.multi_transform(
        {"matrix": optax.adam(1e-2), "vector": optax.sgd(0.1)}, a_label
    ),
    "ema": lambda: optax.chain(optax.ema(0.9), optax.sgd(0.1)),
    "sam": lambda: optax.contrib.sam(
        optax.sgd(0.1), optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    ),
    "noise": lambda: optax.chain(optax.add_noise(0.1, 0.5, key=0), optax.sgd(0.1)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_training_equals_optax_used_by_hand(name):
    # Some of optax's transformations mix dtypes.
    with jax.numpy_dtype_promotion("standard"):
        params, state = by_hand(TRANSFORMS[name](), 7)
    model, optimizer = trained(TRANSFORMS[name](), 7)
    assert_same(eqx.filter(model.value, eqx.is_inexact_array), params)
    assert jax.tree.structure(optimizer.opt_state.value) == jax.tree.structure(state)
    plain = [
        x
        for x in jax.tree.leaves(state)
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    ]
    ours = [
        x
        for x in jax.tree.leaves(optimizer.opt_state.value)
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    ]
    assert_same(ours, plain)
    assert int(optimizer.step.value) == 7


def test_eager_training_equals_compiled_training():
    assert_same(
        trained(optax.adam(1e-2), 3, jit=False)[0].value,
        trained(optax.adam(1e-2), 3)[0].value,
    )


def test_extra_arguments_reach_the_transformation():
    def tx():
        return optax.chain(
            optax.adam(1e-2), optax.contrib.reduce_on_plateau(patience=1, rtol=0.5)
        )

    with jax.numpy_dtype_promotion("standard"):
        params, _ = by_hand(tx(), 8, extra=True)
    model, optimizer = trained(tx(), 8, extra=True)
    assert_same(eqx.filter(model.value, eqx.is_inexact_array), params)
    assert float(optimizer.opt_state.value[1].scale) < 1  # it has seen the loss


def test_training_inside_scan_equals_a_loop():
    model = sf.Param(network())
    optimizer = Optimizer(optax.adam(1e-2), model)

    def step(carry, _):
        optimizer.update(sf.filter_grad(lambda: mse(model.value), wrt=model)())
        return carry, None

    sf.scan(step, None, None, length=4)
    assert_same(model.value, trained(optax.adam(1e-2), 4)[0].value)
    assert int(optimizer.step.value) == 4


def test_an_ensemble_trains_under_vmap_as_its_members_do():
    class Member(eqx.Module):
        model: sf.Param
        optimizer: Optimizer

        def __init__(self, key):
            self.model = sf.Param(eqx.nn.Linear(3, 2, key=key))
            self.optimizer = Optimizer(optax.adam(1e-2), self.model)

        def train(self):
            grads = sf.filter_grad(lambda: mse(self.model.value), wrt=self.model)()
            self.optimizer.update(grads)

    keys = jax.random.split(jax.random.key(0), 3)
    members = sf.filter_vmap(Member)(keys)
    step = sf.filter_jit(sf.filter_vmap(lambda m: m.train(), state_axes=0, axis_size=3))
    for _ in range(3):
        step(members)
    alone = Member(keys[1])
    for _ in range(3):
        alone.train()
    got = jax.tree.map(lambda x: x[1] if eqx.is_array(x) else x, members.model.value)
    assert_same(got, alone.model.value, 1e-4)


def test_devices_train_on_their_part_of_a_batch():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    models = [sf.Param(network()) for _ in range(2)]
    alone, sharded = (Optimizer(optax.adam(1e-2), model) for model in models)

    def step(x, y):
        # Of the whole batch: the gradient of what all devices share is then theirs, too.
        def loss():
            return jax.lax.pmean(mse(sharded.wrt.value, x, y), "d")

        sharded.update(sf.filter_grad(loss, wrt=sharded.wrt)())

    run = sf.filter_jit(
        sf.shard_map(step, mesh=mesh, in_specs=(P("d"), P("d")), out_specs=P())
    )
    for _ in range(3):
        run(X, Y)
        grads = sf.filter_grad(lambda: mse(alone.wrt.value), wrt=alone.wrt)()
        alone.update(grads)
    assert_same(sharded.wrt.value, alone.wrt.value, 1e-4)
    assert_same(sharded.opt_state.value, alone.opt_state.value, 1e-3)


def test_a_saved_optimizer_goes_on_where_it_was():
    model, optimizer = trained(optax.adam(1e-2), 3)
    saved = sf.freeze(optimizer)
    other = Optimizer(optax.adam(1e-2), sf.Param(network(1)))
    sf.update(other, saved)
    grads = jax.tree.map(jnp.ones_like, eqx.filter(model.value, eqx.is_inexact_array))
    for o in (optimizer, other):
        o.update(grads)
    assert_same(other.wrt.value, model.value)
    assert int(other.step.value) == 4


def test_transformations_by_the_place_of_a_param():
    net = {"a": sf.Param(jnp.ones(2)), "b": sf.Param(network()), "n": sf.State(0)}

    def label(params):
        def of(path, _):
            return "moves" if path[0].key == "a" else "stays"

        return jax.tree.map_with_path(of, params)

    tx = {"moves": optax.sgd(1.0), "stays": optax.set_to_zero()}
    optimizer = Optimizer(optax.multi_transform(tx, label), net)
    before = net["b"].value.weight

    def loss():
        net["n"].value += 1
        return jnp.sum(net["a"].value) + jnp.sum(net["b"].value(X[0]))

    optimizer.update(sf.filter_grad(loss, wrt=net)())
    assert net["a"].value.tolist() == [0.0, 0.0]
    assert (net["b"].value.weight == before).all() and int(net["n"].value) == 1


def test_dtypes_are_kept():
    w = sf.Param(jnp.ones(3, jnp.bfloat16))
    optimizer = Optimizer(optax.adam(1e-2), w)
    optimizer.update(jnp.ones(3, jnp.float32))
    assert w.value.dtype == jnp.bfloat16


# -- what is trained ----------------------------------------------------------------


class Layers(eqx.Module):
    first: sf.Param
    second: sf.Param
    seen: sf.State
    scale: jax.Array

    def __init__(self):
        self.first = sf.Param(jnp.ones(2), name="first")
        self.second = self.first
        self.seen = sf.State(jnp.array(0.0), name="seen")
        self.scale = jnp.array(2.0)

    def loss(self):
        self.seen.value += 1
        return jnp.sum(self.first.value * self.second.value) * self.scale


def test_a_tied_param_is_updated_once_with_the_sum():
    layers = Layers()
    optimizer = Optimizer(optax.sgd(0.1), layers)
    grads = sf.filter_grad(layers.loss, wrt=layers)()
    np.testing.assert_allclose(grads.first, grads.second)
    optimizer.update(grads)
    np.testing.assert_allclose(layers.first.value, 1 - 0.1 * 4.0, rtol=1e-6)
    sizes = [
        x.shape
        for x in jax.tree.leaves(Optimizer(optax.trace(0.9), layers).opt_state.value)
    ]
    assert sizes == [(2,)]


def test_states_that_are_no_params_and_plain_arrays_stay():
    layers = Layers()
    optimizer = Optimizer(optax.sgd(0.1), layers)
    grads = sf.filter_grad(lambda m: m.loss())(layers)
    assert grads.scale is not None
    optimizer.update(grads)
    assert float(layers.seen.value) == 1.0
    assert float(layers.scale) == 2.0
    np.testing.assert_allclose(layers.first.value, 0.6, rtol=1e-6)


def test_an_update_reads_only_what_it_trains():
    layers = Layers()
    optimizer = Optimizer(optax.sgd(0.1), layers)
    grads = sf.filter_grad(layers.loss, wrt=layers)()
    fn = sf.StatefulFunction(optimizer.update)
    fn.make_jaxpr(grads)
    touched = fn.get_states(grads)
    assert any(s is layers.first for s in touched)
    assert not any(s is layers.seen for s in touched)


def test_integers_in_a_param_are_not_trained():
    w = sf.Param({"w": jnp.ones(2), "n": jnp.arange(2)})
    optimizer = Optimizer(optax.adam(0.1), w)
    optimizer.update(sf.filter_grad(lambda: jnp.sum(w.value["w"]), wrt=w)())
    assert w.value["n"].dtype == jnp.int32
    assert (w.value["n"] == jnp.arange(2)).all()
    assert (w.value["w"] < 1).all()


def test_a_tree_without_a_param_is_refused():
    with pytest.raises(TypeError, match="given a `wrt` without any Param"):
        Optimizer(optax.sgd(0.1), {"s": sf.State(1.0), "x": jnp.ones(2)})


def test_a_param_inside_the_value_of_another_state_is_refused():
    inner = sf.Param(jnp.ones(2), name="inner")
    outer = sf.Param({"w": jnp.ones(2), "inner": inner})
    with pytest.raises(TypeError, match=r"given `\.value\['inner'\]`, a Param inside"):
        Optimizer(optax.sgd(0.1), outer)
    Optimizer(optax.sgd(0.1), (outer, inner))


# -- wrong gradients ----------------------------------------------------------------


def two_params():
    return {
        "a": sf.Param({"w": jnp.ones(2), "b": jnp.ones(3)}),
        "z": sf.Param(jnp.ones(2)),
    }


@pytest.mark.parametrize(
    ("grads", "path"),
    [
        ({"a": {"w": jnp.ones(2), "b": jnp.ones(3)}}, r"\['z'\]"),
        (
            {"a": {"w": jnp.ones(2), "c": jnp.ones(3)}, "z": jnp.ones(2)},
            r"\['a'\]\['b'\]",
        ),
        ({"a": {"w": jnp.ones(2), "b": None}, "z": jnp.ones(2)}, r"\['a'\]\['b'\]"),
        (
            {"a": {"w": jnp.ones(2), "b": jnp.ones(4)}, "z": jnp.ones(2)},
            r"\['a'\]\['b'\]",
        ),
        ({"a": {"w": jnp.ones(2), "b": jnp.ones(3)}, "z": None}, r"\['z'\]"),
    ],
)
@pytest.mark.parametrize("jit", [False, True])
def test_gradients_of_another_structure_are_refused_with_the_path(grads, path, jit):
    params = two_params()
    optimizer = Optimizer(optax.sgd(0.1), params)
    update = sf.filter_jit(optimizer.update) if jit else optimizer.update
    with pytest.raises(sf.StateValueError, match=f"don't fit .* first at `{path}`"):
        update(grads)
    assert int(optimizer.step.value) == 0
    assert (params["z"].value == 1).all()


def test_gradients_that_are_another_kind_of_tree_are_refused():
    optimizer = Optimizer(optax.sgd(0.1), two_params())
    with pytest.raises(sf.StateValueError, match="don't fit .* at its root"):
        optimizer.update([jnp.ones(2)])


def test_a_transformation_that_fails_changes_nothing():
    def fail(updates, state, params=None):
        raise RuntimeError("no")

    w = sf.Param(jnp.ones(2))
    optimizer = Optimizer(optax.GradientTransformation(lambda p: (), fail), w)
    with pytest.raises(RuntimeError, match="no"):
        optimizer.update(jnp.ones(2))
    assert int(optimizer.step.value) == 0


# -- hyperparameters ----------------------------------------------------------------


def injected():
    return optax.inject_hyperparams(optax.sgd)(learning_rate=0.5)


def test_the_rate_can_be_read_and_set_without_a_new_trace():
    w, traces = sf.Param(jnp.ones(2)), []
    optimizer = Optimizer(injected(), w)

    @sf.filter_jit
    def step():
        traces.append(1)
        optimizer.update(jnp.ones(2))

    step()
    np.testing.assert_allclose(w.value, 0.5)
    assert float(optimizer.hyperparams["learning_rate"]) == 0.5
    optimizer.hyperparams["learning_rate"] = 0.25
    assert float(optimizer.hyperparams["learning_rate"]) == 0.25
    step()
    np.testing.assert_allclose(w.value, 0.25)
    assert len(traces) == 1


def test_the_rate_can_be_set_inside_a_compiled_function():
    w = sf.Param(jnp.ones(2))
    optimizer = Optimizer(injected(), w)

    @sf.filter_jit
    def step(rate):
        optimizer.hyperparams["learning_rate"] = rate
        optimizer.update(jnp.ones(2))

    step(0.25)
    step(jnp.array(0.5))
    np.testing.assert_allclose(w.value, 0.25)


def test_hyperparameters_of_inner_transformations_are_named_by_their_place():
    params = {"a": sf.Param(jnp.ones(2)), "b": sf.Param(jnp.ones(2))}
    tx = optax.multi_transform({"x": injected(), "y": injected()}, {"a": "x", "b": "y"})
    optimizer = Optimizer(tx, params)
    assert "learning_rate" not in optimizer.hyperparams
    x, y = sorted(optimizer.hyperparams)
    assert "['x']" in x and x.endswith(".learning_rate")
    optimizer.hyperparams[y] = 0.0
    optimizer.update({"a": jnp.ones(2), "b": jnp.ones(2)})
    np.testing.assert_allclose(params["a"].value, 0.5)
    np.testing.assert_allclose(params["b"].value, 1.0)


def test_a_hyperparameter_that_is_not_kept_is_refused():
    optimizer = Optimizer(injected(), sf.Param(jnp.ones(2)))
    with pytest.raises(KeyError, match=r"no hyperparameter 'rate'; it has \['learning"):
        optimizer.hyperparams["rate"] = 1.0
    plain = Optimizer(optax.sgd(0.1), sf.Param(jnp.ones(2)))
    with pytest.raises(KeyError, match="it has none"):
        plain.hyperparams["learning_rate"]
    assert len(plain.hyperparams) == 0


def test_a_hyperparameter_that_a_schedule_sets_can_only_be_read():
    tx = optax.inject_hyperparams(optax.sgd)(optax.linear_schedule(1.0, 0.0, 2))
    optimizer = Optimizer(tx, sf.Param(jnp.ones(2)))
    optimizer.update(jnp.ones(2))
    optimizer.update(jnp.ones(2))
    assert float(optimizer.hyperparams["learning_rate"]) == 0.5
    with pytest.raises(
        sf.StateValueError, match="was assigned, but a schedule sets it"
    ):
        optimizer.hyperparams["learning_rate"] = 1.0


def test_a_hyperparameter_of_another_shape_is_refused():
    optimizer = Optimizer(injected(), sf.Param(jnp.ones(2)))
    with pytest.raises(
        sf.StateValueError, match=r"a value of shape \(2,\) was assigned"
    ):
        optimizer.hyperparams["learning_rate"] = jnp.ones(2)


# -- transformations that look elsewhere ---------------------------------------------


def test_lookahead_trains_the_fast_params_and_keeps_the_slow_ones():
    tx = optax.lookahead(optax.sgd(0.1), sync_period=3, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(jnp.ones(2))
    state = tx.init(params)
    fast = sf.Param(jnp.ones(2))
    optimizer = Optimizer(tx, optax.LookaheadParams(fast, sf.clone(fast)))
    step = sf.filter_jit(
        lambda: optimizer.update(
            sf.filter_grad(lambda: jnp.sum(fast.value**2), wrt=fast)()
        )
    )
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(7):
            grads = jax.grad(lambda p: jnp.sum(p**2))(params.fast)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            step()
    np.testing.assert_allclose(optimizer.wrt.fast.value, params.fast, rtol=1e-5)
    np.testing.assert_allclose(optimizer.wrt.slow.value, params.slow, rtol=1e-5)


def test_sam_asks_for_gradients_at_other_params():
    adv = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))

    def sam():
        return optax.contrib.sam(optax.sgd(0.1), adv, opaque_mode=True)

    w, calls = sf.Param(jnp.array([1.0, 2.0])), sf.State(jnp.array(0))
    optimizer = Optimizer(sam(), w)

    def loss():
        calls.value += 1
        return jnp.sum(w.value**3)

    @sf.filter_jit
    def step():
        grad = sf.filter_grad(loss, wrt=w)
        optimizer.update(grad(), grad_fn=lambda i: grad())

    params = jnp.array([1.0, 2.0])
    state = sam().init(params)
    grad = jax.grad(lambda p: jnp.sum(p**3))
    for _ in range(3):
        updates, state = sam().update(
            grad(params), state, params, grad_fn=lambda p, i: grad(p)
        )
        params = optax.apply_updates(params, updates)
        step()
    np.testing.assert_allclose(w.value, params, rtol=1e-5)
    assert int(calls.value) == 3  # trials leave no trace


@pytest.mark.parametrize("jit", [False, True])
def test_a_line_search_evaluates_the_loss_at_trial_params(jit):
    target = sf.State(jnp.array([1.0, -2.0, 3.0]))
    w = sf.Param(jnp.zeros(3))
    optimizer = Optimizer(optax.lbfgs(), {"w": w, "target": target})

    def loss():
        return jnp.sum((w.value - target.value) ** 4)

    def step():
        value, grads = sf.filter_value_and_grad(loss, wrt=optimizer.wrt)()
        optimizer.update(grads, value=value, grad=grads, value_fn=loss)

    step = sf.filter_jit(step) if jit else step
    tx, params = optax.lbfgs(), jnp.zeros(3)
    state = tx.init(params)

    def by_hand(p):
        return jnp.sum((p - jnp.array([1.0, -2.0, 3.0])) ** 4)

    @jax.jit
    def hand_step(params, state):
        value, grad = jax.value_and_grad(by_hand)(params)
        updates, state = tx.update(
            grad, state, params, value=value, grad=grad, value_fn=by_hand
        )
        return optax.apply_updates(params, updates), state

    for _ in range(2):
        step()
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            params, state = hand_step(params, state)
    np.testing.assert_allclose(w.value, params, rtol=1e-4)
    np.testing.assert_allclose(target.value, [1.0, -2.0, 3.0])


def test_multi_steps_are_taken_as_they_are():
    w = sf.Param(jnp.ones(2))
    optimizer = Optimizer(optax.MultiSteps(optax.sgd(1.0), 2), w)
    optimizer.update(jnp.array([1.0, 0.0]))
    np.testing.assert_allclose(w.value, 1.0)
    optimizer.update(jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(w.value, 0.5)
    assert int(optimizer.step.value) == 2


# -- traces -------------------------------------------------------------------------


class Trainer(eqx.Module):
    model: sf.Param
    optimizer: Optimizer


def count_traces(makes):
    traces = []

    @sf.filter_jit
    def step(trainer):
        traces.append(1)
        trainer.optimizer.update(jax.tree.map(jnp.ones_like, trainer.model.value))

    for make in makes:
        model = sf.Param(jnp.ones((2, 2)))
        trainer = Trainer(model, Optimizer(make(), model))
        step(trainer)
        assert int(trainer.optimizer.step.value) == 1
    return len(traces)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_new_transformations_with_equal_settings_share_one_trace(name):
    assert count_traces([TRANSFORMS[name], TRANSFORMS[name]]) == 1


def test_other_settings_are_traced_anew():
    rates = [lambda: optax.sgd(0.1), lambda: optax.sgd(0.2), lambda: optax.sgd(0.1)]
    assert count_traces(rates) == 2
    schedules = [lambda n=n: optax.sgd(lambda i: n * i) for n in (0.1, 0.2)]
    assert count_traces(schedules) == 2


def test_one_and_one_point_zero_are_other_settings():
    assert count_traces([lambda: optax.sgd(1), lambda: optax.sgd(1.0)]) == 2


def test_an_optimizer_shows_no_closures():
    optimizer = Optimizer(optax.sgd(0.1), sf.Param(jnp.ones(2)))
    assert "function" not in repr(optimizer)


def test_training_leaks_no_tracer(checking_leaks):
    trained(optax.adam(1e-2), 2)


def test_a_param_inside_another_is_trained_where_it_stands_by_itself():
    inner = sf.Param(jnp.array(2.0))
    outer = sf.Param({"w": jnp.array(3.0), "inner": inner})
    optimizer = sf.Optimizer(optax.sgd(0.5), (outer, inner))
    loss = lambda: outer.value["w"] * outer.value["inner"].value  # noqa: E731
    optimizer.update(sf.filter_grad(loss, wrt=(outer, inner))())
    assert outer.value["w"] == 2 and inner.value == 0.5


def _init(params):
    return optax.EmptyState()


def _halve(updates, state, params=None):
    return jax.tree.map(lambda g: -g / 2, updates), state


OWN = optax.GradientTransformation(_init, _halve)


def check_copy(optimizer, again):
    again.update(jnp.array(1.0))
    assert again.wrt.value == 0.5 and optimizer.wrt.value == 1
    assert again.step.value == 1 and optimizer.step.value == 0
    assert again._tx == optimizer._tx


def test_an_optimizer_is_pickled_where_its_transformation_is():
    optimizer = sf.Optimizer(OWN, sf.Param(jnp.array(1.0)))
    check_copy(optimizer, pickle.loads(pickle.dumps(optimizer)))


@pytest.mark.parametrize(
    "tx", [OWN, optax.MultiSteps(OWN, 1)], ids=["own", "MultiSteps"]
)
def test_an_optimizer_is_copied_deeply(tx):
    optimizer = sf.Optimizer(tx, sf.Param(jnp.array(1.0)))
    check_copy(optimizer, copy.deepcopy(optimizer))


def test_an_optimizer_of_optax_is_pickled_by_cloudpickle():
    optimizer = sf.Optimizer(optax.adam(0.1), sf.Param(jnp.array(1.0)))
    again = pickle.loads(cloudpickle.dumps(optimizer))
    for each in (again, optimizer):
        each.update(jnp.array(1.0))
    assert again.wrt.value == optimizer.wrt.value < 1
