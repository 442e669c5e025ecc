"""`checkify`, and checks that keep States from being written."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import statefun as sf
from tests.fresh import in_a_thread

GOOD, BAD = jnp.array(2.0), jnp.array(-2.0)

JIT = pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])


def jit_if(jitted, fun):
    return sf.filter_jit(fun) if jitted else fun


@pytest.fixture
def count():
    return sf.State(jnp.array(0), name="count")


@pytest.fixture
def last():
    return sf.State(jnp.array(0.0), name="last")


def pure(x, y=1.0):
    checkify.check(x > 0, "x is {x}", x=x)
    return {"log": jnp.log(x) * y, "x": x}


@JIT
@pytest.mark.parametrize("value", [GOOD, BAD])
@pytest.mark.parametrize(
    "errors",
    [
        checkify.user_checks,
        checkify.nan_checks,
        checkify.all_checks,
        checkify.float_checks | checkify.user_checks,
    ],
)
def test_without_states_it_is_jax(value, errors, jitted):
    ours = jit_if(jitted, sf.checkify(pure, errors=errors))
    theirs = checkify.checkify(pure, errors=errors)
    theirs = jax.jit(theirs) if jitted else theirs
    error, out = ours(value, y=jnp.array(2.0))
    want_error, want = theirs(value, y=jnp.array(2.0))
    for name in want:
        np.testing.assert_array_equal(out[name], want[name])
    assert (error.get() is None) == (want_error.get() is None)
    if error.get() is not None:
        assert error.get().splitlines()[0] == want_error.get().splitlines()[0]
        with pytest.raises(type_of(want_error)):
            error.throw()


def type_of(error):
    try:
        error.throw()
    except Exception as raised:
        return type(raised)
    raise AssertionError("no error")


def test_arguments_and_results_may_hold_anything():
    def f(x, label, g=jnp.exp):
        checkify.check(x > 0, "not positive")
        return g(x), label

    error, (out, label) = sf.checkify(f)(GOOD, "name", g=jnp.log)
    error.throw()
    assert label == "name"
    np.testing.assert_allclose(out, jnp.log(2.0), rtol=1e-6)


def test_a_check_without_checkify_raises_as_in_jax(count):
    def f(x):
        count.value += 1
        checkify.check(x > 0, "not positive")
        return x

    with pytest.raises(ValueError, match="checkify"):
        sf.filter_jit(f)(GOOD)
    assert count.value == 0


@JIT
def test_states_are_written_as_the_function_left_them(count, last, jitted):
    def f(x):
        count.value += 1
        checkify.check(x > 0, "x is {x}", x=x)
        last.value = x * count.value.astype(x.dtype)
        return last.value

    run = jit_if(jitted, sf.checkify(f))
    error, out = run(GOOD)
    assert error.get() is None
    assert (float(out), float(last.value), int(count.value)) == (2.0, 2.0, 1)
    error, out = run(BAD)
    assert error.get().startswith("x is -2.0")
    assert (float(last.value), int(count.value)) == (-4.0, 2)


def check_in(loop):
    """A check inside of a twin, inside of checkify."""

    def f(count, x):
        def step(c):
            count.value += 1
            checkify.check(c > 0, "c is {c}", c=c)
            return c - 1

        return loop(step, x)

    return f


INSIDE = {
    "jit": lambda step, x: sf.filter_jit(step)(x),
    "scan": lambda step, x: sf.scan(lambda c, _: (step(c), None), x, length=3)[0],
    "fori_loop": lambda step, x: sf.fori_loop(0, 3, lambda i, c: step(c), x),
    "while_loop": lambda step, x: sf.while_loop(lambda c: c > -1, step, x),
    "cond": lambda step, x: sf.cond(x < 3, step, lambda c: c, x - 2),
    "grad": lambda step, x: sf.filter_value_and_grad(step)(x - 2)[0],
    "checkpoint": lambda step, x: sf.filter_checkpoint(step)(x - 2),
}


@JIT
@pytest.mark.parametrize("inside", INSIDE)
def test_checks_inside_twins_are_seen(inside, jitted, count):
    f = check_in(INSIDE[inside])
    x = GOOD - 2 if inside == "jit" else GOOD
    error, _ = jit_if(jitted, sf.checkify(lambda x: f(count, x)))(x)
    assert error.get().startswith("c is 0.0")
    assert count.value > 0
    error, _ = jit_if(jitted, sf.checkify(lambda x: f(count, x)))(jnp.array(7.0))
    if inside == "while_loop":
        assert error.get() is not None
    else:
        assert error.get() is None


def test_index_checks_see_the_values_of_states():
    table = sf.State(jnp.arange(3.0), name="table")
    run = sf.checkify(lambda i: table.value[i], errors=checkify.index_checks)
    error, out = run(jnp.array(1))
    assert (error.get(), float(out)) == (None, 1.0)
    error, _ = run(jnp.array(5))
    assert "out-of-bounds" in error.get()
    table.value = jnp.arange(9.0)
    error, out = run(jnp.array(5))
    assert (error.get(), float(out)) == (None, 5.0)


@JIT
def test_a_function_that_raises_changes_no_state(count, jitted):
    def f(x):
        count.value += 1
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        jit_if(jitted, sf.checkify(f))(GOOD)
    assert count.value == 0


def test_nothing_leaks_and_the_body_runs_once(count, checking_leaks):
    runs = []

    def f(x):
        runs.append(0)
        count.value += 1
        checkify.check(x > 0, "not positive")
        return x

    sf.filter_jit(sf.checkify(f))(GOOD)
    assert len(runs) == 1
    assert count.value == 1


# -- nothing is written where a check has failed ------------------------------------


def stepping(count, last):
    def step(x):
        count.value += 1
        checkify.check(x > 0, "x is {x}", x=x)
        last.value = x
        return count.value

    return step


def test_filter_jit_with_checkify_writes_nothing_if_a_check_fails(count, last):
    step = sf.filter_jit(stepping(count, last), checkify=True)
    assert step(GOOD) == 1
    with pytest.raises(checkify.JaxRuntimeError, match="x is -2.0"):
        step(BAD)
    assert (int(count.value), float(last.value)) == (1, 2.0)
    assert step(GOOD) == 2


def test_filter_jit_with_checkify_may_donate_its_states(count, last):
    step = sf.filter_jit(stepping(count, last), checkify=True, donate_states=True)
    step(GOOD)
    with pytest.raises(checkify.JaxRuntimeError, match="x is -2.0"):
        step(BAD)
    assert (int(count.value), float(last.value)) == (1, 2.0)
    assert step(GOOD) == 2


def test_filter_jit_with_checkify_may_be_called_in_another_trace(count, last):
    """There the check belongs to the outermost function that asks for it."""
    inner = sf.filter_jit(stepping(count, last), checkify=True)
    outer = sf.filter_jit(lambda x: inner(x) + 1, checkify=True)
    assert outer(GOOD) == 2
    with pytest.raises(checkify.JaxRuntimeError, match="x is -2.0"):
        outer(BAD)
    assert (int(count.value), float(last.value)) == (1, 2.0)


def test_checkify_inside_filter_jit_is_thrown_by_hand(count, last):
    step = sf.filter_jit(sf.checkify(stepping(count, last)))
    error, out = step(BAD)
    assert out == 1
    with pytest.raises(checkify.JaxRuntimeError, match="x is -2.0"):
        checkify.check_error(error) if error.get() is None else error.throw()
    assert (int(count.value), float(last.value)) == (1, -2.0)


# -- Equinox's checks, which need no checkify ---------------------------------------


@pytest.mark.parametrize("on_error", ["raise", "nan", "off"])
def test_error_if_does_in_a_twin_what_it_does_without(on_error, count, last):
    def f(x):
        count.value += 1
        last.value = eqx.error_if(x, x < 0, "negative", on_error=on_error)
        return last.value

    run = sf.filter_jit(lambda x: sf.scan(lambda c, _: (f(c), None), x, length=2)[0])
    assert run(GOOD) == 2.0
    assert (int(count.value), float(last.value)) == (2, 2.0)
    if on_error == "raise":
        with pytest.raises(eqx.EquinoxRuntimeError, match="negative"):
            run(BAD)
        assert (int(count.value), float(last.value)) == (2, 2.0)
    else:
        out = run(BAD)
        assert np.array_equal(
            out, jnp.nan if on_error == "nan" else BAD, equal_nan=True
        )
        assert count.value == 4


NESTS = {
    "jit": lambda m, f: m.filter_jit(f),
    "grad": lambda m, f: m.filter_grad(f),
    "jit(grad)": lambda m, f: m.filter_jit(m.filter_grad(f)),
    "jit(vmap(grad))": lambda m, f: m.filter_jit(
        lambda x: m.filter_vmap(m.filter_grad(f))(jnp.stack([x, 2 * x]))
    ),
}


def debug_announces(x):
    return jnp.sum(eqx.debug.announce_transform(x, name="here")) * 3


def debug_stores_dce(x):
    return jnp.sum(eqx.debug.store_dce(x)) * 3


def debug_watches_the_backward_pass(x):
    return jnp.sum(eqx.debug.backward_nan(x, name="here")) * 3


def debug_may_break(x):
    eqx.debug.breakpoint_if(jnp.any(x < 0))
    return jnp.sum(x) * 3


@pytest.mark.parametrize("nest", NESTS)
@pytest.mark.parametrize(
    "function",
    [
        debug_announces,
        debug_stores_dce,
        debug_watches_the_backward_pass,
        debug_may_break,
    ],
)
@in_a_thread
def test_eqx_debug_does_in_a_twin_what_it_does_in_equinox(
    function, nest, count, last, capfd
):
    # Where JAX refuses it (a callback that is differentiated), it is refused here, too.
    def stateful(x):
        count.value += 1
        return function(x + last.value)

    def outcome(module, f):
        jax.clear_caches()  # `announce_transform` prints when JAX traces
        try:
            result = NESTS[nest](module, f)(GOOD)
            jax.effects_barrier()
        except Exception as error:
            return type(error), ""
        return result, capfd.readouterr().out

    (want, printed), (result, ours) = outcome(eqx, function), outcome(sf, stateful)
    if isinstance(want, type):
        assert result is want
        assert count.value == 0
        return
    assert np.array_equal(result, want)
    assert count.value == 1
    assert ("here" in ours) == ("here" in printed)


def test_eqx_debug_tells_which_code_is_eliminated(count, capfd):
    @sf.filter_jit
    def f(x):
        count.value += 1
        y, _ = eqx.debug.store_dce((x + 1, x + 2), name="here")
        return y

    f(GOOD)
    eqx.debug.inspect_dce(name="here")
    assert "<DCE'd>" in capfd.readouterr().out
    assert count.value == 1


def test_assert_max_traces_counts_the_traces_of_a_body(count):
    @eqx.debug.assert_max_traces(max_traces=1)
    def f(c, x):
        count.value += 1
        return c, x

    run = sf.filter_jit(lambda x: sf.scan(f, x, jnp.arange(3))[0])
    run(GOOD)
    run(BAD)
    assert count.value == 6
    with pytest.raises(RuntimeError, match="can only be traced"):
        run(GOOD.astype(jnp.int32))
    assert count.value == 6
