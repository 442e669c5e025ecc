"""`filter_custom_vjp`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.tree_util as jtu
from jax import lax

from .._state import access
from .._state.cell import Cell, Value, Values
from .._trace.result import unpack
from ._custom import CustomDerivative, Touched, ahead, too_late
from ._twin import Updates, run_pure, split_arrays, values_of


class filter_custom_vjp(CustomDerivative):
    """As `equinox.filter_custom_vjp`, for functions that read and write States.

    States that the function or its rules read are inputs that are not differentiated;
    States that the forward rule writes are written when it runs in place of the function.
    The backward rule sees States as the forward rule left them, and can't write any.

    **Arguments:**

    - `fn`: the function; its first argument is differentiated.

    **Raises:** `statefun.StateTraceError` when one differentiates with respect to a State
    that is read in there, and when the backward rule writes one.

    !!! example

        ```python
        import jax.numpy as jnp, statefun as sf

        scale = sf.State(jnp.array(2.0))

        @sf.filter_custom_vjp
        def f(x):
            return jnp.sin(x)

        @f.def_fwd
        def fwd(perturbed, x):
            return jnp.sin(x), None

        @f.def_bwd
        def bwd(residuals, grad, perturbed, x):
            return scale.value * grad * jnp.cos(x)

        sf.filter_grad(f)(jnp.array(0.0))
        ```
    """

    def __init__(self, fn: Callable[..., Any]):
        super().__init__(fn)
        self.fn_fwd: Callable[..., Any] | None = None
        self.fn_bwd: Callable[..., Any] | None = None

    def def_fwd(self, fn_fwd: Callable[..., Any]) -> Callable[..., Any]:
        """Sets the forward rule: `(perturbed, vjp_arg, *args) -> (out, residuals)`."""
        self.fn_fwd = fn_fwd
        return fn_fwd

    def def_bwd(self, fn_bwd: Callable[..., Any]) -> Callable[..., Any]:
        """Sets the backward rule:
        `(residuals, grad_out, perturbed, vjp_arg, *args) -> grad_vjp_arg`."""
        self.fn_bwd = fn_bwd
        return fn_bwd

    # Deprecated in Equinox: it says so, and calls `def_fwd` and `def_bwd`.
    defvjp: Any = eqx.filter_custom_vjp.defvjp

    def __call__(self, vjp_arg: Any, /, *args: Any, **kwargs: Any) -> Any:
        if self.fn_fwd is None or self.fn_bwd is None:
            raise RuntimeError(f"`def_fwd` or `def_bwd` not yet called for {self.name}")
        return self.run((vjp_arg, *args), kwargs)

    def run_rule(self, args: tuple, kwargs: dict) -> Any:
        return self._forward(jtu.tree_map(eqx.is_inexact_array, args[0]), args, kwargs)

    def _forward(self, perturbed: Any, args: tuple, kwargs: dict) -> Any:
        """The forward rule: the result, and the residuals with what States hold."""
        assert self.fn_fwd is not None
        out, residuals = self.fn_fwd(perturbed, *args, **kwargs)
        arrays, build = split_arrays((out, residuals, args, kwargs))

        def back(*arrays: Any) -> Any:
            out, residuals, args, kwargs = build(arrays)
            grad = eqx.filter(out, eqx.is_inexact_array)
            return self._backward(residuals, grad, perturbed, args, kwargs)

        program = ahead(self, "backward", back, arrays)
        frame = access.local.frame
        assert frame is not None, "a rule runs under a frame"
        cells = frame.order if program is None else program.reads
        # New States travel with the residuals.
        values = values_of(c for c in cells if c not in frame.created)
        return out, (residuals, values)

    def _backward(
        self, residuals: Any, grad: Any, perturbed: Any, args: tuple, kwargs: dict
    ) -> Any:
        assert self.fn_bwd is not None
        return self.fn_bwd(residuals, grad, perturbed, *args, **kwargs)

    def attempt(
        self, touched: Touched, fn: Callable[..., Any], args: tuple, kwargs: dict
    ) -> tuple[Any, Updates]:
        def pure(vjp_arg: Any, /, values: Values, args: tuple, kwargs: dict) -> Any:
            return touched.run(lambda: fn(vjp_arg, *args, **kwargs), values)

        def pure_fwd(
            perturbed: Any, vjp_arg: Any, /, values: Values, args: tuple, kwargs: dict
        ) -> Any:
            (out, residuals), written = touched.run(
                lambda: self._forward(perturbed, (vjp_arg, *args), kwargs), values
            )
            return (out, written), residuals

        def pure_bwd(
            residuals: Any,
            grad: Any,
            perturbed: Any,
            vjp_arg: Any,
            /,
            values: Values,
            args: tuple,
            kwargs: dict,
        ) -> Any:
            (residuals, saved), (grad, _) = residuals, grad
            return _backward_with(
                self.name,
                saved,
                lambda: self._backward(
                    unpack(residuals), grad, perturbed, (vjp_arg, *args), kwargs
                ),
            )

        custom = eqx.filter_custom_vjp(pure)
        custom.def_fwd(pure_fwd)
        custom.def_bwd(pure_bwd)
        vjp_arg, *rest = args
        out, written = custom(vjp_arg, touched.values(), tuple(rest), kwargs)
        # JAX takes every result of a custom_vjp for differentiated, and the backward rule
        # gets no cotangent of these.
        return out, jtu.tree_map(lax.stop_gradient, written)


def _backward_with(name: str, saved: Values, run: Callable[[], Any]) -> Any:
    """Runs the backward rule, in which States hold what the forward rule has left."""

    def unknown(cell: Cell, _: Value) -> Value:
        raise too_late(name, cell, "read")

    out, written = run_pure(run, saved, view=unknown, sealed=True, ends=True)
    for cell in written.values:
        raise too_late(name, cell, "wrote")
    return out
