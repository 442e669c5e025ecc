"""`filter_custom_jvp`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.tree_util as jtu

from .._state.cell import Values
from ._custom import CustomDerivative, Touched
from ._twin import Updates


class filter_custom_jvp(CustomDerivative):
    """As `equinox.filter_custom_jvp`, for functions that read and write States.

    States that the function or its rule reads are inputs that are not differentiated;
    States that the rule writes are written when it runs in place of the function.

    **Arguments:**

    - `fn`: the function. Returns arrays.

    **Raises:** `statefun.StateTraceError` when one differentiates with respect to a State
    that is read in there.

    !!! example

        ```python
        import jax.numpy as jnp, statefun as sf

        calls = sf.State(jnp.array(0))

        @sf.filter_custom_jvp
        def clip(x):
            calls.value += 1
            return jnp.clip(x, -1, 1)

        @clip.def_jvp
        def clip_jvp(primals, tangents):
            return clip(*primals), tangents[0]  # straight through

        sf.filter_grad(clip)(jnp.array(3.0))
        ```
    """

    def __init__(self, fn: Callable[..., Any]):
        super().__init__(fn)
        self._rule: Callable[..., Any] | None = None

    def def_jvp(self, fn_jvp: Callable[..., Any]) -> Callable[..., Any]:
        """Sets the rule: `(primals, tangents, **kwargs) -> (out, tangent_out)`.

        A tangent is None where nothing is differentiated.
        """
        self._rule = fn_jvp
        return fn_jvp

    # Deprecated in Equinox, or not implemented: they say so, and call `def_jvp`.
    defjvp: Any = eqx.filter_custom_jvp.defjvp
    defjvps: Any = eqx.filter_custom_jvp.defjvps

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        if self._rule is None:
            raise AttributeError(f"No JVP defined for {self.name}: use `def_jvp`.")
        return self.run(args, kwargs)

    def run_rule(self, args: tuple, kwargs: dict) -> Any:
        return self._apply(args, eqx.filter(args, eqx.is_inexact_array), kwargs)

    def _apply(self, args: tuple, tangents: tuple, kwargs: dict) -> Any:
        assert self._rule is not None
        return self._rule(args, tangents, **kwargs)

    def attempt(
        self, touched: Touched, fn: Callable[..., Any], args: tuple, kwargs: dict
    ) -> tuple[Any, Updates]:
        def pure(values: Values, /, *args: Any, **kwargs: Any) -> Any:
            return touched.run(lambda: fn(*args, **kwargs), values)

        def pure_jvp(primals: tuple, tangents: tuple, **kwargs: Any) -> Any:
            (values, *args), (_, *t_args) = primals, tangents
            (out, t_out), written = touched.run(
                lambda: self._apply(tuple(args), tuple(t_args), kwargs), values
            )
            return (out, written), (t_out, jtu.tree_map(lambda _: None, written))

        custom = eqx.filter_custom_jvp(pure)
        custom.def_jvp(pure_jvp)
        return custom(touched.values(), *args, **kwargs)
