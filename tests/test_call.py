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
    bits,
    Call,
    Constant,
    Program,
    programs,
    RaiseIfLong,
    Read,
    Reference,
    Refused,
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
    "jaxpr_call": Pure,
    "donating": functools.partial(Stateful, donate_states=True),
}


class InReference(Reference):
    """`Reference`, where the body of a call is a drawn program."""

    def call(self, program, x):
        return super().call(functools.partial(program, self), x)


EXAMPLES = settings(max_examples=max(1, settings().max_examples // 4))

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
