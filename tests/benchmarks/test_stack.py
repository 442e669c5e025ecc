"""The contenders of the benchmarks of stacks do the same work."""

import jax
import numpy as np
import pytest

from . import bench_stack


def losses(make):
    # As where the benchmarks run.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        step = make(2)
        return [float(step(bench_stack.batch())) for _ in range(2)]


def test_a_stack_trains_as_the_scan_by_hand_and_as_the_layers_one_by_one():
    want = losses(bench_stack.unrolled)
    for make in (bench_stack.ours, bench_stack.by_hand):
        np.testing.assert_allclose(losses(make), want, rtol=1e-4)


def test_nnx_has_the_same_number_of_weights():
    pytest.importorskip("flax")
    nnx = pytest.importorskip("tests.benchmarks._training_nnx")
    blocks = jax.tree.leaves(jax.vmap(bench_stack.Block)(bench_stack.keys(3)))
    assert nnx.size(bench_stack.nnx_model(3)) == sum(x.size for x in blocks)
