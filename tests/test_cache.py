"""The cache of traces: its keys, its limit, when it misses, and what it keeps alive."""

import functools
import gc
import sys
import threading
import weakref

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefun as sf


def counting(fun):
    """`fun`, and a list that grows by one with every run of it."""
    runs = []

    @functools.wraps(fun)
    def counted(*args, **kwargs):
        runs.append(1)
        return fun(*args, **kwargs)

    return counted, runs


def stats(fn):
    return fn.get_cache_stats()["compilation_cache"]


class Holder(eqx.Module):
    state: sf.State


# -- keys ---------------------------------------------------------------------------


def key_of(*args, **kwargs):
    return sf.StatefulFunction(lambda *a, **k: 0).get_arg_cache_key(*args, **kwargs)


def test_a_cache_key_is_a_named_tuple_of_four():
    key = key_of(jnp.ones(2), 3, x=jnp.ones(4), y="s")
    assert isinstance(key, sf.CacheKey)
    assert isinstance(key, tuple)
    fields = ("static_args", "dyn_args", "static_kwargs", "dyn_kwargs")
    assert sf.CacheKey._fields == fields
    assert [aval.shape for aval in key.dyn_args] == [(2,)]
    assert [aval.shape for aval in key.dyn_kwargs] == [(4,)]


def test_a_cache_key_is_hashable_and_immutable():
    key = key_of(jnp.ones(2), {"a": [1, Holder(sf.State(1.0))]}, x=jnp.ones(4))
    again = key_of(jnp.zeros(2), {"a": [1, Holder(sf.State(2.0))]}, x=jnp.zeros(4))
    assert key == again
    assert hash(key) == hash(again)
    assert {key: 1}[again] == 1
    with pytest.raises(AttributeError):
        key.dyn_args = ()  # type: ignore[misc]


@pytest.mark.parametrize("where", ["argument", "keyword", "tree", "module"])
def test_keys_tell_static_values_apart_by_type(where):
    class Static(eqx.Module):
        n: object = eqx.field(static=True)

    make = {
        "argument": lambda n: key_of(n),
        "keyword": lambda n: key_of(k=n),
        "tree": lambda n: key_of({"a": (n,)}),
        "module": lambda n: key_of(Static(n)),
    }[where]
    keys = [make(n) for n in (1, 1.0, True)]
    assert len(set(keys)) == 3
    assert make(1.0) == keys[1]


def test_the_order_of_keywords_does_not_matter():
    a, b = jnp.ones(1), jnp.ones(2)
    assert key_of(x=a, y=b, n=3) == key_of(n=3, y=b, x=a)
    fun, runs = counting(lambda **k: k["x"])
    fn = sf.StatefulFunction(fun)
    fn(x=a, y=b, n=3)
    fn(n=3, y=b, x=a)
    assert len(runs) == 1


def test_keys_differ_where_arguments_do():
    x = jnp.ones(2)
    different = [
        key_of(),
        key_of(x),
        key_of(jnp.ones(3)),
        key_of(x.astype(jnp.int32)),
        key_of((x,)),
        key_of([x]),
        key_of(x, x),
        key_of(x=x),
        key_of(y=x),
        key_of(x, "s"),
        key_of(x, "t"),
        key_of(Holder(sf.State(1.0))),
        key_of(Holder(sf.Param(1.0))),
    ]
    assert len(set(different)) == len(different)


def test_the_key_of_a_numpy_array_is_the_one_it_is_traced_under():
    fn = sf.StatefulFunction(lambda x: x)
    array = np.ones(3)  # float64, which jax makes a float32
    key = fn.get_arg_cache_key(array, compile_if_miss=True)
    assert fn.get_arg_cache_key(array) == key
    assert len(fn.get_jaxpr_by_cache(key).jaxpr.invars) == 1


def test_weak_types_are_part_of_the_key_as_in_jax_jit():
    weak, strong = jnp.asarray(1.0), jnp.asarray(1.0, jnp.float32)
    assert weak.weak_type
    assert not strong.weak_type
    runs = {}
    for jit in (jax.jit, sf.StatefulFunction):
        fun, runs[jit] = counting(lambda x: x)
        fn = jit(fun)
        for x in (weak, strong, weak, strong):
            assert fn(x).weak_type == x.weak_type
    assert len(runs[jax.jit]) == len(runs[sf.StatefulFunction]) == 2


# -- counts -------------------------------------------------------------------------


def test_stats_of_a_new_function():
    fn = sf.StatefulFunction(lambda x: x)
    assert fn.get_cache_stats() == {
        "compilation_cache": {
            "size": 0,
            "maxsize": 128,
            "hits": 0,
            "misses": 0,
            "hit_rate": 0.0,
        }
    }


def test_stats_count_hits_and_misses_of_calls_and_questions():
    fn = sf.StatefulFunction(lambda x: x)
    x, y = jnp.ones(2), jnp.ones(3)
    fn(x)
    assert stats(fn) == dict(size=1, maxsize=128, hits=0, misses=1, hit_rate=0.0)
    fn(x)
    fn.get_jaxpr(x)
    fn(x)
    assert stats(fn) == dict(size=1, maxsize=128, hits=3, misses=1, hit_rate=0.75)
    fn.get_jaxpr(y)
    fn(y)
    fn(y)
    fn(x)
    assert stats(fn) == dict(size=2, maxsize=128, hits=6, misses=2, hit_rate=0.75)


def test_a_question_that_may_not_trace_counts_as_a_miss():
    fn = sf.StatefulFunction(lambda x: x)
    with pytest.raises(ValueError, match="nothing was traced"):
        fn.get_jaxpr(jnp.ones(2), compile_if_miss=False)
    found = stats(fn)
    assert (found["size"], found["hits"], found["misses"]) == (0, 0, 1)


def test_a_trace_that_raises_is_a_miss_and_leaves_nothing_in_the_cache():
    fail = [True]

    def step(x):
        if fail[0]:
            raise KeyError("mine")
        return x

    fn = sf.StatefulFunction(step)
    x = jnp.ones(2)
    for _ in range(2):
        with pytest.raises(KeyError, match="mine"):
            fn(x)
        with pytest.raises(KeyError, match="mine"):
            fn.make_jaxpr(x)
    found = stats(fn)
    assert (found["size"], found["hits"], found["misses"]) == (0, 0, 4)
    assert fn.validate_all_states() == {}
    key = fn.get_arg_cache_key(x)
    with pytest.raises(ValueError, match=r"Known:\n\(none\)"):
        fn.get_jaxpr_by_cache(key)
    fail[0] = False
    np.testing.assert_array_equal(fn(x), x)
    assert stats(fn)["size"] == 1


def test_a_trace_that_raises_leaves_the_earlier_ones_in_the_cache():
    def step(x):
        if x.shape == (3,):
            raise KeyError("mine")
        return x

    fun, runs = counting(step)
    fn = sf.StatefulFunction(fun)
    fn(jnp.ones(2))
    with pytest.raises(KeyError, match="mine"):
        fn(jnp.ones(3))
    fn(jnp.ones(2))
    assert len(runs) == 2
    assert stats(fn)["size"] == 1


def test_clear_cache_forgets_everything_traced_and_compiled():
    s = sf.State(jnp.array(0))

    def step(x):
        s.value += 1
        return x

    fun, runs = counting(step)
    fn = sf.StatefulFunction(fun)
    x = jnp.ones(2)
    key = fn.get_arg_cache_key(x, compile_if_miss=True)
    fn(x)
    fn.clear_cache()
    assert stats(fn) == dict(size=0, maxsize=128, hits=0, misses=0, hit_rate=0.0)
    with pytest.raises(ValueError, match="nothing was traced"):
        fn.get_jaxpr_by_cache(key)
    assert len(runs) == 1
    fn(x)
    fn(x)
    assert len(runs) == 2
    assert s.value == 3


# -- the limit ----------------------------------------------------------------------

LIMIT = 128


def by_shape(i):
    # `jnp.zeros` would compile something for each of them.
    return (jax.device_put(np.zeros(i + 1, np.float32)),)


def by_static(i):
    return (i, np.zeros(1, np.float32))


@pytest.mark.parametrize("arguments", [by_shape, by_static])
def test_the_least_recently_used_of_129_is_traced_anew_and_a_used_one_stays(arguments):
    fun, runs = counting(lambda *args: args[-1])
    fn = sf.StatefulFunction(fun)
    for i in range(LIMIT):
        fn.make_jaxpr(*arguments(i))
        fn.make_jaxpr(*arguments(0))  # used often
    assert len(runs) == stats(fn)["size"] == LIMIT
    fn.make_jaxpr(*arguments(LIMIT))
    assert len(runs) == LIMIT + 1
    assert stats(fn)["size"] == LIMIT
    fn.make_jaxpr(*arguments(0))  # stayed
    fn.make_jaxpr(*arguments(2))
    assert len(runs) == LIMIT + 1
    with pytest.raises(ValueError, match="nothing was traced"):
        fn.get_jaxpr(*arguments(1), compile_if_miss=False)
    fn.make_jaxpr(*arguments(1))  # the oldest
    assert len(runs) == LIMIT + 2
    assert stats(fn)["size"] == LIMIT


def test_calls_keep_a_trace_in_use():
    fun, runs = counting(lambda n, x: x + n)
    fn = sf.StatefulFunction(fun)
    x = jnp.zeros(1, jnp.int32)
    fn(0, x)
    for i in range(1, LIMIT + 60):
        fn.make_jaxpr(i, x)
        assert fn(0, x) == 0
    assert len(runs) == LIMIT + 60
    assert stats(fn)["size"] == LIMIT


@pytest.mark.parametrize("arguments", [by_shape, by_static])
def test_with_more_than_128_traces_every_call_is_still_right(arguments):
    s = sf.State(jnp.array(0))

    def step(*args):
        s.value += 1
        return args[-1] + 1, args[0] if len(args) > 1 else None

    fn = sf.StatefulFunction(step)
    used = [0, 1, *range(LIMIT + 2), 0, 1, 2]
    for i in used[:2]:
        fn(*arguments(i))
    for i in used[2:-3]:
        fn.make_jaxpr(*arguments(i))
    for i in used[-3:]:
        given = arguments(i)
        array, static = fn(*given)
        np.testing.assert_array_equal(array, given[-1] + 1)
        assert static == (i if arguments is by_static else None)
        # What was just called is known.
        assert len(fn.get_jaxpr(*given, compile_if_miss=False).jaxpr.invars) == 2
    assert s.value == 5
    assert stats(fn)["size"] == LIMIT


# -- threads ------------------------------------------------------------------------


def in_threads(*functions):
    """Runs them at the same time; raises what one of them raised."""
    errors = []

    def guarded(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)

    # Daemons: a test for a deadlock must not keep the process alive when it fails.
    threads = [
        threading.Thread(target=guarded, args=[f], daemon=True) for f in functions
    ]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # as many interleavings as can be
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=20)
    finally:
        sys.setswitchinterval(interval)
    assert not any(thread.is_alive() for thread in threads), "deadlock"
    if errors:
        raise errors[0]


@pytest.mark.parametrize("method", ["__call__", "make_jaxpr", "get_states"])
@pytest.mark.parametrize("static", [False, True])
def test_threads_that_miss_on_the_same_key_trace_once(method, static):
    s = sf.State(jnp.array(0))
    n = 4
    barrier = threading.Barrier(n)
    started = threading.Event()

    def step(x, k=None):
        started.set()
        s.value += 1
        return x

    fun, runs = counting(step)
    fn = sf.StatefulFunction(fun)
    x = jnp.ones(2)

    def work():
        barrier.wait()
        getattr(fn, method)(x, *(["k"] if static else []))

    in_threads(*[work] * n)
    assert started.is_set()
    assert len(runs) == 1
    assert s.value == (n if method == "__call__" else 0)
    found = stats(fn)
    assert (found["size"], found["misses"]) == (1, 1)


def test_a_thread_that_misses_while_another_traces_waits_for_its_trace():
    s = sf.State(jnp.array(0))
    inside, go_on = threading.Event(), threading.Event()

    def step(x):
        inside.set()
        assert go_on.wait(timeout=20)
        s.value += 1
        return x

    fun, runs = counting(step)
    fn = sf.StatefulFunction(fun)
    x = jnp.ones(2)

    def first():
        fn(x)

    def second():
        assert inside.wait(timeout=20)
        # The trace goes on only when this thread is about to ask for it, too.
        go_on.set()
        fn(x)

    in_threads(first, second)
    assert len(runs) == 1
    assert s.value == 2


def test_functions_that_call_each_other_may_be_traced_by_two_threads():
    # Each thread is inside one function's trace when it needs the other's.
    s = sf.State(jnp.array(0))
    inside = {"ping": threading.Event(), "pong": threading.Event()}

    def body(me, other, n, x):
        if n == 2:
            inside[me].set()
            # If only one thread may trace at a time the other one never gets there.
            inside[other].wait(timeout=1)
        s.value += 1
        return x if n == 0 else functions[other](n - 1, x) + 1

    functions = {
        "ping": sf.StatefulFunction(functools.partial(body, "ping", "pong")),
        "pong": sf.StatefulFunction(functools.partial(body, "pong", "ping")),
    }
    x, out = jnp.array(0), {}

    def work(name):
        out[name] = functions[name](2, x)

    in_threads(*[functools.partial(work, name) for name in functions])
    assert out == {"ping": 2, "pong": 2}
    assert s.value == 6


def test_questions_about_modules_in_threads_answer_with_their_own_states():
    fn = sf.StatefulFunction(lambda m, x: m.state.value * x)
    modules = [Holder(sf.State(jnp.array(float(i)))) for i in range(4)]
    barrier = threading.Barrier(4)

    def work(i):
        barrier.wait()
        for n in range(1, 9):
            x = jnp.ones(n)
            assert fn.get_states(modules[i], x) == (modules[i].state,)
            np.testing.assert_array_equal(fn(modules[i], x), np.full(n, i))

    in_threads(*[functools.partial(work, i) for i in range(4)])
    assert stats(fn)["size"] == 8


def test_a_call_that_ends_during_anothers_trace_does_not_disturb_it():
    running, tracing, ended = (threading.Event() for _ in range(3))

    def wait_in_call(value):
        if warm:
            running.set()
            tracing.wait(timeout=20)
        return value

    def step(module, x):
        if x.shape == (3,):
            tracing.set()
            ended.wait(timeout=20)
        value = module.state.value
        return jax.pure_callback(wait_in_call, jax.typeof(value), value)

    fn = sf.StatefulFunction(step)
    short, long = jnp.ones(2), jnp.ones(3)
    one, two = (Holder(sf.State(np.float32(i))) for i in (1, 2))
    warm = False
    assert fn(one, short) == 1.0
    warm = True

    def call():
        assert fn(one, short) == 1.0
        ended.set()

    def trace():
        assert running.wait(timeout=20)
        assert fn(two, long) == 2.0

    in_threads(call, trace)
    assert fn.get_states(two, long) == (two.state,)
    key = fn.get_arg_cache_key(two, long)
    assert fn.get_states_by_cache(key) == (two.state,)


# -- configuration ------------------------------------------------------------------


def with_x64(on):
    return jax.enable_x64(on)


def with_precision(name):
    return jax.default_matmul_precision(name)


def with_mesh(size):
    devices = np.array(jax.devices()[:size])
    return jax.set_mesh(jax.sharding.Mesh(devices, ("d",)))


CONTEXTS = {
    "x64": [functools.partial(with_x64, on) for on in (False, True)],
    "matmul precision": [
        functools.partial(with_precision, name) for name in ("bfloat16", "float32")
    ],
    "mesh": [functools.partial(with_mesh, size) for size in (1, 2)],
}


@pytest.mark.parametrize("kind", CONTEXTS)
@pytest.mark.parametrize("arguments", [0, 1])
def test_configuration_that_makes_jax_jit_retrace_makes_us_retrace(kind, arguments):
    one, two = CONTEXTS[kind]
    x = [jnp.ones((2, 2), jnp.float32)] * arguments
    read = sf.State(jnp.ones((2, 2), jnp.float32))
    # Not read: what was computed under one mesh doesn't fit under another.
    written = sf.State(None)

    def body(*args):
        value = args[0] if args else jnp.ones((2, 2), jnp.float32)
        return value @ value, jnp.arange(3)

    def stateful(*args):
        out, index = body(*args)
        written.value = out @ read.value
        return out, index

    counts, outs = {}, {}
    for name, jit, fun in [
        ("jax", jax.jit, body),
        ("statefun", sf.StatefulFunction, stateful),
    ]:
        fun, runs = counting(fun)
        fn = jit(fun)
        counts[name], outs[name] = [], []
        for context in (one, one, two, two, one, two):
            with context():
                outs[name].append(jax.tree.map(lambda y: y.dtype.name, fn(*x)))
            counts[name].append(len(runs))
        outs[name].append(jax.tree.map(lambda y: y.dtype.name, fn(*x)))
        counts[name].append(len(runs))
    assert counts["statefun"] == counts["jax"]
    assert outs["statefun"] == outs["jax"]
    assert counts["jax"][3] == 2  # the two contexts do differ for jax
    np.testing.assert_array_equal(written.value, np.full((2, 2), 4.0))


@pytest.mark.parametrize("kind", CONTEXTS)
def test_questions_are_answered_for_the_configuration_at_hand(kind):
    fun, runs = counting(lambda x: (x @ x, jnp.arange(3)))
    fn = sf.StatefulFunction(fun)
    x = jnp.ones((2, 2), jnp.float32)
    for context in CONTEXTS[kind] * 2:
        with context():
            expected = str(jax.make_jaxpr(lambda x: (x @ x, jnp.arange(3)))(x))
            assert str(fn.get_jaxpr(x)) == expected
            fn(x)
    assert len(runs) == 2


def test_another_sharding_of_a_state_traces_as_often_as_jax_jit():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("d",))
    spec = jax.sharding.PartitionSpec
    values = [
        jax.device_put(jnp.ones(4), jax.sharding.NamedSharding(mesh, spec(*axes)))
        for axes in ((), ("d",))
    ]
    s = sf.State(values[0])
    plain, plain_runs = counting(lambda v: v + 1)
    fun, runs = counting(lambda: s.value + 1)
    jitted, fn = jax.jit(plain), sf.StatefulFunction(fun)
    for value in values * 3:
        s.value = value
        expected, out = jitted(value), fn()
        np.testing.assert_array_equal(out, expected)
        assert out.sharding.is_equivalent_to(expected.sharding, 1)
    assert len(runs) == len(plain_runs)


def test_nothing_else_makes_us_retrace():
    s = sf.State(jnp.zeros(2))
    holder = Holder(sf.State(jnp.zeros(2)))

    def step(x, module, n):
        s.value = s.value + x
        module.state.value = module.state.value * 2
        return s.value.sum() * n

    fun, runs = counting(step)
    fn = sf.StatefulFunction(fun)
    for i in range(5):
        fn(jnp.full(2, i, jnp.float32), holder, 3)
        s.value = jnp.full(2, i, jnp.float32)
        s.value = np.zeros(2, np.float32)
        holder = Holder(sf.State(jnp.ones(2)))
    s.value += 1  # a weak type would be another one
    fn(jnp.ones(2), holder, 3)
    assert len(runs) == 1


# -- States that are gone -----------------------------------------------------------


@pytest.mark.parametrize("arguments", [0, 1])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("calls", [1, 3])
def test_a_name_that_means_another_state_now_is_traced_again(arguments, static, calls):
    names = {"s": sf.State(jnp.array(1.0), name="first")}

    def step(*args):
        names["s"].value = names["s"].value + 1
        return names["s"].value

    fun, runs = counting(step)
    fn = sf.StatefulFunction(fun)
    args = [jnp.array(2.0)] * arguments + ["static"] * static
    for i in range(calls):
        assert fn(*args) == 2.0 + i
    names["s"] = sf.State(jnp.array(10.0), name="second")
    gc.collect()
    for i in range(calls):
        assert fn(*args) == 11.0 + i
    assert names["s"].value == 10.0 + calls
    assert len(runs) == 2
    assert fn.get_states(*args) == (names["s"],)
    assert stats(fn)["size"] == 1


def test_a_name_that_means_another_state_now_is_seen_by_questions_too():
    names = {"s": sf.State(jnp.ones(2))}
    fn = sf.StatefulFunction(lambda: names["s"].value.sum())
    assert len(fn.get_states()) == 1
    names["s"] = sf.State(jnp.ones(3))
    gc.collect()
    assert fn.get_states() == (names["s"],)
    _, out = fn.jaxpr_call((jnp.ones(3),))
    assert out == 3.0


def test_rebinding_is_seen_where_the_state_was_an_argument_as_well():
    names = {"s": sf.State(jnp.array(1.0))}

    def step(module):
        module.state.value += 1
        return names["s"].value

    fn = sf.StatefulFunction(step)
    assert [fn(Holder(names["s"])) for _ in range(2)] == [2.0, 3.0]
    names["s"] = sf.State(jnp.array(10.0))
    gc.collect()
    assert [fn(Holder(names["s"])) for _ in range(2)] == [11.0, 12.0]
    assert fn(Holder(sf.State(jnp.array(0.0)))) == 12.0


def test_rebinding_is_seen_where_the_result_holds_the_state():
    names = {"s": sf.State(jnp.array(1.0))}
    fn = sf.StatefulFunction(lambda x: (x * names["s"].value, Holder(names["s"])))
    x = jnp.array(2.0)
    assert fn(x)[0] == 2.0
    names["s"] = sf.State(jnp.array(10.0))
    gc.collect()
    out, holder = fn(x)
    assert out == 20.0
    assert holder.state is names["s"]


def test_rebinding_is_seen_by_an_outer_function():
    names = {"s": sf.State(jnp.array(1.0))}
    inner = sf.StatefulFunction(lambda x: x * names["s"].value)
    outer = sf.StatefulFunction(lambda x: inner(x) + 1)
    x = jnp.array(2.0)
    assert [outer(x), outer(x)] == [3.0, 3.0]
    names["s"] = sf.State(jnp.array(10.0))
    gc.collect()
    assert [outer(x), outer(x)] == [21.0, 21.0]


def test_the_cache_keeps_no_state_alive():
    names = {"s": sf.State(jnp.ones(2))}
    fn = sf.StatefulFunction(lambda: names["s"].value.sum())
    fn()
    fn()
    fn.get_states()
    gone = weakref.ref(names.pop("s"))
    gc.collect()
    assert gone() is None


def test_a_function_that_is_gone_leaves_nothing_behind():
    s = sf.State(jnp.ones(2))
    fn = sf.StatefulFunction(lambda x: s.value * x)
    fn(jnp.ones(2))
    fn.make_jaxpr(jnp.ones(2))
    gone = weakref.ref(fn)
    del fn
    gc.collect()
    assert gone() is None


# -- validation ---------------------------------------------------------------------


def traced():
    states = {
        "array": sf.State(jnp.ones(2), name="array"),
        "tree": sf.State({"a": jnp.ones(3), "tag": "x"}, name="tree"),
    }

    def step():
        return states["array"].value.sum() + states["tree"].value["a"].sum()

    fn = sf.StatefulFunction(step, name="step")
    return states, fn, fn.get_arg_cache_key(compile_if_miss=True)


def test_states_that_fit_are_valid():
    states, fn, key = traced()
    assert fn.validate_states(key) is True
    states["array"].value = jnp.zeros(2)
    states["tree"].value = {"a": jnp.zeros(3), "tag": "x"}
    assert fn.validate_states(key) is True
    assert fn.validate_all_states() == {key: True}


MISFITS = {
    "shape": ("array", jnp.ones(5), r"float32\[5\].*float32\[2\]"),
    "dtype": ("array", jnp.ones(2, jnp.int32), r"int32\[2\].*float32\[2\]"),
    "structure": ("array", (jnp.ones(2),), "structure"),
    "inner shape": ("tree", {"a": jnp.ones(4), "tag": "x"}, r"\['a'\].*float32\[4\]"),
    "static leaf": ("tree", {"a": jnp.ones(3), "tag": "y"}, "structure"),
    "missing": ("tree", {"a": jnp.ones(3)}, "structure"),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_a_state_that_no_longer_fits_is_named(kind):
    name, value, message = MISFITS[kind]
    states, fn, key = traced()
    states[name].value = value
    with pytest.raises(ValueError, match=r"^step: .*don't fit the trace") as caught:
        fn.validate_states(key)
    text = str(caught.value)
    named = [n for n in states if f"State {n!r} (created at " in text]
    assert named == [name]
    with pytest.raises(ValueError, match=message):
        fn.validate_states(key)
    assert fn.validate_all_states() == {key: text}


def test_a_state_that_is_gone_is_named():
    states, fn, key = traced()
    del states["array"]
    gc.collect()
    with pytest.raises(ValueError, match=r"State 'array' \(created at .*\) is gone"):
        fn.validate_states(key)
    (message,) = fn.validate_all_states().values()
    assert "'array'" in message
    with pytest.raises(ValueError, match=r"State 'array' .* is gone"):
        fn.get_states_by_cache(key)


def test_every_state_that_does_not_fit_is_named():
    states, fn, key = traced()
    states["array"].value = jnp.ones(9)
    states["tree"].value = None
    with pytest.raises(ValueError, match=r"^step: 2 of the States") as caught:
        fn.validate_states(key)
    assert "'array'" in str(caught.value)
    assert "'tree'" in str(caught.value)


def test_validate_all_states_speaks_of_every_key():
    a, b = sf.State(jnp.ones(2), name="a"), sf.State(jnp.ones(2), name="b")
    fn = sf.StatefulFunction(lambda which: (a if which == "a" else b).value)
    keys = {n: fn.get_arg_cache_key(n, compile_if_miss=True) for n in "ab"}
    b.value = jnp.ones(3)
    found = fn.validate_all_states()
    assert set(found) == set(keys.values())
    assert found[keys["a"]] is True
    assert "State 'b'" in str(found[keys["b"]])


def test_a_key_speaks_of_the_newest_trace_that_is_filed_under_it():
    states, fn, key = traced()
    states["array"].value = jnp.ones(5)
    with pytest.raises(ValueError, match=r"^step: 1 of the States"):
        fn.validate_states(key)
    fn()
    assert fn.get_arg_cache_key() == key
    assert stats(fn)["size"] == 2
    assert fn.get_jaxpr_by_cache(key).jaxpr.invars[0].aval.shape == (5,)
    assert fn.validate_states(key) is True
    assert fn.validate_all_states() == {key: True}
