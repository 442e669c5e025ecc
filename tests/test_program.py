"""Traced programs: pure, complete, without tracers; and the same results every way.

The last part draws programs at random (`tests.reference`) and compares what they return
and leave in the States: eagerly, in one compiled call, and by `jaxpr_call`.
"""

import functools
import gc
import weakref
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st
from jax import lax

import statefun as sf
from tests.reference import (
    Argument,
    Assign,
    Call,
    Program,
    Read,
    Reference,
    Refused,
    bits,
    called,
    programs,
    stores,
    values,
)


def no_tracer_in(tree):
    return not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))


# -- a trace that raises ------------------------------------------------------------


class Broken(Exception):
    pass


def fail():
    raise Broken


def fail_in_scan():
    lax.scan(lambda c, x: fail(), 0, jnp.arange(3))


def fail_in_nested_call():
    sf.StatefulFunction(fail)()


def fail_in_jax():
    jnp.ones(2) @ jnp.ones(3)


FAILURES = [fail, fail_in_scan, fail_in_nested_call, fail_in_jax]


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("method", ["__call__", "make_jaxpr", "get_states"])
def test_a_failed_trace_leaves_every_state_as_it_was(failure, method):
    read = sf.State(jnp.ones(2))
    written = sf.State({"a": jnp.zeros(2)})
    reshaped = sf.State(jnp.array(1.0))
    states = read, written, reshaped
    before = [s.value for s in states]

    def step(x):
        written.value = {"b": read.value + x, "n": "static"}
        reshaped.value = jnp.ones((3, 3))
        failure()

    fn = sf.StatefulFunction(step)
    for _ in range(2):
        with pytest.raises((Broken, TypeError)):
            getattr(fn, method)(jnp.ones(2))
        for s, value in zip(states, before, strict=True):
            assert bits(s.value) == bits(value)
            assert no_tracer_in(s.value)
    # Each of them can be used and traced as if nothing had happened.
    total = sf.StatefulFunction(lambda: read.value.sum() + reshaped.value)
    assert total() == 3.0


def test_a_failed_retrace_with_another_tree_leaves_the_state_as_it_was():
    s = sf.State({"a": jnp.zeros(2)})

    def step(flag):
        s.value = {**s.value, "b": s.value["a"] + 1}
        if flag:
            raise Broken

    fn = sf.StatefulFunction(step)
    fn(False)
    with pytest.raises(Broken):
        fn(True)
    assert bits(s.value) == bits({"a": jnp.zeros(2), "b": jnp.ones(2)})
    fn(False)
    assert bits(s.value) == bits({"a": jnp.zeros(2), "b": jnp.ones(2)})


def test_a_nested_call_whose_exception_is_caught_has_no_effect():
    s = sf.State(jnp.array(1.0))
    other = sf.State(jnp.array(1.0))

    def inner_body():
        s.value = s.value * 100
        raise Broken

    inner = sf.StatefulFunction(inner_body)

    def outer():
        s.value = s.value + 1
        try:
            inner()
        except Broken:
            other.value = s.value * 10
        return s.value

    fn = sf.StatefulFunction(outer)
    assert fn() == 2.0
    assert (s.value, other.value) == (2.0, 20.0)
    assert fn() == 3.0
    assert (s.value, other.value) == (3.0, 30.0)


def test_a_failed_trace_for_a_question_inside_a_trace_leaves_the_outer_frame_alone():
    s = sf.State(jnp.array(1.0))

    def inner_body(x):
        s.value = x
        raise Broken

    inner = sf.StatefulFunction(inner_body)

    def outer(x):
        s.value = x * 2
        with pytest.raises(Broken):
            inner.get_jaxpr(x)
        return s.value

    assert sf.StatefulFunction(outer)(jnp.array(3.0)) == 6.0
    assert s.value == 6.0


# -- no tracer outlives its trace ---------------------------------------------------


class Model(eqx.Module):
    weight: sf.Param
    count: sf.State

    def __call__(self, x):
        self.count.value += 1
        return self.weight.value @ x


def model():
    return Model(sf.Param(jnp.ones((2, 2))), sf.State(jnp.array(0)))


@pytest.mark.usefixtures("checking_leaks")
def test_a_program_holds_no_tracer():
    net, table = model(), jnp.arange(3.0)
    inner = sf.StatefulFunction(lambda x: net(x) + table[0])

    def step(x, scale):
        y = inner(x) * scale.array
        net.weight.value = net.weight.value - y[0]
        return {"y": y, "module": Model(net.weight, sf.State(y))}

    class Scale(eqx.Module):
        array: jax.Array

    fn = sf.StatefulFunction(step)
    x, scale = jnp.ones(2), Scale(jnp.array(2.0))
    fn.make_jaxpr(x, scale)
    fn.get_out_shapes(x, scale)
    for _ in range(2):
        out = fn(x, scale)
        assert no_tracer_in((out["y"], net.weight.value, net.count.value))
    fn.jaxpr_call([s.value for s in fn.get_states(x, scale)], x, scale)
    assert net.count.value == 2


@pytest.mark.usefixtures("checking_leaks")
def test_a_failed_trace_leaks_no_tracer():
    s = sf.State(jnp.ones(2))

    def step(x):
        s.value = s.value * x
        raise Broken

    fn = sf.StatefulFunction(step)
    for _ in range(2):
        with pytest.raises(Broken):
            fn(jnp.ones(2))
    assert no_tracer_in(s.value)


@pytest.mark.usefixtures("checking_leaks")
def test_jaxpr_call_leaks_no_tracer_of_an_enclosing_transform():
    s = sf.State(jnp.ones(2))

    def step(x):
        s.value = s.value * x
        return s.value.sum()

    fn = sf.StatefulFunction(step)
    loss = jax.jit(jax.grad(lambda v, x: fn.jaxpr_call((v,), x)[1]))
    np.testing.assert_array_equal(loss(jnp.ones(2), jnp.full(2, 3.0)), [3.0, 3.0])
    np.testing.assert_array_equal(fn(jnp.full(2, 3.0)), 6.0)


@pytest.mark.usefixtures("checking_leaks")
def test_a_nested_function_that_closes_over_tracers_leaks_none():
    s = sf.State(jnp.array(1.0))

    def outer(x):
        inner = sf.StatefulFunction(lambda y: y * x + s.value)
        return inner(x)

    fn = sf.StatefulFunction(outer)
    assert [fn(jnp.array(2.0)), fn(jnp.array(3.0))] == [5.0, 10.0]


def test_a_nested_function_may_close_over_other_tracers_in_the_next_trace():
    # The inner function lives on; what it closes over is of the trace under way.
    held = {}
    s = sf.State(jnp.array(1.0))
    inner = sf.StatefulFunction(lambda y: y + held["x"] + s.value)

    def outer(x, n):
        held["x"] = x
        return inner(jnp.array(1.0)) * n

    fn = sf.StatefulFunction(outer)
    assert fn(jnp.array(2.0), 1.0) == 4.0
    assert fn(jnp.array(3.0), 2.0) == 10.0
    assert fn(jnp.array(4.0), 1.0) == 6.0
    s.value = jnp.array(2.0)
    assert fn(jnp.array(4.0), 1.0) == 7.0


def test_the_values_of_a_trace_are_let_go_when_it_ends():
    s = sf.State(jnp.ones(3))
    kept = []

    def step(x):
        y = s.value * x
        kept.append(weakref.ref(y))
        s.value = y
        return y

    fn = sf.StatefulFunction(step)
    fn.make_jaxpr(jnp.ones(3))
    gc.collect()
    assert kept[0]() is None


# -- jaxprs that are complete -------------------------------------------------------


def constants(closed):
    return [np.shape(c) for c in closed.consts]


def test_a_states_value_is_no_constant_of_the_jaxpr():
    s = sf.State(jnp.arange(1000.0))
    fn = sf.StatefulFunction(lambda x: x + s.value.sum())
    closed = fn.get_jaxpr(jnp.array(1.0))
    assert (1000,) not in constants(closed)
    assert [v.aval.shape for v in closed.jaxpr.invars] == [(), (1000,)]


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: lambda x: lax.scan(lambda c, y: (f(c + y), None), x, x[None])[0],
        lambda f: lambda x: jax.grad(lambda y: f(y).sum())(x),
        lambda f: jax.vmap(f),
        lambda f: jax.jit(f),
        lambda f: jax.checkpoint(f),
        lambda f: lambda x: lax.cond(True, f, lambda y: y, x),
        lambda f: lambda x: lax.fori_loop(0, 2, lambda _, y: f(y), x),
        lambda f: lambda x: jax.jvp(f, (x,), (x,))[1],
    ],
    ids=["scan", "grad", "vmap", "jit", "checkpoint", "cond", "fori", "jvp"],
)
def test_a_read_inside_a_raw_transform_is_an_input_of_the_function(transform):
    s = sf.State(jnp.array(3.0))
    body = transform(lambda x: x * s.value)
    fn = sf.StatefulFunction(body)
    x = jnp.array([1.0, 2.0])

    def pure(value):
        return transform(lambda x: x * value)(x)

    for value in (3.0, 5.0, 7.0):
        s.value = value
        np.testing.assert_array_equal(fn(x), pure(jnp.array(value)))
    closed = fn.get_jaxpr(x)
    assert [v.aval.shape for v in closed.jaxpr.invars] == [(2,), ()]
    assert fn.get_read_states(x) == (s,)
    assert fn.get_cache_stats()["compilation_cache"]["misses"] == 1


def test_a_read_inside_a_raw_jit_is_an_input_in_every_trace_that_comes_to_it():
    # JAX keeps the inner jaxpr; the outer traces each have a tracer of their own.
    s = sf.State(jnp.array(3.0))
    inner = jax.jit(lambda x: x * s.value)
    fn = sf.StatefulFunction(lambda x, n: inner(x) + n)
    other = sf.StatefulFunction(lambda x: inner(x) * 2)
    x = jnp.array(2.0)
    assert [fn(x, 1.0), fn(x, 2.0), other(x)] == [7.0, 8.0, 12.0]
    s.value = 5.0
    assert [fn(x, 1.0), fn(x, 2.0), other(x)] == [11.0, 12.0, 20.0]


def test_a_write_inside_a_raw_transform_is_refused_and_nothing_is_written():
    s = sf.State(jnp.array(3.0), name="mine")

    def step(x):
        def body(c, y):
            s.value = c
            return c, None

        return lax.scan(body, x, jnp.arange(3))[0]

    fn = sf.StatefulFunction(step)
    message = (
        r"^State 'mine' \(created at .*\) was written inside a raw JAX transform\."
    )
    with pytest.raises(sf.StateTraceError, match=message):
        fn(jnp.array(1.0))
    assert s.value == 3.0


def test_a_state_without_arrays_takes_no_input():
    mode = sf.State("train", name="mode")
    seen = []

    def step(x):
        seen.append(mode.value)
        mode.value = "eval" if mode.value == "train" else "train"
        return x

    fn = sf.StatefulFunction(step)
    x = jnp.ones(2)
    assert len(fn.get_jaxpr(x).jaxpr.invars) == 1
    assert fn.get_read_states(x) == fn.get_write_states(x) == (mode,)
    for expected in ("eval", "train", "eval"):
        fn(x)
        assert mode.value == expected
    assert seen == ["train", "eval"]  # one trace for each of the two
    assert fn.jaxpr_call(("eval",), x)[0] == ("train",)
    with pytest.raises(ValueError, match=r"^state_vals has a value for State 'mode'"):
        fn.jaxpr_call(("train",), x)  # not what the State holds now


def test_a_state_that_is_read_and_not_used_is_read_all_the_same():
    # Its structure was looked at: the function may have branched on it.
    s = sf.State(jnp.zeros(3))
    fn = sf.StatefulFunction(lambda x: x if s.value.shape == (3,) else x + 1)
    x = jnp.array(1.0)
    assert fn.get_read_states(x) == (s,)
    assert fn(x) == 1.0
    s.value = jnp.zeros(4)
    assert fn(x) == 2.0


def test_writing_what_was_read_makes_the_input_an_output():
    a, b = sf.State(jnp.arange(2)), sf.State(jnp.arange(3))

    def swap():
        a.value, b.value = b.value, a.value

    fn = sf.StatefulFunction(swap)
    jaxpr = fn.get_jaxpr().jaxpr
    assert list(jaxpr.invars) == list(reversed(jaxpr.outvars))
    fn()
    assert (a.value.shape, b.value.shape) == ((3,), (2,))
    fn()
    assert (a.value.shape, b.value.shape) == ((2,), (3,))


def test_one_array_in_two_states_is_two_inputs_and_may_part():
    shared = jnp.ones(2)
    a, b = sf.State(shared), sf.State(shared)

    def step():
        a.value = a.value + 1
        return b.value

    fn = sf.StatefulFunction(step)
    fn()
    np.testing.assert_array_equal(fn(), [1.0, 1.0])
    np.testing.assert_array_equal(a.value, [3.0, 3.0])


def test_effects_stay_in_the_jaxpr():
    s = sf.State(jnp.array(1.0))
    seen = []

    def step():
        jax.debug.callback(lambda v: seen.append(float(v)), s.value)
        s.value = s.value + 1

    fn = sf.StatefulFunction(step)
    assert fn.get_jaxpr().effects
    fn()
    fn()
    jax.effects_barrier()
    assert sorted(seen) == [1.0, 2.0]


def test_a_closed_over_array_is_an_input_also_in_a_nested_function():
    table = jnp.arange(5000.0)
    inner = sf.StatefulFunction(lambda i: table[i])
    text = sf.filter_jit(lambda i: inner(i) + 1).lower(jnp.array(3)).as_text()
    lines = [line for line in text.splitlines() if "stablehlo.constant" in line]
    assert "tensor<5000xf32>" in text
    assert not any("tensor<5000xf32>" in line for line in lines)


def test_new_random_keys_are_values_like_any_other(key):
    s = sf.State(key)

    def draw():
        s.value, sub = jax.random.split(s.value)
        return jax.random.normal(sub, (2,))

    fn = sf.StatefulFunction(draw)
    drawn = [fn() for _ in range(3)]
    expected, k = [], key
    for _ in range(3):
        k, sub = jax.random.split(k)
        expected.append(jax.random.normal(sub, (2,)))
    np.testing.assert_array_equal(np.stack(drawn), np.stack(expected))


# -- drawn programs -----------------------------------------------------------------


class InReference(Reference):
    """`Reference`, where the body of a call is a drawn program."""

    def call(self, program, x):
        return super().call(program, self, x)


class InStates:
    """The store of a drawn program, made of States; a nested call is a function."""

    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, initial):
        self.states = {name: sf.State(v, name=name) for name, v in initial.items()}
        self._functions = {}

    def __getitem__(self, name):
        return self.states[name].value

    def __setitem__(self, name, value):
        self.states[name].value = value

    @property
    def values(self):
        return {name: state.value for name, state in self.states.items()}

    def function(self, program):
        if program not in self._functions:
            fun = functools.partial(program, self)
            self._functions[program] = sf.StatefulFunction(fun, **self.options)
        return self._functions[program]

    def call(self, program, x):
        return self.function(program)(x)

    run = call  # how the test calls it, from outside


class Eagerly(InStates):
    def run(self, program, x):
        with jax.disable_jit():
            return self.call(program, x)


class Purely(InStates):
    """By `jaxpr_call`, with the States written back by hand."""

    def run(self, program, x):
        fn = self.function(program)
        states = fn.get_states(x)
        new, out = fn.jaxpr_call([s.value for s in states], x)
        for state, value in zip(states, new, strict=True):
            if value is not None:
                state.value = value
        return out


class PurelyWithAll(Purely):
    options: ClassVar = {"return_only_write": False}


class Optimised(InStates):
    options: ClassVar = {"ir_optimizations": ["algebraic_simplification", "cse", "dce"]}


WAYS = (Eagerly, InStates, Purely, PurelyWithAll, Optimised)


def outcome(run, program, x):
    """What a program returns or raises, in bits."""
    try:
        return "returned", bits(run(program, x))
    except Refused as error:
        return "raised", str(error)


@settings(max_examples=25)
@given(programs(), stores(), st.lists(values(), min_size=1, max_size=3))
def test_every_way_to_run_a_program_gives_the_same_bits(program, initial, inputs):
    reference = InReference(initial)
    drawn = [way(initial) for way in WAYS]
    for x in inputs:
        expected = outcome(reference.call, program, x)
        for store in drawn:
            assert outcome(store.run, program, x) == expected, type(store).__name__
            assert bits(store.values) == bits(reference.values), type(store).__name__


WRITES_THEN_READS = Program((Assign("a", Argument()),), Read("b"))


@settings(max_examples=100)
@given(programs(), stores(), values())
@example(
    Program((Call(WRITES_THEN_READS, Argument(), "c", False),), Read("c")),
    {name: jnp.array([1]) for name in "abc"},
    jnp.array([2]),
)
def test_the_record_of_a_drawn_program_says_what_it_reads_and_writes(
    program, initial, x
):
    # Watched from outside: a State is written if the program assigns it, and read if
    # the program asks for its value before it has assigned it.
    class Watched(InReference):
        def __init__(self, initial):
            super().__init__(initial)
            self.touched, self.reads, self.writes = {}, {}, {}

        def __getitem__(self, name):
            self.touched.setdefault(name)
            if name not in self.writes:
                self.reads.setdefault(name)
            return super().__getitem__(name)

        def __setitem__(self, name, value):
            self.touched.setdefault(name)
            self.writes.setdefault(name)
            super().__setitem__(name, value)

        def call(self, program, x):
            writes = dict(self.writes)
            try:
                return super().call(program, x)
            except Refused:
                self.writes = writes  # undone
                raise

    watched, store = Watched(initial), InStates(initial)
    fn = store.function(program)
    if outcome(watched.call, program, x)[0] == "raised":
        with pytest.raises(Refused):
            fn.make_jaxpr(x)
        return
    record = fn.get_state_trace(x)
    accesses, reads, writes = (
        [s.name for s in states]
        for states in (record.states, record.reads, record.writes)
    )
    assert set(writes) == set(watched.writes)
    if any(catches(p) for p in (program, *called(program))):
        # A call that was undone hides what it has read, and only that.
        assert set(reads) <= set(watched.reads)
        return
    assert accesses == list(watched.touched)
    assert reads == [name for name in accesses if name in watched.reads]
    assert writes == [name for name in accesses if name in watched.writes]


def catches(program):
    return any(isinstance(s, Call) and s.caught for s in program.statements)
