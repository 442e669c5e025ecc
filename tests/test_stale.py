"""Raw transforms that read a State, bare and in a twin, each order in a fresh process."""

import pytest

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
