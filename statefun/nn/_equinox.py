"""Models that thread `equinox.nn.State`, as modules that are just called."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax.tree_util as jtu

from .._errors import message
from .._state.state import State


class FromEquinox(eqx.Module):
    """A model that threads `equinox.nn.State`, called without it: see `from_equinox`.

    **Attributes:**

    - `model`: the Equinox model.
    - `state`: a State, whose value is the `equinox.nn.State`.
    """

    model: Any
    state: State[eqx.nn.State]
    state_argname: str | None = eqx.field(static=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model.

        **Arguments:** those of the model, without its state.

        **Returns:** what the model returns, without its state.

        **Raises:** `TypeError` if the model doesn't return its state.
        """
        # A copy, because Equinox invalidates the object that it is given.
        given = jtu.tree_map(lambda x: x, self.state.value)
        before = jtu.tree_leaves(given)
        if self.state_argname is None:
            out = self.model(*args, given, **kwargs)
        else:
            out = self.model(*args, **{self.state_argname: given}, **kwargs)
        if not isinstance(out, tuple) or not isinstance(out[-1], eqx.nn.State):
            raise TypeError(
                message(
                    f"{type(self.model).__name__} did not return its state.",
                    "a model that threads `equinox.nn.State` returns a tuple with the new "
                    "state as its last item.",
                    "return `(out, state)` from the model. A model that needs no state "
                    "needs no `from_equinox`.",
                )
            )
        *rest, new = out
        after = jtu.tree_leaves(new)
        # Nothing is written in inference mode, where the state comes back as it was.
        if any(a is not b for a, b in zip(before, after, strict=True)):
            self.state.value = new
        return rest[0] if len(rest) == 1 else tuple(rest)


def from_equinox(
    model: Any, state: eqx.nn.State, *, state_argname: str | None = None
) -> FromEquinox:
    """Turns a model that threads `equinox.nn.State` into a module that is just called.

    `module(x)` does `out, state = model(x, state)` and keeps the state in a State. All
    the numbers are those of Equinox.

    **Arguments:**

    - `model`, `state`: as `equinox.nn.make_with_state` returns them. Neither is changed,
        and two modules made of the same pair have a state each.
    - `state_argname`: the name of the model's state argument, if it has to be passed by
        keyword. By default it is the last positional argument.

    **Returns:** a [`statefun.nn.FromEquinox`][] module. Its arrays are the model's
    parameters: put it in a `Param` to train it.

    **Raises:** `TypeError` if `state` is not an `equinox.nn.State`.

    !!! example

        ```python
        import equinox as eqx, jax.numpy as jnp, statefun as sf

        norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
            3, axis_name="batch", mode="batch"
        )
        norm = sf.nn.from_equinox(norm, state)
        sf.filter_vmap(norm, axis_name="batch")(jnp.ones((8, 3)))
        model, state = sf.nn.to_equinox(norm)
        ```
    """
    if not isinstance(state, eqx.nn.State):
        raise TypeError(
            f"`state` is a {type(state).__name__}, but should be an `equinox.nn.State`: "
            "`model, state = equinox.nn.make_with_state(Model)(…)`."
        )
    state = jtu.tree_map(lambda x: x, state)
    return FromEquinox(model, State(state, name="state"), state_argname)


def to_equinox(module: Any) -> tuple[Any, eqx.nn.State]:
    """Returns the Equinox model and its state, as they are now.

    **Arguments:**

    - `module`: what `from_equinox` returned, or a State (a `Param`) that holds it.

    **Returns:** `(model, state)`, to be called as `model(x, state)`, saved with
    `equinox.tree_serialise_leaves`, or shared. What is trained later doesn't change them.

    **Raises:** `TypeError` for anything else.

    !!! example

        ```python
        import equinox as eqx, jax.numpy as jnp, statefun as sf

        pair = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", mode="ema")
        module = sf.Param(sf.nn.from_equinox(*pair))
        model, state = sf.nn.to_equinox(module)
        ```
    """
    if hasattr(module, "value"):
        module = module.value
    if not isinstance(module, FromEquinox):
        raise TypeError(
            message(
                f"`to_equinox` was given a {type(module).__name__}.",
                "there is an Equinox state to return only for what `from_equinox` made.",
                "pass that module, or the Param that holds it. `sf.freeze(tree)` makes "
                "an ordinary pytree of any other.",
            )
        )
    return module.model, jtu.tree_map(lambda x: x, module.state.value)
