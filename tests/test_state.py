"""One State: writing, reading, copying, and what it says when that can't be right."""

import collections
import copy
import dataclasses
import functools
import gc
import inspect
import json
import operator
import pathlib
import pickle
import re
import subprocess
import sys
import threading
import weakref
from typing import Any, TypeVar

import beartype
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st
from jaxtyping import Array, Float, jaxtyped

import statefun as sf

T = TypeVar("T")


def here() -> str:
    """`file:line` of the line that calls this."""
    frame = inspect.currentframe()
    assert frame is not None and frame.f_back is not None
    return f"{__file__}:{frame.f_back.f_lineno}"


def first_line(error: pytest.ExceptionInfo) -> str:
    return str(error.value).splitlines()[0]


class Holder(eqx.Module):
    content: Any


class Counter(eqx.Module):
    count: sf.State
    weight: jax.Array

    def __init__(self):
        self.count = sf.State(0, name="count")
        self.weight = jnp.ones(2)


class Normed(eqx.Module):
    """Its `__init__` is the one that `dataclasses` generates."""

    mean: sf.State = eqx.field(default_factory=lambda: sf.State(jnp.zeros(2)))


class Cache(sf.State[T]):
    """A kind of a user's own, with attributes."""

    def __init__(self, value: T, size: int, *, name: str | None = None):
        super().__init__(value, name=name)
        self.size = size
        self.log: list = []


class Slotted(sf.Param[T]):
    __slots__ = ("rate",)


# -- what a State is ----------------------------------------------------------------


def test_a_state_holds_any_pytree():
    tree = {"a": (jnp.ones(2), None), "b": [Holder("relu"), jnp.tanh]}
    read = sf.State(tree).value
    assert jtu.tree_structure(read) == jtu.tree_structure(tree)
    assert read["a"][0] is tree["a"][0]
    assert read["b"][0].content == "relu" and read["b"][1] is jnp.tanh


def test_a_state_is_a_leaf_of_pytrees():
    state = sf.State({"a": jnp.ones(2)})
    assert jtu.tree_leaves((state, [state])) == [state, state]
    dynamic, static = eqx.partition(Holder(state), eqx.is_array)
    assert dynamic.content is None and static.content is state


def test_is_state_tells_states_of_all_kinds_from_all_else():
    assert all(map(sf.is_state, (sf.State(0), sf.Param(0), Cache(0, 1))))
    assert not any(map(sf.is_state, (0, None, jnp.ones(2), Counter(), sf.State)))


def test_equality_is_identity():
    x = jnp.ones(2)
    a, b = sf.State(x), sf.State(x)
    assert a == a and a != b
    assert a in [a] and a not in [b]
    assert [b, a].index(a) == 1


def test_the_name_is_kept_and_can_not_be_changed():
    state = sf.State(0, name="count")
    assert state.name == "count" and sf.State(0).name is None
    with pytest.raises(AttributeError):
        state.name = "other"  # type: ignore[misc]


def test_a_misspelt_attribute_is_an_error():
    # `state.val = 3` would otherwise be kept beside the value, and change nothing.
    for state in (sf.State(0), sf.Param(0)):
        with pytest.raises(AttributeError):
            state.val = 3  # type: ignore[attr-defined]


def test_a_state_in_a_state_is_tracked_by_itself():
    mean = sf.State(jnp.zeros(2), name="mean")
    net = sf.Param(Holder(mean))
    held = net._cell.flat
    mean.value = jnp.ones(2)
    assert net.value.content is mean
    assert net._cell.flat is held and len(held) == 0
    # Both are written inside one compiled call, each for itself.

    @sf.filter_jit
    def step():
        net.value.content.value += 1
        return net.value.content.value

    assert step().tolist() == mean.value.tolist() == [2.0, 2.0]


@pytest.mark.parametrize("kind", [sf.State, sf.Param])
def test_a_state_is_not_the_whole_value_of_another(kind):
    inner = sf.State(0, name="inner")
    message = r"^State 'inner' \(created at .*\) was given to \w+ as its value\."
    with pytest.raises(sf.StateTypeError, match=message):
        kind(inner)
    outer = kind(jnp.ones(2))
    with pytest.raises(sf.StateTypeError, match="State 'inner'"):
        outer.value = inner
    assert outer.value.tolist() == [1.0, 1.0]


# -- what is written ----------------------------------------------------------------


def test_numbers_and_numpy_arrays_become_jax_arrays():
    value = {"a": 1, "b": (2.0, [True, np.ones(2, np.float32)]), "c": np.int8(3)}
    read = sf.State(value).value
    leaves = jtu.tree_leaves(read)
    assert all(isinstance(x, jax.Array) for x in leaves)
    assert [x.dtype.name for x in leaves] == [
        *("int32", "float32", "bool", "float32", "int8")
    ]


def test_what_is_no_number_and_no_array_stays_as_it_is():
    assert sf.State("relu").value == "relu"
    assert sf.State(None).value is None
    assert sf.State(("relu", 1)).value[0] == "relu"
    assert sf.State(range(3)).value == range(3)


def test_numbers_inside_a_module_stay_static():
    module = Holder((1, 2.0, [True, {"a": 3}], np.ones(2, np.float32)))
    read = sf.State({"module": module}).value["module"].content
    assert read[:3] == (1, 2.0, [True, {"a": 3}])
    assert [type(x) for x in jtu.tree_leaves(read[:3])] == [int, float, bool, int]
    assert isinstance(read[3], jax.Array)  # an array for Equinox


def test_a_number_in_a_subclass_of_a_tuple_or_dict_stays_static():
    # Such a class says what it wants of its fields: only plain containers are plain.
    Point = collections.namedtuple("Point", "x y")
    read = sf.State([Point(1, jnp.ones(2)), collections.OrderedDict(a=1)]).value
    assert type(read[0]) is Point and type(read[0].x) is int
    assert type(read[1]["a"]) is int


OLD = {
    "an array": 0.0,
    "nothing": None,
    "a static value": "relu",
    "a tuple": (1.0,),
    "a dict": {"b": jnp.ones(2)},
    "a module": Holder(jnp.ones(2)),
}


@pytest.mark.parametrize("old", OLD.values(), ids=OLD)
def test_numbers_become_jax_arrays_whatever_they_replace(old):
    state = sf.State(old)
    state.value = {"a": 1, "c": [2.5]}
    leaves = jtu.tree_leaves(state.value)
    assert all(isinstance(x, jax.Array) for x in leaves)
    assert [x.dtype.name for x in leaves] == ["int32", "float32"]
    state.value = 3
    assert isinstance(state.value, jax.Array) and state.value.dtype == jnp.int32


FITS = [
    ("float16", 1, 1.0),
    ("float16", 0.1, 0.0999755859375),  # rounding is what a float is for
    ("float32", True, 1.0),
    ("float32", float("inf"), float("inf")),
    ("bfloat16", 2.0, 2.0),
    ("int8", -128, -128),
    ("int8", 127.0, 127),
    ("int32", True, 1),
    ("uint8", 255, 255),
    ("bool", 1, True),
    ("bool", 0.0, False),
    ("bool", True, True),
    ("complex64", 2, 2 + 0j),
    ("complex64", 1.5, 1.5 + 0j),
    ("complex64", 1 - 2j, 1 - 2j),
]


@pytest.mark.parametrize(("dtype", "number", "kept"), FITS)
def test_a_number_takes_the_dtype_of_what_it_replaces(dtype, number, kept):
    single = sf.State(jnp.zeros((), dtype))
    nested = sf.State({"a": (jnp.zeros(3, dtype), "relu")})
    single.value = number
    nested.value = {"a": (number, "relu")}
    for read in (single.value, nested.value["a"][0]):
        assert read.dtype == dtype and read.shape == () and not read.weak_type
        assert read.item() == kept


DOES_NOT_FIT = [
    ("int8", 128),
    ("int8", -129),
    ("int32", 0.5),
    ("int32", 2**31),
    ("int32", 10**400),
    ("int32", float("inf")),
    ("int32", float("nan")),
    ("int32", 1j),
    ("uint8", -1),
    ("bool", 2),
    ("bool", 0.5),
    ("float32", 1j),
    # A finite number must not become infinite.
    ("float16", 70000.0),
    ("float32", 1e300),
    ("float32", 10**400),
]


@pytest.mark.parametrize(("dtype", "number"), DOES_NOT_FIT)
def test_a_number_that_would_lose_its_value_is_refused(dtype, number):
    single, where = sf.Param(jnp.zeros((), dtype), name="w"), here()
    nested = sf.Param({"a": jnp.zeros((), dtype)}, name="w")
    with pytest.raises(sf.StateTypeError) as error:
        single.value = number
    assert first_line(error).startswith(
        f"a value of the wrong type was written to Param 'w' (created at {where}): "
    )
    assert dtype in first_line(error)
    assert "Instead: " in str(error.value)
    with pytest.raises(TypeError, match=r"^a value of the wrong type was written to"):
        nested.value = {"a": number}
    assert single.value == jnp.zeros((), dtype)
    assert nested.value["a"] == jnp.zeros((), dtype)


def test_a_number_does_not_fit_a_random_key():
    state = sf.State(jax.random.key(0), name="key")
    with pytest.raises(sf.StateTypeError, match=r"written to State 'key'.*key<fry>"):
        state.value = 0
    assert state.value == jax.random.key(0)


@given(st.integers(-(2**40), 2**40), st.sampled_from(["int8", "uint16", "int32"]))
def test_an_integer_is_kept_exactly_or_refused(number, dtype):
    state = sf.State(jnp.zeros((), dtype))
    info = jnp.iinfo(dtype)
    if info.min <= number <= info.max:
        state.value = number
        assert state.value.item() == number
    else:
        with pytest.raises(sf.StateTypeError, match="does not fit the dtype"):
            state.value = number
        assert state.value.item() == 0
    assert state.value.dtype == dtype


def test_an_array_brings_its_own_dtype_shape_and_structure():
    state = sf.State(jnp.zeros(3))
    for new in (jnp.ones(2, jnp.int32), np.ones((1, 2), np.int8)):
        state.value = new
        assert state.value.dtype == new.dtype and state.value.shape == new.shape
    state.value = (jnp.ones(2), "relu")
    assert state.value[1] == "relu"


def test_a_number_with_no_array_at_its_place_takes_the_default_dtype():
    state = sf.State((jnp.zeros((), jnp.int8), "relu"))
    state.value = (1, 2, 3)
    assert [x.dtype.name for x in state.value[1:]] == ["int32", "int32"]
    state = sf.State({"a": jnp.zeros((), jnp.int8)})
    state.value = {"a": 1, "b": 1}
    assert [x.dtype.name for x in state.value.values()] == ["int8", "int32"]


@pytest.mark.parametrize(
    "value", [0.0, (0.0, [1]), {"a": 1.0}, Holder(jnp.asarray(1.0))], ids=repr
)
def test_weak_types_are_dropped(value):
    state = sf.State(value)
    assert not any(x.weak_type for x in jtu.tree_leaves(state.value))
    state.value = value
    assert not any(x.weak_type for x in jtu.tree_leaves(state.value))


def test_the_second_step_is_not_traced_again():
    traced = []
    state = sf.State({"n": 0, "mean": 0.0, "module": Holder(jnp.asarray(0.0))})

    @sf.filter_jit
    def step(x):
        traced.append(None)
        old = state.value
        state.value = {
            "n": old["n"] + 1,
            "mean": 0.9 * old["mean"] + x,
            "module": Holder(old["module"].content + x),
        }

    for _ in range(3):
        step(jnp.ones(()))
    assert len(traced) == 1
    state.value = {"n": 0, "mean": 0, "module": Holder(jnp.asarray(2.0))}
    step(jnp.ones(()))  # nor after numbers have been written on the host
    assert len(traced) == 1


def test_in_place_operators_keep_the_dtype():
    state = sf.State(jnp.ones(2, jnp.float16))
    state.value += 1
    state.value *= 0.5
    assert state.value.dtype == jnp.float16 and state.value.tolist() == [1.0, 1.0]


def test_typed_keys_can_be_held_and_split():
    state = sf.State(jax.random.key(0), name="key")

    @sf.filter_jit
    def draw():
        state.value, key = jax.random.split(state.value)
        return jax.random.normal(key)

    expected, key = jax.random.split(jax.random.key(0))
    assert draw() == jax.random.normal(key)
    assert state.value == expected


# -- flat storage -------------------------------------------------------------------


def test_reading_puts_the_value_together_and_does_not_copy_arrays():
    x, module = jnp.ones(2), Holder([jnp.zeros(3)])
    state = sf.State({"x": x, "module": module})
    assert state.value["x"] is x
    assert state.value["module"].content[0] is module.content[0]


def test_a_state_keeps_no_list_that_it_was_given_but_the_one_that_it_gave():
    given_list = [jnp.ones(2)]
    state = sf.State(given_list)
    given_list.append(jnp.ones(3))
    assert len(state.value) == 1
    state.value.append(jnp.ones(4))
    assert [len(x) for x in state.value] == [2, 4]


def test_states_of_one_structure_share_it():
    make = lambda: sf.Param(eqx.nn.Linear(2, 3, key=jax.random.key(0)))  # noqa: E731
    a, b = make(), make()
    assert a._cell.structure is b._cell.structure
    a.value = jtu.tree_map(lambda x: 2 * x if eqx.is_array(x) else x, a.value)
    assert a._cell.structure is b._cell.structure


# -- not a value --------------------------------------------------------------------


def delete(s):
    del s[0]


def assign(s):
    s[0] = 1


BINARY = [
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv),
    *(operator.mod, operator.pow, operator.matmul, operator.and_, operator.or_),
    *(operator.xor, operator.lshift, operator.rshift, divmod, operator.iadd),
    *(operator.lt, operator.le, operator.gt, operator.ge),
]
UNARY = [
    *(bool, float, int, complex, len, iter, list, tuple, abs, round, reversed, any),
    *(operator.neg, operator.pos, operator.invert, operator.index, operator.not_),
    *(lambda s: s[0], assign, delete, lambda s: 1 in s, lambda s: [1, 2][s]),
    *(lambda s: 1 if s else 2, lambda s: s or 1, lambda s: max(s, 0), sorted),
    *(np.asarray, np.array, jnp.asarray, jnp.array),
]
USED = r"^State 'count' \(created at .*\) was used as if it were its value, in `"


@pytest.mark.parametrize("kind", [sf.State, sf.Param])
@pytest.mark.parametrize("use", UNARY)
def test_a_state_itself_is_no_value(use, kind):
    state = kind(jnp.arange(3), name="count")
    with pytest.raises(sf.StateTypeError, match=USED.replace("State", kind.__name__)):
        use(state)


@pytest.mark.parametrize(
    "other", [1, 2.0, jnp.ones(2), np.ones(2), np.float32(1), None]
)
@pytest.mark.parametrize("use", BINARY)
def test_a_state_itself_is_no_operand(use, other):
    state = sf.State(jnp.arange(3), name="count")
    for pair in ((state, other), (other, state), (state, state)):
        if use is operator.iadd and pair[0] is other and isinstance(other, np.ndarray):
            continue  # NumPy's own error, as it writes in place
        with pytest.raises(sf.StateTypeError, match=USED) as error:
            use(*pair)
        assert "write `.value`" in str(error.value)
        assert isinstance(error.value, TypeError)


def test_a_state_itself_is_no_value_in_a_compiled_function():
    state = sf.State(True, name="count")

    @sf.filter_jit
    def run():
        return 1 if state else 2

    with pytest.raises(sf.StateTypeError, match=r"`bool\(state\)`"):
        run()


@pytest.mark.parametrize("other", [1, None, jnp.ones(2), np.ones(2), sf.State(1)])
def test_equality_stays_identity(other):
    state = sf.State(1)
    assert (state == other) is (other == state) is False
    assert (state != other) is (other != state) is True
    assert state == state and not (state != state)
    assert state in [other, state] or isinstance(other, jax.Array | np.ndarray)
    assert str(state) == f"{state}" == repr(state)


# -- not hashable -------------------------------------------------------------------


HASHED = r"State 'count' \(created at .*test_state\.py:\d+\) was hashed\."


@pytest.mark.parametrize(
    "use", [hash, lambda s: {s: 1}, lambda s: {s}, lambda s: hash((1, s))]
)
def test_hashing_raises_the_lesson(use):
    with pytest.raises(sf.StateTypeError, match="^" + HASHED) as error:
        use(sf.State(0, name="count"))
    assert "`sf.filter_jit` in place of `eqx.filter_jit`" in str(error.value)
    assert isinstance(error.value, TypeError)


def test_equinox_jit_does_not_freeze_a_state_in_a_module():
    # Whole and loud: JAX hashes static values, and shows the lesson in its own error.
    module = Counter()
    jitted = eqx.filter_jit(lambda module: module.weight + module.count.value)
    for _ in range(2):
        with pytest.raises(Exception, match=HASHED) as error:
            jitted(module)
        assert "`sf.filter_jit` in place of `eqx.filter_jit`" in str(error.value)


def test_jax_jit_does_not_take_a_state_as_a_static_argument():
    state = sf.State(0, name="count")
    with pytest.raises(Exception, match=HASHED):
        jax.jit(lambda s: s.value, static_argnums=0)(state)
    with pytest.raises(TypeError, match=r"State\(name='count', int32\[\]\)|State'>"):
        jax.jit(lambda s: s.value)(state)


# -- copies -------------------------------------------------------------------------


def by_pickle(tree: Any) -> Any:
    return pickle.loads(pickle.dumps(tree))


COPIES = {"deepcopy": copy.deepcopy, "pickle": by_pickle, "clone": sf.clone}
copies = pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)


@copies
def test_a_copy_is_a_new_state_with_the_same_value(copied):
    state = sf.Param({"w": jnp.ones(2), "act": "relu"}, name="w")
    new = copied(state)
    assert type(new) is sf.Param and new is not state and new.name == "w"
    assert new.value["act"] == "relu" and new.value["w"].tolist() == [1.0, 1.0]
    new.value = {"w": jnp.zeros(2), "act": "relu"}
    assert state.value["w"].tolist() == [1.0, 1.0]


def test_a_shallow_copy_shares_the_states_inside():
    inner = sf.State(0)
    new = copy.copy(sf.State((inner, jnp.ones(2))))
    assert new.value[0] is inner


@copies
def test_copies_keep_aliasing(copied):
    tied = sf.State(jnp.ones(2), name="tied")
    tree = {"a": tied, "b": [Holder(tied)], "c": sf.State((tied, sf.State(0)))}
    new = copied(tree)
    assert new["a"] is not tied
    assert new["a"] is new["b"][0].content is new["c"].value[0]
    assert new["c"].value[1] is not tree["c"].value[1]
    new["a"].value = jnp.zeros(2)
    assert new["c"].value[0].value.tolist() == [0.0, 0.0]
    assert tied.value.tolist() == [1.0, 1.0]


@copies
@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_random_keys_can_be_copied(copied, make):
    new = copied(sf.State({"key": make(3)}))
    assert jax.random.normal(new.value["key"]) == jax.random.normal(make(3))


@copies
def test_copies_keep_the_attributes_of_a_subclass(copied):
    cache = Cache(jnp.ones(2), 5, name="cache")
    cache.log.append("entry")
    new = copied(cache)
    assert type(new) is Cache and new.size == 5 and new.log == ["entry"]
    new.size = 6
    assert cache.size == 5


@pytest.mark.parametrize("copied", [copy.copy, *COPIES.values()])
def test_copies_keep_attributes_in_slots(copied):
    state = Slotted(jnp.ones(2))
    state.rate = 0.1
    assert copied(state).rate == 0.1
    assert not hasattr(copied(Slotted(jnp.ones(2))), "rate")


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle])
def test_deep_copies_share_no_attribute(copied):
    cache, inner = Cache(jnp.ones(2), 5), sf.State(0)
    cache.log.append(inner)
    new, other = copied((cache, inner))
    assert new.log is not cache.log
    assert new.log[0] is other  # attributes take part in the aliasing
    new.log.append(1)
    assert cache.log == [inner]


def test_a_module_with_states_is_deep_copied_whole():
    module = Counter()
    new = copy.deepcopy(module)
    new.count.value += 1
    assert (module.count.value.item(), new.count.value.item()) == (0, 1)


def test_a_copy_inside_a_trace_takes_the_value_as_it_stands_there():
    state = sf.State(jnp.ones(2))

    @sf.filter_jit
    def step():
        state.value += 1
        copies = [copy.copy(state), copy.deepcopy(state), sf.clone(state)]
        state.value += 1
        return [new.value for new in copies]

    assert [x.tolist() for x in step()] == [[2.0, 2.0]] * 3
    assert state.value.tolist() == [3.0, 3.0]


# -- annotations --------------------------------------------------------------------


def test_a_state_can_be_annotated_with_the_type_of_its_value():
    assert sf.State[Float[Array, "n"]].__origin__ is sf.State
    state = sf.Param[Float[Array, "n"]](jnp.ones(2))
    assert type(state) is sf.Param


def test_an_annotated_field_is_checked_at_run_time():
    @jaxtyped(typechecker=beartype.beartype)
    class Norm(eqx.Module):
        mean: sf.State[Float[Array, "n"]]

    state = sf.Param(jnp.ones(2))
    assert Norm(state).mean is state
    with pytest.raises(Exception, match="mean"):
        Norm(jnp.ones(2))


TYPED = """
import equinox as eqx, jax.numpy as jnp, statefun as sf
from jaxtyping import Array, Float

class Norm(eqx.Module):
    mean: sf.State[Float[Array, "n"]]
    net: sf.Param[eqx.nn.Linear]

def net_of(size: int) -> eqx.nn.MLP:
    raise NotImplementedError

def f(norm: Norm) -> None:
    reveal_type(norm.mean.value)
    reveal_type(norm.net.value)
    reveal_type(sf.Param(net_of(1)).value)
    norm.mean.value = jnp.ones(2)
    norm.net.value = "no network"
"""


def test_pyright_sees_the_type_of_the_value(tmp_path):
    pytest.importorskip("pyright")  # of the dev extra
    script = tmp_path / "typed.py"
    script.write_text(TYPED)
    root = pathlib.Path(sf.__file__).parent.parent
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pyright", "--outputjson"),
            *("--pythonpath", sys.executable, str(script)),
        ],
        capture_output=True,
        text=True,
        cwd=root,
    )
    found = json.loads(done.stdout)["generalDiagnostics"]
    said = [(d["severity"], d["message"]) for d in found]
    revealed = [re.findall('is "(.*)"$', m)[0] for kind, m in said if kind != "error"]
    assert revealed == ["Array", "Linear", "MLP"]
    errors = [d for d in found if d["severity"] == "error"]
    assert len(errors) == 1 and '"value"' in errors[0]["message"]
    assert errors[0]["range"]["start"]["line"] == TYPED.splitlines().index(
        '    norm.net.value = "no network"'
    )


# -- repr ---------------------------------------------------------------------------


REPRS = {
    "Param(name='w', float32[3,4])": lambda: sf.Param(jnp.ones((3, 4)), name="w"),
    "State(int32[])": lambda: sf.State(0),
    "Cache(bool[2])": lambda: Cache(jnp.ones(2, bool), 1),
    "State(name='key', key<fry>[2])": lambda: sf.State(
        jax.random.split(jax.random.key(0)), name="key"
    ),
    "State((i32[], f32[2], 'relu'))": lambda: sf.State((0, jnp.ones(2), "relu")),
    "State({'a': i32[], 'b': [None]})": lambda: sf.State({"a": 0, "b": [None]}),
    "State('relu')": lambda: sf.State("relu"),
    "State(None)": lambda: sf.State(None),
    "Param(name='net', Linear(weight=f32[3,2], bias=f32[3], in_features=2, "
    "out_features=3, use_bias=True))": lambda: sf.Param(
        eqx.nn.Linear(2, 3, key=jax.random.key(0)), name="net"
    ),
    "State((State(name='in', int32[]), f32[]))": lambda: sf.State(
        (sf.State(0, name="in"), 1.0)
    ),
}


@pytest.mark.parametrize(("text", "make"), REPRS.items(), ids=REPRS)
def test_the_repr_is_one_line(text, make):
    assert repr(make()) == text


def test_the_repr_of_a_large_module_is_one_line():
    layers = [{"weight": jnp.ones((64, 64)), "bias": None} for _ in range(20)]
    text = repr(sf.Param(Holder(layers), name="net"))
    layer = "{'bias': None, 'weight': f32[64,64]}"
    assert text == f"Param(name='net', Holder(content=[{', '.join([layer] * 20)}]))"
    assert "\n" not in text and "  " not in text


def test_the_repr_inside_a_trace_is_of_the_value_as_it_stands_there():
    state, pair = sf.State(jnp.ones(2), name="s"), sf.State((jnp.ones(2), 1))
    shown = []

    @sf.filter_jit
    def step():
        shown.append(repr(state))  # not a read: see below
        state.value = jnp.ones((3, 1), jnp.int32)
        pair.value = (pair.value[0][None], 1)
        shown.extend((repr(state), repr(pair)))

    step()
    assert shown == [
        "State(name='s', float32[2])",
        "State(name='s', int32[3,1])",
        "State((f32[1,2], i32[]))",
    ]
    assert step.stateful_function.get_read_states() == (pair,)


def test_the_repr_can_be_taken_inside_a_raw_transform():
    state = sf.State(jnp.ones(2))
    shown = []
    jax.jit(lambda x: (shown.append(repr(state)), x)[1])(1.0)
    assert shown == ["State(float32[2])"]


# -- a State whose value ended with the trace ---------------------------------------


def lost() -> sf.State:
    """A State that a traced function made and kept, which was refused."""
    made = []

    @sf.filter_jit
    def step(x):
        made.append(sf.State(x, name="lost"))

    with pytest.raises(
        sf.StateTraceError, match=r"^State 'lost' .* was created inside"
    ):
        step(jnp.ones(2))
    return made[0]


def test_a_state_that_was_not_returned_has_no_value():
    state = lost()
    assert repr(state) == "State(name='lost', <no value>)"
    read = lambda: state.value  # noqa: E731
    uses = [
        read,
        sf.filter_jit(read),
        lambda: by_pickle(state),
        lambda: copy.copy(state),
    ]
    for use in uses:
        with pytest.raises(sf.StateTraceError, match=r"^State 'lost' .* has no value"):
            use()


def test_a_state_without_a_value_can_be_given_one():
    state = lost()
    state.value = (1, "relu")
    assert state.value == (1, "relu")


# -- raw JAX transforms -------------------------------------------------------------

x = jnp.ones(())


def run_scan(f):
    return jax.lax.scan(lambda c, _: (f(c), None), x, length=2)


# The kinds that make a jaxpr to be compiled: what they saw would be frozen.
TRACING = {
    "jit": lambda f: jax.jit(f)(x),
    "jit of grad": lambda f: jax.jit(jax.grad(f))(x),
    "grad of jit": lambda f: jax.grad(jax.jit(f))(x),
    "vmap of jit": lambda f: jax.vmap(jax.jit(f))(x[None]),
    "eqx.filter_jit": lambda f: eqx.filter_jit(f)(x),
    "make_jaxpr": lambda f: jax.make_jaxpr(f)(x),
    "eval_shape": lambda f: jax.eval_shape(f, x),
    "eqx.filter_eval_shape": lambda f: eqx.filter_eval_shape(f, x),
    "jit of scan": lambda f: jax.jit(lambda _: run_scan(f))(x),
    "scan of jit": lambda f: run_scan(jax.jit(f)),
    "jit of checkpoint": lambda f: jax.jit(jax.checkpoint(f))(x),
}
# The kinds that make a jaxpr of a function, run it at once, and keep it by the function's
# identity: the State is looked up in each run.
AT_ONCE = {
    "checkpoint": lambda f: jax.checkpoint(f)(x),
    "grad of checkpoint": lambda f: jax.grad(jax.checkpoint(f))(x),
    "eqx.filter_checkpoint": lambda f: eqx.filter_checkpoint(f)(x),
    "scan": run_scan,
    "map": lambda f: jax.lax.map(f, x[None]),
    "fori_loop": lambda f: jax.lax.fori_loop(0, 2, lambda _, c: f(c), x),
    "while_loop": lambda f: jax.lax.while_loop(lambda c: c < 0, f, x),
    "cond": lambda f: jax.lax.cond(True, f, f, x),
    "switch": lambda f: jax.lax.switch(0, [f, f], x),
}
# The kinds that run the function on values of their own.
RUNNING = {
    "grad": lambda f: jax.grad(f)(x),
    "value_and_grad": lambda f: jax.value_and_grad(f)(x),
    "vmap": lambda f: jax.vmap(f)(x[None]),
    "jvp": lambda f: jax.jvp(f, (x,), (x,)),
    "vjp": lambda f: jax.vjp(f, x)[0],
    "linearize": lambda f: jax.linearize(f, x)[0],
    "jacfwd": lambda f: jax.jacfwd(f)(x),
    "jacrev": lambda f: jax.jacrev(f)(x),
    "grad of vmap": lambda f: jax.grad(lambda x: jax.vmap(f)(x[None]).sum())(x),
    "eqx.filter_grad": lambda f: eqx.filter_grad(f)(x),
    "eqx.filter_vmap": lambda f: eqx.filter_vmap(f)(x[None]),
}
ALL = {**TRACING, **AT_ONCE, **RUNNING}
making = {**TRACING, **AT_ONCE}
tracing = pytest.mark.parametrize("run", making.values(), ids=making)
running = pytest.mark.parametrize("run", RUNNING.values(), ids=RUNNING)
every = pytest.mark.parametrize("run", ALL.values(), ids=ALL)


@tracing
def test_a_read_in_a_raw_transform_that_keeps_what_it_saw_is_refused(run):
    state, where = sf.Param(3.0, name="w"), here()
    with pytest.raises(sf.StateTraceError) as error:
        run(lambda x: x * state.value)
    assert first_line(error) == (
        f"Param 'w' (created at {where}) was read inside a raw JAX transform."
    )
    assert "\n\nWhy: " in str(error.value) and "sf.filter_jit" in str(error.value)
    assert isinstance(error.value, RuntimeError) and state.value == 3.0


@running
def test_a_read_in_a_raw_transform_that_is_not_compiled_for_later_is_right(run):
    state = sf.State(3.0)

    def f(x):  # one function: JAX may have kept something of its first run
        return x * state.value

    for new in (3.0, 5.0, -1.0):
        state.value = new
        got = jtu.tree_leaves(run(f))
        expected = jtu.tree_leaves(run(lambda x: x * jnp.float32(new)))  # noqa: B023
        assert [g.tolist() for g in got] == [e.tolist() for e in expected]


@running
@pytest.mark.parametrize("inner", [jax.jit, jax.checkpoint])
def test_a_raw_jit_inside_a_raw_grad_does_not_freeze_what_was_read_before(run, inner):
    state = sf.State(3.0)

    def f(x):
        w = state.value
        return inner(lambda x, w: x * w)(x, w)

    for new in (3.0, 5.0):
        state.value = new
        got = jtu.tree_leaves(run(f))
        expected = jtu.tree_leaves(run(lambda x: x * jnp.float32(new)))  # noqa: B023
        assert [g.tolist() for g in got] == [e.tolist() for e in expected]


@every
def test_a_write_in_a_raw_transform_is_refused(run):
    state, where = sf.State(3.0, name="w"), here()
    other = sf.State(4.0)

    def f(x):
        state.value = x
        other.value = x
        return x

    with pytest.raises(sf.StateTraceError) as error:
        run(f)
    assert first_line(error) == (
        f"State 'w' (created at {where}) was written inside a raw JAX transform."
    )
    assert "\n\nWhy: " in str(error.value) and "sf.filter_grad" in str(error.value)
    assert (state.value, other.value) == (3.0, 4.0)
    state.value = 5.0  # and all is well again
    assert state.value == 5.0


@every
def test_a_concrete_write_in_a_raw_transform_is_refused(run):
    # It would happen when the function is traced, not when it runs.
    state = sf.State(3.0, name="w")

    def f(x):
        state.value = 7.0
        return x

    with pytest.raises(sf.StateTraceError, match=r"^State 'w' .* was written inside"):
        run(f)
    assert state.value == 3.0


@every
def test_a_state_can_not_be_given_a_tracer_in_a_raw_transform(run):
    made = []

    def f(x):
        made.append((here(), sf.State({"a": x}, name="new")))

    with pytest.raises(sf.StateTraceError) as error:
        run(f)
    assert re.fullmatch(
        r"State 'new' \(created at .*test_state\.py:\d+\) was given a tracer inside a "
        r"raw JAX transform\.",
        first_line(error),
    )
    line = inspect.getsourcelines(f)[1] + 1
    assert f"{__file__}:{line})" in first_line(error)
    assert made == []


@every
def test_inside_a_statefun_transform_a_raw_one_can_not_write(run):
    state, other = sf.State(3.0, name="w"), sf.State(4.0)

    def body(y):
        state.value = y
        return y

    @sf.filter_jit
    def step():
        other.value += 1
        run(body)

    with pytest.raises(sf.StateTraceError, match=r"^State 'w' .* was written inside"):
        step()
    assert (state.value, other.value) == (3.0, 4.0)


@pytest.mark.parametrize("run", [jax.jit, jax.grad, eqx.filter_jit, eqx.filter_grad])
def test_a_module_reports_the_state_that_a_raw_transform_wrote(run):
    module = Counter()

    def f(x):
        module.count.value += 1
        return x

    with pytest.raises(sf.StateTraceError, match=r"^State 'count' \(created at "):
        run(f)(x)
    assert module.count.value == 0


def test_reading_in_a_thread_of_its_own_is_not_inside_the_transform():
    state, seen = sf.State(3.0), []

    @jax.jit
    def f(x):
        thread = threading.Thread(target=lambda: seen.append(state.value.item()))
        thread.start()
        thread.join()
        return x

    f(x)
    assert seen == [3.0]


def test_without_jit_a_raw_jit_may_read_and_write():
    state = sf.State(3.0)

    def f(x):
        state.value += x
        return state.value

    with jax.disable_jit():
        assert jax.jit(f)(x) == 4.0
    assert state.value == 4.0


# -- changed in place inside a trace ------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Fields:
    a: Any
    kind: str = dataclasses.field(default="a", metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
    content: Any


@jax.tree_util.register_pytree_node_class
class Registered:
    def __init__(self, a):
        self.a = a

    def __repr__(self):
        return f"Registered({self.a})"

    def tree_flatten(self):
        return (self.a,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def set_field(value):
    value.a = jnp.zeros(2)


def set_item(value):
    value["a"] = jnp.zeros(2)


IN_PLACE = {
    "set in a dict": ({"a": jnp.ones(2)}, set_item),
    "add to a dict": ({"a": jnp.ones(2)}, lambda v: v.update(b=1)),
    "delete from a dict": ({"a": jnp.ones(2)}, lambda v: v.clear()),
    "set in a list": ([jnp.ones(2)], lambda v: v.__setitem__(0, jnp.zeros(2))),
    "append to a list": ([jnp.ones(2)], lambda v: v.append(jnp.zeros(2))),
    "swap in a list": ([jnp.ones(2), jnp.ones(2)], lambda v: v.reverse()),
    "a static value": ({"act": "relu"}, lambda v: v.update(act="tanh")),
    "deep inside": (({"a": [jnp.ones(2)]},), lambda v: v[0]["a"].clear()),
    "a list of a module": (
        Holder([jnp.ones(2)]),
        lambda v: v.content.append(jnp.ones(2)),
    ),
    "a dict of a module": (Holder({"a": 1}), lambda v: v.content.update(a=2)),
    "an ordered dict": (collections.OrderedDict(a=jnp.ones(2)), set_item),
    "a default dict": (collections.defaultdict(list, a=jnp.ones(2)), set_item),
    "a field of a dataclass": (Fields(jnp.ones(2)), set_field),
    "a static field of a dataclass": (
        Fields(jnp.ones(2)),
        lambda v: setattr(v, "kind", "b"),
    ),
    "a dataclass in a frozen one": (
        Frozen(Fields(jnp.ones(2))),
        lambda v: set_field(v.content),
    ),
    "a registered object": (Registered(jnp.ones(2)), set_field),
}
in_place = pytest.mark.parametrize(("value", "change"), IN_PLACE.values(), ids=IN_PLACE)


@in_place
def test_a_change_in_place_inside_a_trace_is_an_error(value, change):
    state, where = sf.State(value, name="stats"), here()
    other = sf.State(0)

    @sf.filter_jit
    def step():
        other.value += 1
        change(state.value)

    before = state._cell.flat
    with pytest.raises(sf.StateTraceError) as error:
        step()
    assert first_line(error) == (
        f"the value of State 'stats' (created at {where}) was changed in place inside "
        "a trace."
    )
    assert "assign the new value" in str(error.value)
    assert state._cell.flat is before and other.value == 0


@in_place
def test_a_changed_value_may_be_assigned_back(value, change):
    state = sf.State(value)

    @sf.filter_jit
    def step():
        new = state.value
        change(new)
        state.value = new

    step()
    expected = sf.State(value).value
    change(expected)
    assert repr(state) == repr(sf.State(expected))


def test_a_change_in_place_is_seen_without_jit_too():
    state = sf.State([1], name="stats")
    step = sf.filter_jit(lambda: state.value.append(2))
    with jax.disable_jit(), pytest.raises(sf.StateTraceError, match="changed in place"):
        step()
    assert len(state.value) == 1


def test_a_change_in_place_in_an_inner_trace_is_an_error():
    state = sf.State({"a": jnp.ones(2)}, name="stats")
    inner = sf.filter_jit(lambda: set_item(state.value))

    @sf.filter_jit
    def outer():
        inner()

    with pytest.raises(sf.StateTraceError, match=r"^the value of State 'stats'"):
        outer()


def test_a_change_of_a_value_written_in_the_same_trace_is_an_error():
    state = sf.State({"a": jnp.ones(2)}, name="stats")

    @sf.filter_jit
    def step():
        state.value = {"a": jnp.zeros(2)}
        state.value["a"] += 1

    with pytest.raises(sf.StateTraceError, match=r"^the value of State 'stats'"):
        step()
    assert state.value["a"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "run",
    [
        lambda f: sf.filter_jit(f)(),
        lambda f: sf.filter_eval_shape(f),
        lambda f: sf.filter_grad(lambda x: (f(), x)[1])(1.0),
        lambda f: sf.filter_checkpoint(f)(),
        lambda f: sf.filter_vmap(lambda x: f())(jnp.ones(2)),
        lambda f: sf.scan(lambda c, x: (c, f()), 0.0, length=1),
        lambda f: sf.fori_loop(0, 1, lambda i, c: (f(), c)[1], 0.0),
        lambda f: sf.while_loop(lambda c: c < 1, lambda c: (f(), c + 1)[1], 0),
        lambda f: sf.cond(True, f, f),
    ],
    ids="jit eval_shape grad checkpoint vmap scan fori_loop while_loop cond".split(),
)
def test_an_attribute_that_is_set_is_an_error_in_every_twin(run):
    state = sf.State(Fields(jnp.ones(2)), name="stats")
    with pytest.raises(sf.StateTraceError, match=r"^the value of State 'stats'"):
        run(lambda: set_field(state.value))
    assert state.value.a.tolist() == [1.0, 1.0]


@in_place
def test_a_change_in_place_outside_of_a_trace_is_kept(value, change):
    state, late = sf.State(value), sf.State(value)
    expected = sf.State(value).value
    change(expected)
    change(state.value)
    assert repr(state) == repr(sf.State(expected))
    held = late.value
    assert late.value is held
    change(held)
    assert sf.State(late.value).__repr__() == repr(sf.State(expected))
    assert repr(copy.copy(late)) == repr(copy.deepcopy(late)) == repr(late)


@pytest.mark.parametrize("donate_states", [False, True])
def test_a_change_in_place_between_calls_is_seen_by_the_next_call(donate_states):
    state, calls = sf.State({"n": jnp.array(0), "log": []}), sf.State(jnp.array(0))

    @sf.filter_jit(donate_states=donate_states)
    def step():
        calls.value += 1
        return state.value["n"] + 10 * len(state.value["log"])

    @sf.filter_jit(donate_states=donate_states)
    def add():
        state.value = {**state.value, "n": state.value["n"] + 1}

    assert [int(step()) for _ in range(3)] == [0, 0, 0]
    held = state.value
    for i in range(1, 4):
        held["n"] = jnp.array(i)
        assert step() == i
    held["log"].append(jnp.array(1.0))
    assert [int(step()) for _ in range(3)] == [13, 13, 13]
    held["n"] = jnp.array(5)
    add()
    add()
    assert state.value["n"] == 7 and step() == 17
    assert state.value is not held  # it was of an older value


def test_a_change_in_place_is_seen_by_the_other_twins():
    state = sf.State({"w": jnp.array(1.0)})
    state.value["w"] = jnp.array(3.0)
    grad = sf.filter_grad(lambda x: x * state.value["w"])
    assert grad(jnp.array(1.0)) == 3.0
    state.value["w"] = jnp.array(4.0)
    assert sf.scan(lambda c, _: (c + state.value["w"], None), 0.0, length=2)[0] == 8.0


def test_a_number_set_in_place_takes_the_dtype_of_what_it_replaces():
    state = sf.State({"w": jnp.ones(2), "n": jnp.array(0)}, name="stats")
    state.value["n"] = 3
    assert state.value["n"].dtype == jnp.int32 and state.value["n"] == 3
    held = state.value
    held["more"] = ([1.0], 2.0)
    assert state.value["more"][1].dtype == jnp.float32
    assert state.value is held
    held["more"][0].append(3.0)
    assert len(state.value["more"][0]) == 2
    state.value["n"] = 1.5
    with pytest.raises(sf.StateTypeError, match="State 'stats'"):
        _ = state.value
    assert state.value["n"] == 3


def test_a_tracer_set_in_place_in_what_was_taken_out_before_is_an_error():
    state = sf.State({"n": jnp.array(0.0)}, name="stats")
    held = state.value
    sf.filter_jit(lambda x: held.update(n=x))(jnp.array(1.0))
    with pytest.raises(sf.StateTraceError, match=r"^the value of State 'stats'"):
        _ = state.value
    assert state.value["n"] == 0


def test_what_was_taken_out_and_is_written_back_goes_on_being_the_value():
    state = sf.State({"n": jnp.array(0), "log": []})
    held = state.value
    held["n"] = 1
    state.value = held
    assert state.value is held and held["n"].dtype == jnp.int32
    held["n"] = 2
    assert sf.filter_jit(lambda: state.value["n"])() == 2
    held["log"].append(3)
    state.value = held
    held["log"].append(4)
    assert state.value is held and [int(x) for x in held["log"]] == [3, 4]


def test_what_was_written_back_in_a_trace_and_is_changed_again_is_an_error():
    state = sf.State({"n": jnp.array(0)}, name="stats")

    @sf.filter_jit
    def step():
        held = state.value
        held["n"] = 1
        state.value = held
        assert state.value is held and isinstance(held["n"], jax.Array)
        held["n"] = 2

    with pytest.raises(sf.StateTraceError, match=r"^the value of State 'stats'"):
        step()
    assert state.value["n"] == 0


def test_a_change_in_place_inside_a_raw_transform_is_kept_or_an_error():
    state = sf.State({"n": jnp.array(0.0)}, name="stats")
    jax.grad(lambda x: (set_n(state.value, jnp.array(2.0)), x)[1])(1.0)
    assert state.value["n"] == 2
    jax.grad(lambda x: (set_n(state.value, x), x)[1])(1.0)
    with pytest.raises(sf.StateTraceError, match=r"^the value of State 'stats'"):
        _ = state.value
    assert state.value["n"] == 2


def set_n(value, n):
    value["n"] = n


def test_a_change_in_place_is_seen_wherever_states_are_looked_at():
    def changed():
        state = sf.State({"n": jnp.array(0)})
        state.value["n"] = jnp.array(1)
        return state

    read = sf.filter_jit(lambda tree: tree["s"][0].value["n"])
    module = Holder([changed()])
    assert sf.filter_jit(lambda m: m.content[0].value["n"])(module) == 1
    del read
    for look in (
        lambda s: sf.freeze(s)["n"],
        lambda s: sf.values([s])[0]["n"],
        lambda s: sf.clone([s])[0].value["n"],
        lambda s: copy.copy(s).value["n"],
        lambda s: copy.deepcopy(s).value["n"],
        lambda s: pickle.loads(pickle.dumps(s)).value["n"],
        lambda s: sf.filter_vmap(lambda x: s.value["n"])(jnp.ones(2))[0],
        lambda s: sf.filter_jit(lambda: s.value["n"]).lower().compile()(),
    ):
        assert look(changed()) == 1


def test_frozen_values_are_no_part_of_the_state():
    state = sf.State({"n": jnp.array(0)})
    sf.freeze(state)["n"] = jnp.array(1)
    sf.values([state])[0]["n"] = jnp.array(1)
    assert state.value["n"] == 0


def test_a_hot_call_stays_hot_while_a_value_is_held():
    state, runs = sf.State({"n": jnp.array(0), "log": []}), []
    step = sf.filter_jit(lambda: runs.append(1) or state.value["n"])
    held = state.value
    step()
    calls = step._calls
    run, calls.run = calls.run, None  # only a hot call does without
    assert step() == 0 and held["n"] == 0
    calls.run = run
    held["n"] = jnp.array(1)
    assert step() == 1 and len(runs) == 1


def test_what_was_taken_out_is_let_go_of_when_the_state_is_written():
    state = sf.State({"n": jnp.array(0)})
    array = weakref.ref(state.value["n"])
    state.value = {"n": jnp.array(1)}
    assert array() is None
    step = sf.filter_jit(lambda: setattr(state, "value", {"n": state.value["n"] + 1}))
    step()
    array = weakref.ref(state.value["n"])
    step()
    step()
    assert array() is None


def test_values_that_cannot_be_changed_are_not_kept():
    state = sf.State((jnp.ones(2), Holder(jnp.ones(2))))
    assert state.value is not state.value
    assert state._cell.handed is None


def test_what_was_taken_out_is_let_go_of_with_the_state():
    state = sf.State({"n": jnp.array(0)})
    cell = weakref.ref(state._cell)
    held = state.value
    del state
    gc.collect()
    assert cell() is None and held["n"] == 0


def test_keys_that_cannot_be_sorted_are_refused_once():
    state = sf.State({"n": jnp.array(0)})
    state.value[1] = jnp.array(1)
    with pytest.raises(ValueError):
        _ = state.value
    assert list(state.value) == ["n"]


def test_what_was_taken_out_does_not_keep_donated_arrays():
    state = sf.State({"n": jnp.zeros(100)})

    @sf.filter_jit(donate_states=True)
    def add():
        state.value = {"n": state.value["n"] + 1}

    add()
    before = state.value["n"].unsafe_buffer_pointer()
    add()
    assert state.value["n"].unsafe_buffer_pointer() == before


@jax.tree_util.register_pytree_node_class
class Doubling(Registered):
    def tree_flatten(self):
        return (self.a * 2,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(children[0] / 2)


def test_a_node_that_makes_its_children_anew_may_be_read():
    state = sf.State(Doubling(jnp.ones(2)))
    assert sf.filter_jit(lambda: state.value.a)().tolist() == [1.0, 1.0]


def test_reading_a_list_or_dict_inside_a_trace_is_fine():
    state = sf.State({"a": [jnp.ones(2)], "b": {}})
    sums = sf.filter_jit(lambda: sum(x.sum() for x in state.value["a"]))
    assert sums() == 2.0


def test_an_error_of_the_function_is_not_hidden_by_a_change_in_place():
    state = sf.State({"a": jnp.ones(2)})

    @sf.filter_jit
    def step():
        set_item(state.value)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        step()


# -- where a State was created ------------------------------------------------------


def place(state: sf.State) -> str:
    """What errors say about the place, taken from one."""
    with pytest.raises(sf.StateTypeError) as error:
        hash(state)
    found = re.search(r"\(created at (.*)\) was hashed", str(error.value))
    assert found is not None
    return found[1]


def make_state() -> tuple[sf.State, str]:
    return sf.State(0), here()


def test_the_place_is_the_line_that_called_the_class():
    assert all(place(state) == where for state, where in (make_state(), make_state()))
    cases = [
        (sf.Param(0), here()),
        (Cache(0, 1), here()),
        (next(sf.State(0) for _ in range(1)), here()),
    ]
    assert [place(state) for state, _ in cases] == [where for _, where in cases]


def line_of(text: str) -> str:
    lines = pathlib.Path(__file__).read_text().splitlines()
    (line,) = (i for i, source in enumerate(lines, 1) if text in source.split("  #")[0])
    return f"{__file__}:{line}"


def test_the_place_in_a_module_is_the_line_in_its_init():
    assert place(Counter().count) == line_of("self.count = sf.State(0, " + "name=")


def test_the_place_of_a_default_is_the_line_of_its_factory():
    assert place(Normed().mean) == line_of("mean: sf.State = eqx.field(default_" + "fa")


def test_the_place_of_a_state_made_by_a_generated_init_is_its_caller():
    # `dataclasses` writes the code that calls the constructor: it has no file.
    make = functools.partial(sf.State, 0)

    @dataclasses.dataclass
    class Config:
        state: sf.State = dataclasses.field(default_factory=make)

    class Net(eqx.Module):
        config: Config = dataclasses.field(default_factory=Config)
        state: sf.State = dataclasses.field(default_factory=make)

    config, where = Config(), here()
    assert place(config.state) == where
    net, where = Net(), here()
    assert place(net.state) == place(net.config.state) == where


@pytest.mark.parametrize("copied", [copy.copy, *COPIES.values()])
def test_copies_keep_the_place(copied):
    state, where = sf.State(0, name="s"), here()
    assert place(copied(state)) == where


def test_the_place_of_a_state_made_under_jit_is_the_users_line():
    @sf.filter_jit
    def make():
        return Counter()

    assert place(make().count) == line_of("self.count = sf.State(0, " + "name=")


def test_the_place_in_code_that_is_no_file():
    # A notebook cell, a doctest, what is typed at the prompt.
    source = "import statefun\n\ndef f():\n    return statefun.State(0)\n"
    space: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source, "<prompt>", "exec"), space)
    assert place(space["f"]()) == "<prompt>:4"


def test_errors_name_the_path_once_it_is_known():
    model = {"net": Holder([sf.State(0), sf.Param((sf.State(0), jnp.ones(2)))])}
    first, second = model["net"].content
    inner = second.value[0]
    for state in (first, second, inner):
        assert "` (created" not in describe(state)
    sf.states(model)
    assert describe(first).startswith("State at `['net'].content[0]` (created at ")
    assert describe(second).startswith("Param at `['net'].content[1]` (created at ")
    assert describe(inner).startswith("State at `['net'].content[1].value[0]` (created")


def describe(state: sf.State) -> str:
    with pytest.raises(sf.StateTypeError) as error:
        hash(state)
    return first_line(error)


def test_a_state_of_an_argument_is_named_by_its_place_in_the_arguments():
    @sf.filter_jit
    def step(module):
        def body(x):
            module.count.value = x
            return x

        return jax.grad(body)(jnp.ones(()))

    named = r"^State 'count' at `module\.count` \(created at .* was written"
    with pytest.raises(sf.StateTraceError, match=named):
        step(Counter())


# -- kinds with attributes, and kinds that give out something else ------------------


class Scaled(sf.State):
    def __init__(self, value, scale, name=None):
        super().__init__(value, name=name)
        self.scale = scale


class OneState(eqx.Module):
    state: sf.State


@pytest.mark.parametrize(
    ("a", "b"), [(2, 3), ([1], [2]), (jnp.array(2.0), jnp.array(3.0)), (1, 1.0)]
)
def test_a_program_is_not_shared_by_states_whose_attributes_differ(a, b):
    seen = []
    jitted = sf.filter_jit(lambda m: seen.append(m.state.scale))
    for scale in (a, b, a):
        jitted(OneState(Scaled(jnp.array(1.0), scale)))
    assert [str(s) for s in seen] == [str(a), str(b)]


def test_a_program_is_not_shared_by_states_whose_names_differ():
    jitted = sf.filter_jit(lambda m: {m.state.name: m.state.value})
    for name in ("first", "second"):
        assert list(jitted(OneState(sf.State(jnp.array(1), name=name)))) == [name]


class Tagged(sf.State):
    __slots__ = ("tag",)


def set_scale(state):
    state.scale = 7


def add_attribute(state):
    state.more = state.value


def delete_attribute(state):
    del state.scale


def change_in_place(state):
    state.scale.append(2)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (set_scale, "scale"),
        (add_attribute, "more"),
        (delete_attribute, "scale"),
        (change_in_place, "scale"),
    ],
)
@pytest.mark.parametrize(
    "call",
    [
        lambda f, m: sf.filter_jit(f)(m),
        lambda f, m: sf.filter_jit(lambda m: sf.filter_jit(f)(m))(m),
        lambda f, m: sf.filter_jit(lambda m: sf.filter_grad(lambda x: f(m))(1.0))(m),
        lambda f, m: sf.StatefulFunction(f).get_states(m),
    ],
    ids="jit jit(jit) jit(grad) get_states".split(),
)
def test_an_attribute_that_is_changed_inside_a_traced_function_is_refused(
    call, change, name
):
    state = Scaled(jnp.array(1.0), [1], name="a")

    def f(m):
        m.state.value += 1
        change(m.state)
        return m.state.value

    for _ in range(2):
        with pytest.raises(
            sf.StateTypeError, match=rf"^the attribute `{name}` of Scaled 'a' at "
        ):
            call(f, OneState(state))
    assert (state.value, vars(state)) == (1.0, {"scale": [1]})


def test_an_attribute_that_is_set_before_the_function_raises_is_forgotten():
    seen = []

    @sf.filter_jit
    def f(m):
        seen.append(getattr(m.state, "tag", None))
        m.state.tag = "changed"
        raise ZeroDivisionError

    state = Tagged(jnp.array(1.0))
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            f(OneState(state))
        assert not hasattr(state, "tag")
    state.tag = "mine"
    with pytest.raises(ZeroDivisionError):
        f(OneState(state))
    assert seen == [None, None, "mine"]


def test_an_attribute_that_ends_as_it_was_may_be_set():
    @sf.filter_jit
    def f(m):
        m.state.scale, before = 7, m.state.scale
        m.state.value *= m.state.scale
        m.state.scale = before

    state = Scaled(jnp.array(1.0), 3)
    f(OneState(state))
    f(OneState(state))
    assert (state.value, state.scale) == (49.0, 3)


class Positive(sf.Param):
    """Holds the logarithm."""

    def __init__(self, value):
        super().__init__(jnp.log(value))

    @property
    def value(self):
        return jnp.exp(sf.Param.value.fget(self))

    @value.setter
    def value(self, new):
        sf.Param.value.fset(self, jnp.log(new))


def test_a_kind_that_overrides_value_is_copied_updated_and_trained_as_it_is_held():
    p = Positive(jnp.array(3.0))
    sf.update(p, sf.freeze(p))
    for state in (p, sf.clone(p), copy.deepcopy(p), pickle.loads(pickle.dumps(p))):
        assert jnp.allclose(state.value, 3.0)
    optimizer = sf.Optimizer(optax.sgd(0.01), p)
    optimizer.update(sf.filter_grad(lambda: p.value**2, wrt=p)())
    assert jnp.allclose(jnp.log(p.value), jnp.log(3.0) - 0.01 * 18, atol=1e-5)
