"""States under an axis: those that come in by `xs` are sliced, all others are shared."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefun as sf

N = 5
JITTED = pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])


class Layer(eqx.Module):
    """A layer with States of several kinds: trained, counted, only read, random."""

    linear: sf.Param
    calls: sf.State
    scale: sf.State
    rng: sf.Rng
    offset: jax.Array

    def __init__(self, key):
        self.linear = sf.Param(eqx.nn.Linear(3, 3, key=key), name="linear")
        self.calls = sf.State(jnp.array(0), name="calls")
        self.scale = sf.State({"by": jnp.array(0.5)}, name="scale")
        self.rng = sf.Rng(key)
        self.offset = jax.random.normal(key)

    def __call__(self, x):
        self.calls.value += 1
        noise = 0.1 * jax.random.normal(self.rng(), x.shape)
        out = jax.nn.tanh(self.linear.value(x) + self.offset + noise)
        return self.scale.value["by"] * out


def keys():
    return jax.random.split(jax.random.key(0), N)


def stack():
    return sf.filter_vmap(Layer)(keys())


def separate():
    return [Layer(key) for key in keys()]


def stacked(layers):
    return jax.tree.map(lambda *xs: jnp.stack(xs), *map(arrays, layers))


def arrays(tree):
    """The arrays of a tree; random keys as numbers, so that they can be compared."""
    tree = eqx.filter(sf.freeze(tree), eqx.is_array)
    typed = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda x: jax.random.key_data(x) if typed(x) else x, tree)


def assert_close(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)


X = jnp.array([0.5, -1.0, 2.0])


# -- scan ---------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "reverse": {"reverse": True},
    "unroll": {"unroll": 2},
    "unrolled": {"unroll": True},
    "length": {"length": N},
    "split transpose": {"_split_transpose": True},
}


@JITTED
@pytest.mark.parametrize("options", OPTIONS)
def test_a_scan_over_a_stack_is_the_loop_over_its_layers(options, jitted):
    layers, one_by_one = stack(), separate()
    options = OPTIONS[options]

    def run(layers, x):
        return sf.scan(lambda h, layer: (layer(h), h), x, layers, **options)

    out, seen = (sf.filter_jit(run) if jitted else run)(layers, X)
    h, want = X, []
    for layer in one_by_one[::-1] if options.get("reverse") else one_by_one:
        want.append(h)
        h = layer(h)
    assert_close(out, h)
    assert_close(seen, jnp.stack(want[::-1] if options.get("reverse") else want))
    assert_close(arrays(layers), stacked(one_by_one))


@JITTED
def test_each_layer_of_a_stack_counts_for_itself(jitted):
    layers = stack()
    run = lambda x: sf.scan(lambda h, layer: (layer(h), None), x, layers)  # noqa: E731
    run = sf.filter_jit(run) if jitted else run
    for _ in range(2):
        run(X)
    assert jnp.array_equal(layers.calls.value, jnp.full(N, 2))


@JITTED
def test_gradients_of_stacked_params_are_stacked(jitted):
    layers, one_by_one = stack(), separate()

    def loss(x):
        return sf.scan(lambda h, layer: (layer(h), None), x, layers)[0].sum()

    def loop(x):
        for layer in one_by_one:
            x = layer(x)
        return x.sum()

    grad = sf.filter_grad(loss, wrt=layers.linear)
    grad = (sf.filter_jit(grad) if jitted else grad)(X)
    assert grad.weight.shape == (N, 3, 3)
    want = sf.filter_grad(loop, wrt=[m.linear for m in one_by_one])(X)
    assert_close(grad, jax.tree.map(lambda *xs: jnp.stack(xs), *want))
    assert jnp.array_equal(layers.calls.value, jnp.ones(N, int))


def test_a_stacked_state_that_is_only_read_is_no_output():
    layers = stack()
    run = sf.filter_jit(lambda x: sf.scan(lambda h, m: (m(h), None), x, layers)[0])
    written = run.stateful_function.get_write_states(X)
    assert set(map(id, written)) == {id(layers.calls), id(layers.rng)}


def test_a_stacked_state_may_be_written_without_being_read():
    last = Scaled(jnp.arange(3.0), sf.State(jnp.zeros(3), name="last"))

    def body(c, m):
        m.scale.value = 2 * m.weight
        return c, None

    sf.scan(body, 0, last)
    assert jnp.array_equal(last.scale.value, 2 * jnp.arange(3.0))


class Scaled(eqx.Module):
    weight: jax.Array
    scale: sf.State


class Holder(eqx.Module):
    state: sf.State


@JITTED
@pytest.mark.parametrize("loop", ["scan", "map", "batches"])
@pytest.mark.parametrize("value", [jnp.array(2.0), jnp.zeros(4)], ids=["scalar", "4"])
def test_a_state_of_another_size_is_refused_with_both_sizes(value, loop, jitted):
    module = Scaled(jnp.ones(3), sf.State({"a": value}, name="scale"))
    loops = {
        "scan": lambda m: sf.scan(lambda c, m: (c, m.weight), 0, m),
        "map": lambda m: sf.map(lambda m: m.weight, m),
        "batches": lambda m: sf.map(lambda m: m.weight, m, batch_size=2),
    }
    run = sf.filter_jit(loops[loop]) if jitted else loops[loop]
    what = "has no such axis" if value.ndim == 0 else "has 4 there"
    with pytest.raises(
        sf.StateValueError,
        match=rf"maps State 'scale' .* axis 0, with 3 entries, .*{what}",
    ):
        run(module)


@JITTED
def test_states_alone_say_how_many_steps_there_are(jitted):
    counts = Holder(sf.State(jnp.arange(4), name="counts"))

    def body(c, m):
        m.state.value += c
        return c + 1, m.state.value

    run = lambda m: sf.scan(body, 1, m)  # noqa: E731
    out, ys = (sf.filter_jit(run) if jitted else run)(counts)
    assert out == 5
    assert jnp.array_equal(ys, jnp.array([1, 3, 5, 7]))
    assert jnp.array_equal(counts.state.value, ys)
    for loop in (lambda: sf.scan(body, 1, counts, length=3), lambda: wrong(counts)):
        with pytest.raises(ValueError, match=r"with 3 entries, but .*i.*32\[4\]"):
            loop()
    assert jnp.array_equal(counts.state.value, ys)


def wrong(counts):
    return sf.map(lambda x: x[1], (counts, jnp.ones(3)))


@JITTED
def test_a_bare_state_in_xs_is_sliced(jitted):
    one, two = sf.State(jnp.arange(3.0)), sf.State(jnp.zeros(3))

    def run():
        def body(c, x):
            x["to"].value = x["from"].value + c
            return c + 1, None

        sf.scan(body, 0.0, {"from": one, "to": two})
        return sf.map(lambda s: s.value * 2, two)

    doubled = (sf.filter_jit(run) if jitted else run)()
    assert jnp.array_equal(two.value, jnp.array([0.0, 2.0, 4.0]))
    assert jnp.array_equal(doubled, 2 * two.value)


@JITTED
def test_a_state_in_the_value_of_a_sliced_one_goes_with_it(jitted):
    inner = sf.State(jnp.zeros(3), name="inner")
    outer = Holder(sf.State({"inner": inner, "by": jnp.arange(3.0)}, name="outer"))

    def run(outer):
        def body(c, m):
            held = m.state.value
            held["inner"].value += held["by"]
            return c, None

        sf.scan(body, 0, outer)

    (sf.filter_jit(run) if jitted else run)(outer)
    assert jnp.array_equal(inner.value, jnp.arange(3.0))


@JITTED
def test_a_state_in_xs_and_in_the_closure_is_one_state(jitted):
    state = sf.State(jnp.arange(3.0), name="state")
    module = Holder(state)

    def run(module):
        def body(c, m):
            m.state.value += 10
            return c, (state.value, m.state.value)

        return sf.scan(body, 0, module)[1]

    by_closure, by_leaf = (sf.filter_jit(run) if jitted else run)(module)
    assert jnp.array_equal(by_closure, jnp.arange(3.0) + 10)
    assert jnp.array_equal(by_leaf, by_closure)
    assert jnp.array_equal(state.value, by_closure)


def test_a_state_that_stands_in_xs_twice_is_one_state():
    module = Holder(sf.State(jnp.zeros(3)))

    def body(c, ms):
        for m in ms:
            m.state.value += 1
        return c, None

    sf.scan(body, 0, [module, module])
    assert jnp.array_equal(module.state.value, jnp.full(3, 2.0))


@JITTED
def test_a_state_in_the_carry_and_in_xs_is_refused(jitted):
    module = Holder(sf.State(jnp.zeros(3), name="twice"))
    run = lambda m: sf.scan(lambda c, x: (c, None), m, m)  # noqa: E731
    with pytest.raises(ValueError, match=r"State 'twice' .* along None and along 0"):
        (sf.filter_jit(run) if jitted else run)(module)


@JITTED
def test_a_sliced_state_keeps_its_structure_and_shape(jitted):
    module = Holder(sf.State(jnp.zeros(3), name="grows"))

    def body(c, m):
        m.state.value = jnp.stack([m.state.value] * 2)
        return c, None

    run = lambda m: sf.scan(body, 0, m)  # noqa: E731
    with pytest.raises(ValueError, match=r"float32\[2\] in place of float32\[\]"):
        (sf.filter_jit(run) if jitted else run)(module)
    assert jnp.array_equal(module.state.value, jnp.zeros(3))


def test_a_loop_that_raises_changes_no_entry():
    module = Holder(sf.State(jnp.zeros(3)))

    def body(c, m):
        m.state.value += 1
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        sf.scan(body, 0, module)
    assert jnp.array_equal(module.state.value, jnp.zeros(3))


def test_a_scan_over_a_stack_runs_its_body_once_and_leaves_no_tracer(checking_leaks):
    layers, runs = stack(), []

    def body(h, layer):
        runs.append(1)
        return layer(h), None

    @sf.filter_jit
    def run(x):
        loss = lambda x: sf.scan(body, x, layers)[0].sum()  # noqa: E731
        return sf.filter_grad(loss, wrt=layers.linear)(x)

    run(X)
    assert len(runs) == 1


def test_the_stack_that_comes_out_of_the_body_is_the_one_that_went_in():
    layers = stack()
    _, same = sf.scan(lambda h, layer: (layer(h), layer), X, layers)
    assert same.linear is layers.linear
    assert jnp.array_equal(same.offset, layers.offset)


def test_modules_of_one_structure_share_a_loop():
    traces = []

    def body(h, layer):
        traces.append(1)
        return layer(h), None

    for _ in range(3):
        layers = stack()
        sf.scan(body, X, layers)
        assert jnp.array_equal(layers.calls.value, jnp.ones(N, int))
    assert len(traces) == 1


# -- at any depth -------------------------------------------------------------------


@JITTED
def test_a_stack_of_stacks_is_sliced_once_by_each_loop(jitted):
    blocks = sf.filter_vmap(sf.filter_vmap(Layer))(keys()[:4].reshape(2, 2))
    one_by_one = [Layer(key) for key in keys()[:4]]

    def block(h, layers):
        return sf.scan(lambda h, layer: (layer(h), None), h, layers)

    def loss(x):
        return sf.scan(block, x, blocks)[0].sum()

    def run(x):
        return sf.filter_value_and_grad(loss, wrt=blocks.linear)(x)

    value, grad = (sf.filter_jit(run) if jitted else run)(X)

    def loop(x):
        for layer in one_by_one:
            x = layer(x)
        return x.sum()

    want, want_grad = sf.filter_value_and_grad(
        loop, wrt=[m.linear for m in one_by_one]
    )(X)
    assert_close(value, want)
    want_grad = jax.tree.map(lambda *xs: jnp.stack(xs), *want_grad)
    flat = lambda x: x.reshape(4, *x.shape[2:])  # noqa: E731
    assert_close(jax.tree.map(flat, grad), want_grad)
    assert_close(jax.tree.map(flat, arrays(blocks)), stacked(one_by_one))


WITHIN = {
    "filter_jit": lambda f: sf.filter_jit(f)(),
    "filter_grad": lambda f: sf.filter_grad(lambda x: f() * x)(jnp.array(1.0)),
    "filter_checkpoint": lambda f: sf.filter_checkpoint(f)(),
    "filter_vmap": lambda f: sf.filter_vmap(f, axis_size=2, out_axes=None)(),
    "scan": lambda f: sf.scan(lambda c, _: (f(), None), 0.0, None, length=1)[0],
    "fori_loop": lambda f: sf.fori_loop(0, 1, lambda i, c: f(), 0.0),
    "while_loop": lambda f: sf.while_loop(lambda c: c < 0, lambda c: f(), -1.0),
    "map": lambda f: sf.map(lambda _: f(), jnp.zeros(1))[0],
    "cond": lambda f: sf.cond(jnp.array(True), f, lambda: 0.0),
    "switch": lambda f: sf.switch(jnp.array(1), [lambda: 0.0, f]),
    "filter_closure_convert": lambda f: sf.filter_closure_convert(f)(),
}


@pytest.mark.parametrize("loop", ["scan", "batches"])
@pytest.mark.parametrize("twin", WITHIN)
def test_a_twin_inside_sees_the_entry_of_the_step(twin, loop):
    value = jnp.arange(3.0)
    held = Holder(sf.State(value, name="held"))

    def step(m):
        def read():
            assert m.state.value.shape == ()
            return m.state.value + 1.0

        return WITHIN[twin](read)

    loops = {
        "scan": lambda m: sf.scan(lambda c, m: (c, step(m)), 0, m)[1],
        "batches": lambda m: sf.map(step, m, batch_size=2),
    }
    assert jnp.array_equal(loops[loop](held), value + 1)


@JITTED
@pytest.mark.parametrize("twin", [t for t in WITHIN if t != "filter_vmap"])
def test_a_twin_inside_writes_the_entry_of_the_step(twin, jitted):
    held = Holder(sf.State(jnp.arange(3.0), name="held"))

    def step(c, m):
        def add():
            m.state.value += 1.0
            return m.state.value

        return c, WITHIN[twin](add)

    run = lambda m: sf.scan(step, 0, m)[1]  # noqa: E731
    got = (sf.filter_jit(run) if jitted else run)(held)
    assert jnp.array_equal(got, jnp.arange(3.0) + 1)
    assert jnp.array_equal(held.state.value, got)


@JITTED
def test_gradients_of_each_entry_update_each_entry(jitted):
    nets = sf.filter_vmap(Layer)(keys())
    xs = jnp.stack([X] * N)

    def run(nets):
        def step(_, at):
            net, x = at
            loss = lambda: (net(x) ** 2).sum()  # noqa: E731
            grad = sf.filter_grad(lambda _: loss(), wrt=net.linear)(0.0)
            assert grad.weight.shape == (3, 3)
            net.linear.value = eqx.apply_updates(
                net.linear.value, jax.tree.map(lambda g: -0.1 * g, grad)
            )
            return None, grad

        return sf.scan(step, None, (nets, xs))[1]

    before = nets.linear.value.weight
    grads = (sf.filter_jit(run) if jitted else run)(nets)
    assert_close(nets.linear.value.weight, before - 0.1 * grads.weight)
    one_by_one = separate()
    for i, net in enumerate(one_by_one):
        want = sf.filter_grad(lambda _, n=net: (n(X) ** 2).sum(), wrt=net.linear)(0.0)
        assert_close(jax.tree.map(lambda g, i=i: g[i], grads), want)


@JITTED
def test_a_scan_over_a_stack_inside_grad_inside_vmap_inside_scan(jitted):
    layers, one_by_one = stack(), separate()
    batches = jnp.arange(12.0).reshape(2, 2, 3) / 10

    def grad_of(x):
        def loss(x):
            h = sf.scan(lambda h, m: (jnp.tanh(m.linear.value(h)), None), x, layers)[0]
            return h.sum()

        return sf.filter_grad(loss)(x)

    def run():
        body = lambda c, xs: (c, sf.filter_vmap(grad_of)(xs))  # noqa: E731
        return sf.scan(body, 0, batches)[1]

    got = (sf.filter_jit(run) if jitted else run)()

    def plain(x):
        for layer in one_by_one:
            x = jnp.tanh(layer.linear.value(x))
        return x.sum()

    want = jax.vmap(jax.vmap(jax.grad(plain)))(batches)
    assert_close(got, want)


@JITTED
def test_a_batch_of_stacks_holds_an_axis_of_each(jitted):
    stacks = sf.filter_vmap(sf.filter_vmap(Layer))(
        jax.random.split(jax.random.key(1), (2, N))
    )

    def run(stacks, x):
        return sf.filter_vmap(
            lambda layers, x: sf.scan(lambda h, m: (m(h), None), x, layers)[0],
            in_axes=(0, None),
        )(stacks, x)

    out = (sf.filter_jit(run) if jitted else run)(stacks, X)
    for i in range(2):
        h = X
        for key in jax.random.split(jax.random.key(1), (2, N))[i]:
            h = Layer(key)(h)
        assert_close(out[i], h)
    assert jnp.array_equal(stacks.calls.value, jnp.ones((2, N), int))


# -- state_axes ---------------------------------------------------------------------


@JITTED
def test_state_axes_slices_a_state_that_the_closure_reaches(jitted):
    history = sf.State(jnp.zeros((2, 4)), name="history")
    total = sf.State(jnp.array(0.0), name="total")

    def body(c, x):
        assert history.value.shape == (2,)
        history.value += x
        total.value += x
        return c, None

    def run(xs):
        sf.scan(body, 0, xs, state_axes=[(history, -1)])

    xs = jnp.arange(4.0)
    (sf.filter_jit(run) if jitted else run)(xs)
    assert jnp.array_equal(history.value, jnp.stack([xs, xs]))
    assert total.value == 6.0


@JITTED
@pytest.mark.parametrize("loop", ["scan", "map", "batches"])
def test_state_axes_shares_a_state_that_comes_in_by_xs(loop, jitted):
    module = Scaled(jnp.arange(3.0), sf.State(jnp.array(2.0), name="scale"))
    axes = [(sf.Param, 0), (module.scale, None)]
    loops = {
        "scan": lambda m: sf.scan(
            lambda c, m: (c, m.weight * m.scale.value), 0, m, state_axes=axes
        )[1],
        "map": lambda m: sf.map(lambda m: m.weight * m.scale.value, m, state_axes=axes),
        "batches": lambda m: sf.map(
            lambda m: m.weight * m.scale.value, m, state_axes=axes, batch_size=2
        ),
    }
    run = sf.filter_jit(loops[loop]) if jitted else loops[loop]
    assert jnp.array_equal(run(module), 2 * jnp.arange(3.0))


@JITTED
def test_state_axes_as_an_integer_slices_all(jitted):
    a, b = sf.State(jnp.zeros(3)), sf.State(jnp.arange(3.0))

    def run():
        def body(c, _):
            a.value = b.value + c
            return c + 1, None

        sf.scan(body, 0.0, None, state_axes=0)

    (sf.filter_jit(run) if jitted else run)()
    assert jnp.array_equal(a.value, jnp.array([0.0, 2.0, 4.0]))


TWINS = {
    "filter_vmap": lambda f, **axes: sf.filter_vmap(lambda _: f(), **axes)(
        jnp.zeros(3)
    ),
    "scan": lambda f, **axes: sf.scan(lambda c, _: (c, f()), 0, jnp.zeros(3), **axes)[
        1
    ],
    "map": lambda f, **axes: sf.map(lambda _: f(), jnp.zeros(3), **axes),
}


@JITTED
@pytest.mark.parametrize("twin", TWINS)
def test_state_axes_may_name_a_state_that_is_an_argument_as_well(twin, jitted):
    module = Holder(sf.State(jnp.arange(3.0), name="state"))
    named = module.state  # inside, a stand-in has its place

    def run(module):
        return TWINS[twin](lambda: module.state.value * 2, state_axes=[(named, 0)])

    run = sf.filter_jit(run) if jitted else run
    assert jnp.array_equal(run(module), 2 * jnp.arange(3.0))


@pytest.mark.parametrize("twin", TWINS)
def test_a_wrong_state_axes_is_refused_in_every_twin(twin):
    with pytest.raises(sf.StateTypeError, match=r"^`state_axes` can't be understood"):
        TWINS[twin](lambda: 0, state_axes="all")


# -- map ----------------------------------------------------------------------------


@JITTED
@pytest.mark.parametrize("batch_size", [None, 1, 2, 3, 5, 7])
def test_map_over_a_stack_is_the_loop_over_its_layers(batch_size, jitted):
    layers, one_by_one = stack(), separate()

    def run(layers):
        return sf.map(lambda layer: layer(X), layers, batch_size=batch_size)

    got = (sf.filter_jit(run) if jitted else run)(layers)
    assert_close(got, jnp.stack([layer(X) for layer in one_by_one]))
    assert_close(arrays(layers), stacked(one_by_one))


@JITTED
@pytest.mark.parametrize("batch_size", [2, 3])
def test_map_in_batches_slices_along_the_axis_that_is_given(batch_size, jitted):
    held = sf.State(jnp.arange(10.0).reshape(2, 5), name="held")
    calls = sf.State(jnp.array(0), name="calls")

    def f(x):
        held.value = held.value + x
        calls.value += 1
        return held.value.sum()

    def run(xs):
        return sf.map(f, xs, batch_size=batch_size, state_axes=[(held, 1)])

    want = held.value + jnp.arange(5.0)[None]
    got = (sf.filter_jit(run) if jitted else run)(jnp.arange(5.0))
    assert_close(got, want.sum(0))
    assert_close(held.value, want)
    assert calls.value == -(-5 // batch_size)


def test_gradients_through_a_map_in_batches_are_stacked():
    layers, one_by_one = stack(), separate()
    loss = lambda x: sf.map(lambda m: m(x).sum(), layers, batch_size=2).sum()  # noqa: E731
    grad = sf.filter_grad(loss, wrt=layers.linear)(X)
    want = [
        sf.filter_grad(lambda x, m=m: m(x).sum(), wrt=m.linear)(X) for m in one_by_one
    ]
    assert_close(grad, jax.tree.map(lambda *xs: jnp.stack(xs), *want))


# -- stacks of the training kit ------------------------------------------------------


def test_a_stack_of_optimizers_trains_each_entry():
    import optax

    class Learner(eqx.Module):
        w: sf.Param
        optimizer: sf.Optimizer

        def __init__(self, start):
            self.w = sf.Param(start)
            self.optimizer = sf.Optimizer(optax.adam(0.1), self.w)

    learners = sf.filter_vmap(Learner)(jnp.arange(3.0))
    alone = [Learner(x) for x in jnp.arange(3.0)]

    def step(_, learner):
        grad = sf.filter_grad(lambda _: learner.w.value**2, wrt=learner.w)(0.0)
        learner.optimizer.update(grad)
        return None, None

    for _ in range(3):
        sf.filter_jit(lambda m: sf.scan(step, None, m))(learners)
        for learner in alone:
            step(None, learner)
    assert_close(learners.w.value, jnp.stack([a.w.value for a in alone]))


def test_a_stack_of_batch_norms_keeps_the_statistics_of_each():
    make = lambda: sf.nn.BatchNorm(3)  # noqa: E731
    norms = sf.filter_vmap(make, axis_size=2)()
    alone = [make(), make()]
    xs = jax.random.normal(jax.random.key(0), (8, 3))

    def run(h, norm):
        return 2 * norm(h) + 1, None

    got, _ = sf.filter_jit(lambda xs, norms: sf.scan(run, xs, norms))(xs, norms)
    want = xs
    for norm in alone:
        want, _ = run(want, norm)
    assert_close(got, want)
    assert_close(arrays(norms), stacked(alone))


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_sharded_stack_keeps_its_placement(kind):
    mesh = jax.make_mesh(
        (2,), ("d",), axis_types=(getattr(jax.sharding.AxisType, kind),)
    )
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "d"))
    held = Holder(sf.State(jax.device_put(jnp.arange(8.0).reshape(2, 4), sharding)))

    @sf.filter_jit
    def run(held):
        def body(c, m):
            m.state.value = 2 * m.state.value
            return c, None

        sf.scan(body, 0, held)

    for _ in range(2):
        run(held)
    assert jnp.array_equal(held.state.value, 4 * jnp.arange(8.0).reshape(2, 4))
    assert held.state.value.sharding.is_equivalent_to(sharding, 2)


@JITTED
def test_a_stack_that_is_sharded_by_entries_is_refused_where_jax_refuses_it(jitted):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    held = Holder(sf.State(jax.device_put(jnp.zeros(4), sharding), name="split"))

    def body(c, m):
        m.state.value += 1
        return c, None

    run = lambda m: sf.scan(body, 0, m)  # noqa: E731
    with pytest.raises(ValueError, match=r"State 'split' .* axis 0, .* sharded by d"):
        (sf.filter_jit(run) if jitted else run)(held)
    whole = jax.device_put(held.state.value, sharding.update(spec=()))
    held.state.value = whole
    (sf.filter_jit(run) if jitted else run)(held)
    assert jnp.array_equal(held.state.value, jnp.ones(4))
