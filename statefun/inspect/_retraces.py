"""The causes of traces, determined as they happen, and logged."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .._call.args import Weak
from .._call.calls import Calls, Observer
from .._call.compiled import Trace
from .._call.site import Site
from .._state.cell import Cell, Value
from .._trace.names import Parameters
from ._causes import Cause, Kind, Present, leaves_with_path
from ._history import KEPT, Ghost, Retrace, Silent, history_of
from ._limits import check_limits

logger = logging.getLogger("statefun")

_WHY: dict[str, Kind] = {"full": "cache full", "cleared": "cleared"}


class _Observer(Observer):
    """Keeps a history for each function that is traced."""

    def tracing(
        self, site: Site, dynamic: Sequence[Any], values: Mapping[Cell, Value]
    ) -> None:
        history = history_of(site.calls)
        if isinstance(history, Silent):
            return
        present = Present(site, dynamic, values)
        causes = history.causes(present)
        name = site.calls.options.name
        retrace = Retrace(name, history.begun + 1, causes)
        check_limits(site.calls, history, retrace)
        history.begun += 1
        history.retraces.append(retrace)
        history.last = "failed"  # until it has come to its end
        under_way = threading.get_ident(), hash(present.key)
        history.pending[under_way] = present.configuration
        if len(history.pending) > KEPT:  # those that raised
            history.pending.popitem(last=False)
        if _logs():
            logger.warning("%s", retrace)

    def traced(self, site: Site, trace: Trace) -> None:
        history = history_of(site.calls)
        history.last = "tracer" if trace.program.closed_over_tracers else "kept"
        under_way = threading.get_ident(), hash(trace.key)
        configuration = history.pending.pop(under_way, None)
        if configuration is not None:
            history.configurations[trace] = configuration

    def forgetting(self, calls: Calls, traces: Sequence[Trace], why: str) -> None:
        self._bury(calls, traces, Cause(_WHY[why]))

    def dropping(self, site: Site) -> None:
        states = [c.path or c.name or c.describe() for c in site.gone()]
        cause = Cause("gone", states[0]) if states else _gone_leaf(site)
        self._bury(site.calls, site.traces, cause)

    def _bury(self, calls: Calls, traces: Sequence[Trace], cause: Cause) -> None:
        history = history_of(calls)
        for trace in traces:
            places = zip(trace.program.order, trace.positions, strict=True)
            index = {cell: i for cell, i in places if i is not None}
            reads = tuple(
                (index.get(cell, weakref.ref(cell)), hash(structure.key), avals)
                for cell, structure, avals in trace.program.reads_with_avals()
            )
            history.ghosts.append(Ghost(cause, hash(trace.key), reads))

    def history(self, calls: Calls) -> list[Any]:
        return list(history_of(calls).retraces.copy())


def _gone_leaf(site: Site) -> Cause:
    """A function, or another object that is equal to itself only, that was passed."""
    parameters = Parameters(site.calls.fun)
    for keys, leaf in leaves_with_path(site.signature):
        if type(leaf) is Weak and leaf.peek() is None:
            old = f"{leaf.label}, which is gone"
            return Cause("static", parameters.path(keys), "value", old, "another one")
    return Cause("gone")


Calls.observer = _Observer()


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
