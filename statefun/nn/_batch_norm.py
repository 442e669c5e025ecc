"""`BatchNorm`, with its running statistics in States."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from .._errors import message
from .._state.state import State


class BatchNorm(eqx.Module):
    """As `equinox.nn.BatchNorm`, with the running statistics in States.

    Computes mean and variance of every channel over the batch and all spatial axes, and
    normalizes with them; then applies an affine transformation to each channel. In
    inference mode the running statistics are used in place of those of the batch, and
    nothing is written.

    The batch is an axis of the array, or the mapped axes that `axis_name` names, or both:

    - `BatchNorm(3)` takes arrays of shape `(batch, 3, *spatial)`. On an array that is
      sharded over devices, inside `sf.filter_jit`, the statistics are those of the whole.
    - `BatchNorm(3, axis_name="batch")` takes `(3, *spatial)` inside
      `sf.filter_vmap(…, axis_name="batch")`.
    - `BatchNorm(3, axis_name="data", batch_axis=0)` takes `(batch, 3, *spatial)` on every
      device of a `sf.shard_map` over `"data"`.

    **Arguments:**

    - `input_size`: the number of channels.
    - `axis_name`: the name, or a sequence of names, of mapped axes that are part of the
        batch. None: the batch is `batch_axis`.
    - `eps`: added to the variance.
    - `channelwise_affine`: whether there are a weight and a bias for every channel.
    - `momentum`: the weight of the old statistics in the running average, between 0 and
        1.
    - `inference`: whether to use the running statistics; see
        [`statefun.nn.inference_mode`][].
    - `dtype`: of weight, bias and statistics; JAX's default float if None.
    - `mode`: in `"batch"` training uses the statistics of the batch. In `"ema"` it uses
        the running statistics, those of this batch included.
    - `batch_axis`: which axis of the array is the batch; 0 if there is no `axis_name`,
        and none otherwise. The channels are the first of the other axes.

    **Attributes:**

    - `running_mean`, `running_var`: States of shape `(input_size,)`, zeros and ones in
        an untrained layer. Inference uses them as they are: to load the statistics of a
        trained network, write them.
    - `count`: a State, the number of batches that the statistics are an average of. It
        stays 0 where training goes on from statistics that were written.

    !!! example

        ```python
        import jax.numpy as jnp, statefun as sf

        norm = sf.nn.BatchNorm(3)
        norm(jnp.arange(12.0).reshape(4, 3))
        evaluate = sf.nn.inference_mode(norm)  # shares the statistics
        evaluate(jnp.ones((1, 3)))
        ```

    !!! info

        `mode="batch"` weighs the first batches more, as Adam does, so that the averages
        are unbiased from the first batch on. Equinox keeps averages that are biased, and
        divides them by `1 - momentum**count` where it uses them; its average of the
        variance starts at one, so that after `n` batches it has `momentum**n` more,
        before the division.

        Statistics that were written to an untrained layer are not forgotten in this way:
        every batch moves them by `1 - momentum`.

    Source: [Batch Normalization](https://arxiv.org/abs/1502.03167);
    `equinox.nn.BatchNorm`.
    """

    weight: Float[Array, input_size] | None
    bias: Float[Array, input_size] | None
    running_mean: State[Float[Array, input_size]]
    running_var: State[Float[Array, input_size]]
    count: State[Int[Array, ""]]
    inference: bool
    axis_name: tuple[Hashable, ...] = eqx.field(static=True)
    input_size: int = eqx.field(static=True)
    eps: float = eqx.field(static=True)
    channelwise_affine: bool = eqx.field(static=True)
    momentum: float = eqx.field(static=True)
    mode: Literal["ema", "batch"] = eqx.field(static=True)
    batch_axis: int | None = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        axis_name: Hashable | Sequence[Hashable] = None,
        eps: float = 1e-5,
        channelwise_affine: bool = True,
        momentum: float = 0.99,
        inference: bool = False,
        dtype: Any = None,
        mode: Literal["ema", "batch"] = "batch",
        *,
        batch_axis: int | None = None,
    ):
        if mode not in ("ema", "batch"):
            raise ValueError(f"`mode` is {mode!r}, but should be 'batch' or 'ema'.")
        dtype = jnp.zeros(()).dtype if dtype is None else dtype
        self.weight = jnp.ones(input_size, dtype) if channelwise_affine else None
        self.bias = jnp.zeros(input_size, dtype) if channelwise_affine else None
        self.running_mean = State(jnp.zeros(input_size, dtype), name="running_mean")
        self.running_var = State(jnp.ones(input_size, dtype), name="running_var")
        self.count = State(jnp.array(0, jnp.int32), name="count")
        self.inference = inference
        self.axis_name = _names(axis_name)
        self.input_size = input_size
        self.eps = eps
        self.channelwise_affine = channelwise_affine
        self.momentum = momentum
        self.mode = mode
        self.batch_axis = 0 if not self.axis_name and batch_axis is None else batch_axis

    def __call__(
        self, x: Array, *, key: Any = None, inference: bool | None = None
    ) -> Array:
        """Normalizes the input.

        **Arguments:**

        - `x`: of shape `(input_size, *spatial)`, with the batch axis if there is one.
        - `key`: unused; for compatibility with Equinox's layers.
        - `inference`: overrides the layer's own flag.

        **Returns:** an array of the shape and dtype of `x`.

        **Raises:** `NameError` if no axis of that name is mapped. `ValueError` if `x`
        has another number of channels, or in training if there is only one value for
        each channel (a batch of one without spatial axes), which has no variance.
        """
        del key
        axis = self.batch_axis
        y = x[None] if axis is None else jnp.moveaxis(x, axis, 0)
        self._check_channels(x, y)
        y = y.astype(self.running_mean.value.dtype)
        if self.inference if inference is None else inference:
            mean, var = self.statistics()
        else:
            mean, var = self._statistics_of(y)
            self._record(mean, var)
            if self.mode == "ema":
                mean, var = self.running_mean.value, self.running_var.value
        y = (y - self._per_channel(mean, y)) / jnp.sqrt(
            self._per_channel(var, y) + self.eps
        )
        if self.weight is not None and self.bias is not None:
            y = y * self._per_channel(self.weight, y) + self._per_channel(self.bias, y)
        y = y.astype(x.dtype)
        return y[0] if axis is None else jnp.moveaxis(y, 0, axis)

    def statistics(self) -> tuple[Array, Array]:
        """The mean and the variance that inference uses, each of shape `(input_size,)`.

        !!! example

            ```python
            import statefun as sf

            sf.nn.BatchNorm(3).statistics()  # zeros and ones: nothing seen yet
            ```
        """
        return self.running_mean.value, self.running_var.value

    def _per_channel(self, v: Array, y: Array) -> Array:
        return v.reshape(1, -1, *(1,) * (y.ndim - 2))

    def _statistics_of(self, y: Array) -> tuple[Array, Array]:
        axes = (0, *range(2, y.ndim))
        values = math.prod(y.shape[i] for i in axes) * self._mapped_size()
        if values <= 1:
            raise ValueError(
                message(
                    f"BatchNorm was given {'a batch of one' if values else 'no batch'} "
                    f"in training, and so {'one' if values else 'no'} value for each "
                    "channel.",
                    "the variance of one value is zero: the output would be the bias, "
                    "whatever the input, and no gradient would flow.",
                    "use a larger batch (drop the last, short one), or "
                    "`sf.nn.inference_mode(model)` to normalize with the running "
                    "statistics.",
                )
            )
        mean = self._over_lanes(jnp.mean(y, axes))
        centered = y - self._per_channel(mean, y)
        var = self._over_lanes(jnp.mean((centered * jnp.conj(centered)).real, axes))
        return mean, var

    def _over_lanes(self, v: Array) -> Array:
        # One after the other: vmap and shard_map track what varies in different ways,
        # and pmean takes only axes of one of them at a time.
        for name in self.axis_name:
            try:
                v = lax.pmean(v, name)
            except AssertionError as error:  # JAX doesn't say more
                raise NotImplementedError(
                    message(
                        f"JAX can't take the mean over the mapped axis {name!r} here.",
                        "a mean over an axis of `filter_vmap` inside of a `shard_map` "
                        "fails in JAX while `shard_map` keeps track of what varies.",
                        "`sf.shard_map(…, check_vma=False)`; or give each device its part "
                        "of the batch as an array: `BatchNorm(channels, "
                        "axis_name=device_axis, batch_axis=0)`.",
                    )
                ) from error
        return v

    def _mapped_size(self) -> int:
        try:
            return math.prod(lax.axis_size(name) for name in self.axis_name)
        except NameError as error:
            raise NameError(
                message(
                    f"BatchNorm was called outside of its mapped axes {self.axis_name}: "
                    f"{error}.",
                    "the mean is taken over the lanes of these axes.",
                    "`sf.filter_vmap(f, axis_name=…)` with the name that the layer was "
                    "given, or `BatchNorm(channels)`, without a name, for an array that "
                    "has the batch as its first axis.",
                )
            ) from error

    def _record(self, mean: Array, var: Array) -> None:
        mean, var = (
            lax.stop_gradient((mean, var)) if self.mode == "batch" else (mean, var)
        )
        count, old_mean, old_var = (
            self.count.value,
            self.running_mean.value,
            self.running_var.value,
        )
        # The layer has seen nothing, unless its statistics have been written.
        untrained = (count == 0) & jnp.all(old_mean == 0) & jnp.all(old_var == 1)
        share = jnp.where(
            untrained, 1.0, jnp.where(count == 0, 1 - self.momentum, self._share(count))
        )

        def average(old: Array, new: Array) -> Array:
            weight = share.astype(old.dtype)
            return (1 - weight) * old + weight * new

        self.running_mean.value = average(old_mean, mean)
        self.running_var.value = average(old_var, var)
        self.count.value = jnp.where(untrained | (count > 0), count + 1, count)

    def _share(self, count: Array) -> Array | float:
        """The weight of a batch in the average over it and the `count` batches before
        it."""
        if self.mode == "ema" or self.momentum in (0, 1):
            return 1 - self.momentum
        # `1 - momentum**(count + 1)`, without the rounding error of a momentum near
        # one.
        known = -jnp.expm1((count + 1).astype(jnp.float32) * math.log(self.momentum))
        return (1 - self.momentum) / known

    def _check_channels(self, x: Array, y: Array) -> None:
        if y.ndim < 2 or y.shape[1] != self.input_size:
            has = "(batch, " if self.batch_axis == 0 else "("
            raise ValueError(
                f"BatchNorm({self.input_size}) was given an array of shape {x.shape}; it "
                f"takes {has}{self.input_size}, *spatial)"
                + (
                    "."
                    if self.batch_axis in (0, None)
                    else f" with the batch at axis {self.batch_axis}."
                )
            )


def _names(axis_name: Any) -> tuple[Hashable, ...]:
    if axis_name is None:
        return ()
    if isinstance(axis_name, list | tuple):
        return tuple(axis_name)
    return (axis_name,)
