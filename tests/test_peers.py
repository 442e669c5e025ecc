"""What other libraries for state in JAX get wrong: a test each, named after the mistake.

Here those that concern `filter_jit`; the ones about gradients, loops and serialisation
are with the twins and functions that they concern.
"""

import gc
import threading

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefun as sf

ONE = jnp.array(1)


class Counter(eqx.Module):
    count: sf.State

    @sf.filter_jit
    def add(self, x):
        self.count.value += x
        return self.count.value


def on_a_thread(function):
    out = []
    thread = threading.Thread(target=lambda: out.append(function()))
    thread.start()
    thread.join()
    return out[0]


def test_a_closure_goes_stale():
    # Flax NNX, Penzai, Equinox: the value is frozen into the compiled code.
    s = sf.State(jnp.array(1))
    model = Counter(sf.State(jnp.array(1)))
    read = sf.filter_jit(lambda x: (x + s.value, x + model.count.value))
    assert read(ONE) == (2, 2)
    s.value = 10
    model.count.value = 20
    assert read(ONE) == (11, 21)


def test_two_calls_with_side_effects_are_merged_into_one():
    # brainstate: common subexpression elimination takes them for equal.
    s = sf.State(jnp.array(0))

    @sf.filter_jit
    def bump(x):
        s.value += 1
        return x * s.value

    for optimizations in (None, ("cse", "dce")):
        s.value = 0

        @sf.filter_jit(ir_optimizations=optimizations)
        def twice(x):
            return bump(x), bump(x), bump(x)

        assert twice(ONE) == (1, 2, 3)
        assert s.value == 3


@pytest.mark.parametrize("optimizations", [None, ("cse", "dce")])
def test_two_callbacks_with_side_effects_are_merged_into_one(optimizations):
    seen = []

    @sf.filter_jit(ir_optimizations=optimizations)
    def twice(x):
        for _ in range(2):
            jax.debug.callback(lambda x: seen.append(int(x)), x)

    twice(ONE)
    jax.effects_barrier()
    assert seen == [1, 1]


def test_x64_turned_on_after_the_first_call_is_ignored():
    # brainstate
    s = sf.State(jnp.array(1, jnp.int32))

    @sf.filter_jit
    def f():
        return jnp.zeros(3) + s.value.astype(float), jnp.arange(3)

    def dtypes():
        return [x.dtype.name for x in f()]

    narrow, wide = ["float32", "int32"], ["float64", "int64"]
    assert dtypes() == narrow
    with jax.enable_x64(True):
        assert dtypes() == wide
    assert dtypes() == narrow
    with jax.enable_x64(True):
        assert sf.filter_jit(lambda: f())()[1].dtype == jnp.int64


def test_the_matmul_precision_set_after_the_first_call_is_ignored():
    # brainstate
    s = sf.State(jnp.ones((4, 4)))
    f = sf.filter_jit(lambda x: x @ s.value)
    x = jnp.ones((4, 4))

    def precision():
        f(x)
        (dot,) = [
            e
            for e in f.stateful_function.get_jaxpr(x).jaxpr.eqns
            if e.primitive.name == "dot_general"
        ]
        return dot.params["precision"]

    highest = (jax.lax.Precision.HIGHEST,) * 2
    assert precision() is None
    with jax.default_matmul_precision("highest"):
        assert precision() == highest
        assert "HIGHEST" in f.lower(x).as_text()
    assert precision() is None
    assert "HIGHEST" not in f.lower(x).as_text()


def test_1_and_true_and_1_point_0_share_an_entry():
    # Equinox, brainstate: 1 == 1.0 == True.
    kinds = sf.filter_jit(lambda x, static: type(static).__name__)
    expected = [(1, "int"), (True, "bool"), (1.0, "float")]
    for static, name in expected + expected[::-1]:
        assert kinds(ONE, static) == name

    class Static(eqx.Module):
        n: object = eqx.field(static=True)

    # The same in a static field, where tree structures compare with `==`.
    shallow = sf.filter_jit(lambda m: type(m.n).__name__)
    deep = sf.filter_jit(lambda m: type(m.n[1][0]).__name__)
    for static, name in expected + expected[::-1]:
        assert shallow(Static(static)) == name
        assert deep(Static(("deep", (static,)))) == name


def test_a_failed_trace_that_changed_the_tree_leaves_tracers_behind():
    # brainstate
    s = sf.State({"a": jnp.array(1)})

    @sf.filter_jit
    def fail(x):
        s.value = {"a": x, "b": [x, x]}
        raise KeyError

    with pytest.raises(KeyError):
        fail(ONE)
    assert jax.tree.structure(s.value) == jax.tree.structure({"a": 0})
    assert s.value["a"] == 1


def test_half_of_a_write_back_is_left_after_a_veto():
    # brainstate: one State takes its new value, the next refuses.
    s, t = sf.State(jnp.array(1)), sf.State(jnp.zeros(2, jnp.int8))
    tree = {"s": s, "t": t}
    with pytest.raises(ValueError, match=r"at `\['t'\]`"):
        sf.update(tree, {"s": jnp.array(5), "t": jnp.zeros(3, jnp.int8)})
    assert s.value == 1

    @sf.filter_jit
    def step(x):
        s.value += x
        t.value = eqx.error_if(t.value + 1, x > 1, "no")

    with pytest.raises(eqx.EquinoxRuntimeError, match="no"):
        step(jnp.array(2))
    assert (s.value, t.value.tolist()) == (1, [0, 0])

    @sf.filter_jit
    def refused(x):
        s.value += x
        s.value = "text"
        s.value = x
        t.value = t.value.at[0].set(300.5)

    with pytest.raises(Exception, match=r"scatter|promotion|dtype"):
        refused(ONE)
    assert s.value == 1


def test_an_eager_read_on_another_thread_sees_a_tracer():
    # brainstate
    s = sf.State(jnp.array(1))
    seen = []

    @sf.filter_jit
    def step(x):
        s.value += x
        seen.append(on_a_thread(lambda: s.value))
        s.value += x

    step(ONE)
    assert not isinstance(seen[0], jax.core.Tracer)
    assert seen == [1]


def test_4_times_500_threaded_increments_give_less_than_2000():
    # brainstate: 646
    s = sf.State(jnp.array(0))

    @sf.filter_jit
    def bump():
        s.value += 1

    threads = [
        threading.Thread(target=lambda: [bump() for _ in range(500)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert s.value == 2000


def test_a_state_written_on_the_host_during_a_call_is_reverted():
    # brainstate: every State that was read is written back.
    s, t = sf.State(jnp.array(1)), sf.State(jnp.array(0))

    def host(x):
        on_a_thread(lambda: setattr(s, "value", jnp.array(100)))
        return x

    @sf.filter_jit
    def step():
        t.value += jax.pure_callback(host, jax.typeof(s.value), s.value)

    step()
    assert (s.value, t.value) == (100, 1)


def test_alternating_shapes_trace_each_time():
    # brainstate
    s = sf.State(jnp.zeros(2))
    traces = []

    @sf.filter_jit
    def step(x):
        traces.append(())
        s.value = s.value + x

    for _ in range(5):
        for n in (2, 3):
            s.value = jnp.zeros(n)
            step(jnp.ones(n))
    assert len(traces) == 2


def test_nesting_doubles_the_traces_of_the_body_at_each_level():
    # ninjax
    s = sf.State(jnp.array(0))
    traces = []

    def body():
        traces.append(())
        s.value += 1

    function = body
    for _ in range(5):
        function = sf.filter_jit(lambda function=function: function())
    function()
    function()
    assert len(traces) == 1
    assert s.value == 2


def test_a_lowered_function_writes_nothing_back():
    # brainstate: one gets an object that needs internals to be called.
    s = sf.State(jnp.array(1))

    @sf.filter_jit
    def step(x):
        s.value += x
        return {"now": s.value}

    compiled = step.lower(ONE).compile()
    assert compiled(ONE) == {"now": 2}
    assert compiled(jnp.array(5)) == {"now": 7}
    assert s.value == 7


def test_two_modules_made_by_one_line_share_a_marker():
    # Equinox: two BatchNorms that are copies of each other have one StateIndex.
    def make():
        return Counter(sf.State(jnp.array(0)))

    first, second = make(), make()
    third = sf.clone(first)
    first.add(ONE)
    second.add(jnp.array(10))
    third.add(jnp.array(100))
    assert [int(c.count.value) for c in (first, second, third)] == [1, 10, 100]

    @sf.filter_jit
    def both(a, b):
        a.add(ONE)
        b.add(jnp.array(10))

    both(first, second)
    assert [int(c.count.value) for c in (first, second, third)] == [2, 20, 100]


def test_a_call_keeps_memory():
    # brainstate's eager loops grow with every call.
    s = sf.State(jnp.zeros(3))

    @sf.filter_jit
    def step(x):
        s.value += x

    def arrays():
        gc.collect()
        return len(jax.live_arrays())

    x = np.ones(3, np.float32)
    step(x)
    before = arrays()
    for _ in range(50):
        step(x)
    assert arrays() == before
