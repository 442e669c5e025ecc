"""`filter_eval_shape`, `filter_make_jaxpr`, `filter_closure_convert`."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefun as sf

X = jnp.arange(3.0)
NAMES = ("filter_eval_shape", "filter_make_jaxpr", "filter_closure_convert")


@pytest.fixture
def w():
    return sf.Param(jnp.array([1.0, 2.0, 3.0]), name="w")


@pytest.fixture
def count():
    return sf.State(jnp.array(0), name="count")


class Net(eqx.Module):
    linear: sf.Param
    again: sf.Param
    mean: sf.State
    width: int

    def __init__(self, key, width=4):
        self.linear = self.again = sf.Param(
            eqx.nn.Linear(3, width, key=key), name="lin"
        )
        self.mean = sf.State(jnp.zeros(width), name="mean")
        self.width = width

    def __call__(self, x):
        y = self.linear.value(x)
        self.mean.value = self.mean.value + y
        return y


def pure(x, f=jnp.sin, n=2):
    return {"y": f(x) * n, "n": n, "none": None}


# -- eval_shape ---------------------------------------------------------------------


def test_without_states_eval_shape_is_that_of_equinox():
    struct = jax.ShapeDtypeStruct((3,), jnp.float32)
    for args, kwargs in (((X,), {}), ((struct,), {"n": 3}), ((X, jnp.cos), {})):
        ours = sf.filter_eval_shape(pure, *args, **kwargs)
        theirs = eqx.filter_eval_shape(pure, *args, **kwargs)
        assert eqx.tree_equal(ours, theirs)
    net = eqx.filter_eval_shape(eqx.nn.MLP, 2, 2, 4, 1, key=jax.random.key(0))
    ours = sf.filter_eval_shape(eqx.nn.MLP, 2, 2, 4, 1, key=jax.random.key(0))
    assert eqx.tree_equal(ours, net)


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_eval_shape_reads_states_and_changes_none(w, count, jitted):
    seen = []

    def f(x):
        count.value += 1
        w.value = jnp.ones((5, 5))
        return w.value, x * count.value.astype(x.dtype), "static"

    def run():
        seen.append(sf.filter_eval_shape(f, X))

    (sf.filter_jit(run) if jitted else run)()
    wide, like_x, static = seen[0]
    assert (wide.shape, like_x.shape, static) == ((5, 5), (3,), "static")
    assert count.value == 0
    assert np.array_equal(w.value, [1.0, 2.0, 3.0])


def test_eval_shape_sees_what_the_transform_around_it_has_written(w):
    shapes = []

    @sf.filter_jit
    def step():
        w.value = jnp.ones((7, 2))
        shapes.append(sf.filter_eval_shape(lambda: w.value).shape)

    step()
    assert shapes == [(7, 2)]


def test_eval_shape_of_a_constructor_gives_states_that_hold_structs():
    net = sf.filter_eval_shape(Net, jax.random.key(0), width=5)
    assert type(net) is Net
    assert net.width == 5
    assert net.linear is net.again
    assert type(net.linear) is sf.Param
    assert net.linear.name == "lin"
    assert net.mean.value == jax.ShapeDtypeStruct((5,), jnp.float32)
    weight = net.linear.value.weight
    assert weight == jax.ShapeDtypeStruct((5, 3), jnp.float32)
    assert net.linear.value.in_features == 3
    assert isinstance(repr(net.mean), str)
    assert isinstance(repr(net.linear), str)


def test_eval_shape_takes_a_module_whose_states_hold_structs():
    net = sf.filter_eval_shape(Net, jax.random.key(0))
    out = sf.filter_eval_shape(lambda net, x: net(x), net, X)
    assert out == jax.ShapeDtypeStruct((4,), jnp.float32)
    assert net.mean.value == jax.ShapeDtypeStruct((4,), jnp.float32)


def test_freeze_of_a_shape_is_the_shape_of_freeze():
    shapes = sf.freeze(sf.filter_eval_shape(Net, jax.random.key(0)))
    want = eqx.filter_eval_shape(lambda t: t, sf.freeze(Net(jax.random.key(0))))
    assert eqx.tree_equal(shapes, want)


# -- make_jaxpr ---------------------------------------------------------------------


def test_without_states_make_jaxpr_is_that_of_equinox():
    struct = jax.ShapeDtypeStruct((3,), jnp.float32)
    for args, kwargs in (((X,), {}), ((struct,), {"n": 3}), ((X, jnp.cos), {})):
        jaxpr, shapes, static = sf.filter_make_jaxpr(pure)(*args, **kwargs)
        want, want_shapes, want_static = eqx.filter_make_jaxpr(pure)(*args, **kwargs)
        assert str(jaxpr) == str(want)
        assert eqx.tree_equal((shapes, static), (want_shapes, want_static))
    assert sf.filter_make_jaxpr(pure).__wrapped__ is pure
    assert sf.filter_make_jaxpr(pure).__name__ == "pure"


def test_make_jaxpr_reads_the_present_values_and_changes_no_state(w, count):
    def f(x):
        count.value += 1
        return w.value * x, "static"

    jaxpr, shapes, static = sf.filter_make_jaxpr(f)(X)
    assert count.value == 0
    assert shapes[0].shape == (3,)
    assert static[1] == "static"
    (out,) = jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, jnp.ones(3))
    assert np.array_equal(out, [1.0, 2.0, 3.0])


# -- closure_convert ----------------------------------------------------------------


def test_without_states_closure_convert_is_that_of_equinox():
    y = jnp.array(5.0)

    def f(x):
        return {"a": x * y, "label": "a"}

    ours, theirs = sf.filter_closure_convert(f, X), eqx.filter_closure_convert(f, X)
    assert eqx.tree_equal(ours(2 * X), theirs(2 * X), typematch=True)
    # The captured array is a leaf, so it can be differentiated.
    grads = [
        jax.tree.leaves(eqx.filter_grad(lambda g: jnp.sum(g(X)["a"]))(g))
        for g in (ours, theirs)
    ]
    assert [float(g) for g in grads[0]] == [float(g) for g in grads[1]] == [3.0]


@pytest.mark.parametrize(
    "args",
    [
        (jnp.ones(4),),
        (X.astype(jnp.int32),),
        (X, X),
        (),
        ("text",),
        ((X,),),
    ],
)
def test_closure_convert_refuses_other_arguments_as_equinox(args):
    def f(x):
        return x * 2

    with pytest.raises(Exception) as theirs:
        eqx.filter_closure_convert(f, X)(*args)
    with pytest.raises(type(theirs.value)):
        sf.filter_closure_convert(f, X)(*args)


def test_a_static_argument_of_another_value_is_refused_as_in_equinox():
    def f(x, n):
        return x * n

    for module in (eqx, sf):
        converted = module.filter_closure_convert(f, X, 2)
        assert np.array_equal(converted(X, 2), 2 * X)
    with pytest.raises(Exception) as theirs:
        eqx.filter_closure_convert(f, X, 2)(X, 3)
    with pytest.raises(type(theirs.value)):
        sf.filter_closure_convert(f, X, 2)(X, 3)


def test_a_converted_function_reads_and_writes_states_when_it_is_called(w, count):
    def f(x):
        count.value += 1
        w.value = w.value + x
        return jnp.sum(w.value)

    converted = sf.filter_closure_convert(f, X)
    assert count.value == 0
    assert converted(jnp.ones(3)) == 9.0
    assert sf.filter_jit(converted)(jnp.ones(3)) == 12.0
    assert count.value == 2
    assert np.array_equal(w.value, [3.0, 4.0, 5.0])
    w.value = jnp.zeros(3)
    assert converted(X) == 3.0


def test_a_function_is_converted_once_and_not_run_again(w):
    runs = []

    def f(x):
        runs.append(0)
        return w.value * x

    converted = sf.filter_closure_convert(f, X)
    for _ in range(3):
        converted(X)
    assert len(runs) == 1


def test_conversion_inside_a_transform_captures_its_tracers(w):
    @sf.filter_jit
    def outer(y):
        converted = sf.filter_closure_convert(lambda x: x * y * w.value, X)
        return sf.filter_grad(lambda c: jnp.sum(c(X)))(converted), converted(X)

    grad, out = outer(jnp.array(2.0))
    assert [float(g) for g in jax.tree.leaves(grad)] == [8.0]
    assert np.array_equal(out, [0.0, 4.0, 12.0])


# -- failures -----------------------------------------------------------------------

RUNS = {
    "filter_eval_shape": lambda f: sf.filter_eval_shape(f, X),
    "filter_make_jaxpr": lambda f: sf.filter_make_jaxpr(f)(X),
    "filter_closure_convert": lambda f: sf.filter_closure_convert(f, X),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_function_that_raises_changes_no_state(name, count):
    def f(x):
        count.value += 1
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        RUNS[name](f)
    assert count.value == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_bare_state_is_no_result(name, count):
    with pytest.raises(TypeError, match=r"^State 'count' .* was returned"):
        RUNS[name](lambda x: count)


@pytest.mark.parametrize("name", NAMES)
def test_no_tracer_is_left(name, w, count, checking_leaks):
    def f(x):
        count.value += 1
        return w.value * x

    RUNS[name](f)
    assert count.value == 0


@pytest.mark.parametrize("name", ["filter_eval_shape", "filter_make_jaxpr"])
def test_it_works_inside_grad_and_vmap(name, w, count):
    def f(x):
        count.value += 1
        RUNS[name](lambda y: _bump(count, y))
        return jnp.sum(w.value * x)

    assert np.array_equal(sf.filter_grad(f, wrt=w)(X), X)
    sf.filter_vmap(f)(jnp.ones((2, 3)))
    assert count.value == 2


def _bump(count, x):
    count.value += 100
    return x


# -- shapes for arrays ----------------------------------------------------------------


def test_a_module_of_shapes_is_asked_by_itself_and_as_an_argument():
    shapes = sf.filter_eval_shape(Net, jax.random.key(0))
    x = jax.ShapeDtypeStruct((3,), jnp.float32)
    linear = eqx.filter_eval_shape(eqx.nn.Linear, 3, 4, key=jax.random.key(0))
    for module in (shapes, linear):
        for out in (
            sf.filter_eval_shape(module, x),
            sf.filter_eval_shape(lambda m, x: m(x), module, x),
            sf.filter_eval_shape(eqx.Partial(module), x),
        ):
            assert jax.tree.leaves(out)[0].shape == (4,)


@pytest.mark.parametrize(
    "shape", [jnp.ones(3), jax.random.key(0)], ids=["float", "key"]
)
def test_a_shape_may_stand_for_an_array_where_a_function_is_converted(shape, count):
    def f(x, like):
        count.value += 1
        return x, like

    struct = jax.ShapeDtypeStruct(shape.shape, shape.dtype)
    converted = sf.filter_closure_convert(f, struct, "static")
    assert count.value == 0
    assert converted(shape, "static")[0].shape == shape.shape
    assert count.value == 1
    with pytest.raises(ValueError, match="structure, shapes and dtypes"):
        converted(jnp.ones(7), "static")
