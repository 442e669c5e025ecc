"""`max_traces`: a limit to how often functions are traced."""

from __future__ import annotations

import contextvars
import functools
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from .._call.calls import Calls
from .._errors import message
from ._history import History, Retrace, history_of

F = TypeVar("F", bound=Callable[..., Any])


class TraceLimitError(RuntimeError):
    """A function was about to be traced more often than [`statefun.max_traces`][] allows.

    **Attributes:**

    - `retrace`: the trace that did not happen, with its causes.
    """

    def __init__(self, message: str, retrace: Retrace):
        super().__init__(message)
        self.retrace = retrace


class _Budget:
    """How often functions have been traced since a block was entered."""

    def __init__(self, limit: int):
        self.limit = limit
        self.counts: weakref.WeakKeyDictionary[Calls, int]
        self.counts = weakref.WeakKeyDictionary()


_budgets: contextvars.ContextVar[tuple[_Budget, ...]]
_budgets = contextvars.ContextVar("statefun_max_traces", default=())


def check_limits(calls: Calls, history: History, retrace: Retrace) -> None:
    for begun, limit in history.limits:
        if history.begun - begun >= limit:
            raise _beyond(limit, retrace)
    budgets = _budgets.get()
    for budget in budgets:
        if budget.counts.get(calls, 0) >= budget.limit:
            raise _beyond(budget.limit, retrace)
    for budget in budgets:
        budget.counts[calls] = budget.counts.get(calls, 0) + 1


def _beyond(limit: int, retrace: Retrace) -> TraceLimitError:
    return TraceLimitError(
        message(
            f"{retrace.function} would be traced more than {limit} "
            f"time{'' if limit == 1 else 's'}: {retrace.cause}.",
            "`statefun.max_traces` forbids it: each trace costs the time to trace and "
            "compile the function. Nothing was traced, and no State has changed.",
            "pass arguments of the same shapes, dtypes and static values as before, or "
            "allow more traces. `retraces()` of the function lists those there were.",
        ),
        retrace,
    )


class max_traces:
    """Raises when a function is traced more than `n` times, and names the cause.

    *As a decorator* of a function that is compiled, put above `filter_jit`: the
    function may be traced `n` times from now on, in all threads. *As a context
    manager*, or as the decorator of any other function: while the block (or a call of
    the function) runs, each compiled function that it calls, in this thread, may be
    traced `n` times; `max_traces(0)` asserts that everything has been compiled.

    **Arguments:**

    - `n`: how many traces are allowed.

    **Raises:** `statefun.TraceLimitError` before the trace that would exceed the limit;
    no State has changed then.

    !!! example

        ```python
        import jax.numpy as jnp, statefun as sf

        @sf.max_traces(1)
        @sf.filter_jit
        def double(x):
            return 2 * x

        double(jnp.ones(3))
        with sf.max_traces(0):
            double(jnp.zeros(3))
        ```
    """

    def __init__(self, n: int):
        if isinstance(n, bool) or not isinstance(n, int) or n < 0:
            raise ValueError(f"max_traces takes a number from 0 on, not {n!r}.")
        self.n = n
        self._tokens: list[contextvars.Token] = []

    def __enter__(self) -> max_traces:
        self._tokens.append(_budgets.set((*_budgets.get(), _Budget(self.n))))
        return self

    def __exit__(self, *_: Any) -> None:
        _budgets.reset(self._tokens.pop())

    def __call__(self, fun: F) -> F:
        calls = getattr(fun, "_calls", None)
        if isinstance(calls, Calls):
            history = history_of(calls)
            history.limits.append((history.begun, self.n))
            return fun

        @functools.wraps(fun)
        def limited(*args: Any, **kwargs: Any) -> Any:
            with max_traces(self.n):
                return fun(*args, **kwargs)

        return limited  # type: ignore[return-value]
