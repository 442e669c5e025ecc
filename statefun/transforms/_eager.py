"""Loops and branches outside of any trace: compiled once, like `jax.lax`'s own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx

from .._call.calls import Calls
from .._call.compiled import Options
from .._compat import at_top_level, jit_disabled, makes_jaxpr
from .._state.access import local
from .._trace.transaction import transaction

F = TypeVar("F", bound=Callable[..., Any])


def compiled_when_eager(
    twin: Callable[..., Any] | None = None, *, bounds: int = 0
) -> Any:
    """Makes a twin that traces its body fast where it is called again and again.

    `jax.lax.scan` outside of `jax.jit` keeps what it has traced and compiled for a body,
    in a function that is differentiated or vectorized, too. So does this: the twin itself
    is run as a jitted function, with the bodies among its static arguments. At most 128
    traces are kept for each twin.

    **Arguments:**

    - `twin`: the twin; left out where this is a decorator with arguments.
    - `bounds`: how many arguments, the first, have a value that matters to `jax.lax`: a
        loop can be differentiated if it knows its bounds. Where they are arrays, the twin
        runs as it is inside of a transform.
    """
    if twin is None:
        return functools.partial(compiled_when_eager, bounds=bounds)
    calls = Calls(twin, Options(name=twin.__name__.lstrip("_")))

    @functools.wraps(twin)
    def call(*args: Any, **kwargs: Any) -> Any:
        outside = local.frame is None and at_top_level()
        if not jit_disabled() and (
            outside or not (makes_jaxpr() or any(map(eqx.is_array, args[:bounds])))
        ):
            return calls.run(args, kwargs)
        return transaction(lambda: twin(*args, **kwargs))

    call._calls = calls  # type: ignore[attr-defined]
    return call


def answering_for(run: Callable[..., Any]) -> Callable[[F], F]:
    """Lets a public twin say why the one that it runs was traced: `sf.scan.retraces()`."""
    calls = run._calls  # type: ignore[attr-defined]

    def answer(twin: F) -> F:
        twin._calls = calls  # type: ignore[attr-defined]
        twin.retraces = lambda: Calls.observer.history(calls)  # type: ignore[attr-defined]
        return twin

    return answer
