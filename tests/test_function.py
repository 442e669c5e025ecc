"""`StatefulFunction`: what it says of a function, and what its two calls do."""

import copy
import functools
import inspect
import pickle

import cloudpickle
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import statefun as sf


class Touching:
    """A function that uses its four States in the four ways there are.

    In order of first access: `mixed` (read, then written), `written`, `seen` (only
    read) and `refilled` (written, then read: its incoming value is of no use).
    """

    def __init__(self):
        self.mixed = sf.State(jnp.arange(3.0), name="mixed")
        self.written = sf.State({"b": 1, "a": jnp.zeros(2)}, name="written")
        self.seen = sf.State((jnp.ones(4), "tag"), name="seen")
        self.refilled = sf.State(jnp.array(7), name="refilled")
        self.untouched = sf.State(jnp.array(0.0), name="untouched")
        self.traces = 0

    @property
    def states(self):
        return self.mixed, self.written, self.seen, self.refilled

    def __call__(self, x, *, scale):
        self.traces += 1
        self.mixed.value = self.mixed.value + x["left"]
        self.written.value = {"a": x["right"], "b": jnp.array(2)}
        vector, tag = self.seen.value
        self.refilled.value = jnp.array(5)
        total = self.refilled.value.astype(jnp.float32) + vector.sum()
        return {"total": total * scale, "tag": tag, "n": 3}


X = {"right": jnp.full(2, 4.0), "left": jnp.ones(3)}
SCALE = jnp.array(10.0)


def shapes(variables):
    return [(v.aval.shape, v.aval.dtype.name) for v in variables]


def values_of(states):
    return [state.value for state in states]


def assert_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        if eqx.is_array(a):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        else:
            assert a == b


# -- the constructor ----------------------------------------------------------------


def test_the_signature_of_the_constructor_is_the_specified_one():
    parameters = inspect.signature(sf.StatefulFunction).parameters
    defaults = {name: p.default for name, p in parameters.items() if name != "fun"}
    assert next(iter(parameters)) == "fun"
    assert defaults == {
        "static_argnums": (),
        "static_argnames": (),
        "axis_env": None,
        "name": None,
        "return_only_write": True,
        "ir_optimizations": None,
    }


def test_options_are_attributes_of_the_same_names():
    def f(x, n, *, mode):
        return x

    fn = sf.StatefulFunction(f, (1,), ("mode",), [("i", 4)], "step", False, ["cse"])
    assert fn.fun is f
    assert fn.static_argnums == (1,)
    assert fn.static_argnames == ("mode",)
    assert fn.axis_env == [("i", 4)]
    assert fn.name == "step"
    assert fn.return_only_write is False
    assert fn.ir_optimizations == ["cse"]


def test_a_single_static_argument_needs_no_tuple():
    fn = sf.StatefulFunction(lambda n, mode: (n, mode), 0, "mode")
    assert fn.static_argnums == (0,)
    assert fn.static_argnames == ("mode",)
    assert fn(3, mode="train") == (3, "train")


class Doubler(eqx.Module):
    weight: jax.Array
    count: sf.State

    def __call__(self, x):
        self.count.value += 1
        return self.weight * x

    def halve(self, x):
        self.count.value += 1
        return x / self.weight


def doubler():
    return Doubler(jnp.array(2.0), sf.State(jnp.array(0), name="count"))


def bump(count, x, *, by):
    count.value += by
    return x + by


def test_the_name_is_that_of_the_function_unless_given():
    assert sf.StatefulFunction(bump).name == "bump"
    assert sf.StatefulFunction(functools.partial(bump, by=2)).name == "bump"
    assert sf.StatefulFunction(doubler().halve).name == "halve"
    assert sf.StatefulFunction(doubler()).name == "Doubler"
    assert sf.StatefulFunction(bump, name="other").name == "other"
    assert "other" in repr(sf.StatefulFunction(bump, name="other"))


def test_the_compiled_program_has_the_name():
    fn = sf.filter_jit(lambda x: x + 1, name="my_step")
    assert "my_step" in fn.lower(jnp.ones(2)).as_text()


def test_what_is_not_callable_is_refused():
    with pytest.raises(TypeError, match=r"^fun has to be callable, but is 3\."):
        sf.StatefulFunction(3)  # type: ignore[arg-type]


# -- what a function may be ---------------------------------------------------------


def test_a_function_may_be_a_partial():
    count = sf.State(jnp.array(0))
    fn = sf.StatefulFunction(functools.partial(bump, count, by=2))
    assert fn(jnp.array(1)) == 3
    assert count.value == 2
    assert fn.get_states(jnp.array(1)) == (count,)


def test_a_function_may_be_a_module():
    module = doubler()
    fn = sf.StatefulFunction(module)
    assert fn(jnp.array(3.0)) == 6.0
    assert module.count.value == 1
    assert fn.get_write_states(jnp.array(3.0)) == (module.count,)


def test_a_function_may_be_a_bound_method():
    module = doubler()
    fn = sf.StatefulFunction(module.halve)
    assert fn(jnp.array(3.0)) == 1.5
    assert module.count.value == 1


class Attached:
    """An ordinary object: its attributes may be assigned anew."""

    def __init__(self):
        self.count = sf.State(jnp.array(0))

    def step(self, x):
        self.count.value += 1
        return x + self.count.value


def test_a_function_may_be_a_bound_method_of_a_plain_object():
    obj = Attached()
    fn = sf.StatefulFunction(obj.step)
    assert (fn(jnp.array(0)), fn(jnp.array(0))) == (1, 2)
    obj.count = sf.State(jnp.array(10))
    assert fn(jnp.array(0)) == 11


LARGE = np.arange(4096, dtype=np.float32)


class Table(eqx.Module):
    rows: jax.Array

    def __call__(self, i):
        return self.rows[i]

    def look_up(self, i):
        return self.rows[i]


def row(rows, i):
    return rows[i]


def closing_over(kind):
    rows = jnp.asarray(LARGE)
    if kind == "closure":
        return lambda i: rows[i]
    if kind == "partial":
        return functools.partial(row, rows)
    return Table(rows) if kind == "module" else Table(rows).look_up


@pytest.mark.parametrize("kind", ["closure", "partial", "module", "bound method"])
def test_arrays_of_the_function_are_inputs_of_the_compiled_code_not_constants(kind):
    fun = closing_over(kind)
    text = sf.filter_jit(fun).lower(jnp.array(5)).as_text()
    assert "tensor<4096xf32>" in text
    constants = [line for line in text.splitlines() if "stablehlo.constant" in line]
    assert not any("tensor<4096xf32>" in line for line in constants)
    assert sf.StatefulFunction(fun)(jnp.array(5)) == 5.0


def test_modules_of_the_same_structure_as_functions_each_use_their_own_arrays():
    one, two = Table(jnp.arange(3.0)), Table(jnp.arange(3.0) + 10)
    i = jnp.array(1)
    functions = [sf.StatefulFunction(table) for table in (one, two)]
    assert [fn(i) for fn in functions] == [1.0, 11.0]
    assert [fn(i) for fn in functions] == [1.0, 11.0]


# -- questions ----------------------------------------------------------------------


def test_make_jaxpr_traces_once_and_returns_the_function_itself():
    fun = Touching()
    fn = sf.StatefulFunction(fun)
    assert fn.make_jaxpr(X, scale=SCALE) is fn
    assert fn.make_jaxpr(X, scale=SCALE) is fn
    assert fun.traces == 1


def test_one_trace_serves_every_question_and_both_calls():
    fun = Touching()
    fn = sf.StatefulFunction(fun)
    fn.get_jaxpr(X, scale=SCALE)
    fn.get_states(X, scale=SCALE)
    fn.get_out_shapes(X, scale=SCALE)
    fn.jaxpr_call(values_of(fun.states), X, scale=SCALE)
    fn(X, scale=SCALE)
    fn(X, scale=SCALE)
    assert fun.traces == 1


def test_questions_change_no_state():
    fun = Touching()
    before = values_of(fun.states)
    fn = sf.StatefulFunction(fun)
    fn.make_jaxpr(X, scale=SCALE)
    fn.get_out_shapes(X, scale=SCALE)
    fn.get_state_trace(X, scale=SCALE)
    assert_equal(values_of(fun.states), before)


def test_states_are_listed_in_order_of_first_access():
    fun = Touching()
    fn = sf.StatefulFunction(fun)
    assert fn.get_states(X, scale=SCALE) == fun.states


def test_a_state_is_read_if_its_incoming_value_is_used_and_written_if_assigned():
    fun = Touching()
    fn = sf.StatefulFunction(fun)
    assert fn.get_read_states(X, scale=SCALE) == (fun.mixed, fun.seen)
    written = (fun.mixed, fun.written, fun.refilled)
    assert fn.get_write_states(X, scale=SCALE) == written


def test_the_answers_are_tuples_of_the_very_states():
    fun = Touching()
    fn = sf.StatefulFunction(fun)
    for method in (fn.get_states, fn.get_read_states, fn.get_write_states):
        answer = method(X, scale=SCALE)
        assert type(answer) is tuple
        assert all(isinstance(state, sf.State) for state in answer)
    assert fn.get_states(X, scale=SCALE)[0] is fun.mixed


def test_the_inputs_of_the_jaxpr_are_the_arguments_and_then_the_read_states():
    fn = sf.StatefulFunction(Touching())
    closed = fn.get_jaxpr(X, scale=SCALE)
    f32 = "float32"
    assert shapes(closed.jaxpr.invars) == [
        ((3,), f32),  # X["left"]: dicts flatten by key
        ((2,), f32),  # X["right"]
        ((), f32),  # scale
        ((3,), f32),  # mixed
        ((4,), f32),  # seen, of which the string is static
    ]


def test_the_outputs_of_the_jaxpr_are_the_result_and_then_the_written_states():
    fn = sf.StatefulFunction(Touching())
    closed = fn.get_jaxpr(X, scale=SCALE)
    f32, i32 = "float32", "int32"
    assert shapes(closed.jaxpr.outvars) == [
        ((), f32),  # total: the rest of the result is static
        ((3,), f32),  # mixed
        ((2,), f32),  # written["a"]
        ((), i32),  # written["b"]
        ((), i32),  # refilled
    ]


def test_without_return_only_write_every_state_is_an_output():
    fn = sf.StatefulFunction(Touching(), return_only_write=False)
    closed = fn.get_jaxpr(X, scale=SCALE)
    f32, i32 = "float32", "int32"
    assert shapes(closed.jaxpr.outvars) == [
        ((), f32),  # total
        ((3,), f32),  # mixed
        ((2,), f32),  # written["a"]
        ((), i32),  # written["b"]
        ((4,), f32),  # seen
        ((), i32),  # refilled
    ]
    # The same inputs: no State becomes one because it is returned.
    assert len(closed.jaxpr.invars) == 5


@pytest.mark.parametrize("return_only_write", [True, False])
def test_the_jaxpr_is_pure_and_computes_what_a_call_does(return_only_write):
    fun = Touching()
    fn = sf.StatefulFunction(fun, return_only_write=return_only_write)
    closed = fn.get_jaxpr(X, scale=SCALE)
    inputs = [X["left"], X["right"], SCALE, fun.mixed.value, fun.seen.value[0]]
    before = values_of(fun.states)
    total, mixed, *_ = jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *inputs)
    assert_equal(values_of(fun.states), before)
    out = fn(X, scale=SCALE)
    assert_equal(out["total"], total)
    assert_equal(fun.mixed.value, mixed)


def test_no_state_equation_is_left_in_the_jaxpr():
    fn = sf.StatefulFunction(Touching())
    text = str(fn.get_jaxpr(X, scale=SCALE))
    assert "state_read" not in text
    assert "state_probe" not in text


def test_out_shapes_are_those_of_the_result_and_of_the_returned_states():
    fn = sf.StatefulFunction(Touching())
    out, states = fn.get_out_shapes(X, scale=SCALE)
    f32, i32 = jnp.float32, jnp.int32
    assert out == {"total": jax.ShapeDtypeStruct((), f32), "tag": "tag", "n": 3}
    assert states == (
        jax.ShapeDtypeStruct((3,), f32),
        {"a": jax.ShapeDtypeStruct((2,), f32), "b": jax.ShapeDtypeStruct((), i32)},
        jax.ShapeDtypeStruct((), i32),
    )


def test_out_shapes_without_return_only_write_are_those_of_all_states():
    fn = sf.StatefulFunction(Touching(), return_only_write=False)
    states = fn.get_out_shapes(X, scale=SCALE)[1]
    assert len(states) == 4
    assert states[2] == (jax.ShapeDtypeStruct((4,), jnp.float32), "tag")


def test_out_treedef_is_the_structure_of_the_out_shapes():
    fn = sf.StatefulFunction(Touching())
    treedef = fn.get_out_treedef(X, scale=SCALE)
    assert treedef == jax.tree.structure(fn.get_out_shapes(X, scale=SCALE))
    assert treedef.num_leaves == 3 + 4


def test_the_state_trace_is_the_record_of_the_trace():
    fun = Touching()
    record = sf.StatefulFunction(fun).get_state_trace(X, scale=SCALE)
    assert record.states == fun.states
    assert record.reads == (fun.mixed, fun.seen)
    assert record.writes == (fun.mixed, fun.written, fun.refilled)
    found = [[(a.shape, a.dtype.name) for a in avals] for avals in record.avals]
    assert found == [
        [((3,), "float32")],
        [((2,), "float32"), ((), "int32")],
        [((4,), "float32")],
        [((), "int32")],
    ]


def test_avals_are_those_at_trace_time():
    s = sf.State(jnp.zeros(3))
    fn = sf.StatefulFunction(lambda: s.value.sum())
    key = fn.get_arg_cache_key(compile_if_miss=True)
    s.value = jnp.zeros(8)
    assert fn.get_state_trace_by_cache(key).avals[0][0].shape == (3,)


FAMILY = [
    "jaxpr",
    "out_shapes",
    "out_treedef",
    "states",
    "read_states",
    "write_states",
    "state_trace",
]


@pytest.mark.parametrize("what", FAMILY)
def test_each_question_can_be_asked_by_key(what):
    fn = sf.StatefulFunction(Touching())
    by_arguments = getattr(fn, f"get_{what}")(X, scale=SCALE)
    key = fn.get_arg_cache_key(X, scale=SCALE)
    by_key = getattr(fn, f"get_{what}_by_cache")(key)
    if what == "jaxpr":
        assert str(by_key) == str(by_arguments)
    else:
        assert by_key == by_arguments


@pytest.mark.parametrize("what", FAMILY)
@pytest.mark.parametrize("warm", [False, True])
def test_an_unknown_key_raises_and_shows_the_key_and_those_there_are(what, warm):
    fn = sf.StatefulFunction(lambda x: x, name="step")
    known = fn.get_arg_cache_key(jnp.ones(2), compile_if_miss=warm)
    asked = fn.get_arg_cache_key(jnp.ones((4, 5)))
    message = r"^step: nothing was traced for this key\."
    with pytest.raises(ValueError, match=message) as caught:
        getattr(fn, f"get_{what}_by_cache")(asked)
    assert str(asked) in str(caught.value)
    assert (str(known) in str(caught.value)) == warm


def test_validate_states_refuses_an_unknown_key_too():
    fn = sf.StatefulFunction(lambda x: x, name="step")
    with pytest.raises(ValueError, match=r"^step: nothing was traced for this key\."):
        fn.validate_states(fn.get_arg_cache_key(jnp.ones(2)))


def test_get_jaxpr_traces_on_a_miss_unless_told_not_to():
    fun = Touching()
    fn = sf.StatefulFunction(fun)
    with pytest.raises(ValueError, match=r"nothing was traced for this key\."):
        fn.get_jaxpr(X, scale=SCALE, compile_if_miss=False)
    assert fun.traces == 0
    assert fn.get_cache_stats()["compilation_cache"]["size"] == 0
    jaxpr = fn.get_jaxpr(X, scale=SCALE)
    assert fun.traces == 1
    assert fn.get_jaxpr(X, scale=SCALE, compile_if_miss=False) is jaxpr


def test_get_arg_cache_key_traces_only_if_told_to():
    fun = Touching()
    fn = sf.StatefulFunction(fun)
    key = fn.get_arg_cache_key(X, scale=SCALE)
    assert fun.traces == 0
    assert fn.get_arg_cache_key(X, scale=SCALE, compile_if_miss=True) == key
    assert fun.traces == 1


# -- jaxpr_call ---------------------------------------------------------------------


def counter():
    """Two States and a function; `x` shifts the first, the second is only read."""
    total = sf.State(jnp.zeros(2), name="total")
    factor = sf.State(jnp.full(2, 3.0), name="factor")

    def step(x):
        total.value = total.value + x
        return total.value * factor.value

    return total, factor, step


def test_jaxpr_call_is_pure():
    total, factor, step = counter()
    fn = sf.StatefulFunction(step)
    x = jnp.ones(2)
    given = jnp.array([10.0, 20.0]), jnp.array([2.0, 2.0])
    new, out = fn.jaxpr_call(given, x)
    np.testing.assert_array_equal(out, [22.0, 42.0])
    np.testing.assert_array_equal(new[0], [11.0, 21.0])
    np.testing.assert_array_equal(total.value, [0.0, 0.0])
    np.testing.assert_array_equal(factor.value, [3.0, 3.0])


def test_jaxpr_call_gives_none_for_a_state_that_was_only_read():
    _, _, step = counter()
    new, _ = sf.StatefulFunction(step).jaxpr_call(
        (jnp.ones(2), jnp.ones(2)), jnp.ones(2)
    )
    assert type(new) is tuple
    assert len(new) == 2
    assert new[1] is None


def test_jaxpr_call_without_return_only_write_gives_every_value():
    _, _, step = counter()
    fn = sf.StatefulFunction(step, return_only_write=False)
    given = jnp.ones(2), jnp.array([5.0, 6.0])
    new, _ = fn.jaxpr_call(given, jnp.ones(2))
    np.testing.assert_array_equal(new[0], [2.0, 2.0])
    np.testing.assert_array_equal(new[1], given[1])


def test_jaxpr_call_has_an_entry_for_each_state_and_none_is_needed_where_only_written():
    fun = Touching()
    fn = sf.StatefulFunction(fun)
    given = jnp.zeros(3), None, (jnp.ones(4), "tag"), None
    new, out = fn.jaxpr_call(given, X, scale=SCALE)
    assert_equal(new[0], X["left"])
    assert_equal(new[1], {"a": X["right"], "b": jnp.array(2)})
    assert new[2] is None
    assert_equal(new[3], jnp.array(5))
    assert_equal(out, {"total": jnp.array(90.0), "tag": "tag", "n": 3})


def test_jaxpr_call_without_return_only_write_gives_a_value_to_a_written_state_too():
    fun = Touching()
    fn = sf.StatefulFunction(fun, return_only_write=False)
    new, _ = fn.jaxpr_call(values_of(fun.states), X, scale=SCALE)
    assert all(value is not None for value in new)
    assert_equal(new[2], fun.seen.value)


def test_jaxpr_call_agrees_with_a_call():
    fun = Touching()
    fn = sf.StatefulFunction(fun)
    new, out = fn.jaxpr_call(values_of(fun.states), X, scale=SCALE)
    assert_equal(out, fn(X, scale=SCALE))
    for state, value in zip(fun.states, new, strict=True):
        if value is not None:
            assert_equal(state.value, value)


def test_jaxpr_call_works_under_jit():
    total, _, step = counter()
    fn = sf.StatefulFunction(step)
    given = jnp.ones(2), jnp.ones(2)
    x = jnp.ones(2)
    plain = fn.jaxpr_call(given, x)
    assert_equal(jax.jit(fn.jaxpr_call)(given, x), plain)
    np.testing.assert_array_equal(total.value, [0.0, 0.0])


def test_jaxpr_call_works_under_jit_where_it_is_traced_for_the_first_time():
    total, _, step = counter()
    fn = sf.StatefulFunction(step)
    new, out = jax.jit(fn.jaxpr_call)((jnp.ones(2), jnp.ones(2)), jnp.ones(2))
    np.testing.assert_array_equal(out, [2.0, 2.0])
    np.testing.assert_array_equal(new[0], [2.0, 2.0])
    # What was traced there holds no tracer of that `jax.jit`.
    np.testing.assert_array_equal(fn(jnp.ones(2)), [3.0, 3.0])
    np.testing.assert_array_equal(total.value, [1.0, 1.0])


def test_jaxpr_call_works_under_grad():
    _, _, step = counter()
    fn = sf.StatefulFunction(step)

    def loss(values, x):
        return fn.jaxpr_call(values, x)[1].sum()

    given, x = (jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])), jnp.array([5.0, 6.0])
    by_values, by_x = jax.grad(loss, argnums=(0, 1))(given, x)
    np.testing.assert_array_equal(by_values[0], given[1])
    np.testing.assert_array_equal(by_values[1], given[0] + x)
    np.testing.assert_array_equal(by_x, given[1])


def test_jaxpr_call_works_under_vmap():
    _, _, step = counter()
    fn = sf.StatefulFunction(step)
    totals, x = jnp.arange(6.0).reshape(3, 2), jnp.ones(2)
    (new, _), out = jax.vmap(lambda t: fn.jaxpr_call((t, jnp.ones(2)), x))(totals)
    np.testing.assert_array_equal(new, totals + 1)
    np.testing.assert_array_equal(out, totals + 1)


def test_jaxpr_call_works_under_scan():
    total, _, step = counter()
    fn = sf.StatefulFunction(step)
    factor = jnp.full(2, 2.0)

    def body(carry, x):
        (new, _), out = fn.jaxpr_call((carry, factor), x)
        return new, out

    last, outs = lax.scan(body, jnp.zeros(2), jnp.ones((4, 2)))
    np.testing.assert_array_equal(last, [4.0, 4.0])
    np.testing.assert_array_equal(outs[:, 0], [2.0, 4.0, 6.0, 8.0])
    np.testing.assert_array_equal(total.value, [0.0, 0.0])


def test_jaxpr_call_inside_a_function_that_is_traced_touches_no_state():
    _, _, step = counter()
    inner = sf.StatefulFunction(step)
    outer = sf.StatefulFunction(
        lambda x: inner.jaxpr_call((jnp.ones(2), jnp.ones(2)), x)[1]
    )
    np.testing.assert_array_equal(outer(jnp.ones(2)), [2.0, 2.0])
    assert outer.get_states(jnp.ones(2)) == ()


@pytest.mark.parametrize("n", [0, 1, 3])
def test_jaxpr_call_refuses_a_wrong_number_of_values(n):
    _, _, step = counter()
    fn = sf.StatefulFunction(step)
    message = (
        rf"^state_vals has {n} values, but the function touches 2 States: .*'total'"
    )
    with pytest.raises(ValueError, match=message):
        fn.jaxpr_call((jnp.ones(2),) * n, jnp.ones(2))


@pytest.mark.parametrize(
    "wrong",
    [jnp.ones(3), jnp.ones((2, 1)), jnp.ones(2, jnp.int32), {"x": jnp.ones(2)}, None],
    ids=["shape", "rank", "dtype", "structure", "nothing"],
)
def test_jaxpr_call_refuses_a_value_that_does_not_fit_and_names_the_state(wrong):
    _, _, step = counter()
    fn = sf.StatefulFunction(step)
    message = r"^state_vals has a value for State 'factor' \(created at .*test_function"
    with pytest.raises(ValueError, match=message):
        fn.jaxpr_call((jnp.ones(2), wrong), jnp.ones(2))


def test_jaxpr_call_refuses_another_static_part_of_a_value():
    fun = Touching()
    fn = sf.StatefulFunction(fun)
    given = jnp.zeros(3), None, (jnp.ones(4), "other"), None
    message = r"^state_vals has a value for State 'seen'"
    with pytest.raises(ValueError, match=message):
        fn.jaxpr_call(given, X, scale=SCALE)


def test_jaxpr_call_auto_is_the_call():
    total, _, step = counter()
    fn = sf.StatefulFunction(step)
    np.testing.assert_array_equal(fn.jaxpr_call_auto(jnp.ones(2)), [3.0, 3.0])
    np.testing.assert_array_equal(fn(jnp.ones(2)), [6.0, 6.0])
    np.testing.assert_array_equal(total.value, [2.0, 2.0])


# -- calls --------------------------------------------------------------------------


def compilations():
    """Counts what XLA is given to compile, in every call from now on."""
    seen = []

    def listen(event, *_, **__):
        if "backend_compile" in event:
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return seen, lambda: jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("arguments", [0, 1, 2])
def test_calls_run_compiled_and_are_compiled_once(arguments):
    s = sf.State(jnp.zeros(2))
    given = [jnp.ones(2)] * arguments

    def step(*args):
        for arg in args:
            s.value = s.value + arg
        return s.value * 2

    fn = sf.StatefulFunction(step)
    seen, stop = compilations()
    try:
        counts = []
        for _ in range(4):
            before = len(seen)
            fn(*given)
            counts.append(len(seen) - before)
    finally:
        stop()
    assert counts == [1, 0, 0, 0]
    np.testing.assert_array_equal(s.value, jnp.full(2, 4.0 * arguments))


def counting(fun):
    """`fun`, and a list that grows by one with every run of it."""
    runs = []

    @functools.wraps(fun)
    def counted(*args, **kwargs):
        runs.append(1)
        return fun(*args, **kwargs)

    return counted, runs


CHANGES = {
    "shape": (jnp.zeros(3), jnp.zeros(4)),
    "dtype": (jnp.zeros(3), jnp.zeros(3, jnp.int32)),
    "structure": ({"a": jnp.zeros(3)}, {"b": jnp.zeros(3)}),
    "static leaf": (("train", jnp.zeros(3)), ("eval", jnp.zeros(3))),
    "static type": ((True, np.zeros(3), "x"), (jnp.array(1), np.zeros(3), "x")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_state_is_traced_again_and_the_earlier_trace_is_still_there(change):
    one, two = CHANGES[change]
    s = sf.State(one)
    fun, runs = counting(lambda: (s.value, "out"))
    fn = sf.StatefulFunction(fun)
    for value in (one, two, one, two, one, two):
        s.value = value
        assert_equal(fn(), (s.value, "out"))
    assert len(runs) == 2
    assert fn.get_cache_stats()["compilation_cache"]["size"] == 2


def test_a_state_that_changes_its_own_structure_is_traced_for_each():
    s = sf.State({"n": jnp.array(0)}, name="s")

    def step():
        if "n" in s.value:
            s.value = (s.value["n"] + 1, "tuple")
        else:
            s.value = {"n": s.value[0] + 1}

    fun, runs = counting(step)
    fn = sf.StatefulFunction(fun)
    for _ in range(6):
        fn()
    assert_equal(s.value, {"n": jnp.array(6)})
    assert len(runs) == 2


def test_a_number_that_is_written_takes_the_present_dtype_also_where_it_was_traced():
    # Nothing of the State is read here, and yet the program depends on its dtype.
    s = sf.State(jnp.array(0.0))

    def reset():
        s.value = 1

    fn = sf.StatefulFunction(reset)
    for dtype in (jnp.float32, jnp.int32, jnp.float32, jnp.int8):
        s.value = jnp.array(3, dtype)
        fn()
        assert s.value.dtype == dtype
        assert s.value == 1


def test_an_exception_passes_through_and_nothing_is_written():
    s = sf.State(jnp.array(0), name="s")

    def step(x, fail):
        s.value += 1
        if fail:
            raise KeyError("mine")
        return x

    fn = sf.StatefulFunction(step)
    with pytest.raises(KeyError, match="mine"):
        fn(jnp.ones(2), True)
    assert s.value == 0
    fn(jnp.ones(2), False)
    assert s.value == 1


# -- States under an enclosing transform --------------------------------------------


def test_a_call_inside_another_functions_trace_hands_its_writes_on():
    total, factor, step = counter()
    inner = sf.StatefulFunction(step)
    fun, runs = counting(lambda x: inner(inner(x)))
    outer = sf.StatefulFunction(fun)
    # total: 0 + 1 = 1, out 3; 1 + 3 = 4, out 12. Then 4 + 1 = 5, out 15; 5 + 15 = 20.
    for expected in (12.0, 60.0):
        np.testing.assert_array_equal(outer(jnp.ones(2)), np.full(2, expected))
    np.testing.assert_array_equal(total.value, [20.0, 20.0])
    assert len(runs) == 1
    assert outer.get_states(jnp.ones(2)) == (total, factor)
    assert outer.get_read_states(jnp.ones(2)) == (total, factor)
    assert outer.get_write_states(jnp.ones(2)) == (total,)


def test_a_nested_call_sees_what_the_outer_function_has_written():
    s = sf.State(jnp.array(1.0))
    inner = sf.StatefulFunction(lambda: s.value * 2)

    def outer():
        s.value = jnp.array(5.0)
        doubled = inner()
        s.value = s.value + doubled
        return inner()

    fn = sf.StatefulFunction(outer)
    assert fn() == 30.0
    assert s.value == 15.0
    assert fn.get_read_states() == ()


def test_a_nested_call_sees_another_shape_that_the_outer_function_has_written():
    s = sf.State(jnp.zeros(2))
    inner_fun, runs = counting(lambda: s.value.sum())
    inner = sf.StatefulFunction(inner_fun)

    def outer():
        first = inner()
        s.value = jnp.ones(5)
        return first, inner()

    fn = sf.StatefulFunction(outer)
    assert fn() == (0.0, 5.0)
    assert len(runs) == 2
    assert fn() == (5.0, 5.0)


def test_the_body_of_a_nested_call_runs_once_at_any_depth():
    s = sf.State(jnp.array(0.0))

    def step(x):
        s.value = s.value + x
        return x

    fun, runs = counting(step)
    fn = sf.StatefulFunction(fun)
    for _ in range(5):
        fn = sf.StatefulFunction(functools.partial(lambda f, x: f(x), fn))
    fn(jnp.array(1.0))
    fn(jnp.array(1.0))
    assert len(runs) == 1
    assert s.value == 2.0


def test_an_outer_function_reads_only_what_the_nested_call_reads():
    short, long = sf.State(jnp.array(1.0)), sf.State(jnp.array(2.0))
    inner = sf.StatefulFunction(
        lambda x: x * (short.value if x.shape == (2,) else long.value)
    )
    inner(jnp.ones(2))
    inner(jnp.ones(3))
    outer = sf.StatefulFunction(lambda x: inner(x))
    assert outer.get_read_states(jnp.ones(3)) == (long,)


def test_the_order_of_first_access_is_that_of_the_nested_call():
    a, b = sf.State(jnp.array(1.0)), sf.State(jnp.array(2.0))

    def step():
        a.value = jnp.array(5.0)
        return b.value

    inner = sf.StatefulFunction(step)
    assert inner.get_states() == (a, b)
    assert sf.StatefulFunction(lambda: inner()).get_states() == (a, b)


def test_a_function_may_call_itself():
    s = sf.State(jnp.array(0))

    def down(n, x):
        s.value += 1
        return x if n == 0 else fn(n - 1, x) + 1

    fn = sf.StatefulFunction(down)
    assert fn(3, jnp.array(0)) == 3
    assert s.value == 4
    assert fn(3, jnp.array(0)) == 3
    assert s.value == 8


def test_a_nested_call_may_close_over_tracers_of_the_outer_one():
    s = sf.State(jnp.array(1.0))

    def outer(x):
        inner = sf.StatefulFunction(lambda y: y * x + s.value)
        s.value = inner(x) + inner(x + 1)
        return s.value

    fn = sf.StatefulFunction(outer)
    # x = 2: 4 + 1 and 6 + 1
    assert fn(jnp.array(2.0)) == 12.0
    assert fn(jnp.array(1.0)) == 1 + 12 + 2 + 12
    assert s.value == 27.0


def test_a_call_that_writes_no_state_works_under_raw_transforms():
    s = sf.State(jnp.array(3.0))
    fn = sf.StatefulFunction(lambda x: x * x * s.value)
    x = jnp.array(2.0)
    assert jax.grad(fn)(x) == 12.0
    np.testing.assert_array_equal(jax.vmap(fn)(jnp.arange(3.0)), [0.0, 3.0, 12.0])
    s.value = jnp.array(5.0)
    assert jax.grad(fn)(x) == 20.0


def test_a_call_that_writes_a_state_is_refused_under_a_raw_transform():
    s = sf.State(jnp.array(3.0), name="mine")

    def step(x):
        s.value = s.value * x
        return s.value

    fn = sf.StatefulFunction(step)
    message = (
        r"^State 'mine' \(created at .*\) was written inside a raw JAX transform\."
    )
    for _ in range(2):  # traced for the first time, and from the cache
        with pytest.raises(sf.StateTraceError, match=message):
            jax.grad(fn)(jnp.array(2.0))
        assert s.value == 3.0
    assert fn(jnp.array(2.0)) == 6.0


# -- eager --------------------------------------------------------------------------


def test_disable_jit_runs_the_function_itself_with_the_same_effect():
    compiled, eager = Touching(), Touching()
    out = sf.StatefulFunction(compiled)(X, scale=SCALE)
    fn = sf.StatefulFunction(eager)
    with jax.disable_jit():
        assert_equal(fn(X, scale=SCALE), out)
        fn(X, scale=SCALE)
    assert eager.traces == 2
    eager_once = Touching()
    with jax.disable_jit():
        sf.StatefulFunction(eager_once)(X, scale=SCALE)
    assert_equal(values_of(eager_once.states), values_of(compiled.states))


def test_disable_jit_also_holds_for_what_was_compiled_before():
    s = sf.State(jnp.array(0))
    concrete = []

    def step(x):
        concrete.append(not isinstance(x, jax.core.Tracer))
        s.value += 1
        return x

    fn = sf.StatefulFunction(step)
    x = jnp.ones(2)
    fn(x)
    fn(x)
    with jax.disable_jit():
        fn(x)
    fn(x)
    assert concrete == [False, True]
    assert s.value == 4


def test_under_disable_jit_a_function_that_raises_changes_nothing():
    a, b = sf.State(jnp.array(0)), sf.State(jnp.array(0))

    def step():
        a.value += 1
        b.value = jnp.zeros(3)
        raise KeyError("mine")

    with jax.disable_jit(), pytest.raises(KeyError, match="mine"):
        sf.StatefulFunction(step)()
    assert a.value == 0
    assert b.value.shape == ()


def test_under_disable_jit_a_nested_call_commits_with_the_outer_one():
    s = sf.State(jnp.array(0))

    def bump():
        s.value += 1

    inner = sf.StatefulFunction(bump)

    def outer(fail):
        inner()
        inner()
        if fail:
            raise KeyError("mine")

    fn = sf.StatefulFunction(outer)
    with jax.disable_jit():
        with pytest.raises(KeyError, match="mine"):
            fn(True)
        assert s.value == 0
        fn(False)
    assert s.value == 2


def test_questions_are_answered_under_disable_jit():
    fun = Touching()
    fn = sf.StatefulFunction(fun)
    with jax.disable_jit():
        assert fn.get_states(X, scale=SCALE) == fun.states
        new, out = fn.jaxpr_call(values_of(fun.states), X, scale=SCALE)
    assert_equal(out, fn(X, scale=SCALE))
    assert_equal(new[0], fun.mixed.value)


# -- options ------------------------------------------------------------------------


def test_axis_env_traces_code_with_collectives():
    s = sf.State(jnp.array(0.0), name="s")

    def step(x):
        s.value = lax.psum(x, "i")
        return x - lax.pmean(x, "i")

    fn = sf.StatefulFunction(step, axis_env=[("i", 4)])
    x = jnp.array(1.0)
    assert "psum" in str(fn.get_jaxpr(x))
    assert fn.get_write_states(x) == (s,)
    batched = jax.vmap(lambda x: fn.jaxpr_call((None,), x), axis_name="i")
    (new,), out = batched(jnp.arange(4.0))
    np.testing.assert_array_equal(new, jnp.full(4, 6.0))
    np.testing.assert_array_equal(out, jnp.arange(4.0) - 1.5)
    assert s.value == 0.0


def test_make_jaxpr_takes_axis_env():
    fn = sf.make_jaxpr(lambda x: lax.psum(x, "i"), axis_env=[("i", 4)])
    closed, states = fn(jnp.array(1.0))
    assert "psum" in str(closed)
    assert states == ()


PASSES = ["constant_fold", "algebraic_simplification", "copy_propagation", "cse", "dce"]


def wasteful():
    s = sf.State(jnp.arange(1.0, 4.0), name="s")

    def step(x):
        _ = jnp.sin(x) * 4  # for dce
        a = jnp.exp(x) + s.value
        b = jnp.exp(x) + s.value  # for cse
        c = (a * 1 + 0) * (jnp.array(2.0) - 1)  # for the rest
        s.value = b
        return c + b

    return s, step


@pytest.mark.parametrize(
    "spec", [*PASSES, PASSES, tuple(reversed(PASSES)), (), None], ids=str
)
def test_optimisations_leave_result_and_states_as_they_are(spec):
    plain_state, plain = wasteful()
    state, step = wasteful()
    fn = sf.StatefulFunction(step, ir_optimizations=spec)
    expected = sf.StatefulFunction(plain)
    x = jnp.array([0.25, 0.5, 1.0])
    for _ in range(2):
        assert_equal(fn(x), expected(x))
        assert_equal(state.value, plain_state.value)
    given = (jnp.ones(3),)
    assert_equal(fn.jaxpr_call(given, x), expected.jaxpr_call(given, x))
    assert fn.get_write_states(x) == (state,)


def test_optimisations_are_run_on_the_jaxpr():
    size = {}
    for spec in (None, PASSES):
        _, step = wasteful()
        fn = sf.StatefulFunction(step, ir_optimizations=spec)
        size[spec is None] = len(fn.get_jaxpr(jnp.ones(3)).jaxpr.eqns)
    assert size[False] < size[True]


@pytest.mark.parametrize("spec", ["nonsense", ["cse", "nonsense"]])
def test_an_unknown_optimisation_is_refused_and_the_known_ones_are_listed(spec):
    with pytest.raises(ValueError, match=r"^Unknown optimization 'nonsense'") as caught:
        sf.StatefulFunction(lambda x: x, ir_optimizations=spec)
    for name in PASSES:
        assert name in str(caught.value)


# -- make_jaxpr ---------------------------------------------------------------------


def test_the_signature_of_make_jaxpr_is_the_specified_one():
    parameters = inspect.signature(sf.make_jaxpr).parameters
    assert {name: p.default for name, p in parameters.items() if name != "fun"} == {
        "static_argnums": (),
        "static_argnames": (),
        "axis_env": None,
        "return_shape": False,
        "return_only_write": False,
    }


def test_make_jaxpr_gives_the_jaxpr_and_the_states():
    fun = Touching()
    closed, states = sf.make_jaxpr(fun)(X, scale=SCALE)
    assert states == fun.states
    expected = sf.StatefulFunction(fun, return_only_write=False)
    assert str(closed) == str(expected.get_jaxpr(X, scale=SCALE))


def test_make_jaxpr_with_return_only_write_leaves_read_states_out():
    fun = Touching()
    closed, states = sf.make_jaxpr(fun, return_only_write=True)(X, scale=SCALE)
    assert states == fun.states
    assert len(closed.jaxpr.outvars) == 5


@pytest.mark.parametrize("return_only_write", [False, True])
def test_make_jaxpr_gives_the_shapes_where_asked(return_only_write):
    fun = Touching()
    make = sf.make_jaxpr(fun, return_shape=True, return_only_write=return_only_write)
    closed, states, shapes = make(X, scale=SCALE)
    fn = sf.StatefulFunction(fun, return_only_write=return_only_write)
    assert states == fun.states
    assert shapes == fn.get_out_shapes(X, scale=SCALE)[0]
    assert len(closed.jaxpr.outvars) == (5 if return_only_write else 6)


def test_make_jaxpr_takes_static_arguments():
    seen = []

    def f(x, n, *, mode):
        seen.append((n, mode))
        return x * n[0]

    make = sf.make_jaxpr(f, static_argnums=-1, static_argnames="mode")
    closed, _ = make(jnp.ones(2), (3,), mode=("a", "b"))
    assert seen == [((3,), ("a", "b"))]
    assert len(closed.jaxpr.invars) == 1


def test_make_jaxpr_keeps_the_name_of_the_function():
    assert sf.make_jaxpr(bump).__name__ == "bump"
    assert sf.make_jaxpr(bump).__wrapped__ is bump


def scaled(x, n):
    return n * x


@pytest.mark.parametrize(
    "copied",
    [
        copy.copy,
        copy.deepcopy,
        lambda fn: pickle.loads(pickle.dumps(fn)),
        lambda fn: cloudpickle.loads(cloudpickle.dumps(fn)),
    ],
)
def test_a_copy_has_the_options_and_an_empty_cache(copied):
    fn = sf.StatefulFunction(
        scaled, -1, axis_env=[("i", 4)], name="s", return_only_write=False
    )
    fn.get_jaxpr(SCALE, 2)
    other = copied(fn)
    assert other is not fn
    with pytest.raises(ValueError, match="nothing was traced"):
        other.get_jaxpr(SCALE, 2, compile_if_miss=False)
    for name in ("fun", "static_argnums", "axis_env", "name", "return_only_write"):
        assert getattr(other, name) == getattr(fn, name)
    assert other(SCALE, 2) == 20


# -- shapes for arrays ----------------------------------------------------------------


def test_questions_take_shapes_for_arrays():
    count = sf.State(jnp.array(0), name="count")

    @sf.StatefulFunction
    def f(module, x, *, y):
        count.value += 1
        return module(x) + y

    linear = eqx.nn.Linear(2, 3, key=jax.random.key(0))
    args = eqx.filter_eval_shape(lambda: (linear, jnp.ones(2), jnp.ones(3)))
    module, x, y = args
    assert f.get_out_shapes(module, x, y=y)[0] == y
    assert f.get_write_states(linear, x, y=y) == (count,)
    key = f.get_arg_cache_key(module, x, y=y)
    assert key == f.get_arg_cache_key(linear, jnp.ones(2), y=jnp.ones(3))
    assert f.get_jaxpr(linear, jnp.ones(2), y=jnp.ones(3), compile_if_miss=False)
    _, states, out = sf.make_jaxpr(f.fun, return_shape=True)(module, x, y=y)
    assert states == (count,) and out == y and count.value == 0


def test_a_shape_is_static_in_a_call_and_where_it_is_declared_so():
    def zeros(like):
        return jnp.zeros(like.shape, like.dtype)

    like = jax.ShapeDtypeStruct((2,), jnp.float32)
    assert sf.filter_jit(zeros)(like).shape == (2,)
    declared = sf.StatefulFunction(zeros, static_argnums=0)
    assert not declared.get_jaxpr(like).in_avals
    assert sf.StatefulFunction(zeros).jaxpr_call((), like)[1].shape == (2,)
