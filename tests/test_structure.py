"""How a value is split into arrays and structure, and put together again."""

import collections
import dataclasses
import gc
import math
import threading
import weakref
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from hypothesis import given, strategies as st

import statefun as sf
from statefun._state.static import static_key, treedef_key
from statefun._state.structure import (
    ARRAY,
    LEAF,
    flat_of,
    flatten,
    leaves_of,
    strengthen,
)


class Pair(eqx.Module):
    left: Any
    right: Any


class Labelled(eqx.Module):
    content: Any
    label: Any = eqx.field(static=True)


@dataclasses.dataclass(frozen=True)
class Config:
    """Not registered with JAX: a leaf, which is static."""

    width: Any


class Shade(str):
    """Equal to the plain string of the same letters, but another type."""


def same(a: Any, b: Any) -> bool:
    """Whether two values are the same to the last bit: types, dtypes, signs of zero."""
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, eqx.Module):
        return same(vars(a), vars(b))
    if isinstance(a, jax.Array | np.ndarray):
        x, y = np.asarray(a), np.asarray(b)
        return (a.dtype, a.shape, x.tobytes()) == (b.dtype, b.shape, y.tobytes())
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or a.hex() == b.hex()
    return a == b


def normal(value: Any) -> Any:
    """What a value should be as soon as it is in a State: the rule, written naively."""
    if type(value) is dict:
        return {k: normal(v) for k, v in value.items()}
    if type(value) in (tuple, list):
        return type(value)(map(normal, value))
    if type(value) in (bool, int, float):
        return jnp.array(value, dtype=jnp.asarray(value).dtype)
    # Equinox counts NumPy arrays among the arrays, so they are dynamic in modules, too.
    return jtu.tree_map(lambda x: jnp.asarray(x) if eqx.is_array(x) else x, value)


DTYPES = ["bool", "int8", "int32", "uint16", "float16", "bfloat16", "float32"]
FLOATS = [0.0, -0.0, 1.0, 0.5, math.inf, math.nan]


@st.composite
def arrays(draw: st.DrawFn, numpy: bool = False) -> Any:
    dtype = jnp.dtype(draw(st.sampled_from(DTYPES)))
    shape = draw(st.sampled_from([(), (0,), (3,), (2, 1)]))
    array = np.full(shape, draw(st.integers(0, 1)), dtype)
    return array if numpy and draw(st.booleans()) else jnp.asarray(array)


def statics() -> st.SearchStrategy:
    chosen = ["relu", None, jnp.tanh, Config(2), Shade("relu"), bytes(2), range(3)]
    return st.sampled_from(chosen)


def numbers() -> st.SearchStrategy:
    return st.one_of(
        st.booleans(), st.integers(-5, 5), st.sampled_from([0.0, -0.0, 1.0, -2.5])
    )


def trees(leaves: st.SearchStrategy) -> st.SearchStrategy:
    def nodes(inner: st.SearchStrategy) -> st.SearchStrategy:
        few = st.lists(inner, max_size=3)
        return st.one_of(
            few,
            few.map(tuple),
            st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
            st.builds(Pair, inner, inner),
            st.builds(Labelled, inner, st.sampled_from([1, 1.0, True, "x", (0,)])),
        )

    return st.recursive(leaves, nodes, max_leaves=8)


values = trees(st.one_of(arrays(numpy=True), statics(), numbers()))


# -- flatten and unflatten ----------------------------------------------------------


@given(trees(st.one_of(arrays(), statics(), numbers(), st.sampled_from(FLOATS))))
def test_a_value_is_put_together_as_it_was(value):
    flat, structure = flatten(value)
    assert same(structure.unflatten(flat), value)


@given(values)
def test_flattening_again_gives_the_same_arrays_and_the_same_structure(value):
    flat, structure = flatten(normal(value))
    again, other = flatten(structure.unflatten(flat))
    assert other is structure
    pairs = zip(leaves_of(again, other), leaves_of(flat, structure), strict=True)
    assert all(x is y for x, y in pairs)


@given(values)
def test_the_leaves_of_a_flat_value_are_its_arrays(value):
    flat, structure = flatten(normal(value))
    leaves = leaves_of(flat, structure)
    assert all(isinstance(x, jax.Array) for x in leaves)
    assert len(leaves) == len(structure.slots) == len(structure.paths())
    assert same(
        structure.unflatten(flat_of(leaves, structure)), structure.unflatten(flat)
    )


@given(values)
def test_a_value_given_to_a_state_comes_back_normalised(value):
    assert same(sf.State(value).value, normal(value))


@given(values, values)
def test_a_value_written_over_another_comes_back_normalised(old, new):
    # A number takes the dtype of the array at its place, so there are none of them at
    # places that may hold an array: what is left has to come back whatever stood there.
    def no_numbers(value):
        if type(value) is dict:
            return {k: no_numbers(v) for k, v in value.items()}
        if type(value) in (tuple, list):
            return type(value)(map(no_numbers, value))
        return np.asarray(value) if type(value) in (bool, int, float) else value

    state = sf.State(old)
    state.value = new = no_numbers(new)
    assert same(state.value, normal(new))


@given(values)
def test_a_value_read_and_written_back_keeps_arrays_and_structure(value):
    state = sf.State(value)
    before, structure = state._cell.flat, state._cell.structure
    state.value = state.value
    assert state._cell.structure is structure
    after = leaves_of(state._cell.flat, structure)
    pairs = zip(after, leaves_of(before, structure), strict=True)
    assert all(x is y for x, y in pairs)


def test_the_flat_form_of_one_array_is_the_array_itself():
    x = jnp.ones(3)
    flat, structure = flatten(x)
    assert flat is x and structure is LEAF
    assert structure.unflatten(flat) is x
    assert leaves_of(flat, structure) == (x,)


def test_the_flat_form_of_all_else_is_a_list_of_arrays():
    x, y = jnp.ones(3), jnp.zeros(2)
    flat, structure = flatten(Pair((x, "relu"), {"b": y}))
    assert type(flat) is list and flat[0] is x and flat[1] is y
    assert structure.statics == (ARRAY, "relu", ARRAY)
    assert structure.paths() == [".left[0]", ".right['b']"]


def test_a_value_without_arrays_is_all_structure():
    flat, structure = flatten(("relu", None))
    assert flat == [] and structure.unflatten(flat) == ("relu", None)
    flat, structure = flatten(None)
    assert flat == [] and structure.unflatten(flat) is None


def test_none_is_no_leaf():
    flat, structure = flatten({"bias": None, "weight": jnp.ones(2)})
    assert len(structure.statics) == len(flat) == 1
    assert structure.unflatten(flat)["bias"] is None


# -- interning ----------------------------------------------------------------------


def test_equal_structures_are_one_object():
    make = lambda: flatten(Labelled([jnp.ones(2), "relu"], "x"))[1]  # noqa: E731
    assert make() is make()


def test_structures_do_not_depend_on_shapes_and_dtypes():
    assert flatten((jnp.ones(2), 3))[1] is flatten((jnp.zeros((), int), 3))[1]


def test_structures_that_nobody_holds_are_dropped():
    gone = weakref.ref(flatten(("only", "here", jnp.ones(1)))[1])
    gc.collect()
    assert gone() is None


def test_threads_that_flatten_the_same_structure_get_one_object():
    found, start = [], threading.Barrier(4)

    def work():
        start.wait()
        found.extend(flatten(("in", "threads", i))[1] for i in range(50))

    threads = [threading.Thread(target=work) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(found) == 200 and len(set(map(id, found))) == 50


NOT_THE_SAME = [
    (1, 1.0),
    (1, True),
    (1.0, True),
    (0, False),
    (0.0, -0.0),
    (0.0, 0),
    (1.0, 1 + 0j),
    (complex(0.0, 0.0), complex(0.0, -0.0)),
    ("relu", Shade("relu")),
    ("a", "b"),
    (Config(1), Config(2)),
    (Config(1), Config(True)),
    # Leaves where a whole argument is static, as of `static_argnums`.
    ((1,), (True,)),
    ((0.0, (1,)), (-0.0, (1,))),
]


@pytest.mark.parametrize(("a", "b"), NOT_THE_SAME, ids=repr)
def test_static_leaves_compare_by_type_and_value(a, b):
    assert static_key(a) != static_key(b)
    assert static_key(b) != static_key(a)
    # What counts in the end: two modules are not taken for each other.
    first, second = sf.State(Pair(a, jnp.ones(1))), sf.State(Pair(b, jnp.ones(1)))
    for state, leaf in ((first, a), (second, b)):
        read = state.value.left
        assert type(read) is type(leaf) and repr(read) == repr(leaf)


@pytest.mark.parametrize(
    "make",
    [
        lambda: 1,
        lambda: True,
        lambda: 0.1 + 0.2,
        lambda: float("nan"),
        lambda: complex("nan+1j"),
        lambda: np.float32("nan"),
        lambda: np.float64("nan"),
        lambda: "".join(["re", "lu"]),
        lambda: Config(3),
        lambda: math.inf,
    ],
)
def test_equal_static_leaves_have_equal_keys(make):
    # Made twice: `nan` is not equal to itself, and would retrace at every call.
    a, b = static_key(make()), static_key(make())
    assert a == b and hash(a) == hash(b)


def test_numpy_scalars_compare_by_dtype_and_bits():
    # Equinox counts them among the arrays; they get here as static arguments.
    zero, minus, single = np.float64(0.0), np.float64(-0.0), np.float32(0.0)
    keys = list(map(static_key, (zero, minus, single, np.int32(0), 0.0, 0)))
    assert all(a != b for i, a in enumerate(keys) for b in keys[:i])


@given(st.floats(), st.floats())
def test_keys_of_floats_are_equal_exactly_if_the_floats_are_the_same(a, b):
    assert (static_key(a) == static_key(b)) is same(a, b)


def test_what_can_not_be_hashed_is_the_same_as_itself_only():
    class Unhashable:
        __hash__ = None  # type: ignore[assignment]

        def __eq__(self, other):
            return True

    a, b = Unhashable(), Unhashable()
    assert static_key(a) == static_key(a)
    assert static_key(a) != static_key(b)
    assert hash(static_key(a)) == hash(static_key(a))
    read = [sf.State(Pair(x, jnp.ones(1))).value.left for x in (a, b)]
    assert read[0] is a and read[1] is b


IN_A_STATIC_FIELD = [
    *NOT_THE_SAME,
    ((1, (2,)), (1, (2.0,))),
    ([1], [True]),
    ({"a": 1}, {"a": 1.0}),
    ({"a": (1,)}, {"a": (True,)}),
    (Config(0.0), Config(-0.0)),
    ((0.0,), (-0.0,)),
]


@pytest.mark.parametrize(("a", "b"), IN_A_STATIC_FIELD, ids=repr)
def test_static_fields_of_modules_compare_by_type_and_value(a, b):
    x = jnp.ones(1)
    first, second = sf.State(Labelled(x, a)), sf.State(Labelled(x, b))
    for state, label in ((first, a), (second, b)):
        read = state.value.label
        assert type(read) is type(label) and repr(read) == repr(label)
    assert first._cell.structure is not second._cell.structure


def test_the_key_of_a_tree_seen_before_is_the_one_made_then():
    def key():
        return treedef_key(jtu.tree_structure((1, [2, {"a": 3}], None)))

    assert key() is key()


def test_a_static_list_that_is_changed_in_place_makes_another_key():
    sizes = [1, 2]
    module = Labelled(jnp.ones(1), sizes)
    before = treedef_key(jtu.tree_structure(module))
    assert treedef_key(jtu.tree_structure(module)) == before
    sizes.append(3)
    assert treedef_key(jtu.tree_structure(module)) != before


class Incomparable:
    def __eq__(self, other):
        raise TypeError("compared")

    __hash__ = object.__hash__


@pytest.mark.filterwarnings("ignore:A JAX array is being set as static")
@pytest.mark.parametrize(
    "make",
    [lambda: np.arange(3), lambda: jnp.arange(3), lambda: {"table": np.arange(2)}],
)
def test_static_arrays_compare_by_content(make):
    def structure(label):
        return sf.State(Labelled(jnp.ones(1), label))._cell.structure

    label = make()
    first = structure(label)
    assert structure(make()) is first
    other = jtu.tree_map(lambda x: x + 1, label)
    assert structure(other) is not first


def test_objects_that_refuse_to_be_compared_are_the_same_as_themselves_only():
    a, b = Incomparable(), Incomparable()
    for make in (lambda x: Labelled(jnp.ones(1), x), lambda x: Pair(x, jnp.ones(1))):
        first, second = sf.State(make(a)), sf.State(make(b))
        assert first._cell.structure is not second._cell.structure
        assert first._cell.structure is sf.State(make(a))._cell.structure
    step = sf.filter_jit(lambda m: m)
    assert step(Labelled(jnp.ones(1), a)).label is a
    assert step(Labelled(jnp.ones(1), b)).label is b


# -- dtypes -------------------------------------------------------------------------


def test_a_weak_type_is_dropped():
    weak = jnp.asarray(1.0)
    assert weak.weak_type  # else this tests nothing
    assert not strengthen(weak).weak_type
    flat, _ = flatten((weak, [weak]))
    assert not any(x.weak_type for x in flat)


def test_an_array_with_a_strong_type_is_not_copied():
    x = jnp.ones(2)
    assert strengthen(x) is x


def test_typed_keys_pass_as_they_are():
    key = jax.random.key(0)
    flat, structure = flatten({"key": key})
    assert flat[0] is key
    assert structure.unflatten(flat)["key"] is key


# -- what can be changed in place ---------------------------------------------------


@jtu.register_dataclass
@dataclasses.dataclass
class Thawed:
    content: Any


@jtu.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cold:
    content: Any


@jtu.register_dataclass
@dataclasses.dataclass
class Unusual:
    content: Any

    def __setattr__(self, name, value):
        if name != "content":
            raise KeyError(name)
        object.__setattr__(self, name, value)


@pytest.mark.parametrize(
    "value",
    [
        [1],
        {"a": 1},
        (1, [2]),
        Pair(1, {"a": 2}),
        collections.OrderedDict(a=1),
        collections.defaultdict(int, a=1),
        Thawed(1),
        Cold(Thawed(1)),
        Unusual(1),
    ],
    ids=repr,
)
def test_structures_with_lists_and_dicts_are_known_to_be_mutable(value):
    assert flatten(value)[1].mutable


@pytest.mark.parametrize(
    "value", [1, (1, (2,)), None, Pair(1, (2, None)), Cold((1, Cold(2)))], ids=repr
)
def test_structures_of_tuples_and_modules_are_not_mutable(value):
    assert not flatten(value)[1].mutable


@pytest.mark.filterwarnings("ignore:A JAX array is being set as static")
def test_twins_take_modules_with_static_arrays():
    def made(scale):
        return Labelled(jnp.ones(2), np.array([scale, 2.0], np.float32))

    def read(m):
        return jnp.sum(m.content * m.label)

    jitted = sf.filter_jit(read)
    assert [float(jitted(made(s))) for s in (1.0, 3.0, 1.0)] == [3.0, 5.0, 3.0]
    assert sf.scan(lambda c, x: (made(1.0), read(c)), made(1.0), None, 2)[1][1] == 3
    assert (
        read(sf.cond(jnp.array(True), lambda m: m, lambda _: made(1.0), made(1.0))) == 3
    )
    with pytest.raises(TypeError, match="must return the same structure"):
        sf.cond(jnp.array(True), lambda m: m, lambda _: made(3.0), made(1.0))
    params = sf.Param(made(1.0)), sf.Param(made(3.0))
    grads = sf.filter_grad(lambda: sum(read(p.value) for p in params), wrt=params)()
    assert [g.content.tolist() for g in grads] == [[1.0, 2.0], [3.0, 2.0]]
