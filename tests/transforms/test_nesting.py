"""Any twin inside any twin: what has to hold whatever the nesting.

Nests of transforms around a small stateful body are compared with the same program
written by hand on plain jax, its States passed in and out. All numbers are small and
whole, so every operation is exact and the results have to be equal, not close, however
XLA fuses them.
"""

import dataclasses
import gc
import weakref
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st

import statefun as sf


class Boom(Exception):
    pass


# -- nests, with States and by hand -------------------------------------------------

LANES = 2
START = jnp.array([1.0, -2.0, 3.0])


class Cells:
    """Three States: one that vmap maps over, one it shares, one that is trained.

    `acc` holds one vector for each lane of each vmap of the nest.
    """

    def __init__(self, vmaps: int = 0):
        self.acc = sf.State(jnp.zeros((LANES,) * vmaps + (3,)), name="acc")
        self.count = sf.State(jnp.array(0), name="count")
        self.w = sf.Param(jnp.array([1.0, 2.0, -1.0]), name="w")
        self.runs = 0

    def now(self) -> dict[str, Any]:
        return {"acc": self.acc.value, "count": self.count.value, "w": self.w.value}

    def body(self, x):
        self.runs += 1
        values, out = pure_body(self.now(), x)
        self.acc.value = values["acc"]
        self.count.value = values["count"]
        self.w.value = values["w"]
        return out


def pure_body(s, x):
    acc, count = s["acc"] + x, s["count"] + 1
    odd = (count % 2).astype(x.dtype)
    return {"acc": acc, "count": count, "w": -s["w"]}, s["w"] * x - odd * acc


class Layer:
    """A transform around a function of a vector of three, that returns another one."""

    def stateful(self, f: Callable, cells: Cells) -> Callable:
        raise NotImplementedError

    def by_hand(self, f: Callable) -> Callable:
        raise NotImplementedError


class Jit(Layer):
    def stateful(self, f, cells):
        return sf.filter_jit(f)

    def by_hand(self, f):
        return jax.jit(f)


class Checkpoint(Layer):
    def stateful(self, f, cells):
        return sf.filter_checkpoint(f)

    def by_hand(self, f):
        return jax.checkpoint(f)


@dataclasses.dataclass(frozen=True)
class Grad(Layer):
    """Of the sum, in the vector or in the State `w`, which the body writes as well."""

    wrt_state: bool = False

    def stateful(self, f, cells):
        wrt = cells.w if self.wrt_state else None
        gradient = sf.filter_value_and_grad(lambda x: jnp.sum(f(x)), wrt=wrt)

        def run(x):
            value, grad = gradient(x)
            return value + grad

        return run

    def by_hand(self, f):
        def run(s, x):
            def loss(diff):
                into = (s | {"w": diff}, x) if self.wrt_state else (s, diff)
                new, out = f(*into)
                return jnp.sum(out), new

            diff = s["w"] if self.wrt_state else x
            (value, new), grad = jax.value_and_grad(loss, has_aux=True)(diff)
            return new, value + grad

        return run


class Vmap(Layer):
    def stateful(self, f, cells):
        mapped = sf.filter_vmap(f, state_axes=[(cells.acc, 0)])
        return lambda x: jnp.sum(mapped(jnp.stack([x, x + 1])), axis=0)

    def by_hand(self, f):
        axes = {"acc": 0, "count": None, "w": None}
        mapped = jax.vmap(f, in_axes=(axes, 0), out_axes=(axes, 0))

        def run(s, x):
            new, out = mapped(s, jnp.stack([x, x + 1]))
            return new, jnp.sum(out, axis=0)

        return run


@dataclasses.dataclass(frozen=True)
class Scan(Layer):
    """Writes a State on its own account, too."""

    reverse: bool = False

    def stateful(self, f, cells):
        def step(c, x):
            out = f(c + x)
            cells.count.value += 1
            return out, cells.acc.value

        def run(x):
            out, accs = sf.scan(step, x, jnp.arange(2.0), reverse=self.reverse)
            return out + jnp.sum(accs)

        return run

    def by_hand(self, f):
        def step(carry, x):
            s, c = carry
            s, out = f(s, c + x)
            s = s | {"count": s["count"] + 1}
            return (s, out), s["acc"]

        def run(s, x):
            xs = jnp.arange(2.0)
            (s, out), accs = jax.lax.scan(step, (s, x), xs, reverse=self.reverse)
            return s, out + jnp.sum(accs)

        return run


@dataclasses.dataclass(frozen=True)
class Cond(Layer):
    """The branches write different States."""

    even: bool = True

    def stateful(self, f, cells):
        def other(x):
            cells.count.value += 3
            return 2 * x

        def run(x):
            return sf.cond((cells.count.value % 2 == 0) == self.even, f, other, x)

        return run

    def by_hand(self, f):
        def other(s, x):
            return s | {"count": s["count"] + 3}, 2 * x

        def run(s, x):
            return jax.lax.cond((s["count"] % 2 == 0) == self.even, f, other, s, x)

        return run


def stateful(nest, f, cells):
    for layer in reversed(nest):
        f = layer.stateful(f, cells)
    return f


def by_hand(nest, f):
    for layer in reversed(nest):
        f = layer.by_hand(f)
    return f


def vmaps(nest):
    return sum(isinstance(layer, Vmap) for layer in nest)


def assert_equal(ours, theirs):
    """Values, dtypes and structure. A zero may have either sign: XLA drops `x + 0`."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.max(np.abs(np.asarray(b))) < 2**24  # whole numbers up to here
        np.testing.assert_array_equal(a, b)


LAYERS = st.one_of(
    st.builds(Jit),
    st.builds(Checkpoint),
    st.builds(Grad, st.booleans()),
    st.builds(Vmap),
    st.builds(Scan, st.booleans()),
    st.builds(Cond, st.booleans()),
)
NESTS = st.lists(LAYERS, min_size=3, max_size=3).map(tuple)


@settings(max_examples=30)
@given(nest=NESTS)
@example(nest=(Jit(), Grad(), Checkpoint()))
@example(nest=(Scan(), Vmap(), Grad(wrt_state=True)))
@example(nest=(Vmap(), Vmap(), Cond()))
@example(nest=(Grad(), Grad(wrt_state=True), Scan()))
def test_a_nest_of_twins_is_the_same_program_with_states_passed_by_hand(nest):
    cells = Cells(vmaps(nest))
    reference = by_hand(nest, pure_body)
    ours = stateful(nest, cells.body, cells)
    state = cells.now()
    for x in (START, 2 * START):  # the second call on what the first has left
        out = ours(x)
        state, expected = reference(state, x)
        assert_equal(out, expected)
        assert_equal(cells.now(), state)


@settings(max_examples=20)
@given(nest=NESTS)
@example(nest=(Jit(), Scan(), Cond()))
def test_a_nest_runs_its_body_once_and_calls_of_one_jitted_nest_do_not_again(nest):
    cells = Cells(vmaps(nest))
    ours = sf.filter_jit(stateful(nest, cells.body, cells))
    ours(START)
    assert cells.runs == 1
    ours(2 * START)
    assert cells.runs == 1


@settings(max_examples=20)
@given(nest=NESTS)
@example(nest=(Jit(), Scan(), Cond()))
@example(nest=(Grad(wrt_state=True), Checkpoint(), Vmap()))
def test_a_body_that_raises_changes_no_state_however_deep_it_is(nest):
    cells = Cells(vmaps(nest))

    def body(x):
        cells.body(x)
        raise Boom

    before = cells.now()
    with pytest.raises(Boom):
        stateful(nest, body, cells)(START)
    assert_equal(cells.now(), before)
    # Nothing of the failed trace is left that would disturb the next one.
    out = stateful(nest, cells.body, cells)(START)
    state, expected = by_hand(nest, pure_body)(before, START)
    assert_equal((cells.now(), out), (state, expected))


@settings(max_examples=15)
@given(nest=NESTS)
@example(nest=(Jit(), Scan(), Cond()))
def test_a_failure_that_is_caught_undoes_the_twin_and_nothing_else(nest):
    cells = Cells(vmaps(nest))

    def body(x):
        cells.body(x)
        raise Boom

    @sf.filter_jit
    def step(x):
        cells.count.value += 10
        before = cells.now()
        with pytest.raises(Boom):
            stateful(nest, body, cells)(x)
        after = cells.now()
        assert all(after[name] is before[name] for name in before)
        cells.count.value += 1

    before = cells.now()
    step(START)
    assert_equal(cells.now(), before | {"count": jnp.array(11)})


# -- one trace ----------------------------------------------------------------------


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_scans_in_scans_run_their_body_once(depth, jitted):
    total = sf.State(jnp.array(0), name="total")
    runs = []

    def body(c, x):
        runs.append(0)
        total.value += 1
        return c + x, None

    f = body
    for _ in range(depth - 1):

        def f(c, x, f=f):
            return sf.scan(f, c + x, jnp.arange(2))[0], None

    def run(x):
        return sf.scan(f, x, jnp.arange(2))[0]

    (sf.filter_jit(run) if jitted else run)(jnp.array(0))
    assert len(runs) == 1
    assert total.value == 2**depth


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_conds_in_whiles_in_foris_run_their_body_once(depth):
    total = sf.State(jnp.array(0), name="total")
    runs = []

    def body(x):
        runs.append(0)
        total.value += 1
        return x + 1

    def under_cond(f):
        return lambda x: sf.cond(total.value < 100, f, lambda x: x, x)

    def under_while(f):
        return lambda x: sf.while_loop(lambda y: y < x + 1, f, x)

    def under_fori(f):
        return lambda x: sf.fori_loop(0, 1, lambda i, x: f(x), x)

    f = body
    for i in range(depth):
        f = (under_cond, under_while, under_fori)[i % 3](f)
    sf.filter_jit(f)(jnp.array(0))
    assert len(runs) == 1
    assert total.value == 1


@pytest.mark.parametrize("around", range(1, 6))
def test_checkpoint_in_grad_in_jit_runs_its_body_once(around):
    """As many checkpoints in a row as the depth says, under one grad under one jit."""
    w, count = sf.Param(jnp.array(2.0), name="w"), sf.State(jnp.array(0), name="count")
    runs = []

    def body(x):
        runs.append(0)
        count.value += 1
        return w.value * x

    f = body
    for _ in range(around):
        f = sf.filter_checkpoint(f)

    @sf.filter_jit
    def step(x):
        return sf.filter_grad(lambda x: f(x), wrt=w)(x)

    assert step(jnp.array(3.0)) == 3.0
    assert (len(runs), int(count.value)) == (1, 1)


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_grad_in_vmap_in_scan_runs_its_body_once(depth, jitted):
    """Each level is all three; the innermost body is a square."""
    count = sf.State(jnp.array(0), name="count")
    runs = []

    def body(x):
        runs.append(0)
        count.value += 1
        return x**2

    def level(f):
        def step(c, _):
            return c + sf.filter_vmap(sf.filter_grad(f))(jnp.stack([c, c])).sum(), None

        return lambda x: sf.scan(step, x, None, length=2)[0]

    f = body
    for _ in range(depth):
        f = level(f)
    out = (sf.filter_jit(f) if jitted else f)(jnp.array(1.0))
    assert len(runs) == 1
    assert count.value == 2**depth

    def by_hand(f):
        def step(c, _):
            return c + jax.vmap(jax.grad(f))(jnp.stack([c, c])).sum(), None

        return lambda x: jax.lax.scan(step, x, None, length=2)[0]

    g = jnp.square
    for _ in range(depth):
        g = by_hand(g)
    np.testing.assert_allclose(out, g(jnp.array(1.0)), rtol=1e-5)


def test_a_weakly_typed_carry_does_not_make_the_tracing_grow_with_the_depth():
    """`jax.lax.scan` traces a body again to promote such a carry: once more, a level."""
    runs = []

    def body(c, x):
        runs.append(0)
        return c + x, None

    def outer(c, _):
        return sf.scan(body, c, jnp.arange(2.0))[0], None

    sf.scan(outer, 0.0, None, length=2)
    theirs = []

    def raw_body(c, x):
        theirs.append(0)
        return c + x, None

    jax.lax.scan(
        lambda c, _: (jax.lax.scan(raw_body, c, jnp.arange(2.0))[0], None),
        0.0,
        None,
        length=2,
    )
    assert len(runs) <= len(theirs)


# -- raw transforms -----------------------------------------------------------------


def raw_scan(f):
    return lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, None, length=2)[0]


def raw_vmap(f):
    return lambda x: jnp.sum(jax.vmap(f)(jnp.stack([x, x + 1])))


def raw_while(f):
    return lambda x: jax.lax.while_loop(lambda y: y < 10, f, x)


RAW = {
    "jax.grad": jax.grad,
    "jax.vmap": raw_vmap,
    "eqx.filter_vmap": lambda f: (
        lambda x: jnp.sum(eqx.filter_vmap(f)(jnp.stack([x, x + 1])))
    ),
    "eqx.filter_grad": eqx.filter_grad,
    "jax.jvp": lambda f: lambda x: jax.jvp(f, (x,), (jnp.ones_like(x),))[1],
    "jax.jacfwd": jax.jacfwd,
    "jax.hessian": jax.hessian,
    "lax.scan": raw_scan,
    "lax.cond": lambda f: lambda x: jax.lax.cond(x > 0, f, lambda x: -x, x),
    "lax.switch": lambda f: lambda x: jax.lax.switch(1, [lambda x: -x, f], x),
    "lax.while_loop": raw_while,
    "lax.fori_loop": lambda f: lambda x: jax.lax.fori_loop(0, 2, lambda i, c: f(c), x),
    "lax.map": lambda f: lambda x: jnp.sum(jax.lax.map(f, jnp.stack([x, x + 1]))),
    "jax.checkpoint": jax.checkpoint,
    "eqx.filter_checkpoint": eqx.filter_checkpoint,
    "jax.jit": jax.jit,
    "eqx.filter_jit": eqx.filter_jit,
}
# These make a jaxpr to be compiled: a State must not be frozen into it.
COMPILED = ("jax.jit", "eqx.filter_jit")
# So do these, and JAX keeps it by the identity of the function.
LOOPS = ("scan", "cond", "switch", "while_loop", "fori_loop", "map")
TRACED = (
    *COMPILED,
    "jax.checkpoint",
    "eqx.filter_checkpoint",
    *tuple(f"lax.{name}" for name in LOOPS),
)

TWINS = {
    "filter_jit": sf.filter_jit,
    "filter_grad": lambda f: (
        lambda x: sf.filter_value_and_grad(lambda y: f(y), has_aux=False)(x)[0]
    ),
    "filter_vmap": lambda f: (
        lambda x: sf.filter_vmap(f)(jnp.reshape(x, (1,) * (x.ndim + 1)))[0]
    ),
    "scan": lambda f: (
        lambda x: sf.scan(lambda c, _: (c, f(c)), x, None, length=1)[1][0]
    ),
    "cond": lambda f: lambda x: sf.cond(x < 100, f, f, x),
    "filter_checkpoint": sf.filter_checkpoint,
}


@pytest.mark.parametrize("name", [name for name in RAW if name not in TRACED])
def test_a_raw_transform_on_its_own_may_read_a_state(name):
    w = sf.State(jnp.array(3.0), name="w")

    def run(x):
        return RAW[name](lambda y: w.value * y * y + w.value)(x)

    for value in (3.0, 5.0):  # the same code again, with another value
        w.value = value
        expected = RAW[name](lambda y, v=value: v * y * y + v)(jnp.array(2.0))
        np.testing.assert_allclose(run(jnp.array(2.0)), expected, rtol=1e-6)


# JAX has no reverse-mode derivative of a while_loop, with States or without.
NESTS = [
    (name, twin)
    for name in RAW
    for twin in TWINS
    if (name, twin) != ("lax.while_loop", "filter_grad")
]


@pytest.mark.parametrize(("name", "twin"), NESTS)
def test_a_raw_transform_inside_a_twin_may_read_a_state(name, twin):
    w = sf.State(jnp.array(3.0), name="w")

    # One function object for all calls: jax keeps what it traced by identity.
    def read(y):
        return w.value * y + w.value

    inner = RAW[name](read)
    outer = TWINS[twin](lambda x: inner(x))
    for value in (3.0, 5.0):
        w.value = value
        want = RAW[name](lambda y, v=value: v * y + v)(jnp.array(2.0))
        np.testing.assert_allclose(outer(jnp.array(2.0)), want, rtol=1e-6)


@pytest.mark.parametrize("name", ["lax.scan", "jax.jit", "eqx.filter_jit", "lax.cond"])
def test_a_raw_transform_sees_what_the_function_wrote_before_it(name):
    """jax would hand out the jaxpr of the first use again, with the old value in it."""
    w = sf.State(jnp.array(3.0), name="w")

    def read(y):
        return w.value * y

    inner = RAW[name](read)

    @sf.filter_jit
    def step(x):
        first = inner(x)
        w.value += 2
        return first, inner(x)

    first, second = step(jnp.array(1.0))
    want = [RAW[name](lambda y, v=v: v * y)(jnp.array(1.0)) for v in (3.0, 5.0)]
    assert [float(first), float(second)] == [float(x) for x in want]


@pytest.mark.parametrize("name", COMPILED)
def test_a_raw_transform_that_compiles_may_not_read_a_state_on_its_own(name):
    w = sf.State(jnp.array(3.0), name="w")
    with pytest.raises(sf.StateTraceError, match=r"^State 'w' .*was read inside a raw"):
        RAW[name](lambda y: w.value * y)(jnp.array(1.0))
    assert w.value == 3.0


@pytest.mark.parametrize("inside", [None, *TWINS])
@pytest.mark.parametrize("name", RAW)
def test_a_raw_transform_that_writes_a_state_raises_and_names_it(name, inside):
    w = sf.State(jnp.array(3.0), name="w")

    def write(y):
        w.value = y
        return y * y

    run = RAW[name](write)
    if inside is not None:
        run = TWINS[inside](run)
    message = r"^State 'w' \(created at .*\) was written inside a raw JAX transform\."
    with pytest.raises(sf.StateTraceError, match=message) as caught:
        run(jnp.array(2.0))
    assert "sf.filter_grad" in str(caught.value)
    assert w.value == 3.0


@pytest.mark.parametrize("twin", ["filter_grad", "filter_vmap", "filter_checkpoint"])
def test_a_twin_inside_a_raw_transform_may_read_a_state(twin):
    w = sf.State(jnp.array(3.0), name="w")
    f = TWINS[twin](lambda x: w.value * x * x)
    for value in (3.0, 5.0):
        w.value = value
        assert jax.grad(f)(jnp.array(1.0)) == 2 * value
        assert jax.vmap(f)(jnp.arange(2.0))[1] == value


INNER = TWINS | {
    "filter_jvp": lambda f: lambda x: sf.filter_jvp(f, (x,), (x,))[0],
    "filter_vjp": lambda f: lambda x: sf.filter_vjp(f, x)[0],
    "associative_scan": lambda f: (
        lambda x: sf.associative_scan(lambda a, b: f(a) + 0 * b, jnp.stack([x, x]))[1]
    ),
}


@pytest.mark.parametrize("twin", INNER)
@pytest.mark.parametrize(
    "name", ["jax.jit", "eqx.filter_jit", "lax.scan", "lax.cond", "jax.checkpoint"]
)
def test_a_twin_inside_a_raw_transform_inside_a_twin_sees_the_present_value(name, twin):
    """The read of the inner twin is one that jax keeps, like a read without it."""
    w = sf.State(jnp.array(3.0), name="w")
    inner = RAW[name](INNER[twin](lambda x: w.value * x))
    outer = sf.filter_value_and_grad(lambda x: inner(x))

    def want(value, x):
        return RAW[name](lambda y: value * y)(x)

    x = jnp.array(2.0)
    for value in (3.0, 5.0):
        w.value = value
        assert outer(x)[0] == want(value, x)

    @sf.filter_jit
    def step(x):
        first = inner(x)
        w.value += 2
        return first, inner(x)

    assert [float(y) for y in step(x)] == [want(5.0, x), want(7.0, x)]
    assert [float(y) for y in step(x)] == [want(7.0, x), want(9.0, x)]


def test_a_twin_inside_a_raw_transform_that_writes_raises():
    w = sf.State(jnp.array(3.0), name="w")

    def write(x):
        w.value = x
        return x

    message = r"^State 'w' .* was written inside a raw JAX transform\."
    for run in (
        lambda x: jax.grad(
            lambda y: sf.scan(lambda c, _: (write(c), 0), y, length=2)[0]
        )(x),
        lambda x: jax.vmap(sf.filter_grad(write))(x[None]),
        lambda x: jax.grad(sf.filter_checkpoint(write))(x),
        lambda x: jax.jit(sf.filter_jit(write))(x),
        lambda x: jax.lax.cond(
            x > 0, lambda x: sf.cond(x > 1, write, write, x), write, x
        ),
    ):
        with pytest.raises(sf.StateTraceError, match=message):
            run(jnp.array(2.0))
        assert w.value == 3.0


# -- runtime checks and prints inside twins -----------------------------------------


CHECKED = {
    "filter_jit": sf.filter_jit,
    "filter_grad": lambda f: lambda x: sf.filter_value_and_grad(f)(x)[0],
    "filter_vmap": lambda f: lambda x: sf.filter_vmap(f)(x[None])[0],
    "filter_checkpoint": sf.filter_checkpoint,
    "scan": lambda f: lambda x: sf.scan(lambda c, _: (f(c), None), x, None, 1)[0],
    "fori_loop": lambda f: lambda x: sf.fori_loop(0, 1, lambda i, c: f(c), x),
    "while_loop": lambda f: lambda x: sf.while_loop(lambda c: c == x, f, x),
    "cond": lambda f: lambda x: sf.cond(x == x, f, lambda x: x, x),
    "switch": lambda f: lambda x: sf.switch(jnp.array(0), [f, lambda x: x], x),
    "nest": lambda f: sf.filter_jit(
        lambda x: sf.cond(
            x == x,
            lambda x: sf.scan(lambda c, _: (f(c), None), x, None, 1)[0],
            lambda x: x,
            x,
        )
    ),
}
NO_CHECK_UNDER_VMAP = {"filter_vmap"}  # the count there is shared


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", CHECKED)
def test_a_runtime_check_that_fails_in_a_twin_changes_no_state(name, jitted):
    count, other = sf.State(jnp.array(0), name="count"), sf.State(1, name="other")

    def f(x):
        other.value += 1
        x = eqx.error_if(x, x > 2, "too large")
        count.value += 1
        return x + 1

    run = CHECKED[name](f)
    if jitted:
        run = sf.filter_jit(run)
    assert run(jnp.array(1.0)) == 2.0
    assert (int(count.value), int(other.value)) == (1, 2)
    with pytest.raises(Exception, match="too large"):
        run(jnp.array(3.0))
    assert (int(count.value), int(other.value)) == (1, 2)
    assert run(jnp.array(2.0)) == 3.0
    assert (int(count.value), int(other.value)) == (2, 3)


@pytest.mark.parametrize("name", CHECKED)
def test_a_branched_runtime_check_works_in_a_twin(name):
    count = sf.State(jnp.array(0), name="count")

    def f(x):
        count.value += 1
        which = jnp.where(x > 3, 1, 0)
        return eqx.branched_error_if(x, x > 2, which, ["a little", "far too large"])

    run = CHECKED[name](f)
    with pytest.raises(Exception, match="far too large"):
        run(jnp.array(5.0))
    with pytest.raises(Exception, match="a little"):
        run(jnp.array(3.0))
    assert count.value == 0


@pytest.mark.parametrize("name", CHECKED)
def test_a_debug_print_works_in_a_twin(name, capfd):
    seen = sf.State(jnp.array(0.0), name="seen")

    def f(x):
        jax.debug.print("x is {}", x)
        seen.value += 1
        return eqx.debug.backward_nan(x) + 1

    CHECKED[name](f)(jnp.array(1.5))
    jax.effects_barrier()
    assert "x is 1.5" in capfd.readouterr().out
    assert seen.value == 1.0


# -- python control flow ------------------------------------------------------------


def test_python_control_flow_on_concrete_values_works_under_eager_grad():
    w = sf.Param(jnp.array(2.0), name="w")
    seen = sf.State(jnp.array(0), name="seen")

    def f(x):
        if x > 0:  # as under `jax.grad`
            seen.value += 1
            return w.value * x
        return -x

    assert sf.filter_grad(f)(jnp.array(1.0)) == 2.0
    assert sf.filter_grad(f)(jnp.array(-1.0)) == -1.0
    assert sf.filter_grad(f, wrt=w)(jnp.array(3.0)) == 3.0
    assert seen.value == 2

    def on_a_state(x):
        return w.value * x if w.value > 1 else x

    assert sf.filter_grad(on_a_state, wrt=w)(jnp.array(3.0)) == 3.0


def test_python_control_flow_on_concrete_values_works_under_eager_vmap():
    flag = sf.State(jnp.array(True), name="flag")

    def f(x, n):
        out = x * 2 if flag.value else x
        for _ in range(int(n)):  # not mapped, so known
            out = out + 1
        flag.value = False
        return out

    run = sf.filter_vmap(f, in_axes=(0, None))
    assert np.array_equal(run(jnp.arange(2.0), jnp.array(3)), [3.0, 5.0])
    assert not flag.value
    assert np.array_equal(run(jnp.arange(2.0), jnp.array(3)), [3.0, 4.0])


def test_python_control_flow_under_eager_checkpoint_is_as_in_equinox():
    """Equinox's own traces its function, and refuses `if x > 0`; ours may do better."""
    flag = sf.State(jnp.array(True), name="flag")
    run = sf.filter_checkpoint(lambda x, n: x * n if n > 1 else x)
    assert run(jnp.array(2.0), 3) == 6.0
    assert run(jnp.array(2.0), 1) == 2.0
    assert flag.value


# -- loops and branches in twins outside of any trace --------------------------------


def in_each_twin(w):
    return {
        "vmap": lambda f, x: sf.filter_vmap(f)(x[None])[0],
        "grad": lambda f, x: sf.filter_grad(f)(x) * x,
        "grad of a State": lambda f, x: sf.filter_grad(f, wrt=w)(x) * w.value / 3,
        "jvp": lambda f, x: sf.filter_jvp(f, (x,), (x,))[1],
    }


@pytest.mark.parametrize(
    "loop", ["scan", "map", "fori_loop", "bounds", "cond", "switch"]
)
@pytest.mark.parametrize("twin", in_each_twin(None))
def test_a_loop_in_an_eager_twin_is_traced_once_and_sees_what_states_hold(loop, twin):
    w, count = sf.Param(jnp.array(2.0), name="w"), sf.State(jnp.array(0), name="count")
    runs = []

    def step(x):
        runs.append(loop)
        count.value += 1
        return w.value * x

    def thrice(x):
        return step(step(step(x)))

    def body(x, _):
        return step(x), None

    def at(_, x):
        return step(x)

    one = jnp.array(1.0)
    loops = {
        "scan": lambda x: sf.scan(body, x, None, length=3)[0],
        "map": lambda x: sf.map(thrice, x[None])[0],
        "fori_loop": lambda x: sf.fori_loop(0, 3, at, x),
        "bounds": lambda x: sf.fori_loop(jnp.array(0), jnp.array(3), at, x),
        "cond": lambda x: sf.cond(True, thrice, thrice, x),
        "switch": lambda x: sf.switch(1, [thrice, thrice], x),
    }
    traced = []
    for i in range(1, 5):
        w.value = float(i)
        assert in_each_twin(w)[twin](loops[loop], one) == i**3
        assert count.value == 3 * i
        traced.append(len(runs))
    # `jax.lax` can't differentiate a loop whose bounds it doesn't know.
    assert loop == "bounds" or traced[0] == traced[-1]


def test_a_loop_in_an_eager_twin_keeps_no_body_alive():
    def make():
        big = jnp.ones(3)

        def body(x, _):
            return x * big.sum(), None

        assert (
            sf.filter_grad(lambda x: sf.scan(body, x, None, length=1)[0])(
                jnp.array(1.0)
            )
            == 3
        )
        return weakref.ref(body)

    refs = [make() for _ in range(3)]
    gc.collect()
    assert [ref() for ref in refs] == [None] * 3
