"""The promises that statefun makes (docs/index.md tells users), one section each.

The transform here is `filter_jit`; what a promise means for another twin is tested with
the twin. Threads have a file of their own.
"""

import contextlib
import functools
import gc
import weakref

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import statefun as sf

ONE = jnp.array(1)


def arrays(*states):
    return [jax.tree.leaves(s.value) for s in states]


# -- P1: what is read is an input ---------------------------------------------------

GLOBAL = sf.State(jnp.array(0), name="global")


def read_global(x):
    return x + GLOBAL.value


class Holder:
    def __init__(self, state):
        self.state = state

    def read(self, x):
        return x + self.state.value


class Module(eqx.Module):
    state: sf.State

    def read(self, x):
        return x + self.state.value


def reading(state, how):
    """A function of x that reads `state`, and how it comes to it."""
    if how == "closure":
        return sf.filter_jit(lambda x: x + state.value)
    if how == "attribute of a bound method's object":
        return sf.filter_jit(Holder(state).read)
    if how == "bound method of a module":
        return sf.filter_jit(Module(state).read)
    if how == "method of a module":
        return functools.partial(sf.filter_jit(Module.read), Module(state))
    if how == "argument":
        jitted = sf.filter_jit(lambda m, x: x + m.state.value)
        return lambda x: jitted(Module(state), x)
    if how == "keyword argument":
        jitted = sf.filter_jit(lambda x, *, m: x + m["deep"][0].state.value)
        return lambda x: jitted(x, m={"deep": [Module(state)]})
    if how == "partial":
        return sf.filter_jit(functools.partial(lambda m, x: m.read(x), Module(state)))
    if how == "default argument":
        holder = Holder(state)
        return sf.filter_jit(lambda x, default=holder: default.read(x))
    if how == "value of another State":
        outer = sf.State({"inner": Module(state)})
        return sf.filter_jit(lambda x: outer.value["inner"].read(x))
    if how == "function that is called":
        inner = sf.filter_jit(lambda x: x + state.value)
        return sf.filter_jit(lambda x: inner(x))
    raise AssertionError(how)


@pytest.mark.parametrize(
    "how",
    [
        "closure",
        "attribute of a bound method's object",
        "bound method of a module",
        "method of a module",
        "argument",
        "keyword argument",
        "partial",
        "default argument",
        "value of another State",
        "function that is called",
    ],
)
def test_a_value_is_never_frozen_however_the_state_is_reached(how):
    state = sf.State(jnp.array(1))
    read = reading(state, how)
    for value in (1, 5, 7):
        state.value = value
        assert read(ONE) == 1 + value
    # Other dtypes and shapes, too.
    state.value = jnp.array([1.5, 2.5])
    assert read(jnp.ones(2)).tolist() == [2.5, 3.5]


def test_a_value_is_never_frozen_of_a_global_state():
    read = sf.filter_jit(read_global)
    for value in (1, 5):
        GLOBAL.value = value
        assert read(ONE) == 1 + value


def test_static_parts_of_a_value_are_never_frozen():
    s = sf.State({"scale": jnp.array(2), "how": "abs"})
    f = sf.filter_jit(lambda x: getattr(jnp, s.value["how"])(x) * s.value["scale"])
    assert f(jnp.array(-3)) == 6
    s.value = {"scale": jnp.array(2), "how": "negative"}
    assert f(jnp.array(-3)) == 6
    s.value = {"scale": jnp.array(3), "how": "positive"}
    assert f(jnp.array(-3)) == -9


def test_a_function_that_is_held_in_a_state_is_never_frozen():
    net = sf.Param(eqx.nn.MLP(2, 2, 4, 1, activation=jnp.tanh, key=jax.random.key(0)))
    apply = sf.filter_jit(lambda x: net.value(x))
    x = jnp.ones(2)
    first = apply(x)
    net.value = eqx.tree_at(lambda n: n.activation, net.value, jnp.negative)
    assert not jnp.allclose(apply(x), first)
    assert jnp.allclose(apply(x), net.value(x))


def test_a_state_read_by_the_body_of_a_raw_scan_is_never_frozen():
    s, t = sf.State(jnp.array(2)), sf.State(jnp.array(0))

    def body(carry, x):  # one object: JAX keeps its jaxpr over several traces
        return carry + s.value * x, None

    @sf.filter_jit
    def step(xs):
        t.value, _ = jax.lax.scan(body, jnp.array(0), xs)

    for n in (2, 3, 2, 4):
        for value in (2, 5):
            s.value = value
            step(jnp.ones(n, jnp.int32))
            assert t.value == value * n


RAW = {
    "scan": lambda f, x: jax.lax.scan(lambda c, _: (f(c), None), x, None, length=2)[0],
    "jit": lambda f, x: jax.jit(f)(jax.jit(f)(x)),
    "checkpoint": lambda f, x: jax.grad(jax.checkpoint(lambda x: f(f(x))))(x),
    "while": lambda f, x: jax.lax.fori_loop(0, 2, lambda _, c: f(c), x),
    "cond": lambda f, x: jax.lax.cond(x > 0, f, f, f(x)),
    "vmap": lambda f, x: jax.vmap(lambda x: f(f(x)))(jnp.stack([x, x]))[0],
    "map": lambda f, x: jax.lax.map(lambda x: f(f(x)), jnp.stack([x, x]))[0],
    "eqx.filter_jit": lambda f, x: eqx.filter_jit(lambda x: f(f(x)))(x),
}

SHARED = sf.State(jnp.array(3.0), name="shared")


def scale(x):
    return x * SHARED.value


scale_jit = jax.jit(scale)
scale_checkpoint = jax.checkpoint(scale)


def scale_body(carry, _):
    return scale(carry), None


@pytest.mark.parametrize("name", RAW)
def test_a_state_read_inside_a_raw_transform_inside_a_twin_is_an_input(name):
    # The functions are globals, and traced in several outer traces: what JAX has kept
    # of an earlier one must not come back.
    for value in (3.0, 4.0):
        SHARED.value = value
        outers = [sf.filter_jit(lambda x: RAW[name](scale, x)) for _ in range(2)]
        for x in (jnp.array(1.0), jnp.array(1.0), jnp.array(2.0)):
            for outer in outers:
                factor = 1.0 if name == "checkpoint" else x
                assert outer(x) == value**2 * factor
        SHARED.value = 10.0
        assert outers[0](jnp.array(1.0)) == 100


@pytest.mark.parametrize(
    "apply",
    [
        scale_jit,
        scale_checkpoint,
        jax.grad(scale_checkpoint),
        lambda x: jax.lax.scan(scale_body, x, None, length=1)[0],
    ],
    ids=["jit", "checkpoint", "grad of checkpoint", "scan"],
)
def test_a_transformed_global_that_reads_a_state_serves_several_traces(apply):
    one = jnp.array(1.0)
    for value in (3.0, 4.0):
        for _ in range(2):
            SHARED.value = value
            first = sf.filter_jit(lambda x: apply(x))
            second = sf.filter_jit(lambda x: (apply(x), apply(x)))
            assert first(one) == value
            assert second(one) == (value, value)
            SHARED.value = value + 1
            assert first(one) == value + 1
            assert second(one) == (value + 1, value + 1)
            nested = sf.filter_jit(lambda x, f=first, g=second: f(x) + g(x)[0])
            assert nested(one) == 2 * (value + 1)


def test_a_raw_transform_around_a_written_state_sees_the_write():
    s = sf.State(jnp.array(1.0))

    @sf.filter_jit
    def step(x):
        s.value += 1
        first = jax.lax.scan(lambda c, _: (c * s.value, None), x, None, length=2)[0]
        s.value += 1
        second = jax.lax.scan(lambda c, _: (c * s.value, None), x, None, length=2)[0]
        return first, second

    assert step(jnp.array(1.0)) == (4, 9)
    assert step(jnp.array(1.0)) == (16, 25)


def test_a_name_that_means_another_state_now():
    # A model that is made anew, as in a notebook: nobody holds the old one.
    cell = {"state": sf.State(jnp.array(1))}
    read = sf.filter_jit(lambda x: x + cell["state"].value)
    assert read(ONE) == 2
    cell["state"] = sf.State(jnp.array(10))
    gc.collect()
    assert read(ONE) == 11
    cell["state"].value = 20
    assert read(ONE) == 21


def test_a_module_argument_with_another_state_in_it():
    read = sf.filter_jit(lambda m, x: x + m.state.value)
    module = Module(sf.State(jnp.array(1)))
    assert read(module, ONE) == 2
    other = eqx.tree_at(lambda m: m.state, module, sf.State(jnp.array(10)))
    assert read(other, ONE) == 11
    assert read(module, ONE) == 2


def test_a_state_that_is_an_argument_and_in_the_closure_is_one_state():
    s = sf.State(jnp.array(1))

    @sf.filter_jit
    def f(m, x):
        m.state.value += x
        s.value *= 10
        return m.state.value

    assert f(Module(s), ONE) == 20
    assert s.value == 20
    other = Module(sf.State(jnp.array(5)))
    assert f(other, ONE) == 6
    assert (s.value, other.state.value) == (200, 6)
    assert f(Module(s), ONE) == 2010


def test_closed_over_arrays_are_inputs_of_the_program():
    # As large constants they would be copied into every compiled version.
    table = jnp.arange(1000.0)
    s = sf.State(jnp.array(1.0))
    f = sf.filter_jit(lambda i: table[i] * s.value)
    assert f(jnp.array(3)) == 3
    assert "constant" not in [
        line.split("= ")[1].split("(")[0].split(".")[-1]
        for line in f.lower(ONE).as_text().splitlines()
        if "1000xf32" in line and "= " in line
    ]


# -- P2: transactions ---------------------------------------------------------------


def failing_at(depth, states):
    """A function that writes and raises `depth` calls down."""

    def bottom(x):
        for s in states:
            s.value = s.value + x
        raise KeyError("at the bottom")

    def calling(inner):
        def call(x):
            for s in states:
                s.value = 2 * s.value
            inner(x)

        return call

    function = sf.filter_jit(bottom)
    for _ in range(depth):
        function = sf.filter_jit(calling(function))
    return function


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_a_failed_trace_leaves_every_state_as_it_was(depth):
    states = [sf.State(jnp.array(1)), sf.State(jnp.array(2))]
    before = [s.value for s in states]
    fail = failing_at(depth, states)
    for _ in range(2):
        with pytest.raises(KeyError, match="at the bottom"):
            fail(ONE)
        assert [s.value is b for s, b in zip(states, before, strict=True)] == [True] * 2


def test_a_failed_trace_with_a_changed_tree_leaves_every_state_as_it_was():
    s, t = sf.State(jnp.array(1)), sf.State(jnp.array(1.5))
    before = s.value, t.value

    @sf.filter_jit
    def fail(x):
        s.value = {"another": [x, x], "tree": x + 1}
        t.value = eqx.nn.Linear(2, 2, key=jax.random.key(0))
        jnp.zeros(2) + jnp.zeros(3)

    with pytest.raises(TypeError, match=r"incompatible shapes|broadcast"):
        fail(ONE)
    assert (s.value, t.value) == before
    assert s.value is before[0]
    assert repr(s) == "State(int32[])"


def test_a_failure_at_lowering_leaves_every_state_as_it_was():
    s = sf.State(jnp.array(1))

    @sf.filter_jit
    def fail(x):
        s.value += x
        return jax.lax.psum(x, "no such axis")

    with pytest.raises(NameError, match="no such axis"):
        fail(ONE)
    assert s.value == 1


def test_a_failure_that_the_function_catches_keeps_only_its_own_writes():
    s = sf.State(jnp.array(1))

    @sf.filter_jit
    def fail(x):
        s.value = 100 * x
        raise KeyError

    @sf.filter_jit
    def outer(x):
        s.value += x
        with contextlib.suppress(KeyError):
            fail(x)
        s.value += x

    outer(ONE)
    assert s.value == 3


def test_a_refused_write_leaves_every_state_as_it_was():
    s, t = sf.State(jnp.array(1)), sf.State(jnp.array(1), name="whole")

    @sf.filter_jit
    def fail():
        s.value += 1
        t.value = 1.5

    with pytest.raises(TypeError, match="the wrong type was written to State 'whole'"):
        fail()
    assert (s.value, t.value) == (1, 1)


def test_a_result_that_is_refused_leaves_every_state_as_it_was():
    s = sf.State(jnp.array(1))

    @sf.filter_jit
    def fail():
        s.value += 1
        return s

    with pytest.raises(TypeError, match="was returned"):
        fail()
    assert s.value == 1


def test_a_value_changed_in_place_is_an_error_and_changes_nothing():
    s, t = sf.State({"n": jnp.array(1)}, name="mine"), sf.State(jnp.array(1))

    @sf.filter_jit
    def fail(x):
        t.value += x
        s.value["n"] = x

    with pytest.raises(
        sf.StateTraceError, match=r"the value of State 'mine' .* in place"
    ):
        fail(ONE)
    assert (s.value["n"], t.value) == (1, 1)


def test_no_tracer_is_stored():
    s, t = sf.State(jnp.array(1)), sf.State({"a": jnp.array(1)})
    stored = []

    @sf.filter_jit
    def step(x):
        s.value = t.value["a"] + x
        t.value = {"b": s.value}
        # Behind the back of the trace: what is committed.
        stored.extend([s._cell.flat, t._cell.flat])

    step(ONE)
    stored += [s._cell.flat, t._cell.flat]
    assert not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(stored))


@pytest.mark.usefixtures("checking_leaks")
def test_no_tracer_outlives_its_trace():
    s, t = (
        sf.State(jnp.array(1.0)),
        sf.Param(eqx.nn.Linear(2, 2, key=jax.random.key(0))),
    )
    inner = sf.filter_jit(lambda x: s.value * x)

    @sf.filter_jit
    def step(x):
        s.value += 1
        y = jax.lax.scan(lambda c, _: (inner(c), None), x, None, length=2)[0]
        gradient = jax.grad(lambda x: jnp.sum(inner(x)))(x)
        t.value = jax.tree.map(lambda w: w * y[0], t.value)
        if x.shape == (3,):
            raise KeyError
        return y + gradient

    for shape in (2, 2, 1):
        step(jnp.ones(shape))
    with pytest.raises(KeyError):
        step(jnp.ones(3))
    assert s.value == 4


@pytest.mark.usefixtures("checking_leaks")
def test_an_inner_function_that_closes_over_a_tracer_keeps_none():
    s = sf.State(jnp.array(1.0))

    @sf.filter_jit
    def outer(x):
        y = 2 * x

        @sf.filter_jit
        def inner(z):
            s.value += y
            return z * y

        return inner(x) + inner(y)

    for n in (1.0, 2.0):
        assert outer(jnp.array(n)) == 2 * n * n + 4 * n * n
    assert s.value == 1 + 4 + 8


def test_an_inner_function_made_once_that_closes_over_tracers_is_not_stale():
    s = sf.State(jnp.array(0.0))
    box = []
    inner = sf.filter_jit(lambda z: z * box[-1] + s.value)

    @sf.filter_jit
    def outer(x):
        box.append(2 * x)
        out = inner(x)
        box.append(3 * x)
        return out

    # Another trace of `outer` (another shape) must not get the first one's tracer.
    assert outer(jnp.array(2.0)) == 8
    assert outer(jnp.array([2.0])).tolist() == [8]
    assert outer(jnp.array(3.0)) == 18


def checked(x, bad):
    return eqx.error_if(x, bad, "x is bad")


def branched(x, bad):
    index = jnp.where(bad, 1, 0)
    return eqx.branched_error_if(x, bad, index, ["never", "x is bad"])


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("check", [checked, branched])
def test_a_runtime_check_that_fails_leaves_every_state_as_it_was(check, nested):
    s, t = sf.State(jnp.array(1.0)), sf.State({"n": jnp.zeros(3)})

    @sf.filter_jit
    def step(x):
        s.value = check(s.value + x, x > 5)
        t.value = {"n": t.value["n"] + 1}
        return x

    call = sf.filter_jit(lambda x: step(x)) if nested else step
    call(jnp.array(1.0))
    before = s.value, t.value["n"]
    for _ in range(2):
        with pytest.raises(eqx.EquinoxRuntimeError, match="x is bad"):
            call(jnp.array(6.0))
        assert s.value is before[0]
        assert t.value["n"] is before[1]
    call(jnp.array(1.0))
    assert s.value == 3


def test_a_check_in_a_loop_of_a_raw_transform_leaves_every_state_as_it_was():
    s = sf.State(jnp.array(1.0))

    @sf.filter_jit
    def step(xs):
        def body(carry, x):
            return checked(carry + x, x > 5), None

        s.value, _ = jax.lax.scan(body, s.value, xs)

    step(jnp.ones(3))
    with pytest.raises(eqx.EquinoxRuntimeError, match="x is bad"):
        step(jnp.array([1.0, 6.0, 1.0]))
    assert s.value == 4


def test_a_check_on_a_value_that_is_not_written_is_waited_for():
    # The check hangs on the result only; the State must not be written before it ran.
    s = sf.State(jnp.array(0))

    @sf.filter_jit
    def step(x):
        s.value += 1
        return checked(x, x > 5)

    step(ONE)
    with pytest.raises(eqx.EquinoxRuntimeError, match="x is bad"):
        step(jnp.array(6))
    assert s.value == 1


def test_a_check_in_one_specialisation_only():
    s = sf.State(jnp.array(0.0))

    @sf.filter_jit
    def step(x):
        s.value += checked(x.sum(), x[0] > 5) if x.shape[0] == 2 else x.sum()

    step(jnp.full(1, 9.0))
    step(jnp.ones(2))
    with pytest.raises(eqx.EquinoxRuntimeError, match="x is bad"):
        step(jnp.full(2, 9.0))
    step(jnp.full(1, 9.0))
    assert s.value == 20


def test_a_callback_that_raises_leaves_every_state_as_it_was():
    s = sf.State(jnp.array(0))

    def callback(x):
        if x > 5:
            raise KeyError("from the host")
        return x

    @sf.filter_jit
    def step(x):
        s.value += 1
        return jax.pure_callback(callback, jax.typeof(x), x)

    step(ONE)
    with pytest.raises(Exception, match="from the host"):
        step(jnp.array(6))
    assert s.value == 1


def test_a_check_under_disable_jit_leaves_every_state_as_it_was():
    s = sf.State(jnp.array(0))

    @sf.filter_jit
    def step(x):
        s.value += 1
        s.value = checked(s.value, x > 5)

    with jax.disable_jit():
        step(ONE)
        with pytest.raises(Exception, match="x is bad"):
            step(jnp.array(6))
    assert s.value == 1


# -- effects ------------------------------------------------------------------------


def test_effects_happen_once_a_call_and_in_order():
    s = sf.State(jnp.array(0))
    seen = []

    @sf.filter_jit
    def step(x):
        for i in range(3):
            s.value += x
            jax.experimental.io_callback(
                lambda v, i: seen.append((int(v), int(i))),
                None,
                s.value,
                i,
                ordered=True,
            )

    for _ in range(2):
        step(ONE)
    jax.effects_barrier()
    assert seen == [(1, 0), (2, 1), (3, 2), (4, 0), (5, 1), (6, 2)]


def test_debug_print_shows_the_value(capfd):
    s = sf.State(jnp.array(1))

    @sf.filter_jit
    def step(x):
        s.value += x
        jax.debug.print("now {}", s.value)

    step(ONE)
    step(ONE)
    jax.effects_barrier()
    assert capfd.readouterr().out.splitlines() == ["now 2", "now 3"]


def test_a_result_of_a_host_callback_may_be_written():
    s = sf.State(jnp.array(0))
    count = iter(range(10, 20))

    @sf.filter_jit
    def step():
        aval = jax.ShapeDtypeStruct((), jnp.int32)
        s.value += jax.experimental.io_callback(lambda: np.int32(next(count)), aval)

    step()
    step()
    assert s.value == 10 + 11


def test_a_callback_may_write_a_state_that_the_function_only_reads():
    s, t = sf.State(jnp.array(1)), sf.State(jnp.array(0))

    @sf.filter_jit
    def step():
        jax.debug.callback(lambda x: setattr(s, "value", int(x) + 10), s.value)
        t.value = s.value

    step()
    jax.effects_barrier()
    assert (s.value, t.value) == (11, 1)


# -- P3: only what was written comes back -------------------------------------------


def test_a_state_that_is_only_read_is_no_output():
    big, count = sf.State(jnp.zeros(1000)), sf.State(jnp.array(0.0))
    untouched = sf.State(jnp.array(0.0))

    @sf.filter_jit
    def step(x):
        count.value += big.value[0] + x
        return untouched is None

    jaxpr = step.stateful_function.get_jaxpr(jnp.array(1.0)).jaxpr
    assert [v.aval.shape for v in jaxpr.invars] == [(), (), (1000,)]
    assert [v.aval.shape for v in jaxpr.outvars] == [()]
    compiled = step.lower(jnp.array(1.0)).compile()
    assert compiled.memory_analysis().output_size_in_bytes < 1000
    kept = big.value
    step(jnp.array(1.0))
    assert big.value is kept


def test_a_state_that_is_only_written_is_no_input():
    s = sf.State(jnp.zeros(1000))

    @sf.filter_jit
    def step(x):
        s.value = x
        return s.value

    jaxpr = step.stateful_function.get_jaxpr(ONE).jaxpr
    assert (len(jaxpr.invars), len(jaxpr.outvars)) == (1, 2)
    # Whatever shape it has had: nothing is traced anew.
    step(ONE)
    s.value = jnp.zeros((3, 3))
    step(ONE)
    assert step.stateful_function.get_cache_stats()["compilation_cache"]["misses"] == 1


def test_a_write_of_the_value_that_was_read_is_a_write():
    s = sf.State(jnp.array(1))

    @sf.filter_jit
    def step():
        s.value = s.value

    step()
    assert step.stateful_function.get_write_states() == (s,)


def test_specialisations_may_write_different_states():
    s, t = sf.State(jnp.array(0)), sf.State(jnp.array(0))

    @sf.filter_jit
    def step(x):
        if x.shape:
            s.value += 1
        else:
            t.value += 1

    for x in (ONE, jnp.ones(1), ONE, jnp.ones(1), ONE):
        kept = (s if not x.shape else t).value
        step(x)
        assert (s if not x.shape else t).value is kept
    assert (s.value, t.value) == (2, 3)


def test_an_inner_call_is_read_only_where_its_specialisation_is():
    # What another specialisation of the inner function reads is not what this one does.
    s = sf.State(jnp.array(1), name="of vectors")
    t = sf.State(jnp.array(2), name="of scalars")
    inner = sf.filter_jit(lambda x: x + (s if x.shape else t).value)
    inner(jnp.ones(1, jnp.int32)), inner(ONE)
    outer = sf.filter_jit(lambda x: inner(x))
    assert outer.stateful_function.get_states(ONE) == (t,)
    assert outer(ONE) == 3


# -- P4: one trace ------------------------------------------------------------------


def test_a_body_five_calls_down_runs_once_per_specialisation():
    s = sf.State(jnp.array(0))
    runs = []

    def body(x):
        runs.append(x.shape)
        s.value += x.shape[0]

    function = body
    for _ in range(5):
        function = sf.filter_jit(functools.partial(lambda f, x: f(x), function))
    for n in (1, 2, 1, 2, 1):
        function(jnp.ones(n))
    assert runs == [(1,), (2,)]
    assert s.value == 7


def test_states_found_late_do_not_trace_again():
    # The second specialisation reads a State that the first has not heard of.
    s, t = sf.State(jnp.array(1)), sf.State(jnp.array(10))
    runs = []

    @sf.filter_jit
    def f(x):
        runs.append(x.shape)
        return s.value + (t.value if x.shape else 0)

    for x in (ONE, jnp.ones(1), ONE, jnp.ones(1)):
        assert f(x) == (11 if x.shape else 1)
    assert runs == [(), (1,)]


def test_asking_and_calling_share_a_trace():
    s = sf.State(jnp.array(1))
    runs = []

    @sf.filter_jit
    def f(x):
        runs.append(())
        s.value += x
        return s.value

    f.stateful_function.get_jaxpr(ONE)
    f.eval_shape(ONE)
    f.lower(ONE).compile()(ONE)
    f(ONE)
    sf.filter_jit(lambda x: f(x))(ONE)
    assert len(runs) == 1
    assert s.value == 4


# -- P6: the same key as jax.jit ----------------------------------------------------


def change_cases():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    split, whole = NamedSharding(mesh, P("d")), NamedSharding(mesh, P())
    nothing = contextlib.nullcontext
    x = jnp.ones(4, jnp.float32)
    put = jax.device_put
    second = jax.devices()[1]
    # Label, context, argument, value of the State.
    return [
        ("as before", nothing, x, x),
        ("other numbers", nothing, x + 1, x + 1),
        ("shape of the argument", nothing, x[:2], x),
        ("shape of the State", nothing, x, x[:2]),
        ("both shapes", nothing, x[:2], x[:2]),
        ("rank", nothing, x[None], x),
        ("dtype of the argument", nothing, x.astype(jnp.float16), x),
        ("dtype of the State", nothing, x, x.astype(jnp.int32)),
        ("weak type", nothing, jnp.asarray(1.0), x),
        ("no weak type", nothing, jnp.asarray(1.0, jnp.float32), x),
        ("sharding of the argument", nothing, put(x, split), put(x, whole)),
        ("sharding of the State", nothing, put(x, whole), put(x, split)),
        ("both shardings", nothing, put(x, split), put(x, split)),
        ("another device", nothing, put(x, second), put(x, second)),
        ("matmul precision", lambda: jax.default_matmul_precision("highest"), x, x),
        ("another precision", lambda: jax.default_matmul_precision("default"), x, x),
        ("x64", lambda: jax.enable_x64(True), x, x),
        ("promotion", lambda: jax.numpy_dtype_promotion("standard"), x, x),
        ("mesh", lambda: jax.set_mesh(mesh), put(x, whole), put(x, whole)),
        ("default device", lambda: jax.default_device(second), x, x),
        ("NumPy", nothing, np.ones(4, np.float32), x),
        ("key type", nothing, jax.random.key(0), x),
        ("other key type", nothing, jax.random.key(0, impl="rbg"), x),
    ]


def test_what_makes_jax_jit_retrace_makes_us_retrace_and_nothing_else():
    s = sf.State(jnp.array(0.0))
    ours, theirs = [], []

    @sf.filter_jit
    def fun(x):
        ours.append(())
        return x, s.value

    @jax.jit
    def pure(x, value):
        theirs.append(())
        return x, value

    cases = change_cases()
    # Twice forward and once back: alternating between two versions costs nothing.
    for label, context, x, value in cases + cases[::-1] + cases:
        with context():
            s.value = value
            assert s.value is value
            fun(x)
            pure(x, value)
        assert len(ours) == len(theirs), label
    assert len(ours) > 10


def test_static_leaves_compare_by_type_and_value():
    traces = []

    @sf.filter_jit
    def f(x, static, *, named):
        traces.append((static, named))
        return x, static, named

    statics = (1, 1.0, True, 0, 0.0, -0.0, False, float("nan"), "1", 1 + 0j, None)
    for _ in range(2):
        for static in statics:
            out = f(ONE, static, named=(static,))
            assert repr(out[1:]) == repr((static, (static,)))
    assert repr(traces) == repr([(static, (static,)) for static in statics])


def test_static_leaves_of_a_states_value_compare_by_type_and_value():
    s = sf.State({"static": "1", "x": jnp.array(1.0)})

    class Static(eqx.Module):
        n: object = eqx.field(static=True)
        x: jax.Array

    traces = []

    @sf.filter_jit
    def f():
        traces.append(s.value.n)
        return repr(s.value.n)

    for _ in range(2):
        for n in (1, 1.0, True):
            s.value = Static(n, jnp.array(1.0))
            assert f() == repr(n)
    assert list(map(repr, traces)) == ["1", "1.0", "True"]


def test_alternating_between_two_shapes_of_a_state_compiles_twice():
    s = sf.State(jnp.zeros(2))
    traces, lowered = [], []

    @sf.filter_jit
    def step(x):
        traces.append(s.value.shape)
        s.value += x

    for _ in range(4):
        for n in (2, 3):
            s.value = jnp.zeros(n)
            step(jnp.array(1.0))
            lowered.append(step.stateful_function.get_cache_stats())
    assert traces == [(2,), (3,)]
    assert lowered[-1]["compilation_cache"]["size"] == 2


def test_alternating_between_two_structures_of_a_state_compiles_twice():
    s = sf.State(jnp.zeros(2))
    traces = []

    @sf.filter_jit
    def step(x):
        traces.append(())
        s.value = jax.tree.map(lambda v: v + x, s.value)

    for _ in range(4):
        for value in (jnp.zeros(2), {"a": jnp.zeros(2)}, (jnp.zeros(2),)):
            s.value = value
            step(jnp.array(1.0))
    assert len(traces) == 3


def test_the_second_step_is_not_traced_again():
    # Weak types are dropped, and a Python number keeps the dtype.
    s, t = sf.State(0.0), sf.State(0)
    traces = []

    @sf.filter_jit
    def step():
        traces.append(())
        s.value = 2.0 * s.value + 1
        t.value = 1

    for _ in range(3):
        step()
        s.value = 5
        t.value = True
    assert len(traces) == 1


def test_a_state_that_a_call_does_not_read_may_change_shape():
    s, t = sf.State(jnp.zeros(2)), sf.State(jnp.zeros(2))
    traces = []

    @sf.filter_jit
    def f(x):
        traces.append(x.shape)
        return (s if x.shape else t).value.sum()

    for n in (2, 3, 4):
        t.value = jnp.zeros(n)
        f(jnp.ones(1))
    assert traces == [(1,)]
    f(ONE)
    t.value = jnp.zeros(7)
    f(jnp.ones(1))
    assert traces == [(1,), ()]


def test_two_modules_of_one_structure_share_a_trace():
    traces = []

    @sf.filter_jit
    def step(m, x):
        traces.append(())
        m.state.value += x

    modules = [Module(sf.State(jnp.array(i))) for i in range(3)]
    for m in modules:
        step(m, ONE)
    assert [int(m.state.value) for m in modules] == [1, 2, 3]
    assert len(traces) == 1


def test_aliasing_between_states_of_arguments_is_part_of_the_key():
    traces = []

    @sf.filter_jit
    def step(a, b):
        traces.append(())
        a.state.value += 1
        b.state.value *= 10
        return a.state.value

    a, b = Module(sf.State(jnp.array(1))), Module(sf.State(jnp.array(2)))
    assert step(a, b) == 2
    assert step(a, Module(a.state)) == 30
    assert step(b, a) == 21
    assert (a.state.value, b.state.value) == (300, 21)
    assert len(traces) == 2


# -- P7: identity -------------------------------------------------------------------


def test_a_state_reached_by_two_paths_is_one_input():
    s = sf.State(jnp.array(1.0))
    tree = {"a": Module(s), "b": [Module(s)]}

    @sf.filter_jit
    def f(tree, x):
        tree["a"].state.value += x
        return tree["b"][0].state.value + s.value

    assert f(tree, jnp.array(1.0)) == 4
    assert len(f.stateful_function.get_jaxpr(tree, jnp.array(1.0)).jaxpr.invars) == 2
    assert s.value == 2


def test_a_module_that_comes_back_has_the_states_that_went_in():
    s = sf.State(jnp.array(1.0))
    pair = sf.filter_jit(lambda m: (m, {"again": Module(m.state)}))(Module(s))
    assert pair[0].state is s
    assert pair[1]["again"].state is s


# -- P8: loud -----------------------------------------------------------------------


def test_errors_name_the_state_its_path_and_where_it_was_created():
    class Net(eqx.Module):
        norm: Module

    net = Net(Module(sf.State(jnp.array(1.0), name="mean")))
    place = rf"{__file__}:\d+"
    where = rf"State 'mean' at `net.norm.state` \(created at {place}\)"

    @sf.filter_jit
    def raw_grad(net, x):
        def loss(x):
            net.norm.state.value = x
            return x

        return jax.grad(loss)(x)

    with pytest.raises(sf.StateTraceError, match=where + " was written inside a raw"):
        raw_grad(net, jnp.array(1.0))


@pytest.mark.parametrize(
    "transform",
    [
        jax.jit,
        jax.grad,
        lambda f: lambda x: jax.vmap(f)(x[None]),
        lambda f: lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, None, length=2),
        jax.checkpoint,
        eqx.filter_jit,
        eqx.filter_grad,
    ],
    ids=[
        "jit",
        "grad",
        "vmap",
        "scan",
        "checkpoint",
        "eqx.filter_jit",
        "eqx.filter_grad",
    ],
)
def test_a_write_inside_a_raw_transform_is_an_error(transform):
    s = sf.State(jnp.array(1.0), name="mine")

    def write(x):
        s.value = x
        return x

    message = r"State 'mine' .* was written inside a raw JAX transform"
    with pytest.raises(sf.StateTraceError, match=message):
        transform(write)(jnp.array(2.0))
    with pytest.raises(sf.StateTraceError, match=message):
        sf.filter_jit(lambda x: transform(write)(x))(jnp.array(2.0))
    assert s.value == 1


def test_a_raw_filter_jit_does_not_take_a_state_for_a_static_value():
    s = sf.State(jnp.array(1.0), name="mine")
    # JAX raises an error of its own, which quotes ours.
    with pytest.raises((TypeError, ValueError), match=r"State 'mine' .* was hashed"):
        eqx.filter_jit(lambda m: m.state.value)(Module(s))
    with pytest.raises((TypeError, ValueError), match=r"State 'mine' .* was hashed"):
        jax.jit(lambda m: 1, static_argnums=0)(s)


# -- P10: asynchronous --------------------------------------------------------------


def work(x, n):
    """`n` rounds, which XLA can't leave out."""
    return jax.lax.fori_loop(0, n, lambda _, x: jnp.cos(x @ x), x)


def rounds():
    """More and more work: whoever waits for it is done each time, however fast."""
    return [jnp.array(4**i) for i in range(2, 8)]


@pytest.mark.parametrize("donate_states", [False, True])
def test_a_call_returns_before_the_work_is_done(donate_states):
    s = sf.State(jnp.ones((200, 200)))

    @sf.filter_jit(donate_states=donate_states)
    def step(n):
        s.value = work(s.value, n)
        return s.value[0, 0]

    outer = sf.filter_jit(lambda n: step(n))
    for function in (step, outer):
        function(jnp.array(0))
        assert any(not function(n).is_ready() for n in rounds())
        assert jnp.isfinite(s.value).all()


def test_a_call_with_a_check_returns_when_the_work_is_done():
    s = sf.State(jnp.ones((200, 200)))

    @sf.filter_jit
    def step(n):
        s.value = eqx.error_if(work(s.value, n), n < 0, "less than nothing")
        return s.value[0, 0]

    for n in rounds()[:3]:
        assert step(n).is_ready()
        assert s.value.is_ready()


# -- memory -------------------------------------------------------------------------


def test_a_function_keeps_no_state_of_its_arguments_alive():
    step = sf.filter_jit(lambda m, x: m.read(x))
    module = Module(sf.State(jnp.array(1)))
    step(module, ONE)
    gone = weakref.ref(module.state)
    del module
    gc.collect()
    assert gone() is None


def test_a_function_that_is_gone_keeps_nothing():
    s = sf.State(jnp.zeros(3))
    step = sf.filter_jit(lambda x: s.value + x)
    step(jnp.ones(3))
    step.lower(jnp.ones(3)).compile()(jnp.ones(3))
    outer = sf.filter_jit(lambda x: step(x))
    outer(jnp.ones(3))
    held = [weakref.ref(x) for x in (step.__wrapped__, s, s.value)]
    del outer, step, s
    gc.collect()
    assert [ref() for ref in held] == [None] * 3
