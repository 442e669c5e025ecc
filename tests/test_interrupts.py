"""Ctrl-C, forks and finalizers at the wrong moment: see `interrupts`."""

import jax.numpy as jnp
import pytest

from .interrupts import (
    OPERATIONS,
    Probe,
    bytecodes,
    failures,
    first_call,
    first_call_of_a_nest,
    interrupt,
    number,
    places,
    restore,
    runs,
    with_signals,
)

# An interrupt that arrives in a finalizer is ignored, and pytest makes a warning of it.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture
def probe():
    yield Probe()
    restore()


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_interrupt_at_any_bytecode_leaves_states_before_or_after(name, probe):
    states, run = OPERATIONS[name]()
    assert failures(run, states, runs, probe) == ""


def test_an_interrupt_at_any_bytecode_of_an_eager_write_is_before_or_after(probe):
    states, run = OPERATIONS["an_eager_write"]()
    assert failures(run, states, runs, probe, most=0) == ""


@pytest.mark.parametrize("make", [first_call, first_call_of_a_nest])
def test_an_interrupt_of_a_first_call_leaves_a_function_that_can_be_called(make, probe):
    one = jnp.array(1)
    total = bytecodes(lambda: make()[1](one))
    for at in places(total):
        states, f = make()
        place = interrupt(lambda f=f: f(one), at)
        there = probe.elsewhere(lambda states=states: {number(s) for s in states})
        assert there in ({0}, {1}), place
        try:
            probe.check()
            f(one)
            f(one)
        except Exception as error:
            raise AssertionError(f"interrupted at {place}") from error
        assert [number(s) for s in states] == [there.pop() + 2] * 3, place


def test_signals_at_random_moments_leave_states_before_or_after():
    done = with_signals(seed=0, seconds=3)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert int(done.stdout.split()[0]) > 10
