"""Ctrl-C, forks and finalizers at the wrong moment: see `interrupts`."""

import gc
import textwrap

import jax.numpy as jnp
import pytest

import statefun as sf

from .fresh import in_a_thread, run_fresh
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
@in_a_thread
def test_an_interrupt_at_any_bytecode_leaves_states_before_or_after(name, probe):
    states, run = OPERATIONS[name]()
    assert failures(run, states, runs, probe) == ""


@in_a_thread
def test_an_interrupt_at_any_bytecode_of_an_eager_write_is_before_or_after(probe):
    states, run = OPERATIONS["an_eager_write"]()
    assert failures(run, states, runs, probe, most=0) == ""


@pytest.mark.parametrize("make", [first_call, first_call_of_a_nest])
@in_a_thread
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


# -- forks --------------------------------------------------------------------------

# What runs in the child reads and writes only: XLA's threads have not come along.
IN_CHILD = """
    import os, signal, threading, time, warnings
    import jax.numpy as jnp, numpy as np, statefun as sf
    from statefun._call.locks import TracingLock
    from statefun._state import cell

    warnings.simplefilter("ignore")  # JAX and Python warn of forks with threads
    a, b = sf.State(jnp.array(0)), sf.State(jnp.array(0))
    one, tracing, inside = jnp.asarray(np.int32(1)), TracingLock(), threading.Event()

    def busy():
        inside.set()
        time.sleep(0.3)

    def in_another_thread(hold):
        inside.clear()
        threading.Thread(target=hold, daemon=True).start()
        inside.wait()

    def child(run):
        pid = os.fork()
        if pid == 0:
            signal.alarm(20)  # kills it
            try:
                run()
                os._exit(0)
            finally:
                os._exit(1)
        return os.waitpid(pid, 0)[1]

    def use():
        sf.update([a, b], [one, a.value])
        assert a.value is one
"""
FORKS = """
    in_another_thread(lambda: cell.exclusive(busy))
    print("committing", child(use))
    in_another_thread(lambda: cell.in_turn([a._cell], busy))
    print("donating", child(use))
    in_another_thread(lambda: tracing(busy))
    print("tracing", child(lambda: tracing(use)))
    print("tracing itself", tracing(lambda: child(lambda: tracing(use))))
"""


def test_a_process_that_is_forked_does_not_wait_for_the_threads_of_the_other():
    out = run_fresh(textwrap.dedent(IN_CHILD) + textwrap.dedent(FORKS))
    assert out.split("\n") == [
        "committing 0",
        "donating 0",
        "tracing 0",
        "tracing itself 0",
    ]


# -- finalizers ---------------------------------------------------------------------


class Finalized:
    """A static part of a value that does something when nobody holds it any more."""

    def __init__(self, act):
        self.act = act

    def __del__(self):
        self.act()


def replaced(act, write):
    """What two States hold after `write(a, b, value)` has replaced a value with that."""
    a, b = (
        sf.State((Finalized(lambda: act(a, b)), jnp.array(0))),
        sf.State(jnp.array(0)),
    )
    write(a, b, jnp.array(1))
    gc.collect()
    return a, b


WRITES = {
    "call": lambda a, b, x: sf.filter_jit(lambda: both(a, b, x))(),
    "donating call": lambda a, b, x: sf.filter_jit(
        lambda: both(a, b, x), donate_states=True
    )(),
    "gradient": lambda a, b, x: sf.filter_grad(lambda y: (both(a, b, x), y)[1])(1.0),
    "write": lambda a, b, x: both(a, b, x),
}


def both(a, b, x):
    b.value = b.value + x
    a.value = (None, x)


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_finalizer_sees_a_whole_commit_and_may_write(write):
    seen, other = [], sf.State(jnp.array(0))

    def act(a, b):
        seen.append((int(a.value[1]), int(b.value)))
        other.value = jnp.array(7)

    a, b = replaced(act, write)
    assert seen == [(1, 1)] and other.value == 7
    assert (int(a.value[1]), int(b.value)) == (1, 1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_an_exception_of_a_finalizer_leaves_nothing_behind(write, error, probe):
    def act(a, b):
        b.value = jnp.array(5)
        raise error

    a, b = replaced(act, write)
    assert a.value[1] == 1 and b.value == 5
    probe.check()


def test_a_finalizer_may_write_at_any_bytecode_of_a_commit(probe):
    states, run = OPERATIONS["an_update"]()
    run()
    other, one = sf.State(jnp.array(0)), jnp.array(1)
    for at in places(bytecodes(run), 100):
        (n,) = {number(s) for s in states}
        interrupt(run, at, lambda: sf.update([other], [one]))
        assert {number(s) for s in states} == {n + 1}
        probe.check()
