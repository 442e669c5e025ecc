"""Calls of jitted functions: the same as running the function, whatever it does.

Drawn programs are run by `tests.reference` and by statefun in several ways; results,
final States and exceptions have to agree bit for bit. The rest is about what a call does
beside running: traces, restarts, caches, the records of what was traced.
"""

import functools
import gc
import weakref

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st

import statefun as sf
from tests.reference import (
    Apply,
    Argument,
    Assign,
    Call,
    Constant,
    Program,
    RaiseIfLong,
    Read,
    Reference,
    Refused,
    bits,
    programs,
    stores,
    values,
)


class Stateful:
    """The store of `tests.reference`, made of States and `filter_jit`."""

    def __init__(self, initial, **options):
        self.states = {name: sf.State(v, name=name) for name, v in initial.items()}
        self._options = options
        self._jitted = {}

    def __getitem__(self, name):
        return self.states[name].value

    def __setitem__(self, name, value):
        self.states[name].value = value

    def function(self, program):
        return functools.partial(program, self)

    def call(self, program, x):
        if program not in self._jitted:
            jitted = sf.filter_jit(self.function(program), **self._options)
            self._jitted[program] = jitted
        return self._jitted[program](x)

    def now(self):
        return {name: state.value for name, state in self.states.items()}


class Undecorated(Stateful):
    """Without any transform: States are just mutable cells."""

    def call(self, program, x):
        # What a transform promises and plain Python does not: a failed call is undone.
        before = self.now()
        try:
            return program(self, x)
        except Refused:
            for name, value in before.items():
                self[name] = value
            raise


class Uncompiled(Stateful):
    def call(self, program, x):
        with jax.disable_jit():
            return super().call(program, x)


class Pure(Stateful):
    """Through `StatefulFunction.jaxpr_call`, with the States passed by hand."""

    def call(self, program, x):
        if program not in self._jitted:
            self._jitted[program] = sf.StatefulFunction(self.function(program))
        function = self._jitted[program]
        if not self._at_top():
            return function(x)
        states = function.get_states(x)
        before = self.now()
        new, out = function.jaxpr_call([s.value for s in states], x)
        assert bits(self.now()) == bits(before)
        for state, value in zip(states, new, strict=True):
            if value is not None:
                state.value = value
        return out

    def _at_top(self):
        return not any(
            isinstance(s.value, jax.core.Tracer) for s in self.states.values()
        )


class Holder(eqx.Module):
    states: dict


class ByArgument(Stateful):
    """Each function gets the States as leaves of a module, and hands it down."""

    def __init__(self, initial, holder=None, jitted=None):
        super().__init__(initial)
        self._holder = holder or Holder(self.states)
        self.states = self._holder.states
        self._jitted = {} if jitted is None else jitted

    def call(self, program, x):
        if program not in self._jitted:
            jitted = self._jitted

            @sf.filter_jit
            def function(holder, x):
                return program(ByArgument({}, holder, jitted), x)

            jitted[program] = function
        return self._jitted[program](self._holder, x)


def outcome(store, program, x):
    """What a caller sees: the result or the exception, and the States after it."""
    try:
        result, count = store.call(program, x)
    except Refused as error:
        return "raised", str(error)
    return bits(result), count


WAYS = {
    "jit": Stateful,
    "undecorated": Undecorated,
    "disable_jit": Uncompiled,
    "module argument": ByArgument,
    "jaxpr_call": Pure,
    "donating": functools.partial(Stateful, donate_states=True),
}


class InReference(Reference):
    """`Reference`, where the body of a call is a drawn program."""

    def call(self, program, x):
        return super().call(functools.partial(program, self), x)


EXAMPLES = settings(max_examples=max(1, settings().max_examples // 5))

# A call that writes and then raises, caught by a caller that goes on writing.
UNDONE = Program(
    (
        Assign("a", Constant(1)),
        Call(
            Program((Assign("a", Argument()), RaiseIfLong("a", 2)), Read("b")),
            Constant(3),
            "b",
            caught=True,
        ),
        Assign("c", Apply("add", Read("a"), Read("c"))),
    ),
    Read("a"),
)
# Grows at every call until it has its final length: each call meets another shape.
GROWING = Program((Assign("a", Apply("join", Read("a"), Argument())),), Read("a"))
# Raises only when the third call has made `a` long enough.
LATE = Program(
    (*GROWING.statements, RaiseIfLong("a", 4), Assign("b", Read("a"))), Read("b")
)
ONES = {name: jnp.ones(1, jnp.int32) for name in ("a", "b", "c")}


@pytest.mark.parametrize("way", WAYS)
@example(program=UNDONE, initial=ONES, arguments=[jnp.ones(2, jnp.int32)] * 3)
@example(program=GROWING, initial=ONES, arguments=[jnp.ones(1, jnp.int32)] * 4)
@example(program=LATE, initial=ONES, arguments=[jnp.ones(1, jnp.int32)] * 4)
@EXAMPLES
@given(
    program=programs(),
    initial=stores(),
    arguments=st.lists(values(), min_size=2, max_size=3),
)
def test_calls_agree_with_the_reference_bit_for_bit(way, program, initial, arguments):
    expected, actual = InReference(initial), WAYS[way](initial)
    for x in arguments:
        assert outcome(actual, program, x) == outcome(expected, program, x)
        assert bits(actual.now()) == bits(expected.values)


@EXAMPLES
@given(program=programs(), initial=stores(), x=values())
def test_a_program_that_raises_changes_nothing(program, initial, x):
    def raising(store, x):
        program(store, x)
        raise Refused("at the end")

    store = Stateful(initial)
    for _ in range(2):
        with pytest.raises(Refused):
            store.call(raising, x)
        assert {n: s.value is initial[n] for n, s in store.states.items()} == {
            name: True for name in initial
        }


@EXAMPLES
@given(program=programs(), initial=stores(), x=values())
def test_a_program_leaks_no_tracer(program, initial, x):
    with jax.checking_leaks():
        store = Stateful(initial)
        for _ in range(2):
            outcome(store, program, x)


# -- what a call does beside running ------------------------------------------------

ONE = jnp.array(1)


def stats(function):
    return function.stateful_function.get_cache_stats()["compilation_cache"]


@pytest.mark.parametrize("donate_states", [False, True])
def test_calls_of_every_kind_may_follow_each_other(donate_states):
    # Each of these takes another way through the same function; none may spoil another.
    s = sf.State(jnp.array(0))

    @sf.filter_jit(donate_states=donate_states)
    def add(x, y=0):
        s.value = s.value + jnp.asarray(x, jnp.int32).sum() + y
        return s.value

    outer = sf.filter_jit(lambda x: add(x))
    compiled = add.lower(ONE).compile()

    def eagerly(x):
        with jax.disable_jit():
            return add(x)

    ways = [
        add,
        lambda x: add(x, 0),
        lambda x: add(x=x),
        lambda x: add(x, y=jnp.array(0)),
        lambda x: add(np.asarray(x)),
        lambda x: add(int(x)),
        lambda x: add(jnp.stack([x, 0 * x])),
        lambda x: add(x.astype(jnp.int16)),
        outer,
        compiled,
        eagerly,
        add.stateful_function,
    ]
    total = 0
    for _ in range(3):
        for i, way in enumerate(ways):
            total += i
            assert way(jnp.array(i)) == total
            assert s.value == total


def test_a_call_takes_the_structure_that_a_state_has_now():
    s = sf.State(jnp.array(1))
    add = sf.filter_jit(lambda x: sum(jax.tree.leaves(s.value)) + x)
    new = [
        jnp.array(2),
        [jnp.array(3), jnp.array(4)],
        {"a": jnp.array(5)},
        jnp.array(6),
    ]
    for _ in range(2):
        for value, expected in zip(new, (2, 7, 5, 6), strict=True):
            for _ in range(3):
                s.value = value
                assert add(ONE) == expected + 1


def test_a_call_may_change_the_structure_of_what_it_reads():
    s = sf.State(jnp.array(1))

    @sf.filter_jit
    def step(x):
        leaves = jax.tree.leaves(s.value)
        s.value = [*leaves, x] if len(leaves) < 3 else leaves[0]

    seen = []
    for _ in range(7):
        step(ONE)
        seen.append(len(jax.tree.leaves(s.value)))
    assert seen == [2, 3, 1, 2, 3, 1, 2]
    assert stats(step)["misses"] <= 4


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (3, 3),
        ("text", "text"),
        ((), ()),
        ({"a": None, "b": [1]}, {"a": None, "b": [1]}),
    ],
)
def test_a_result_without_arrays_comes_back_at_every_call(value, expected):
    s = sf.State(jnp.array(0))

    @sf.filter_jit
    def step():
        s.value += 1
        return value

    for i in range(3):
        assert step() == expected
        assert s.value == i + 1


def test_results_share_no_mutable_container_between_calls():
    s = sf.State(jnp.array(1))
    step = sf.filter_jit(lambda: {"list": [s.value], "deep": {"empty": []}})
    first, second = step(), step()
    first["list"].append(1)
    first["deep"]["empty"].append(2)
    assert second == step() == {"list": [1], "deep": {"empty": []}}


def test_a_state_without_arrays_can_be_read_and_written():
    s, t = sf.State("abs"), sf.State(jnp.array(0))
    f = sf.filter_jit(lambda x: getattr(jnp, s.value)(x))

    @sf.filter_jit
    def switch():
        t.value += 1
        s.value = "negative" if s.value == "abs" else "abs"

    for expected in (3, 3, -3 * -1, 3):
        assert f(jnp.array(-3)) == expected
        switch()
        assert f(jnp.array(3)) == (-3 if s.value == "negative" else 3)
    assert t.value == 4


def test_a_function_of_nothing():
    assert sf.filter_jit(lambda: None)() is None
    nothing = sf.filter_jit(lambda x: x)
    for _ in range(3):
        assert nothing(ONE) == 1


def test_closed_over_arrays_that_differ_between_specialisations():
    s = sf.State(jnp.array(0.0))
    tables = {n: jnp.arange(float(n)) for n in (1, 2, 3)}
    f = sf.filter_jit(lambda x: tables[x.shape[0]] + x + s.value)
    for _ in range(2):
        for n in (1, 2, 3, 2):
            assert f(jnp.ones(n)).tolist() == [i + 1.0 for i in range(n)]


def test_a_closed_over_array_is_let_go_with_the_function():
    table = jnp.zeros(1000)
    s = sf.State(jnp.array(0.0))
    f = sf.filter_jit(lambda x: table[0] + x + s.value)
    f(jnp.array(1.0))
    f(jnp.array(1.0))
    gone = weakref.ref(table)
    del f, table
    gc.collect()
    assert gone() is None


def test_the_least_recently_used_record_goes_first():
    s = sf.State(jnp.array(0))
    traces = []

    @sf.filter_jit
    def step(x):
        traces.append(x.shape[0])
        s.value += 1

    trace = step.stateful_function.make_jaxpr
    for n in range(128):
        trace(np.zeros(n))
    trace(np.zeros(0))
    step(jnp.zeros(1))  # a call counts as a use
    assert (stats(step)["size"], len(traces)) == (128, 128)
    trace(np.zeros(128))
    assert stats(step)["size"] == 128
    trace(np.zeros(0))
    trace(np.zeros(1))
    assert len(traces) == 129
    step(jnp.zeros(2))
    assert traces[-1] == 2
    assert len(traces) == 130
    assert stats(step)["size"] == 128
    assert s.value == 2


def test_hits_and_misses_are_counted():
    s = sf.State(jnp.array(0))
    step = sf.filter_jit(lambda x: s.value + x)
    for x in (ONE, ONE, jnp.ones(2, jnp.int32), ONE):
        step(x)
    assert stats(step) == {
        "size": 2,
        "maxsize": 128,
        "hits": 2,
        "misses": 2,
        "hit_rate": 0.5,
    }


def test_an_exception_while_tracing_is_no_entry():
    s = sf.State(jnp.array(0))

    @sf.filter_jit
    def step(x):
        s.value += 1
        if fail:
            raise KeyError

    fail = True
    for _ in range(2):
        with pytest.raises(KeyError):
            step(ONE)
    assert stats(step)["size"] == 0
    fail = False
    step(ONE)
    assert s.value == 1


def test_the_users_exceptions_pass_unchanged():
    # Also those that a call might use for itself.
    class Mine(BaseException):
        pass

    for error in (
        StopIteration(3),
        KeyError(3),
        Mine(3),
        RecursionError(),
        SystemExit(),
    ):

        @sf.filter_jit
        def step(x, error=error):
            raise error

        with pytest.raises(type(error)) as caught:
            step(ONE)
        assert caught.value is error


def test_a_function_may_call_itself_in_another_specialisation_while_it_is_traced():
    s = sf.State(jnp.array(0))

    @sf.filter_jit
    def total(x):
        s.value += 1
        return x[0] if x.shape[0] == 1 else x[0] + total(x[1:])

    for _ in range(2):
        assert total(jnp.arange(5)) == 10
    assert s.value == 10
    assert total(jnp.arange(3)) == 3
    assert stats(total)["misses"] == 5


def test_a_function_may_be_cleared_while_it_is_traced():
    s = sf.State(jnp.array(0))

    @sf.filter_jit
    def step(x):
        step.clear_cache()
        s.value += x

    for _ in range(2):
        step(ONE)
    assert s.value == 2


@pytest.mark.parametrize("wrap", [lambda x: [x], lambda x: {"a": x}, eqx.Partial])
def test_a_container_of_one_array_is_not_taken_for_the_array(wrap):
    step = sf.filter_jit(lambda m, x: x + (100 if eqx.is_array(m) else 1))
    one = jnp.ones(())
    assert [step(m, one) for m in (wrap(one), one, wrap(one))] == [2, 101, 2]
