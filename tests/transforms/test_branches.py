"""`cond` and `switch`: those of `jax.lax`, with States in the branches."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefun as sf

X = jnp.arange(3.0)
YES, NO = jnp.array(True), jnp.array(False)


@pytest.fixture
def count():
    return sf.State(jnp.array(0), name="count")


@pytest.fixture
def a():
    return sf.State(jnp.array(1.0), name="a")


@pytest.fixture
def b():
    return sf.State(jnp.array(10.0), name="b")


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert jax.typeof(x) == jax.typeof(y)
        assert np.array_equal(x, y)


# -- as in jax.lax ------------------------------------------------------------------


def double(x):
    return x * 2


def negate(x):
    return -x


PURE = {
    "cond, true": lambda m: m.cond(YES, double, negate, X),
    "cond, false": lambda m: m.cond(NO, double, negate, X),
    "cond, a Python bool": lambda m: m.cond(True, double, negate, X),
    "cond, a number": lambda m: m.cond(2, double, negate, X),
    "cond, an array of numbers": lambda m: m.cond(jnp.array(0.0), double, negate, X),
    "cond, no operands": lambda m: m.cond(YES, lambda: X, lambda: -X),
    "cond, several operands": lambda m: m.cond(
        YES, lambda x, y: (x, y["a"]), lambda x, y: (y["a"], x), X, {"a": 2 * X}
    ),
    "cond, operand by name": lambda m: m.cond(NO, double, negate, operand=X),
    "cond, operand None by name": lambda m: m.cond(
        YES, lambda _: X, lambda _: -X, operand=None
    ),
    "cond, weak types": lambda m: m.cond(YES, lambda x: 1.0, lambda x: x[0], X),
    "cond, Python numbers as operands": lambda m: m.cond(YES, double, negate, 3),
    "cond, Python numbers as results": lambda m: m.cond(YES, lambda: 1, lambda: 2),
    "cond, None as a result": lambda m: m.cond(YES, lambda x: None, lambda x: None, X),
    "cond, random keys": lambda m: m.cond(
        YES,
        lambda k: jax.random.key_data(jax.random.split(k)[0]),
        jax.random.key_data,
        jax.random.key(0),
    ),
    "switch": lambda m: m.switch(jnp.array(1), [double, negate, jnp.sin], X),
    "switch, clamped above": lambda m: m.switch(jnp.array(7), [double, negate], X),
    "switch, clamped below": lambda m: m.switch(jnp.array(-7), [double, negate], X),
    "switch, one branch": lambda m: m.switch(jnp.array(5), [double], X),
    "switch, a Python index": lambda m: m.switch(1, (double, negate), X),
    "switch, operand by name": lambda m: m.switch(0, [double, negate], operand=X),
    "switch, several operands": lambda m: m.switch(
        1, [lambda x, y: x, lambda x, y: y], X, 2 * X
    ),
}


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("case", PURE)
def test_without_states_it_is_jax(case, jitted):
    run = PURE[case]
    theirs = jax.jit(lambda: run(jax.lax))() if jitted else run(jax.lax)
    ours = sf.filter_jit(lambda: run(sf))() if jitted else run(sf)
    assert_same(ours, theirs)


ERRORS = {
    "cond, other structures": lambda m: m.cond(YES, lambda x: x, lambda x: (x,), X),
    "cond, other shapes": lambda m: m.cond(YES, lambda x: x, lambda x: x[0], X),
    "cond, other dtypes": lambda m: m.cond(
        YES, lambda x: x, lambda x: x.astype(jnp.int32), X
    ),
    "cond, a vector as predicate": lambda m: m.cond(X > 0, double, negate, X),
    "cond, a string as predicate": lambda m: m.cond("yes", double, negate, X),
    "cond, None as predicate": lambda m: m.cond(None, double, negate, X),
    "cond, no functions": lambda m: m.cond(YES, 1, 2, X),
    "cond, operand twice": lambda m: m.cond(YES, double, negate, X, operand=X),
    "cond, a wrong number of operands": lambda m: m.cond(YES, double, negate, X, X),
    "cond, one function": lambda m: m.cond(YES, double),
    "switch, no branches": lambda m: m.switch(0, [], X),
    "switch, no functions": lambda m: m.switch(0, [1, 2], X),
    "switch, a float as index": lambda m: m.switch(jnp.array(0.0), [double, negate], X),
    "switch, a vector as index": lambda m: m.switch(
        jnp.array([0]), [double, negate], X
    ),
    "switch, other structures": lambda m: m.switch(0, [double, lambda x: (x,)], X),
    "switch, other shapes": lambda m: m.switch(0, [double, lambda x: x[0]], X),
    "switch, operand twice": lambda m: m.switch(0, [double], X, operand=X),
}


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_of_the_types_that_jax_raises(case, jitted):
    run = ERRORS[case]
    with pytest.raises(Exception) as theirs:
        jax.jit(lambda: run(jax.lax))() if jitted else run(jax.lax)
    with pytest.raises(type(theirs.value)):
        sf.filter_jit(lambda: run(sf))() if jitted else run(sf)


def test_an_error_of_jax_names_the_branch_of_the_user():
    def one(x):
        return x

    def other(x):
        return x.astype(int)

    with pytest.raises(TypeError, match="one at .*test_branches") as caught:
        sf.cond(True, one, other, jnp.array(1.0))
    assert "other at " in str(caught.value)


def test_gradients_go_through_the_branch_that_ran():
    for value in (2.0, -2.0):
        x = jnp.array(value)

        def run(module, y):
            return module.cond(y > 0, lambda y: y**3, lambda y: -y, y)

        ours = sf.filter_grad(lambda y: run(sf, y))(x)
        assert ours == jax.grad(lambda y: run(jax.lax, y))(x)


# -- operands and results that are more than arrays ---------------------------------


def test_operands_and_results_may_hold_anything(key):
    net = eqx.nn.MLP(3, 3, 4, 1, key=key)

    def keep(net, label, x):
        return net, net(x), label

    def scale(net, label, x):
        return jax.tree.map(lambda p: p * 2 if eqx.is_array(p) else p, net), x, label

    out, y, label = sf.cond(NO, keep, scale, net, "label", X)
    assert label == "label"
    assert np.array_equal(y, X)
    assert out.activation is net.activation or callable(out.activation)
    assert np.array_equal(out.layers[0].weight, 2 * net.layers[0].weight)


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_results_that_are_no_arrays_have_to_be_the_same_in_all_branches(jitted):
    wrap = sf.filter_jit if jitted else lambda f: f
    assert wrap(lambda: sf.cond(YES, lambda: (X, "a"), lambda: (X, "a")))()[1] == "a"
    with pytest.raises(
        TypeError, match=r"^the branches of `cond` must return the same"
    ):
        wrap(lambda: sf.cond(YES, lambda: (X, "a"), lambda: (X, "b")))()
    with pytest.raises(TypeError, match=r"branch 0 returns .* and branch 2"):
        wrap(lambda: sf.switch(0, [lambda: (X, 1j), lambda: (X, 1j), lambda: X]))()


# -- States -------------------------------------------------------------------------


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("flag", [True, False])
def test_each_branch_writes_what_it_writes_and_nothing_else(flag, jitted, a, b, count):
    factor = sf.State(jnp.array(3.0), name="factor")

    def first(x):
        a.value = a.value + x
        count.value += 1
        return a.value * factor.value

    def second(x):
        b.value = b.value * factor.value
        return x

    run = lambda p, x: sf.cond(p, first, second, x)  # noqa: E731
    out = (sf.filter_jit(run) if jitted else run)(jnp.array(flag), jnp.array(5.0))
    states = [float(s.value) for s in (a, b, count, factor)]
    assert float(out) == (18.0 if flag else 5.0)
    assert states == ([6.0, 10.0, 1.0, 3.0] if flag else [1.0, 30.0, 0.0, 3.0])


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("index", [0, 1, 2, 9])
def test_switch_writes_the_union_of_what_its_branches_write(index, jitted, a, b, count):
    def set_a():
        a.value = jnp.array(2.0)

    def set_b():
        b.value = a.value

    def nothing():
        return None

    run = lambda i: sf.switch(i, [set_a, set_b, nothing])  # noqa: E731
    (sf.filter_jit(run) if jitted else run)(jnp.array(index))
    want = {0: (2.0, 10.0), 1: (1.0, 1.0)}.get(index, (1.0, 10.0))
    assert (float(a.value), float(b.value)) == want


def test_a_state_that_is_only_written_in_every_branch_need_not_be_an_input(a):
    def write(value):
        def run():
            a.value = jnp.array(value)

        return run

    step = sf.filter_jit(lambda p: sf.cond(p, write(3.0), write(4.0)))
    step(NO)
    assert a.value == 4.0
    fun = step.stateful_function
    assert fun.get_read_states(NO) == ()
    assert [s.name for s in fun.get_write_states(NO)] == ["a"]


def test_the_predicate_may_come_from_a_state(count):
    def bump():
        count.value += 1

    @sf.filter_jit
    def step():
        sf.cond(count.value < 3, bump, lambda: None)

    for _ in range(5):
        step()
    assert count.value == 3


def test_the_branches_see_what_was_written_before_and_later_code_what_they_wrote(a, b):
    @sf.filter_jit
    def step(p):
        a.value = jnp.array(7.0)

        def branch():
            b.value = a.value
            a.value = jnp.array(8.0)

        sf.cond(p, branch, lambda: None)
        return a.value + b.value

    assert step(YES) == 15.0
    b.value = jnp.array(10.0)
    assert step(NO) == 17.0
    assert (float(a.value), float(b.value)) == (7.0, 10.0)


def test_states_that_hold_modules_are_kept_whole(key):
    net = sf.Param(eqx.nn.MLP(2, 2, 4, 1, key=key), name="net")
    before = net.value

    def shrink(x):
        net.value = jax.tree.map(lambda p: p / 2 if eqx.is_array(p) else p, net.value)
        return net.value(x)

    sf.cond(NO, shrink, lambda x: x, jnp.ones(2))
    assert eqx.tree_equal(net.value, before)
    sf.cond(YES, shrink, lambda x: x, jnp.ones(2))
    assert np.array_equal(net.value.layers[0].weight, before.layers[0].weight / 2)
    assert net.value.activation is before.activation


def test_a_module_with_states_is_an_operand():
    class Counter(eqx.Module):
        n: sf.State
        step: jax.Array

        def up(self):
            self.n.value += self.step

        def down(self):
            self.n.value -= self.step

    counter = Counter(sf.State(jnp.array(0), name="n"), jnp.array(2))
    sf.cond(YES, Counter.up, Counter.down, counter)
    assert counter.n.value == 2
    sf.cond(NO, counter.up, counter.down)
    assert counter.n.value == 0


def test_a_state_made_in_the_branches_and_returned_is_a_new_one():
    class Made(eqx.Module):
        s: sf.State

    made = sf.cond(
        NO,
        lambda x: Made(sf.State(x, name="made")),
        lambda x: Made(sf.State(-x, name="made")),
        X,
    )
    assert np.array_equal(made.s.value, -X)


def test_a_bare_state_is_no_result(a):
    with pytest.raises(TypeError, match=r"^State 'a' .* was returned"):
        sf.cond(YES, lambda: a, lambda: a)


# -- what branches can't do ---------------------------------------------------------


def change(state, value):
    def run():
        state.value = value

    return run


CHANGES = {
    "dtype": (
        jnp.array(1),
        jnp.array(2.0),
        r"branch 0 has int32\[\] and .* float32\[\]",
    ),
    "shape": (
        jnp.ones(2),
        jnp.array(2.0),
        r"branch 0 has float32\[2\] and .* float32\[\]",
    ),
    "structure": ((jnp.array(1.0),), jnp.array(2.0), r"branch 0 has .*"),
}


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("kind", CHANGES)
def test_branches_that_leave_different_kinds_of_value_are_refused(
    kind, jitted, a, count
):
    first, second, what = CHANGES[kind]

    def also():
        count.value += 1
        a.value = first

    wrap = sf.filter_jit if jitted else lambda f: f
    message = (
        r"^the branches of `cond` leave different values in State 'a' "
        rf"\(created at [^\n]*\): {what}"
    )
    with pytest.raises(sf.StateValueError, match=message):
        wrap(lambda: sf.cond(YES, also, change(a, second)))()
    # A branch that writes nothing leaves what the State held.
    with pytest.raises(sf.StateValueError, match=message) as caught:
        wrap(lambda: sf.cond(YES, also, lambda: None))()
    assert "the State, before" in str(caught.value)
    assert (float(a.value), int(count.value)) == (1.0, 0)


def test_a_new_kind_of_value_that_all_branches_agree_on_is_fine(a):
    sf.cond(NO, change(a, jnp.ones(2)), change(a, jnp.zeros(2)))
    assert np.array_equal(a.value, [0.0, 0.0])


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_branch_that_raises_changes_no_state(bad, jitted, a, b):
    """Also one that wouldn't have run: all of them are traced."""

    def branch(i):
        def run():
            a.value = a.value + 1
            b.value = b.value + i
            if i == bad:
                raise RuntimeError("stop")

        return run

    run = lambda: sf.switch(0, [branch(i) for i in range(3)])  # noqa: E731
    with pytest.raises(RuntimeError, match="stop"):
        (sf.filter_jit(run) if jitted else run)()
    assert (float(a.value), float(b.value)) == (1.0, 10.0)


def test_results_that_jax_refuses_change_no_state(a):
    def write(x):
        a.value = jnp.array(5.0)
        return x

    with pytest.raises(TypeError):
        sf.cond(YES, write, lambda x: x[0], X)
    assert a.value == 1.0


# -- called again and again ---------------------------------------------------------


def test_eager_calls_with_the_same_branches_trace_them_once(a):
    runs = []

    def add(x):
        runs.append("add")
        a.value = a.value + x
        return x

    def skip(x):
        runs.append("skip")
        return x

    for flag in (True, False, True, True):
        sf.cond(jnp.array(flag), add, skip, jnp.array(2.0))
    assert sorted(runs) == ["add", "skip"]
    assert a.value == 7.0
    for i in (0, 1, 0):
        sf.switch(jnp.array(i), [add, skip], jnp.array(2.0))
    assert sorted(runs) == ["add", "add", "skip", "skip"]
    assert a.value == 11.0


def test_an_eager_branch_sees_the_present_value_of_what_it_reads(a):
    def read():
        return a.value

    def minus():
        return -a.value

    assert sf.cond(YES, read, minus) == 1.0
    a.value = jnp.array(4.0)
    assert sf.cond(YES, read, minus) == 4.0
    assert sf.cond(NO, read, minus) == -4.0


def test_branches_work_without_compilation(a, b):
    with jax.disable_jit():
        sf.cond(YES, change(a, jnp.array(2.0)), change(b, jnp.array(3.0)))
        sf.switch(1, [change(a, jnp.array(5.0)), change(b, jnp.array(6.0))])
    assert (float(a.value), float(b.value)) == (2.0, 6.0)


@pytest.mark.parametrize("disable", [False, True])
@pytest.mark.parametrize("value", [1, 2.0, np.float32(1), np.ones(2, np.float32)])
def test_branches_leave_jax_arrays(value, disable):
    held = sf.State(value, name="held")

    def given(x):
        held.value = x
        return x

    def constant(x):
        held.value = value
        return value

    for branch in (given, constant):
        with jax.disable_jit(disable):
            out = (
                sf.cond(True, branch, branch, value),
                sf.cond(np.bool_(False), branch, branch, value),
                sf.switch(1, [branch, branch], value),
                sf.switch(0, [branch], value),
            )
        for x in jax.tree.leaves((out, held.value)):
            assert isinstance(x, jax.Array) and not isinstance(x, np.ndarray | int)


def test_branches_leave_no_tracer(a, b, checking_leaks):
    sf.cond(YES, change(a, jnp.array(2.0)), change(b, jnp.array(3.0)))
    sf.filter_jit(lambda x: sf.cond(YES, lambda: change(a, x)(), lambda: None))(
        jnp.array(4.0)
    )
    assert a.value == 4.0


@pytest.mark.parametrize("axis", [None, 0])
def test_branches_under_vmap_with_a_predicate_that_differs(axis):
    """Then both branches run, and what they write is selected lane by lane."""
    s = sf.State(jnp.zeros(3), name="s")

    def add(x):
        s.value = s.value + x

    def f(x):
        sf.cond(x > 0, add, lambda x: None, x)
        return x

    run = sf.filter_vmap(f, state_axes=None if axis is None else [(s, axis)])
    if axis is None:
        with pytest.raises(sf.StateTraceError, match="differs along the mapped axis"):
            run(X)
        assert np.array_equal(s.value, [0.0, 0.0, 0.0])
    else:
        run(X - 1)
        assert np.array_equal(s.value, [0.0, 0.0, 1.0])


def test_closed_over_tracers_are_seen_in_branches(a):
    @sf.filter_jit
    def step(x, p):
        y = x * 2
        sf.cond(p, lambda: change(a, y)(), lambda: None)
        return sf.cond(p, lambda: y, lambda: x)

    assert step(jnp.array(3.0), YES) == 6.0
    assert a.value == 6.0
    assert step(jnp.array(5.0), NO) == 5.0
    assert a.value == 6.0
