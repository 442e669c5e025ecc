"""`Stack`: equal layers as one module, against the Python loop over the same layers."""

import random

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import statefun as sf

N = 5
JITTED = pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
POLICY = jax.checkpoint_policies.dots_saveable
REMAT = [None, "each", "sqrt", 1, 2, N, 9, POLICY]


class Layer(eqx.Module):
    """A layer with States of several kinds."""

    linear: sf.Param
    calls: sf.State
    rng: sf.Rng
    offset: jax.Array

    def __init__(self, key):
        self.linear = sf.Param(eqx.nn.Linear(3, 3, key=key), name="linear")
        self.calls = sf.State(jnp.array(0), name="calls")
        self.rng = sf.Rng(key)
        self.offset = jax.random.normal(key)

    def __call__(self, x, scale=1.0):
        self.calls.value += 1
        noise = 0.1 * jax.random.normal(self.rng(), x.shape)
        return scale * jax.nn.tanh(self.linear.value(x) + self.offset + noise)


KEYS = jax.random.split(jax.random.key(0), N)
X = jnp.array([0.5, -1.0, 2.0])


@pytest.fixture
def stack():
    return sf.nn.Stack(Layer, N, key=jax.random.key(0))


@pytest.fixture
def layers():
    return [Layer(key) for key in KEYS]


def arrays(tree):
    """The arrays of a tree; random keys as numbers, so that they can be compared."""
    tree = eqx.filter(sf.freeze(tree), eqx.is_array)
    typed = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda x: jax.random.key_data(x) if typed(x) else x, tree)


def stacked(trees):
    return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)


def assert_close(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


# -- calling it ---------------------------------------------------------------------


@JITTED
@pytest.mark.parametrize("remat", REMAT)
def test_a_stack_and_its_gradient_are_those_of_the_layers(remat, jitted, stack, layers):
    def run(x):
        return stack(x, remat=remat).sum()

    def loop(x):
        for layer in layers:
            x = layer(x)
        return x.sum()

    run = sf.filter_value_and_grad(run, wrt=stack.layers)
    loop = sf.filter_value_and_grad(loop, wrt=layers)
    value, grad = (sf.filter_jit(run) if jitted else run)(X)
    want, grads = sf.filter_jit(loop)(X)
    assert_close(value, want)
    of = lambda tree: tree.linear  # noqa: E731
    assert_close(of(grad), stacked([of(g) for g in grads]))
    assert_close(arrays(stack.layers), stacked([arrays(m) for m in layers]))
    assert jnp.array_equal(stack.layers.calls.value, jnp.ones(N, int))


@pytest.mark.parametrize("remat", [None, "each", 2])
def test_inputs_and_outputs_of_the_layers_and_arguments_that_they_share(remat):
    class Cached(eqx.Module):
        weight: sf.Param

        def __init__(self, key):
            self.weight = sf.Param(jax.random.normal(key))

        def __call__(self, x, scale, entry):
            bias, cache = entry
            cache.state.value += x
            return scale * self.weight.value * x + bias, x

    caches = Holder(sf.State(jnp.zeros(N), name="cache"))
    stack = sf.nn.Stack(Cached, N, key=jax.random.key(0))
    bias = jnp.arange(N, dtype=float)
    out, outs = stack(jnp.array(1.0), 0.5, xs=(bias, caches), has_aux=True, remat=remat)
    h, want = 1.0, []
    for i in range(N):
        want.append(h)
        h = 0.5 * stack.layers.weight.value[i] * h + bias[i]
    assert_close(out, h)
    assert_close(outs, jnp.stack([jnp.asarray(x) for x in want]))
    assert_close(caches.state.value, outs)


class Holder(eqx.Module):
    state: sf.State


@JITTED
@pytest.mark.parametrize("remat", [None, 2])
def test_a_state_that_the_layers_are_given_is_shared(remat, jitted):
    total = sf.State(jnp.zeros(N), name="total")  # as many entries as there are layers

    class Adds(eqx.Module):
        weight: jax.Array
        total: sf.State

        def __init__(self, key):
            self.weight = jax.random.normal(key)
            self.total = total

        def __call__(self, x):
            self.total.value += self.weight
            return x

    stack = sf.nn.Stack(Adds, N, key=jax.random.key(0))
    again = sf.nn.Stack.of(stack.unstack())
    assert stack.layers.total is total
    assert again.layers.total is total
    for each in (stack, again):
        total.value = jnp.zeros(N)
        run = lambda x, m=each: m(x, remat=remat)  # noqa: E731
        (sf.filter_jit(run) if jitted else run)(X)
        assert_close(total.value, jnp.full(N, each.layers.weight.sum()))


def test_a_stack_is_traced_as_one_layer():
    calls = []

    class Seen(eqx.Module):
        weight: jax.Array

        def __init__(self):
            calls.append("made")
            self.weight = jnp.array(2.0)

        def __call__(self, x):
            calls.append("called")
            return self.weight * x

    stack = sf.nn.Stack(Seen, 10)
    assert stack(jnp.array(1.0)) == 1024.0
    assert stack(jnp.array(2.0)) == 2048.0  # and once only, outside of jit too
    assert calls == ["made", "called"]


def test_a_stack_in_an_ensemble_of_stacks():
    make = lambda key: sf.nn.Stack(Layer, 2, key=key)  # noqa: E731
    stacks = sf.filter_vmap(make)(KEYS[:3])
    got = sf.filter_vmap(lambda m, x: m(x), in_axes=(0, None))(stacks, X)
    assert_close(got, jnp.stack([make(key)(X) for key in KEYS[:3]]))
    assert jnp.array_equal(stacks.layers.calls.value, jnp.ones((3, 2), int))


def test_an_optimizer_trains_a_stack_as_it_trains_the_layers(stack, layers):
    def loop(x):
        for layer in layers:
            x = layer(x)
        return x

    for model, run in ((stack, stack), (layers, loop)):
        optimizer = sf.Optimizer(optax.adamw(0.1), model)

        @sf.filter_jit
        def step(x, optimizer=optimizer, model=model, run=run):
            loss = lambda x: (run(x) ** 2).sum()  # noqa: E731
            optimizer.update(sf.filter_grad(loss, wrt=model)(x))

        for _ in range(3):
            step(X)
    assert_close(arrays(stack.layers), stacked([arrays(m) for m in layers]))


@pytest.mark.parametrize("remat", ["all", 0, -1, True, 1.5])
def test_an_unknown_remat_is_refused(remat, stack):
    with pytest.raises(ValueError, match="^`remat` is"):
        stack(X, remat=remat)
    assert jnp.array_equal(stack.layers.calls.value, jnp.zeros(N, int))


def test_layers_that_return_no_pair_are_refused_with_has_aux(stack):
    with pytest.raises(TypeError, match="each layer of a stack has to return a pair"):
        stack(X, has_aux=True)


def test_inputs_of_another_number_than_there_are_layers_are_refused(stack):
    with pytest.raises(ValueError, match=r"different lengths: \[4, 5\]"):
        stack(X, xs=jnp.ones(4))


@pytest.mark.parametrize("remat", [None, 2])
def test_a_layer_that_changes_what_it_passes_on_is_refused(remat):
    class Grows(Layer):
        def __call__(self, x):
            x = super().__call__(x)
            return jnp.concatenate([x, x])

    stack = sf.nn.Stack(Grows, N, key=jax.random.key(0))
    with pytest.raises(TypeError, match="must have equal types"):
        stack(X, remat=remat)
    assert jnp.array_equal(stack.layers.calls.value, jnp.zeros(N, int))


# -- memory -------------------------------------------------------------------------


class Wide(eqx.Module):
    """A layer whose intermediate values are much larger than what it passes on."""

    up: sf.Param
    down: sf.Param
    calls: sf.State

    def __init__(self, key):
        up, down = jax.random.split(key)
        self.up = sf.Param(jax.random.normal(up, (32, 128)) / 6)
        self.down = sf.Param(jax.random.normal(down, (128, 32)) / 11)
        self.calls = sf.State(jnp.array(0))

    def __call__(self, x):
        self.calls.value += 1
        return x + jnp.tanh(x @ self.up.value) @ self.down.value


def temporaries(n, remat):
    """What the gradient of a stack needs beside its inputs and outputs, in bytes."""
    stack = sf.nn.Stack(Wide, n, key=jax.random.key(0))
    loss = lambda x: stack(x, remat=remat).sum()  # noqa: E731
    grad = sf.filter_jit(sf.filter_grad(loss, wrt=stack.layers))
    compiled = grad.lower(jnp.ones((256, 32))).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_recomputing_saves_memory():
    whole = temporaries(36, None)
    layer = (whole - temporaries(16, None)) / 20
    assert temporaries(30, "sqrt") <= 2.5 * 30**0.5 * layer  # 30 = 5 * 6
    assert temporaries(36, "sqrt") <= 2.5 * 6 * layer <= 0.5 * whole
    each = temporaries(36, "each")
    assert each <= 0.2 * whole
    assert each < temporaries(36, POLICY) < whole


# -- single layers ------------------------------------------------------------------


@JITTED
def test_a_part_runs_on_the_entries_of_the_stack(jitted, stack, layers):
    def run(x):
        x = stack[0](x)
        x = stack[1:4](x, remat=2)
        return stack[-1](x)

    got = (sf.filter_jit(run) if jitted else run)(X)
    want = X
    for layer in layers:
        want = layer(want)
    assert_close(got, want)
    assert_close(arrays(stack.layers), stacked([arrays(m) for m in layers]))


def test_iterating_runs_the_layers_one_by_one(stack, layers):
    x = want = X
    for part, layer in zip(stack, layers, strict=True):
        x, want = part(x), layer(want)
    assert_close(x, want)
    assert jnp.array_equal(stack.layers.calls.value, jnp.ones(N, int))


def test_a_part_reads_and_writes_its_entries(stack):
    def reset(layer):
        layer.calls.value = jnp.array(7)
        return layer.offset

    assert stack[2].apply(reset) == stack.layers.offset[2]
    assert jnp.array_equal(stack.layers.calls.value, jnp.array([0, 0, 7, 0, 0]))
    part = stack[1:4]
    assert len(part) == len(list(part)) == 3
    assert part[1].apply(lambda layer: layer.calls.value) == 7
    part[-2:].apply(lambda layers: layers[0].apply(reset))
    assert jnp.array_equal(stack.layers.calls.value, jnp.array([0, 0, 7, 0, 0]))


def test_a_gradient_through_a_part_has_zeros_for_the_other_layers(stack):
    grad = sf.filter_grad(lambda x: stack[1](x).sum(), wrt=stack.layers.linear)(X)
    zero = jax.vmap(lambda g: (g == 0).all())(grad.weight)
    assert jnp.array_equal(zero, jnp.arange(N) != 1)


def test_a_part_keeps_structure_and_shape_of_its_entries(stack):
    def grow(layer):
        layer.calls.value = jnp.zeros(2, int)

    with pytest.raises(sf.StateValueError, match=r"int32\[2\] in place of int32\[\]"):
        stack[0].apply(grow)
    assert jnp.array_equal(stack.layers.calls.value, jnp.zeros(N, int))


def test_a_part_teaches_what_it_is_not(stack):
    with pytest.raises(AttributeError, match=r"has no attribute 'linear'"):
        _ = stack[0].linear
    with pytest.raises(TypeError, match="single layer"):
        len(stack[0])
    for index in (N, -N - 1, slice(0, 3, 2), slice(2, 2)):
        with pytest.raises(IndexError):
            stack[index]


def test_unstacked_layers_hold_copies(stack, layers):
    stack(X)
    ours = stack.unstack()
    for layer in layers:
        layer(X)
    assert [m.calls.value.item() for m in ours] == [1] * N
    for mine, other in zip(ours, layers, strict=True):
        assert jax.tree.structure(mine) == jax.tree.structure(other)
        assert_close(arrays(mine.linear), arrays(other.linear))
    ours[0](X)
    assert jnp.array_equal(stack.layers.calls.value, jnp.ones(N, int))
    two = stack[1:3].copy()
    assert len(two) == 2
    assert two.layers.calls is not stack.layers.calls
    assert_close(arrays(two.layers), stacked([arrays(m) for m in ours[1:3]]))


def test_the_paths_of_a_stack_say_what_they_are(stack):
    assert list(sf.states(stack)) == [".layers.linear", ".layers.calls", ".layers.rng"]


# -- of layers that are there -------------------------------------------------------


def test_a_stack_of_layers_holds_their_values(layers):
    layers[1].calls.value = jnp.array(3)
    stack = sf.nn.Stack.of(layers)
    assert_close(arrays(stack.layers), stacked([arrays(m) for m in layers]))
    stack(X)
    assert jnp.array_equal(stack.layers.calls.value, jnp.array([1, 4, 1, 1, 1]))
    assert layers[0].calls.value == 0
    assert len(sf.nn.Stack.of(layers[:1])) == 1


class Tied(eqx.Module):
    first: sf.State
    second: sf.State


def test_states_that_are_tied_in_a_layer_stay_tied():
    def tied():
        state = sf.State({"in": sf.State(jnp.zeros(2))})
        return Tied(state, state)

    stack = sf.nn.Stack.of([tied(), tied()])
    assert stack.layers.first is stack.layers.second
    assert stack.layers.first.value["in"].value.shape == (2, 2)
    assert sf.nn.Stack(tied, 3).layers.first.value["in"].value.shape == (3, 2)
    half = tied()
    other = Tied(half.first, sf.State({"in": sf.State(jnp.zeros(2))}))
    with pytest.raises(ValueError, match=r"layer 0 differs .* `\.second`.* in another"):
        sf.nn.Stack.of([half, other])


DIFFERENT = {
    "an array's shape": ({"a": jnp.zeros(2)}, {"a": jnp.zeros(3)}, r"\['a'\]"),
    "a static leaf": ({"a": "x"}, {"a": "y"}, r"\['a'\]"),
    "an array and none": ({"a": jnp.zeros(2)}, {"a": 1.0}, r"\['a'\]"),
    "a key": ({"a": 1, "b": 2}, {"a": 1, "c": 2}, r"\['b'\]"),
    "a kind of State": (
        Holder(sf.State(jnp.zeros(2))),
        Holder(sf.Param(jnp.zeros(2))),
        r"\.state",
    ),
    "a State's value": (
        Holder(sf.State({"a": jnp.zeros(2)})),
        Holder(sf.State({"a": jnp.zeros(3)})),
        r"\.state\.value\['a'\]",
    ),
    "a State's structure": (
        Holder(sf.State((jnp.zeros(2),))),
        Holder(sf.State([jnp.zeros(2)])),
        r"\.state\.value",
    ),
    "a static field": (
        eqx.nn.Linear(2, 2, key=KEYS[0]),
        eqx.nn.Linear(2, 2, use_bias=False, key=KEYS[0]),
        "its root",
    ),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_layers_that_differ_are_refused_with_the_path(what):
    a, b, path = DIFFERENT[what]
    with pytest.raises(sf.StateValueError, match=rf"^layer 1 differs .* at `{path}`"):
        sf.nn.Stack.of([a, b])


def test_a_stack_has_layers():
    with pytest.raises(ValueError, match="at least one layer"):
        sf.nn.Stack.of([])
    with pytest.raises(ValueError, match="at least one layer"):
        sf.nn.Stack(Layer, 0, key=KEYS[0])


# -- random programs ----------------------------------------------------------------


class Program(eqx.Module):
    """A layer that runs random steps, on integers in floats: every order is exact."""

    w: sf.Param
    last: sf.State
    cache: sf.State
    bias: jax.Array
    steps: tuple = eqx.field(static=True)

    def __init__(self, rng, steps):
        draw = lambda *shape: jnp.asarray(  # noqa: E731
            np.array([rng.randint(-1, 1) for _ in range(3)], np.float32)
        )
        self.w, self.bias = sf.Param({"w": draw()}), draw()
        self.last = sf.State(draw())
        self.cache = sf.State({"rows": jnp.zeros((2, 3)), "at": jnp.array(0)})
        self.steps = steps

    def __call__(self, h):
        for step in self.steps:
            h = STEPS[step](self, h)
        return jnp.mod(h, 11.0), h

    def remember(self, h):
        cache = self.cache.value
        rows = cache["rows"].at[cache["at"] % 2].set(jax.lax.stop_gradient(h))
        self.cache.value = {"rows": rows, "at": cache["at"] + 1}
        return h

    def keep(self, h):
        self.last.value = jnp.mod(jax.lax.stop_gradient(h) + self.last.value, 5.0)
        return h

    def inner_scan(self, h):
        def body(h, x):
            self.last.value = jnp.mod(self.last.value + x, 5.0)
            return h + self.w.value["w"], None

        return sf.scan(body, h, jnp.arange(2.0))[0]

    def inner_cond(self, h):
        return sf.cond(h.sum() > 0, self.keep, lambda h: h + self.bias, h)

    def inner_grad(self, h):
        loss = lambda h: (h * self.w.value["w"] + self.last.value).sum()  # noqa: E731
        return h + sf.filter_grad(loss)(h)


STEPS = {
    "add": lambda m, h: h + m.w.value["w"] + m.bias,
    "times": lambda m, h: h * m.w.value["w"],
    "read": lambda m, h: h - m.last.value + m.cache.value["rows"].sum(0),
    "keep": Program.keep,
    "remember": Program.remember,
    "scan": Program.inner_scan,
    "cond": Program.inner_cond,
    "grad": Program.inner_grad,
    "checkpoint": lambda m, h: sf.filter_checkpoint(m.keep)(h),
}


def run_random(seed):
    """A random stack in a random surrounding, and the same as a loop over its layers."""
    rng = random.Random(seed)
    depth = rng.randint(1, 6)
    steps = tuple(rng.choices(list(STEPS), k=rng.randint(1, 5)))
    layers = [Program(rng, steps) for _ in range(depth)]
    stack = sf.nn.Stack.of(layers)
    remat = rng.choice([None, None, "each", "sqrt", rng.randint(1, depth), POLICY])
    unroll = rng.choice([1, 2, True])
    around = rng.choice(["none", "scan", "vmap", "checkpoint"])

    def stacked_model(h):
        return stack(h, has_aux=True, remat=remat, unroll=unroll)

    def loop_model(h):
        outs = []
        for layer in layers:
            h, out = layer(h)
            outs.append(out)
        return h, jnp.stack(outs)

    def surrounded(model):
        def loss(h):
            h, outs = model(h)
            return h.sum() + outs.sum(), outs

        def run(h, w):
            return sf.filter_value_and_grad(loss, has_aux=True, wrt=w)(h)

        if around == "scan":
            return lambda h, w: sf.scan(lambda c, h: (c, run(h, w)), 0, h[None] + 1.0)[
                1
            ]
        if around == "vmap":
            axes = [(sf.Param, None), (sf.State, 0)]
            return lambda h, w: sf.filter_vmap(
                lambda h: run(h, w), axis_size=1, state_axes=axes
            )(h[None])
        if around == "checkpoint":
            return lambda h, w: sf.filter_checkpoint(lambda h: run(h, w))(h)
        return run

    if around == "vmap":  # every State but the weights holds a batch of one
        for tree in (stack, layers):
            for state in sf.states(tree).values():
                if not isinstance(state, sf.Param):
                    state.value = jax.tree.map(lambda x: x[None], state.value)
    h = jnp.array([1.0, -2.0, 3.0])
    got = sf.filter_jit(lambda h: surrounded(stacked_model)(h, stack.layers.w))(h)
    weights = [layer.w for layer in layers]
    want = sf.filter_jit(lambda h: surrounded(loop_model)(h, weights))(h)
    (value, outs), grad = got
    (want_value, want_outs), grads = want
    context = f"seed {seed}: {depth} layers of {steps}, {remat=}, {unroll=}, {around}"
    try:
        assert_equal((value, outs), (want_value, want_outs))
        batched = 1 if around in ("scan", "vmap") else 0
        grads = jax.tree.map(lambda *xs: jnp.stack(xs, batched), *grads)
        assert_equal(grad, grads)
        lead = 1 if around == "vmap" else 0
        states = [(m.last.value, m.cache.value) for m in layers]
        states = jax.tree.map(lambda *xs: jnp.stack(xs, lead), *states)
        assert_equal((stack.layers.last.value, stack.layers.cache.value), states)
    except AssertionError as error:
        raise AssertionError(context) from error


@pytest.mark.parametrize("seed", range(16))
def test_a_random_stack_is_bit_for_bit_the_loop_over_its_layers(seed):
    run_random(seed)
