"""What the benchmarks of the twins compare does the same on both sides."""

import jax.numpy as jnp
import numpy as np
import pytest

import statefun as sf

from . import bench_twins


@pytest.mark.parametrize("name", bench_twins.CASES)
def test_both_sides_do_the_same_work(name):
    case = bench_twins.CASES[name][0]()
    x, state = jnp.ones(bench_twins.WIDTH), sf.State(jnp.array(0.0))
    value, theirs = case.theirs()(jnp.array(0.0), x)
    ours = case.ours(state)(x)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert state.value == value > 0


def test_both_sides_trace_to_programs_of_the_same_size():
    ours, theirs = (len(run().jaxpr.eqns) for run in bench_twins._traces().values())
    assert theirs > 1000
    assert abs(ours - theirs) <= 0.02 * theirs
