"""The configuration under which every test runs: stricter than a user's.

Promotion of dtypes and ranks is an error, so that nothing in statefun widens an array
or broadcasts it by accident, and warnings are errors (pyproject.toml). jax has four
devices on the CPU, so that tests of sharding and collectives need no other machine.
"""

import os
from collections.abc import Iterator

os.environ["JAX_PLATFORMS"] = "cpu"
# Before jax makes its CPU client, which reads them once. Subprocesses inherit both.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
).strip()

import hypothesis
import jax
import jaxtyping
import pytest

# A pytest plugin may have imported jax before this file set the variable.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Deadlines would measure compilation. Derandomised, because a test that fails has to
# fail again; `pytest --hypothesis-profile=search` looks for new examples.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.register_profile("search", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("repeatable")

# STATEFUN_TYPECHECK=1 checks every annotation at run time, shapes and dtypes included.
# An import hook: it has to be in place before statefun is imported for the first time.
if os.environ.get("STATEFUN_TYPECHECK", "0") == "1":
    jaxtyping.install_import_hook("statefun", "beartype.beartype")


@pytest.fixture
def key() -> jax.Array:
    """A random key, the same in every run."""
    return jax.random.key(20)


@pytest.fixture
def checking_leaks() -> Iterator[None]:
    """Makes a tracer that outlives its trace an error, for the whole of the test.

    On request, not everywhere: under it jax keeps no cache of traces, so that a test
    that counts them would see others than a user has.
    """
    with jax.checking_leaks():
        yield
