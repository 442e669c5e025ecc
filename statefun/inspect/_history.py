"""The history of a function's traces."""

from __future__ import annotations

import dataclasses
import weakref
from collections import OrderedDict, deque
from typing import Any

import jax

from .._call.calls import Calls
from .._call.compiled import Trace
from .._state.structure import leaves_of
from ._causes import Cause, Present

KEPT = 100
_GHOSTS = 256  # traces that are gone, but may still be asked for again
_LOOKED_AT = 32


@dataclasses.dataclass(frozen=True)
class Retrace:
    """Why a function was traced; `str` makes a line of it.

    **Attributes:**

    - `function`: its name.
    - `number`: 1 for its first trace.
    - `causes`: a tuple of [`statefun.Cause`][]: all that is different from the most
        similar of the cached traces.
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
class Ghost:
    """A trace that is gone: enough to recognize it, without keeping it alive."""

    cause: Cause
    key: int
    reads: tuple  # (position among the arguments' States or weak reference, …)

    def matches(self, present: Present) -> bool:
        if self.key != hash(present.key):
            return False
        if self.cause.kind == "gone":
            return True
        cells = list(present.site.arg_cells)
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


class History:
    """The history of one function's traces."""

    def __init__(self) -> None:
        self.retraces: deque[Retrace] = deque(maxlen=KEPT)
        self.ghosts: deque[Ghost] = deque(maxlen=_GHOSTS)
        self.configurations: weakref.WeakKeyDictionary[Trace, dict]
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
        found = [
            (trace, site)
            for site in list(present.site.calls.sites.values())
            for trace in list(site.traces)
            if trace in self.configurations
        ]
        found.sort(key=lambda found: -found[0].tick)
        # Only the most similar of the newest: a full comparison takes time.
        near = sorted(
            found[:_LOOKED_AT], key=lambda found: present.distance(found[1], found[0])
        )
        for trace, site in near[:2]:
            causes = present.differences(site, trace, self.configurations[trace])
            if causes:
                return tuple(causes)
        return (self._alone(present),)

    def _alone(self, present: Present) -> Cause:
        """The cause where there is no other trace to compare with."""
        if self.last == "tracer":
            return Cause("tracer")
        if self.last == "failed":
            return Cause("failed")
        if self.ghosts:
            return self.ghosts[-1].cause
        return Cause("first call")


class Silent(History):
    """The history of a function that is only inspected: none."""


def history_of(calls: Calls) -> History:
    if calls.history is None:
        calls.history = History()
    return calls.history


def unobserved(calls: Calls) -> Calls:
    """Records no history of the traces of these calls."""
    calls.history = Silent()
    return calls
