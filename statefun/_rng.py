"""Random keys that take care of themselves.

The value of an `Rng` is one key. Every draw splits it: one half stays, the other is
handed out. Nothing else is kept, so a compiled function has one input and one output for
it, and a checkpoint of the value is the stream.

Where a function is mapped, an `Rng` that its lanes share would hand the same key to all
of them. The twins therefore let every lane see a key of its own (`_in_lane`), and
advance the shared key once when the lanes are done (`_after_lanes`). A mapped axis of
size one is not mapped in this sense: its numbers are those of the plain function.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._errors import StateTypeError, StateValueError, message
from ._state.state import State
from ._state.structure import Structure


class Rng(State[jax.Array]):
    """A State that hands out random keys, each of them once.

    `rng()` returns a key that has not been used before, and `rng.split(n)` returns `n`
    of them. The same seed gives the same keys in eager mode, in `filter_jit`, in the
    iterations of `sf.scan` and in a `filter_vmap` over one element. In a `filter_vmap`
    or `shard_map` over several, every lane and every device draws its own, without
    being told to. An `Rng` that `state_axes` maps holds a key for each lane already,
    and is left alone.

    Underneath is a plain State whose value is a typed key (`jax.random.key`): saving
    `rng.value` and writing it back later resumes the stream.

    **Arguments:**

    - `seed_or_key`: an integer, or a typed key. An array of keys is for an `Rng` that
        `state_axes` or `state_specs` map; then each lane has its own.
    - `impl`: the generator that an integer seeds, as in `jax.random.key`.
    - `name`: as in [`statefun.State`][].

    **Raises:** `statefun.StateTypeError` if a key of the old kind
    (`jax.random.PRNGKey`), or anything else that is not a seed, is given.

    !!! example

        ```python
        import jax, jax.numpy as jnp, statefun as sf

        rng = sf.Rng(0)

        @sf.filter_jit
        def noisy(x):
            return x + jax.random.normal(rng(), x.shape)

        noisy(jnp.zeros(3))  # other numbers at each call
        sf.filter_vmap(noisy)(jnp.zeros((4, 3)))  # four rows, all different
        ```

    !!! info

        The number of draws in a mapped function doesn't matter to what is drawn after it:
        the shared key advances by one step, if any lane has drawn at all. For the same
        reason a value that a lane writes to a shared `Rng` ends with the lane.

        An `Rng` that is made inside a mapped function from an integer is the same in all
        lanes; make it from a key of the lane.
    """

    __slots__ = ()

    def __init__(
        self, seed_or_key: Any, *, impl: str | None = None, name: str | None = None
    ):
        super().__init__(_as_key(seed_or_key, impl), name=name)

    @property
    def value(self) -> jax.Array:
        """The key that the next draw splits. Don't use it for numbers of your own."""
        return State.value.fget(self)  # type: ignore[attr-defined]

    @value.setter
    def value(self, value: Any) -> None:
        State.value.fset(self, _as_key(value, None))  # type: ignore[attr-defined]

    def __call__(self) -> jax.Array:
        """A fresh key.

        **Returns:** a typed key of shape `()`.

        **Raises:** `statefun.StateValueError` if the `Rng` holds an array of keys and is
        used outside of the mapped function it is meant for.

        !!! example

            ```python
            import jax, statefun as sf

            rng = sf.Rng(0)
            jax.random.normal(rng(), (3,))
            ```
        """
        key = self.value
        if key.ndim:
            raise StateValueError(
                message(
                    f"a key was drawn from {self._cell.describe()}, which holds an array "
                    f"of keys of shape {key.shape}.",
                    "it holds a key for every lane of a mapped function, and there is no "
                    "such function around the draw.",
                    "`filter_vmap(f, state_axes=[(rng, 0)])`; or an `Rng` with one key, "
                    "of which every lane is given its own anyway.",
                )
            )
        kept, fresh = jax.random.split(key)
        self.value = kept
        return fresh

    def split(self, num: int | Sequence[int] = 2) -> jax.Array:
        """Fresh keys.

        **Arguments:**

        - `num`: how many, or the shape of the array of keys.

        **Returns:** an array of typed keys of shape `(num,)`, or of the shape given.

        !!! example

            ```python
            import statefun as sf

            weights, biases = sf.Rng(0).split(2)
            ```
        """
        return jax.random.split(self(), num if isinstance(num, int) else tuple(num))

    @staticmethod
    def _in_lane(flat: Any, structure: Structure, index: Any, size: int) -> Any:  # type: ignore[override]
        """What lane `index` of `size` sees in place of the shared key."""
        return _fold_in(flat, index)

    @staticmethod
    def _after_lanes(flat: Any, structure: Structure, size: int) -> Any:  # type: ignore[override]
        """The shared key when the lanes are done: one that none of them has seen."""
        return _fold_in(flat, size)


def _fold_in(keys: jax.Array, number: Any) -> jax.Array:
    """`jax.random.fold_in` for every key of an array: those of a stack of layers."""
    fold_in = jax.random.fold_in
    for _ in range(keys.ndim):
        fold_in = jax.vmap(fold_in, in_axes=(0, None))
    return fold_in(keys, number)


def _as_key(given: Any, impl: str | None) -> jax.Array:
    dtype = getattr(given, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return given
    if isinstance(given, int | np.integer) and not isinstance(given, bool | np.bool_):
        return jax.random.key(given, impl=impl)
    if dtype is not None and jnp.issubdtype(dtype, jnp.integer):
        if given.shape == ():  # type: ignore[union-attr]
            return jax.random.key(given, impl=impl)
        raise StateTypeError(
            message(
                f"a key of the old kind (an array {dtype}{list(jnp.shape(given))}) was "
                "given to Rng.",
                "such a key is an array like any other: nothing keeps it from being "
                "added to, averaged, or used twice.",
                "`jax.random.key(seed)` in place of `jax.random.PRNGKey(seed)`; "
                "`jax.random.wrap_key_data(old)` turns an old key into a new one.",
            )
        )
    raise StateTypeError(
        message(
            f"Rng was given {given!r}, which is neither a seed nor a key.",
            "the stream of keys starts from an integer or from a key.",
            "`sf.Rng(0)` or `sf.Rng(jax.random.key(0))`.",
        )
    )
