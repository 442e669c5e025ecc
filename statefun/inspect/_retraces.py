"""The reasons of traces: kept, logged, and limited."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import logging
import os
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax

from .. import _entry
from .._cache import Record
from .._call import Caller
from .._cell import Cell, Value
from .._entry import Entry, Observer, Traces
from .._errors import lesson
from .._structure import leaves_of
from ._causes import Cause, Kind, Present

KEPT = 100
_GHOSTS = 256  # traces that are gone, but may still be asked for again
_LOOKED_AT = 32

logger = logging.getLogger("statefun")


class TraceLimitError(RuntimeError):
    """A function was about to be traced more often than [`statefun.max_traces`][] allows.

    **Attributes:**

    - `retrace`: the trace that did not happen, with its causes.
    """

    def __init__(self, message: str, retrace: Retrace):
        super().__init__(message)
        self.retrace = retrace


@dataclasses.dataclass(frozen=True)
class Retrace:
    """Why a function was traced; `str` makes a line of it.

    **Attributes:**

    - `function`: its name.
    - `number`: 1 for its first trace.
    - `causes`: a tuple of [`statefun.Cause`][]: all that is different from the most
        similar of the traces at hand.
    """

    function: str
    number: int
    causes: tuple[Cause, ...]

    @property
    def cause(self) -> str:
        """The causes in one phrase."""
        shown = "; ".join(map(str, self.causes[:3]))
        more = len(self.causes) - 3
        return shown + (f"; and {more} more" if more > 0 else "")

    def __str__(self) -> str:
        return f"{self.function}, trace {self.number}: {self.cause}"


@dataclasses.dataclass(frozen=True)
class _Ghost:
    """A trace that is gone, so far as to recognise it without keeping it alive."""

    cause: Cause
    key: int
    reads: tuple  # (position among the arguments' States or weak reference, …)

    def matches(self, present: Present) -> bool:
        if self.key != hash(present.key):
            return False
        if self.cause.kind == "gone":
            return True
        cells = list(present.entry.arg_cells)
        for where, structure, avals in self.reads:
            cell = cells[where] if isinstance(where, int) else where()
            if cell is None:
                return False
            flat, now = present.current(cell)
            if hash(now.key) != structure or _avals(flat, now) != avals:
                return False
        return True


def _avals(flat: Any, structure: Any) -> tuple:
    return tuple(jax.typeof(x) for x in leaves_of(flat, structure))


class _History:
    """What is remembered of one function's traces."""

    def __init__(self) -> None:
        self.retraces: deque[Retrace] = deque(maxlen=KEPT)
        self.ghosts: deque[_Ghost] = deque(maxlen=_GHOSTS)
        self.configurations: weakref.WeakKeyDictionary[Record, dict]
        self.configurations = weakref.WeakKeyDictionary()
        self.begun = 0
        self.last = ""  # how the last trace went
        # The configurations of traces under way, by thread and what is traced.
        self.pending: OrderedDict[tuple[int, int], dict] = OrderedDict()
        self.limits: list[tuple[int, int]] = []  # begun when it was set, and how many

    def causes(self, present: Present) -> tuple[Cause, ...]:
        for ghost in reversed(self.ghosts):
            if ghost.matches(present):
                self.ghosts.remove(ghost)
                return (ghost.cause,)
        records = [
            (record, entry)
            for entry in list(present.entry.traces.entries.values())
            for record in list(entry.records)
            if record in self.configurations
        ]
        records.sort(key=lambda found: -found[0].tick)
        # The most similar of the newest: looking closely takes time.
        near = sorted(
            records[:_LOOKED_AT], key=lambda found: present.distance(found[1], found[0])
        )
        for record, entry in near[:2]:
            causes = present.differences(entry, record, self.configurations[record])
            if causes:
                return tuple(causes)
        return (self._alone(present),)

    def _alone(self, present: Present) -> Cause:
        """Where there is no other trace to compare with."""
        if self.last == "tracer":
            return Cause("tracer")
        if self.last == "failed":
            return Cause("failed")
        if self.ghosts:
            return self.ghosts[-1].cause
        return Cause("first call")


_WHY: dict[str, Kind] = {"full": "cache full", "cleared": "cleared", "gone": "gone"}


class _Silent(_History):
    """Of a function that is only looked at."""


class _Observer(Observer):
    """Keeps a history for each function that is traced."""

    _lock = threading.Lock()

    def tracing(
        self, entry: Entry, dynamic: Sequence[Any], known: Mapping[Cell, Value]
    ) -> None:
        history = _history(entry.traces)
        if isinstance(history, _Silent):
            return
        present = Present(entry, dynamic, known)
        causes = history.causes(present)
        name = entry.traces.options.name
        retrace = Retrace(name, history.begun + 1, causes)
        _check_limits(entry.traces, history, retrace)
        with self._lock:
            history.begun += 1
            history.retraces.append(retrace)
            history.last = "failed"  # until it has come to its end
            under_way = threading.get_ident(), hash(present.key)
            history.pending[under_way] = present.configuration
            if len(history.pending) > KEPT:  # those that raised
                history.pending.popitem(last=False)
        if _logs():
            logger.warning("%s", retrace)

    def traced(self, entry: Entry, record: Record) -> None:
        history = _history(entry.traces)
        with self._lock:
            history.last = "tracer" if record.program.closed_over_tracers else "kept"
            under_way = threading.get_ident(), hash(record.key)
            configuration = history.pending.pop(under_way, None)
            if configuration is not None:
                history.configurations[record] = configuration

    def forgetting(self, traces: Traces, records: Sequence[Record], why: str) -> None:
        history = _history(traces)
        for record in records:
            program = record.program
            index = {cell: i for i, cell in enumerate(record._arg_cells)}
            reads = tuple(
                (index.get(cell, weakref.ref(cell)), hash(structure.key), avals)
                for cell, structure, avals in program.reads_with_avals()
            )
            lost = [
                cell.path or cell.name or cell.describe()
                for cell in program.order
                if cell not in index and (cell.handle is None or cell.handle() is None)
            ]
            cause = Cause(_WHY[why], lost[0] if lost and why == "gone" else "")
            history.ghosts.append(_Ghost(cause, hash(record.key), reads))

    def history(self, traces: Traces) -> list[Any]:
        with self._lock:
            return list(_history(traces).retraces)


def _history(traces: Traces) -> _History:
    if traces.history is None:
        traces.history = _History()
    return traces.history


def unobserved(caller: Caller) -> Caller:
    """Makes the traces of a caller nobody's business."""
    caller.history = _Silent()
    return caller


_entry.observer = _Observer()


# -- logging ------------------------------------------------------------------------


class _Logging:
    lock = threading.Lock()
    depth = 0


def _logs() -> bool:
    # Looked up at each trace: it costs nothing beside one, and may be set late.
    return _Logging.depth > 0 or os.environ.get("STATEFUN_LOG_RETRACES", "") not in (
        "",
        "0",
    )


@contextlib.contextmanager
def log_retraces() -> Iterator[None]:
    """Logs why functions are traced, one line for each trace.

    A context manager; inside of it, in all threads, every trace of a function that is
    compiled (`filter_jit`, `StatefulFunction`, `scan` outside of a transform, …) goes to
    the logger "statefun", at level WARNING, so that it shows without any set-up. The
    environment variable `STATEFUN_LOG_RETRACES=1` does the same for the whole program.

    !!! example

        ```python
        import jax.numpy as jnp, statefun as sf

        double = sf.filter_jit(lambda x: 2 * x, name="double")
        with sf.log_retraces():
            double(jnp.ones(3))  # double, trace 1: first call
            double(jnp.ones(4))  # … other shape of argument `x` (float32[3] → float32[4])
        ```
    """
    with _Logging.lock:
        _Logging.depth += 1
    try:
        yield
    finally:
        with _Logging.lock:
            _Logging.depth -= 1


# -- limits -------------------------------------------------------------------------

F = TypeVar("F", bound=Callable[..., Any])


class _Budget:
    """How often functions have been traced since a block was entered."""

    def __init__(self, limit: int):
        self.limit = limit
        self.counts: weakref.WeakKeyDictionary[Traces, int]
        self.counts = weakref.WeakKeyDictionary()


_budgets: contextvars.ContextVar[tuple[_Budget, ...]]
_budgets = contextvars.ContextVar("statefun_max_traces", default=())


def _check_limits(traces: Traces, history: _History, retrace: Retrace) -> None:
    for begun, limit in history.limits:
        if history.begun - begun >= limit:
            raise _beyond(limit, retrace)
    budgets = _budgets.get()
    for budget in budgets:
        if budget.counts.get(traces, 0) >= budget.limit:
            raise _beyond(budget.limit, retrace)
    for budget in budgets:
        budget.counts[traces] = budget.counts.get(traces, 0) + 1


def _beyond(limit: int, retrace: Retrace) -> TraceLimitError:
    return TraceLimitError(
        lesson(
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

    *As a decorator* of a function that is compiled, put above `filter_jit`: the function
    may be traced `n` times from now on, in all threads. *As a context manager*, or as the
    decorator of any other function: while the block (or a call of the function) runs,
    each compiled function that it calls, in this thread, may be traced `n` times;
    `max_traces(0)` says that everything has been compiled.

    **Arguments:**

    - `n`: how many traces are allowed.

    **Raises:** `statefun.TraceLimitError` before the trace that is one too many; no State
    has changed then.

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
        caller = getattr(fun, "_caller", None)
        if isinstance(caller, Caller):
            history = _history(caller)
            history.limits.append((history.begun, self.n))
            return fun

        @functools.wraps(fun)
        def limited(*args: Any, **kwargs: Any) -> Any:
            with max_traces(self.n):
                return fun(*args, **kwargs)

        return limited  # type: ignore[return-value]
