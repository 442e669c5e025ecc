"""Libraries under a user's settings of promotion.

optax and metrax mix dtypes and ranks and count on JAX's defaults: under
`jax_numpy_dtype_promotion="strict"` even `optax.adam` raises.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def promotion(dtype: str, rank: str) -> Iterator[None]:
    """Sets how JAX promotes dtypes (`"standard"`, `"strict"`) and ranks (`"allow"`, …)."""
    with jax.numpy_dtype_promotion(dtype), jax.numpy_rank_promotion(rank):
        yield


def library_promotion() -> contextlib.AbstractContextManager[None]:
    """JAX's defaults, for a library's own code."""
    return promotion("standard", "allow")


def present_promotion() -> tuple[str, str]:
    """What the user has set, to be given to `promotion`."""
    return jax.config.jax_numpy_dtype_promotion, jax.config.jax_numpy_rank_promotion  # type: ignore[attr-defined]
