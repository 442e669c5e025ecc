"""Trees of States: states, values, freeze, update, clone."""

import copy
import inspect
import io
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st

import statefun as sf
from statefun._state import cell as _cell


def here() -> str:
    """`file:line` of the line that calls this."""
    frame = inspect.currentframe()
    assert frame is not None and frame.f_back is not None
    return f"{__file__}:{frame.f_back.f_lineno}"


def first_line(error: pytest.ExceptionInfo) -> str:
    return str(error.value).splitlines()[0]


class Norm(eqx.Module):
    mean: sf.State
    scale: Any
    act: str = "relu"


class Net(eqx.Module):
    layers: list
    norm: Norm
    bias: Any
    size: int = eqx.field(static=True, default=3)


class Statistic(sf.State):
    """A kind of a user's own."""


def make_net(value: float = 1.0) -> Net:
    """States of three kinds, one of them twice, and leaves that are no States."""
    tied = sf.Param(jnp.full(2, value), name="tied")
    mean = Statistic(jnp.full((), value), name="mean")
    own = sf.State({"n": 0, "label": "a"}, name="own")
    return Net([tied, {"w": tied, "none": None}], Norm(mean, jnp.ones(2)), own)


def make_nested() -> dict:
    """States in States: a network in a Param, with a running mean of its own."""
    mean = Statistic(jnp.zeros(2), name="mean")
    inner = sf.Param((jnp.ones(()), sf.State(0, name="n")), name="inner")
    net = sf.Param(Norm(mean, [jnp.ones(2), inner]), name="net")
    return {"net": net, "again": mean, "x": jnp.ones(3)}


def bits(tree: Any) -> Any:
    """The tree with its arrays made comparable, to the last bit."""

    def key(x):
        if eqx.is_array(x):
            x = np.asarray(x)
            return (x.dtype.name, x.shape, x.tobytes())
        return x

    leaves, treedef = jtu.tree_flatten(tree)
    return treedef, list(map(key, leaves))


def raised(tree: Any) -> Any:
    """The tree with other values for its arrays, those that occur twice kept equal."""
    return jtu.tree_map(lambda x: x + x.dtype.type(1) if eqx.is_array(x) else x, tree)


def snapshot(tree: Any) -> list:
    """What every State of a tree holds: the very arrays."""
    return [s._cell.flat for s in sf.states(tree).values()]


# -- states -------------------------------------------------------------------------


def test_states_are_found_by_key_path_each_once_in_the_order_of_the_tree():
    net = make_net()
    found = sf.states(net)
    assert list(found) == [".layers[0]", ".norm.mean", ".bias"]
    assert [s.name for s in found.values()] == ["tied", "mean", "own"]
    assert found[".layers[0]"] is net.layers[0] is net.layers[1]["w"]


def test_states_are_found_by_kind():
    net = make_net()
    assert list(sf.states(net, sf.Param)) == [".layers[0]"]
    assert list(sf.states(net, Statistic)) == [".norm.mean"]
    assert len(sf.states(net, sf.State)) == 3  # subclasses count


def test_states_in_states_are_found_after_the_state_they_are_in():
    tree = make_nested()
    assert {path: s.name for path, s in sf.states(tree).items()} == {
        "['again']": "mean",
        "['net']": "net",
        "['net'].value.scale[1]": "inner",
        "['net'].value.scale[1].value[1]": "n",
    }
    # One of another kind does not hide those of the kind that it holds.
    assert list(sf.states(sf.State([sf.Param(0)]), sf.Param)) == [".value[0]"]


def test_a_state_may_be_the_whole_tree():
    state = sf.State(0)
    assert sf.states(state) == {"": state}
    assert sf.states((1, None, jnp.ones(2))) == {}


def test_paths_are_those_of_jax():
    net = make_net()
    paths = {jtu.keystr(p): x for p, x in jtu.tree_leaves_with_path(net)}
    for path, state in sf.states(net).items():
        assert paths[path] is state


def test_a_kind_that_is_named_second_is_found_under_its_first_path():
    # Whether the first path leads through a State of another kind does not matter.
    inner = sf.Param(0, name="inner")
    tree = (sf.State([inner]), inner)
    assert sf.states(tree, sf.Param) == {"[0].value[0]": inner}


# -- values -------------------------------------------------------------------------


def test_values_are_in_the_place_of_their_states_and_none_elsewhere():
    net = make_net()
    picked = sf.values(net)
    assert type(picked) is Net and picked.norm.scale is None and picked.norm.act is None
    assert picked.layers[0] is picked.layers[1]["w"] is net.layers[0].value
    assert picked.layers[1]["none"] is None and picked.size == 3
    assert picked.bias["label"] == "a"


def test_values_of_a_kind_leave_none_for_the_others():
    net = make_net()
    picked = sf.values(net, sf.Param)
    assert picked.norm.mean is None and picked.bias is None
    assert jtu.tree_leaves(picked) == [net.layers[0].value] * 2
    assert jtu.tree_leaves(sf.values(net, Statistic)) == [net.norm.mean.value]


def test_values_reach_into_states_of_the_kind():
    tree = make_nested()
    picked = sf.values(tree, sf.Param)
    assert picked["again"] is None and picked["x"] is None
    assert picked["net"].mean is None and picked["net"].act == "relu"
    assert picked["net"].scale[0] is tree["net"].value.scale[0]
    inner, n = picked["net"].scale[1]
    assert inner.tolist() == 1.0 and n is None
    assert sf.values(tree)["net"].scale[1][1].tolist() == 0


def test_values_reach_into_states_of_another_kind():
    tree = {"m": sf.State(Norm(sf.Param(jnp.ones(2)), jnp.zeros(3)))}
    picked = sf.values(tree, sf.Param)
    assert type(picked["m"]) is Norm and picked["m"].mean.tolist() == [1.0, 1.0]
    assert picked["m"].scale is None
    assert sf.values({"m": sf.State([jnp.ones(2)])}, sf.Param) == {"m": None}
    sf.update(tree, jtu.tree_map(lambda x: 3 * x, picked))
    assert tree["m"].value.mean.value.tolist() == [3.0, 3.0]
    assert tree["m"].value.scale.tolist() == [0.0] * 3


# -- freeze -------------------------------------------------------------------------


def test_a_frozen_tree_holds_values_and_the_same_arrays():
    net = make_net()
    frozen = sf.freeze(net)
    assert sf.states(frozen) == {}
    assert type(frozen) is Net and frozen.size == 3 and frozen.norm.act == "relu"
    assert frozen.norm.scale is net.norm.scale
    assert frozen.layers[0] is frozen.layers[1]["w"] is net.layers[0].value
    assert frozen.bias["label"] == "a"


def test_freezing_reaches_into_states():
    frozen = sf.freeze(make_nested())
    assert sf.states(frozen) == {}
    assert frozen["net"].mean is frozen["again"]
    assert frozen["net"].scale[1][1].tolist() == 0


def test_a_tree_without_states_is_frozen_as_it_is():
    tree = (jnp.ones(2), "relu", None, [eqx.nn.Identity()])
    assert bits(sf.freeze(tree)) == bits(tree)
    assert sf.freeze(tree)[0] is tree[0]


def test_a_frozen_tree_can_be_used_under_raw_transforms():
    linear = eqx.nn.Linear(2, 1, key=jax.random.key(0))
    model = sf.Param(linear)
    loss = lambda m, x: m(x).sum()  # noqa: E731
    got = eqx.filter_jit(eqx.filter_grad(loss))(sf.freeze(model), jnp.ones(2))
    expected = eqx.filter_grad(loss)(linear, jnp.ones(2))
    assert bits(got) == bits(expected)


# -- update -------------------------------------------------------------------------


def doubled(tree: Any) -> Any:
    return jtu.tree_map(lambda x: x + x if eqx.is_inexact_array(x) else x, tree)


def test_what_was_frozen_can_be_written_back():
    net = make_net()
    frozen = sf.freeze(net)
    before = bits(frozen)
    for state in sf.states(net).values():
        state.value = jtu.tree_map(
            lambda x: jnp.zeros_like(x) if eqx.is_array(x) else x, state.value
        )
    assert bits(sf.freeze(net)) != before
    sf.update(net, frozen)
    assert bits(sf.freeze(net)) == before


@pytest.mark.parametrize("kind", [sf.State, sf.Param, Statistic])
def test_values_of_a_kind_can_be_changed_and_written_back(kind):
    net = make_net()
    sf.update(net, doubled(sf.values(net, kind)))
    tied = 2.0 if issubclass(sf.Param, kind) else 1.0
    mean = 2.0 if issubclass(Statistic, kind) else 1.0
    assert net.layers[0].value.tolist() == [tied, tied]
    assert net.norm.mean.value.tolist() == mean


@pytest.mark.parametrize("kind", [sf.State, sf.Param, Statistic])
def test_values_of_states_in_states_can_be_written_back(kind):
    tree = make_nested()
    sf.update(tree, raised(sf.values(tree, kind)))
    net = tree["net"].value
    param = 2.0 if issubclass(sf.Param, kind) else 1.0
    assert net.scale[0].tolist() == [param, param]
    assert net.scale[1].value[0].tolist() == param
    assert tree["again"].value.tolist() == [float(issubclass(Statistic, kind))] * 2
    assert net.scale[1].value[1].value.tolist() == int(kind is sf.State)
    assert net.mean is tree["again"]  # the States themselves stay where they are


def test_none_leaves_a_state_as_it_is():
    net = make_net()
    before = snapshot(net)
    sf.update(net, jtu.tree_map(lambda _: None, net))
    assert all(a is b for a, b in zip(snapshot(net), before, strict=True))
    pair = (sf.State(1), sf.State(2))
    sf.update(pair, (None, 5))
    assert (pair[0].value, pair[1].value) == (1, 5)


def test_an_update_may_be_of_a_bare_state():
    state = sf.State(jnp.zeros(2))
    sf.update(state, jnp.ones(2))
    assert state.value.tolist() == [1.0, 1.0]


def test_an_update_takes_numpy_arrays_and_numbers():
    # As the setter does: what a checkpoint or a configuration gives.
    tree = {"a": sf.State(jnp.zeros(2)), "b": sf.State(0), "c": sf.State((0.0, "relu"))}
    sf.update(tree, {"a": np.ones(2, np.float32), "b": 3, "c": (2, "relu")})
    assert tree["a"].value.tolist() == [1.0, 1.0]
    assert tree["b"].value == 3 and tree["b"].value.dtype == jnp.int32
    assert tree["c"].value[0] == 2.0 and tree["c"].value[0].dtype == jnp.float32


def test_an_update_drops_weak_types():
    tree = [sf.State(jnp.zeros(()))]
    sf.update(tree, [jnp.asarray(1.0)])
    assert not tree[0].value.weak_type


def test_an_update_of_random_keys():
    tree = [sf.State(jax.random.key(0)), sf.State({"key": jax.random.key(1)})]
    sf.update(tree, [jax.random.key(5), {"key": jax.random.key(6)}])
    assert tree[0].value == jax.random.key(5)
    assert tree[1].value["key"] == jax.random.key(6)


def bad_update(tree: Any, values: Any) -> str:
    """The first line of the error; nothing may have changed."""
    before = snapshot(tree)
    with pytest.raises(sf.StateValueError) as error:
        sf.update(tree, values)
    assert isinstance(error.value, ValueError)
    assert "\n\nWhy: " in str(error.value) and "\n\nInstead: " in str(error.value)
    after = snapshot(tree)
    assert all(a is b for a, b in zip(after, before, strict=True))
    return first_line(error)


MISFITS = {
    "shape": (jnp.ones(2), jnp.ones(3), "", "float32[3] in place of float32[2]"),
    "rank": (jnp.ones(1), jnp.ones(()), "", "float32[] in place of float32[1]"),
    "dtype": (jnp.ones(2), jnp.ones(2, int), "", "int32[2] in place of float32[2]"),
    "a number": (0, 0.5, "", "does not fit the dtype int32"),
    "key": (jax.random.key(0), jnp.ones(2), "", "in place of key<fry>[]"),
    "inner shape": (
        {"a": (jnp.ones(2), "x")},
        {"a": (jnp.ones(3), "x")},
        ".value['a'][0]",
        "float32[3] in place of float32[2]",
    ),
    "inner number": (
        {"a": (jnp.ones(2), 3)},
        {"a": (jnp.ones(2), 0.5)},
        "",
        "does not fit the dtype int32",
    ),
    "a module's array": (
        Norm(None, jnp.ones(2)),  # type: ignore[arg-type]
        Norm(None, jnp.ones((2, 1))),  # type: ignore[arg-type]
        ".value.scale",
        "float32[2,1] in place of float32[2]",
    ),
    "a longer list": ([1, 2], [1, 2, 3], ".value[2]", "structure"),
    "a shorter list": ({"a": [1, 2]}, {"a": [1]}, ".value['a'][1]", "structure"),
    "another type": ({"a": (1, 2)}, {"a": [1, 2]}, ".value['a']", "structure"),
    "another key": ({"a": {"b": 1}}, {"a": {"c": 1}}, ".value['a']['b']", "structure"),
    "a further key": ({"a": 1}, {"a": 1, "b": 2}, ".value['b']", "structure"),
    "none": ({"a": 1, "b": 2}, {"a": 1, "b": None}, ".value['b']", "structure"),
    "an array for none": ({"a": None}, {"a": 1}, ".value['a']", "structure"),
    "a static value": (
        ("relu", 1),
        ("tanh", 1),
        ".value[0]",
        "'tanh' in place of 'relu'",
    ),
    "static for an array": ((1, 2), (1, "x"), ".value[1]", "'x' in place of an array"),
    "a tree for an array": (jnp.ones(2), [jnp.ones(2)], "", "structure"),
}


@pytest.mark.parametrize(("old", "new", "at", "what"), MISFITS.values(), ids=MISFITS)
def test_a_value_that_does_not_fit_is_refused_by_path(old, new, at, what):
    # It is the last of several States: those before it must not have been written.
    first = sf.State(jnp.zeros(2))
    last, where = sf.Param(old, name="w"), here()
    line = bad_update({"a": [first, last]}, {"a": [jnp.ones(2), new]})
    start = (
        f"`update` was given, at `['a'][1]{at}`, a value that does not fit Param 'w' "
    )
    assert line.startswith(start)
    assert f"(created at {where}): " in line and what in line


TREE_MISFITS = {
    "a missing key": (lambda v: {"a": v["a"]}, "['b']"),
    "a further key": (lambda v: {**v, "c": 1}, "['c']"),
    "another type": (lambda v: {**v, "a": tuple(v["a"])}, "['a']"),
    "a shorter list": (lambda v: {**v, "a": v["a"][:1]}, "['a'][1]"),
    "a longer list": (lambda v: {**v, "a": [*v["a"], 1]}, "['a'][2]"),
    "a list for none": (lambda v: {**v, "b": (v["b"][0], [1])}, "['b'][1]"),
}


@pytest.mark.parametrize(("change", "at"), TREE_MISFITS.values(), ids=TREE_MISFITS)
def test_values_for_another_tree_are_refused_by_path(change, at):
    tree = {"a": [sf.State(0), sf.State(1)], "b": (sf.State(2), None)}
    line = bad_update(tree, change(sf.freeze(tree)))
    assert line == (
        "the values given to `update` have another structure than the tree, first at "
        f"`{at}`."
    )


def test_a_misfit_inside_a_state_in_a_state_is_named_by_the_whole_path():
    tree = make_nested()
    wrong = sf.freeze(tree)
    wrong = eqx.tree_at(lambda v: v["net"].scale[1][1], wrong, jnp.zeros(4, int))
    line = bad_update(tree, wrong)
    path = "['net'].value.scale[1].value[1]"
    assert f"at `{path}`, a value that does not fit State 'n'" in line
    wrong = eqx.tree_at(lambda v: v["net"].scale, sf.freeze(tree), [jnp.ones(2)])
    assert "at `['net'].value.scale" in bad_update(tree, wrong)
    wrong = eqx.tree_at(lambda v: v["net"].scale[0], sf.freeze(tree), jnp.ones(9))
    line = bad_update(tree, wrong)
    assert "at `['net'].value.scale[0]`, a value that does not fit Param 'net'" in line


def test_a_bare_state_has_no_path_to_name():
    line = bad_update(sf.State(jnp.ones(2), name="w"), jnp.ones(3))
    assert "``" not in line and "State 'w' (created at " in line


def test_a_changed_leaf_outside_of_the_states_is_refused():
    net = make_net()
    changed = eqx.tree_at(lambda n: n.norm.scale, sf.freeze(net), jnp.zeros(2))
    assert bad_update(net, changed) == (
        "the values given to `update` change `.norm.scale`, which is no State."
    )
    changed = eqx.tree_at(lambda n: n.norm.act, sf.freeze(net), "tanh")
    assert "change `.norm.act`, which is no State" in bad_update(net, changed)


def test_an_equal_leaf_outside_of_the_states_is_no_change():
    tree = (jnp.array([jnp.nan, 0.0]), np.ones(2), "relu", 1.0, sf.State(0))
    equal = (jnp.array([jnp.nan, 0.0]), np.ones(2), "relu", 1.0, 5)
    sf.update(tree, equal)
    assert tree[-1].value == 5


def test_a_changed_static_field_is_refused():
    net = make_net()
    frozen = sf.freeze(net)
    other = Net(frozen.layers, frozen.norm, frozen.bias, size=4)
    bad_update(net, other)


def test_tied_states_stay_tied():
    net = make_net()
    sf.update(net, raised(sf.values(net)))
    assert net.layers[0] is net.layers[1]["w"]
    assert net.layers[0].value.tolist() == [2.0, 2.0]
    tied = (net.layers[0], net.layers[0])
    sf.update(tied, (jnp.full(2, 7.0), jnp.full(2, 7.0)))
    assert net.layers[1]["w"].value.tolist() == [7.0, 7.0]
    sf.update(tied, (None, jnp.full(2, 8.0)))
    assert net.layers[1]["w"].value.tolist() == [8.0, 8.0]


def test_two_values_for_one_state_have_to_be_equal():
    tied, where = sf.Param(jnp.zeros(2), name="tied"), here()
    line = bad_update({"a": tied, "b": [tied]}, {"a": jnp.ones(2), "b": [jnp.zeros(2)]})
    start = "`update` was given, at `['b'][0]`, a value that does not fit Param 'tied' "
    assert line.startswith(start)
    assert line.endswith(f"(created at {where}): another value than `['a']`.")


def test_two_equal_values_for_one_state_may_hold_nan():
    # A diverged model must be saved and restored like any other.
    nan = lambda: jnp.array([jnp.nan, 1.0])  # noqa: E731
    tied = sf.Param(nan())
    sf.update((tied, tied), (nan(), nan()))
    assert bits(tied.value) == bits(nan())
    keys = sf.State(jax.random.key(0))
    sf.update((keys, keys), (jax.random.key(1), jax.random.key(1)))
    assert keys.value == jax.random.key(1)


def test_two_traced_values_for_one_state_are_refused_by_path():
    tied = sf.Param(jnp.ones(2), name="tied")
    tree = (tied, tied)
    step = sf.filter_jit(lambda: sf.update(tree, doubled(sf.freeze(tree))))
    with pytest.raises(sf.StateError, match=r"at `\[1\]`.*Param 'tied' .*created at"):
        step()
    assert tied.value.tolist() == [1.0, 1.0]


def test_an_update_is_one_commit():
    # Nobody may see half of it: both States change in one step, or none.
    tree = (sf.State(0), sf.State(0))
    before = _cell.shared.version
    sf.update(tree, (1, 1))
    # Odd while it is being made, even again after it.
    assert _cell.shared.version == before + 2


def test_an_update_inside_jit_is_a_write():
    net = make_net()
    mine = (net.norm.mean, net.bias)

    @sf.filter_jit
    def step(x):
        sf.update(mine, (x, {"n": jnp.array(4), "label": "a"}))

    step(jnp.array(5.0))
    assert net.norm.mean.value == 5.0 and net.bias.value["n"] == 4
    with pytest.raises(sf.StateValueError, match=r"at `\[0\]`.*float32\[2\] in place"):
        step(jnp.ones(2))
    assert net.norm.mean.value == 5.0 and net.bias.value["n"] == 4


def test_an_update_inside_a_raw_transform_is_refused_whole():
    tree = (sf.State(0.0, name="a"), sf.State(0.0, name="b"))
    before = snapshot(tree)
    with pytest.raises(sf.StateTraceError, match=r"^State 'a' .* inside a raw JAX"):
        jax.jit(lambda x: sf.update(tree, (x, x)))(1.0)
    with pytest.raises(sf.StateTraceError, match=r"^State 'a' .* written inside a raw"):
        jax.grad(lambda x: (sf.update(tree, (x, x)), x)[1])(1.0)
    assert all(a is b for a, b in zip(snapshot(tree), before, strict=True))


@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from([(), (2,)])), max_size=5),
    st.integers(0, 4),
    st.booleans(),
)
def test_an_update_changes_everything_or_nothing(slots, bad, fits):
    # States drawn with repetition, so some stand in several places.
    pool = [sf.State(jnp.zeros(2)) for _ in range(4)]
    tree = [(pool[i], {"n": sf.State(jnp.zeros(shape))}) for i, shape in slots]
    new = jtu.tree_map(lambda x: x + 1.0, sf.freeze(tree))
    if fits or bad >= len(tree):
        sf.update(tree, new)
        assert bits(sf.freeze(tree)) == bits(new)
    else:
        new[bad] = (new[bad][0], {"n": jnp.ones(7)})
        assert f"at `[{bad}][1]['n']`" in bad_update(tree, new)


# -- files --------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_net, make_nested])
def test_equinox_serialises_what_was_frozen(make):
    model = make()
    sf.update(model, raised(sf.values(model)))
    saved = bits(sf.freeze(model))
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, sf.freeze(model))
    file.seek(0)

    fresh = make()
    assert bits(sf.freeze(fresh)) != saved  # else this tests nothing
    sf.update(fresh, eqx.tree_deserialise_leaves(file, like=sf.freeze(fresh)))
    assert bits(sf.freeze(fresh)) == saved
    if make is make_net:
        assert fresh.layers[0] is fresh.layers[1]["w"]


def test_equinox_skips_a_state_that_was_not_frozen():
    # Why `freeze` is needed: nothing is saved, and nobody says so.
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, (sf.State(jnp.ones(1000)),))
    assert file.getvalue() == b""


def test_a_diverged_model_can_be_restored():
    make = lambda fill: Net(  # noqa: E731
        [sf.Param(jnp.full(2, fill))], Norm(sf.State(0), jnp.array(jnp.nan)), None
    )
    model = make(jnp.nan)
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, sf.freeze(model))
    file.seek(0)
    fresh = make(0.0)
    sf.update(fresh, eqx.tree_deserialise_leaves(file, like=sf.freeze(fresh)))
    assert bits(sf.freeze(fresh)) == bits(sf.freeze(model))


# -- clone --------------------------------------------------------------------------


def test_a_clone_has_new_states_and_the_same_arrays():
    net = make_net()
    new = sf.clone(net)
    assert bits(sf.freeze(new)) == bits(sf.freeze(net))
    pairs = zip(sf.states(net).values(), sf.states(new).values(), strict=True)
    for old, made in pairs:
        assert made is not old and type(made) is type(old) and made.name == old.name
    assert new.layers[0].value is net.layers[0].value
    assert new.norm.scale is net.norm.scale
    new.norm.mean.value = 9.0
    assert net.norm.mean.value == 1.0


def test_a_clone_keeps_sharing_inside_states_too():
    tree = make_nested()
    new = sf.clone(tree)
    assert list(sf.states(new)) == list(sf.states(tree))
    assert new["again"] is new["net"].value.mean is not tree["again"]
    assert new["net"].value.scale[1] is not tree["net"].value.scale[1]
    old = {id(s) for s in sf.states(tree).values()}
    assert not old & {id(s) for s in sf.states(new).values()}


def test_a_clone_of_a_tree_without_states_is_the_tree():
    tree = (jnp.ones(2), "relu", None)
    assert sf.clone(tree)[0] is tree[0] and sf.clone(tree)[1:] == tree[1:]


def test_a_clone_runs_through_the_same_compiled_program():
    traced = []

    @sf.filter_jit
    def step(net):
        traced.append(None)
        net.norm.mean.value += 1

    net = make_net()
    new = sf.clone(net)
    step(net)
    step(new)
    step(new)
    assert len(traced) == 1
    assert (net.norm.mean.value, new.norm.mean.value) == (2.0, 3.0)


# -- the tools around ---------------------------------------------------------------


def test_optax_trains_what_was_taken_out():
    model = {"w": sf.Param(jnp.ones(2)), "n": sf.State(0)}
    optimizer = optax.sgd(0.5)
    opt_state = sf.State(optimizer.init(sf.values(model, sf.Param)))

    @sf.filter_jit
    def step():
        params = sf.values(model, sf.Param)
        updates, opt_state.value = optimizer.update(params, opt_state.value, params)
        sf.update(model, optax.apply_updates(params, updates))
        model["n"].value += 1

    step()
    step()
    assert model["w"].value.tolist() == [0.25, 0.25] and model["n"].value == 2


def test_the_functions_read_a_trace_as_it_stands():
    net = make_net()

    @sf.filter_jit
    def step():
        net.norm.mean.value = 5.0
        frozen, taken = sf.freeze(net), sf.values(net, Statistic)
        return frozen.norm.mean + taken.norm.mean + sf.clone(net).norm.mean.value

    assert step() == 15.0
    assert [s.name for s in step.stateful_function.get_write_states()] == ["mean"]


@pytest.mark.parametrize("function", [sf.states, sf.freeze, sf.values, sf.clone])
def test_the_functions_leave_the_tree_as_it_is(function):
    tree = make_nested()
    before, structure = snapshot(tree), jtu.tree_structure(tree)
    function(tree)
    assert all(a is b for a, b in zip(snapshot(tree), before, strict=True))
    assert jtu.tree_structure(tree) == structure


# -- static fields that can't be compared -------------------------------------------


class Features(eqx.Module):
    frequencies: np.ndarray = eqx.field(static=True)
    weight: sf.Param

    def __init__(self, *frequencies):
        self.frequencies = np.array(frequencies)
        self.weight = sf.Param(Inner(np.array(frequencies), jnp.ones(2)))


class Inner(eqx.Module):
    frequencies: np.ndarray = eqx.field(static=True)
    weight: jax.Array


@pytest.mark.filterwarnings("ignore:A JAX array is being set as static")
def test_a_copy_takes_the_values_of_what_it_was_copied_from():
    original = Features(1.0, 2.0)
    doubled = jtu.tree_map(lambda x: 2 * x, sf.freeze(original))
    for copied in (copy.deepcopy(original), Features(1.0, 2.0)):
        sf.update(copied, doubled)
        np.testing.assert_array_equal(copied.weight.value.weight, [2.0, 2.0])


@pytest.mark.filterwarnings("ignore:A JAX array is being set as static")
def test_values_around_another_static_array_are_refused():
    target = Features(1.0, 2.0)
    with pytest.raises(sf.StateValueError, match="first at `its root`"):
        sf.update(target, sf.freeze(Features(1.0, 3.0)))
    with pytest.raises(sf.StateValueError, match="does not fit Param"):
        sf.update(target.weight, Inner(np.array([1.0, 3.0]), jnp.zeros(2)))
    np.testing.assert_array_equal(target.weight.value.weight, [1.0, 1.0])


# -- models of shapes -----------------------------------------------------------------


class Both(eqx.Module):
    linear: eqx.nn.Linear  # outside of the States
    net: sf.Param
    count: sf.State

    def __init__(self, key):
        self.linear = eqx.nn.Linear(2, 3, key=key)
        self.net = sf.Param({"w": jnp.ones(3), "act": "relu"}, name="net")
        self.count = sf.State(jnp.array(0), name="count")

    def __call__(self, x):
        self.count.value += 1
        return self.linear(x) * self.net.value["w"]


def test_a_model_of_shapes_is_filled_with_arrays():
    key = jax.random.key(0)
    model, shapes = Both(key), sf.filter_eval_shape(Both, key)
    filled = sf.update(shapes, sf.freeze(model))
    assert filled.net is shapes.net and filled.net.value["act"] == "relu"
    np.testing.assert_array_equal(filled(jnp.ones(2)), model(jnp.ones(2)))
    assert filled.count.value == model.count.value == 1
    assert sf.update(filled, sf.freeze(model)) is filled


def test_a_model_of_shapes_takes_its_own_shapes_only():
    shapes = sf.filter_eval_shape(Both, jax.random.key(0))
    values = sf.freeze(Both(jax.random.key(0)))
    for where, path in (
        (lambda m: m.net["w"], r"float32\[4\] in place of float32\[3\]"),
        (lambda m: m.linear.bias, r"`\.linear\.bias`"),
    ):
        bad = eqx.tree_at(where, values, jnp.ones(4))
        with pytest.raises(sf.StateValueError, match=path):
            sf.update(shapes, bad)
        assert shapes.net.value["w"] == jax.ShapeDtypeStruct((3,), jnp.float32)
    assert sf.update(shapes, sf.freeze(shapes)).net is shapes.net


def test_shapes_are_no_values_for_a_model_of_arrays():
    model = Both(jax.random.key(0))
    with pytest.raises(sf.StateValueError):
        sf.update(model, sf.freeze(sf.filter_eval_shape(Both, jax.random.key(0))))
