"""`filter_vmap`: Equinox's, with States that all lanes share or that hold a batch."""

import functools
import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefun as sf

X = jnp.arange(3.0)
M = jnp.arange(6.0).reshape(2, 3)
elsewhere = sf.State(jnp.zeros(3), name="elsewhere")  # reached as a global

ENTRY = (
    r"^inside `filter_vmap` a value that differs along the mapped axis was written to "
)


@pytest.fixture
def count():
    return sf.State(jnp.array(0), name="count")


@pytest.fixture
def batch():
    return sf.State(jnp.array([10.0, 20.0, 30.0]), name="batch")


# -- as in Equinox ------------------------------------------------------------------


def test_the_signature_is_that_of_equinox_with_our_keyword_after():
    ours = inspect.signature(sf.filter_vmap).parameters
    theirs = inspect.signature(eqx.filter_vmap).parameters
    assert [p for p in ours if p != "state_axes"] == list(theirs)
    for p in theirs:
        assert ours[p].kind == theirs[p].kind
        if p != "fun":  # left out, to use the rest as a decorator
            assert ours[p].default == theirs[p].default
    assert ours["state_axes"].kind == inspect.Parameter.KEYWORD_ONLY
    assert ours["state_axes"].default is None


PURE = {
    "default": (lambda x: x * 2, {}, (X,)),
    "two arguments": (lambda x, y: x * y, {}, (X, X + 1)),
    "a static argument": (lambda x, n: x * n, {}, (X, 2.0)),
    "in_axes as a tuple": (
        lambda x, y: x + y,
        {"in_axes": (0, None)},
        (X, jnp.ones(())),
    ),
    "in_axes as an int": (lambda x: x + 1, {"in_axes": 1}, (M,)),
    "in_axes as a dict": (
        lambda x, y: x + y,
        {"in_axes": {"y": 1}},
        (X, M.reshape(2, 3)),
    ),
    "in_axes as a function": (
        lambda x: x[0] + 1,
        {"in_axes": lambda x: 1 if eqx.is_array(x) else None},
        ((M, "a"),),
    ),
    "out_axes": (lambda x: (x, x * 2), {"out_axes": (0, 1)}, (M,)),
    "out_axes None": (lambda x: (x, 3), {"out_axes": (0, None)}, (X,)),
    "a constant output": (lambda x: jnp.array(1), {}, (X,)),
    "a static output": (lambda x: (x, "name"), {}, (X,)),
    "axis_size": (lambda: jnp.array(1), {"axis_size": 3}, ()),
    "axis_name": (lambda x: jax.lax.psum(x, "i"), {"axis_name": "i"}, (X,)),
    "a module": (
        lambda net, x: net(x),
        {"in_axes": (None, 0)},
        (eqx.nn.Linear(3, 2, key=jax.random.key(0)), M),
    ),
    "random keys": (
        lambda k: jax.random.normal(k, (2,)),
        {},
        (jax.random.split(jax.random.key(0), 3),),
    ),
}


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("case", PURE)
def test_without_states_it_is_equinox(case, jitted):
    fun, options, args = PURE[case]
    ours, theirs = sf.filter_vmap(fun, **options), eqx.filter_vmap(fun, **options)
    if jitted:
        ours, theirs = sf.filter_jit(ours), eqx.filter_jit(theirs)
    assert eqx.tree_equal(ours(*args), theirs(*args), typematch=True)


def test_decorator_wrapped_and_method_are_as_in_equinox():
    @sf.filter_vmap(in_axes=1)
    def double(x):
        return x * 2

    assert double.__name__ == "double"
    assert double.__wrapped__(2) == 4
    assert np.array_equal(double(M), eqx.filter_vmap(lambda x: x * 2, in_axes=1)(M))

    class Module(eqx.Module):
        scale: jax.Array

        @sf.filter_vmap(in_axes=(None, 0))
        def __call__(self, x):
            return self.scale * x

    assert np.array_equal(Module(jnp.array(2.0))(X), 2 * X)


ERRORS = {
    "different sizes": (lambda x, y: x, {}, (X, jnp.ones(4))),
    "nothing to map": (lambda x: x, {"in_axes": None}, (X,)),
    "an unmapped output with a batch": (lambda x: x, {"out_axes": None}, (X,)),
    "an axis out of range": (lambda x: x, {"in_axes": 2}, (X,)),
    "in_axes of another length": (lambda x: x, {"in_axes": (0, 0)}, (X,)),
    "an unknown name in in_axes": (lambda x: x, {"in_axes": {"z": 0}}, (X,)),
    "an axis name that is not there": (lambda x: jax.lax.psum(x, "j"), {}, (X,)),
    "an unknown keyword": (lambda x: x, {"bogus": 1}, (X,)),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_of_the_types_that_equinox_raises(case):
    fun, options, args = ERRORS[case]
    with pytest.raises(Exception) as theirs:
        eqx.filter_vmap(fun, **options)(*args)
    with pytest.raises(type(theirs.value)):
        sf.filter_vmap(fun, **options)(*args)


def test_keyword_arguments_are_mapped_too():
    def f(x, *, y, label="a"):
        return x + y, label

    out, label = sf.filter_vmap(f)(X, y=X, label="b")
    assert np.array_equal(out, 2 * X)
    assert label == "b"
    out, _ = sf.filter_vmap(f, in_axes={"x": 0, "y": None})(X, y=jnp.array(5.0))
    assert np.array_equal(out, X + 5)
    out, _ = sf.filter_vmap(f, in_axes={"y": 1})(X, y=jnp.ones((2, 3)).T[:3].T)
    assert out.shape == (3, 2)


def test_keywords_of_jax_are_passed_on():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        run = sf.filter_vmap(lambda x: x * 2, spmd_axis_name="d")
        out = sf.filter_jit(run)(jnp.arange(4.0))
        assert np.array_equal(out, 2 * jnp.arange(4.0))


# -- shared States ------------------------------------------------------------------


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_states_are_shared_by_all_lanes(count, batch, jitted):
    def f(x):
        count.value += 1  # once, not once for each lane
        return x + jnp.sum(batch.value)

    run = sf.filter_jit(sf.filter_vmap(f)) if jitted else sf.filter_vmap(f)
    assert np.array_equal(run(X), X + 60)
    assert count.value == 1
    assert count.value.shape == ()


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_a_value_that_differs_along_the_axis_is_refused_for_a_shared_state(
    count, batch, jitted
):
    def f(x):
        count.value += 1
        batch.value = batch.value + x
        return x

    run = sf.filter_jit(sf.filter_vmap(f)) if jitted else sf.filter_vmap(f)
    with pytest.raises(sf.StateTraceError, match=ENTRY + "State 'batch'") as caught:
        run(X)
    assert "state_axes" in str(caught.value)
    assert "pmean" in str(caught.value)
    assert count.value == 0
    assert np.array_equal(batch.value, [10.0, 20.0, 30.0])


def test_the_error_names_the_state_at_fault_among_several(count, batch):
    late = sf.State({"a": jnp.zeros(2), "b": jnp.array(0.0)}, name="late")

    def f(x):
        count.value += 1
        late.value = {"a": jnp.ones(2), "b": x}
        return x

    with pytest.raises(sf.StateTraceError, match=ENTRY + "State 'late'"):
        sf.filter_vmap(f)(X)
    assert late.value["b"] == 0.0


def test_a_mean_over_the_axis_may_be_written_to_a_shared_state():
    mean = sf.State(jnp.array(0.0), name="mean")

    @functools.partial(sf.filter_vmap, axis_name="batch")
    def normalise(x):
        mean.value = 0.5 * mean.value + 0.5 * jax.lax.pmean(x, "batch")
        return x - mean.value

    assert np.array_equal(normalise(jnp.array([1.0, 3.0])), [0.0, 2.0])
    assert mean.value == 1.0


def test_a_mean_over_the_inner_axis_still_differs_along_the_outer_one(count):
    mean = sf.State(jnp.array(0.0), name="mean")

    def inner(x):
        mean.value = jax.lax.pmean(x, "inner")
        return x

    outer = sf.filter_vmap(sf.filter_vmap(inner, axis_name="inner"))
    with pytest.raises(sf.StateTraceError, match=ENTRY + "State 'mean'"):
        outer(M)

    def both(x):
        mean.value = jax.lax.pmean(x, ("inner", "outer"))
        return x

    run = sf.filter_vmap(sf.filter_vmap(both, axis_name="inner"), axis_name="outer")
    assert np.array_equal(run(M), M)
    assert mean.value == 2.5


# -- States that hold a batch -------------------------------------------------------


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_a_mapped_state_holds_one_value_for_each_lane(count, batch, jitted):
    def f(x):
        count.value += 1
        assert batch.value.shape == ()
        batch.value = batch.value + x
        return 2 * batch.value

    run = sf.filter_vmap(f, state_axes=[(batch, 0)])
    run = sf.filter_jit(run) if jitted else run
    for i in (1, 2):
        out = run(X)
        assert np.array_equal(batch.value, jnp.array([10.0, 20.0, 30.0]) + i * X)
        assert np.array_equal(out, 2 * batch.value)
        assert count.value == i


def test_an_integer_maps_all_states(batch):
    other = sf.State(jnp.zeros((3, 2)), name="other")

    def f(x):
        other.value = other.value + x
        return batch.value

    assert np.array_equal(sf.filter_vmap(f, state_axes=0)(X), batch.value)
    assert np.array_equal(other.value, [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]])


class Scaled(eqx.Module):
    weight: jax.Array
    scale: sf.State


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("axes", ["default", (0, None), None])
def test_a_state_in_a_mapped_argument_goes_with_its_arrays(axes, jitted):
    scale = jnp.array(2.0) if axes is None else jnp.array([2.0, 3.0, 4.0])
    module = Scaled(X, sf.State(scale, name="scale"))

    def f(m, y):
        assert m.scale.value.shape == ()
        m.scale.value = m.scale.value + 1
        return m.weight * m.scale.value + y

    in_axes = {"default": {}, None: {"in_axes": (None, 0)}}.get(axes, {"in_axes": axes})
    run = sf.filter_vmap(f, **in_axes)
    run = sf.filter_jit(run) if jitted else run
    out = run(module, jnp.array(1.0) if axes == (0, None) else jnp.ones(3))
    want = X * (scale + 1) + 1 if axes is not None else X[None] * (scale + 1) + 1
    assert jnp.array_equal(out, jnp.broadcast_to(want, out.shape))
    assert jnp.array_equal(module.scale.value, scale + 1)


def test_state_axes_overrides_the_axis_of_the_argument():
    module = Scaled(X, sf.State(jnp.array(2.0), name="scale"))
    run = sf.filter_vmap(
        lambda m: m.weight * m.scale.value, state_axes=[(module.scale, None)]
    )
    assert jnp.array_equal(run(module), 2 * X)


def test_a_state_in_the_value_of_one_in_a_mapped_argument_goes_with_it():
    inner = sf.State(jnp.zeros(3), name="inner")
    module = Scaled(X, sf.State({"inner": inner, "by": X}, name="outer"))

    def f(m):
        held = m.scale.value
        held["inner"].value = held["inner"].value + held["by"]

    sf.filter_vmap(f)(module)
    assert jnp.array_equal(inner.value, X)


@pytest.mark.parametrize("value", [jnp.array(2.0), jnp.zeros(4)], ids=["scalar", "4"])
def test_a_state_in_a_mapped_argument_that_does_not_fit_is_named(value):
    module = Scaled(X, sf.State(value, name="scale"))
    with pytest.raises(ValueError, match=r"State 'scale' .* axis 0, with 3 entries"):
        sf.filter_vmap(lambda m: m.weight)(module)


def test_a_state_that_comes_in_along_two_axes_is_refused():
    module = Scaled(X, sf.State(X, name="scale"))
    with pytest.raises(ValueError, match=r"State 'scale' .* along 0 and along None"):
        sf.filter_vmap(lambda a, b: a.weight, in_axes=(0, None))(module, module)


# -- the view of a lane -------------------------------------------------------------

WITHIN = {
    "scan": lambda f: sf.scan(lambda c, _: (f(), None), 0.0, None, length=1)[0],
    "fori_loop": lambda f: sf.fori_loop(0, 1, lambda i, c: f(), 0.0),
    "while_loop": lambda f: sf.while_loop(lambda c: c < 0, lambda c: f(), -1.0),
    "cond": lambda f: sf.cond(True, f, lambda: 0.0),
    "checkpoint": lambda f: sf.filter_checkpoint(f)(),
    "jit": lambda f: sf.filter_jit(f)(),
    "closure_convert": lambda f: sf.filter_closure_convert(f)(),
    "custom_jvp": lambda f: _custom(f)(jnp.array(1.0)),
}


def _custom(f):
    run = sf.filter_custom_jvp(lambda x: x * f())
    run.def_jvp(lambda primals, tangents: (run(*primals), tangents[0]))
    return run


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("twin", WITHIN)
def test_a_twin_inside_sees_the_value_of_the_lane(twin, jitted):
    elsewhere.value = M  # reached by no closure: it is met inside first

    def read():
        return elsewhere.value.sum() + 100.0 * elsewhere.value.size

    for axes in (0, [(sf.State, 0)], [(lambda s: True, 0)], [(elsewhere, 0)]):
        run = sf.filter_vmap(lambda x: WITHIN[twin](read), state_axes=axes)
        run = sf.filter_jit(run) if jitted else run
        out = run(jnp.zeros(M.shape[0]))
        assert jnp.array_equal(out, M.sum(1) + 100.0 * M.shape[1])


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("lanes", [3, 5])
def test_a_state_met_late_has_to_have_an_entry_for_each_lane(lanes, jitted):
    elsewhere.value = jnp.arange(4.0)

    def f(x):
        elsewhere.value = elsewhere.value + x

    run = sf.filter_vmap(f, state_axes=0)
    run = sf.filter_jit(run) if jitted else run
    with pytest.raises(ValueError, match=rf"axis 0, with {lanes} entries.*has 4 there"):
        run(jnp.ones(lanes))
    assert jnp.array_equal(elsewhere.value, jnp.arange(4.0))


@pytest.mark.parametrize("axis", [1, -1])
def test_a_state_is_mapped_along_the_axis_that_is_given(axis):
    s = sf.State(M, name="s")

    def f(x):
        assert s.value.shape == (2,)
        s.value = s.value + x
        return s.value

    out = sf.filter_vmap(f, state_axes=[(s, axis)])(X)
    assert np.array_equal(s.value, M + X[None])
    assert np.array_equal(out, s.value.T)


def test_the_first_match_decides_and_matches_are_states_kinds_or_predicates():
    class Cache(sf.State):
        pass

    cache, other = (
        Cache(jnp.zeros((3, 2)), name="c"),
        Cache(jnp.zeros((2, 3)), name="o"),
    )
    param = sf.Param(jnp.zeros(3), name="p")
    named = sf.State(jnp.zeros(3), name="named")
    shared = sf.State(jnp.zeros(3), name="shared")
    seen = {}

    def f(x):
        for s in (cache, other, param, named, shared):
            seen[s.name] = s.value.shape
            s.value = s.value + (0.0 if s is shared else x)
        return x

    axes = [(other, 1), (Cache, 0), (lambda s: s.name == "named", 0), (sf.Param, 0)]
    sf.filter_vmap(f, state_axes=axes)(X)
    assert seen == {"c": (2,), "o": (2,), "p": (), "named": (), "shared": (3,)}
    assert np.array_equal(cache.value, [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]])
    assert np.array_equal(other.value, [X, X])
    assert np.array_equal(param.value, X)
    assert np.array_equal(named.value, X)


def test_none_in_the_list_keeps_a_state_shared(count, batch):
    def f(x):
        count.value += 1
        batch.value = batch.value + x

    sf.filter_vmap(f, state_axes=[(count, None), (lambda s: True, 0)])(X)
    assert count.value == 1
    assert np.array_equal(batch.value, [10.0, 21.0, 32.0])


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_a_mapped_state_may_be_one_that_the_closure_does_not_show(jitted):
    elsewhere.value = jnp.array([1.0, 2.0, 3.0])

    def f(x):
        elsewhere.value = elsewhere.value * x
        return elsewhere.value

    run = sf.filter_vmap(f, state_axes=0)
    out = (sf.filter_jit(run) if jitted else run)(X)
    assert np.array_equal(out, [0.0, 2.0, 6.0])
    assert np.array_equal(elsewhere.value, out)


def test_a_mapped_state_in_another_states_value_is_mapped_by_itself():
    inner = sf.State(jnp.zeros(3), name="inner")
    outer = sf.State({"inner": inner, "scale": jnp.array(2.0)}, name="outer")

    def f(x):
        held = outer.value
        held["inner"].value = held["inner"].value + held["scale"] * x

    sf.filter_vmap(f, state_axes=[(inner, 0)])(X)
    assert np.array_equal(inner.value, 2 * X)


def test_a_value_that_is_equal_in_all_lanes_fills_a_mapped_state(batch):
    def f(x):
        batch.value = jnp.array(7.0)

    sf.filter_vmap(f, state_axes=0)(X)
    assert np.array_equal(batch.value, [7.0, 7.0, 7.0])


def test_a_mapped_state_may_be_written_without_being_read(batch):
    def f(x):
        batch.value = x * x

    sf.filter_vmap(f, state_axes=[(batch, 0)])(X)
    assert np.array_equal(batch.value, X * X)


def test_a_mapped_state_may_change_shape_and_structure(batch):
    def f(x):
        batch.value = {"x": x, "twice": jnp.stack([x, 2 * x]), "label": "new"}

    sf.filter_vmap(f, state_axes=[(batch, 0)])(X)
    assert batch.value["twice"].shape == (3, 2)
    assert batch.value["label"] == "new"


def test_mapped_states_alone_say_how_many_lanes_there_are(batch):
    assert np.array_equal(
        sf.filter_vmap(lambda: batch.value, state_axes=0)(), batch.value
    )
    run = sf.filter_vmap(lambda: batch.value * 2, state_axes=[(batch, 0)], axis_size=3)
    assert np.array_equal(run(), batch.value * 2)


@pytest.mark.parametrize("hidden", [False, True])
def test_a_mapped_state_of_another_length_is_refused(batch, hidden):
    elsewhere.value = jnp.zeros(3)

    def f(x):
        return (elsewhere if hidden else batch).value * x

    with pytest.raises(ValueError):
        sf.filter_vmap(f, state_axes=0)(jnp.ones(4))


def test_a_mapped_state_holds_random_keys_or_a_module():
    keys = sf.State(jax.random.split(jax.random.key(0), 3), name="keys")
    net = sf.State(eqx.filter_vmap(lambda k: eqx.nn.Linear(2, 2, key=k))(keys.value))
    before = keys.value

    def f(x):
        keys.value, key = jax.random.split(keys.value)
        return net.value(x) + jax.random.normal(key, (2,))

    out = sf.filter_vmap(f, state_axes=0)(jnp.ones((3, 2)))

    def pure(key, net, x):
        new, key = jax.random.split(key)
        return new, net(x) + jax.random.normal(key, (2,))

    want_keys, want = eqx.filter_vmap(pure)(before, net.value, jnp.ones((3, 2)))
    assert np.array_equal(out, want)
    assert jnp.all(keys.value == want_keys)


def test_collectives_work_beside_mapped_states(batch):
    total = sf.State(jnp.array(0.0), name="total")

    def f(x):
        batch.value = batch.value + x
        total.value = jax.lax.psum(batch.value, "i")
        return jax.lax.axis_index("i")

    run = sf.filter_vmap(f, axis_name="i", state_axes=[(batch, 0)])
    assert np.array_equal(run(X), [0, 1, 2])
    assert total.value == 63.0


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_nested_vmaps_map_one_axis_each(jitted):
    s = sf.State(jnp.zeros((2, 3)), name="s")
    row = sf.State(jnp.zeros(2), name="row")
    column = sf.State(jnp.zeros(3), name="column")

    def f(x):
        s.value = s.value + x
        return s.value + row.value + column.value

    inner = sf.filter_vmap(f, state_axes=[(s, 0), (column, 0)])
    outer = sf.filter_vmap(inner, state_axes=[(s, 0), (row, 0)])
    row.value, column.value = jnp.array([100.0, 200.0]), jnp.array([10.0, 20.0, 30.0])
    out = (sf.filter_jit(outer) if jitted else outer)(M)
    assert np.array_equal(s.value, M)
    assert np.array_equal(out, M + row.value[:, None] + column.value[None])


def test_a_state_mapped_inside_and_shared_outside_must_not_differ_along_the_outer_axis():
    s = sf.State(jnp.zeros(3), name="s")

    def f(x):
        s.value = x

    inner = sf.filter_vmap(f, state_axes=[(s, 0)])
    with pytest.raises(sf.StateTraceError, match=ENTRY + "State 's'"):
        sf.filter_vmap(inner)(M)
    sf.filter_vmap(inner, in_axes=None, axis_size=2)(X)  # the same in both lanes
    assert np.array_equal(s.value, X)


def test_a_gradient_of_each_lane(batch):
    """Per-example gradients with respect to a shared and to a mapped State."""
    w = sf.Param(jnp.array(3.0), name="w")

    def loss(x):
        return w.value**2 * x + batch.value * x

    run = sf.filter_vmap(sf.filter_grad(loss, wrt=[w, batch]), state_axes=[(batch, 0)])
    by_w, by_batch = run(X)
    assert np.array_equal(by_w, 6 * X)
    assert np.array_equal(by_batch, X)
    # and the other way round: the sum over the lanes
    total = sf.filter_grad(
        lambda x: jnp.sum(sf.filter_vmap(loss, state_axes=[(batch, 0)])(x)),
        wrt=[w, batch],
    )(X)
    assert total[0] == 18.0
    assert np.array_equal(total[1], X)


# -- States made inside -------------------------------------------------------------


class Net(eqx.Module):
    weight: sf.Param
    again: sf.Param
    calls: sf.State
    width: int

    def __init__(self, key, width=2):
        self.weight = self.again = sf.Param(jax.random.normal(key, (width,)), name="w")
        self.calls = sf.State(jnp.array(0), name="calls")
        self.width = width

    def __call__(self, x):
        self.calls.value += 1
        return jnp.sum(self.weight.value * x)


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_an_ensemble_is_made_by_mapping_the_constructor(key, jitted):
    keys = jax.random.split(key, 3)
    make = sf.filter_vmap(Net)
    nets = (sf.filter_jit(make) if jitted else make)(keys)
    assert type(nets) is Net
    assert nets.width == 2
    assert nets.weight is nets.again  # shared as it was
    assert type(nets.weight) is sf.Param
    assert nets.weight.name == "w"
    want = jax.vmap(lambda k: jax.random.normal(k, (2,)))(keys)
    assert np.array_equal(nets.weight.value, want)
    assert np.array_equal(nets.calls.value, [0, 0, 0])

    # and is used by mapping over its States
    run = sf.filter_vmap(lambda net, x: net(x), in_axes=(None, None), state_axes=0)
    out = sf.filter_jit(run)(nets, jnp.ones(2)) if jitted else run(nets, jnp.ones(2))
    assert np.array_equal(out, jnp.sum(want, axis=1))
    assert np.array_equal(nets.calls.value, [1, 1, 1])

    def loss(nets):
        return jnp.sum(run(nets, jnp.array([1.0, 2.0])))

    grad = sf.filter_grad(loss)(nets)
    assert np.array_equal(grad.weight, [[1.0, 2.0]] * 3)
    assert np.array_equal(nets.calls.value, [2, 2, 2])


def test_an_ensemble_is_stacked_along_out_axes(key):
    keys = jax.random.split(key, 3)
    nets = sf.filter_vmap(
        lambda k: eqx.tree_at(lambda n: n.calls, Net(k), sf.State(jnp.zeros(2))),
        out_axes=eqx.if_array(1),
    )(keys)
    assert nets.weight.value.shape == (2, 3)
    assert nets.calls.value.shape == (2, 3)


def test_two_members_of_an_ensemble_do_not_share_their_values(key):
    """The constructor runs once; what it makes has to be a value for each lane."""
    nets = sf.filter_vmap(Net)(jax.random.split(key, 2))
    assert not np.array_equal(nets.weight.value[0], nets.weight.value[1])


def test_a_state_that_is_not_returned_is_dropped(count):
    def f(x):
        scratch = sf.State(x, name="scratch")
        scratch.value = scratch.value * 2
        return scratch.value

    assert np.array_equal(sf.filter_vmap(f)(X), 2 * X)
    assert np.array_equal(sf.filter_vmap(f, state_axes=0)(X), 2 * X)


def test_a_module_with_states_passes_through_as_it_is(batch):
    class Module(eqx.Module):
        s: sf.State

    module = Module(batch)
    out, same = sf.filter_vmap(lambda m, x: (x, m), in_axes=(None, 0))(module, X)
    assert same.s is batch
    assert np.array_equal(out, X)


# -- failures, traces ---------------------------------------------------------------


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_a_function_that_raises_changes_no_state(count, batch, jitted):
    def f(x):
        count.value += 1
        batch.value = x
        raise RuntimeError("stop")

    run = sf.filter_vmap(f, state_axes=[(batch, 0)])
    with pytest.raises(RuntimeError, match="stop"):
        (sf.filter_jit(run) if jitted else run)(X)
    assert count.value == 0
    assert np.array_equal(batch.value, [10.0, 20.0, 30.0])


def test_an_output_that_vmap_refuses_changes_no_state(count):
    def f(x):
        count.value += 1
        return x

    with pytest.raises(ValueError):
        sf.filter_vmap(f, out_axes=None)(X)
    assert count.value == 0


def test_a_bare_state_is_refused_as_a_result(count):
    with pytest.raises(TypeError, match=r"^State 'count' .* was returned"):
        sf.filter_vmap(lambda x: count)(X)


def test_the_function_runs_once_and_leaves_no_tracer(count, batch, checking_leaks):
    runs = []

    def f(x):
        runs.append(0)
        count.value += 1
        batch.value = batch.value + x
        return x

    sf.filter_vmap(f, state_axes=[(batch, 0)])(X)
    assert len(runs) == 1
    assert not isinstance(batch.value, jax.core.Tracer)


def test_a_wrong_state_axes_says_what_it_may_be():
    s = sf.State(jnp.zeros(3), name="s")
    with pytest.raises((TypeError, ValueError)):
        sf.filter_vmap(lambda x: s.value * x, state_axes="s")(X)
    with pytest.raises((TypeError, ValueError)):
        sf.filter_vmap(lambda x: s.value * x, state_axes=[s])(X)
    with pytest.raises(TypeError, match="`state_axes` can't be understood.*State 's'"):
        sf.filter_vmap(lambda x: s.value * x, state_axes=[(s, "0")])(X)
