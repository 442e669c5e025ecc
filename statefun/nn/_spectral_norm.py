"""`SpectralNorm`, with its power iterations in a State."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from .._state.state import State

L = TypeVar("L")


class SpectralNorm(eqx.Module, Generic[L]):
    """As `equinox.nn.SpectralNorm`, with the power iterations in a State.

    Calls a layer with its weight divided by an estimate of the weight's largest singular
    value. Every call in training improves the estimate; in inference mode it stays.

    **Arguments:**

    - `layer`: a layer with a weight of at least two dimensions, as `equinox.nn.Linear`
        or `equinox.nn.Conv2d`. All axes but the first are taken as one.
    - `weight_name`: the name of the weight.
    - `num_power_iterations`: how many iterations at each call.
    - `eps`: the lower bound of the norm of a singular vector.
    - `inference`: whether to leave the estimate as it is; see
        [`statefun.nn.inference_mode`][].
    - `key`: for the first singular vectors.

    **Attributes:**

    - `uv`: a State, the pair of estimated singular vectors.

    **Raises:** `ValueError` if the weight has fewer than two dimensions.

    !!! example

        ```python
        import equinox as eqx, jax, jax.numpy as jnp, statefun as sf

        key = jax.random.key(0)
        linear = eqx.nn.Linear(3, 4, key=key)
        layer = sf.nn.SpectralNorm(linear, "weight", key=key)
        layer(jnp.ones(3))
        ```

    Source: [Spectral Normalization](https://arxiv.org/abs/1802.05957);
    `equinox.nn.SpectralNorm`.
    """

    layer: L
    uv: State[tuple[Array, Array]]
    inference: bool
    weight_name: str = eqx.field(static=True)
    num_power_iterations: int = eqx.field(static=True)
    eps: float = eqx.field(static=True)

    def __init__(
        self,
        layer: L,
        weight_name: str,
        num_power_iterations: int = 1,
        eps: float = 1e-12,
        inference: bool = False,
        *,
        key: Array,
    ):
        weight = getattr(layer, weight_name)
        if weight.ndim < 2:
            raise ValueError(
                f"the weight `{weight_name}` has shape {weight.shape}, but should have at "
                "least two dimensions."
            )
        self.layer = layer
        self.weight_name = weight_name
        self.num_power_iterations = num_power_iterations
        self.eps = eps
        self.inference = inference
        matrix = weight.reshape(weight.shape[0], -1)
        u_key, v_key = jax.random.split(key)
        u = jax.random.normal(u_key, matrix.shape[:1], matrix.dtype)
        v = jax.random.normal(v_key, matrix.shape[1:], matrix.dtype)
        # As many as Equinox: a start from noise would scale the first outputs up.
        self.uv = State(self._iterated(matrix, u, v, 15), name="uv")

    def __call__(
        self, x: Array, *, key: Any = None, inference: bool | None = None
    ) -> Array:
        """Calls the layer with the normalized weight.

        **Arguments:**

        - `x`: passed on to the layer.
        - `key`: unused; for compatibility with Equinox's layers.
        - `inference`: overrides the layer's own flag.

        **Returns:** what the layer returns.
        """
        del key
        weight = getattr(self.layer, self.weight_name)
        matrix = weight.reshape(weight.shape[0], -1)
        u, v = self.uv.value
        if not (self.inference if inference is None else inference):
            fixed = lax.stop_gradient(matrix)
            u, v = self._iterated(fixed, u, v, self.num_power_iterations)
            self.uv.value = u, v
        sigma = jnp.einsum("i,ij,j->", u, matrix, v)
        layer = eqx.tree_at(
            lambda layer: getattr(layer, self.weight_name), self.layer, weight / sigma
        )
        return layer(x)  # type: ignore[operator]

    def _iterated(
        self, w: Array, u: Array, v: Array, times: int
    ) -> tuple[Array, Array]:
        for _ in range(times):
            u = w @ v
            u = u / jnp.maximum(self.eps, jnp.sqrt(jnp.sum(u**2)))
            v = w.T @ u
            v = v / jnp.maximum(self.eps, jnp.sqrt(jnp.sum(v**2)))
        return u, v
