"""`Recurrent`: a cell that keeps its hidden state."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool

from .._errors import message
from .._state.state import State


class Recurrent(eqx.Module):
    """A recurrent cell that keeps its hidden state between calls.

    **Arguments:**

    - `cell`: an `equinox.nn.GRUCell` or `LSTMCell`, or anything that is called as
        `cell(input, hidden)` and returns the new hidden state.
    - `batch_shape`: the axes of a batch, in front of those of the input; every example
        then has a hidden state of its own. (Under `filter_vmap`, leave it out and map
        the State instead: `state_axes=[(layer.hidden, 0)]`.)
    - `hidden`: the initial hidden state of one example. By default zeros, and for an
        `LSTMCell` a pair of them.

    **Attributes:**

    - `hidden`: a State, the hidden state.

    !!! example

        ```python
        import equinox as eqx, jax, jax.numpy as jnp, statefun as sf

        cell = eqx.nn.GRUCell(2, 4, key=jax.random.key(0))
        layer = sf.nn.Recurrent(cell)

        @sf.filter_jit
        def read(xs):
            return sf.scan(lambda _, x: (None, layer(x)), None, xs)[1]

        read(jnp.ones((5, 2))).shape  # (5, 4); the next call goes on from here
        layer.reset()
        ```

    !!! info

        Gradients flow through the hidden state inside of one differentiated function,
        and not from one call of it to the next (truncated backpropagation).
    """

    cell: Any
    hidden: State
    initial: Any
    batch_shape: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        cell: Any,
        batch_shape: int | tuple[int, ...] = (),
        *,
        hidden: Any = None,
    ):
        self.cell = cell
        self.batch_shape = (
            (batch_shape,) if isinstance(batch_shape, int) else tuple(batch_shape)
        )
        self.initial = _zeros(cell) if hidden is None else hidden
        self.hidden = State(self._start(), name="hidden")

    def __call__(self, x: Array, *, key: Any = None) -> Array:
        """One step.

        **Arguments:**

        - `x`: the input, of shape `(*batch_shape, input_size)`.
        - `key`: unused; for compatibility with Equinox's layers.

        **Returns:** the new hidden state; if that is a tuple (`LSTMCell`), its first
        part.

        **Raises:** `ValueError` if `x` has another batch shape.
        """
        del key
        n = len(self.batch_shape)
        if x.shape[:n] != self.batch_shape or x.ndim != n + 1:
            raise ValueError(
                message(
                    f"Recurrent was given an input of shape {x.shape}, but takes "
                    f"({', '.join(map(str, (*self.batch_shape, 'input_size')))}).",
                    "every example of the batch has a hidden state of its own, and a "
                    "sequence is given one element after the other.",
                    "`Recurrent(cell, batch_shape=…)`; `sf.scan` over a sequence.",
                )
            )
        step = self.cell
        for _ in range(n):
            step = jax.vmap(step)
        self.hidden.value = step(x, self.hidden.value)
        new = self.hidden.value
        return new[0] if isinstance(new, tuple) else new

    def reset(self, where: Bool[Array, ...] | None = None) -> None:
        """Resets the hidden state to the initial one.

        **Arguments:**

        - `where`: booleans of shape `batch_shape`: resets only these examples.

        !!! example

            ```python
            import equinox as eqx, jax, jax.numpy as jnp, statefun as sf

            cell = eqx.nn.LSTMCell(2, 4, key=jax.random.key(0))
            layer = sf.nn.Recurrent(cell, batch_shape=3)
            layer(jnp.ones((3, 2)))
            layer.reset(jnp.array([True, False, False]))
            ```
        """
        start = self._start()
        if where is not None:

            def choose(new: Array, old: Array) -> Array:
                mask = where.reshape(where.shape + (1,) * (old.ndim - where.ndim))
                return jnp.where(mask, new, old)

            start = jtu.tree_map(choose, start, self.hidden.value)
        self.hidden.value = start

    def _start(self) -> Any:
        return jtu.tree_map(
            lambda x: jnp.broadcast_to(x, self.batch_shape + x.shape), self.initial
        )


def _zeros(cell: Any) -> Any:
    if not hasattr(cell, "hidden_size"):
        raise ValueError(
            f"{type(cell).__name__} does not say its `hidden_size`; give `hidden`, what "
            "it starts from."
        )
    weights = [x for x in jtu.tree_leaves(cell) if eqx.is_inexact_array(x)]
    zeros = jnp.zeros(cell.hidden_size, weights[0].dtype if weights else None)
    return (zeros, zeros) if isinstance(cell, eqx.nn.LSTMCell) else zeros
