"""Loops and branches outside of any transform: compiled once, like `jax.lax`'s own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from .._call.calls import Calls
from .._call.compiled import Options
from .._compat import at_top_level, jit_disabled
from .._state.access import local
from .._trace.frame import transaction

F = TypeVar("F", bound=Callable[..., Any])


def compiled_when_eager(twin: F) -> F:
    """Makes a twin that caches what it has traced for calls outside of any trace.

    `jax.lax.scan` outside of `jax.jit` caches what it has traced and compiled for a
    body. So does this: the twin itself runs as a jitted function, with the bodies among
    its static arguments. At most 128 traces are kept for each twin.
    """
    calls = Calls(twin, Options(name=twin.__name__.lstrip("_")))

    @functools.wraps(twin)
    def call(*args: Any, **kwargs: Any) -> Any:
        if local.frame is None and at_top_level() and not jit_disabled():
            return calls.run(args, kwargs)
        return transaction(lambda: twin(*args, **kwargs))

    call._calls = calls  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


def answering_for(run: Callable[..., Any]) -> Callable[[F], F]:
    """Lets a public twin say why the one that it runs was traced: `sf.scan.retraces()`."""
    calls = run._calls  # type: ignore[attr-defined]

    def answer(twin: F) -> F:
        twin._calls = calls  # type: ignore[attr-defined]
        twin.retraces = lambda: Calls.observer.history(calls)  # type: ignore[attr-defined]
        return twin

    return answer
