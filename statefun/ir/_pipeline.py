"""The five passes in sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from . import _algebra, _constant_fold, _copies, _cse
from ._dce import Dce
from ._jaxpr import AnyJaxpr, ClosedJaxpr
from ._walk import Walk

# Each entry makes a pass that remembers what it has done, for one optimization.
_PASSES: dict[str, Callable[[], Callable[[AnyJaxpr], AnyJaxpr]]] = {
    "constant_fold": lambda: Walk(_constant_fold.make_rewrite()),
    "algebraic_simplification": lambda: Walk(_algebra.rewrite),
    "copy_propagation": lambda: Walk(_copies.rewrite),
    "cse": lambda: Walk(_cse.make_rewrite()),
    "dce": Dce,
}

OPTIMIZATIONS: tuple[str, ...] = tuple(_PASSES)


def normalize_optimizations(spec: str | Sequence[str] | None) -> tuple[str, ...]:
    """The names of optimizations that `spec` asks for.

    **Arguments:**

    - `spec`: None for no optimization, a name, or names in the order in which they run.

    **Returns:** the names as a tuple, in the order given.

    **Raises:** `ValueError` for a name that is not in `OPTIMIZATIONS`; `TypeError` for
    anything but a name.

    !!! example

        ```python
        from statefun.ir import normalize_optimizations

        assert normalize_optimizations("cse") == ("cse",)
        assert normalize_optimizations(["dce", "cse"]) == ("dce", "cse")
        assert normalize_optimizations(None) == ()
        ```
    """
    names = () if spec is None else (spec,) if isinstance(spec, str) else tuple(spec)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(
                f"An optimization is given by its name, not by {name!r}.\n"
                f"Known: {', '.join(OPTIMIZATIONS)}."
            )
        if name not in _PASSES:
            raise ValueError(
                f"Unknown optimization {name!r}.\nKnown: {', '.join(OPTIMIZATIONS)}."
            )
    return names


def optimize_jaxpr(
    jaxpr: ClosedJaxpr,
    optimizations: str | Sequence[str] | None = OPTIMIZATIONS,
    max_iterations: int = 3,
) -> ClosedJaxpr:
    """Runs optimizations over a jaxpr until nothing changes.

    The result computes the same values, bit for bit, has the same effects in the
    same order, and can be used wherever `jaxpr` can: under `jax.jit`, `jax.grad`
    and `jax.vmap`, by `jax.extend.core.jaxpr_as_fun`.

    **Arguments:**

    - `jaxpr`: a jaxpr, for instance from `jax.make_jaxpr`. It is not changed.
    - `optimizations`: which ones, in the order in which they run; all five by default.
    - `max_iterations`: the maximum number of rounds. It stops earlier when a round
        changes nothing, which is usually the third.

    **Returns:** a jaxpr with the same inputs, outputs and effects; `jaxpr` itself if
    there is nothing to do.

    **Raises:** `ValueError` for an unknown optimization, or if `max_iterations` is below 1.

    !!! example

        ```python
        import jax, jax.numpy as jnp
        from statefun.ir import optimize_jaxpr

        def f(x):
            return (jnp.sin(x) ** 1 + jnp.sin(x)) * (2.0 - 1.0)

        jaxpr = optimize_jaxpr(jax.make_jaxpr(f)(1.0))
        print(jaxpr)  # sin, add
        ```
    """
    names = normalize_optimizations(optimizations)
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, not {max_iterations}.")
    passes = [_PASSES[name]() for name in names]
    for _ in range(max_iterations):
        before = jaxpr
        for run in passes:
            jaxpr = run(jaxpr)
        if jaxpr is before:
            break
    return jaxpr
