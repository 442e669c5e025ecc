"""What several threads see of each other: committed values, whole commits, every one.

No test here waits for time to pass. Where an order matters, events make it; a time limit
only turns a deadlock into a failure.
"""

import functools
import gc
import sys
import threading
import weakref

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import statefun as sf

LIMIT = 60  # seconds until what hangs counts as a deadlock
ONE = jnp.array(1)


def together(*functions):
    """Runs the functions at once, each on a thread; raises what one of them raised."""
    start = threading.Barrier(len(functions))
    raised = []

    def run(function):
        start.wait(LIMIT)
        try:
            function()
        except BaseException as error:
            raised.append(error)

    threads = [
        threading.Thread(target=run, args=(function,), daemon=True)
        for function in functions
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    if raised:
        raise raised[0]
    assert not any(thread.is_alive() for thread in threads), "deadlock"


def elsewhere(function):
    """Runs a function on a thread of its own, and waits for it."""
    out = []
    together(lambda: out.append(function()))
    return out[0]


@pytest.fixture(autouse=True)
def switching_often():
    # Many more interleavings in the same number of calls.
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


# -- increments are counted ---------------------------------------------------------


@pytest.mark.parametrize("donate_states", [False, True])
def test_every_one_of_8_times_1000_increments_counts(donate_states):
    s = sf.State(jnp.array(0))

    @sf.filter_jit(donate_states=donate_states)
    def bump():
        s.value += 1

    together(*[lambda: [bump() for _ in range(1000)]] * 8)
    assert s.value == 8000


def test_increments_by_different_functions_count():
    s, t = sf.State(jnp.array(0)), sf.State(jnp.zeros(3))

    @sf.filter_jit
    def one(x):
        s.value += x
        t.value += 1

    @sf.filter_jit(donate_states=True)
    def two():
        s.value += 2

    @sf.filter_jit
    def outer(x):
        one(x)
        two()

    together(
        *[lambda: [one(ONE) for _ in range(200)]] * 2,
        *[lambda: [two() for _ in range(200)]] * 2,
        *[lambda: [outer(ONE) for _ in range(200)]] * 2,
    )
    assert s.value == 400 + 800 + 1200
    assert t.value.tolist() == [800] * 3


def test_increments_of_module_arguments_count():
    class Counter(eqx.Module):
        count: sf.State

        @sf.filter_jit
        def add(self):
            self.count.value += 1

    counters = [Counter(sf.State(jnp.array(0))) for _ in range(2)]
    together(*[lambda: [c.add() for _ in range(200) for c in counters]] * 4)
    assert [int(c.count.value) for c in counters] == [800, 800]


@pytest.mark.parametrize("donate_states", [False, True])
def test_increments_with_a_check_count(donate_states):
    s = sf.State(jnp.array(0))

    @sf.filter_jit(donate_states=donate_states)
    def bump():
        s.value = eqx.error_if(s.value + 1, s.value < 0, "below zero")

    bump()
    together(*[lambda: [bump() for _ in range(50)]] * 4)
    assert s.value == 201


def test_eager_functions_count_as_well():
    s = sf.State(jnp.array(0))

    @sf.filter_jit
    def bump():
        s.value += 1

    def run():
        with jax.disable_jit():  # which holds for this thread
            for _ in range(50):
                bump()

    together(*[run] * 4)
    assert s.value == 200


def test_functions_ahead_of_time_count_as_well():
    s = sf.State(jnp.array(0))

    @sf.filter_jit
    def bump():
        s.value += 1

    compiled = bump.lower().compile()
    together(*[lambda: [compiled() for _ in range(200)]] * 4)
    assert s.value == 800


def test_a_call_that_lost_the_race_runs_again_on_the_new_value():
    # The order is forced: the write by hand falls between the read and the commit.
    s = sf.State(jnp.array(1))
    seen = []

    def during(x):
        seen.append(int(x))
        if len(seen) == 1:
            elsewhere(lambda: setattr(s, "value", jnp.array(100)))
        return x

    @sf.filter_jit
    def bump():
        x = s.value
        s.value = jax.pure_callback(during, jax.typeof(x), x) + 1

    bump()
    assert seen == [1, 100]
    assert s.value == 101


def test_a_program_with_effects_is_not_run_twice():
    # There the last writer wins.
    s = sf.State(jnp.array(1))
    seen = []

    def during(x):
        seen.append(int(x))
        elsewhere(lambda: setattr(s, "value", jnp.array(100)))

    @sf.filter_jit
    def bump():
        jax.experimental.io_callback(during, None, s.value)
        s.value += 1

    bump()
    jax.effects_barrier()
    assert seen == [1]
    assert s.value == 2


# -- nobody sees half of anything ---------------------------------------------------


@pytest.mark.parametrize("donate_states", [False, True])
def test_a_reader_never_sees_half_a_commit(donate_states):
    a, b = sf.State(jnp.array(0)), sf.State({"b": jnp.array(0)})

    @sf.filter_jit(donate_states=donate_states)
    def write():
        a.value += 1
        b.value = {"b": b.value["b"] + 1}

    @sf.filter_jit
    def read():
        return a.value, b.value["b"]

    done = threading.Event()
    halves = []

    def writer():
        for _ in range(500):
            write()
        done.set()

    def reader():
        while not done.is_set():
            x, y = read()
            if x != y:
                halves.append((int(x), int(y)))

    together(writer, reader, reader)
    assert halves == []
    assert a.value == b.value["b"] == 500


def test_a_reader_never_sees_half_of_an_update_by_hand():
    tree = {"a": sf.State(jnp.array(0)), "b": sf.State(jnp.array(0))}
    read = sf.filter_jit(lambda: (tree["a"].value, tree["b"].value))
    done = threading.Event()
    halves = []

    def writer():
        for i in range(300):
            sf.update(tree, {"a": jnp.array(i), "b": jnp.array(i)})
        done.set()

    def reader():
        while not done.is_set():
            x, y = read()
            if x != y:
                halves.append((int(x), int(y)))

    together(writer, reader)
    assert halves == []


def test_a_call_never_sees_values_and_structure_of_different_commits():
    # The State changes structure all the time; the function must see either whole, also
    # while it is traced and while the reason for that is looked up: hence the rounds.
    sys.setswitchinterval(1e-6)
    wrong = []
    for _ in range(15):
        s = sf.State(ONE)
        read = sf.filter_jit(lambda s=s: sum(jax.tree.leaves(s.value)))
        done = threading.Event()

        def writer(s=s, done=done):
            for _ in range(100):
                s.value = {"a": ONE, "b": ONE}
                s.value = ONE
            done.set()

        def reader(read=read, done=done):
            while not done.is_set():
                if read() not in (1, 2):
                    wrong.append(())

        together(writer, reader)
    assert wrong == []


def test_another_thread_sees_committed_values_while_a_function_is_traced():
    s = sf.State(jnp.array(1))
    seen = []

    @sf.filter_jit
    def step(x):
        s.value = x
        seen.append(elsewhere(lambda: s.value))
        seen.append(elsewhere(sf.filter_jit(lambda: s.value + 0)))

    step(jnp.array(7))
    assert seen == [1, 1]
    assert not any(isinstance(x, jax.core.Tracer) for x in seen)
    assert s.value == 7


def test_another_thread_may_write_while_a_function_is_traced():
    s, t = sf.State(jnp.array(1)), sf.State(jnp.array(1))

    @sf.filter_jit
    def step():
        t.value = s.value
        if isinstance(s.value, jax.core.Tracer):
            elsewhere(lambda: setattr(s, "value", jnp.array(5)))

    step()
    assert s.value == 5
    assert t.value in (1, 5)
    step()
    assert t.value == 5


def test_a_write_by_another_thread_to_a_state_that_is_only_read_stays():
    s, t = sf.State(jnp.array(1)), sf.State(jnp.array(0))

    def during(x):
        elsewhere(lambda: setattr(s, "value", jnp.array(50)))
        return x

    @sf.filter_jit
    def step():
        t.value += jax.pure_callback(during, jax.typeof(s.value), s.value)

    step()
    assert (s.value, t.value) == (50, 1)


def test_a_write_by_a_callback_to_a_state_that_is_only_read_stays():
    s, t = sf.State(jnp.array(1)), sf.State(jnp.array(0))

    @sf.filter_jit
    def step():
        jax.debug.callback(lambda x: setattr(s, "value", x + 10), s.value)
        t.value += s.value

    step()
    jax.effects_barrier()
    assert (s.value, t.value) == (11, 1)


# -- tracing by several threads -----------------------------------------------------


def test_threads_that_miss_on_the_same_key_trace_once():
    s = sf.State(jnp.array(0))
    traces = []

    @sf.filter_jit
    def bump(x):
        traces.append(threading.get_ident())
        s.value += x

    together(*[lambda: bump(ONE)] * 8)
    assert len(traces) == 1
    assert s.value == 8
    stats = bump.stateful_function.get_cache_stats()["compilation_cache"]
    assert (stats["misses"], stats["size"]) == (1, 1)


def test_threads_with_many_shapes_trace_each_once():
    s = sf.State(jnp.array(0))
    traces = []

    @sf.filter_jit
    def bump(x):
        traces.append(x.shape)
        s.value += x.shape[0]

    def run():
        for n in (1, 2, 3):
            bump(jnp.ones(n))

    together(*[run] * 4)
    assert sorted(traces) == [(1,), (2,), (3,)]
    assert s.value == 24


def test_a_trace_survives_that_another_call_ends_meanwhile():
    # What a call keeps about itself must not be in a place shared with another one.
    class Counter(eqx.Module):
        count: sf.State

        @sf.filter_jit
        def add(self, x):
            if x.shape == (2,):
                tracing.set()
                assert other_done.wait(LIMIT)
            self.count.value += jax.pure_callback(waiting, x[0], x[0])

    def waiting(x):
        running.set()
        if hold.is_set():
            assert tracing.wait(LIMIT)
        return x

    tracing, running, other_done, hold = (threading.Event() for _ in range(4))
    a, b = Counter(sf.State(jnp.array(0))), Counter(sf.State(jnp.array(0)))
    a.add(jnp.ones(1, jnp.int32))
    hold.set()
    running.clear()

    def first():
        a.add(jnp.ones(1, jnp.int32))
        other_done.set()

    def second():
        assert running.wait(LIMIT)
        b.add(jnp.ones(2, jnp.int32))

    together(first, second)
    assert (a.count.value, b.count.value) == (2, 1)


def test_a_function_keeps_no_state_alive_after_calls_of_several_threads():
    class Counter(eqx.Module):
        count: sf.State

        @sf.filter_jit
        def add(self):
            self.count.value += 1

    counters = [Counter(sf.State(jnp.array(0))) for _ in range(4)]
    Counter(sf.State(jnp.array(0))).add()
    together(
        *[
            functools.partial(lambda c: [c.add() for _ in range(100)], c)
            for c in counters
        ]
    )
    gone = [weakref.ref(c.count) for c in counters]
    counters.clear()
    gc.collect()
    assert [ref() for ref in gone] == [None] * 4


def test_functions_that_call_each_other_may_be_traced_by_two_threads():
    # Each thread is inside the trace of one function when it comes to need the other.
    s = sf.State(jnp.array(0))
    both_tracing = threading.Barrier(2)

    @sf.filter_jit
    def left(outermost):
        if outermost:
            both_tracing.wait(LIMIT)
            right(False)
        s.value += 1

    @sf.filter_jit
    def right(outermost):
        if outermost:
            both_tracing.wait(LIMIT)
            left(False)
        s.value += 1

    together(lambda: left(True), lambda: right(True))
    assert s.value == 4


# -- taking turns -------------------------------------------------------------------


def test_a_donating_call_gives_the_states_back_when_it_fails():
    s = sf.State(jnp.zeros(10))

    @sf.filter_jit(donate_states=True)
    def step(x):
        s.value += 1
        if x.shape == (2,):
            raise KeyError("at two")

    step(jnp.ones(1))
    with pytest.raises(KeyError):
        step(jnp.ones(2))
    elsewhere(lambda: step(jnp.ones(1)))
    assert s.value[0] == 2


def test_donating_calls_on_states_that_overlap_do_not_wait_for_each_other_for_ever():
    s, t = sf.State(jnp.array(0)), sf.State(jnp.array(0))

    @sf.filter_jit(donate_states=True)
    def one():
        s.value += 1
        t.value += 1

    @sf.filter_jit(donate_states=True)
    def two():
        t.value += 1
        s.value += 1

    together(
        *[lambda: [one() for _ in range(100)]] * 2,
        *[lambda: [two() for _ in range(100)]] * 2,
    )
    assert s.value == t.value == 400


def test_readers_beside_donating_calls_never_see_a_deleted_array():
    s = sf.State(jnp.zeros(10))

    @sf.filter_jit(donate_states=True)
    def step():
        s.value += 1

    done = threading.Event()

    def writer():
        for _ in range(300):
            step()
        done.set()

    def reader():
        last = 0.0
        while not done.is_set():
            now = float(s.value[0])
            assert now >= last
            last = now
            repr(s)

    together(writer, reader)
    assert s.value[0] == 300


def test_writers_by_hand_beside_donating_calls():
    s = sf.State(jnp.zeros(10))

    @sf.filter_jit(donate_states=True)
    def step():
        s.value += 1

    done = threading.Event()

    def writer():
        for _ in range(200):
            step()
        done.set()

    def by_hand():
        while not done.is_set():
            s.value = jnp.full(10, 1000.0)

    together(writer, by_hand)
    assert s.value[0] >= 1000


def test_a_callback_may_read_the_states_of_a_donating_call():
    s = sf.State(jnp.zeros(10))
    seen = []

    @sf.filter_jit(donate_states=True)
    def step():
        s.value += 1
        jax.debug.callback(lambda x: seen.append(float(s.value[0])), s.value)

    def run():
        for _ in range(3):
            step()
            jax.effects_barrier()

    together(run)
    assert len(seen) == 3
    assert s.value[0] == 3
