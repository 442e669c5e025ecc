"""`scan`, `map`, `fori_loop`, `while_loop`, `associative_scan`: those of `jax.lax`, and
States that the bodies read and write."""

import functools
import gc
import tracemalloc

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefun as sf

X = jnp.arange(1.0, 5.0)
ONE = jnp.array(1.0)


@pytest.fixture
def total():
    return sf.State(jnp.array(0.0), name="total")


@pytest.fixture
def scale():
    return sf.State(jnp.array(2.0), name="scale")


def assert_same(ours, theirs):
    """Values, structure, dtypes, weak types."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert jax.typeof(a) == jax.typeof(b)
        assert np.array_equal(a, b)


# -- as in jax.lax ------------------------------------------------------------------


def add(c, x):
    return c + x, c * x


PURE = {
    "scan": lambda m: m.scan(add, ONE, X),
    "scan, reverse": lambda m: m.scan(add, ONE, X, reverse=True),
    "scan, unroll": lambda m: m.scan(add, ONE, X, None, False, 2),
    "scan, unroll all": lambda m: m.scan(add, ONE, X, unroll=True),
    "scan, length": lambda m: m.scan(lambda c, _: (c * 2, c), ONE, length=3),
    "scan, xs None": lambda m: m.scan(lambda c, x: (c * 2, x), ONE, None, 3),
    "scan, length 0": lambda m: m.scan(add, ONE, jnp.zeros(0)),
    "scan, a Python number": lambda m: m.scan(lambda c, x: (c + 1, x), 0, X),
    "scan, a weak carry": lambda m: m.scan(add, 0.0, X),
    "scan, a carry to be promoted": lambda m: m.scan(lambda c, x: (c * x, c), 1, X),
    "scan, trees": lambda m: m.scan(
        lambda c, x: ({"a": c["a"] + x[0]}, [x[1], None, (c["a"],)]),
        {"a": ONE},
        (X, {"k": X}),
    ),
    "scan, no carry": lambda m: m.scan(lambda c, x: (None, x * 2), None, X),
    "scan, a Python number as output": lambda m: m.scan(lambda c, x: (c, 1.0), ONE, X),
    "scan, split transpose": lambda m: jax.grad(
        lambda x: m.scan(add, x, X, _split_transpose=True)[0]
    )(ONE),
    "map": lambda m: m.map(lambda x: x * 2, X),
    "map, trees": lambda m: m.map(lambda x: (x["a"], {"b": x["a"] * 2}), {"a": X}),
    "map, batches": lambda m: m.map(lambda x: x * 2, X, batch_size=2),
    "map, batches and a rest": lambda m: m.map(lambda x: (x * 2, x), X, batch_size=3),
    "map, one large batch": lambda m: m.map(lambda x: x * 2, X, batch_size=10),
    "map, of keys": lambda m: m.map(
        jax.random.uniform, jax.random.split(jax.random.key(0), 3)
    ),
    "fori_loop": lambda m: m.fori_loop(0, 4, lambda i, x: x * i + 1, jnp.array(1)),
    "fori_loop, arrays as bounds": lambda m: m.fori_loop(
        jnp.array(1), jnp.array(4), lambda i, x: x + i, jnp.array(1)
    ),
    "fori_loop, trees": lambda m: m.fori_loop(
        0, 2, lambda i, t: {"a": t["b"], "b": t["a"]}, {"a": X, "b": 2 * X}
    ),
    "fori_loop, nothing to do": lambda m: m.fori_loop(3, 1, lambda i, x: x + 1, ONE),
    "fori_loop, unroll": lambda m: m.fori_loop(0, 4, lambda i, x: x + 1, ONE, unroll=2),
    "fori_loop, a Python number": lambda m: m.fori_loop(0, 2, lambda i, x: x + 1, 0),
    "while_loop": lambda m: m.while_loop(lambda x: x < 10, lambda x: x * 2, ONE),
    "while_loop, trees": lambda m: m.while_loop(
        lambda t: t["n"] < 3,
        lambda t: {"n": t["n"] + 1, "x": t["x"] * 2},
        {"n": 0, "x": X},
    ),
    "while_loop, never": lambda m: m.while_loop(lambda x: x < 0, lambda x: x * 2, ONE),
    "while_loop, a Python number": lambda m: m.while_loop(
        lambda x: x < 3, lambda x: x + 1, 0
    ),
    "associative_scan": lambda m: m.associative_scan(jnp.add, X),
    "associative_scan, trees": lambda m: m.associative_scan(
        lambda a, b: (a[0] * b[0], a[1] * b[0] + b[1]), (X, X)
    ),
    "associative_scan, reverse": lambda m: m.associative_scan(jnp.add, X, True),
    "associative_scan, axis": lambda m: m.associative_scan(
        jnp.add, X.reshape(2, 2), axis=1
    ),
}


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("case", PURE)
def test_without_states_it_is_jax(case, jitted):
    run = PURE[case]
    theirs = jax.jit(lambda: run(jax.lax))() if jitted else run(jax.lax)
    ours = sf.filter_jit(lambda: run(sf))() if jitted else run(sf)
    assert_same(ours, theirs)


@pytest.mark.parametrize("case", ["scan", "scan, trees", "map", "fori_loop, trees"])
def test_without_states_gradients_are_those_of_jax(case):
    def loss(module):
        def f(x):
            def scaled(name):
                fun = getattr(module, name)
                return lambda *args, **kwargs: fun(
                    *jax.tree.map(
                        lambda a: (
                            a * x if eqx.is_array(a) and a.dtype == x.dtype else a
                        ),
                        args,
                        is_leaf=callable,
                    ),
                    **kwargs,
                )

            class Scaled:
                scan, map, fori_loop = (
                    scaled("scan"),
                    scaled("map"),
                    scaled("fori_loop"),
                )

            out = PURE[case](Scaled)
            leaves = [x for x in jax.tree.leaves(out) if x.dtype == jnp.float32]
            return sum(jnp.sum(leaf**2) for leaf in leaves)

        return f

    np.testing.assert_allclose(
        jax.grad(loss(sf))(ONE * 1.5), jax.grad(loss(jax.lax))(ONE * 1.5), rtol=1e-6
    )


ERRORS = {
    "scan, carry of another dtype": lambda m: m.scan(
        lambda c, x: (c.astype(jnp.int32), x), ONE, X
    ),
    "scan, carry of another shape": lambda m: m.scan(lambda c, x: (c[None], x), ONE, X),
    "scan, carry of another structure": lambda m: m.scan(
        lambda c, x: ((c,), x), ONE, X
    ),
    "scan, no pair": lambda m: m.scan(lambda c, x: c, ONE, X),
    "scan, lengths differ": lambda m: m.scan(add, ONE, (X, jnp.ones(3))),
    "scan, length and xs differ": lambda m: m.scan(add, ONE, X, length=3),
    "scan, no length": lambda m: m.scan(add, ONE),
    "scan, scalars": lambda m: m.scan(add, ONE, ONE),
    "scan, f is no function": lambda m: m.scan(3, ONE, X),
    "scan, a negative unroll": lambda m: m.scan(add, ONE, X, unroll=-1),
    "map, scalars": lambda m: m.map(lambda x: x, ONE),
    "map, lengths differ": lambda m: m.map(lambda x: x[0], (X, jnp.ones(3))),
    "fori_loop, carry of another dtype": lambda m: m.fori_loop(
        0, 2, lambda i, x: x.astype(jnp.int32), ONE
    ),
    "fori_loop, carry of another structure": lambda m: m.fori_loop(
        0, 2, lambda i, x: (x,), ONE
    ),
    "fori_loop, body is no function": lambda m: m.fori_loop(0, 2, 3, ONE),
    "fori_loop, bounds of two dtypes": lambda m: m.fori_loop(
        jnp.array(0, jnp.int8), jnp.array(2, jnp.int32), lambda i, x: x, ONE
    ),
    "while_loop, carry of another dtype": lambda m: m.while_loop(
        lambda x: x < 3, lambda x: x.astype(jnp.int32), ONE
    ),
    "while_loop, condition no scalar": lambda m: m.while_loop(
        lambda x: x < 3, lambda x: x, X
    ),
    "while_loop, condition no boolean": lambda m: m.while_loop(
        lambda x: x, lambda x: x, ONE
    ),
    "while_loop, condition a tuple": lambda m: m.while_loop(
        lambda x: (x < 3, x < 4), lambda x: x, ONE
    ),
    "while_loop, no functions": lambda m: m.while_loop(1, 2, ONE),
    "associative_scan, no function": lambda m: m.associative_scan(3, X),
    "associative_scan, lengths differ": lambda m: m.associative_scan(
        lambda a, b: a, (X, jnp.ones(3))
    ),
}


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_of_the_types_that_jax_raises(case, jitted):
    run = ERRORS[case]
    with pytest.raises(Exception) as theirs:
        jax.jit(lambda: run(jax.lax))() if jitted else run(jax.lax)
    with pytest.raises(type(theirs.value)):
        sf.filter_jit(lambda: run(sf))() if jitted else run(sf)


# -- carries and outputs that hold more than arrays ---------------------------------


def test_a_module_goes_around_in_a_scan(key):
    net = eqx.nn.MLP(2, 2, 4, 1, key=key)

    def body(net, x):
        return eqx.tree_at(
            lambda n: n.layers[0].bias, net, net.layers[0].bias + x
        ), net(jnp.ones(2))

    arrays, static = eqx.partition(net, eqx.is_array)

    def raw(arrays, x):
        new, y = body(eqx.combine(arrays, static), x)
        return eqx.filter(new, eqx.is_array), y

    (ours, ys), (theirs, want) = sf.scan(body, net, X), jax.lax.scan(raw, arrays, X)
    assert eqx.tree_equal(ours, eqx.combine(theirs, static))
    np.testing.assert_allclose(ys, want, rtol=1e-6)


def test_elements_and_outputs_may_hold_anything():
    xs = {"x": X, "label": "a", "f": jnp.sin}

    def body(c, x):
        return c, {"y": x["f"](x["x"]), "label": x["label"] + "b", "n": None}

    _, ys = sf.scan(body, ("carry", ONE, None), xs)
    assert ys["label"] == "ab"
    np.testing.assert_allclose(ys["y"], jnp.sin(X), rtol=1e-6)


@pytest.mark.parametrize(
    "run",
    [
        lambda: sf.scan(lambda c, x: ((c[0], "b"), None), (ONE, "a"), X),
        lambda: sf.fori_loop(0, 2, lambda i, c: (c[0], "b"), (ONE, "a")),
        lambda: sf.while_loop(lambda c: c[0] < 3, lambda c: (c[0], "b"), (ONE, "a")),
    ],
)
def test_a_leaf_of_the_carry_that_is_no_array_has_to_stay_the_same(run):
    with pytest.raises(TypeError, match=r"the input is 'a' and the output 'b'"):
        run()


# -- States -------------------------------------------------------------------------


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("reverse", [False, True])
def test_scan_threads_states_from_one_step_to_the_next(total, scale, jitted, reverse):
    only_written = sf.State(jnp.array(0.0), name="only_written")

    def body(c, x):
        total.value += x * scale.value
        only_written.value = x
        return c + total.value, total.value

    run = lambda: sf.scan(body, ONE, X, reverse=reverse)  # noqa: E731
    c, ys = (sf.filter_jit(run) if jitted else run)()

    def pure(carry, x):
        c, t, _ = carry
        t = t + x * 2.0
        return (c + t, t, x), t

    (want, t, last), want_ys = jax.lax.scan(
        pure, (ONE, jnp.array(0.0), jnp.array(0.0)), X, reverse=reverse
    )
    assert_same((c, ys), (want, want_ys))
    assert_same((total.value, only_written.value), (t, last))
    assert scale.value == 2.0


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_the_other_loops_thread_states_as_well(total, scale, jitted):
    def step(x):
        total.value += x * scale.value
        return x + 1

    def run():
        ys = sf.map(step, X)
        x = sf.fori_loop(0, 3, lambda i, x: step(x), ONE)
        y = sf.while_loop(lambda y: total.value < 100.0, step, x)
        return ys, x, y

    ys, x, y = (sf.filter_jit(run) if jitted else run)()
    assert np.array_equal(ys, X + 1)
    assert x == 4.0
    # 20 from the map, 12 from the fori_loop, then 8 + 10 + ... until it is 100
    assert (float(total.value), float(y)) == (110.0, 10.0)


def test_an_element_of_a_batch_of_map_shares_the_states_with_the_others(total, scale):
    def f(x):
        total.value += 1
        return x * scale.value

    assert np.array_equal(sf.map(f, X, batch_size=3), 2 * X)
    assert total.value == 2.0  # one batch, and the rest

    def differs(x):
        total.value += x
        return x

    with pytest.raises(sf.StateTraceError, match="differs along the mapped axis"):
        sf.map(differs, X, batch_size=2)
    assert total.value == 2.0


def test_a_body_that_runs_zero_times_leaves_the_states(total):
    def step(x):
        total.value += x
        return x

    sf.scan(lambda c, x: (c, step(x)), ONE, jnp.zeros(0))
    sf.fori_loop(3, 3, lambda i, x: step(x), ONE)
    sf.while_loop(lambda x: x < 0, step, ONE)
    assert total.value == 0.0


def test_states_may_hold_modules_and_states(key, total):
    net = sf.State({"net": eqx.nn.Linear(2, 2, key=key), "total": total}, name="net")

    def body(c, x):
        held = net.value
        held["total"].value += x
        held = dict(held, net=jax.tree.map(lambda a: a * 2, held["net"]))
        net.value = held
        return c, None

    before = net.value["net"].weight
    sf.scan(body, ONE, X)
    assert np.array_equal(net.value["net"].weight, before * 16)
    assert net.value["total"] is total
    assert total.value == 10.0


def test_a_state_made_in_the_body_and_returned_comes_out_stacked():
    class Made(eqx.Module):
        s: sf.State

    _, made = sf.scan(lambda c, x: (c, Made(sf.State(x * c, name="made"))), ONE * 2, X)
    assert np.array_equal(made.s.value, 2 * X)
    assert made.s.name == "made"
    out = sf.map(lambda x: Made(sf.State(x)), X)
    assert np.array_equal(out.s.value, X)


def test_a_state_made_in_the_body_and_kept_there_is_dropped():
    def body(c, x):
        scratch = sf.State(c)
        scratch.value += x
        return scratch.value, None

    assert sf.scan(body, ONE, X)[0] == 11.0


def test_a_bare_state_is_no_result(total):
    with pytest.raises(TypeError, match=r"^State 'total' .* was returned"):
        sf.scan(lambda c, x: (c, total), ONE, X)


# -- what a loop can't do -----------------------------------------------------------


def wider(state):
    state.value = jnp.concatenate([state.value, state.value])


def other_dtype(state):
    state.value = state.value.astype(jnp.int32)


def other_structure(state):
    state.value = (state.value,)


CHANGES = {
    "shape": (wider, r"float32\[2\] in place of float32\[1\]"),
    "dtype": (other_dtype, r"int32\[1\] in place of float32\[1\]"),
    "structure": (other_structure, r"a value of structure .*"),
}
LOOPS = {
    "scan": lambda f: sf.scan(lambda c, x: (f(c), None), ONE, X),
    "fori_loop": lambda f: sf.fori_loop(0, 2, lambda i, c: f(c), ONE),
    "while_loop": lambda f: sf.while_loop(lambda c: c < 3, lambda c: f(c) + 1, ONE),
    "map": lambda f: sf.map(f, X),
}


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("loop", LOOPS)
def test_a_state_that_changes_in_kind_is_refused_and_named(loop, change, jitted, total):
    s = sf.State(jnp.zeros(1), name="s")
    act, message = CHANGES[change]

    def body(c):
        total.value += 1
        act(s)
        return c

    run = lambda: LOOPS[loop](body)  # noqa: E731
    with pytest.raises(
        sf.StateValueError,
        match=rf"^the body of `{loop}` wrote {message} to State 's' \(created at",
    ):
        (sf.filter_jit(run) if jitted else run)()
    assert total.value == 0.0
    assert eqx.tree_equal(s.value, jnp.zeros(1))


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_the_condition_of_a_while_loop_may_only_read(total, scale, jitted):
    def condition(x):
        total.value += 1
        return x < scale.value

    def run():
        return sf.while_loop(condition, lambda x: x + 1, ONE)

    with pytest.raises(
        sf.StateTraceError,
        match=r"^the condition of `while_loop` wrote to State 'total' \(created at",
    ):
        (sf.filter_jit(run) if jitted else run)()
    assert total.value == 0.0


def test_the_condition_sees_what_the_body_wrote_and_what_only_it_reads(total, scale):
    def body(x):
        total.value += 1
        return x

    sf.while_loop(lambda x: total.value < 3 * scale.value, body, ONE)
    assert total.value == 6.0
    scale.value = 4.0
    sf.while_loop(lambda x: total.value < 3 * scale.value, body, ONE)
    assert total.value == 12.0


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_a_body_that_raises_changes_no_state(loop, jitted, total):
    def body(c):
        total.value += 1
        raise RuntimeError("stop")

    run = lambda: LOOPS[loop](body)  # noqa: E731
    with pytest.raises(RuntimeError, match="stop"):
        (sf.filter_jit(run) if jitted else run)()
    assert total.value == 0.0


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_associative_scan_reads_states_and_refuses_writes(total, scale, jitted):
    def combine(a, b):
        return a * scale.value + b

    def run(fn):
        return lambda x: sf.associative_scan(fn, x)

    wrap = sf.filter_jit if jitted else lambda f: f
    for value in (2.0, 3.0):
        scale.value = value
        want = jax.lax.associative_scan(lambda a, b, v=value: a * v + b, X)
        assert np.array_equal(wrap(run(combine))(X), want)

    def write(a, b):
        total.value += 1
        return a + b

    with pytest.raises(
        sf.StateTraceError,
        match=r"^the function of `associative_scan` wrote to State 'total'",
    ):
        wrap(run(write))(X)
    assert total.value == 0.0


# -- called again and again ---------------------------------------------------------


def loops(runs, total):
    def body(c, x):
        runs.append(0)
        total.value += x
        return c + x, total.value

    def step(x):
        runs.append(0)
        total.value += x
        return x + 1

    def plus(i, x):
        runs.append(0)
        total.value += x
        return x + 1

    def small(x):
        return x < 3

    return {
        "scan": lambda: sf.scan(body, ONE, X),
        "map": lambda: sf.map(step, X),
        "fori_loop": lambda: sf.fori_loop(0, 3, plus, ONE),
        "while_loop": lambda: sf.while_loop(small, step, ONE),
    }


@pytest.mark.parametrize("name", ["scan", "map", "fori_loop", "while_loop"])
def test_eager_calls_with_the_same_body_trace_it_once(name, total):
    runs = []
    run = loops(runs, total)[name]
    for _ in range(5):
        run()
    assert len(runs) == 1
    assert total.value == 5 * {"scan": 10.0, "map": 10.0, "fori_loop": 6.0}.get(
        name, 3.0
    )


def test_an_eager_loop_sees_the_present_value_of_what_it_reads(scale):
    def body(c, x):
        return c * scale.value, None

    assert sf.scan(body, ONE, length=2)[0] == 4.0
    scale.value = 3.0
    assert sf.scan(body, ONE, length=2)[0] == 9.0


def test_an_eager_loop_is_traced_again_where_jax_would(total):
    runs = []

    def body(c, x):
        runs.append(0)
        total.value += 1
        return c, x

    sf.scan(body, ONE, X)
    sf.scan(body, ONE, X[:2])  # another length only: XLA compiles, jax doesn't trace
    before = len(runs)
    sf.scan(body, ONE, X.astype(jnp.int32))
    assert len(runs) == before + 1
    sf.scan(body, ONE, X)
    assert len(runs) == before + 1


@pytest.mark.parametrize("name", ["scan", "fori_loop", "while_loop", "map"])
def test_a_thousand_eager_calls_leave_nothing_behind(name, total):
    runs = []
    run = loops(runs, total)[name]

    def many(n):
        for _ in range(n):
            run()
        gc.collect()
        return len(jax.live_arrays()), tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        many(100)
        arrays, memory = many(100)
        later_arrays, later_memory = many(800)
    finally:
        tracemalloc.stop()
    assert later_arrays <= arrays
    # A leak of one small object per call would be over 50 kB.
    assert later_memory - memory < 20_000
    assert len(runs) == 1


def test_bodies_made_anew_for_each_call_are_forgotten_again(total):
    """As many closures as a long session would make: they must not all be kept."""
    kept = []

    class Marker:
        pass

    import weakref

    def call():
        marker = Marker()
        kept.append(weakref.ref(marker))

        def body(c, x, marker=marker):
            total.value += x
            return c, None

        sf.scan(body, ONE, X)

    for _ in range(140):
        call()
    gc.collect()
    assert sum(ref() is not None for ref in kept) <= 130


def test_an_eager_loop_leaves_no_tracer(total, checking_leaks):
    for run in loops([], total).values():
        run()
    assert not isinstance(total.value, jax.core.Tracer)


def test_a_body_may_be_a_partial_a_method_or_a_module(total):
    class Body(eqx.Module):
        factor: jax.Array
        seen: sf.State

        def __call__(self, c, x):
            self.seen.value += x
            return c * self.factor, x

        def step(self, c, x):
            return self(c, x)

    body = Body(jnp.array(2.0), sf.State(jnp.array(0.0), name="seen"))
    for f in (body, body.step, functools.partial(Body.step, body)):
        assert sf.scan(f, ONE, X)[0] == 16.0
    assert body.seen.value == 30.0
    other = Body(jnp.array(3.0), sf.State(jnp.array(0.0), name="seen"))
    assert sf.scan(other, ONE, X)[0] == 81.0
    assert (body.seen.value, other.seen.value) == (30.0, 10.0)


def test_a_body_that_closes_over_an_array_sees_the_array_of_the_call():
    def outer(y):
        return sf.scan(lambda c, x: (c * y, None), ONE, length=2)[0]

    assert [float(outer(jnp.array(v))) for v in (2.0, 3.0)] == [4.0, 9.0]
    jitted = sf.filter_jit(outer)
    assert [float(jitted(jnp.array(v))) for v in (2.0, 3.0)] == [4.0, 9.0]


@pytest.mark.parametrize("name", ["scan", "map", "fori_loop", "while_loop"])
def test_loops_work_without_compilation(name, total):
    with jax.disable_jit():
        loops([], total)[name]()
    assert total.value == {"scan": 10.0, "map": 10.0, "fori_loop": 6.0}.get(name, 3.0)


@pytest.mark.parametrize("disable", [False, True])
@pytest.mark.parametrize(("lower", "upper"), [(0, 0), (3, 1), (jnp.array(2), 2)])
def test_a_loop_without_iterations_leaves_everything(lower, upper, disable, total):
    def body(i, c):
        total.value += i
        return c + 1

    with jax.disable_jit(disable):
        assert_same(sf.fori_loop(lower, upper, body, 1.5), jnp.asarray(1.5))
    assert total.value == 0


NUMPY = np.ones(2, np.float32)
HANDED_ON = {
    "scan": lambda put: sf.scan(lambda c, x: (c, put(x, NUMPY)), NUMPY, np.arange(3)),
    "map": lambda put: sf.map(lambda x: put(x, 1), np.arange(3)),
    "map, batches": lambda put: sf.map(lambda x: put(0, 1), X, batch_size=3),
    "fori_loop": lambda put: sf.fori_loop(0, 3, lambda i, c: put(i, (i, c[1])), (0, 1)),
    "fori_loop, arrays": lambda put: sf.fori_loop(0, 3, lambda i, c: put(i, c), NUMPY),
    "fori_loop, none": lambda put: sf.fori_loop(0, 0, lambda i, c: put(i, c), NUMPY),
    "while_loop": lambda put: sf.while_loop(
        lambda c: c[0] < 3, lambda c: put(c[0], (c[0] + 1, NUMPY)), (0, NUMPY)
    ),
    "while_loop, none": lambda put: sf.while_loop(
        lambda c: False, lambda c: put(0, c), NUMPY
    ),
}


@pytest.mark.parametrize("disable", [False, True])
@pytest.mark.parametrize("name", HANDED_ON)
def test_loops_leave_jax_arrays(name, disable):
    seen = sf.State(jnp.array(0), name="seen")

    def put(value, out):
        seen.value = value
        return out

    with jax.disable_jit(disable):
        out = HANDED_ON[name](put)
    for x in jax.tree.leaves((out, seen.value)):
        assert isinstance(x, jax.Array) and not isinstance(x, np.ndarray | int)


def test_gradients_go_through_loops_and_states(total):
    def f(x):
        def body(c, _):
            total.value = total.value * x + 1
            return c, None

        total.value = x
        sf.scan(body, ONE, length=3)
        return total.value

    def pure(x):
        t = x
        for _ in range(3):
            t = t * x + 1
        return t

    x = jnp.array(1.5)
    np.testing.assert_allclose(sf.filter_grad(f)(x), jax.grad(pure)(x), rtol=1e-6)
    assert total.value == pure(x)


# -- progress -----------------------------------------------------------------------

PROGRESS = {
    "scan": lambda total, p: sf.scan(
        lambda c, x: _count(total, (c + x, c)), ONE, X, progress=p
    ),
    "scan, reverse": lambda total, p: sf.scan(
        lambda c, x: _count(total, (c + x, c)), ONE, X, reverse=True, progress=p
    ),
    "scan, length": lambda total, p: sf.scan(
        lambda c, x: _count(total, (c * 2, c)), ONE, length=3, progress=p
    ),
    "scan, nothing to do": lambda total, p: sf.scan(
        lambda c, x: _count(total, (c + x, c)), ONE, jnp.zeros(0), progress=p
    ),
    "map": lambda total, p: sf.map(lambda x: _count(total, x * 2), X, progress=p),
    "map, batches": lambda total, p: sf.map(
        lambda x: _count(total, x * 2), X, batch_size=3, progress=p
    ),
    "fori_loop": lambda total, p: sf.fori_loop(
        2, 5, lambda i, x: _count(total, x * i), jnp.array(1), progress=p
    ),
    "fori_loop, nothing to do": lambda total, p: sf.fori_loop(
        5, 2, lambda i, x: _count(total, x * i), jnp.array(1), progress=p
    ),
    "fori_loop, unroll": lambda total, p: sf.fori_loop(
        0, 4, lambda i, x: _count(total, x + i), jnp.array(1), unroll=2, progress=p
    ),
}


def _count(total, out):
    total.value += 1
    return out


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("description", [True, "steps"])
@pytest.mark.parametrize("case", PROGRESS)
def test_a_progress_bar_changes_no_result(case, description, jitted, capfd):
    pytest.importorskip("jax_tqdm")
    wrap = sf.filter_jit if jitted else lambda f: f

    def run(progress):
        total = sf.State(jnp.array(0), name="total")
        out = wrap(lambda: PROGRESS[case](total, progress))()
        jax.effects_barrier()
        return out, total.value

    assert_same(run(description), run(False))
    printed = capfd.readouterr().err
    if description == "steps" and "nothing" not in case:
        assert "steps" in printed


def test_a_progress_bar_needs_bounds_that_are_known_when_tracing():
    pytest.importorskip("jax_tqdm")
    with pytest.raises(ValueError, match=r"^a progress bar needs loop bounds"):
        sf.filter_jit(
            lambda n: sf.fori_loop(0, n, lambda i, x: x + i, 0, progress=True)
        )(jnp.array(3))


class Counted(eqx.Module):
    weight: jax.Array
    count: sf.State


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_a_state_in_associative_scan_is_refused_and_named(jitted):
    layers = Counted(jnp.ones(3), sf.State(jnp.zeros(3), name="count"))
    run = lambda m: sf.associative_scan(lambda a, b: a, m)  # noqa: E731
    run = sf.filter_jit(run) if jitted else run
    with pytest.raises(TypeError, match=r"State 'count' .* is among the `.*\.count`"):
        run(layers)


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 7])
def test_a_state_made_in_a_batch_of_map_comes_out_like_the_results(batch_size, jitted):
    xs = jnp.arange(5.0)

    def run(xs):
        kept = Counted(xs[0], sf.State({"in": sf.State(xs[0])}))  # made outside
        make = lambda x: (Counted(x, sf.State({"in": sf.State(3 * x)})), kept)  # noqa: E731
        made, same = sf.map(make, xs, batch_size=batch_size)
        assert same.count is kept.count
        return made

    made = (sf.filter_jit(run) if jitted else run)(xs)
    assert jnp.array_equal(made.weight, xs)
    assert jnp.array_equal(made.count.value["in"].value, 3 * xs)
