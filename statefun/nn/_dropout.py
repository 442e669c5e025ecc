"""`Dropout`, which draws its own keys."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from .._errors import message
from .._rng import Rng


class Dropout(eqx.Module):
    """As `equinox.nn.Dropout`, with keys from an [`statefun.Rng`][].

    **Arguments:**

    - `p`: the fraction of the entries that are set to zero, on average.
    - `inference`: whether to leave the input as it is; see
        [`statefun.nn.inference_mode`][].
    - `rng`: the source of keys. Layers may share one. If None, every call needs a
        `key`.

    !!! example

        ```python
        import jax.numpy as jnp, statefun as sf

        dropout = sf.nn.Dropout(0.5, rng=sf.Rng(0))
        dropout(jnp.ones(8))  # another mask at each call
        ```

    Source: [Dropout](https://jmlr.org/papers/v15/srivastava14a.html);
    `equinox.nn.Dropout`.
    """

    p: float
    inference: bool
    rng: Rng | None

    def __init__(
        self, p: float = 0.5, inference: bool = False, *, rng: Rng | None = None
    ):
        if isinstance(p, int | float) and not 0 <= p < 1:
            raise ValueError(f"`p` is {p}, but should be at least 0 and less than 1.")
        if rng is not None and not isinstance(rng, Rng):
            raise TypeError(f"`rng` is {rng!r}, but should be a `statefun.Rng`.")
        self.p = p
        self.inference = inference
        self.rng = rng

    def __call__(
        self, x: Array, *, key: Any = None, inference: bool | None = None
    ) -> Array:
        """Sets entries to zero, and scales the others so that the mean is kept.

        **Arguments:**

        - `x`: any array of floats.
        - `key`: used instead of one from the `Rng`, which then doesn't advance.
        - `inference`: overrides the layer's own flag.

        **Returns:** an array like `x`.

        **Raises:** `RuntimeError` if there is neither a key nor an `Rng`.
        """
        if inference is None:
            inference = self.inference
        if inference or (isinstance(self.p, int | float) and self.p == 0):
            return x
        if key is None:
            if self.rng is None:
                raise RuntimeError(
                    message(
                        "Dropout was called in training without a key.",
                        "it has no Rng to draw one from.",
                        "`Dropout(p, rng=sf.Rng(0))`, or `dropout(x, key=…)`.",
                    )
                )
            key = self.rng()
        kept = 1 - lax.stop_gradient(self.p)
        mask = jax.random.bernoulli(key, kept, x.shape)
        return jnp.where(mask, x / kept, jnp.zeros_like(x))
