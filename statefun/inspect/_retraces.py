"""The reasons of traces, looked up as they happen, and logged."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .._call import entry as _entry
from .._call.cache import Record
from .._call.entry import Entry, Observer, Traces
from .._state.cell import Cell, Value
from ._causes import Cause, Kind, Present
from ._history import KEPT, Ghost, Retrace, Silent, history_of
from ._limits import check_limits

logger = logging.getLogger("statefun")

_WHY: dict[str, Kind] = {"full": "cache full", "cleared": "cleared", "gone": "gone"}


class _Observer(Observer):
    """Keeps a history for each function that is traced."""

    _lock = threading.Lock()

    def tracing(
        self, entry: Entry, dynamic: Sequence[Any], known: Mapping[Cell, Value]
    ) -> None:
        history = history_of(entry.traces)
        if isinstance(history, Silent):
            return
        present = Present(entry, dynamic, known)
        causes = history.causes(present)
        name = entry.traces.options.name
        retrace = Retrace(name, history.begun + 1, causes)
        check_limits(entry.traces, history, retrace)
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
        history = history_of(entry.traces)
        with self._lock:
            history.last = "tracer" if record.program.closed_over_tracers else "kept"
            under_way = threading.get_ident(), hash(record.key)
            configuration = history.pending.pop(under_way, None)
            if configuration is not None:
                history.configurations[record] = configuration

    def forgetting(self, traces: Traces, records: Sequence[Record], why: str) -> None:
        history = history_of(traces)
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
            history.ghosts.append(Ghost(cause, hash(record.key), reads))

    def history(self, traces: Traces) -> list[Any]:
        with self._lock:
            return list(history_of(traces).retraces)


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
