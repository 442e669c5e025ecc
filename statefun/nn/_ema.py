"""`EMA`: an exponential moving average of Params."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu

from .._state.cell import Cell
from .._state.state import Param, State
from .._trace.transaction import transaction

T = TypeVar("T")


class EMA(eqx.Module, Generic[T]):
    """An exponential moving average of the Params of a tree.

    **Arguments:**

    - `tree`: a [`statefun.Param`][], a module, or any pytree with Params in it.
    - `decay`: the weight of the old average, between 0 and 1.
    - `dtype`: of the averages, if that of the Params is too coarse: the steps towards a
        `bfloat16` weight with `decay=0.999` would all be rounded away.

    **Attributes:**

    - `average`: the tree with other Params, which hold the averages, in place of its
        own; it is used like the tree. Other States (running statistics, an `Rng`) are
        shared with the tree itself. It starts as a copy.

    !!! example

        ```python
        import jax.numpy as jnp, statefun as sf

        w = sf.Param(jnp.zeros(3))
        ema = sf.nn.EMA(w, decay=0.9)
        w.value += 1
        ema.update()
        ema.average.value  # 0.1
        ```

    Source: [Polyak averaging](https://doi.org/10.1137/0330046).
    """

    tree: T
    average: T
    decay: float = eqx.field(static=True)

    def __init__(self, tree: T, decay: float, dtype: Any = None):
        if not 0 <= decay <= 1:
            raise ValueError(f"`decay` is {decay}, but should be between 0 and 1.")
        self.tree = tree
        self.decay = decay
        made: dict[Cell, State] = {}

        def convert(x: Any) -> Any:
            return (
                x if dtype is None or not eqx.is_inexact_array(x) else x.astype(dtype)
            )

        def copied(leaf: Any) -> Any:
            if not isinstance(leaf, Param):
                return leaf
            if leaf._cell not in made:
                made[leaf._cell] = type(leaf)(
                    jtu.tree_map(convert, leaf.value), name=leaf.name
                )
            return made[leaf._cell]

        self.average = jtu.tree_map(copied, tree)
        if not made:
            raise TypeError("EMA was given a tree without any Param in it.")

    def update(self) -> None:
        """Moves the averages towards the Params, all of them in one step.

        Integer arrays and everything static are copied as they are.
        """
        transaction(self._update)

    def _update(self) -> None:
        pairs = zip(
            jtu.tree_leaves(self.tree), jtu.tree_leaves(self.average), strict=True
        )
        done: set[Cell] = set()
        for new, average in pairs:
            if isinstance(new, Param) and new._cell not in done:
                done.add(new._cell)
                average.value = jtu.tree_map(self._mixed, average.value, new.value)

    def _mixed(self, old: Any, new: Any) -> Any:
        if not eqx.is_inexact_array(old):
            return new
        step = jnp.asarray(1 - self.decay, old.real.dtype)
        return old + step * (new.astype(old.dtype) - old)
