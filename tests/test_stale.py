"""Raw transforms that read a State, bare and in a twin, each order in a fresh process."""

import threading
import time

import jax
import jax.numpy as jnp
import pytest

import statefun as sf
from tests.fresh import run_fresh

PROGRAM = """
import jax, jax.numpy as jnp, statefun as sf

state, one = sf.State(jnp.float32(2), name="state"), jnp.float32(1)

def cell(c, _):
    return c * state.value, None

def times(c):
    return c * state.value

def also(c):
    return c * state.value + 0

jitted, kept = jax.jit(times), jax.checkpoint(times)
bodies = dict(
    scan=lambda x: jax.lax.scan(cell, x, None, length=1)[0],
    cond=lambda x: jax.lax.cond(True, times, also, x),
    checkpoint=kept,
    jit=jitted,
)
twins = dict(
    grad=lambda f: sf.filter_value_and_grad(f)(one)[0],
    vmap=lambda f: sf.filter_vmap(f)(one[None])[0],
    jit=lambda f: sf.filter_jit(f)(one),
)
body, twin = bodies["BODY"], twins["TWIN"]

def bare():
    try:
        return body(one).item()
    except sf.StateTraceError as error:
        return str(error)[:13]
"""
bodies = pytest.mark.parametrize("body", ["scan", "cond", "checkpoint", "jit"])
twins = pytest.mark.parametrize("twin", ["grad", "vmap", "jit"])


def run(body: str, twin: str, rest: str) -> str:
    program = PROGRAM.replace("BODY", body).replace("TWIN", twin)
    return run_fresh(program + rest)


@bodies
@twins
def test_what_a_twin_has_traced_is_not_used_bare(body, twin):
    out = run(body, twin, "a = twin(body).item()\nstate.value = 3.0\nprint(a, bare())")
    assert out == "2.0 State 'state'"


@bodies
@twins
def test_a_bare_read_that_was_refused_leaves_nothing_for_a_twin(body, twin):
    out = run(body, twin, "a = bare()\nstate.value = 3.0\nprint(a, twin(body).item())")
    assert out == "State 'state' 3.0"


def test_an_eager_custom_rule_that_reads_a_state_runs_in_a_fresh_process():
    out = run(
        "jit",
        "jit",
        """
@sf.filter_custom_vjp
def f(x):
    return x * state.value
f.def_fwd(lambda perturbed, x: (x * state.value, None))
f.def_bwd(lambda residuals, g, perturbed, x: g * state.value)
print(f(one).item(), sf.filter_grad(f)(one).item())
""",
    )
    assert out == "2.0 2.0"


# -- raw code in a twin, used again -------------------------------------------------

ONE = jnp.ones(())


def made_raw(transform, times):
    """The function in a raw transform whose jaxpr JAX keeps."""

    def step(x, _):
        return times(x), None

    return {
        "jit": jax.jit(times),
        "scan": lambda x: jax.lax.scan(step, x, None, length=1)[0],
        "checkpoint": jax.checkpoint(times),
    }[transform]


def kept_by(transform):
    """A raw function that JAX keeps the jaxpr of; it reads `state`, and counts traces."""
    state, runs = sf.Param(jnp.float32(2), name="state"), []

    def times(x):
        runs.append("times")
        return jnp.sum(state.value * x)

    return made_raw(transform, times), state, runs


VIEWS = {
    "vmap": lambda f, s: sf.filter_vmap(f)(ONE[None])[0],
    "grad": lambda f, s: sf.filter_value_and_grad(f)(ONE)[0],
    "jvp": lambda f, s: sf.filter_jvp(f, (ONE,), (ONE,))[0],
    "grad of the State": lambda f, s: sf.filter_grad(f, wrt=s)(ONE) * s.value,
    "Hessian of the State": lambda f, s: (
        sf.filter_grad(
            lambda x: sf.filter_grad(lambda x: f(x) * f(x) / 4, wrt=s)(x), wrt=s
        )(ONE)
        * (2 * s.value)
    ),
    "jit": lambda f, s: sf.filter_jit(f)(ONE),
    "shapes": lambda f, s: (sf.filter_eval_shape(f, ONE), s.value)[1],
    "written before": lambda f, s: sf.filter_vmap(lambda x: written(s, s.value, f(x)))(
        ONE[None]
    )[0],
}


def written(state, value, out):
    state.value = value
    return out


raw = pytest.mark.parametrize("transform", ["jit", "scan"])


PAIRS = [
    ("vmap", "grad of the State"),
    ("grad of the State", "jit"),
    ("shapes", "written before"),
    ("grad", "Hessian of the State"),
]


@raw
@pytest.mark.parametrize("inside", [None, sf.filter_jit, sf.filter_vmap])
@pytest.mark.parametrize("views", PAIRS)
def test_what_a_twin_has_kept_is_not_used_where_the_state_looks_different(
    transform, inside, views
):
    f, state, _ = kept_by(transform)
    first, then = map(VIEWS.get, views)

    def both(_):
        return first(f, state), then(f, state), first(f, state)

    out = both(0) if inside is None else inside(both)(jnp.zeros(1))
    assert [float(jnp.squeeze(x)) for x in out] == [2, 2, 2]


@raw
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_a_state_that_is_written_between_two_calls_is_seen(transform, view):
    f, state, _ = kept_by(transform)
    for value in (2.0, 3.0, 3.0, 2.0):
        state.value = value
        assert view(f, state) == value


@raw
@pytest.mark.parametrize("view", ["vmap", "grad", "jvp"])
def test_raw_code_in_a_twin_is_not_traced_at_each_call(transform, view):
    f, state, runs = kept_by(transform)
    other = sf.State(ONE)
    first = VIEWS[view](f, state)
    seen = len(runs)
    for _ in range(3):
        other.value += 1
        assert VIEWS[view](f, state) == first
    assert len(runs) == seen


@raw
def test_a_state_that_is_written_in_a_twin_is_seen_by_raw_code(transform):
    f, state, _ = kept_by(transform)

    def twice(x):
        before = f(x)
        state.value = state.value + 1
        return before, f(x)

    for i in range(2, 5):
        assert sf.filter_jvp(twice, (ONE,), (ONE,))[0] == (i, i + 1)
        with pytest.raises(ZeroDivisionError):
            sf.filter_jvp(lambda x: (twice(x), 1 // 0), (ONE,), (ONE,))


@raw
def test_a_mapped_state_is_its_lane_in_raw_code(transform):
    f, state, _ = kept_by(transform)
    state.value = jnp.arange(3.0)
    shared = sf.filter_vmap(f)
    lanes = sf.filter_vmap(f, state_axes=[(state, 0)])
    for call in (shared, lanes, shared, lanes):
        right = jnp.arange(3.0) if call is lanes else jnp.full(3, 3.0)
        assert jnp.array_equal(call(jnp.ones(3)), right)


@raw
def test_a_name_that_means_another_state_once_the_old_one_is_gone(transform):
    box = {}

    def times(x):
        return jnp.sum(box["state"].value * x)

    f = made_raw(transform, times)
    for value in (2.0, 3.0):
        box["state"] = sf.State(jnp.float32(value))
        assert sf.filter_vmap(f)(ONE[None]) == value


def test_a_random_key_that_raw_code_has_kept():
    rng = sf.State(jax.random.key(0))

    @jax.jit
    def draw(x):
        return x + jax.random.uniform(rng.value)

    first = sf.filter_vmap(draw)(ONE[None])
    assert sf.filter_vmap(draw)(ONE[None]) == first
    rng.value = jax.random.key(1)
    assert sf.filter_vmap(draw)(ONE[None]) != first


def test_another_thread_that_writes_what_raw_code_has_kept():
    f, state, _ = kept_by("jit")
    total = sf.State(jnp.float32(0), name="total")

    def add(x):
        total.value = total.value + f(ONE)
        return x

    sf.filter_vmap(add)(ONE[None])
    for value in (3.0, 4.0):
        threading.Thread(target=setattr, args=(state, "value", value)).start()
        while state.value != value:
            time.sleep(0.01)
        sf.filter_vmap(add)(ONE[None])
    assert total.value == 9


def test_in_a_fresh_process_raw_code_in_twins_is_neither_stale_nor_traced_anew():
    out = run_fresh("""
        import jax, jax.numpy as jnp, statefun as sf

        state, one, runs = sf.Param(jnp.float32(2)), jnp.float32(1), []

        @jax.jit
        def times(x):
            runs.append(0)
            return x * state.value

        found = []
        for value in (2.0, 3.0):
            state.value = value
            for _ in range(3):
                found.append(sf.filter_vmap(times)(one[None])[0].item())
            n = len(runs)
            found.append(sf.filter_grad(times)(one).item())
        print(found, len(runs) - n, sf.filter_grad(times, wrt=state)(one))
    """)
    assert out == "[2.0, 2.0, 2.0, 2.0, 3.0, 3.0, 3.0, 3.0] 0 1.0"
