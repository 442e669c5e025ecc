"""What has been traced: the records of a function, the least recently used out first."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import jax

from .. import _compat
from .._compat import eval_context, jit_disabled
from .._state.cell import Cell
from .._state.state import State
from .._trace.program import Program


class CacheKey(NamedTuple):
    """What a traced function is filed under; hashable and immutable.

    **Attributes:**

    - `static_args`, `static_kwargs`: tree structure and static leaves of the positional
        and the keyword arguments. `1`, `1.0` and `True` are different.
    - `dyn_args`, `dyn_kwargs`: the abstract values (shape, dtype, weak type, sharding)
        of their arrays.
    """

    static_args: Any
    dyn_args: tuple
    static_kwargs: Any
    dyn_kwargs: tuple


class Record:
    """A program, and what a call needs to know about it."""

    __slots__ = (
        "__weakref__",
        "_arg_cells",
        "cells",
        "compiled",
        "context",
        "effects",
        "filed",
        "finish",
        "key",
        "may_fail",
        "n_out",
        "out",
        "program",
        "states",
        "steady",
        "structures",
        "targets",
        "tick",
        "written",
    )

    def __init__(self, program: Program, key: CacheKey, context: Any, arg_cells: Any):
        self.program = program
        self.key = key
        self.context = context
        self.n_out = program.n_out
        self.out = program.out
        # How `call.Fast` makes the result: it is None, or the first array, or built.
        self.finish = 0 if program.out.is_none else 1 if program.out.is_array else 2
        self.tick = 0
        self.filed = False
        self.compiled: Any = None  # for calls inside of a trace: just what it reads
        self._arg_cells = arg_cells
        self.may_fail = program.may_fail
        self.effects = bool(program.jaxpr.effects)
        self.written = tuple(program.writes)
        self.structures = tuple(program.writes.values())
        self.targets: tuple[Cell | int, ...] = tuple(
            arg_cells.get(cell, cell) for cell in self.written
        )
        own = tuple(t for t in self.targets if isinstance(t, Cell))
        # None if some are States of the arguments, another one in each call.
        self.cells = own if len(own) == len(self.targets) else None
        # Whether no write can change a structure that is known to be in place.
        self.steady = all(program.reads.get(c) is s for c, s in program.writes.items())
        # The actual States, weakly: a cache must not keep a model alive.
        self.states: tuple[weakref.ref[State], ...] = ()

    def arguments(self, states: Sequence[Any]) -> list[Any]:
        """Of States in the order of the program, those that came as arguments."""
        found = {
            self._arg_cells[c]: s
            for c, s in zip(self.program.order, states, strict=True)
            if c in self._arg_cells
        }
        return [found.get(i) for i in range(len(self._arg_cells))]


class Records:
    """At most `maxsize` records.

    A call that hits only stamps its record with the number of the call; which one is
    the oldest is found out when one has to go.
    """

    def __init__(self, maxsize: int = 128):
        self.maxsize = maxsize
        self.lookups = 0
        self.misses = 0
        self._lock = threading.Lock()
        self._records: dict[Record, None] = {}

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, record: Record) -> bool:
        return record in self._records

    def all(self) -> list[Record]:
        with self._lock:
            return list(self._records)

    def with_key(self, key: CacheKey) -> list[Record]:
        """Newest first."""
        return [r for r in reversed(self.all()) if r.key == key]

    def add(self, record: Record) -> list[Record]:
        """Files a record; returns those that had to go."""
        gone = []
        with self._lock:
            record.tick = self.lookups
            record.filed = True
            while len(self._records) >= self.maxsize:
                oldest = min(self._records, key=lambda r: r.tick)
                del self._records[oldest]
                oldest.filed = False
                gone.append(oldest)
            self._records[record] = None
        return gone

    def remove(self, records: list[Record]) -> None:
        with self._lock:
            for record in records:
                self._records.pop(record, None)
                record.filed = False

    def clear(self) -> None:
        with self._lock:
            for record in self._records:
                record.filed = False
            self._records.clear()
            self.lookups = self.misses = 0

    def stats(self) -> dict[str, Any]:
        lookups, misses = self.lookups, self.misses
        return {
            "size": len(self),
            "maxsize": self.maxsize,
            "hits": lookups - misses,
            "misses": misses,
            "hit_rate": (lookups - misses) / lookups if lookups else 0.0,
        }


class _Context:
    """A mark of everything in JAX's configuration that a trace depends on."""


# JAX keys its own caches by it (x64, matmul precision, mesh, …) and offers no public way
# to ask for the key. A jitted function that hands out a new mark whenever it is traced
# answers the question without one.
_mark = jax.jit(lambda: {_Context(): ()})


def trace_context() -> Any:
    """Equal for two calls exactly if `jax.jit` would not retrace between them."""
    if jit_disabled():
        return None
    with eval_context(), _compat.trace_generation(0):
        (mark,) = _mark()
    return mark


class TracingLock:
    """Held while a function is traced, so that two threads don't trace the same thing.

    Re-entrant. The user's code runs meanwhile and may have other functions traced: two
    threads that each hold the lock that the other one wants would wait for ever. One of
    them goes ahead without it then, and at worst a function is traced twice.
    """

    _guard = threading.Lock()
    _waiting: ClassVar[dict[int, TracingLock]] = {}

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._owner: int | None = None
        self._depth = 0

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        me = threading.get_ident()
        with self._guard:
            wait = not self._closes_a_circle(me)
            if wait:
                self._waiting[me] = self
        if not wait:
            yield
            return
        with self._lock:
            with self._guard:
                self._waiting.pop(me, None)
                self._owner = me
                self._depth += 1
            try:
                yield
            finally:
                with self._guard:
                    self._depth -= 1
                    if self._depth == 0:
                        self._owner = None

    def _closes_a_circle(self, me: int) -> bool:
        lock: TracingLock | None = self
        while lock is not None and lock._owner is not None:
            if lock._owner == me:
                return lock is not self  # its own lock it may enter again
            lock = self._waiting.get(lock._owner)
        return False
