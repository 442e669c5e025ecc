"""`Mean` and `Accuracy`."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float

from .._errors import message
from .._state.state import State
from .._trace.transaction import transaction


class Mean(eqx.Module):
    """The mean of all values so far, optionally weighted.

    **Arguments:**

    - `axis_name`: in a `filter_vmap` or `shard_map`, the name (or a tuple of names) of
        mapped axes to sum over as well.

    **Attributes:**

    - `total`, `weight`: States, the sum of the values times their weights and the sum of
        the weights, `float32` scalars.

    !!! example

        ```python
        import jax.numpy as jnp, statefun as sf

        loss = sf.metrics.Mean()
        loss.update(jnp.array([1.0, 3.0]))
        loss.compute()  # 2.0
        ```
    """

    total: State[Float[Array, ""]]
    weight: State[Float[Array, ""]]
    axis_name: Any = eqx.field(static=True)

    def __init__(self, axis_name: Hashable = None):
        self.total = State(jnp.zeros((), jnp.float32), name="total")
        self.weight = State(jnp.zeros((), jnp.float32), name="weight")
        self.axis_name = axis_name

    def update(self, values: ArrayLike, weights: ArrayLike | None = None) -> None:
        """Adds values to the mean.

        **Arguments:**

        - `values`: of any shape.
        - `weights`: of a shape that broadcasts to it; 1 if not given. A mask of
            booleans excludes values, even NaN.

        **Raises:** `ValueError` if `weights` doesn't broadcast to the shape of `values`.
        `NameError` if no axis of the metric's name is mapped.

        !!! example

            ```python
            import jax.numpy as jnp, statefun as sf

            loss = sf.metrics.Mean()
            loss.update(jnp.array([1.0, 3.0, 0.0]), jnp.array([True, True, False]))
            ```
        """
        values = lax.stop_gradient(jnp.asarray(values)).astype(jnp.float32)
        given = jnp.ones((), jnp.float32) if weights is None else weights
        given = lax.stop_gradient(jnp.asarray(given)).astype(jnp.float32)
        given = jnp.broadcast_to(given, values.shape)
        # 0 * nan is nan.
        total = jnp.sum(jnp.where(given == 0, jnp.zeros_like(values), values * given))
        weight = jnp.sum(given)
        if self.axis_name is not None:
            total, weight = self._over_lanes((total, weight))

        def add() -> None:
            self.total.value += total
            self.weight.value += weight

        transaction(add)

    def _over_lanes(self, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        try:
            return lax.psum(sums, self.axis_name)
        except NameError as error:
            raise NameError(
                message(
                    f"a metric was updated outside of its mapped axes {self.axis_name!r}: "
                    f"{error}.",
                    "it sums over the lanes of these axes.",
                    "`sf.filter_vmap(f, axis_name=…)` with the name that the metric was "
                    "given, or a metric without a name.",
                )
            ) from error

    def compute(self) -> Float[Array, ""]:
        """The mean so far; NaN without values, or if all have weight zero."""
        return self.total.value / self.weight.value

    def reset(self) -> None:
        """Resets the sums to zero."""

        def clear() -> None:
            self.total.value = jnp.zeros_like(self.total.value)
            self.weight.value = jnp.zeros_like(self.weight.value)

        transaction(clear)


class Accuracy(eqx.Module):
    """The fraction of correct predictions.

    **Arguments:**

    - `axis_name`: as of [`statefun.metrics.Mean`][].

    **Attributes:**

    - `mean`: the [`statefun.metrics.Mean`][] underneath.

    !!! example

        ```python
        import jax.numpy as jnp, statefun as sf

        accuracy = sf.metrics.Accuracy()
        logits = jnp.array([[2.0, 1.0], [0.0, 5.0]])
        accuracy.update(logits, jnp.array([0, 0]))
        accuracy.compute()  # 0.5
        ```
    """

    mean: Mean

    def __init__(self, axis_name: Hashable = None):
        self.mean = Mean(axis_name)

    def update(
        self, predictions: Array, labels: Array, weights: ArrayLike | None = None
    ) -> None:
        """Adds predictions to the accuracy.

        **Arguments:**

        - `predictions`: logits or probabilities of shape `(*shape, classes)`, of which the
            largest counts, or classes: integers of shape `shape`.
        - `labels`: integers of shape `shape`.
        - `weights`: as of `Mean.update`.

        **Raises:** `ValueError` if the shapes don't match.
        """
        if (
            predictions.shape[:-1] == labels.shape
            and predictions.ndim == labels.ndim + 1
        ):
            predictions = jnp.argmax(predictions, axis=-1)
        elif predictions.shape != labels.shape:
            raise ValueError(
                f"Accuracy was given predictions of shape {predictions.shape} and labels "
                f"of shape {labels.shape}; predictions have the shape of the labels, with "
                "an axis for the classes if they are logits."
            )
        elif jnp.issubdtype(predictions.dtype, jnp.inexact):
            raise ValueError(
                f"Accuracy was given predictions of dtype {predictions.dtype} in the shape "
                "of the labels; classes are integers. For two classes with one logit each, "
                "pass `logits > 0` as integers."
            )
        self.mean.update(predictions == labels.astype(predictions.dtype), weights)

    def compute(self) -> Float[Array, ""]:
        """The fraction so far; NaN if there was no prediction."""
        return self.mean.compute()

    def reset(self) -> None:
        """Resets the sums to zero."""
        self.mean.reset()
