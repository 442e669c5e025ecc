"""What a trace does to States: before it ends, when it ends well, and when not."""

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import pytest
from hypothesis import given, strategies as st

import statefun as sf
from statefun._state import access, cell as _cell
from statefun._trace.frame import Overlay, TracedFrame
from statefun._trace.transaction import nested, transaction


def in_thread(function: Callable[[], Any]) -> Any:
    """What a function returns, or raises, when another thread runs it."""
    result: list[Any] = []

    def work():
        try:
            result.append(function())
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return result[0]


def has_tracer(state: sf.State) -> bool:
    leaves = jtu.tree_leaves(state._cell.flat)
    return any(isinstance(x, jax.core.Tracer) for x in leaves)


class Failed(Exception):
    pass


# -- overlays -----------------------------------------------------------------------


def test_a_write_in_a_frame_is_seen_there_and_nowhere_else():
    state = sf.State(1)
    with Overlay():
        state.value = 2
        assert state.value == 2
        assert in_thread(lambda: state.value) == 1
    assert state.value == 1  # dropped: nobody has handed it on


def test_a_transaction_commits_at_its_end():
    a, b = sf.State(1), sf.State(1)

    def run():
        a.value, b.value = 2, 3
        assert in_thread(lambda: (a.value, b.value)) == (1, 1)
        return a.value + b.value

    assert transaction(run) == 5
    assert in_thread(lambda: (a.value, b.value)) == (2, 3)


def test_a_transaction_that_fails_changes_nothing():
    a, b = sf.State(1), sf.State(1)

    def run():
        a.value, b.value = 2, "another structure"
        raise Failed

    with pytest.raises(Failed):
        transaction(run)
    assert (a.value, b.value) == (1, 1)


def test_an_inner_frame_hands_its_writes_to_the_one_around_it():
    a, b = sf.State(1), sf.State(1)

    def inner():
        assert a.value == 2
        a.value, b.value = 3, 3

    def run():
        a.value = 2
        transaction(lambda: nested(inner))
        assert (a.value, b.value) == (3, 3)
        assert in_thread(lambda: (a.value, b.value)) == (1, 1)

    transaction(run)
    assert (a.value, b.value) == (3, 3)


def test_an_inner_frame_that_fails_leaves_the_one_around_it_as_it_was():
    state = sf.State(1)

    def inner():
        state.value = 3
        raise Failed

    def run():
        state.value = 2
        with pytest.raises(Failed):
            nested(inner)
        assert state.value == 2

    transaction(run)
    assert state.value == 2


def test_frames_of_two_threads_do_not_see_each_other():
    state = sf.State(0)
    inside, go_on = threading.Barrier(2), threading.Barrier(2)

    def work(new):
        with Overlay():
            state.value = new
            inside.wait()  # both frames are open, both have written
            seen = state.value.item()
            go_on.wait()
        return seen

    seen = []
    threads = [
        threading.Thread(target=lambda n=n: seen.append((n, work(n)))) for n in (1, 2)
    ]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert sorted(seen) == [(1, 1), (2, 2)] and state.value == 0


def with_interference(run: Callable[[], Any], interfere: Callable[[], Any]) -> list:
    """Runs a transaction; the first time, another thread does something at its end."""
    runs = []

    def both():
        out = run()
        runs.append(out)
        if len(runs) == 1:
            in_thread(interfere)
        return out

    transaction(both)
    return runs


def test_a_transaction_runs_again_if_what_it_read_and_wrote_has_changed():
    state, other = sf.State(1), sf.State(1)

    def run():
        other.value = 5 * state.value
        state.value = state.value + 1
        return state.value.item()

    runs = with_interference(run, lambda: setattr(state, "value", 10))
    assert runs == [2, 11]
    assert (state.value, other.value) == (11, 50)


def test_a_transaction_does_not_mind_a_change_of_what_it_only_read():
    read, written = sf.State(1), sf.State(1)

    def run():
        written.value = read.value + written.value

    runs = with_interference(run, lambda: setattr(read, "value", 10))
    assert len(runs) == 1
    assert (read.value, written.value) == (10, 2)  # what was only read stays written


def test_a_transaction_does_not_mind_a_change_of_what_it_only_wrote():
    state = sf.State(jnp.zeros(2))

    def run():
        state.value = jnp.ones(2)

    runs = with_interference(run, lambda: setattr(state, "value", jnp.full(2, 9.0)))
    assert len(runs) == 1 and state.value.tolist() == [1.0, 1.0]


def test_a_frame_gives_one_object_for_one_value():
    # So that `state.value["a"] = 1; state.value["a"]` is at least consistent, and a
    # change can be noticed at the end.
    state = sf.State({"a": 1})
    with Overlay():
        first = state.value
        assert state.value is first
        state.value = {"a": 2}
        assert state.value is not first and state.value["a"] == 2


# -- traced frames ------------------------------------------------------------------


def test_the_first_read_in_a_traced_frame_is_an_equation():
    pair, single = sf.State((jnp.ones(2), 1)), sf.State(jnp.zeros(3))

    def f():
        with TracedFrame():
            pair.value, single.value, pair.value  # noqa: B018
            return single.value

    jaxpr = jax.make_jaxpr(f)()
    reads = [eqn for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name == "state_read"]
    avals = [[a.str_short() for a in eqn.params["avals"]] for eqn in reads]
    assert avals == [["float32[2]", "int32[]"], ["float32[3]"]]
    assert [eqn.params["index"] for eqn in reads] == [0, 1]


def test_a_read_after_a_write_is_no_equation():
    state = sf.State(jnp.zeros(3))

    def f(x):
        with TracedFrame():
            state.value = x
            return state.value

    jaxpr = jax.make_jaxpr(f)(jnp.ones(2))
    assert not jaxpr.jaxpr.eqns and state.value.tolist() == [0.0] * 3


def test_a_frame_holds_nothing_after_its_end():
    # A program that is cached keeps its frame's order of States, but no tracer.
    state = sf.State(jnp.zeros(3))
    kept = []

    def f(x):
        with TracedFrame() as frame:
            kept.append(frame)
            state.value = state.value + x
            return state.value

    with jax.checking_leaks():
        jax.make_jaxpr(f)(jnp.ones(3))
    (frame,) = kept
    assert not frame.reads and not frame.writes and frame.parent is None


def test_a_read_that_outlives_its_trace_is_an_error_that_says_so():
    # JAX offers no way to see this one coming: the jaxpr is run by somebody else.
    state = sf.State(jnp.zeros(3))

    def f():
        with TracedFrame():
            return state.value

    jaxpr = jax.make_jaxpr(f)()
    message = "^A State was read inside a JAX transformation that statefun does not see"
    with pytest.raises(sf.StateTraceError, match=message):
        jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts)


# -- transactions -------------------------------------------------------------------


def test_nobody_else_sees_a_write_before_the_call_ends():
    state, seen = sf.State(1), []

    @sf.filter_jit
    def step():
        state.value += 1
        seen.append(in_thread(lambda: state.value))

    step()
    assert seen == [1] and state.value == 2


def test_a_thread_started_in_a_trace_writes_for_itself():
    state, other = sf.State(1), sf.State(1)

    @sf.filter_jit
    def step():
        other.value += 1
        in_thread(lambda: setattr(state, "value", 7))

    step()
    assert (state.value, other.value) == (7, 2)


@pytest.mark.usefixtures("checking_leaks")
def test_a_failed_trace_leaves_every_state_as_it_was():
    a = sf.State(jnp.zeros(2))
    b = sf.State({"x": 1, "label": "old"})
    before = a._cell.flat, b._cell.flat, b._cell.structure

    @sf.filter_jit
    def step(x):
        a.value = x
        b.value = (x, "another structure")
        raise Failed

    for _ in range(2):
        with pytest.raises(Failed):
            step(jnp.ones(2))
        now = a._cell.flat, b._cell.flat, b._cell.structure
        assert all(x is y for x, y in zip(now, before, strict=True))


def test_after_a_failed_trace_the_same_function_works():
    state, fails = sf.State(0), [True]

    @sf.filter_jit
    def step():
        state.value += 1
        if fails[0]:
            raise Failed

    with pytest.raises(Failed):
        step()
    fails[0] = False
    step()
    assert state.value == 1


def test_no_tracer_is_stored_whatever_happens():
    state = sf.State(jnp.zeros(()))

    def catches(x):
        try:
            state.value = x
        except sf.StateTraceError:
            pass
        return x

    jax.grad(catches)(1.0)
    jax.jit(catches)(1.0)
    jax.vmap(catches)(jnp.ones(3))
    assert not has_tracer(state) and state.value == 0

    @sf.filter_jit
    def step(x):
        state.value = x
        assert not has_tracer(state)
        jax.grad(catches)(x)
        assert not has_tracer(state)

    step(jnp.ones(()))
    assert state.value == 1 and not has_tracer(state)


def test_a_batched_value_is_not_written_to_an_unbatched_state():
    state, total = sf.State(jnp.zeros(()), name="mean"), sf.State(0)

    @sf.filter_jit
    def step(xs):
        total.value += 1

        def one(x):
            state.value = x
            return x

        return jax.vmap(one)(xs)

    with pytest.raises(sf.StateTraceError, match=r"^State 'mean' \(created at"):
        step(jnp.ones(3))
    assert state.value == 0 and total.value == 0


def test_an_inner_call_that_fails_and_is_caught_writes_nothing():
    state, other = sf.State(0), sf.State(0)

    @sf.filter_jit
    def inner():
        state.value += 1
        raise Failed

    @sf.filter_jit
    def outer():
        other.value += 1
        try:
            inner()
        except Failed:
            pass
        return state.value

    assert outer() == 0
    assert (state.value, other.value) == (0, 1)


@given(
    st.recursive(
        st.tuples(st.sampled_from(["write", "fail"]), st.integers(0, 2)),
        lambda inner: st.tuples(st.just("frame"), st.lists(inner, max_size=4)),
        max_leaves=12,
    )
)
def test_frames_drawn_at_random_are_transactions(program):
    # Against dicts that are copied: a frame that fails is as if it had never been.
    states = [sf.State(0) for _ in range(3)]

    def on_states(op, i_or_ops):
        if op == "write":
            states[i_or_ops].value += 1
        elif op == "fail":
            states[i_or_ops].value = -100
            raise Failed
        else:
            try:
                nested(lambda: [on_states(*step) for step in i_or_ops])
            except Failed:
                pass

    def on_dict(values, op, i_or_ops):
        if op == "write":
            return values | {i_or_ops: values[i_or_ops] + 1}
        if op == "fail":
            raise Failed
        new = values
        try:
            for step in i_or_ops:
                new = on_dict(new, *step)
        except Failed:
            return values
        return new

    if program[0] != "frame":
        program = ("frame", [program])
    transaction(lambda: on_states(*program))
    expected = on_dict(dict.fromkeys(range(3), 0), *program)
    assert {i: s.value.item() for i, s in enumerate(states)} == expected
    assert access.local.frame is None


# -- reads inside raw transforms ----------------------------------------------------


def cumulated(w):
    """A scan whose body is one function: JAX caches the jaxpr that it makes of it."""

    def body(c, _):
        return c + w(), None

    return lambda x: jax.lax.scan(body, x, length=3)[0]


def custom(w):
    f = jax.custom_jvp(lambda x: x * w())
    f.defjvp(lambda primals, tangents: (primals[0] * w(), tangents[0] * 2 * w()))
    return jax.value_and_grad(f)


def loop(w):
    below, step = lambda c: c < 10 * w(), lambda c: c + w()
    return lambda x: jax.lax.while_loop(below, step, x)


def branch(w):
    yes, no = lambda: w(), lambda: -w()
    return lambda x: jax.lax.cond(x > 0, yes, no)


def remat(w):
    return jax.grad(jax.checkpoint(lambda x: jnp.sin(x * w())))


# From a function that reads a State, a function that does so in a raw transform.
RAW = {
    "grad": lambda w: jax.grad(lambda x: x * w()),
    "vmap": lambda w: jax.vmap(lambda x: x * w(), axis_size=2, in_axes=None),
    "jit": lambda w: jax.jit(lambda x: x * w()),
    "checkpoint": remat,
    "scan": cumulated,
    "grad of scan": lambda w: jax.grad(cumulated(w)),
    "while_loop": loop,
    "cond": branch,
    "jit in scan": lambda w: cumulated(jax.jit(w)),
    "eqx.filter_jit": lambda w: eqx.filter_jit(lambda x: x * w()),
    "custom_jvp": custom,
}
raw = pytest.mark.parametrize("make", RAW.values(), ids=RAW)


def check_equal(got: Any, expected: Any) -> None:
    pairs = zip(jtu.tree_leaves(got), jtu.tree_leaves(expected), strict=True)
    for x, y in pairs:
        assert x.tolist() == pytest.approx(y.tolist(), rel=1e-6)


@raw
def test_a_state_may_be_read_inside_a_raw_transform_inside_ours(make):
    # The read lands outside of the raw transform, as an input of the whole program.
    state = sf.State(2.0)
    step = sf.filter_jit(make(lambda: state.value))
    for new in (2.0, 3.0):
        state.value = new
        expected = make(lambda: jnp.float32(new))(jnp.ones(()))  # noqa: B023
        check_equal(step(jnp.ones(())), expected)


@raw
def test_a_raw_transform_that_jax_has_cached_does_not_keep_a_state(make):
    # The same function in several programs, and twice in one: what JAX has kept of it
    # from one trace must not come up in another.
    state = sf.State(2.0)
    use = make(lambda: state.value)
    first = sf.filter_jit(lambda x: use(x))
    second = sf.filter_jit(lambda x: (use(x), use(x)))
    one = jnp.ones(())
    for new in (2.0, 3.0):
        state.value = new
        expected = make(lambda: jnp.float32(new))(one)  # noqa: B023
        check_equal(first(one), expected)
        check_equal(second(one), (expected, expected))


@raw
def test_a_raw_transform_used_again_after_a_write_sees_what_was_written(make):
    # In one program: JAX would find the body's jaxpr, with the old value in it.
    state = sf.State(2.0)
    use = make(lambda: state.value)

    @sf.filter_jit
    def step(x):
        before = use(x)
        state.value = state.value + 1
        return before, use(x)

    for old in (2.0, 3.0):
        before = make(lambda: jnp.float32(old))(jnp.ones(()))  # noqa: B023
        after = make(lambda: jnp.float32(old + 1))(jnp.ones(()))  # noqa: B023
        check_equal(step(jnp.ones(())), (before, after))


@raw
def test_a_raw_transform_sees_what_an_inner_call_has_written(make):
    state = sf.State(2.0)
    use = make(lambda: state.value)

    @sf.filter_jit
    def raise_and_use(x):
        state.value = state.value + 1
        return use(x)

    @sf.filter_jit
    def step(x):
        return use(x), raise_and_use(x), use(x)

    for old in (2.0, 3.0):
        before = make(lambda: jnp.float32(old))(jnp.ones(()))  # noqa: B023
        after = make(lambda: jnp.float32(old + 1))(jnp.ones(()))  # noqa: B023
        check_equal(step(jnp.ones(())), (before, after, after))


def test_a_shared_raw_jit_reads_each_programs_own_value():
    state = sf.State(2.0)
    shared = jax.jit(lambda x: x * state.value)
    programs = [sf.filter_jit(lambda x, n=n: shared(x) + n) for n in (0.0, 1.0, 2.0)]
    for value in (2.0, 5.0):
        state.value = value
        for n, program in enumerate(programs):
            assert program(jnp.ones(())) == value + n


def test_a_read_between_two_writes_takes_the_last_one():
    state = sf.State(1.0)

    @sf.filter_jit
    def step(x):
        y = jax.grad(lambda x: x * state.value)(x)
        state.value = state.value + 1
        z = jax.grad(lambda x: x * state.value)(x)
        return y, z

    assert step(jnp.ones(())) == (1.0, 2.0)
    assert step(jnp.ones(())) == (2.0, 3.0)


# -- States made inside a trace -----------------------------------------------------


def test_a_state_made_in_a_frame_can_be_used_there():
    @sf.filter_jit
    def step(x):
        total = sf.State(jnp.zeros(()))
        for _ in range(3):
            total.value = total.value + x
        return total.value

    assert step(jnp.ones(())) == 3.0
    assert step(jnp.ones(())) == 3.0
    assert step.stateful_function.get_states(jnp.ones(())) == ()


def test_a_state_made_in_a_frame_that_fails_is_dropped():
    made = []

    @sf.filter_jit
    def step(x):
        made.append(sf.State(x, name="lost"))
        raise Failed

    with pytest.raises(Failed):
        step(jnp.ones(2))
    assert not has_tracer(made[0])
    with pytest.raises(sf.StateTraceError, match=r"^State 'lost' .* has no value\."):
        made[0].value  # noqa: B018


def test_a_state_made_in_an_inner_call_lives_in_the_outer_one():
    class Holder(eqx.Module):
        state: sf.State

    make = sf.filter_jit(lambda x: Holder(sf.State(x)))

    @sf.filter_jit
    def step(x):
        holder = make(x)
        holder.state.value = holder.state.value + 1
        return holder

    first, second = step(jnp.ones(())), step(jnp.zeros(()))
    assert (first.state.value, second.state.value) == (2.0, 1.0)
    assert first.state is not second.state


# -- commits ------------------------------------------------------------------------


def test_two_states_written_together_are_never_seen_apart():
    a, b, stop, torn = sf.State(0), sf.State(0), threading.Event(), []
    both = (a._cell, b._cell)

    def watch():
        while not stop.is_set():
            with _cell.lock:  # as a call takes its snapshot
                values = [int(cell.flat) for cell in both]
            if values[0] != values[1]:
                torn.append(values)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        for i in range(1, 300):
            sf.update((a, b), (i, i))
    finally:
        stop.set()
        thread.join()
    assert torn == [] and (a.value, b.value) == (299, 299)


def test_states_lent_to_a_donating_call_make_others_wait():
    state = sf.State(1)
    cells = [state._cell]
    inside, order = threading.Event(), []

    def work():
        inside.wait()
        order.append(("read", state.value.item()))

    thread = threading.Thread(target=work)
    thread.start()

    def act():
        inside.set()
        # The owner is not kept out by itself, nor is a nested turn given back early.
        _cell.in_turn(cells, lambda: setattr(state, "value", 2))
        assert cells[0] in _cell.shared.taken
        order.append(("written", state.value.item()))

    _cell.in_turn(cells, act)
    thread.join()
    assert order == [("written", 2), ("read", 2)]
    assert not _cell.shared.taken


def test_a_turn_ends_when_its_call_fails():
    state = sf.State(1)

    def fail():
        raise Failed

    with pytest.raises(Failed):
        _cell.in_turn([state._cell], fail)
    assert in_thread(lambda: state.value) == 1


def test_a_state_that_nobody_holds_is_dropped_with_its_arrays():
    state = sf.State(jnp.ones(2))
    gone = weakref.ref(state), weakref.ref(state._cell)
    transaction(lambda: setattr(state, "value", state.value + 1))
    del state
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
