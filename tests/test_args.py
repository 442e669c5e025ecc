"""Arguments: what is dynamic, what is static, and States that come in modules."""

import enum
import functools
import gc
import weakref
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefun as sf


def counting(fun):
    """`fun`, and a list that grows by one with every run of it."""
    runs = []

    @functools.wraps(fun)
    def counted(*args, **kwargs):
        runs.append(1)
        return fun(*args, **kwargs)

    return counted, runs


class Cell(eqx.Module):
    value: sf.State


class Pair(eqx.Module):
    left: sf.State
    right: sf.State


class Tagged(eqx.Module):
    array: jax.Array
    tag: object = eqx.field(static=True)


def cell(x, **kwargs):
    return Cell(sf.State(jnp.asarray(x), **kwargs))


# -- dynamic and static leaves ------------------------------------------------------


ARRAYS = [jnp.ones(2), np.ones(2, np.float32), np.float32(1), jax.random.key(0)]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda x: type(x).__name__)
def test_arrays_are_dynamic_wherever_they_sit(array):
    seen = []

    def f(tree, *, more):
        seen.extend([tree["a"][0], more.array])

    fn = sf.StatefulFunction(f)
    fn({"a": (array, "static")}, more=Tagged(array, "tag"))
    assert all(isinstance(x, jax.core.Tracer) for x in seen)


@pytest.mark.parametrize(
    "leaf", [1, 2.5, True, 1j, "text", None, len, jnp.float32, (), b"x"], ids=str
)
def test_all_else_is_static_and_arrives_as_it_is(leaf):
    seen = []

    def f(tree):
        seen.append(tree["a"])
        return tree["a"]

    fn = sf.StatefulFunction(f)
    out = fn({"a": leaf})
    assert type(out) is type(leaf) is type(seen[0])
    assert out == leaf == seen[0]


@pytest.mark.parametrize(
    "values",
    [(1, 1.0, True, 1 + 0j), (0, 0.0, -0.0, False), ((1,), (1.0,), (True,))],
    ids=str,
)
def test_static_leaves_compare_by_type_and_value(values):
    fun, runs = counting(lambda x: x)
    fn = sf.StatefulFunction(fun)
    for _ in range(2):
        for value in values:
            assert repr(fn(value)) == repr(value)
    assert len(runs) == len(values)


def test_nan_is_the_same_static_value_every_time():
    fun, runs = counting(lambda x: x)
    fn = sf.StatefulFunction(fun)
    for _ in range(3):
        fn(float("nan"))
    assert len(runs) == 1


class Config(NamedTuple):
    n: object


class Mode(enum.StrEnum):
    TRAIN = "train"


STATIC = {
    "number": (1, 1.0, True),
    "zero": (0.0, -0.0),
    "tuple": ((1,), (1.0,), (True,)),
    "named tuple": (Config(1), Config(1.0), Config(True), (1,)),
    "enumeration": (Mode.TRAIN, "train"),
    "deep": (("a", (Config((1,)),)), ("a", (Config((1.0,)),))),
    "set": (frozenset({1}), frozenset({1.0}), frozenset({True})),
}


@pytest.mark.parametrize("kind", STATIC)
def test_static_fields_of_a_module_compare_by_type_and_value(kind):
    values = STATIC[kind]
    fun, runs = counting(lambda m: m.tag)
    fn = sf.StatefulFunction(fun)
    keys = set()
    for _ in range(2):
        for value in values:
            module = Tagged(jnp.ones(1), value)
            keys.add(fn.get_arg_cache_key(module))
            assert repr(fn(module)) == repr(value)
    assert len(runs) == len(keys) == len(values)


@pytest.mark.parametrize("kind", STATIC)
def test_static_arguments_compare_by_type_and_value(kind):
    values = STATIC[kind]
    fun, runs = counting(lambda n, *, k: (n, k))
    fn = sf.StatefulFunction(fun, static_argnums=0, static_argnames="k")
    for _ in range(2):
        for value in values:
            assert repr(fn(value, k=value)) == repr((value, value))
    assert len(runs) == len(values)


@pytest.mark.parametrize("leaf", [bytearray(b"x"), {1, 2}], ids=str)
def test_a_leaf_that_cannot_be_hashed_is_refused_by_its_path(leaf):
    fn = sf.StatefulFunction(lambda a, b: a)
    kind = type(leaf).__name__
    message = rf"^the argument `b\['k'\]` can't be hashed: it is a {kind}"
    with pytest.raises(TypeError, match=message):
        fn(1, {"k": leaf})
    with pytest.raises(TypeError, match=r"^the argument `b` can't be hashed"):
        fn(1, b=leaf)


# -- whole static arguments ---------------------------------------------------------


class Thing:
    """Hashable by identity, and no array."""


@pytest.mark.parametrize("position", [1, -1, (1,), [1], (1, -1)], ids=str)
def test_static_argnums_make_a_whole_argument_static(position):
    seen = []

    def f(x, config):
        seen.append(config)
        return x * config[0]

    fn = sf.StatefulFunction(f, static_argnums=position)
    config = (3, (Thing(),))
    assert fn(jnp.array(2), config) == 6
    assert seen[0] is config
    # As a pytree it would be the same, but it is no pytree any more: one static leaf.
    assert len(fn.get_jaxpr(jnp.array(2), config).jaxpr.invars) == 1


def test_negative_static_argnums_count_from_the_end_of_the_call():
    fun, runs = counting(lambda *args: args[-1])
    fn = sf.StatefulFunction(fun, static_argnums=-1)
    x = jnp.ones(1)
    assert fn(x, (1, 2)) == (1, 2)
    assert fn(x, x, (1, 2)) == (1, 2)
    assert len(runs) == 2


@pytest.mark.parametrize("value", [[1, 2], {"a": 1}, jnp.ones(2), np.ones(2)])
def test_an_unhashable_static_argument_is_refused_by_its_position(value):
    fn = sf.StatefulFunction(lambda x, n: x, static_argnums=1)
    kind = type(value).__name__
    message = rf"^the static argument at position 1 can't be hashed: it is a {kind}\."
    with pytest.raises(TypeError, match=message):
        fn(jnp.ones(2), value)


@pytest.mark.parametrize("value", [[1, 2], {"a": 1}, jnp.ones(2)], ids=str)
def test_an_unhashable_static_argument_is_refused_by_its_name(value):
    fn = sf.StatefulFunction(lambda x, *, mode: x, static_argnames="mode")
    with pytest.raises(TypeError, match=r"^the static argument 'mode' can't be hashed"):
        fn(jnp.ones(2), mode=value)


def test_a_state_is_no_static_argument():
    fn = sf.StatefulFunction(lambda x, s: x, static_argnums=1)
    with pytest.raises(TypeError, match=r"^the static argument at position 1"):
        fn(jnp.ones(2), sf.State(jnp.ones(2)))


@pytest.mark.parametrize("position", [2, -3, 7])
@pytest.mark.parametrize("method", ["make_jaxpr", "__call__", "get_arg_cache_key"])
def test_static_argnums_beyond_the_arguments_are_refused(position, method):
    fn = sf.StatefulFunction(lambda *a: 0, static_argnums=position)
    message = rf"^static_argnums has {position}, but the call has only 2 positional"
    with pytest.raises(ValueError, match=message):
        getattr(fn, method)(jnp.ones(1), jnp.ones(1))


def test_static_argnames_make_a_whole_argument_static():
    seen = []

    def f(x, *, mode, other):
        seen.append((mode, other))
        return x

    fn = sf.StatefulFunction(f, static_argnames=("mode", "absent"))
    mode = ("a", (1, 2))
    fn(jnp.ones(2), mode=mode, other=jnp.ones(2))
    assert seen[0][0] is mode
    assert isinstance(seen[0][1], jax.core.Tracer)


def test_a_static_argument_is_static_by_position_and_by_name_as_in_jax_jit():
    seen = []

    def f(x, mode):
        seen.append(mode)
        return x

    mode = ("a", (1, 2))
    for options in ({"static_argnums": 1}, {"static_argnames": "mode"}):
        for jit in (jax.jit, sf.StatefulFunction):
            fn = jit(f, **options)
            fn(jnp.ones(2), mode)
            fn(jnp.ones(2), mode=mode)
    assert len(seen) >= 4
    assert all(m is mode for m in seen)


# -- names that clash ---------------------------------------------------------------


def test_any_name_may_be_a_keyword_of_the_users():
    def f(*, self, args, key, state_vals, kwargs, fun, name, values, frame):
        return {**locals()}

    names = "self args key state_vals kwargs fun name values frame".split()
    given = {name: jnp.array(i) for i, name in enumerate(names)}
    fn = sf.StatefulFunction(f)
    assert fn(**given) == given
    assert fn.jaxpr_call_auto(**given) == given
    assert fn.jaxpr_call((), **given) == ((), given)
    assert len(fn.get_jaxpr(**given).jaxpr.invars) == len(names)
    assert fn.make_jaxpr(**given) is fn
    key = fn.get_arg_cache_key(**given)
    assert fn.validate_states(key)
    for what in ("states", "read_states", "write_states", "state_trace"):
        by_arguments = getattr(fn, f"get_{what}")(**given)
        assert by_arguments == getattr(fn, f"get_{what}_by_cache")(key)
    assert set(fn.get_out_shapes(**given)[0]) == set(names)
    assert fn.get_out_treedef(**given) == jax.tree.structure((given, ()))
    assert sf.filter_jit(f)(**given) == given
    assert len(sf.make_jaxpr(f)(**given)) == 2


def test_a_keyword_named_compile_if_miss_is_passed_through_a_partial():
    def f(x, *, compile_if_miss):
        return x if compile_if_miss == "yes" else -x

    x = jnp.array(2)
    # Where nothing of ours has the name it just passes …
    assert sf.StatefulFunction(f)(x, compile_if_miss="yes") == 2
    # … and for the questions there is a way.
    bound = sf.StatefulFunction(functools.partial(f, compile_if_miss="no"))
    assert len(bound.get_jaxpr(x, compile_if_miss=True).jaxpr.eqns) == 1
    assert "functools.partial" in (sf.StatefulFunction.__doc__ or "")


# -- bare States --------------------------------------------------------------------


BARE = {
    "bare": lambda s: s,
    "in a tuple": lambda s: (jnp.ones(1), s),
    "in a list": lambda s: [s],
    "in a dict": lambda s: {"k": s},
    "deep": lambda s: ({"k": [1, (s,)]},),
}


@pytest.mark.parametrize("wrap", BARE.values(), ids=list(BARE))
@pytest.mark.parametrize(
    "method", ["make_jaxpr", "__call__", "get_jaxpr", "get_arg_cache_key", "get_states"]
)
def test_a_bare_state_as_argument_is_refused(wrap, method):
    s = sf.State(jnp.ones(2), name="mine")
    fn = sf.StatefulFunction(lambda x, s=None: 0)
    message = r"^State 'mine' \(created at .*test_args.*\) was passed as argument 1"
    with pytest.raises(TypeError, match=message):
        getattr(fn, method)(1, wrap(s))
    with pytest.raises(TypeError, match=r"^State 'mine' .* was passed as argument 's'"):
        getattr(fn, method)(1, s=wrap(s))


def test_a_bare_state_is_refused_where_the_same_call_without_it_is_cached():
    s = sf.State(jnp.ones(2), name="mine")
    fn = sf.StatefulFunction(lambda x: 0)
    for _ in range(2):
        fn({"k": jnp.ones(2)})
        with pytest.raises(TypeError, match=r"was passed as argument 0 at `\['k'\]`"):
            fn({"k": s})


def test_a_bare_state_as_argument_is_refused_under_disable_jit():
    s = sf.State(jnp.ones(2), name="mine")
    fn = sf.StatefulFunction(lambda x: 0)
    with jax.disable_jit(), pytest.raises(TypeError, match=r"was passed as argument 0"):
        fn(s)


@pytest.mark.parametrize("wrap", BARE.values(), ids=list(BARE))
@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("jit", [False, True])
def test_a_bare_state_as_result_is_refused_and_nothing_is_written(wrap, new, jit):
    s = sf.State(jnp.zeros(2), name="mine")

    def f():
        s.value = s.value + 1
        return wrap(sf.State(s.value, name="mine") if new else s)

    fn = sf.StatefulFunction(f)
    message = r"^State 'mine' \(created at .*test_args.*\) was returned"
    for _ in range(2):
        with jax.disable_jit(not jit), pytest.raises(TypeError, match=message):
            fn()
    np.testing.assert_array_equal(s.value, [0.0, 0.0])
    assert fn.get_cache_stats()["compilation_cache"]["size"] == 0


# -- States in modules --------------------------------------------------------------


def step(module):
    module.value.value += 1
    return module.value.value * 10


def test_modules_of_the_same_structure_share_one_trace():
    one, two, three = cell(1), cell(2), cell(3)
    fun, runs = counting(step)
    fn = sf.StatefulFunction(fun)
    assert [fn(m) for m in (one, two, one, three)] == [20, 30, 30, 40]
    assert [m.value.value for m in (one, two, three)] == [3, 3, 4]
    assert len(runs) == 1
    assert fn.get_cache_stats()["compilation_cache"]["size"] == 1


def test_modules_whose_states_differ_in_shape_have_traces_of_their_own():
    fun, runs = counting(step)
    fn = sf.StatefulFunction(fun)
    one, two = cell(jnp.zeros(2, jnp.int32)), cell(jnp.zeros(3, jnp.int32))
    for _ in range(3):
        assert fn(one).shape == (2,)
        assert fn(two).shape == (3,)
    assert len(runs) == 2


def test_the_kind_of_a_state_is_part_of_the_key():
    fun, runs = counting(lambda m: type(m.value).__name__)
    fn = sf.StatefulFunction(fun)
    assert fn(Cell(sf.State(1.0))) == "State"
    assert fn(Cell(sf.Param(1.0))) == "Param"
    assert fn(Cell(sf.State(2.0))) == "State"
    assert len(runs) == 2


def test_questions_answer_with_the_states_of_the_module_that_was_passed():
    one, two = cell(1), cell(2)
    fun, runs = counting(step)
    fn = sf.StatefulFunction(fun)
    for module in (one, two, one):
        assert fn.get_states(module) == (module.value,)
        assert fn.get_read_states(module) == (module.value,)
        assert fn.get_write_states(module) == (module.value,)
        assert fn.get_state_trace(module).states == (module.value,)
    assert len(runs) == 1


def test_jaxpr_call_takes_values_for_the_states_of_a_module():
    module = cell(1)
    fn = sf.StatefulFunction(step)
    (new,), out = fn.jaxpr_call((jnp.array(5),), module)
    assert (new, out) == (6, 60)
    assert module.value.value == 1


def test_errors_about_a_state_of_an_argument_say_where_it_is():
    fn = sf.StatefulFunction(lambda *, module: module.value.value * 2)
    module = cell(1, name="mine")
    message = (
        r"^state_vals has a value for State 'mine' at `module\.value` \(created at"
    )
    with pytest.raises(ValueError, match=message):
        fn.jaxpr_call((jnp.ones(2),), module=module)


def test_tied_and_untied_modules_have_keys_and_traces_of_their_own():
    a, b = sf.State(jnp.array(1)), sf.State(jnp.array(2))
    untied, tied = Pair(a, b), Pair(a, a)

    def step(pair):
        pair.left.value += 10
        pair.right.value *= 2
        return pair.left is pair.right

    fun, runs = counting(step)
    fn = sf.StatefulFunction(fun)
    assert fn(untied) is False
    assert (a.value, b.value) == (11, 4)
    assert fn(tied) is True
    assert a.value == 42
    assert fn(untied) is False
    assert (a.value, b.value) == (52, 8)
    assert fn(Pair(b, b)) is True
    assert b.value == 36
    assert len(runs) == 2
    assert fn.get_arg_cache_key(untied) != fn.get_arg_cache_key(tied)
    assert fn.get_states_by_cache(fn.get_arg_cache_key(untied)) == (a, b)
    assert len(fn.get_states(tied)) == 1


def test_states_shared_between_arguments_are_one():
    a, b = cell(1), cell(2)

    def step(one, two, *, three):
        one.value.value += 1
        two.value.value *= 3
        three.value.value -= 2

    fn = sf.StatefulFunction(step)
    fn(a, b, three=b)
    assert (a.value.value, b.value.value) == (2, 4)
    fn(a, a, three=b)
    assert (a.value.value, b.value.value) == (9, 2)
    fn(a, a, three=a)
    assert a.value.value == 28


def test_a_state_reached_by_argument_and_by_closure_is_one():
    shared = cell(1, name="shared")
    other = cell(100, name="other")

    def step(module):
        module.value.value += 1
        shared.value.value *= 2
        return module.value.value + shared.value.value

    fn = sf.StatefulFunction(step)
    # shared: 1 -> 2 -> 4; other: 101; shared: 8; shared: 9 -> 18
    assert fn(shared) == 8
    assert shared.value.value == 4
    assert fn(other) == 101 + 8
    assert (other.value.value, shared.value.value) == (101, 8)
    assert fn(shared) == 36
    assert fn(other) == 102 + 36
    assert (other.value.value, shared.value.value) == (102, 36)
    assert fn.get_states(shared) == (shared.value,)
    assert fn.get_states(other) == (other.value, shared.value)


@pytest.mark.parametrize("first", ["shared", "other"])
def test_aliasing_with_the_closure_is_seen_whichever_comes_first(first):
    shared, other = cell(1), cell(1)

    def step(module, flag):
        module.value.value += 1
        if flag == "late":  # only this specialisation reaches it
            shared.value.value *= 2

    fn = sf.StatefulFunction(step)
    modules = {"shared": shared, "other": other}
    fn(modules[first], "early")
    fn(modules[first], "late")
    fn(shared, "late")
    expected = {"shared": ((1 + 1 + 1) * 2 + 1) * 2, "other": (1 * 2 + 1) * 2}
    assert shared.value.value == expected[first]


def test_aliasing_that_only_one_branch_on_the_shape_reaches():
    # Both calls have the same static part, so they share what is known of the closure.
    shared = cell(jnp.array(1))

    def step(module, x):
        module.value.value += 1
        if x.shape == (2,):
            shared.value.value *= 2
        return module.value.value

    fn = sf.StatefulFunction(step)
    assert fn(shared, jnp.ones(3)) == 2
    assert fn(shared, jnp.ones(2)) == 6
    assert fn(shared, jnp.ones(3)) == 7
    assert fn(shared, jnp.ones(2)) == 16


def test_a_module_that_was_passed_comes_back_with_its_own_states():
    one, two = cell(1), cell(2)
    fn = sf.StatefulFunction(lambda m: (m, jnp.ones(1)))
    for module in (one, two, one):
        out, _ = fn(module)
        assert type(out) is Cell
        assert out.value is module.value


def test_a_module_with_a_state_of_the_closure_comes_back_with_that_state():
    s = sf.State(jnp.array(1))

    def step(x):
        s.value = s.value + x
        return Cell(s)

    fn = sf.StatefulFunction(step)
    for _ in range(2):
        assert fn(jnp.array(2)).value is s
    assert s.value == 5


class Net(eqx.Module):
    count: sf.State
    weight: jax.Array


def test_a_param_whose_value_holds_a_state_may_be_passed():
    def make(x):
        return Cell(sf.Param(Net(sf.State(jnp.array(0)), jnp.array(x))))

    def step(module):
        net = module.value.value
        net.count.value += 1
        return net.weight * 2

    fn = sf.StatefulFunction(step)
    one, two = make(1.0), make(2.0)
    assert [fn(m) for m in (one, two, one)] == [2.0, 4.0, 2.0]
    assert one.value.value.count.value == 2
    assert two.value.value.count.value == 1


def test_the_cache_keeps_no_module_alive():
    fn = sf.StatefulFunction(step)
    module = cell(1)
    fn(module)
    fn.get_states(module)
    gone = weakref.ref(module.value)
    del module
    gc.collect()
    assert gone() is None
    assert fn(cell(5)) == 60


# -- States that are made inside ----------------------------------------------------


def test_a_module_made_inside_comes_out_with_new_states():
    def make(x):
        return Net(sf.State(x * 2, name="fresh"), x + 1)

    fun, runs = counting(make)
    fn = sf.StatefulFunction(fun)
    one, two = fn(jnp.array(1)), fn(jnp.array(10))
    assert len(runs) == 1
    assert one.count is not two.count
    assert (one.count.value, two.count.value) == (2, 20)
    assert (one.weight, two.weight) == (2, 11)
    assert one.count.name == "fresh"
    assert not isinstance(one.count.value, jax.core.Tracer)
    one.count.value += 1
    assert (one.count.value, two.count.value) == (3, 20)


def test_sharing_among_new_states_is_kept():
    def make(tied):
        a = sf.Param(jnp.array(1.0))
        return {"p": Pair(a, a if tied else sf.State(jnp.array(2.0))), "c": Cell(a)}

    fn = sf.StatefulFunction(make)
    for _ in range(2):
        tied, untied = fn(True), fn(False)
        assert tied["p"].left is tied["p"].right is tied["c"].value
        assert untied["p"].left is untied["c"].value
        assert untied["p"].left is not untied["p"].right
        assert type(untied["p"].left) is sf.Param
        assert type(untied["p"].right) is sf.State


def test_a_new_state_in_a_new_states_value_comes_out_too():
    def make(x):
        inner = sf.State(x, name="inner")
        return Pair(sf.Param(Net(inner, x * 3)), inner)

    fn = sf.StatefulFunction(make)
    for x in (1.0, 2.0):
        pair = fn(jnp.array(x))
        assert pair.left.value.count is pair.right
        assert pair.right.value == x
        assert pair.left.value.weight == 3 * x


def test_a_new_state_comes_out_with_its_last_value():
    def make(x):
        s = sf.State(x)
        s.value = s.value * 5
        return Cell(s)

    fn = sf.StatefulFunction(make)
    assert fn(jnp.array(2)).value.value == 10
    with jax.disable_jit():
        assert fn(jnp.array(2)).value.value == 10


def test_new_states_are_no_states_of_the_function():
    outer = sf.State(jnp.array(1))

    def make(x):
        s = sf.State(x)
        s.value = s.value + outer.value
        outer.value = s.value
        return Cell(s)

    fn = sf.StatefulFunction(make)
    x = jnp.array(2)
    assert fn.get_states(x) == (outer,)
    assert fn.get_write_states(x) == (outer,)
    assert len(fn.get_jaxpr(x).jaxpr.outvars) == 2
    assert len(fn.get_jaxpr(x).jaxpr.invars) == 2
    (new,), module = fn.jaxpr_call((jnp.array(5),), x)
    assert (new, module.value.value) == (7, 7)
    assert outer.value == 1


def test_out_shapes_of_a_new_state_are_those_of_its_value():
    fn = sf.StatefulFunction(lambda x: Cell(sf.State(x, name="fresh")))
    out, states = fn.get_out_shapes(jnp.ones(3))
    assert out.value.value == jax.ShapeDtypeStruct((3,), jnp.float32)
    assert states == ()


def test_a_new_state_that_a_nested_call_returns_comes_out():
    inner = sf.StatefulFunction(lambda x: Cell(sf.State(x * 2)))

    def make(x):
        module = inner(x)
        module.value.value += 1
        return module

    fn = sf.StatefulFunction(make)
    one, two = fn(jnp.array(1)), fn(jnp.array(2))
    assert (one.value.value, two.value.value) == (3, 5)


def test_modules_that_hold_new_and_passed_states_come_out_right():
    def f(module, x):
        return Pair(sf.State(x), module.value), Pair(module.value, module.value)

    fn = sf.StatefulFunction(f)
    for n in (1, 2):
        module = cell(n)
        one, two = fn(module, jnp.array(n * 10))
        assert one.left.value == n * 10
        assert one.right is two.left is two.right is module.value
